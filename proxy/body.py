"""A client's body on its way to an upstream, piece by piece, none of it kept.

What is wrong with it is the client's fault and is kept apart from what becomes of the
upstream's request for it: else a client could have endpoints taken for sick.
"""

from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from proxy.errors import ClientFault, InvalidRequest, PayloadTooLarge, RequestTimeout


def too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"request body exceeds {limit_bytes} bytes"
        " (limits.bodyBytes in the configuration)"
    )


def too_slow() -> RequestTimeout:
    return RequestTimeout("the request's body did not come in time")


def undecodable() -> InvalidRequest:
    return InvalidRequest(
        "could not decode request body: it is not framed or compressed as its headers say"
    )


class Body:
    """Args: limit_bytes: how long it may be, unpacked if it is compressed.

    ``fault`` is what was wrong with it so far; ``is_awaited`` while the client has to
    send more.
    """

    def __init__(self, request: web.BaseRequest, limit_bytes: int) -> None:
        self.fault: ClientFault | None = None
        self.is_awaited = False
        self._content = request.content
        self._limit_bytes = limit_bytes

    async def pieces(self) -> AsyncIterator[bytes]:
        """Raises: ClientFault: ``fault``."""
        left = self._limit_bytes
        while data := await self._read():
            left -= len(data)
            if left < 0:
                self.fault = too_large(self._limit_bytes)
                raise self.fault
            yield data

    async def _read(self) -> bytes:
        self.is_awaited = True
        try:
            data = await self._content.readany()
        except (web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
            self.fault = undecodable()
            raise self.fault from error
        self.is_awaited = False
        return data
