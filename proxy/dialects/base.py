"""What every dialect is made of: the interfaces between it and the exchange."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Protocol, TypeVar, cast

import msgspec

from proxy.completion import CompletionRequest, Delta, Text, Usage
from proxy.dialects.fault import (
    decode_lenient,
    fault_in,
    fault_in_text,
    is_answer,
)
from proxy.errors import (
    ProxyError,
    UpstreamFault,
    UpstreamGarbled,
    UpstreamReported,
    UpstreamStatus,
    UpstreamTruncated,
)
from proxy.sse import Event

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
# For clients whose parsers leave comments out.
COMMENT = b": keep-alive\n\n"

# Python's own encoder, since models do send halves of surrogate pairs, which msgspec
# refuses and ASCII can say. Made once: that takes a third of the time of a small value.
dump = json.JSONEncoder(separators=(",", ":")).encode
_dump_lines = json.JSONEncoder(separators=("\n", ":")).encode

SNIPPET_CHARS = 200
RETRY_AFTER_S = 5


class Head(msgspec.Struct, frozen=True):
    """A client's request without its body. ``headers`` ignores case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


class StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


_NULL = msgspec.Raw(b"null")


class Chosen(msgspec.Struct, gc=False):
    """What of a JSON body decides where it goes, and what form its reply has."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: object = None
    prompt: msgspec.Raw = _NULL

    @property
    def is_several(self) -> bool:
        """Several answers at once are asked for."""
        is_list = self.prompt is not _NULL and bytes(self.prompt)[:1] == b"["
        return is_list or self.n not in (None, 1)


_decode_chosen = msgspec.json.Decoder(Chosen).decode


def choose(body: bytes) -> Chosen | None:
    """None if it is no JSON object that has these fields in the usual types."""
    try:
        return _decode_chosen(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


class Reply(msgspec.Struct):
    """A whole reply to a client."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = {}


@lru_cache(maxsize=256)
def media_type(content_type: str) -> str:
    """Return a content type without its parameters, lower case."""
    return content_type.partition(";")[0].strip().lower()


def error_headers(error: ProxyError) -> dict[str, str]:
    """The headers that go with an error, whatever the dialect.

    TGI and others never say when to come back; clients need to know.
    """
    headers = dict(error.headers)
    if error.status == 429 and "retry-after" not in headers:
        headers["retry-after"] = str(RETRY_AFTER_S)
    return headers


def client_status(error: ProxyError) -> int:
    """The status for clients that know no other way to say an error.

    An upstream's 401 or 403 is a verdict on the proxy's credential; the client would
    take it for one on its own, which it is only if that was what the upstream got.
    """
    is_clients = isinstance(error, UpstreamStatus) and error.is_clients_credential
    is_verdict = error.status in (401, 403) and not is_clients
    is_error = 400 <= error.status <= 599
    if isinstance(error, UpstreamFault) and (is_verdict or not is_error):
        return 502
    return error.status


def upstream_words(error: ProxyError) -> str:
    """What the upstream itself said, without what stands around it.

    Out of the message only: no other text of the error went through the redactor.
    """
    if not isinstance(error, UpstreamStatus):
        return error.message
    said = error.message.partition(f" unexpected status code {error.status}: ")[2]
    fault = fault_in(decode_lenient(said))
    return (fault.detail if fault is not None else "") or error.message


class Writer(Protocol):
    """Says one reply in the client's dialect.

    Either ``frames`` any number of times and then ``end`` or ``error``; or ``body``
    once. ``error_reply`` is for failures while nothing has been sent yet.
    """

    @property
    def stream_headers(self) -> Mapping[str, str]: ...
    def frames(self, deltas: list[Delta]) -> bytes: ...
    def end(self) -> bytes: ...
    def error(self, error: ProxyError) -> bytes: ...
    def body(self, deltas: list[Delta]) -> bytes: ...
    def error_reply(self, error: ProxyError) -> Reply: ...

    def keep_alive(self) -> bytes:
        """A frame that says nothing, between two others or before the first one."""
        ...

    def literals(self, texts: list[bytes]) -> bytes | None:
        """Return the frames of texts that are not empty and stand in JSON as they are.

        None: there is no short way to say them, or not now.
        """
        ...


class Incoming(Protocol):
    """The client's side of a dialect, for one path.

    ``dialect`` names the wire format: an upstream that speaks the same one gets the
    client's own bytes instead of a translation.
    """

    dialect: str

    def check(self, head: Head) -> None:
        """Refuse what can be refused of a known client before its body is read.

        Raises: ClientFault: what is wrong.
        """
        ...

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        """Raises: ClientFault: what is wrong with the body."""
        ...

    def error_reply(self, error: ProxyError) -> Reply:
        """Say a failure that happened before there was a writer."""
        ...


class Native(Incoming, Protocol):
    """A dialect whose requests and replies can pass through."""

    def sketch(self, head: Head, chosen: Chosen) -> tuple[CompletionRequest, Writer]:
        """Return what is known of a request whose body passes: not its messages."""
        ...


def positive(value: float | None) -> int | None:
    """Read a client's whole number; zero, a negative or an absurd one says nothing."""
    return int(value) if value is not None and 1 <= value < 2**31 else None


def at_least_zero(value: float | None) -> float | None:
    """Read a client's number; a negative one says nothing."""
    return value if value is not None and value >= 0 else None


def texts_of(deltas: list[Delta]) -> list[str] | None:
    """Return the texts if there are several and nothing else."""
    if len(deltas) > 1 and set(map(type, deltas)) == _ONLY_TEXT:
        return [delta.text for delta in cast("list[Text]", deltas)]
    return None


def quote_each(texts: list[str], before: str, after: str) -> str:
    """Return each text as a JSON string between ``before`` and ``after``.

    All at once: no line ends within a JSON string, so what is between two of them is
    found in nothing else. (Not so of quotes and a comma: the text may be a comma.)
    """
    strings = _dump_lines(texts)[1:-1]
    return before + strings.replace("\n", after + before) + after


def frame_each(texts: list[bytes], before: bytes, after: bytes) -> bytes:
    """The same for texts that stand in JSON as they are."""
    if len(texts) == 1:
        return b"".join((before, texts[0], after))
    return before + (after + before).join(texts) + after


_ONLY_TEXT = {Text}

_T = TypeVar("_T")


def decode_typed(
    data: str | bytes, kind: type[_T], decode: Callable[..., _T]
) -> _T | None:
    """Decode JSON as ``kind``, None if it is something else.

    Some servers cut a surrogate pair ("\\ud83d" | "\\ude00") over two events, which
    msgspec refuses and the client's JSON parser, given both, understands.
    """
    try:
        return decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    try:
        return msgspec.convert(decode_lenient(data), kind)
    except (msgspec.ValidationError, UnicodeError):
        # The second: half a pair where no text belongs, which msgspec wants to quote.
        return None


class Reader:
    """Turns the events of one upstream reply into deltas.

    ``finished``: the answer is complete, only usage may follow. ``ended``: nothing
    at all follows. ``usage``: the latest token counts, which the exchange passes on
    once, at the end.
    """

    finished = False
    ended = False
    usage: Usage | None = None
    model = ""
    understood = False
    _skipped = ""

    def read(self, event: Event, out: list[Delta]) -> None:
        """Append what ``event`` says to ``out``.

        Raises: UpstreamFault: the event is, or contains, an error.
        """
        raise NotImplementedError

    def read_body(self, body: bytes) -> list[Delta]:
        """Return what a whole reply says.

        Raises: UpstreamFault: it is an error, or is not of this dialect.
        """
        raise NotImplementedError

    def check_body(self, body: bytes) -> bool:
        """Look for an error and for usage in a whole reply that passes. Return whether
        it is known to be as clients expect it.

        Raises: UpstreamFault: like ``read_body``.
        """
        self.read_body(body)
        return False

    def read_odd(self, event: Event) -> None:
        """Look at an event that is not of this dialect.

        Raises: UpstreamReported: it is an error, of whatever shape.
        """
        value = decode_lenient(event.data)
        named = event.type == "error"
        fault = fault_in(value, named=named)
        if fault is None and value is None:
            fault = fault_in_text(event.data)
        if fault is None and is_answer(value):
            # Leaving it out would leave out a part of the answer.
            snippet = event.data[:SNIPPET_CHARS]
            raise UpstreamGarbled(
                f"upstream sent an event that makes no sense: {snippet}"
            )
        if fault is None and named:
            fault = UpstreamReported(
                event.data.strip() or "upstream sent an empty error"
            )
        if fault is not None:
            raise self.name_fault(fault)
        # It counts only if no other event makes more sense.
        self._skipped = self._skipped or event.data[:SNIPPET_CHARS]

    def odd_body(self, body: bytes, wanted: str) -> UpstreamFault:
        """Say what is wrong with a whole reply that has no ``wanted``."""
        fault = fault_in(decode_lenient(body))
        if fault is not None:
            return self.name_fault(fault)
        if not body.strip():
            return UpstreamGarbled("upstream sent an empty reply")
        snippet = body[:SNIPPET_CHARS].decode(errors="replace")
        return UpstreamGarbled(f"upstream sent a reply without {wanted}: {snippet}")

    def name_fault(self, fault: UpstreamReported) -> UpstreamReported:
        """Word an error as this dialect's clients know it."""
        return fault

    def eof(self) -> None:
        """The stream is over.

        Raises: UpstreamFault: it stopped before the end of the answer.
        """
        if self.ended or self.finished:
            return
        if self.understood:
            raise UpstreamTruncated(
                "upstream closed the stream before the end of the reply"
            )
        if self._skipped:
            raise UpstreamGarbled(
                f"upstream sent no event of its dialect: {self._skipped}"
            )
        raise UpstreamTruncated("stream closed with no events")
