"""Faults on request: their names, and when they apply.

What a server with such a fault then says, and in what pieces, is in ``script``. A text
such as ``cut=rst, after=3`` asks for faults; commas and plus signs both separate, so
that a model's name can carry them: ``tgi+cut=rst+after=3``.
"""

import re
import textwrap
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, field

HEADER = "x-simulator-faults"

NOTHING, HEAD, END = -1.0, 0.0, 1e9
# A sleep that outlasts everybody; loops differ in what they make of an infinite one.
EVER_S = 1e8

Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=EVER_S)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 40)]
Shape: TypeAlias = Literal[
    "tgi",
    "tgi-openai",
    "openai",
    "vllm",
    "ollama",
    "llamacpp",
    "anthropic",
    "google",
    "fastapi",
    "gateway",
    "text",
    "html",
    "empty",
]


class FaultError(ValueError):
    """A text that asks for no known fault; the message lists the known ones."""


class Faults(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="kebab"
):
    """What goes wrong with a reply.

    ``after``: how many events are sent before ``error``, ``stall``, ``cut`` or
    ``only`` happens, or which event is ``oversized``; with a fraction, half of the
    next event is sent besides. A reply in one piece counts as two events, its halves.
    """

    delay_head: Seconds = 0.0
    delay_first: Seconds = 0.0
    delay_gap: Seconds = 0.0
    delay_end: Seconds = 0.0
    after: Annotated[float, Meta(ge=NOTHING, le=END)] = 1.0
    error: Shape | None = None
    status: Annotated[int, Meta(ge=400, le=599)] = 500
    retry_after: Seconds | None = None
    redirect: Annotated[int, Meta(ge=300, le=399)] | None = None
    cut: Literal["fin", "rst", "short"] | None = None
    stall: Seconds = 0.0
    only: Literal["comments", "pings", "empty"] | None = None
    interval: Annotated[float, Meta(ge=0.001, le=EVER_S)] = 0.1
    oversized: Count | None = None
    bomb: Count | None = None
    content_type: Annotated[str, Meta(pattern=r"^[\x21-\x7e][\x20-\x7e]*$")] = ""
    lines: Literal["lf", "crlf", "cr"] = "lf"
    split_utf8: bool = False
    trickle: Seconds | None = None
    bom: bool = False
    no_done: bool = False
    keep_alive_lie: Literal["idle", "next"] | None = None
    every: Count = 1
    for_s: Seconds = field(name="for", default=EVER_S)
    pause_s: Seconds = field(name="pause", default=EVER_S)
    everywhere: bool = False


# How each is written, what it does, and what its name alone stands for.
_TERMS: dict[str, tuple[str, str, str | None]] = {
    "delay-head": ("S", "seconds before the status line", None),
    "delay-first": ("S", "between the headers and the first event", None),
    "delay-gap": ("S", "before each further event", None),
    "delay-end": ("S", "between the last event and the end of the body", None),
    "after": (
        "N|nothing|head|end",
        "events before error, stall, cut, only; 3.5: half of the 4th too (1)",
        None,
    ),
    "error": (
        "|".join(get_args(Shape)),
        "such an error: after nothing with its status, else within a 200",
        "tgi",
    ),
    "status": ("N", "of the error (500); alone: error=tgi, after=nothing", None),
    "retry-after": ("S", "a header of the error", None),
    "redirect": ("N", "a status of 3xx, to /health", "307"),
    "cut": (
        "fin|rst|short",
        "close, reset, or end the body as it should, but early",
        "fin",
    ),
    "stall": ("S", "silence; without a number for ever", str(int(EVER_S))),
    "only": ("comments|pings|empty", "from there on only these, for ever", "comments"),
    "interval": ("S", "between those (0.1)", None),
    "oversized": ("BYTES", "the next event is that long (11 MiB)", str(11 << 20)),
    "bomb": ("BYTES", "blanks as gzip, so many unpacked (64 MiB)", str(64 << 20)),
    "content-type": ("TYPE", "another than it is", "text/html"),
    "lines": ("lf|crlf|cr", "line ends of the stream", "crlf"),
    "split-utf8": ("", "each event in two writes, cut within a character", "true"),
    "trickle": ("S", "byte by byte, that far apart (0.001)", "0.001"),
    "bom": ("", "a byte order mark first", "true"),
    "no-done": ("", "no [DONE]", "true"),
    "keep-alive-lie": (
        "idle|next",
        "close a kept connection after the reply or at the next request",
        "next",
    ),
    "every": ("N", "only each N-th request", None),
    "for": ("S", "only so long, from the first such request on", None),
    "pause": ("S", "and again after that long", None),
    "everywhere": ("", "on every path, /health too", "true"),
}
_PLACES = {"nothing": NOTHING, "head": HEAD, "end": END}


def describe() -> str:
    """Return the known faults, one per line."""
    return "\n".join(map(_row, _TERMS))


def _row(name: str) -> str:
    value, text, alone = _TERMS[name]
    written = (
        f"{name}[={value}]" if alone and value else name + f"={value}" * bool(value)
    )
    if len(written) <= 26:
        return f"  {written:<28}{text}"
    # A list of values that is too long for its column.
    values = textwrap.wrap(value.replace("|", " "), 50, break_on_hyphens=False)
    return f"\n{'':30}".join([f"  {name + '=…':<28}{text}:", *values])


def parse(text: str) -> Faults:
    """Return the faults that a text asks for.

    Raises: FaultError: some term is unknown, has a wrong value, or comes twice.
    """
    values: dict[str, object] = {}
    for term in filter(None, map(str.strip, re.split(r"[,+]", text))):
        name, equals, value = (part.strip() for part in term.partition("="))
        if name not in _TERMS:
            known = ", ".join(_TERMS)
            raise FaultError(f"no fault is called {name!r}; there are: {known}")
        if name in values:
            raise FaultError(f"the fault {name!r} is given twice")
        alone = _TERMS[name][2]
        if not equals and alone is None:
            raise FaultError(f"the fault {name!r} needs a value: {_usage(name)}")
        values[name] = _PLACES.get(value, value) if equals else alone
    if ("status" in values or "redirect" in values) and "error" not in values:
        # After nothing, unless there is an `after`.
        values = {"error": "tgi", "after": NOTHING, **values}
    try:
        return msgspec.convert(values, Faults, strict=False)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`")
        raise FaultError(f"the fault {name!r}: {what}; {_usage(name)}") from None


def _usage(name: str) -> str:
    value, text, _ = _TERMS[name]
    return f"{name}={value}: {text}" if value else f"{name}: {text}"


# --- who asks ------------------------------------------------------------------------


class _Adapter(msgspec.Struct):
    adapter_id: str | None = None


class _Named(msgspec.Struct):
    """The part of a request that can name a model: OpenAI's and TGI's own."""

    model: str | None = None
    parameters: _Adapter | None = None


def asked(headers: Mapping[str, str], body: bytes) -> Faults | None:
    """Return the faults that a request asks for itself, by its header or its model.

    Raises: FaultError.
    """
    if (text := headers.get(HEADER)) is not None:
        return parse(text)
    if b"+" not in body:
        return None
    try:
        named = msgspec.json.decode(body, type=_Named)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # the request will be refused anyway
    model = named.model or (named.parameters and named.parameters.adapter_id) or ""
    _, plus, text = model.partition("+")
    return parse(text) if plus else None


class Schedule:
    """Which requests the faults of a ``Faults`` with ``every`` or ``for`` apply to."""

    # More different ones at once than any test asks for.
    _LIMIT = 1000

    def __init__(self) -> None:
        self._seen: dict[Faults, tuple[int, float]] = {}

    def applies(self, faults: Faults, now: float) -> bool:
        """Say whether this request, at ``now`` in seconds, is one of them."""
        if faults.every == 1 and faults.for_s == EVER_S:
            return True
        if len(self._seen) >= self._LIMIT:
            self._seen.clear()
        count, first = self._seen.get(faults, (0, now))
        self._seen[faults] = count + 1, first
        in_burst = (now - first) % (faults.for_s + faults.pause_s) < faults.for_s
        return in_burst and (count + 1) % faults.every == 0
