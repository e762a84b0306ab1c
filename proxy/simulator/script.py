"""What a server with faults does: a reply and its faults in, single actions out.

No clock and no socket: ``server`` plays the script.
"""

import re
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Literal, TypeAlias

import msgspec

from proxy.simulator.answers import JSON, Reply, Stream, Whole
from proxy.simulator.events import DONE, KEEP_ALIVE, frame
from proxy.simulator.faults import END, NOTHING, Faults


class Head(msgspec.Struct, frozen=True):
    """The status line and the headers; without a ``length`` the body is chunked."""

    status: int
    headers: dict[str, str]
    length: int | None


class Tokens(msgspec.Struct, frozen=True):
    """Wait until that many more tokens would be there."""

    count: int


class Sleep(msgspec.Struct, frozen=True):
    seconds: float


class Cut(msgspec.Struct, frozen=True):
    how: Literal["fin", "rst"]


class End(msgspec.Struct, frozen=True):
    """The body is over, as its framing says it."""


# Bytes are one write.
Action: TypeAlias = Head | Tokens | Sleep | bytes | Cut | End

BOM = b"\xef\xbb\xbf"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
# Long enough for a reader to get its turn between two writes.
_APART = Sleep(0.005)
_PAD_BYTES = 1 << 16
_encode = msgspec.json.encode


def script(reply: Reply, faults: Faults) -> Iterator[Action]:
    """Return what happens instead of a plain ``reply``."""
    after, is_error = faults.after, faults.error is not None
    if is_error and (
        after == NOTHING or faults.redirect is not None or isinstance(reply, Whole)
    ):
        # A cut or a stall that was asked for besides comes within the error's body.
        reply, after, is_error = _error_reply(faults), 1.0, False
    yield Sleep(faults.delay_head)
    needs_head = faults.only or faults.oversized or faults.cut == "short"
    if after == NOTHING and not needs_head:
        if (yield from _break(faults)):
            return
        faults = msgspec.structs.replace(faults, stall=0.0)
    if faults.bomb:
        yield from _bomb(reply, faults.bomb)
    elif isinstance(reply, Stream):
        yield _head(200, reply.headers, faults, None)
        events = (
            step for step in reply.events if not (faults.no_done and step[1] == DONE)
        )
        yield from _body(events, faults, after, is_error)
    else:
        yield from _whole(reply, faults, after)


def _whole(reply: Whole, faults: Faults, after: float) -> Iterator[Action]:
    body = b" " * (faults.oversized or 0) + reply.body
    length = len(body) + len(BOM) * faults.bom
    endless = faults.only is not None or faults.cut == "short"
    yield Tokens(reply.steps)
    yield _head(reply.status, reply.headers, faults, None if endless else length)
    half = len(body) // 2
    halves = iter([(0, body[:half]), (0, body[half:])])
    plain = msgspec.structs.replace(faults, lines="lf", oversized=None)
    yield from _body(halves, plain, after if after == END else min(after, 1.0), False)


def _head(
    status: int, headers: dict[str, str], faults: Faults, length: int | None
) -> Head:
    if faults.content_type:
        headers = headers | {"content-type": faults.content_type}
    return Head(status, headers, length)


def _body(
    events: Iterator[tuple[int, bytes]], faults: Faults, after: float, is_error: bool
) -> Iterator[Action]:
    """The events, with what goes wrong after so many of them, up to the end."""
    form = _form(faults)
    if faults.bom:
        yield BOM
    is_spoilt = False
    for count, (needed, event) in enumerate(events):
        if not is_spoilt and count == int(max(after, 0)):
            is_spoilt = True
            if faults.oversized:
                event = _pad(event, faults.oversized)
            half = len(event) // 2 if after > 0 and after % 1 else 0
            yield from form(event[:half])
            event = event[half:]
            if (yield from _spoil(faults, event, form, is_error)):
                return
        yield Sleep(faults.delay_gap if count else faults.delay_first)
        yield Tokens(needed)
        yield from form(event)
    if not is_spoilt and (yield from _spoil(faults, b"", form, is_error)):
        return
    yield Sleep(faults.delay_end)
    yield End()


def _spoil(
    faults: Faults, event: bytes, form: "_Form", is_error: bool
) -> Generator[Action, None, bool]:
    """Do what goes wrong before ``event``; return whether the reply is over then."""
    if is_error:
        yield from form(_error_event(faults))
    while faults.only is not None:
        yield Sleep(faults.interval)
        yield from form(_idle(faults.only, event))
    if (yield from _break(faults)):
        return True
    if is_error:
        yield End()
    return is_error


def _break(faults: Faults) -> Generator[Action, None, bool]:
    yield Sleep(faults.stall)
    if faults.cut is None:
        return False
    yield End() if faults.cut == "short" else Cut(faults.cut)
    return True


def _pad(event: bytes, size: int) -> bytes:
    """Make an event that long, by blanks before its JSON."""
    return event.replace(b"data: ", b"data: " + b" " * max(0, size - len(event)), 1)


def _idle(kind: str, event: bytes) -> bytes:
    """What says nothing: a comment, a ping, or ``event`` without its text."""
    if event and not event.startswith(b"data: "):
        return b" "  # a reply in one piece is padded, as some gateways do
    if kind == "empty" and event not in (b"", DONE):
        return _TEXT.sub(rb'\1""', event)
    return PING if kind == "pings" else KEEP_ALIVE


# The text of a chat's chunk, of a completion's, of TGI's own event.
_TEXT = re.compile(rb'("(?:content|text|generated_text)":)"(?:[^"\\]|\\.)*"')


def _bomb(reply: Reply, size: int) -> Iterator[Action]:
    yield Head(200, reply.headers | {"content-encoding": "gzip"}, None)
    packer = zlib.compressobj(9, wbits=31)
    yield packer.compress(b"data: " if isinstance(reply, Stream) else b"") or b""
    blanks = b" " * _PAD_BYTES
    for _ in range(0, size, _PAD_BYTES):
        if packed := packer.compress(blanks):
            yield packed
    yield packer.flush()
    yield End()


# --- the form of what is sent --------------------------------------------------------

_Form: TypeAlias = Callable[[bytes], Iterator[Action]]
_LINE_END = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}
_CHARACTER = re.compile(rb"[\xc2-\xf4][\x80-\xbf]")


def _form(faults: Faults) -> _Form:
    """Return how the bytes of an event become writes."""
    line_end = _LINE_END[faults.lines]

    def form(data: bytes) -> Iterator[Action]:
        data = data.replace(b"\n", line_end)
        if faults.trickle is not None:
            for at in range(len(data)):
                yield data[at : at + 1]
                yield Sleep(faults.trickle)
        elif faults.split_utf8 and (found := _CHARACTER.search(data)):
            yield data[: found.start() + 1]
            yield _APART
            yield data[found.start() + 1 :]
            yield _APART
        elif data:
            yield data

    return form


# --- errors in the words of each kind of server --------------------------------------


class _Words(msgspec.Struct):
    """One error: its text, and its type as TGI, OpenAI, Anthropic and Google say it."""

    text: str
    tgi: str
    openai: str
    anthropic: str
    google: str


_OVERLOADED = _Words(
    "Model is overloaded",
    *("overloaded", "rate_limit_exceeded", "rate_limit_error", "RESOURCE_EXHAUSTED"),
)
_INVALID = _Words(
    "Input validation error: simulated",
    *("validation", "invalid_request_error", "invalid_request_error"),
    "INVALID_ARGUMENT",
)
_UNAVAILABLE = _Words(
    "Service unavailable: simulated",
    *("unavailable", "unavailable_error", "overloaded_error", "UNAVAILABLE"),
)
_FAILED = _Words(
    "Request failed during generation: simulated",
    *("generation", "server_error", "api_error", "INTERNAL"),
)


def _words(status: int) -> _Words:
    if status == 429:
        return _OVERLOADED
    if status in (503, 529):
        return _UNAVAILABLE
    return _INVALID if status < 500 else _FAILED


_PAYLOADS: dict[str, Callable[[_Words, int], object]] = {
    "tgi": lambda words, _: {"error": words.text, "error_type": words.tgi},
    "tgi-openai": lambda words, _: {
        "error": {"message": words.text, "http_status_code": 422}
    },
    "openai": lambda words, _: {
        "error": {
            "message": words.text,
            "type": words.openai,
            "param": None,
            "code": words.openai,
        }
    },
    "vllm": lambda words, status: {
        "object": "error",
        "message": words.text,
        "type": words.openai,
        "param": None,
        "code": status,
    },
    "ollama": lambda words, _: {"error": words.text},
    "llamacpp": lambda words, status: {
        "error": {"code": status, "message": words.text, "type": words.openai}
    },
    "anthropic": lambda words, _: {
        "type": "error",
        "error": {"type": words.anthropic, "message": words.text},
    },
    "google": lambda words, status: [
        {"error": {"code": status, "message": words.text, "status": words.google}}
    ],
    "fastapi": lambda words, _: {"detail": words.text},
    "gateway": lambda words, _: {"message": words.text},
}


def _error_body(faults: Faults) -> tuple[str, bytes]:
    """Return an error as a body, and its content type."""
    words = _words(faults.status)
    match faults.error:
        case None | "empty":
            return "", b""
        case "text":
            return "text/plain", f"error: {words.text}".encode()
        case "html":
            page = (
                f"<html><body>\n<h1>{faults.status} {words.text}</h1>\n</body></html>"
            )
            return "text/html", page.encode()
        case shape:
            return JSON, _encode(_PAYLOADS[shape](words, faults.status))


def _error_event(faults: Faults) -> bytes:
    """Return an error as it stands within a stream."""
    _, body = _error_body(faults)
    match faults.error:
        case "anthropic":
            return b"event: error\n" + frame(body)
        case "llamacpp":
            # Its old servers: a field that the standard does not know.
            return b"error: " + body + b"\n\n"
        case "html" | "empty":
            return body
        case _:
            return frame(body)


def _error_reply(faults: Faults) -> Whole:
    """Return an error as a reply of its own; within a 200 if something was sent."""
    headers = {}
    if faults.redirect:
        return Whole(faults.redirect, {"location": "/health"})
    kind, body = _error_body(faults)
    if kind:
        headers["content-type"] = kind
    if faults.retry_after is not None:
        headers["retry-after"] = f"{faults.retry_after:g}"
    return Whole(faults.status if faults.after == NOTHING else 200, headers, body)
