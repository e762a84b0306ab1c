"""The server edge: takes a request, answers it, and writes down how that went.

What to say is decided elsewhere; here are the order of the checks and the rendering of
errors.
"""

import asyncio
import contextlib
import logging
import random
import re
import time
import unicodedata
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TypeAlias, cast
from urllib.parse import unquote

import aiohttp
import msgspec
from aiohttp import web
from msgspec import json, structs

from proxy import __version__, pages, routes
from proxy.admission import Admission, admission
from proxy.auth import NOT_GIVEN, Access, credential
from proxy.body import too_large, too_slow, undecodable
from proxy.completion import CompletionRequest, Feature
from proxy.config import Settings
from proxy.cors import Origins, is_foreign
from proxy.dialects.adjust import (
    ADJUSTED,
    decode_fields,
    encode_fields,
    mend,
    raw,
)
from proxy.dialects.base import (
    JSON,
    Chosen,
    Head,
    Incoming,
    Native as NativeDialect,
    Reply,
    Writer,
    choose,
)
from proxy.dialects.gateway import Window
from proxy.errors import (
    ForeignOrigin,
    InvalidRequest,
    LimitReached,
    MethodNotAllowed,
    ProxyError,
    ShuttingDown,
    Unauthorized,
    UnknownPath,
    UpstreamFault,
    UpstreamUnreachable,
)
from proxy.forward import forward
from proxy.instance import Instance, Page, Visit
from proxy.interrupt import Interruptible, Work
from proxy.knobs import knobs_of
from proxy.log import ExchangeLog
from proxy.metrics import Board, Metrics
from proxy.modelconfig.resolved import Endpoint, Model, Provider as ProviderSettings
from proxy.outcome import Outcome
from proxy.pool import Member, Pool
from proxy.providers import PROVIDERS
from proxy.providers.base import Asked, Call, Native, join_url, pass_on, token_query
from proxy.redact import BUG, Redactor
from proxy.relay import Relay
from proxy.response import Response, own_headers
from proxy.upstream import Upstream
from proxy.usage import UsageCounter

logger = logging.getLogger(__name__)

# Forwarded paths whose bodies name a model.
_WITH_MODEL = {"/v1/embeddings", "/v1/responses", "/v1/messages/count_tokens"}
_LIST_S = 5.0
_MODEL_LISTS = ("/v1/models", "/.api/llm/models")
MESSAGE_CHARS = 2000
_NO_PATH = Reply(400, "text/plain; charset=utf-8", b"the request names no path\n")
_HEALTHY = Reply(200, "text/plain; charset=utf-8", __version__.encode())
_STOPPING = Reply(503, "text/plain; charset=utf-8", b"shutting down\n")
_PATH = re.compile(r"/(?:[!-$&-~]|%[0-9A-Fa-f]{2})*")
# In what a path stands for; the second is what bytes that are no UTF-8 become.
_NEVER_IN_PATH = re.compile("[\0-\x1f\x7f\ufffd]")
_MOST_ENCODINGS = 4
# First lines of requests that are remembered with what they come to.
_MAX_TARGETS = 1024
_MAX_KEPT_CHARS = 512

# aiohttp's, or one of ours.
AnyResponse: TypeAlias = Response | web.StreamResponse
_DUPLICATE_SLASHES = re.compile(r"/{2,}")


class Proxy:
    """Answers every request: ``handle`` is the handler of the low-level server."""

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        log: ExchangeLog,
        redact: Redactor,
        board: Board | None = None,
    ) -> None:
        # Asked for once: CPython 3.11 makes a system call for each answer.
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.upstream = upstream
        self.log = log
        self.redact = redact
        self.models = settings.models
        self.access = Access(settings.tokens, open=settings.open)
        self.admission = admission(settings, self.loop)
        self.providers = {
            provider.id: PROVIDERS[provider.type](provider)
            for provider in settings.models.providers.values()
        }
        self.pools = {
            provider.id: Pool(provider.endpoints, provider.balance, provider.weights)
            for provider in settings.models.providers.values()
        }
        self.takes_clients_credentials = any(
            provider.client_credentials
            for provider in settings.models.providers.values()
        )
        # Each provider's, for those that are connected to in their own way.
        self.upstreams = {
            provider.id: upstream.apart(provider.tls, provider.egress)
            for provider in settings.models.providers.values()
        }
        self.is_stopping = False  # health checks fail
        self.is_closed = False  # new requests are refused, too
        self.relays: set[Interruptible] = set()  # what is running, or waits for that
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self._incoming = routes.incoming(settings)
        self.board = board
        usage = UsageCounter(time.time())
        self.metrics = Metrics(routes.dialects(self._incoming), usage)
        self._tell(self.metrics)
        self._targets: dict[str, _Target] = {}
        # Path, streamed or not, model, endpoint: as many as the configuration has.
        self.natives: dict[tuple[str, bool, str, int], Native | None] = {}
        self.origins = Origins(settings.origins) if settings.origins else None
        self.knobs = knobs_of(settings.models)
        self.instance = Instance(settings, self.access, self._usage_page)

    def response(self, request: web.BaseRequest, id: str = "") -> Response:
        response = Response(request, id)
        if self.origins is not None:
            response.more = self.origins.lines(request.headers)
        return response

    def take_over(self, old: "Proxy") -> None:
        """Go on with what another one counted that this one replaces."""
        if self.admission is not None and old.admission is not None:
            self.admission = old.admission
            self.admission.configure(self.settings)
        self.metrics = old.metrics
        self.metrics.name(routes.dialects(self._incoming))
        self._tell(self.metrics)
        for id, pool in old.pools.items():
            # What is known of its endpoints, and what is asked of them just now.
            if old.models.providers[id] == self.models.providers.get(id):
                self.pools[id] = pool

    def _tell(self, metrics: Metrics) -> None:
        """Say what only the proxy knows."""
        metrics.read("in_flight", lambda: {"": self.in_flight})
        metrics.read(
            "upstream_connections",
            lambda: {"in_use": self.in_flight, "idle": self.upstream.idle},
        )
        if (door := self.admission) is not None:
            metrics.read("waiting", lambda: {"": door.in_flight.waiting})
            metrics.read("redis_failures", lambda: {"": door.rates.failures})

    @property
    def in_flight(self) -> int:
        """How many exchanges are running, without those that wait for a place."""
        return sum(isinstance(each, Relay) for each in self.relays)

    def metrics_page(self, accept: str) -> Reply:
        body, content_type = self.metrics.page(accept, self._other_counts())
        return Reply(200, content_type, body)

    def _usage_page(self, user: str) -> Reply:
        return self.metrics.usage.reply(user, self.metrics.used(self._other_counts()))

    def _other_counts(self) -> list[bytes]:
        """What the other workers have counted."""
        return self.board.others(time.time()) if self.board is not None else []

    def started(self, relay: Interruptible) -> None:
        """Count a relay, or what is like it, among the running ones."""
        self.relays.add(relay)
        self.is_idle.clear()

    def finished(self, relay: Interruptible) -> None:
        self.relays.discard(relay)
        if not self.relays:
            self.is_idle.set()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Work]:
        """Count what runs inside, too. Raises: ShuttingDown: out of it."""
        work = Work()
        self.started(work)
        try:
            with work:
                yield work
        finally:
            self.finished(work)

    async def handle(self, request: web.BaseRequest) -> AnyResponse:
        """Answer one request, whatever happens, and write its log line."""
        target = self._targets.get(request.raw_path) or self._target(request)
        reply = target.reply
        if reply is _HEALTHY and self.is_stopping:
            reply = _STOPPING
        if self.origins is not None and reply is None:
            reply = self.origins.preflight(request.method, request.headers)
        if reply is not None:
            response = self.response(request)
            response.reply(reply)
            return response
        outcome = Outcome(
            id=f"{random.getrandbits(64):016x}",
            route=target.path,
            api_version=target.api_version,
            client=target.client,
        )
        is_exchange = target.is_exchange and (
            target.path != "/" or request.method == "POST"
        )
        handling = (_Handling if is_exchange else _Page)(self, request, target, outcome)
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
            return Response(request)  # reaches nobody
        finally:
            outcome.duration_s = handling.elapsed_s()
            outcome.kind = outcome.kind or "ok"
            self.metrics.usage.count(outcome, time.time())
            if handling.is_logged or outcome.kind != "ok":
                self.log.outcome(outcome)
            self.metrics.count(outcome)

    def _target(self, request: web.BaseRequest) -> "_Target":
        """Say what a request's first line asks for; clients ask for few things."""
        path = _DUPLICATE_SLASHES.sub("/", request.path)
        query = request.query
        client = f"{query.get('client-name', '')}/{query.get('client-version', '')}"
        reply = None
        if not path.startswith("/"):  # "*", or a whole URL without a path
            reply = _NO_PATH
        elif path in ("/healthz", "/-/healthz", "/-/__version"):
            reply = _HEALTHY
        target = _Target(
            path,
            self._incoming.get(path) or routes.errors_at(path),
            path in self._incoming,
            query,
            query.get("api-version", "")[:8],
            client.strip("/")[:64],
            reply,
        )
        if len(request.raw_path) <= _MAX_KEPT_CHARS:
            if len(self._targets) >= _MAX_TARGETS:
                self._targets.clear()
            self._targets[request.raw_path] = target
        return target


class _Target(msgspec.Struct, frozen=True):
    """What the first line of a request comes to. ``reply`` needs no look at the rest."""

    path: str
    incoming: Incoming
    is_exchange: bool
    query: Mapping[str, str]
    api_version: str
    client: str
    reply: Reply | None


class _Handling:
    """One request on its way; lives for as long as it is answered."""

    is_logged = True

    def __init__(
        self,
        proxy: Proxy,
        request: web.BaseRequest,
        target: _Target,
        outcome: Outcome,
    ) -> None:
        self._proxy = proxy
        self._request = request
        self._path = target.path
        self._incoming = target.incoming
        self._outcome = outcome
        self._response = proxy.response(request, outcome.id)
        self._head = Head(request.method, target.path, target.query, request.headers)
        self._loop = proxy.loop
        self._started_s = proxy.loop.time()
        self._refusal: Unauthorized | None = None

    def elapsed_s(self) -> float:
        return round(self._loop.time() - self._started_s, 4)

    async def run(self) -> AnyResponse:
        """Raises: ConnectionError: the client is gone."""
        say = self._incoming.error_reply
        try:
            self._check(self._head)
            body = await self._read_body()
            if self._path == routes.INVOCATIONS:
                self._incoming = routes.narrow(self._incoming, body)
                say = self._incoming.error_reply
            asked = self._parse(body)
            say = asked.writer.error_reply
            await self._complete(asked)
        except ProxyError as error:
            self._response.reply(say(self._noted(error)))
        except ConnectionError:
            raise
        except Exception:
            bug = self._noted(self._bug())
            if self._response.is_begun:
                self._response.abort()
                raise ConnectionResetError("aborted") from None
            self._response.reply(say(bug))
        return self._response

    def _check(self, head: Head) -> None:
        """Refuse what needs no look at the body, in the order clients know."""
        if self._proxy.is_closed:
            raise ShuttingDown
        if head.method != "POST":
            raise MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
        self._check_token(head)
        self._incoming.check(head)

    def _check_token(self, head: Head) -> None:
        settings = self._proxy.settings
        origin = head.headers.get("Origin") if settings.open else None
        if origin is not None and is_foreign(origin, settings.origins):
            raise ForeignOrigin(
                "web pages of other machines may not ask without a token; allow one by "
                "its origin under origins in the proxy's configuration"
            )
        try:
            header = self._proxy.settings.auth_header
            token = self._proxy.access.check(_authorization(head, header))
        except Unauthorized as refusal:
            if self._incoming.dialect != "cody" and refusal.message == NOT_GIVEN:
                refusal.message = (
                    "no token given: send the header Authorization: Bearer …"
                )
            # A provider that takes the client's own credential may still admit it.
            if not self._proxy.takes_clients_credentials:
                raise
            self._refusal = refusal
            return
        if token is not None:
            self._outcome.user = token.name

    def _admit(self, settings: ProviderSettings) -> str:
        """Return the client's own credential where the provider asks for that, or "".

        Raises: Unauthorized: nobody vouches for the client.
        """
        self._outcome.provider = settings.id
        if not settings.client_credentials:
            if self._refusal is not None:
                raise self._refusal
            return ""
        token = credential(_authorization(self._head, "Authorization"))
        if not token:
            raise Unauthorized("this model is asked with your own API key: send one")
        return token

    async def _read_body(self) -> bytes:
        request = self._request
        limit = self._proxy.settings.limits.body_bytes
        if (request.content_length or 0) > limit:
            raise too_large(limit)
        self._continue()
        try:
            if request.content.is_eof():  # all of it came with the head
                body = request.content.read_nowait()
                if len(body) > limit:
                    raise too_large(limit)
                return body
            timeouts = self._proxy.settings.timeouts
            limit_s = min(self._timeout_s(timeouts.chat_s), timeouts.body_s)
            with self._proxy.interruptible():
                async with asyncio.timeout_at(self._started_s + limit_s):
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

    async def _complete(self, asked: "_Asked") -> None:
        """Ask one endpoint after the other, as long as nothing was said to the client.

        Raises: ProxyError: nothing was said, and nobody is left to ask.
        """
        while True:
            try:
                await self._ask(asked)
                return
            except UpstreamFault as fault:
                fallback = asked.model.fallback
                if not fault.retryable or not fallback or asked.is_fallback:
                    raise
                self._outcome.tried.append(f"{asked.model.ref} {fault.kind}")
                asked = self._with_model(asked, fallback)

    async def _ask(self, asked: "_Asked") -> None:
        timeouts, feature = asked.settings.timeouts, asked.completion.feature
        default_s = timeouts.chat_s if feature == "chat" else timeouts.code_s
        timeout_s = self._timeout_s(default_s)
        if (door := self._proxy.admission) is None:
            await self._ask_pool(asked, timeout_s)
            return
        async with self._place(door, feature, asked.settings.id, timeout_s):
            await self._ask_pool(asked, timeout_s)

    async def _ask_pool(self, asked: "_Asked", timeout_s: float) -> None:
        pool, loop = self._proxy.pools[asked.settings.id], self._loop
        outcome = self._outcome
        if self._incoming.dialect == "cody":
            # A copy: another model may yet be asked, and has other knobs.
            asked = structs.replace(asked, completion=structs.replace(asked.completion))
            knobs = self._proxy.knobs[outcome.model]
            knobs.apply(asked.completion, len(asked.body))
            timeout_s = knobs.timeout_s(asked.completion, timeout_s)
        tried: list[Member] = []
        member = pool.pick(loop.time(), self)
        while member is not None:
            outcome.endpoint, outcome.upstream_status = member.name, 0
            try:
                call = self._call(asked, member.endpoint)
            except Exception:  # it cannot be said there: nothing was asked
                pool.finished(member, None, loop.time(), self, is_complete=False)
                raise
            relay = self._relay(asked, call)
            try:
                upstream = self._proxy.upstreams[asked.settings.id]
                await relay.run(upstream, self._started_s, timeout_s)
                return
            except UpstreamFault as fault:
                tried.append(member)
                is_in_time = loop.time() < self._started_s + timeout_s
                if not (fault.retryable and is_in_time and len(tried) < len(pool)):
                    raise
                if not pool.may_retry():
                    raise
                outcome.tried.append(f"{member.name} {fault.kind}")
            finally:
                self._proxy.finished(relay)
                pool.finished(
                    member,
                    relay.error,
                    loop.time(),
                    self,
                    is_complete=relay.is_complete,
                )
                relay.forget()
                if (usage := call.reader.usage) is not None:
                    outcome.prompt_tokens = usage.prompt_tokens
                    outcome.completion_tokens = usage.completion_tokens
            member = pool.pick(loop.time(), self, tried)

    def _relay(self, asked: "_Asked", call: Call) -> Relay:
        proxy, settings = self._proxy, asked.settings
        relay = Relay(
            self._response,
            asked.completion,
            asked.writer,
            call,
            self._outcome,
            source=proxy.providers[settings.id].source,
            event_bytes=proxy.settings.limits.event_bytes,
            redact=proxy.redact,
            log=proxy.log,
            verbose=settings.verbose_logs,
            timeouts=settings.timeouts,
            keep_alive=proxy.settings.keep_alive,
            reply_headers=routes.reply_headers(self._path, asked.model),
            clients_credential=settings.client_credentials,
            loop=proxy.loop,
        )
        proxy.started(relay)
        return relay

    @contextlib.asynccontextmanager
    async def _place(
        self, door: Admission, feature: Feature, provider: str, timeout_s: float
    ) -> AsyncIterator[None]:
        """Have a place in flight. Raises: LimitReached: the request is not let in."""
        outcome = self._outcome
        self._proxy.started(self)  # so that it is told if the proxy ends meanwhile
        try:
            permit = await door.enter(
                outcome.user,
                self._request.remote or "",
                feature,
                provider,
                self._started_s + timeout_s,
                is_counted=bool(outcome.tried),
            )
            outcome.waited_s = permit.waited_s
            try:
                yield
            finally:
                tokens = (outcome.prompt_tokens or 0) + (outcome.completion_tokens or 0)
                door.leave(permit, tokens)
        finally:
            self._proxy.finished(self)

    def interrupt(self) -> None:
        """End the wait for a place."""
        if self._proxy.admission is not None:
            self._proxy.admission.interrupt()

    def _call(self, asked: "_Asked", endpoint: Endpoint) -> Call:
        """Hand the client's bytes on where the upstream speaks its dialect."""
        settings = asked.settings
        if asked.credential:
            endpoint = structs.replace(
                endpoint, access_token=asked.credential, headers={}
            )
        native = None
        if asked.is_native:
            native = self._native(asked.completion, asked.model, settings, endpoint)
        if native is None or asked.chosen is None:
            provider = self._proxy.providers[settings.id]
            return provider.call(asked.completion, asked.model, endpoint)
        asked.completion.dropped = []
        return pass_on(
            native,
            self._incoming.dialect,
            asked.chosen,
            asked.model,
            asked.body,
            profile=settings.server_profile,
            adjust=settings.adjust,
        )

    def _parse(self, body: bytes) -> "_Asked":
        """Say what is asked for, of which model, and of which endpoint."""
        incoming, head = self._incoming, self._head
        is_passable = incoming.dialect in ADJUSTED
        chosen = choose(body) if is_passable else None
        if chosen is not None:
            sketch = cast(NativeDialect, incoming).sketch
            # Where the upstream speaks the client's dialect, it says itself what is
            # wrong with the rest, and understands what cannot be translated.
            asked = self._choose(*sketch(head, chosen), body, chosen)
            if asked.is_native:
                return asked
        try:
            completion, writer = incoming.parse(head, body)
        except InvalidRequest:
            if (mended := mend(body)) is None:
                raise
            completion, writer = incoming.parse(head, mended)
            body = mended
        if is_passable:
            chosen = choose(body)
        return self._choose(completion, writer, body, chosen)

    def _choose(
        self,
        completion: CompletionRequest,
        writer: Writer,
        body: bytes,
        chosen: Chosen | None,
        ref: str = "",
    ) -> "_Asked":
        """Say who is to answer.

        Args:   ref: of the model to ask instead of the one that is asked for.
        Raises: UnknownModel: nobody.
        """
        outcome, models = self._outcome, self._proxy.models
        outcome.feature, outcome.stream = completion.feature, completion.stream
        completion.user = outcome.user
        name, fast = (ref, False) if ref else (completion.model, completion.fast)
        model = models.choose(completion.feature, name, fast)
        outcome.model = model.ref
        settings = models.providers[model.provider_id]
        given = self._admit(settings)
        is_native = False
        if chosen is not None:  # else it is of no dialect that passes
            first = settings.endpoints[0]
            is_native = self._native(completion, model, settings, first) is not None
        return _Asked(
            completion,
            writer,
            body,
            chosen,
            model,
            settings,
            is_native,
            given,
            bool(ref),
        )

    def _with_model(self, asked: "_Asked", ref: str) -> "_Asked":
        """The same request for another model."""
        other = self._choose(
            asked.completion, asked.writer, asked.body, asked.chosen, ref
        )
        if asked.is_native and not other.is_native:  # until now its body just passed
            parsed = self._incoming.parse(self._head, asked.body)
            return self._choose(*parsed, asked.body, asked.chosen, ref)
        return other

    def _native(
        self,
        completion: CompletionRequest,
        model: Model,
        settings: ProviderSettings,
        endpoint: Endpoint,
    ) -> Native | None:
        natives = self._proxy.natives
        # A client's own credential belongs to no configured endpoint.
        key = (self._path, completion.stream, model.ref, id(endpoint))
        if settings.client_credentials or key not in natives:
            provider = self._proxy.providers[settings.id]
            asked = Asked(self._incoming.dialect, self._path)
            native = provider.native(asked, completion, model, endpoint)
            if settings.client_credentials:
                return native
            natives[key] = native
        return natives[key]

    def _timeout_s(self, default_s: float) -> float:
        """How long the request may take: what its client says, or the default."""
        given = self._request.headers.get("X-Timeout-Ms")
        if given is not None:
            text = given.strip()
            if text.isascii() and text.isdigit() and int(text[:9]) > 0:
                return int(text[:9]) / 1000
        return default_s

    def _noted(self, error: ProxyError) -> ProxyError:
        self._outcome.kind = error.kind
        self._outcome.error = error.log_text
        if isinstance(error, LimitReached):
            self._outcome.limit = error.limit
        message = self._proxy.redact(error.message)
        if len(message) > MESSAGE_CHARS:  # it quotes something of the client's
            message = f"{message[:MESSAGE_CHARS]}…"
        error.message = message
        return error

    def _bug(self) -> ProxyError:
        logger.error(BUG, self._outcome.id, self._proxy.redact.trace())
        return ProxyError(f"internal error of the proxy, logged as {self._outcome.id}")


class _Asked(msgspec.Struct):
    """What a request asks for, and who is to answer it.

    ``is_native`` if the upstream speaks the client's dialect, so that ``body`` passes.
    ``credential`` is the client's own, where the upstream is asked with that.
    """

    completion: CompletionRequest
    writer: Writer
    body: bytes
    chosen: Chosen | None
    model: Model
    settings: ProviderSettings
    is_native: bool
    credential: str
    is_fallback: bool


class _Page(_Handling):
    """A request that is no exchange: answered from the configuration, or handed on."""

    async def run(self) -> AnyResponse:
        try:
            if self._proxy.is_closed:
                raise ShuttingDown
            if (page := self._proxy.instance.page(self._head)) is not None:
                return await self._visit(page, self._head)
            if not self._is_known():
                raise UnknownPath(f"nothing is served at {self._path}")
            self._check_token(self._head)
            return await self._answer(self._head)
        except ProxyError as error:
            return self._respond(self._incoming.error_reply(self._noted(error)))
        except ConnectionError:
            raise
        except Exception:
            return self._respond(self._incoming.error_reply(self._noted(self._bug())))

    def _respond(self, reply: Reply) -> Response:
        self._response.reply(reply)
        return self._response

    async def _visit(self, page: Page, head: Head) -> Response:
        """Answer as a Sourcegraph instance does."""
        if head.method not in page.methods:
            allowed = {"Allow": ", ".join(page.methods)}
            raise MethodNotAllowed("Method Not Allowed", headers=allowed)
        if page.needs_token:
            self._check_token(head)
        body = await self._read_body() if head.method == "POST" else b""
        reply = page.answer(Visit(head, self._outcome.user, body))
        self.is_logged = page.is_logged
        if reply.status >= 400:  # a refusal in words of its own
            is_token = reply.status == Unauthorized.status
            self._outcome.kind = (Unauthorized if is_token else InvalidRequest).kind
        return self._say(reply)

    async def _answer(self, head: Head) -> AnyResponse:
        path, models = self._path, self._proxy.models
        is_get = head.method in ("GET", "HEAD")
        if is_get and path.startswith(_MODEL_LISTS):
            listed = pages.configured(models, refs=path.startswith("/.api/"))
            if self._proxy.settings.list_upstream_models:
                with self._proxy.interruptible():
                    listed += await self._reported({model.id for model in listed})
            anthropic = "anthropic-version" in head.headers
            return self._say(pages.model_list(path, listed, anthropic=anthropic))
        if is_get and path == routes.METRICS:
            accept = head.headers.get("Accept", "")
            return self._say(self._proxy.metrics_page(accept))
        if is_get and path == "/v1/limits":
            return self._say(pages.limits(models, await self._windows()))
        if path == "/v1/limits/refresh":  # there is nothing to refresh
            return self._say(Reply(200, JSON, b""))
        if is_get and path == "/":
            return await self._forward("/health")
        if is_get and path == "/info" and not self._is_tgi():
            return self._say(pages.info(models.choose("chat", "", False)))
        # An unknown path is handed on as it came, not as it reads.
        raw_path = self._request.rel_url.raw_path
        return await self._forward(routes.FORWARDED.get(path, raw_path))

    async def _windows(self) -> Mapping[str, Window]:
        if (door := self._proxy.admission) is None:
            return {}
        return await door.windows(self._outcome.user, self._request.remote or "")

    def _is_known(self) -> bool:
        path, is_get = self._path, self._request.method in ("GET", "HEAD")
        if path in routes.FORWARDED or path == "/v1/limits/refresh":
            return True
        own = ("/", "/v1/limits", routes.METRICS)
        if is_get and (path in own or path.startswith(_MODEL_LISTS)):
            return True
        return self._proxy.settings.passthrough and _is_forwardable(
            self._request.rel_url.raw_path
        )

    def _say(self, reply: Reply) -> Response:
        if self._refusal is not None:
            raise self._refusal
        return self._respond(reply)

    def _is_tgi(self) -> bool:
        models = self._proxy.models
        default = models.providers[models.choose("chat", "", False).provider_id]
        return default.type == "huggingface-tgi"

    async def _forward(self, path: str) -> web.StreamResponse:
        """Hand the request on; its model, if it names one, says to whom."""
        body, model = await self._named_model(path)
        settings = self._proxy.models.providers[model.provider_id]
        timeout_s = self._timeout_s(settings.timeouts.chat_s)
        door = self._proxy.admission
        # To be looked at is no work for a model.
        if door is None or self._request.method in ("GET", "HEAD"):
            return await self._hand_on(path, body, settings, timeout_s)
        async with self._place(door, "chat", settings.id, timeout_s):
            return await self._hand_on(path, body, settings, timeout_s)

    async def _hand_on(
        self,
        path: str,
        body: bytes | None,
        settings: ProviderSettings,
        timeout_s: float,
    ) -> web.StreamResponse:
        proxy = self._proxy
        limit = proxy.settings.limits.body_bytes
        if (self._request.content_length or 0) > limit:
            raise too_large(limit)
        provider, pool = proxy.providers[settings.id], proxy.pools[settings.id]
        given = self._admit(settings)
        member = pool.pick(self._loop.time(), self)
        assert member is not None  # nobody was tried yet
        endpoint = member.endpoint
        self._outcome.endpoint = member.name
        if given:
            endpoint = structs.replace(endpoint, access_token=given, headers={})
        if body is None:
            self._continue()
        query = self._request.rel_url.raw_query_string
        queries = (query, token_query(endpoint))
        whole_query = "&".join(part for part in queries if part)
        fault: ProxyError | None = None
        is_complete = False
        try:
            with proxy.interruptible() as work:
                response = await forward(
                    self._request,
                    proxy.upstreams[settings.id],
                    join_url(provider.root(endpoint), path[1:], whole_query),
                    provider.credentials(endpoint),
                    endpoint.name,
                    own_headers(self._outcome.id) | self._cross_origin(),
                    self._outcome,
                    work,
                    body=body,
                    without=(proxy.settings.auth_header.lower(),),
                    limit_bytes=limit,
                    deadline_s=self._started_s + timeout_s,
                    is_optional=self._path in routes.FORWARDED,
                    clients_credential=settings.client_credentials,
                )
            is_complete = self._outcome.upstream_status < 500
            return response
        except UpstreamFault as error:
            fault = error
            if path == "/health" and isinstance(error, UpstreamUnreachable):
                error.status = 503
            raise
        finally:
            pool.finished(
                member, fault, self._loop.time(), self, is_complete=is_complete
            )

    def _cross_origin(self) -> dict[str, str]:
        origins = self._proxy.origins
        return {} if origins is None else origins.headers(self._head.headers)

    async def _named_model(self, path: str) -> tuple[bytes | None, Model]:
        models = self._proxy.models
        default = models.choose("chat", "", False)
        if path not in _WITH_MODEL or self._request.method != "POST":
            return None, default
        body = await self._read_body()
        fields = decode_fields(body)
        try:
            name = json.decode(fields["model"]) if "model" in fields else ""
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise InvalidRequest("model: expected a text") from None
        if not isinstance(name, str | None):
            raise InvalidRequest("model: expected a text")
        name = name or ""
        model = models.choose("chat", name, False)
        self._outcome.model = model.ref
        word = model.api_model or model.name
        if name and name != word:
            fields["model"] = raw(word)
            body = encode_fields(fields)
        return body, model

    async def _reported(self, known: set[str]) -> list[pages.Listed]:
        """Ask every upstream for its own list; one that does not answer has none."""
        found: list[pages.Listed] = []
        for settings in self._proxy.models.providers.values():
            provider = self._proxy.providers[settings.id]
            endpoint = settings.endpoints[0]
            url = join_url(provider.root(endpoint), "v1/models", token_query(endpoint))
            with contextlib.suppress(UpstreamFault, TimeoutError):
                async with asyncio.timeout(_LIST_S):
                    body = await self._proxy.upstreams[settings.id].get(
                        url, provider.credentials(endpoint), endpoint.name
                    )
                found += pages.reported(settings.id, body)
        return [model for model in found if model.id not in known]


def _is_forwardable(raw_path: str) -> bool:
    """Whether a path may go to an upstream: none of ours, in no disguise."""
    path = raw_path
    for _ in range(_MOST_ENCODINGS):
        decoded = unquote(path, errors="replace")
        if decoded == path:
            break
        path = decoded
    else:
        return False
    path = unicodedata.normalize("NFKC", path)
    # Some servers leave out what follows a semicolon in each segment.
    segments = [
        segment.partition(";")[0].strip()
        for segment in path.replace("\\", "/").lower().split("/")
    ]
    return (
        _PATH.fullmatch(raw_path) is not None
        and _NEVER_IN_PATH.search(path) is None
        and not {".", ".."} & set(segments)
        and next(filter(None, segments), "") != ".api"
    )


def _authorization(head: Head, header: str) -> str | None:
    """What the client says it may do. Anthropic's clients have a header of their own,
    and a header that was configured may hold the token alone.
    """
    given = head.headers.get(header)
    if given is not None and header != "Authorization" and credential(given) is None:
        return f"Bearer {given}"
    key = head.headers.get("X-API-Key")
    return given or (f"Bearer {key}" if key else None)
