"""One reply that is translated, from the upstream's dialect into the client's."""

from collections.abc import Callable

from proxy.completion import Delta, Finish, Start, Text
from proxy.dialects.base import (
    EVENT_STREAM,
    SNIPPET_CHARS,
    Reader,
    Writer,
    media_type,
)
from proxy.dialects.runs import Runs, are_literal, decode_texts
from proxy.errors import ProxyError, UpstreamFault, UpstreamGarbled, UpstreamReported
from proxy.exchange import Exchange
from proxy.sse import Event, Parser
from proxy.stops import Cutter

# A server that sends events under another name is still understood by their look.
_EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":", b"error:")
_JSON_STARTS = (b"{", b"[")
_SNIFFED_BYTES = 64
# How much of a stream is kept until it makes sense, to say what it was if it never does.
_KEPT_BYTES = 64 * 1024


class Translation(Exchange):
    """Args:

    reader, writer: the upstream's dialect and the client's.
    stream:         the client wants frames rather than one body.
    content_type:   of the upstream's reply.
    limit_bytes:    most bytes of one event, or of a whole reply.
    cutter:         cuts the text at stop sequences, None if there are none.
    redact:         takes secrets out of an error's text.
    """

    # What most replies begin with, or keep, is no work for each of them.
    _finish_said = False
    _is_overrun = False  # text came after the cut: nobody told the upstream
    _held = b""  # of an event that has not ended yet, if the parser does not know it
    _is_running = False  # an event begins next, of the answer's

    def __init__(
        self,
        reader: Reader,
        writer: Writer,
        *,
        stream: bool,
        content_type: str,
        limit_bytes: int,
        cutter: Cutter | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._stream = stream
        self._cutter = cutter
        self._redact = redact
        self._content_type = media_type(content_type)
        self._limit_bytes = limit_bytes
        self._parser: Parser | None = None
        if self._content_type == EVENT_STREAM:
            self._begin_events()
        self._body = bytearray()  # of a reply that is no event stream
        self._deltas: list[Delta] = []  # for a client that wants one body

    def is_finishing(self) -> bool:
        return self._finish_said or self._reader.finished

    def receive_data(self, data: bytes) -> bytes:
        if self.is_ended:
            return b""
        if self._parser is None:
            self._collect(data)
            if not self._looks_like_events():
                return b""
            data = bytes(self._body)
            self._body.clear()
            self._begin_events()
        out, fault = self._read_events(data)
        if fault is not None and not self._is_cut():
            return out + self._fail(fault)
        if fault is not None or self._reader.ended or self._is_overrun:
            out += self._finish()
        return out

    def receive_eof(self) -> bytes:
        if self.is_ended:
            return b""
        deltas: list[Delta] = []
        try:
            self._read_end(deltas)
        except UpstreamFault as fault:
            return self._say(deltas) + self._fail(fault)
        return self._say(deltas) + self._finish()

    def receive_failure(self, error: ProxyError) -> bytes:
        # After the end of the answer that does not matter any more.
        if self.is_ended:
            return b""
        if isinstance(error, UpstreamFault) and self._is_complete():
            return self._finish()
        return self._fail(error)

    def _begin_events(self) -> None:
        self._parser = Parser(self._limit_bytes)
        self._runs = Runs()

    def _is_complete(self) -> bool:
        try:
            self._check_end()
        except UpstreamFault:
            return False
        return True

    def _check_end(self) -> None:
        """Raises: UpstreamFault: the upstream stopped before the end."""
        if not self._is_cut():
            self._reader.eof()

    def _is_cut(self) -> bool:
        """After our own cut the client has its answer, whatever the upstream does."""
        return self._cutter is not None and self._cutter.is_cut

    # ------------------------------------------------------------------------ reading

    def _looks_like_events(self) -> bool:
        if self._content_type == "application/json":
            return False
        start = self._body[:_SNIFFED_BYTES].lstrip(b"\xef\xbb\xbf\r\n")
        return start.startswith(_EVENT_FIELDS)

    def _collect(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > self._limit_bytes:
            raise UpstreamGarbled(f"upstream reply exceeds {self._limit_bytes} bytes")

    def _read_events(self, data: bytes) -> tuple[bytes, UpstreamFault | None]:
        """Return what the events say, and the error that ends them, if any."""
        reader = self._reader
        if not reader.understood and len(self._body) < _KEPT_BYTES:
            self._body += data
        if self._held:
            data, self._held = self._held + data, b""
        said: list[bytes] = []
        at, fault, runs = 0, None, self._runs
        while at < len(data) and fault is None and not reader.ended:
            end, out = 0, b""
            if self._is_running and len(data) - at <= self._limit_bytes:
                end, out = self._say_run(data, at)
                if not end and runs.can_wait(data[at:]):
                    self._held = data[at:]
                    break
            if not end:
                end = self._first(data, at)
                deltas: list[Delta] = []
                fault = self._read_parsed(data[at:end], deltas)
                out = self._say(deltas)
            if out:
                said.append(out)
            at = end
        return said[0] if len(said) == 1 else b"".join(said), fault

    def _say_run(self, data: bytes, start: int) -> tuple[int, bytes]:
        """Read what needs no parser from ``start`` on; return where that ends, 0 if there
        is nothing, and what it says.
        """
        runs = self._runs
        end, raw = runs.split(data, start)
        if not end:
            return 0, b""
        is_literal = self._stream and (runs.is_plain or are_literal(raw))
        if is_literal and (self._cutter is None or _passes(self._cutter, raw)):
            out = self._writer.literals(raw)
            if out is not None:
                self.is_answering = True
                self.progress += 1
                self.is_started = self.is_started or bool(out)
                return end, out
        texts = decode_texts(raw)
        if texts is None:
            return 0, b""
        return end, self._say([Text(text) for text in texts if text])

    def _first(self, data: bytes, start: int) -> int:
        """Return the end of what is to be parsed before the next look for a run: an
        event if one can be learned from or a run may follow, else all of it.
        """
        runs = self._runs
        if not (runs.may_go_on(data, start) if runs.is_known else runs.is_learning):
            return len(data)
        end = data.find(b"\n\n", start) + 2
        return end if end > 1 else len(data)

    def _read_parsed(self, data: bytes, deltas: list[Delta]) -> UpstreamFault | None:
        parser, reader, runs = self._parser, self._reader, self._runs
        assert parser is not None
        try:
            for event in parser.feed(data):
                said = len(deltas)
                reader.read(event, deltas)
                if reader.ended:
                    break
                if runs.is_learning and len(deltas) == said + 1:
                    delta = deltas[said]
                    if type(delta) is Text:
                        runs.learn(event, delta.text, data)
            if parser.ignored is not None:
                self._read_ignored(parser)
        except UpstreamFault as fault:
            return fault
        self._is_running = parser.is_between and not reader.finished
        return None

    def _read_ignored(self, parser: Parser) -> None:
        """Old llama.cpp reports errors in a field called "error"."""
        name, _, value = (parser.ignored or "").partition(":")
        if name == "error":
            self._reader.read_odd(Event("error", value))

    def _read_end(self, deltas: list[Delta]) -> None:
        if self._parser is None:
            deltas += self._read_body()
            return
        for event in self._parser.end():
            self._reader.read(event, deltas)
        try:
            self._check_end()
        except UpstreamFault:
            # JSON or HTML that was called an event stream.
            if not self._reader.understood and self._parser.ignored is not None:
                deltas += self._read_body()
                return
            raise

    def _read_body(self) -> list[Delta]:
        body = bytes(self._body)
        if body.lstrip().startswith(_JSON_STARTS):
            return self._reader.read_body(body)
        snippet = body[:SNIPPET_CHARS].decode(errors="replace").strip()
        kind = self._content_type or "no content type"
        raise UpstreamGarbled(
            f"upstream sent {kind} instead of a completion: {snippet}"
            if snippet
            else f"upstream sent an empty reply ({kind})"
        )

    # ----------------------------------------------------------------------- speaking

    def _say(self, deltas: list[Delta]) -> bytes:
        if not deltas:
            return b""
        if type(deltas[-1]) is not Start:  # it can only be the first
            self.is_answering = True
            self.progress += 1
        if self._cutter is not None:
            deltas = self._cut(deltas, self._cutter)
        if not self._stream:
            self._deltas += deltas
            return b""
        out = self._writer.frames(deltas)
        self.is_started = self.is_started or bool(out)
        return out

    def _cut(self, deltas: list[Delta], cutter: Cutter) -> list[Delta]:
        out: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, Text):
                self._is_overrun = self._is_overrun or cutter.is_cut
                if text := cutter.feed(delta.text):
                    out.append(Text(text))
                if cutter.is_cut and not self._finish_said:
                    out.append(Finish("stop_sequence"))
                    self._finish_said = True
            elif not isinstance(delta, Finish):
                out.append(delta)
            elif not self._finish_said:
                out += self._rest()
                out.append(delta)
                self._finish_said = True
        return out

    def _rest(self) -> list[Delta]:
        """What the cutter holds back when nothing more can come."""
        text = self._cutter.end() if self._cutter is not None else ""
        return [Text(text)] if text else []

    def _finish(self) -> bytes:
        if not self.is_answering:
            # TGI ends a tool call that never parsed with [DONE] and nothing else.
            return self._fail(
                UpstreamReported("upstream ended the stream without an answer")
            )
        deltas = self._rest()
        if not (self._finish_said or self._reader.finished):
            # [DONE] without a reason. The client still needs its last frame.
            deltas.append(Finish(""))
        if self._reader.usage is not None and not self._is_overrun:
            deltas.append(self._reader.usage)
        self.is_ended = True
        self.is_started = True
        if self._stream:
            return self._writer.frames(deltas) + self._writer.end()
        return self._writer.body(self._deltas + deltas)

    def _fail(self, error: ProxyError) -> bytes:
        self._end_by(error, self._redact)
        if not self.is_started:
            raise error
        return self._writer.frames(self._rest()) + self._writer.error(error)


def _passes(cutter: Cutter, texts: list[bytes]) -> bool:
    """Whether nothing is to be cut from texts that stand as they are in JSON."""
    text = b"".join(texts)
    return b"\\" not in text and cutter.passes(text.decode("ascii"))
