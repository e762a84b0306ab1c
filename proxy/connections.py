"""Clients' connections: how many there may be, and how long a request may take to come.

aiohttp's server closes those that lie idle and refuses lines that are too long. Here is
the rest: a most of connections, a deadline for the head of a request once its first
byte is there, and the replies to all who do not keep to that. Nothing of it is known to
be of any dialect yet, so they are plain text.
"""

import asyncio
import logging
import resource
from collections import Counter
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from proxy.config import AllTimeouts, Limits
from proxy.response import SERVER

logger = logging.getLogger(__name__)

# How long a connection is kept that was refused, so that its client reads why: closed
# with something unread, it would be reset. And how many of them at a time.
LINGER_S = 1.0
MOST_LINGERING = 256
# A whole head is at most that many times as long as one line of it.
HEAD_LINES = 4
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


class Server(web.Server):
    """A low-level server whose clients keep to limits.

    ``refused`` counts those that did not, by what it was.
    """

    def __init__(
        self,
        handler: Any,
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
        self.count = 0
        self.lingering = 0
        self.refused: Counter[str] = Counter()
        self._logger = logger
        self.configure(limits, timeouts)

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

    def __call__(self) -> web.RequestHandler:
        if self.count >= self._most:
            self.refused["connections"] += 1
            # Any protocol will do for a transport.
            return cast(web.RequestHandler, _Farewell(self, _FULL))
        return _Connection(self, loop=self.loop, **self._options)


class _Connection(web.RequestHandler):
    __slots__ = ("_clock", "_head_bytes", "_server")

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        # Until the first request is begun, and of a head that is incomplete.
        self._clock: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = self._server
        server.count += 1
        super().connection_made(transport)
        # aiohttp 3.14.0 looks after a connection only once it had a request.
        self._clock = server.loop.call_later(server.idle_s, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.count -= 1
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Whether a request is waited for; most come whole, and this is all they cost.
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._wait_for_head(len(data))
        elif self._clock is not None:
            self._stop_clock()

    def _wait_for_head(self, size: int) -> None:
        server = self._server
        if not self._head_bytes:
            self._stop_clock()
            self._clock = server.loop.call_later(server.header_s, self._expire)
        self._head_bytes += size
        if self._head_bytes > HEAD_LINES * server.header_bytes:
            server.refused["header_size"] += 1
            limit = HEAD_LINES * server.header_bytes
            self._end(_too_large(f"it exceeds {limit} bytes"))

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
