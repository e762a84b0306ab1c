"""The client edge: sends one call to an endpoint and reads what comes back.

Every failure of the way there becomes one of our errors here; no exception of
aiohttp's leaves this module.
"""

import asyncio
import contextlib
import errno
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import TypeAlias

import aiohttp
import yarl

from proxy.errors import ProxyError, UpstreamTruncated, UpstreamUnreachable

Body: TypeAlias = bytes | AsyncIterator[bytes] | None

# Longer reads hold the loop for longer; shorter ones cost more calls per megabyte.
_READ_BYTES = 2**15


class UpstreamReply:
    """Status and headers of a reply; its body comes by ``read``."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.pairs = list(response.headers.items())

    async def read(self) -> bytes:
        """Return what has arrived, at least one byte; b"" at the end.

        Raises: UpstreamTruncated: the connection broke before the end.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamTruncated(
                "upstream connection broke before the end of the reply"
            ) from error


class Upstream:
    """All connections to upstreams, kept alive between calls."""

    def __init__(self, connect_s: float) -> None:
        self._session = aiohttp.ClientSession(
            # Time is counted where tokens are; only connecting is counted here.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Content-Type"),
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        await self._session.close()

    @contextlib.asynccontextmanager
    async def open(
        self,
        url: str,
        headers: Mapping[str, str],
        body: Body,
        endpoint: str,
        *,
        method: str = "POST",
        unpack: bool = True,
    ) -> AsyncIterator[UpstreamReply]:
        """Send a request; give its reply as soon as the headers are in.

        Leaving the context before the end of the reply closes the connection.

        Args:   endpoint: what error messages call it; a URL may hold secrets.
                unpack: undo a content encoding of the reply.
        Raises: UpstreamUnreachable: no connection, or none that lasted so far.
        """
        response = await self._send(method, url, headers, body, endpoint, unpack)
        try:
            yield UpstreamReply(response)
        finally:
            # Gives the connection back if the body was read to its end.
            response.close()

    async def get(self, url: str, headers: Mapping[str, str], endpoint: str) -> bytes:
        """Return the body of a reply of status 200, b"" for any other.

        Raises: UpstreamFault: there was no whole reply.
        """
        body = b""
        async with self.open(url, headers, None, endpoint, method="GET") as reply:
            while reply.status == 200 and (data := await reply.read()):
                body += data
        return body

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Body,
        endpoint: str,
        unpack: bool,
    ) -> aiohttp.ClientResponse:
        for attempt in (1, 2):
            try:
                return await self._session.request(
                    method,
                    yarl.URL(url, encoded=True),
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    auto_decompress=unpack,
                )
            except (aiohttp.ClientError, OSError) as error:
                # Some servers promise to keep a connection and close it all the same
                # (llama.cpp): the request met a closing door, so knock once more.
                # A body that is a stream is gone by now.
                spent = not isinstance(body, bytes | None)
                if attempt == 2 or spent or not _is_closed(error):
                    raise _unreachable(error, endpoint) from error
        raise AssertionError("unreachable")


def _unreachable(error: Exception, endpoint: str) -> ProxyError:
    return UpstreamUnreachable(f"upstream {endpoint}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Why, in words that name neither an address nor a key."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "host name cannot be resolved"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return "TLS handshake failed"
    if isinstance(error, aiohttp.ConnectionTimeoutError | asyncio.TimeoutError):
        return "connect timed out"
    if _is_closed(error):
        return "connection closed before a reply"
    if isinstance(error, OSError):
        refused = error.errno == errno.ECONNREFUSED
        return "connection refused" if refused else "connection failed"
    return "sent something that is not HTTP"


def _is_closed(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.EPIPE):
        return True
    return isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError)
