"""One reply that passes through: client and upstream speak the same dialect.

The bytes are the upstream's; the parser only watches, for errors, usage and the end. Whole
events go out at a time, so that one that needs a fix-up can be replaced; an error is said
as the client's own dialect says it. With ``fixer`` None not even that: bytes are bytes, and
what is watched is only written down.
"""

from collections.abc import Callable

from proxy.completion import Delta, Start, Text
from proxy.dialects.adjust import ReplyFixer
from proxy.dialects.base import Reader, Writer
from proxy.dialects.runs import Runs
from proxy.errors import (
    ProxyError,
    UpstreamFault,
    UpstreamGarbled,
    UpstreamReported,
    UpstreamTruncated,
)
from proxy.exchange import Exchange
from proxy.sse import Event, Parser, frame

_BOM = b"\xef\xbb\xbf"
_END = b"\n\n"
_CR = ord("\r")  # as a number it is found much faster


class PassThrough(Exchange):
    """A stream of events.

    Args:
        dialect: the wire format of both sides.
        several: the request asks for several answers at once, so the end of the
                 first one is not the end.
    """

    # What most replies begin with, or keep, is no work for each of them.
    _tail = b""  # of an event that has not ended yet, which the parser knows
    _held = b""  # the same, if it does not
    _waiting = b""  # events before the first meaningful one
    _is_reframed = False  # its line ends are not ours: cuts cannot be seen
    _is_running = False  # an event begins next, of the answer's

    def __init__(
        self,
        reader: Reader,
        writer: Writer,
        *,
        dialect: str,
        limit_bytes: int,
        fixer: ReplyFixer | None,
        several: bool = False,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._dialect = dialect
        self._fixer = fixer
        self._several = several
        self._redact = redact
        self._parser = Parser(limit_bytes)
        self._runs = Runs()
        self._limit_bytes = limit_bytes

    def is_finishing(self) -> bool:
        return self._reader.finished and not self._several

    def adjusted(self) -> tuple[str, ...]:
        return self._fixer.names if self._fixer is not None else ()

    def receive_data(self, data: bytes) -> bytes:
        if self.is_ended:
            return b""
        if self._fixer is None:
            return self._watch(data)
        if self._held:
            data, self._held = self._held + data, b""
        said: list[bytes] = []
        at = 0
        while at < len(data) and not self.is_ended:
            end = self._run(data, at) if self._is_running else 0
            if end:
                said.append(data[at:end])
            elif self._is_running and self._can_wait(data, at):
                self._held = data[at:]
                break
            else:
                end = self._next(data, at)
                said.append(self._receive(data[at:end], self._fixer))
            at = end
        return said[0] if len(said) == 1 else b"".join(said)

    def _run(self, data: bytes, start: int) -> int:
        """Most of a stream only goes on with the text and need not be parsed: return
        where that ends, 0 if there is none.
        """
        if len(data) > self._limit_bytes:
            return 0
        end, texts = self._runs.split(data, start)
        if any(texts):
            self.progress += 1
        return end

    def _can_wait(self, data: bytes, start: int) -> bool:
        return len(data) <= self._limit_bytes and self._runs.can_wait(data[start:])

    def _next(self, data: bytes, start: int) -> int:
        """Return the end of what is to be parsed before the next look for a run: an
        event up to the answer and where a run may follow, else all of it.
        """
        if self.is_answering and not self._runs.may_go_on(data, start):
            return len(data)
        end = data.find(_END, start)
        return end + len(_END) if end >= 0 else len(data)

    def _receive(self, data: bytes, fixer: ReplyFixer) -> bytes:
        """Read events and return what to say of them."""
        reader = self._reader
        deltas: list[Delta] = []
        events: list[Event] = []
        is_clean = self._may_stay(data, fixer)
        fault = self._read(data, events, deltas, is_clean)
        if is_clean and fault is None and not self._is_reframed:
            # Clients that read line by line would lose the first event to a mark.
            out = data if self.is_answering else data.removeprefix(_BOM)
        else:
            out = self._whole_events(data, events, fixer, fault is not None)
        if deltas and type(deltas[-1]) is not Start:  # it can only be the first
            self.is_answering = True
            self.progress += 1
        if reader.ended and not self.is_answering and fault is None:
            fault = UpstreamReported("upstream ended the stream without an answer")
        if not self.is_answering or self._waiting:
            out = self._wait(out)
        self.is_started = self.is_started or bool(out)
        if fault is not None:
            return out + self._fail(fault)
        self.is_ended = reader.ended
        self._is_running = self.is_answering and not (
            self._tail or self._is_reframed or reader.finished
        )
        return out

    def _may_stay(self, data: bytes, fixer: ReplyFixer) -> bool:
        """Whether these are whole events that need not be changed."""
        return (
            not (self._tail or self._is_reframed)
            and data.endswith(_END)
            and _CR not in data
            and fixer.is_clean(data)
        )

    def _wait(self, out: bytes) -> bytes:
        """Keep what comes before the answer, and say it with that."""
        self._waiting += out
        if not self.is_answering:
            return b""
        out, self._waiting = self._waiting, b""
        return out

    def receive_eof(self) -> bytes:
        if self.is_ended:
            return b""
        try:
            self._check_end()
        except UpstreamFault as fault:
            return self._fail(fault)
        self.is_ended = True
        if self._fixer is None or self._reader.ended:
            return b""
        out = self._waiting + self._fixer.add_end(self._dialect)
        self.is_started = True
        return out

    def receive_failure(self, error: ProxyError) -> bytes:
        if self.is_ended:
            return b""
        if isinstance(error, UpstreamFault) and self.is_finishing():
            return self.receive_eof()
        return self._fail(error)

    def _check_end(self) -> None:
        if self._several and not self._reader.ended:
            # The reader knows of the first answer only.
            raise UpstreamTruncated(
                "upstream closed the stream before the end of the replies"
            )
        self._reader.eof()

    def _watch(self, data: bytes) -> bytes:
        """Let the bytes through as they are."""
        deltas: list[Delta] = []
        fault = self._read(data, [], deltas, False) if self.error is None else None
        if fault is not None:
            self.error = fault
        if deltas:
            self.is_answering = True
            self.progress += 1
        self.is_started = True
        return data

    def _read(
        self, data: bytes, events: list[Event], deltas: list[Delta], is_clean: bool
    ) -> UpstreamFault | None:
        """Fill the lists; return the error that ends them, if any.

        Args: is_clean: the bytes stay as they are.
        """
        parser, reader, runs = self._parser, self._reader, self._runs
        try:
            for event in parser.feed(data):
                if reader.ended:  # what follows is nothing that a client should see
                    self._is_reframed = True
                    break
                said = len(deltas)
                reader.read(event, deltas)
                events.append(event)
                if runs.is_learning and len(deltas) == said + 1:
                    delta = deltas[said]
                    if type(delta) is Text and (is_clean or not self._is_odd(event)):
                        runs.learn(event, delta.text, data)
            if parser.ignored is not None and parser.ignored.startswith("error:"):
                reader.read_odd(Event("error", parser.ignored[6:]))  # old llama.cpp
        except UpstreamFault as fault:
            return fault
        return None

    def _is_odd(self, event: Event) -> bool:
        return self._fixer is None or self._fixer.fix(event.data) is not event.data

    def _whole_events(
        self, data: bytes, events: list[Event], fixer: ReplyFixer, failed: bool
    ) -> bytes:
        """Return the bytes of the given events, keep those of an unfinished one.

        Args: failed: the last one was an error, which is said in another way.
        """
        reader = self._reader
        added = None
        if reader.ended and not reader.finished and not failed:
            added = fixer.missing_finish(reader.model)
        if _CR in data:
            # The parser has the beginning of the event; from now on it says the rest.
            self._is_reframed = True
            self._tail = b""
        cut = 0
        if not self._is_reframed:
            self._tail += data
            cut = self._tail.rfind(_END) + 1
            cut += cut > 0  # 0 if no event has ended
        fixed = [(event, fixer.fix(event.data)) for event in events]
        if added is not None:
            fixed.insert(len(fixed) - 1, (Event(data=added), added))
        is_clean = added is None and all(event.data is text for event, text in fixed)
        if is_clean and not failed and not self._is_reframed:
            out, self._tail = self._tail[:cut], self._tail[cut:]
            return out if self.is_answering else out.removeprefix(_BOM)
        self._tail = self._tail[cut:]
        return b"".join(frame(e.type, text) for e, text in fixed if text is not None)

    def _fail(self, error: ProxyError) -> bytes:
        self._end_by(error, self._redact)
        if not self.is_started:
            raise error
        return self._writer.error(error) if self._fixer is not None else b""


class PassedBody(Exchange):
    """A reply in one piece.

    Args: dialect: the wire format of both sides; "" if bytes stay as they are.
    """

    _body: bytes | bytearray = b""
    _fixer: ReplyFixer | None = None

    def __init__(
        self,
        reader: Reader,
        *,
        dialect: str,
        limit_bytes: int,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._reader = reader
        self._dialect = dialect
        self._limit_bytes = limit_bytes
        self._redact = redact

    def adjusted(self) -> tuple[str, ...]:
        return self._fixer.names if self._fixer is not None else ()

    def receive_data(self, data: bytes) -> bytes:
        if not self._body:  # most come in one read
            self._body = data
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += data
        if len(self._body) > self._limit_bytes:
            raise UpstreamGarbled(f"upstream reply exceeds {self._limit_bytes} bytes")
        return b""

    def receive_eof(self) -> bytes:
        body = bytes(self._body)
        is_clean = False
        try:
            is_clean = self._reader.check_body(body)
        except UpstreamFault as fault:
            self.error = fault
            if self._dialect:
                return self.receive_failure(fault)
        self.is_answering = self.is_ended = self.is_started = True
        if is_clean or not self._dialect:
            return body
        self._fixer = fixer = ReplyFixer(self._dialect)
        text = body.decode(errors="surrogateescape")
        fixed = fixer.fix(text)
        return body if fixed is None or fixed is text else fixed.encode()

    def receive_failure(self, error: ProxyError) -> bytes:
        self._end_by(error, self._redact)
        raise error
