"""The client edge: sends one call to an endpoint and gives back what comes.

Every failure of the way there becomes one of our errors here. Redirects are not
followed, cookies not kept; no host but the URL's is ever connected to.
"""

import asyncio
import ipaddress
import socket
import ssl
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from functools import lru_cache, partial
from types import TracebackType
from typing import TypeAlias

import aiohappyeyeballs
import msgspec
import yarl

from proxy.egress import Egress
from proxy.errors import (
    ConnectTimeout,
    ProxyError,
    UpstreamFault,
    UpstreamGarbled,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.outbox import Outbox
from proxy.tls import UpstreamTls, distrust, upstream_context
from proxy.upstream.connection import BadReply, Connection, ConnectionFailed
from proxy.upstream.tunnel import TunnelFailed, open_tunnel

Body: TypeAlias = bytes | AsyncIterator[bytes] | None

# How long a connection may lie idle, if the server names no shorter time; and how much
# shorter than that it is taken for: a request is on its way for a while, too.
CONNECT_S = 10.0
IDLE_S = 30.0
IDLE_MARGIN_S = 1.0
# Between the attempts for the addresses of one name (RFC 8305, section 8).
HAPPY_EYEBALLS_S = 0.25
# Most that is unpacked at a time: a small reply may stand for a very large one.
UNPACKED_BYTES = 128 * 1024
MAX_GET_BYTES = 4 * 1024 * 1024

_TRUNCATED = "upstream connection broke before the end of the reply"


class _Target(msgspec.Struct, frozen=True):
    """What a URL says about a connection and a request on it."""

    scheme: str
    host: str
    port: int
    host_header: str
    path: str
    basic: str
    key: tuple[str, str, int]  # of the connections that can be used


@lru_cache(maxsize=1024)
def _target(text: str) -> _Target:
    url = yarl.URL(text, encoded=True)
    host, port = url.raw_host or "", url.port or 0
    shown = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}[url.scheme]
    basic = ""
    if url.user is not None:
        basic = b64encode(f"{url.user}:{url.password or ''}".encode()).decode()
    return _Target(
        url.scheme,
        host,
        port,
        shown if port == default else f"{shown}:{port}",
        url.raw_path_qs or "/",
        basic,
        (url.scheme, host, port),
    )


class UpstreamReply:
    """Status and headers of a reply, and its body: by ``read``, or by ``take`` whenever
    the function given to ``listen`` is called.
    """

    def __init__(self, connection: Connection, *, unpack: bool) -> None:
        self._connection = connection
        self.status = connection.status
        self._unpacker: _Unpacker | None = None
        if unpack and "content-encoding" in connection.headers:
            self._unpacker = _unpacker(self.header("content-encoding").lower())

    def take(self) -> bytes:
        """Return what has arrived, b"" if that is nothing.

        Raises: UpstreamGarbled: it cannot be unpacked.
        """
        if self._unpacker is None:
            return self._connection.take()
        return _unpack(self._connection, self._unpacker)

    def header(self, name: str) -> str:
        """Return the first header of that name (lower case), "" if there is none."""
        value = self._connection.headers.get(name)
        return value.decode("latin-1") if value is not None else ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All headers, as they came."""
        return [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self._connection.pairs
        ]

    def named(self, are_wanted: Callable[[str], bool]) -> dict[str, str]:
        """Return the headers whose names (lower case) are wanted."""
        return {
            name: value.decode("latin-1")
            for name, value in self._connection.headers.items()
            if are_wanted(name)
        }

    async def read(self) -> bytes:
        """Return what has arrived, at least one byte; b"" at the end.

        Raises: UpstreamTruncated: the connection broke before the end.
                UpstreamGarbled: it is not what its headers say.
        """
        while not (data := self.take()):
            if self.is_complete():
                return b""
            if (failure := self.failure) is not None:
                raise failure
            try:
                await self._connection.arrival()
            except (ConnectionFailed, BadReply) as error:
                raise _broken(error) from error
        return data

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have ``listener`` called whenever something has arrived, or ended it; None to
        go on with ``read``.
        """
        self._connection.listener = listener

    @property
    def has_more(self) -> bool:
        """Something can be taken at once."""
        return self._unpacker is not None and self._unpacker.has_more

    def is_going_on(self) -> bool:
        """All that is here was taken, and no end is in sight: the usual case."""
        return self._unpacker is None and self._connection.is_ending

    def is_complete(self) -> bool:
        """All has been taken, and it is whole."""
        unpacker, is_over = self._unpacker, self._connection.is_complete()
        if unpacker is None:
            return is_over
        return is_over and unpacker.is_whole and not unpacker.has_more

    @property
    def failure(self) -> UpstreamFault | None:
        """Why nothing will follow what can be taken."""
        error = self._connection.error
        if error is not None:
            return _broken(error)
        unpacker = self._unpacker
        if unpacker is None or unpacker.is_whole or unpacker.has_more:
            return None
        # The end of the reply may be there, but not of what was packed in it.
        is_over = self._connection.is_complete()
        return UpstreamTruncated(_TRUNCATED) if is_over else None

    def pause(self) -> None:
        """Let the upstream wait."""
        self._connection.pause()

    def resume(self) -> None:
        self._connection.resume()


def _broken(error: Exception) -> UpstreamFault:
    if isinstance(error, ConnectionFailed):
        return UpstreamTruncated(_TRUNCATED)
    return UpstreamGarbled("upstream sent a body that is broken")


class _Unpacker:
    """Undoes gzip or deflate a little at a time, several members in a row as well."""

    def __init__(self) -> None:
        self._wbits = zlib.MAX_WBITS | 32  # gzip or zlib, whichever it is
        self._inflate = zlib.decompressobj(self._wbits)
        self._packed = b""
        self._is_begun = False

    @property
    def is_whole(self) -> bool:
        return self._inflate.eof or not self._is_begun

    @property
    def has_more(self) -> bool:
        return bool(self._packed)

    def give(self, data: bytes) -> None:
        self._packed += data

    def take(self) -> bytes:
        """Return some of what can be unpacked, b"" if more has to be given."""
        while self._packed:
            if self._inflate.eof:
                self._inflate = zlib.decompressobj(self._wbits)
            try:
                unpacked = self._inflate.decompress(self._packed, UNPACKED_BYTES)
            except zlib.error:
                if self._is_begun:
                    raise
                # "deflate" without its wrapper, as some servers send it.
                self._wbits = -zlib.MAX_WBITS
                self._inflate = zlib.decompressobj(self._wbits)
                unpacked = self._inflate.decompress(self._packed, UNPACKED_BYTES)
            self._is_begun = True
            self._packed = self._inflate.unconsumed_tail or self._inflate.unused_data
            if unpacked:
                return unpacked
        return b""


def _unpack(connection: Connection, unpacker: _Unpacker) -> bytes:
    """Return some of what has arrived, unpacked; b"" if that is nothing."""
    try:
        # A little at a time: what is packed may be a thousand times as large.
        while not (data := unpacker.take()):
            if not (packed := connection.take()):
                return b""
            unpacker.give(packed)
        return data
    except zlib.error as error:
        raise _broken(error) from error


def _unpacker(encoding: str) -> _Unpacker | None:
    """Raises: UpstreamGarbled: identity was asked for, and this is neither that nor
    one of the two encodings that everybody knows.
    """
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return _Unpacker()
    raise UpstreamGarbled(
        f'upstream sent content encoding "{encoding[:40]}", though none was asked for'
    )


class Upstream:
    """All connections to upstreams, kept alive between calls.

    Args: tls: how servers are verified; None: by the system's authorities.
          egress: the HTTP proxies to go through; None: directly.
          outbox: for small writes; each loop needs one only.
    Raises: BadFile: one of ``tls``.
    """

    def __init__(
        self,
        tls: UpstreamTls | None = None,
        egress: Egress | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        self._tls_settings = tls
        self._egress = egress
        self._others: dict[tuple[UpstreamTls | None, Egress | None], Upstream] = {}
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}
        # The system's authorities take some milliseconds, so only where needed.
        self._tls = None if tls is None else upstream_context(tls)
        # Asked for once: CPython 3.11 makes a system call for each answer.
        self._loop = asyncio.get_running_loop()
        self.outbox = outbox or Outbox(self._loop)
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_closed = False

    def apart(self, tls: UpstreamTls | None, egress: Egress | None) -> "Upstream":
        """Return the connections made in another way; they are closed with these.

        A connection must not serve a provider that would not have trusted it.
        Raises: BadFile.
        """
        if (tls, egress) == (self._tls_settings, self._egress):
            return self
        if (tls, egress) not in self._others:
            self._others[tls, egress] = Upstream(tls, egress, self.outbox)
        return self._others[tls, egress]

    @property
    def idle(self) -> int:
        """How many connections are kept for the next call."""
        return sum(map(len, self._idle.values()))

    async def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        self._is_closed = True
        for other in self._others.values():
            await other.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # the transports say goodbye

    def open(
        self,
        url: str,
        headers: Mapping[str, str],
        body: Body,
        endpoint: str,
        *,  # compiled, the first ones are told by their places: those most calls give
        connect_s: float = CONNECT_S,
        prepared: "Prepared | None" = None,
        method: str = "POST",
        unpack: bool = True,
    ) -> "UpstreamCall":
        """Send a request, in an ``async with``; it gives the reply once its head is in.

        Leaving the context before the end of the reply closes the connection.

        Args:   endpoint: what error messages call it; a URL may hold secrets.
                connect_s: how long a new connection may take.
                prepared: what ``prepare`` made of the URL and the headers.
                unpack: undo a content encoding of the reply.
        Raises: UpstreamUnreachable: no connection, or none that lasted so far.
        """
        target = prepared.target if prepared is not None else _target(url)
        return UpstreamCall(
            self,
            target,
            headers,
            body,
            endpoint,
            method,
            unpack,
            connect_s,
            prepared.head if prepared is not None else b"",
        )

    async def get(self, url: str, headers: Mapping[str, str], endpoint: str) -> bytes:
        """Return the body of a reply of status 200, b"" for any other.

        Raises: UpstreamFault: there was no whole reply.
        """
        body = b""
        async with self.open(url, headers, None, endpoint, method="GET") as reply:
            while reply.status == 200 and (data := await reply.read()):
                body += data
                if len(body) > MAX_GET_BYTES:
                    raise UpstreamGarbled("upstream reply is too long")
        return body

    def take_idle(self, target: _Target) -> Connection | None:
        connections = self._idle.get(target.key)
        now_s = self._loop.time()
        while connections:
            connection: Connection = connections.pop()
            if connection.is_open and now_s < connection.idle_until_s:
                return connection
            connection.abort()
        return None

    def give_back(self, target: _Target, connection: Connection) -> None:
        """Keep a connection for the next call, if another may follow on it."""
        if self._is_closed or not connection.is_reusable():
            connection.abort()
            return
        connection.release()
        given = connection.keep_alive_s
        idle_s = IDLE_S if given is None else min(given - IDLE_MARGIN_S, IDLE_S)
        connection.idle_until_s = self._loop.time() + idle_s
        if (connections := self._idle.get(target.key)) is None:
            connections = self._idle[target.key] = []
        connections.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(IDLE_S, self._sweep)

    def _sweep(self) -> None:
        """Close what nobody has asked for: the last one in is the first one out, so
        the first ones in would lie there for ever.
        """
        self._sweeper = None
        now_s = self._loop.time()
        for key, connections in list(self._idle.items()):
            kept = []
            for connection in connections:
                if connection.is_open and now_s < connection.idle_until_s:
                    kept.append(connection)
                else:
                    connection.abort()
            self._idle[key] = kept
            if not kept:
                del self._idle[key]
        if self._idle:
            self._sweeper = self._loop.call_later(IDLE_S, self._sweep)

    async def connect(self, target: _Target, connect_s: float) -> Connection:
        """Raises: OSError, TimeoutError, UnicodeError: of a name that is none."""
        loop = self._loop
        async with asyncio.timeout(connect_s):
            raw = await self._connect_socket(target)
            try:
                tls = self._context() if target.scheme == "https" else None
                _, connection = await loop.create_connection(
                    partial(Connection, self.outbox),
                    sock=raw,
                    ssl=tls,
                    server_hostname=target.host if tls else None,
                )
            except BaseException:
                raw.close()
                raise
        return connection

    async def _connect_socket(self, target: _Target) -> socket.socket:
        """Return a socket at whose other end the target is, through a proxy or not."""
        if self._egress is None:
            return await self._dial(target)
        where = (target.scheme, target.host, target.port)
        if not (url := self._egress.proxy_for(*where)):
            return await self._dial(target)
        proxy = _target(url)
        try:
            raw = await self._dial(proxy)
        except (OSError, UnicodeError) as error:
            raise TunnelFailed("cannot be reached") from error
        try:
            await open_tunnel(raw, target.host, target.port, proxy.basic)
        except BaseException:
            raw.close()
            raise
        return raw

    async def _dial(self, target: _Target) -> socket.socket:
        return await aiohappyeyeballs.start_connection(
            await _resolve(target),
            happy_eyeballs_delay=HAPPY_EYEBALLS_S,
            interleave=1,
            loop=self._loop,
        )

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = upstream_context(None)
        return self._tls


async def _resolve(target: _Target) -> list[aiohappyeyeballs.AddrInfoType]:
    host, port = target.host, target.port
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        loop = asyncio.get_running_loop()
        return list(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    # No look-up: that would take a thread.
    if ip.version == 6:
        address: tuple[str, int] | tuple[str, int, int, int] = (host, port, 0, 0)
        return [(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]
    address = (host, port)
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]


class UpstreamCall:
    """One request and its reply, for the time of an ``async with``, or from ``start`` to
    ``finish`` or ``drop``.
    """

    def __init__(
        self,
        upstream: Upstream,
        target: _Target,
        headers: Mapping[str, str],
        body: Body,
        endpoint: str,
        method: str,
        unpack: bool,
        connect_s: float,
        head: bytes,
    ) -> None:
        self._upstream = upstream
        self._target = target
        self._headers = headers
        self._body = body
        self._endpoint = endpoint
        self._method = method
        self._unpack = unpack
        self._connect_s = connect_s
        self._first_lines = head
        self._connection: Connection | None = None

    async def __aenter__(self) -> UpstreamReply:
        return await self.start()

    def start_now(self, listener: Callable[[], None]) -> bool:
        """Ask on a connection that is open already; False: there is none.

        ``listener`` is called until ``reply`` says something, or ``is_failed``. Then
        ``finish`` or ``drop`` must follow, or ``start``, which goes on with what was
        begun.
        """
        connection = self._upstream.take_idle(self._target)
        if connection is None:
            return False
        self._connection = connection
        self._send(connection)
        connection.listener = listener
        return True

    def reply(self) -> UpstreamReply | None:
        """The reply if its head is in. Raises: UpstreamGarbled: see its headers."""
        connection = self._connection
        if connection is None or not connection.is_head_in:
            return None
        return UpstreamReply(connection, unpack=self._unpack)

    @property
    def is_failed(self) -> bool:
        """The connection that was begun with is of no more use."""
        return self._connection is None or self._connection.error is not None

    async def start(self) -> UpstreamReply:
        """Wait for the head of the reply. Then ``finish`` or ``drop`` must follow."""
        try:
            connection = self._connection
            if connection is not None:  # asked on by ``start_now``
                connection.listener = None
            elif connection := self._upstream.take_idle(self._target):
                self._connection = connection
                self._send(connection)
            if connection is not None:
                try:
                    while not connection.is_head_in:
                        await connection.arrival()
                    return UpstreamReply(connection, unpack=self._unpack)
                except ConnectionFailed as error:
                    # The server was closing it (llama.cpp does, whatever it promised);
                    # so it has not looked at the request, which may go out once more.
                    if connection.has_received or self._is_streamed:
                        raise self._unreachable(error) from error
                self.drop()
            connection = await self._upstream.connect(self._target, self._connect_s)
            self._connection = connection
            self._send(connection)
            while not connection.is_head_in:
                await connection.arrival()
            return UpstreamReply(connection, unpack=self._unpack)
        except (OSError, TimeoutError, UnicodeError, ConnectionFailed, BadReply) as e:
            self.drop()
            raise self._unreachable(e) from e
        except BaseException:
            self.drop()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.drop()

    def finish(self) -> None:
        """Nothing more is wanted of the reply."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.is_ending:
            connection.linger(
                partial(self._upstream.give_back, self._target, connection)
            )
        else:
            self._upstream.give_back(self._target, connection)

    def drop(self) -> None:
        """Close the connection, unless the reply was over."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._upstream.give_back(self._target, connection)

    @property
    def _is_streamed(self) -> bool:
        return not isinstance(self._body, bytes | None)

    def _send(self, connection: Connection) -> None:
        body = self._body
        if self._first_lines and isinstance(body, bytes):
            connection.send(
                b"%bContent-Length: %d\r\n\r\n%b" % (self._first_lines, len(body), body)
            )
            return
        head = self._head()
        bodiless = self._method == "HEAD"
        if isinstance(body, bytes | None):
            connection.send(head + (body or b""), bodiless=bodiless)
            return
        given = self._headers.get("Content-Length")
        connection.send_stream(
            head,
            body,
            length=None if given is None else int(given),
            bodiless=bodiless,
        )

    def _head(self) -> bytes:
        target, body, headers = self._target, self._body, self._headers
        head = _encoded_head(target, self._method, *headers.items())
        if isinstance(body, bytes):
            return b"%bContent-Length: %d\r\n\r\n" % (head, len(body))
        if body is not None and "Content-Length" not in headers:
            return b"%bTransfer-Encoding: chunked\r\n\r\n" % head
        return head + b"\r\n"

    def _unreachable(self, error: Exception) -> ProxyError:
        kind = (
            ConnectTimeout if isinstance(error, TimeoutError) else UpstreamUnreachable
        )
        return kind(f"upstream {self._endpoint}: {_reason(error)}")


class Prepared(msgspec.Struct, frozen=True):
    """The beginning of requests that differ only in their bodies."""

    url: str
    headers: Mapping[str, str]
    target: _Target
    head: bytes

    def is_of(self, url: str, headers: Mapping[str, str]) -> bool:
        return url == self.url and (headers is self.headers or headers == self.headers)


def prepare(url: str, headers: Mapping[str, str]) -> Prepared:
    """Raises: UpstreamUnreachable: there can be no such request."""
    target = _target(url)
    head = _encoded_head(target, "POST", *headers.items())
    return Prepared(url, headers, target, head)


# The same for one request after the other.
@lru_cache(maxsize=256)
def _encoded_head(target: _Target, method: str, *headers: tuple[str, str]) -> bytes:
    lines = [f"{method} {target.path} HTTP/1.1", f"Host: {target.host_header}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if target.basic and all(name.lower() != "authorization" for name, _ in headers):
        lines.append(f"Authorization: Basic {target.basic}")
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or "\0" in text:
        raise UpstreamUnreachable("a header for the upstream holds a line end")
    if lines[0].count(" ") != 2 or not target.path.isprintable():
        raise UpstreamUnreachable("the upstream's URL holds blanks")
    return f"{text}\r\n".encode("utf-8", "surrogateescape")


# The first that fits counts.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ssl.SSLError, "TLS handshake failed"),
    (socket.gaierror, "host name cannot be resolved"),
    (UnicodeError, "host name cannot be resolved"),
    (TimeoutError, "connect timed out"),
    (ConnectionRefusedError, "connection refused"),
    (ConnectionFailed, "connection closed before a reply"),
    (ConnectionResetError, "connection closed before a reply"),
    (BadReply, "sent something that is not HTTP"),
)


def _reason(error: Exception) -> str:
    """Why, in words that name neither an address nor a key."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return distrust(error)
    if isinstance(error, TunnelFailed):
        return f"the HTTP proxy on the way {error}"
    for kind, words in _REASONS:
        if isinstance(error, kind):
            return words
    return "connection failed"
