"""An HTTP/1.1 client that hides nothing: reads, framing and ends as they came.

``request`` sends one request and reads the whole reply; ``stream`` hands out the reply
while it arrives; ``RawConnection`` sends whatever bytes a test likes.
"""

import asyncio
import contextlib
import json as jsonlib
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from tests.support.upstream import HeadersLike, Pairs, chunk, find_header, pairs_of

Framing: TypeAlias = Literal["chunked", "length", "close"]

PIECE = 1024  # of a chunked request body


class Truncated(AssertionError):
    """The connection ended before the body did; ``reply`` is what came."""

    def __init__(self, reply: "RawReply") -> None:
        super().__init__(f"truncated after {reply.body[-200:]!r}")
        self.reply = reply


@dataclass
class RawReply:
    """A reply, and how it came.

    ``reads`` are the bytes of the body as they arrived and when, in seconds since the
    request was sent: the chunks of a chunked body, else the reads of the socket.
    ``complete`` says whether the body ended as its framing promises.
    """

    status: int
    reason: str
    headers: Pairs
    framing: Framing
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False
    url: str = ""

    def header(self, name: str) -> str | None:
        return find_header(self.headers, name)

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.reads)

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return jsonlib.loads(self.body)


class RawConnection:
    """One connection to a server: send anything, read replies one after the other."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, url: str, receive_buffer: int | None = None) -> Self:
        """Connect; a small ``receive_buffer`` makes a client that is slow to read."""
        parts = urlsplit(url)
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        raw.setblocking(False)
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(raw, (parts.hostname, parts.port))
        except BaseException:
            raw.close()
            raise
        limit = 2**20 if receive_buffer is None else 2**14
        return cls(*await asyncio.open_connection(sock=raw, limit=limit))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def reply(self, within_s: float = 5.0, *, bodiless: bool = False) -> RawReply:
        """Read one whole reply; its end may be missing, see ``complete``."""
        async with asyncio.timeout(within_s):
            stream = await self.head(bodiless=bodiless)
            await stream.rest()
        return stream.reply

    async def head(self, *, bodiless: bool = False) -> "RawStream":
        """Read the head of a reply; ``bodiless`` if the request was HEAD."""
        sent_at = time.monotonic()
        reply = await self._read_head()
        while reply.status < 200:
            reply = await self._read_head()
        if bodiless or reply.status in (204, 304):
            reply.framing, reply.complete = "length", True
        return RawStream(self, self._reader, reply, sent_at)

    async def _read_head(self) -> RawReply:
        try:
            raw = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as cut:
            got = cut.partial
            raise AssertionError(f"closed before a reply, after {got!r}") from None
        status_line, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        version, status, reason = (status_line + " ").split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), status_line
        headers = [_split_header(line) for line in lines]
        return RawReply(int(status), reason.rstrip(), headers, framing_of(headers))

    async def at_end(self, within_s: float = 1.0) -> bool:
        """Whether the server closes the connection within the time."""
        try:
            async with asyncio.timeout(within_s):
                return await self._reader.read(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    async def close(self) -> None:
        """Hang up: FIN, or RST by the kernel if there is something unread."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def reset(self) -> None:
        """Hang up with RST."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class RawStream:
    """A reply whose body is read piece by piece."""

    def __init__(
        self,
        connection: RawConnection,
        reader: asyncio.StreamReader,
        reply: RawReply,
        sent_at: float,
    ) -> None:
        self.reply = reply
        self._connection = connection
        self._reader = reader
        self._sent_at = sent_at
        length = reply.header("content-length")
        self._left = int(length) if length is not None else 0
        self._ended = reply.complete

    @property
    def status(self) -> int:
        return self.reply.status

    def header(self, name: str) -> str | None:
        return self.reply.header(name)

    async def read(self, within_s: float = 5.0) -> bytes:
        """Return the next chunk, or ``b""`` when there is no more.

        The end may be missing: ``reply.complete`` tells.
        """
        if self._ended:
            return b""
        data = b""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(within_s):
                data = await self._read_piece()
        if data:
            self.reply.reads.append((time.monotonic() - self._sent_at, data))
        else:
            self._ended = True
        return data

    async def read_until(self, mark: bytes, within_s: float = 5.0) -> bytes:
        """Read until the body so far contains ``mark``; return the body so far."""
        while mark not in self.reply.body:
            if not await self.read(within_s):
                raise AssertionError(f"no {mark!r} in {self.reply.body!r}")
        return self.reply.body

    async def rest(self, within_s: float = 5.0) -> bytes:
        """Read to the end; return what came."""
        start = len(self.reply.reads)
        while await self.read(within_s):
            pass
        return b"".join(data for _, data in self.reply.reads[start:])

    async def close(self) -> None:
        await self._connection.close()

    async def reset(self) -> None:
        await self._connection.reset()

    async def _read_piece(self) -> bytes:
        if self.reply.framing == "chunked":
            return await self._read_chunk()
        if self.reply.framing == "length":
            return await self._read_length()
        data = await self._reader.read(2**16)
        self.reply.complete = not data
        return data

    async def _read_chunk(self) -> bytes:
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        if size:
            return await self._read_chunk_data(size)
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass  # a trailer
        self.reply.complete = True
        return b""

    async def _read_chunk_data(self, size: int) -> bytes:
        try:
            data = await self._reader.readexactly(size + 2)
        except asyncio.IncompleteReadError as cut:
            return cut.partial[:size]  # the next read tells that there is no end
        assert data.endswith(b"\r\n"), data
        return data[:-2]

    async def _read_length(self) -> bytes:
        data = await self._reader.read(min(self._left, 2**16)) if self._left else b""
        self._left -= len(data)
        self.reply.complete = self._left == 0
        return data


def framing_of(headers: Pairs) -> Framing:
    coding = find_header(headers, "transfer-encoding")
    length = find_header(headers, "content-length")
    assert coding is None or length is None, "two framings at once"
    if coding is not None:
        assert coding.lower() == "chunked", coding
        return "chunked"
    return "close" if length is None else "length"


def _split_header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    assert colon and name == name.strip(), f"header line {line!r}"
    return name, value.strip(" \t")


def build_request(
    url: str,
    method: str,
    path: str | None,
    headers: HeadersLike,
    body: object,
    chunked: bool,
) -> bytes:
    """The bytes of one request; a ``body`` that is no bytes is sent as JSON."""
    parts = urlsplit(url)
    pairs = pairs_of(headers)
    names = {name.lower() for name, _ in pairs}
    content, usual = _content_of(body)
    if chunked:
        usual.append(("Transfer-Encoding", "chunked"))
        content = _chunks_of(content)
    elif content or method in ("POST", "PUT", "PATCH"):
        usual.append(("Content-Length", str(len(content))))
    usual.insert(0, ("Host", f"{parts.hostname}:{parts.port}"))
    pairs = [pair for pair in usual if pair[0].lower() not in names] + pairs
    target = path or parts.path or "/"
    if path is None and parts.query:
        target += f"?{parts.query}"
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in pairs]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + content


def _content_of(body: object) -> tuple[bytes, Pairs]:
    if body is None:
        return b"", []
    if isinstance(body, bytes):
        return body, []
    return jsonlib.dumps(body).encode(), [("Content-Type", "application/json")]


def _chunks_of(content: bytes) -> bytes:
    pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
    return b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def connect(
    url: str, receive_buffer: int | None = None
) -> AsyncIterator[RawConnection]:
    connection = await RawConnection.open(url, receive_buffer)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def stream(
    url: str,
    method: str = "POST",
    path: str | None = None,
    headers: HeadersLike = (),
    body: object = None,
    chunked: bool = False,
    within_s: float = 5.0,
    receive_buffer: int | None = None,
) -> AsyncIterator[RawStream]:
    """Send one request; hand out the reply as soon as its head is in."""
    async with connect(url, receive_buffer) as connection:
        await connection.send(build_request(url, method, path, headers, body, chunked))
        async with asyncio.timeout(within_s):
            reply = await connection.head(bodiless=method == "HEAD")
        reply.reply.url = url
        yield reply


async def request(
    url: str,
    method: str = "POST",
    path: str | None = None,
    headers: HeadersLike = (),
    body: object = None,
    chunked: bool = False,
    within_s: float = 5.0,
    allow_truncated: bool = False,
) -> RawReply:
    """Send one request, read the whole reply, close.

    Args:
        url: where to connect; its path and query are used unless ``path`` is given.
        body: bytes as they are, or a value to send as JSON.
        allow_truncated: return a reply that was cut instead of raising ``Truncated``.
    """
    async with stream(url, method, path, headers, body, chunked, within_s) as incoming:
        await incoming.rest(within_s)
    reply = incoming.reply
    if not reply.complete and not allow_truncated:
        raise Truncated(reply)
    return reply
