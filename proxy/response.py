"""A reply to a client, written straight to its socket.

aiohttp's own responses build a header map and a payload writer per reply, which costs
as much as all the rest of a request. What is written here is little: a status line, a
few headers that are mostly the same every time, and chunks.
"""

import asyncio
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Protocol

from aiohttp import web

from proxy import __version__
from proxy.dialects.base import Reply
from proxy.outbox import Outbox

SERVER = f"completions-proxy/{__version__}"
_EMPTY = frozenset((204, 304))
_KEEP_ALIVE = b"Connection: keep-alive\r\n"
_NEWLINE = b"\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


def own_headers(exchange_id: str) -> dict[str, str]:
    """What every reply of an exchange carries."""
    return {"Server": SERVER, "X-Request-Id": exchange_id}


class Client(Protocol):
    """The connection to a client. ``transport`` is None once it is gone."""

    transport: asyncio.Transport | None

    async def drain(self) -> None:
        """Wait until the client has read most of what was written."""


class Response:
    """One reply: ``whole`` or ``error``; or ``begin``, ``write`` and ``end``.

    For aiohttp's server it is a response that was sent already: ``status``,
    ``keep_alive``, ``prepare`` and ``write_eof`` are all that it asks of one.

    Args:   is_http11: else its end, if its length is not known, is that of the
                connection.
            is_head: its body is not shown.
    Raises: ConnectionResetError: the client is gone.
    """

    status = 0
    is_begun = False
    more = b""  # header lines
    # Where writes may wait for the end of the turn; None while aiohttp might write to
    # the same socket within it.
    outbox: Outbox | None = None
    _is_chunked = False
    _has_backlog = False  # it may not have read all that was written before
    _transport: asyncio.Transport | None = None

    def __init__(
        self,
        client: Client,
        id: str = "",
        *,
        keep_alive: bool = True,
        is_http11: bool = True,
        is_head: bool = False,
    ) -> None:
        self.keep_alive = keep_alive
        self._client = client
        self._id = id
        self._is_http11 = is_http11
        self._is_head = is_head

    # ------------------------------------------------------------------------- writing

    def whole(self, status: int, head: bytes, body: bytes) -> None:
        """Say all of it in one write. Args: head: what ``render`` made of it."""
        lines = self._lines(status, head)
        if status in _EMPTY:
            lines.append(_NEWLINE)
        else:
            lines.append(b"Content-Length: %d\r\n\r\n" % len(body))
            if not self._is_head:
                lines.append(body)
        self._send(b"".join(lines))

    def reply(self, reply: Reply) -> None:
        headers = {**reply.headers, "Content-Type": reply.content_type}
        self.whole(reply.status, render(reply.status, headers), reply.body)

    def begin(
        self, status: int, head: bytes, out: bytes, *, is_all: bool = False
    ) -> None:
        """Begin a reply whose length is not known, with the first of it, or all."""
        if self._is_http11:
            self._is_chunked = True
            coding = b"Transfer-Encoding: chunked\r\n\r\n"
        else:  # then only the end of the connection ends it
            self.keep_alive = False
            coding = _NEWLINE
        lines = self._lines(status, head)
        lines.append(coding)
        self._frame(out, lines)
        if is_all and self._is_chunked:
            lines.append(_LAST_CHUNK)
        self._send(b"".join(lines))

    def write(self, out: bytes) -> None:
        """Go on with it. ``out`` is not empty."""
        # Once per event of a stream, so nothing is called that need not be.
        transport = self._client.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if self._is_chunked:
            out = b"".join((_size_of(out), out, _NEWLINE))
        if self.outbox is not None and self.keep_alive:
            self._has_backlog = self.outbox.write(transport, out)
        else:
            self._send(out)

    def end(self, out: bytes) -> None:
        """Say the last of it, and that it is the last."""
        parts: list[bytes] = []
        self._frame(out, parts)
        if self._is_chunked:
            parts.append(_LAST_CHUNK)
        if last := b"".join(parts):
            self._send(last)

    def _frame(self, out: bytes, parts: list[bytes]) -> None:
        """Add a piece of the body as it is said."""
        if not out:
            return
        if self._is_chunked:
            parts += (_size_of(out), out, _NEWLINE)
        else:
            parts.append(out)

    def _send(self, data: bytes) -> None:
        transport = self._client.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self.is_begun = True
        self._transport = transport
        if self.outbox is None:
            self._has_backlog = True
            transport.write(data)
            return
        self._has_backlog = self.outbox.write(transport, data)
        if not self.keep_alive:  # then aiohttp is about to close it
            self.outbox.flush(transport)

    def _lines(self, status: int, head: bytes) -> list[bytes]:
        """Return the head with what is not the same in all replies of a kind, in pieces."""
        self.status = status
        lines = [head, _date(int(time.time())), self.more]
        if self._id:
            lines += (b"X-Request-Id: ", self._id.encode(), _NEWLINE)
        if not self.keep_alive:  # whatever a dialect says
            lines[0] = head.replace(_KEEP_ALIVE, b"")
            lines.append(b"Connection: close\r\n")
        elif not (self._is_http11 or _KEEP_ALIVE in head):
            lines.append(_KEEP_ALIVE)
        return lines

    # ------------------------------------------------------------------ flow and failure

    def is_clogged(self) -> bool:
        """The client does not read as fast as it is written to."""
        # Before the first write nothing of ours can be in the way.
        transport = self._transport
        return (
            self._has_backlog
            and transport is not None
            and transport.get_write_buffer_size() > _HIGH_BYTES
        )

    async def drain(self) -> None:
        """Wait until it has read most of it."""
        # Of a connection there is one future for that, and once it was cancelled (by a
        # deadline, say) whoever waits for the last bytes would be cancelled by it, too.
        await asyncio.shield(self._client.drain())

    def abort(self) -> None:
        """Break the connection off: what was begun cannot be ended in another way."""
        self.keep_alive = False
        if self._client.transport is not None:
            self._client.transport.abort()

    # ------------------------------------------------------------------- aiohttp's side

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to do."""

    async def write_eof(self) -> None:
        """Nothing is left to do."""


# Of chunks as long as most events are.
_SIZES = [b"%x\r\n" % size for size in range(1024)]


def _size_of(chunk: bytes) -> bytes:
    size = len(chunk)
    return _SIZES[size] if size < 1024 else b"%x\r\n" % size


# Where asyncio's transports begin to ask for a pause.
_HIGH_BYTES = 64 * 1024


def render(status: int, headers: Mapping[str, str]) -> bytes:
    """Return the status line and headers. Raises: ValueError: one holds a line end."""
    return _rendered(status, *headers.items())


@lru_cache(maxsize=256)
def _rendered(status: int, *headers: tuple[str, str]) -> bytes:
    """Return the status line and headers, which are the same for most replies."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    lines = [f"HTTP/1.1 {status} {reason}", f"Server: {SERVER}"]
    lines += [f"{name}: {value}" for name, value in headers]
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a header of a reply holds a line end")
    return f"{text}\r\n".encode("utf-8", "surrogateescape")


@lru_cache(maxsize=2)
def _date(whole_s: int) -> bytes:
    return f"Date: {formatdate(whole_s, usegmt=True)}\r\n".encode()
