"""How the two readers in a Cody client behave, hazards included: the judges.

They are not good event-stream readers, and that is the point: what they cannot read, a
user cannot read. The chat reader never skips anything: a block that it cannot parse
stays at the front of its buffer, and all that follows is parsed after it, in vain.
The autocomplete reader skips what it does not know, but decodes every read of the
socket by itself.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tests.support.client import RawReply

End: TypeAlias = Literal["complete", "error", "hang", "no_events"]

EVENT_STREAM = "text/event-stream"
NO_EVENTS = "Connection closed without receiving any events"
NO_COMPLETION = "No completion response received"
FINISHED = "cody-request-finished"


@dataclass(frozen=True)
class Event:
    """One event as a reader understood it."""

    name: str
    payload: Any = None


@dataclass
class Call:
    id: str
    name: str
    arguments: str


class Unreadable(Exception):
    """What the chat reader cannot parse, or trips over."""


# --- chat ----------------------------------------------------------------------------


class ChatParser:
    """The chat reader: blocks between blank lines, line 1 the event, line 2 the data.

    Attributes:
        stalled: why nothing will ever be read again, or None.
        done: whether a ``done`` has been seen.
        violations: what the reader takes but a correct server never sends.
    """

    def __init__(self, api_version: int = 8) -> None:
        self.api_version = api_version
        self.stalled: str | None = None
        self.done = False
        self.events: list[Event] = []
        self.text = ""
        self.thinking = ""
        self.stop_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.model: str | None = None
        self.tool_calls: list[Call] = []
        self.violations: list[str] = []
        self._buffer = ""

    def feed(self, piece: str) -> list[Event]:
        """Return the events that ``piece`` completes.

        If any block of the buffer is unreadable, all of them are lost, those before
        it too, and everything that comes later.
        """
        self._buffer += piece
        *blocks, rest = self._buffer.split("\n\n")
        try:
            events = [parse_block(block) for block in blocks]
        except Unreadable as reason:
            self.stalled = self.stalled or str(reason)
            return []
        self._buffer = rest
        for event in events:
            self._take(event)
        return events

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if event.name == "done":
            self.done = True
        elif event.name == "completion":
            self._complete(event.payload)
        elif not isinstance(event.payload["error"], str):
            self.violations.append(f"error is no string: {event.payload!r}")

    def _complete(self, payload: dict[str, Any]) -> None:
        if faults := _type_faults(payload):
            self.violations += faults
            return
        if self.api_version >= 2:
            self.text += payload.get("deltaText") or ""
        else:
            # A legacy event without its text wipes out what was there.
            self.text = payload.get("completion") or ""
        self.thinking += payload.get("delta_thinking") or ""
        self.stop_reason = payload.get("stopReason") or self.stop_reason
        self.usage = payload.get("usage") or self.usage
        self.model = payload.get("model") or self.model
        for piece in payload.get("delta_tool_calls") or ():
            self._add_tool_call(piece)

    def _add_tool_call(self, piece: dict[str, Any]) -> None:
        function = piece.get("function") or {}
        name, arguments = function.get("name", ""), function.get("arguments", "")
        wanted = piece.get("id")
        known = [call for call in self.tool_calls if wanted in (None, "", call.id)]
        if known:
            known[-1].arguments += arguments
        elif wanted and name:
            self.tool_calls.append(Call(wanted, name, arguments))
        else:
            self.violations.append(f"a tool call that the client loses: {piece!r}")


def parse_block(block: str) -> Event:
    """Read what stands between two blank lines.

    Raises: Unreadable: where the real reader returns an error or throws.
    """
    event_line, _, rest = block.partition("\n")
    data_line, _, _ = rest.partition("\n")
    if not event_line.startswith("event: "):
        raise Unreadable(f"no event line: {event_line!r}")
    name = event_line.removeprefix("event: ")
    if name not in _PAYLOADS:
        raise Unreadable(f"unknown event: {name!r}")
    if not data_line.startswith("data: "):
        raise Unreadable(f"no data line: {data_line!r}")
    return Event(name, _PAYLOADS[name](data_line.removeprefix("data: ")))


def _completion_payload(text: str) -> dict[str, Any]:
    payload = _load(text)
    if not isinstance(payload, dict):
        raise Unreadable(f"payload is no object: {text!r}")
    return payload


def _error_payload(text: str) -> dict[str, Any]:
    payload = _completion_payload(text)
    if "error" not in payload:
        raise Unreadable(f"error event without an error: {text!r}")
    return payload


def _done_payload(text: str) -> None:
    return None  # never looked at


_PAYLOADS: dict[str, Callable[[str], Any]] = {
    "completion": _completion_payload,
    "error": _error_payload,
    "done": _done_payload,
}


def _load(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        raise Unreadable(f"invalid JSON: {text!r}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "completion": str,
    "deltaText": str,
    "stopReason": str,
    "delta_thinking": str,
    "delta_tool_calls": list,
    "usage": dict,
    "model": str,
    "logprobs": dict,
}


def _type_faults(payload: dict[str, Any]) -> list[str]:
    """The reader would take a number for a text; no server should make it."""
    return [
        f"{key}: {payload[key]!r}"
        for key, wanted in _FIELD_TYPES.items()
        if key in payload and not isinstance(payload[key], wanted)
    ]


@dataclass
class ChatOutcome:
    """What the user of a chat sees, and what the next request has to suffer.

    ``ended`` is "hang" when the spinner never stops. ``poisoned`` means that the answer
    to the *next* request will be swallowed. ``http_error`` is the message for a status
    of 400 or more, with ``kind`` "auth", "rate_limit" or "http".
    """

    ended: End
    text: str = ""
    stop_reason: str | None = None
    thinking: str = ""
    tool_calls: list[Call] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    model: str | None = None
    errors: list[str] = field(default_factory=list)
    done_count: int = 0
    events: list[Event] = field(default_factory=list)
    stalled: str | None = None
    poisoned: bool = False
    violations: list[str] = field(default_factory=list)
    http_error: str | None = None
    kind: Literal["auth", "rate_limit", "http"] | None = None
    retry_after: str | None = None
    limit: str | None = None


def read_chat(raw: RawReply, api_version: int = 8) -> ChatOutcome:
    """Read a reply as the chat client does, in the reads in which it came.

    The same bytes are read once more one by one; where that makes a difference,
    ``violations`` says so.
    """
    if raw.status >= 400:
        return _chat_http_error(raw)
    if raw.status >= 300:
        # Redirects are not followed: a reply without events.
        return ChatOutcome("no_events", errors=[NO_EVENTS])
    outcome = chat_outcome([data for _, data in raw.reads], api_version)
    bytewise = chat_outcome(_single_bytes(raw.body), api_version)
    if _seen(bytewise) != _seen(outcome):
        outcome.violations.append(f"another result byte by byte: {_seen(bytewise)}")
    return outcome


def chat_outcome(reads: Iterable[bytes], api_version: int = 8) -> ChatOutcome:
    parser = ChatParser(api_version)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown: str | None = None
    for data in reads:
        for event in parser.feed(decoder.decode(data)):
            if event.name != "completion" and shown is None:
                # The first end is the end: later events reach nobody.
                shown = _text_before_end(parser)
    text = parser.text if shown is None else shown
    return _chat_end(parser, text)


def _text_before_end(parser: ChatParser) -> str:
    seen = ChatParser(parser.api_version)
    for event in parser.events:
        if event.name != "completion":
            break
        seen._take(event)
    return seen.text


def _chat_end(parser: ChatParser, text: str) -> ChatOutcome:
    names = [event.name for event in parser.events]
    ends = [name for name in names if name != "completion"]
    errors = [str(e.payload["error"]) for e in parser.events if e.name == "error"]
    ended: End = "hang"
    if not names:
        ended, errors = "no_events", [NO_EVENTS]
    elif ends:
        ended = "complete" if ends[0] == "done" else "error"
    return ChatOutcome(
        ended,
        text=text,
        stop_reason=parser.stop_reason,
        thinking=parser.thinking,
        tool_calls=parser.tool_calls,
        usage=parser.usage,
        model=parser.model,
        errors=errors,
        done_count=names.count("done"),
        events=parser.events,
        stalled=parser.stalled,
        poisoned=bool(ends) and ends[-1] == "error",
        violations=parser.violations,
    )


def _seen(outcome: ChatOutcome) -> tuple[object, ...]:
    return outcome.ended, outcome.text, outcome.errors, outcome.done_count


def _chat_http_error(raw: RawReply) -> ChatOutcome:
    kinds: dict[int, Literal["auth", "rate_limit"]] = {
        401: "auth",
        403: "auth",
        429: "rate_limit",
    }
    body = raw.body.decode(errors="replace")
    message = f"Request to {raw.url} failed with {raw.status} {raw.reason}: {body}"
    return ChatOutcome(
        "error",
        errors=[message],
        http_error=message,
        kind=kinds.get(raw.status, "http"),
        retry_after=raw.header("retry-after"),
        limit=raw.header("x-ratelimit-limit"),
    )


def _single_bytes(body: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in body]


# --- autocomplete --------------------------------------------------------------------


class AutocompleteParser:
    """The autocomplete reader of event streams.

    Every read is decoded alone, so half a character is a U+FFFD. Lines are split at the
    first ``: ``; unknown ones are skipped (and kept in ``unknown_lines``); of several
    data lines the last wins. Below api-version 2 a completion that is followed by
    another one in the same read is skipped.
    """

    def __init__(self, api_version: int = 1) -> None:
        self.api_version = api_version
        self.unknown_lines: list[str] = []
        self._buffer = ""

    def feed(self, data: bytes) -> list[Event]:
        """Return the events of one read; a payload is the text of its data line."""
        self._buffer += data.decode(errors="replace")
        *blocks, self._buffer = self._buffer.split("\n\n")
        events = [self._parse(block) for block in blocks]
        if self.api_version >= 2:
            return events
        followers: list[Event | None] = [*events[1:], None]
        return [
            event
            for event, next_one in zip(events, followers, strict=False)
            if not (_is_completion(event) and _is_completion(next_one))
        ]

    def _parse(self, block: str) -> Event:
        fields = {"event": "", "data": ""}
        for line in block.split("\n"):
            # Without ": " find says -1, and the real reader slices with it all the same.
            at = line.find(": ")
            if line[:at] in fields:
                fields[line[:at]] = line[at + 2 :]
            else:
                self.unknown_lines.append(line)
        return Event(fields["event"], fields["data"])


def _is_completion(event: Event | None) -> bool:
    return event is not None and event.name == "completion"


@dataclass
class AutocompleteOutcome:
    """What the editor gets; ``error`` is the text of what it throws instead."""

    text: str | None = None
    stop_reason: str | None = None
    error: str | None = None
    kind: Literal["rate_limit", "http", "stream"] | None = None
    retry_after: str | None = None
    events: list[Event] = field(default_factory=list)
    unknown_lines: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def read_autocomplete(raw: RawReply, api_version: int = 1) -> AutocompleteOutcome:
    """Read a reply as the autocomplete client does; once more byte by byte, too."""
    if not 200 <= raw.status < 300:
        return AutocompleteOutcome(
            error=raw.body.decode(errors="replace"),
            kind="rate_limit" if raw.status == 429 else "http",
            retry_after=raw.header("retry-after"),
        )
    if raw.header("content-type") != EVENT_STREAM:
        return _read_whole(raw.body)
    outcome = autocomplete_outcome([data for _, data in raw.reads], api_version)
    bytewise = autocomplete_outcome(_single_bytes(raw.body), api_version)
    for key in ("text", "stop_reason", "error"):
        got = getattr(bytewise, key)
        if got != getattr(outcome, key):
            outcome.violations.append(f"byte by byte another {key}: {got!r}")
    return outcome


def autocomplete_outcome(
    reads: Sequence[bytes], api_version: int = 1
) -> AutocompleteOutcome:
    parser = AutocompleteParser(api_version)
    outcome = AutocompleteOutcome(unknown_lines=parser.unknown_lines)
    for data in reads:
        for event in parser.feed(data):
            outcome.events.append(event)
            _apply(outcome, event, cumulative=api_version < 2)
            if outcome.error is not None:
                return outcome
    if outcome.text is None:
        outcome.error, outcome.kind = NO_COMPLETION, "stream"
    else:
        outcome.stop_reason = outcome.stop_reason or FINISHED
    return outcome


def _apply(outcome: AutocompleteOutcome, event: Event, *, cumulative: bool) -> None:
    if event.name == "error":
        outcome.error, outcome.kind = event.payload, "stream"
    if event.name != "completion":
        return
    try:
        payload = _completion_payload(event.payload)
    except Unreadable as reason:
        outcome.error, outcome.kind = str(reason), "stream"
        return
    if faults := _type_faults(payload):
        outcome.violations += faults
        return
    if cumulative:
        outcome.text = payload.get("completion") or ""
    else:
        outcome.text = (outcome.text or "") + (payload.get("deltaText") or "")
    outcome.stop_reason = payload.get("stopReason") or outcome.stop_reason


def _read_whole(body: bytes) -> AutocompleteOutcome:
    """Any other content type: the body has to be one JSON object with two strings."""
    text = body.decode(errors="replace")
    try:
        payload = _completion_payload(text)
    except Unreadable as reason:
        return AutocompleteOutcome(error=str(reason), kind="stream")
    completion, stop_reason = payload.get("completion"), payload.get("stopReason")
    if not isinstance(completion, str) or not isinstance(stop_reason, str):
        return AutocompleteOutcome(error=f"no completion: {text}", kind="stream")
    return AutocompleteOutcome(text=completion, stop_reason=stop_reason)


# --- what a correct server sends -----------------------------------------------------

_FRAME = re.compile(r"event: (completion|error|done)\ndata: (\{[^\n]*\})\n\n")


def frames_of(body: bytes) -> list[Event]:
    """Split a stream into its frames; anything but exact frames fails."""
    text = body.decode("ascii")
    frames, at = [], 0
    while at < len(text):
        match = _FRAME.match(text, at)
        assert match, f"no frame at {at}: {text[at : at + 120]!r}"
        frames.append(Event(match[1], _load(match[2])))
        at = match.end()
    return frames


def assert_ends_once(raw: RawReply) -> list[Event]:
    """Check a stream against every rule that a Cody client depends on.

    Exact status, content type and frames, pure ASCII, whole frames in every read; one
    ``done``, last; at most one error, right before it; without an error at least one
    completion.

    Returns: the frames, with their payloads.
    """
    assert raw.status == 200, (raw.status, raw.body)
    assert raw.header("content-type") == EVENT_STREAM, raw.header("content-type")
    assert raw.complete, "the body was cut"
    for _, data in raw.reads:
        assert data.startswith(b"event: ") and data.endswith(b"}\n\n"), data
    frames = frames_of(raw.body)
    names = [frame.name for frame in frames]
    assert names and names[-1] == "done" and names.count("done") == 1, names
    assert frames[-1].payload == {}, frames[-1]
    assert names.count("error") <= 1, names
    if "error" in names:
        assert names[-2] == "error", names
        payload = frames[-2].payload
        assert list(payload) == ["error"] and isinstance(payload["error"], str), payload
    else:
        assert "completion" in names, names
    faults = [_type_faults(frame.payload) for frame in frames]
    assert not any(faults), faults
    return frames
