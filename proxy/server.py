"""The server edge: takes a request, answers it, and writes down how that went.

What to say is decided elsewhere; here are the order of the checks, the rendering of
errors, and the low-level server itself.
"""

import asyncio
import logging
import os
import random
import re
from collections.abc import Mapping

import aiohttp
from aiohttp import web

from proxy import __version__
from proxy.auth import Access
from proxy.completion import CompletionRequest, Usage
from proxy.config import Settings
from proxy.dialects import cody
from proxy.dialects.base import Head, Incoming, Reply, Writer
from proxy.errors import InvalidRequest, PayloadTooLarge, ProxyError
from proxy.log import ExchangeLog
from proxy.outcome import Outcome
from proxy.providers import PROVIDERS
from proxy.redact import Redactor
from proxy.relay import SERVER, Relay, own_headers
from proxy.upstream import Upstream

logger = logging.getLogger(__name__)

_DUPLICATE_SLASHES = re.compile(r"/{2,}")


class Proxy:
    """Answers every request: ``handle`` is the handler of the low-level server."""

    def __init__(
        self, settings: Settings, upstream: Upstream, log: ExchangeLog, redact: Redactor
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.log = log
        self.redact = redact
        self.models = settings.models
        self.access = Access(settings.tokens, open=settings.open)
        self.providers = {
            provider.id: PROVIDERS[provider.type](provider)
            for provider in settings.models.providers.values()
        }
        check = settings.client_version_check
        self._incoming: dict[str, Incoming] = {
            "/.api/completions/stream": cody.Completions("chat", check_client=check),
            "/.api/completions/code": cody.Completions("code", check_client=check),
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever happens, and write its log line."""
        path = _DUPLICATE_SLASHES.sub("/", request.path)
        incoming = self._incoming.get(path)
        if incoming is None:
            return await _send(request, _other(path), {"Server": SERVER})
        outcome = Outcome(id=f"{random.getrandbits(64):016x}", route=path)
        handling = _Handling(self, request, incoming, outcome)
        try:
            response = await handling.run(path)
            outcome.status = response.status
            return response
        except asyncio.CancelledError:
            outcome.kind = "client_gone"
            raise
        except ConnectionError:
            outcome.kind = "client_gone"
            return web.Response(status=499)  # reaches nobody
        finally:
            outcome.duration_s = handling.elapsed_s()
            self.log.outcome(outcome)


class _Handling:
    """One request on its way; lives for as long as it is answered."""

    def __init__(
        self,
        proxy: Proxy,
        request: web.BaseRequest,
        incoming: Incoming,
        outcome: Outcome,
    ) -> None:
        self._proxy = proxy
        self._request = request
        self._incoming = incoming
        self._outcome = outcome
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()

    def elapsed_s(self) -> float:
        return round(self._loop.time() - self._started_s, 4)

    async def run(self, path: str) -> web.StreamResponse:
        """Raises: ConnectionError: the client is gone."""
        say = self._incoming.error_reply
        try:
            head = self._head(path)
            self._check(head)
            body = await self._read_body()
            completion, writer = self._incoming.parse(head, body)
            say = writer.error_reply
            return await self._complete(head, completion, writer)
        except ProxyError as error:
            return await self._send_error(say(self._noted(error)))
        except ConnectionError:
            raise
        except Exception:
            return await self._send_error(say(self._noted(self._bug())))

    def _head(self, path: str) -> Head:
        request, outcome = self._request, self._outcome
        query = request.query
        outcome.api_version = query.get("api-version", "")[:8]
        client = f"{query.get('client-name', '')}/{query.get('client-version', '')}"
        outcome.client = client.strip("/")[:64]
        return Head(request.method, path, query, request.headers)

    def _check(self, head: Head) -> None:
        """Refuse what needs no look at the body, in the order clients know."""
        self._incoming.check_method(head)
        token = self._proxy.access.check(head.headers.get("Authorization"))
        if token is not None:
            self._outcome.user = token.name
        self._incoming.check(head)

    async def _read_body(self) -> bytes:
        limit = self._proxy.settings.limits.body_bytes
        if (self._request.content_length or 0) > limit:
            raise _too_large(limit)
        self._continue()
        try:
            return await self._request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(limit) from None
        except (web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
            raise InvalidRequest(
                "could not decode request body: it is not framed or compressed as "
                "its headers say"
            ) from error

    def _continue(self) -> None:
        # web.Application would do this; the low-level server leaves it to us. curl
        # waits a second for it before it sends a longer body.
        expect = self._request.headers.get("Expect", "").lower()
        transport = self._request.transport
        if expect == "100-continue" and transport is not None:
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _complete(
        self, head: Head, completion: CompletionRequest, writer: Writer
    ) -> web.StreamResponse:
        proxy, outcome = self._proxy, self._outcome
        outcome.feature, outcome.stream = completion.feature, completion.stream
        completion.user = outcome.user
        model = proxy.models.choose(
            completion.feature, completion.model, completion.fast
        )
        settings = proxy.models.providers[model.provider_id]
        provider = proxy.providers[settings.id]
        endpoint = random.choice(settings.endpoints)
        outcome.model, outcome.provider = model.ref, settings.id
        outcome.endpoint = endpoint.name
        call = provider.call(completion, model, endpoint)
        relay = Relay(
            self._request,
            completion,
            writer,
            call,
            outcome,
            source=provider.source,
            event_bytes=proxy.settings.limits.event_bytes,
            redact=proxy.redact,
            log=proxy.log,
            verbose=settings.verbose_logs,
        )
        timeout_s = self._timeout_s(head, completion)
        try:
            return await relay.run(proxy.upstream, self._started_s, timeout_s)
        finally:
            self._count(call.reader.usage)

    def _timeout_s(self, head: Head, completion: CompletionRequest) -> float:
        text = head.headers.get("X-Timeout-Ms", "").strip()
        if text.isascii() and text.isdigit() and int(text[:9]) > 0:
            return int(text[:9]) / 1000
        timeouts = self._proxy.settings.timeouts
        return timeouts.chat_s if completion.feature == "chat" else timeouts.code_s

    def _count(self, usage: Usage | None) -> None:
        if usage is not None:
            self._outcome.prompt_tokens = usage.prompt_tokens
            self._outcome.completion_tokens = usage.completion_tokens

    async def _send_error(self, reply: Reply) -> web.StreamResponse:
        return await _send(self._request, reply, own_headers(self._outcome.id))

    def _noted(self, error: ProxyError) -> ProxyError:
        self._outcome.kind = error.kind
        self._outcome.error = error.log_text
        error.message = self._proxy.redact(error.message)
        return error

    def _bug(self) -> ProxyError:
        logger.exception("exchange %s: this is a bug", self._outcome.id)
        return ProxyError(f"internal error of the proxy, logged as {self._outcome.id}")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"request body exceeds {limit} bytes (limits.bodyBytes in the configuration)"
    )


def _other(path: str) -> Reply:
    """What is answered without an exchange."""
    if path == "/healthz":
        return Reply(200, "text/plain; charset=utf-8", __version__.encode())
    return cody.plain_error(404, f"nothing is served at {path}", {})


async def _send(
    request: web.BaseRequest, reply: Reply, own: Mapping[str, str]
) -> web.Response:
    headers = {**reply.headers, **own, "Content-Type": reply.content_type}
    response = web.Response(status=reply.status, body=reply.body, headers=headers)
    await response.prepare(request)
    await response.write_eof()
    return response


class Listener:
    """The low-level server on its sockets.

    ``start`` takes all addresses or none; ``stop`` lets open replies go on for
    ``grace_s`` and then closes them.
    """

    def __init__(self, proxy: Proxy, grace_s: float = 10.0) -> None:
        self._proxy = proxy
        server = web.Server(
            proxy.handle,
            request_factory=self._request,
            # Without this a client's hang-up is noticed only at the next write.
            handler_cancellation=True,
            access_log=None,
        )
        self._runner = web.ServerRunner(
            server, shutdown_timeout=grace_s, access_log=None
        )

    def _request(self, message, payload, protocol, writer, task):  # type: ignore[no-untyped-def]  # aiohttp gives the factory's arguments no public types
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            self._loop,
            # The server's own limit is 1 MiB, less than one image.
            client_max_size=self._proxy.settings.limits.body_bytes,
        )

    async def start(self) -> list[tuple[str, int]]:
        """Return the addresses that are listened on.

        Raises: OSError: one of them cannot be had.
        """
        self._loop = asyncio.get_running_loop()
        await self._runner.setup()
        for host, port in self._proxy.settings.listen:
            try:
                await web.TCPSite(self._runner, host, port, backlog=1024).start()
            except OSError as error:
                number = error.errno or 0
                reason = os.strerror(number).lower() if number > 0 else str(error)
                raise OSError(
                    number, f"cannot listen on {host}:{port}: {reason}"
                ) from error
        return [address[:2] for address in self._runner.addresses]

    async def stop(self) -> None:
        await self._runner.cleanup()
