"""One connection to an upstream: a request goes out, its reply comes in, in turn.

What belongs here: HTTP/1.1 framing, by httptools' C parser, and back-pressure in both
directions. Which host, how long, and what a failure means to a client: elsewhere.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import cast

import httptools

from proxy.outbox import Outbox

# A reader that does not come for its bytes stops the socket at this many.
HIGH_WATER_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
LINGER_S = 0.1
LINGER_BYTES = 1024


class ConnectionFailed(Exception):
    """The connection ended before the reply did."""


class BadReply(Exception):
    """What came is not HTTP."""


class Connection(asyncio.Protocol):
    """Driven by one task at a time: ``send``, then ``arrival`` until ``is_head_in``,
    then ``take`` until ``is_complete``, with ``arrival`` in between. Or a function is
    given to ``listener``: it is called when there is something to take, or nothing more
    will come. That saves a task switch per read.

    ``is_reusable`` says afterwards whether another request may follow. A connection
    that was used before and fails while ``has_received`` is False met a server that was
    closing it.
    """

    # More attributes than CPython keeps in line: a sixth off each read.
    __slots__ = (
        "_can_write",
        "_chunks",
        "_ends_with_connection",
        "_is_bodiless",
        "_is_busy",
        "_is_ended",
        "_is_paused",
        "_is_spoilt",
        "_linger_timer",
        "_lingerer",
        "_loop",
        "_outbox",
        "_pairs",
        "_parser",
        "_reader",
        "_sending",
        "_transport",
        "_unfinished_bytes",
        "_untaken_bytes",
        "_writer",
        "error",
        "has_received",
        "headers",
        "idle_until_s",
        "is_ending",
        "is_head_in",
        "is_open",
        "keep_alive_s",
        "listener",
        "pairs",
        "status",
    )

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.listener: Callable[[], None] | None = None
        # Of the last head that came in, which is this reply's once ``is_head_in``.
        self.status = 0
        # As they came; the names in lower case, of several of one name the first.
        self.pairs: list[tuple[bytes, bytes]] = []
        self.headers: dict[str, bytes] = {}
        self.is_open = False
        self.has_received = False
        self.idle_until_s = 0.0
        self.keep_alive_s: float | None = None
        # Why there will be no end. What was there before it can still be taken.
        self.error: Exception | None = None
        self.is_head_in = False
        # Nothing is wrong, only the end is not in yet.
        self.is_ending = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._is_busy = False
        self._is_ended = False
        self._is_bodiless = False  # the request was HEAD
        self._ends_with_connection = False
        self._is_spoilt = False  # it must not carry another request
        self._unfinished_bytes = 0  # of what the parser has not made anything of
        self._untaken_bytes = 0  # with the frames around them: an upper bound
        self._is_paused = False
        # Both are always the same lists: the parser fills them without our help.
        self._chunks: list[bytes] = []
        self._pairs: list[tuple[bytes, bytes]] = []
        self._parser = self._new_parser()
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._can_write = True
        self._sending: asyncio.Task[None] | None = None
        self._lingerer: Callable[[], None] | None = None
        self._linger_timer: asyncio.TimerHandle

    def _new_parser(self) -> httptools.HttpResponseParser:
        """It looks its callbacks up once, now: they may be the lists' own methods."""
        pairs = self._pairs

        def keep(name: bytes, value: bytes) -> None:
            pairs.append((name, value))

        return httptools.HttpResponseParser(
            SimpleNamespace(
                on_message_begin=self._begin_message,
                on_header=keep,
                on_headers_complete=self._end_head,
                # No line of Python per chunk: a stream has a lot of them.
                on_body=self._chunks.append,
                on_message_complete=self._end_message,
            )
        )

    # ------------------------------------------------------------------------ requests

    def send(self, request: bytes, *, bodiless: bool = False) -> None:
        """Send a request whose body is there already."""
        self._begin(bodiless)
        assert self._transport is not None
        self._outbox.write(self._transport, request)

    def send_stream(
        self,
        head: bytes,
        body: AsyncIterator[bytes],
        *,
        length: int | None,
        bodiless: bool = False,
    ) -> None:
        """Send a request whose body comes in pieces; the reply may come before it.

        Args: length: what the head says the body's length is, None if it is chunked.
        """
        self._begin(bodiless)
        assert self._transport is not None
        self._transport.write(head)
        self._sending = self._loop.create_task(self._send_pieces(body, length))

    def _begin(self, bodiless: bool) -> None:
        self.has_received = self.is_head_in = self._is_ended = False
        self.is_ending = self.is_open and self.error is None
        self._is_busy = True
        self._is_bodiless = bodiless
        self._unfinished_bytes = self._untaken_bytes = 0

    async def _send_pieces(
        self, body: AsyncIterator[bytes], length: int | None
    ) -> None:
        transport = self._transport
        assert transport is not None
        chunked, left = length is None, length or 0
        try:
            async for piece in body:
                if not piece:
                    continue
                left -= len(piece)
                if not chunked and left < 0:
                    # What is too much would be the beginning of another request.
                    raise ValueError("the body is longer than its head says")
                transport.write(
                    b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
                )
                if not self._can_write:
                    self._writer = self._loop.create_future()
                    await self._writer
                if not self.is_open:
                    return
            if chunked:
                transport.write(b"0\r\n\r\n")
            elif left:
                raise ValueError("the body is shorter than its head says")
        except Exception as error:
            # The body's source failed: what was announced will never be whole.
            self._fail(ConnectionFailed(str(error)))
            self.abort()

    # ------------------------------------------------------------------------- replies

    def arrival(self) -> asyncio.Future[None]:
        """To be waited for: more of the reply, or its end.

        Raises: ConnectionFailed, BadReply: there will be no end.
        """
        if self.error is not None:
            raise self.error
        self._reader = self._loop.create_future()
        return self._reader

    def take(self) -> bytes:
        """Return what has arrived of the body, b"" if that is nothing."""
        chunks = self._chunks
        if not chunks:
            return b""
        if len(chunks) == 1:
            data = chunks.pop()
        else:
            data = b"".join(chunks)
            chunks.clear()
        self._untaken_bytes = 0
        if self._is_paused:
            self.resume()
        return data

    def is_complete(self) -> bool:
        """Nothing follows what has been taken."""
        return self._is_ended and not self._chunks

    def pause(self) -> None:
        """Let the server wait: nobody takes what it sends."""
        transport = self._transport
        if transport is not None and not self._is_paused:
            self._is_paused = True
            if not transport.is_closing():
                transport.pause_reading()

    def resume(self) -> None:
        transport = self._transport
        if transport is not None and self._is_paused:
            self._is_paused = False
            if not transport.is_closing():
                transport.resume_reading()

    def is_reusable(self) -> bool:
        return (
            self._is_ended
            and self.is_open
            and not self._is_spoilt
            and not self._is_paused
            and not self._chunks
            and self.error is None
            # A server may answer before it has read all of the request.
            and self._transport is not None
            and self._transport.get_write_buffer_size() == 0
            and (self._sending is None or self._sending.done())
        )

    def release(self) -> None:
        """The reply has been read; from now on anything that comes is wrong."""
        self._is_busy = False
        self.listener = None
        self._chunks.clear()

    def linger(self, done: Callable[[], None]) -> None:
        """Wait a moment for the end of a reply that nobody reads any more.

        A stream says its last word some microseconds before its HTTP framing ends; to
        close in between would cost a new connection per stream. ``done`` is called at
        the end, whatever it is; a server that goes on instead is hung up on.
        """
        self.listener = self._go_on_lingering
        self._chunks.clear()
        self._lingerer = done
        self._linger_timer = self._loop.call_later(LINGER_S, self._stop_lingering)

    def _go_on_lingering(self) -> None:
        if not self.is_ending or sum(map(len, self._chunks)) > LINGER_BYTES:
            self._stop_lingering()

    def _stop_lingering(self) -> None:
        done, self._lingerer = self._lingerer, None
        if done is not None:
            self._linger_timer.cancel()
            self.listener = None
            self._chunks.clear()
            done()

    def abort(self) -> None:
        self.listener = None
        self._chunks.clear()
        if self._sending is not None:
            self._sending.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _wake(self) -> None:
        if self.listener is not None:
            self.listener()
            return
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self.is_ending = False
        self._wake()

    # ------------------------------------------------------------- called by the socket

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by its type, only by what it does.
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if not self.has_received:
            transport = self._transport
            if transport is not None and self._outbox.holds(transport):
                # Nobody has asked it yet, so this answers nothing of ours.
                self._is_spoilt = True
                self._fail(ConnectionFailed("it spoke unasked"))
                self.abort()
                return
            self.has_received = True
        if not self._is_busy:  # the rest of an old reply, or an answer to nothing
            self._is_spoilt = True
            self.abort()
            return
        chunks = self._chunks
        before = len(chunks)
        self._unfinished_bytes += len(data)
        self._untaken_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._refuse(error)
        if len(chunks) > before:
            self._unfinished_bytes = 0
            if self._is_bodiless:
                chunks.clear()  # the parser takes for a body what is none
        elif self._unfinished_bytes > MAX_HEAD_BYTES and self.is_ending:
            # A head without an end; or a trailer, or what may follow a chunk's size.
            self._fail(BadReply("its head is too long"))
            self.abort()
        if (listener := self.listener) is not None:
            listener()
        else:
            self._wake()
        if self._untaken_bytes > HIGH_WATER_BYTES:
            self._hold_back()

    def _refuse(self, error: Exception) -> None:
        """What the parser does not take: after the end it is not this reply's."""
        if self._is_ended:
            self._is_spoilt = True
        else:
            self._fail(BadReply(str(error)))
            self.abort()

    def _hold_back(self) -> None:
        """Nobody came for it: pause, if it is too much without its frames, too."""
        self._untaken_bytes = sum(map(len, self._chunks))
        if self._untaken_bytes > HIGH_WATER_BYTES:
            self.pause()

    def eof_received(self) -> None:
        # Else the loop would wait until all of our request is out, and the server may
        # have no mind to read it.
        self.connection_lost(None)
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = self.is_ending = False
        if self._ends_with_connection and self.is_head_in and error is None:
            self._is_ended = True
        if not self._is_ended:
            self._fail(ConnectionFailed(str(error or "closed")))
        self._wake()
        self._stop_lingering()
        self.resume_writing()
        # What it calls is ours: a circle, for which only the collector would come.
        self._parser = cast(httptools.HttpResponseParser, None)

    def pause_writing(self) -> None:
        self._can_write = False

    def resume_writing(self) -> None:
        self._can_write = True
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    # ------------------------------------------------------------- called by the parser

    def _begin_message(self) -> None:
        if self._is_ended:
            # The parser reads no further: what follows is not this reply's.
            raise BadReply("there is more than one")

    def _end_head(self) -> None:
        if self._is_ended or self.error is not None:
            return
        status = self._parser.get_status_code()
        pairs = self._pairs.copy()
        # No head is longer than all that has come, and hardly any is that long.
        if self._untaken_bytes > MAX_HEAD_BYTES // 2 and _is_long(pairs):
            self._fail(BadReply("its head is too long"))
            self.abort()
            return
        if status < 200:  # 100 Continue, 103 Early Hints
            return
        self.status = status
        self.pairs = pairs
        headers: dict[str, bytes] = {}
        for name, value in pairs:
            if (lowered := _LOWER[name]) not in headers:
                headers[lowered] = value
        self.headers = headers
        is_framed = (
            "content-length" in headers
            or b"chunked" in headers.get("transfer-encoding", b"").lower()
        )
        self._ends_with_connection = not is_framed and status not in (204, 304)
        keep_alive = headers.get("keep-alive")
        self.keep_alive_s = _timeout_of(keep_alive) if keep_alive else None
        self.is_head_in = True
        self._unfinished_bytes = 0
        if self._is_bodiless:
            # The parser cannot know that no body follows.
            self._is_ended = self._is_spoilt = True
            self.is_ending = False

    def _end_message(self) -> None:
        self._pairs.clear()  # of 100 Continue, 103 Early Hints; or trailers
        if self.is_head_in:
            self._is_ended = True
            self.is_ending = False
            # Afterwards the parser speaks of the next message.
            if not self._parser.should_keep_alive():
                self._is_spoilt = True


def _is_long(pairs: list[tuple[bytes, bytes]]) -> bool:
    return sum(len(name) + len(value) + 4 for name, value in pairs) > MAX_HEAD_BYTES


class _Lower(dict[bytes, str]):
    """The same few names come with every reply; many others are not kept."""

    def __missing__(self, name: bytes) -> str:
        lowered = name.decode("latin-1").lower()
        if len(self) < 1024 and len(name) < 64:
            self[name] = lowered
        return lowered


_LOWER = _Lower()


def _timeout_of(keep_alive: bytes) -> float | None:
    """Return the seconds of ``Keep-Alive: timeout=5``, None if it does not say."""
    for part in keep_alive.decode("latin-1").split(","):
        name, _, value = part.strip().partition("=")
        if name.lower() == "timeout" and value.strip().isdecimal():
            return float(value)
    return None
