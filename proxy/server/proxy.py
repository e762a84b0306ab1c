"""The server edge: takes requests in, and says who is to answer them."""

import asyncio
import re
from typing import cast

from aiohttp import web
from aiohttp.http import RawRequestMessage
from yarl import URL

from proxy import __version__, heads, routes
from proxy.dialects.base import Head, Reply
from proxy.outcome import Outcome, new_id
from proxy.response import Response
from proxy.server.handling import Client
from proxy.server.page import PageRequest
from proxy.server.request import AnyResponse, Request, response_to
from proxy.server.service import Service
from proxy.server.target import Known, Target, limit_of, passing
from proxy.server.visit import Visit

_NO_PATH = Reply(400, "text/plain; charset=utf-8", b"the request names no path\n")
_HEALTHY = Reply(200, "text/plain; charset=utf-8", __version__.encode())
_STOPPING = Reply(503, "text/plain; charset=utf-8", b"shutting down\n")
# First lines of requests that are remembered with what they come to.
_MAX_TARGETS = 1024
_MAX_KEPT_CHARS = 512

_DUPLICATE_SLASHES = re.compile(r"/{2,}")


class Proxy(Service):
    """Answers every request: ``handle`` is the handler of the low-level server, ``meet``
    and ``visit`` are for requests that come whole.
    """

    def meet(self, head: heads.Head, message: RawRequestMessage) -> Known | None:
        """Look at a head for the first time: return what a visit has to know of it.

        None if there cannot be one: something is unusual about it, or wrong.
        """
        raw_path = message.path
        if (
            self.is_stopping
            or message.method != "POST"
            or not heads.is_repeatable(head, raw_path, message.raw_headers)
        ):
            return None
        target = self.targets.get(raw_path) or self._target(raw_path, message.url)
        if not target.is_exchange or target.path == routes.INVOCATIONS:
            return None
        headers = message.headers
        asked = Head(message.method, target.path, target.query, headers)
        try:
            user, refusal = self.vouch(asked, target.incoming)
            target.incoming.check(asked)
        except Exception:  # the usual way will come to it, too, and say so
            return None
        if refusal is not None:
            return None
        more = b"" if self.origins is None else self.origins.lines(headers)
        if len(self.known) >= heads.MOST:
            self.known.clear()
        known = self.known[head] = Known(target, asked, user, more, limit_of(asked))
        return known

    def visit(self, client: Client, known: Known, body: bytes) -> Visit | None:
        """Answer a request that is whole, and the rest of which is known."""
        if self.is_stopping:  # it has to be said that the connection closes
            return None
        id, target = new_id(), known.target
        response = Response(client, id)
        response.more = known.more
        outcome = Outcome(
            id=id,
            route=target.path,
            api_version=target.api_version,
            client=target.client,
            user=known.user,
        )
        visit = Visit(
            self, client, target, known.head, known.limit_s, response, outcome
        )
        return visit if visit.begin(body) else None

    async def handle(self, request: web.BaseRequest) -> AnyResponse:
        """Answer one request, whatever happens, and write its log line."""
        client = cast(Client, request.protocol)
        raw_path = request.raw_path
        target = self.targets.get(raw_path) or self._target(raw_path, request.rel_url)
        reply = target.reply
        if reply is _HEALTHY and self.is_stopping:
            reply = _STOPPING
        if self.origins is not None and reply is None:
            reply = self.origins.preflight(request.method, request.headers)
        if reply is not None:
            response = response_to(self, client, request)
            response.reply(reply)
            return response
        is_exchange = target.is_exchange and (
            target.path != "/" or request.method == "POST"
        )
        handling = (Request if is_exchange else PageRequest)(
            self, client, request, target
        )
        outcome = handling.outcome
        try:
            answered = await handling.run()
            outcome.status = answered.status
            return answered
        except asyncio.CancelledError:
            outcome.kind = "client_gone"
            raise
        except ConnectionError:
            if outcome.kind in ("", "ok"):
                outcome.kind = "client_gone"
            return Response(client, keep_alive=False)  # reaches nobody
        finally:
            self.ended(
                outcome,
                handling.started_s,
                self.loop.time(),
                is_logged=handling.is_logged,
            )

    def _target(self, raw_path: str, url: URL) -> Target:
        """Say what a request's first line asks for; clients ask for few things."""
        path = _DUPLICATE_SLASHES.sub("/", url.path)
        query = url.query
        client = f"{query.get('client-name', '')}/{query.get('client-version', '')}"
        reply = None
        if not path.startswith("/"):  # "*", or a whole URL without a path
            reply = _NO_PATH
        elif path in ("/healthz", "/-/healthz", "/-/__version"):
            reply = _HEALTHY
        incoming = self.incoming.get(path) or routes.errors_at(path)
        target = Target(
            path,
            incoming,
            passing(incoming),
            path in self.incoming,
            query,
            query.get("api-version", "")[:8],
            client.strip("/")[:64],
            reply,
        )
        if len(raw_path) <= _MAX_KEPT_CHARS:
            if len(self.targets) >= _MAX_TARGETS:
                self.targets.clear()
            self.targets[raw_path] = target
        return target
