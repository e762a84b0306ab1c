"""Server-sent events: bytes to events, events to bytes.

What belongs here is the event stream format and nothing else: no I/O, no clock, no
knowledge of any dialect. ``[DONE]`` is data like any other.

The parser holds to two sections of the WHATWG HTML standard, "parsing an event stream"
and "interpreting an event stream", however the stream is cut into reads:
https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream

How it works. Everything is decided on bytes; a value becomes text when it is complete,
so a character cut in two by a read is no case at all. (The end of a line cannot lie
inside a UTF-8 sequence. So decoding the values one by one gives what decoding the whole
stream gives, down to the number of U+FFFD.) Three ways lead to an event:

    feed          the read is one event, of a data line and at most an event line
                  before it: what a socket delivers while nobody is late
    _read_run     the read is many events of one data line each: one split finds them
    _read_lines   anything else: the rules of the standard in their order

The first two only recognise what the third would make of the same bytes. They are there
for speed, and a parser without them gives the same events.

An event is handed out as soon as its blank line is in. So a CR ends its line at once,
and a flag drops the LF that may open the next read.
"""

import msgspec

from proxy.errors import EventTooLarge

_BOM = b"\xef\xbb\xbf"
# A number, because `13 in data` takes 22 ns for 260 bytes and `b"\r" in data` 200:
# CPython takes the left operand for a number first and discards the TypeError.
_CR = 13
# Longer reads are taken in slices, so that the copies made on the way stay small: 20 MB
# take half the time they take in one piece. From 16 KiB to 1 MiB the size is all one.
_SLICE_BYTES = 64 * 1024
# Enough to recognise an error by.
_IGNORED_CHARS = 1024


class Event(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event. ``id`` is the last event id at its blank line."""

    type: str = "message"
    data: str = ""
    id: str = ""


class Parser:
    """An incremental parser for one event stream.

    Args:    limit: the bytes one event may have: all lines since the last blank line,
             comments too, each with its end counted as one byte.
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_between",
        "_data",
        "_id",
        "_limit",
        "_line",
        "_overflowed",
        "_size",
        "_type",
        "ignored",
        "last_event_id",
        "retry_ms",
    )

    def __init__(self, limit: int = 10 * 1024 * 1024) -> None:
        self.last_event_id = ""
        """What a client that reconnects would send. Changes at blank lines only."""

        self.retry_ms: int | None = None
        """The reconnection time, once the stream has set one. An empty one sets none."""

        self.ignored: str | None = None
        """The latest line whose field name the standard does not know, cut to 1,024
        characters. Old llama.cpp servers say `error: {"code":500, ...}` with status
        200, and no event shows it."""

        self._limit = limit
        self._overflowed = False

        # The line that has not ended yet, and the bytes of its event before it. Pieces
        # are appended to a bytearray: linear whatever the size of the reads, where a
        # list of tiny reads would take many times the limit.
        self._line = bytearray()
        self._size = 0
        # The buffers of the standard.
        self._data = bytearray()
        self._type = ""
        self._id = ""

        self._at_start = True
        self._after_cr = False
        # Nothing is pending, the next byte begins an event. Never so at the start,
        # where it may begin a BOM.
        self._between = False

    def feed(self, data: bytes) -> list[Event]:
        """Return the events completed by ``data``.

        Args:    data: any slice of the stream; b"" is allowed.
        Returns: events in order; of an unfinished one at most ``limit`` bytes are kept.
        Raises:  EventTooLarge: an event exceeds ``limit``. What the same call completed
                 before it is lost, and every later call raises again.
        """
        if self._at_start and not self._line and data and data[0] != _BOM[0]:
            # No BOM: a first read of events need not go line by line.
            self._at_start = False
            self._between = True
        size = len(data)
        if self._between and size <= self._limit and _CR not in data:
            type = "message"
            line, _, rest = data.partition(b"\n")
            if rest != b"\n" and line.startswith(b"event: "):
                type = line[7:].decode("utf-8", "replace") or type
                line, _, rest = rest.partition(b"\n")
            if rest == b"\n" and line.startswith(b"data: "):
                text = line[6:].decode("utf-8", "replace")
                return [Event(type, text, self.last_event_id)]
            if size <= _SLICE_BYTES and (run := self._read_run(data)):
                return run

        if size <= _SLICE_BYTES:
            return self._read(data)
        events: list[Event] = []
        for start in range(0, len(data), _SLICE_BYTES):
            events += self._read(data[start : start + _SLICE_BYTES])
        return events

    @property
    def is_between(self) -> bool:
        """The next byte begins an event."""
        return self._between

    def end(self) -> list[Event]:
        """Return the events completed by the end of the stream: there are none.

        No event is held back, and one whose blank line never came is discarded with
        its id, as the standard demands. Nothing may be fed afterwards.
        """
        self._line = bytearray()
        self._data = bytearray()
        return []

    def _read(self, data: bytes) -> list[Event]:
        """Interpret the lines that ``data`` ends, keep the start of the next."""
        if self._overflowed:
            raise self._too_large()
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if _CR in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

        events: list[Event] = []
        end = data.rfind(b"\n") + 1
        if end:
            lines = b"".join((self._line, data[:end]))
            self._line = bytearray(data[end:])
            is_run = not (self._size or self._at_start or len(lines) > self._limit)
            events = (is_run and self._read_run(lines)) or self._read_lines(lines)
        else:
            self._line += data
        if self._size + len(self._line) > self._limit:
            raise self._too_large()
        self._between = not (
            self._line or self._size or self._after_cr or self._at_start
        )
        return events

    def _read_run(self, lines: bytes) -> list[Event] | None:
        """Read ``lines`` if they are events of one data line each, else return None."""
        if not lines.startswith(b"data: ") or not lines.endswith(b"\n\n"):
            return None
        values = lines[6:-2].split(b"\n\ndata: ")
        if lines.count(b"\n") != 2 * len(values):
            return None  # something between two of the separators is not a mere value
        id = self.last_event_id
        return [
            Event("message", value.decode("utf-8", "replace"), id) for value in values
        ]

    def _read_lines(self, lines: bytes) -> list[Event]:
        """Interpret ``lines``, the last of which has ended, one by one."""
        if self._at_start:
            self._at_start = False
            if lines.startswith(_BOM):
                lines = lines[len(_BOM) :]
                self._size = len(_BOM)
        events: list[Event] = []
        for line in lines.split(b"\n")[:-1]:
            if not line:
                self._dispatch(events)
                continue
            self._size += len(line) + 1
            if self._size > self._limit:
                raise self._too_large()
            self._read_field(line)
        return events

    def _read_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data += value
            self._data += b"\n"
        elif name == b"event":
            self._type = value.decode("utf-8", "replace")
        elif not name:
            pass  # a comment
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif name == b"retry":
            if value.isdigit():  # of bytes: the ASCII digits, and at least one
                self.retry_ms = _to_int(value)
        else:
            # No character takes more than four bytes.
            start = line[: 4 * _IGNORED_CHARS].decode("utf-8", "replace")
            self.ignored = start[:_IGNORED_CHARS]

    def _dispatch(self, events: list[Event]) -> None:
        self.last_event_id = self._id
        if self._data:
            # A data line leaves at least its LF here, so `data:` alone is an event.
            self._data.pop()
            text = self._data.decode("utf-8", "replace")
            events.append(Event(self._type or "message", text, self._id))
            self._data.clear()
        self._type = ""
        self._size = 0

    def _too_large(self) -> EventTooLarge:
        self.end()
        self._overflowed = True
        self._between = False
        return EventTooLarge(
            f"an event of the stream exceeds the limit of {self._limit} bytes"
        )


def _to_int(digits: bytes) -> int:
    try:
        return int(digits.lstrip(b"0") or b"0")
    except ValueError:
        # CPython refuses more than 4,300 digits, for the time they would take.
        return 10**4300


def frame(type: str, data: str) -> bytes:
    """Return one event as bytes: LF only, an event line only if it is not "message".

    ``Parser`` reads back what was given, except for what the format cannot express: an
    empty type is "message"; CR and CR LF in ``data`` come back as LF; CR and LF in
    ``type`` become spaces, so that it cannot smuggle fields in; a lone surrogate becomes
    "?". The id of an event is not written.
    """
    if "\r" in data:
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    if "\n" in data:
        data = data.replace("\n", "\ndata: ")
    if type == "message" or not type:
        return f"data: {data}\n\n".encode("utf-8", "replace")
    if "\n" in type or "\r" in type:
        type = type.replace("\n", " ").replace("\r", " ")
    return f"event: {type}\ndata: {data}\n\n".encode("utf-8", "replace")
