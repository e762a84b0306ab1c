"""A request as aiohttp hands it over, and the task that answers it."""

import asyncio
from typing import TypeAlias

import aiohttp
from aiohttp import web

from proxy import routes
from proxy.body import too_large, too_slow, undecodable
from proxy.dialects.base import Head
from proxy.outcome import Outcome, new_id
from proxy.response import Response
from proxy.server.handling import Client, Handling
from proxy.server.service import Service
from proxy.server.target import Target, limit_of, passing

# aiohttp's, or one of ours.
AnyResponse: TypeAlias = Response | web.StreamResponse


def response_to(
    service: Service, client: Client, request: web.BaseRequest, id: str = ""
) -> Response:
    response = Response(
        client,
        id,
        keep_alive=request.keep_alive,
        is_http11=request.version == (1, 1),
        is_head=request.method == "HEAD",
    )
    if service.origins is not None:
        response.more = service.origins.lines(request.headers)
    return response


class Request(Handling):
    """A request as aiohttp hands it over, and the task that answers it."""

    def __init__(
        self, service: Service, client: Client, request: web.BaseRequest, target: Target
    ) -> None:
        id = new_id()
        response = response_to(service, client, request, id)
        head = Head(request.method, target.path, target.query, request.headers)
        outcome = Outcome(
            id=id,
            route=target.path,
            api_version=target.api_version,
            client=target.client,
        )
        limit_s = limit_of(head)
        super().__init__(service, client, target, head, limit_s, response, outcome)
        self._say_error = target.incoming.error_reply
        self._request = request

    async def run(self) -> AnyResponse:
        """Raises: ConnectionError: the client is gone."""
        await self._carry_out(self._answer_it())
        return self.response

    async def _answer_it(self) -> None:
        self._check(self._head)
        body = await self._read_body()
        if self._path == routes.INVOCATIONS:
            self._incoming = routes.narrow(self._incoming, body)
            self._passing = passing(self._incoming)
            self._say_error = self._incoming.error_reply
        asked = self._parse(body)
        self._say_error = asked.writer.error_reply
        await self._complete(asked)

    async def _read_body(self) -> bytes:
        request = self._request
        limit = self._service.body_bytes
        if (request.content_length or 0) > limit:
            raise too_large(limit)
        self._continue()
        try:
            if request.content.is_eof():  # all of it came with the head
                body = request.content.read_nowait()
                if len(body) > limit:
                    raise too_large(limit)
                return body
            timeouts = self._service.settings.timeouts
            limit_s = min(self._limit_s or timeouts.chat_s, timeouts.body_s)
            with self._service.interruptible():
                async with asyncio.timeout_at(self.started_s + limit_s):
                    return await request.read()
        except TimeoutError:
            raise too_slow() from None
        except web.HTTPRequestEntityTooLarge:
            raise too_large(limit) from None
        except (web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
            raise undecodable() from error

    def _continue(self) -> None:
        # web.Application would do this; the low-level server leaves it to us. curl
        # waits a second for it before it sends a longer body.
        expect = self._request.headers.get("Expect")
        transport = self._request.transport
        if (
            expect is not None
            and expect.lower() == "100-continue"
            and transport is not None
        ):
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
