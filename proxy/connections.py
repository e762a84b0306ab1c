"""Clients' connections: how many there may be, and how long a request may take to come.

aiohttp's server closes those that lie idle and refuses lines that are too long. Here is
the rest: a most of connections, a deadline for the head of a request once its first
byte is there, and the replies to all who do not keep to that. Nothing of it is known to
be of any dialect yet, so they are plain text.

A request that comes whole, and of which nothing has to be found out first, is handed on
past aiohttp's parser and its task (``Visit``).
"""

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol, cast

import aiohttp
from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from proxy import heads
from proxy.config import AllTimeouts, Limits
from proxy.response import SERVER

logger = logging.getLogger(__name__)

# How long a connection is kept that was refused, so that its client reads why: closed
# with something unread, it would be reset. And how many of them at a time.
LINGER_S = 1.0
MOST_LINGERING = 256
# A whole head is at most that many times as long as one line of it.
HEAD_LINES = 4
# What a visit needs of aiohttp's inside; a later version may call it something else.
_INSIDE = (
    "_force_close",
    "_keepalive",
    "_keepalive_handle",
    "_loop",
    "_messages",
    "_next_keepalive_close_time",
    "_parser",
    "_reading_paused",
    "_waiter",
)
CAN_VISIT = all(hasattr(web.RequestHandler, name) for name in _INSIDE)
# How much is read of a request that is not whole yet, and of those that follow one which
# is being answered.
MOST_HELD_BYTES = 1024 * 1024
# How long the rest of a request is waited for before aiohttp gets what is there of it.
HOLD_S = 1.0
# Left for whatever else is open: listening sockets, logs, Redis.
OTHER_FILES = 64


def _reply(status: str, text: str, *headers: str) -> bytes:
    body = f"{text}\n".encode()
    lines = (
        f"HTTP/1.1 {status}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


_FULL = _reply(
    "503 Service Unavailable",
    "too many connections (limits.connections in the configuration)",
    "Retry-After: 5",
)
_TIMEOUT = _reply("408 Request Timeout", "the head of the request did not come in time")


def affordable(wanted: int) -> int:
    """Return how many connections there can be, at most ``wanted``.

    Each may need a second file, for its upstream. The process's limit of open files is
    raised as far as it may be.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(1, min(wanted, (allowed - OTHER_FILES) // 2))


class Visit(Protocol):
    """A request that is being answered without aiohttp. At its end it says so to the
    connection, by ``visited``.
    """

    def client_gone(self) -> None:
        """Nobody is there to be answered any more."""


class Visitor(Protocol):
    """Who answers requests without aiohttp, those that can be.

    ``known`` has what is known of a head, by its bytes as ``heads`` cuts them.
    """

    @property
    def known(self) -> Mapping[heads.Head, Any]: ...

    def meet(self, head: heads.Head, message: RawRequestMessage) -> Any:
        """Return what is to be known of a head, None if it has to go the usual way.

        Args: message: what it was parsed as.
        """

    def visit(self, client: "Connection", known: Any, body: bytes) -> Visit | None:
        """Answer a request; None if it has to go the usual way."""


class Server(web.Server):
    """A low-level server whose clients keep to limits.

    ``refused`` counts those that did not, by what it was. ``visitor`` is asked first
    what to do with a request.
    """

    def __init__(
        self,
        handler: Any,
        visitor: Visitor,
        limits: Limits,
        timeouts: AllTimeouts,
        *,
        request_factory: Any,
        logger: logging.Logger,
    ) -> None:
        super().__init__(
            handler,
            request_factory=request_factory,
            # Without this a client's hang-up is noticed only at the next write.
            handler_cancellation=True,
        )
        self.loop = asyncio.get_running_loop()
        self.visitor = visitor
        self.count = 0
        self.incomplete: set[Connection] = set()  # whose requests are held
        self.is_patient = True
        self.lingering = 0
        self.refused: Counter[str] = Counter()
        self._logger = logger
        self.configure(limits, timeouts)
        if not CAN_VISIT:
            logger.warning(
                "this version of aiohttp (%s) is not known: each request costs twice the"
                " CPU time that it has to",
                aiohttp.__version__,
            )

    def configure(self, limits: Limits, timeouts: AllTimeouts) -> None:
        """Go by other settings from now on, but for connections that are open."""
        self.header_bytes = limits.header_bytes
        self.header_s = timeouts.header_s
        self.idle_s = timeouts.idle_s
        self._most = affordable(limits.connections)
        if self._most < limits.connections:
            logger.warning(
                "limits.connections: %d instead of %d, so many open files are allowed",
                self._most,
                limits.connections,
            )
        self._options: dict[str, Any] = {
            "logger": self._logger,
            "access_log": None,
            "keepalive_timeout": timeouts.idle_s,
            "max_line_size": limits.header_bytes,
            "max_field_size": limits.header_bytes,
        }

    def hurry(self) -> None:
        """Wait no longer for requests to be whole before they are looked at."""
        self.is_patient = False
        for connection in list(self.incomplete):
            connection.go_on()

    def __call__(self) -> web.RequestHandler:
        if self.count >= self._most:
            self.refused["connections"] += 1
            # Any protocol will do for a transport.
            return cast(web.RequestHandler, _Farewell(self, _FULL))
        return Connection(self, loop=self.loop, **self._options)


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = (
        "_again",
        "_clock",
        "_head_bytes",
        "_held",
        "_held_bytes",
        "_is_between",
        "_server",
        "_visit",
        "_visitor",
        "_wanted_bytes",
    )

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._visit: Visit | None = None
        # The head of the last visit, and who knew it.
        self._again: heads.Again | None = None
        self._visitor = server.visitor
        # What came during a visit, or is the beginning of one.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._wanted_bytes = 0  # of the whole request that begins there
        # Until the first request is begun, and of a head that is incomplete.
        self._clock: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        # aiohttp's parser holds no beginning of a request that this might go on with.
        self._is_between = True

    @property
    def remote(self) -> str:
        """The client's address, "" if it has none."""
        peer = self.peername
        return str(peer[0]) if isinstance(peer, tuple) else peer or ""

    async def drain(self) -> None:
        await self._drain_helper()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = self._server
        server.count += 1
        super().connection_made(transport)
        # aiohttp 3.14.0 looks after a connection only once it had a request.
        self._clock = server.loop.call_later(server.idle_s, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.count -= 1
        self._server.incomplete.discard(self)
        self._stop_clock()
        visit, self._visit = self._visit, None
        super().connection_lost(exc)
        if visit is not None:
            visit.client_gone()

    def data_received(self, data: bytes) -> None:
        if self._held or self._visit is not None:
            self._hold(data)
            return
        waiter = self._waiter
        if waiter is None or waiter.done() or self._head_bytes or not CAN_VISIT:
            self._parse(data)
        else:
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        """Look at what has come between two requests: it begins the next one."""
        again = self._again
        if again is not None and (whole := again.body_of(data)) is not None:
            visitor = self._server.visitor
            if self._is_between and visitor is self._visitor:
                self._ask(visitor, again.known, data, whole)
                return
        if (parts := heads.cut(data)) is None:
            self._parse(data)
        else:
            head, body, length = parts
            if len(body) == length:
                self._receive_whole(data, head, body)
            elif (
                len(body) < length
                and (wanted := len(data) - len(body) + length) <= MOST_HELD_BYTES
                and self._server.is_patient
                and not heads.is_waiting(head)
            ):
                # Clients often send head and body one after the other.
                self._stop_clock()
                self._clock = self._server.loop.call_later(HOLD_S, self.go_on)
                self._wanted_bytes = wanted
                self._server.incomplete.add(self)
                self._hold(data)
            else:
                self._parse(data)

    def _receive_whole(self, data: bytes, head: heads.Head, body: bytes) -> None:
        """Have a whole request answered, by a visit if that can be."""
        visitor = self._server.visitor
        known = visitor.known.get(head) if self._is_between else None
        if known is None:
            self._meet(visitor, data, head, body)
            return
        self._again, self._visitor = heads.Again(data, head, known), visitor
        self._ask(visitor, known, data, body)

    def _ask(self, visitor: Visitor, known: Any, data: bytes, body: bytes) -> None:
        """Have a request answered whose head is known."""
        self._visit = visitor.visit(self, known, body)
        if self._visit is None:
            self._parse(data)
            self._is_between = True
        elif self._clock is not None:
            self._stop_clock()

    def _meet(
        self, visitor: Visitor, data: bytes, head: heads.Head, body: bytes
    ) -> None:
        """Have aiohttp parse a whole request, and answer it if that can be."""
        waiter = self._waiter
        self._waiter = None  # whoever waits for it may not be needed
        self._parse(data)
        self._waiter = waiter
        message, payload = self._messages[0] if self._messages else (None, None)
        if isinstance(message, RawRequestMessage) and payload is not None:
            known = visitor.meet(head, message)
            # Then the parser has found this request in it, and nothing before.
            self._is_between = known is not None
            # A long body makes aiohttp stop reading until somebody takes it.
            is_whole = payload.is_eof() and not self._reading_paused
            if known is not None and is_whole and len(self._messages) == 1:
                self._visit = visitor.visit(self, known, body)
        if self._visit is not None:
            self._messages.clear()
            parser = self._parser
            if parser is not None and hasattr(parser, "message_consumed"):
                parser.message_consumed()  # of 3.14.1 and later
        elif self._messages and waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _parse(self, data: bytes) -> None:
        """Let aiohttp have it."""
        self._is_between = False
        super().data_received(data)
        # Whether a request is waited for; most come whole, and this is all they cost.
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._wait_for_head(len(data))
        elif self._clock is not None:
            self._stop_clock()

    def _hold(self, data: bytes) -> None:
        """Keep the rest of a request until it is whole, or what follows it until it is
        answered.
        """
        self._held.append(data)
        self._held_bytes += len(data)
        if self._wanted_bytes:
            if self._held_bytes >= self._wanted_bytes:
                self.go_on()
        elif self._held_bytes > MOST_HELD_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def visited(self, now_s: float, *, keep_alive: bool) -> None:
        """The request is answered. Args: now_s: on the loop's clock."""
        self._visit = None
        if not keep_alive or self._force_close:
            self.force_close()
            return
        # aiohttp's task has waited all the time; now the connection is idle indeed.
        close_time = now_s + self._server.idle_s
        self._keepalive = True
        self._next_keepalive_close_time = close_time
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(
                close_time, self._process_keepalive
            )
        if self._held:
            # In a later turn: what was said may still wait for the end of this one.
            self._loop.call_soon(self.go_on)

    def go_on(self) -> None:
        """Look at what was held. A request that is not whole goes the usual way."""
        is_late = self._held_bytes < self._wanted_bytes
        if self._wanted_bytes:
            self._server.incomplete.discard(self)
        data, is_paused = b"".join(self._held), self._held_bytes > MOST_HELD_BYTES
        self._held = []
        self._held_bytes = self._wanted_bytes = 0
        self._stop_clock()
        if self.transport is None:
            return
        if is_paused:
            self.transport.resume_reading()
        if is_late:
            self._parse(data)
        else:
            self.data_received(data)

    def _process_keepalive(self) -> None:
        if self._held or self._visit is not None:
            self._next_keepalive_close_time = self._loop.time() + self._server.idle_s
        super()._process_keepalive()

    def _wait_for_head(self, size: int) -> None:
        server = self._server
        if not self._head_bytes:
            self._stop_clock()
            self._clock = server.loop.call_later(server.header_s, self._expire)
        self._head_bytes += size
        if self._head_bytes > HEAD_LINES * server.header_bytes:
            server.refused["header_size"] += 1
            limit = HEAD_LINES * server.header_bytes
            reply = _too_large(f"it exceeds {limit} bytes")
            # In a later turn: the reply before it may still wait for the end of this one.
            self._loop.call_soon(self._end, reply)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
            self._head_bytes = 0

    def _expire(self) -> None:
        self._clock = None
        self._server.refused["header_timeout"] += 1
        self._end(_TIMEOUT)

    def _end(self, reply: bytes) -> None:
        transport = self.transport
        if transport is None:
            return
        self.transport = None
        self.connection_lost(None)
        farewell = _Farewell(self._server, reply)
        transport.set_protocol(farewell)
        farewell.connection_made(transport)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Say what aiohttp's parser found, lines that are too long as what they are."""
        is_too_many = isinstance(exc, BadHttpMessage) and "Too many" in exc.message
        if not (isinstance(exc, LineTooLong) or is_too_many):
            response = super().handle_error(request, status, exc, message)
            response.headers["Server"] = (
                SERVER  # not the versions of what it is made of
            )
            return response
        self._server.refused["header_size"] += 1
        self._end(
            _too_large(f"more than {self.max_headers} headers")
            if is_too_many
            else _too_large(_bytes(self._server.header_bytes, "a line"))
        )
        return web.Response(status=431)  # reaches nobody


def _too_large(what: str) -> bytes:
    return _reply(
        "431 Request Header Fields Too Large",
        f"the head of the request is too large: {what}",
    )


def _bytes(limit: int, what: str) -> str:
    return f"{what} exceeds {limit} bytes (limits.headerBytes in the configuration)"


class _Farewell(asyncio.Protocol):
    """Says one thing and closes, whatever the client sends meanwhile."""

    def __init__(self, server: Server, reply: bytes) -> None:
        self._server = server
        self._reply = reply
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        server = self._server
        if server.lingering >= MOST_LINGERING:
            transport.abort()
            return
        server.lingering += 1
        self._clock = server.loop.call_later(LINGER_S, transport.abort)
        transport.write(self._reply)
        if transport.can_write_eof():
            transport.write_eof()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._server.lingering -= 1
