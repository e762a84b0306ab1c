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
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
)
from typing import Protocol, TypeAlias, cast
from urllib.parse import unquote

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.http import RawRequestMessage
from msgspec import json, structs
from yarl import URL

from proxy import __version__, heads, pages, routes
from proxy.admission import Admission, Permit, admission
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
from proxy.knobs import Knobs, knobs_of
from proxy.log import ExchangeLog
from proxy.metrics import Board, Metrics
from proxy.modelconfig.resolved import Endpoint, Model, Provider as ProviderSettings
from proxy.outcome import Outcome
from proxy.pool import Member, Pool
from proxy.providers import PROVIDERS
from proxy.providers.base import (
    Asked,
    Call,
    Native,
    Provider,
    join_url,
    pass_on,
    token_query,
)
from proxy.redact import BUG, Redactor
from proxy.relay import AHEAD_S, Relay, Terms, shortest
from proxy.response import Client as ClientConnection, Response, own_headers
from proxy.upstream import Prepared, Upstream, prepare
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
        self._looker: asyncio.TimerHandle | None = None
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self._incoming = routes.incoming(settings)
        self.board = board
        usage = UsageCounter(time.time())
        self.metrics = Metrics(routes.dialects(self._incoming), usage)
        self._tell(self.metrics)
        self._targets: dict[str, _Target] = {}
        self.known: dict[bytes, _Known] = {}  # by heads
        self.courses: dict[_Wish, _Course] = {}
        self.origins = Origins(settings.origins) if settings.origins else None
        self.knobs = knobs_of(settings.models)
        self.instance = Instance(settings, self.access, self._usage_page)

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
        if not self.relays:
            self.is_idle.clear()
            if self._looker is None:
                self._looker = self.loop.call_later(AHEAD_S / 2, self._look_ahead)
        self.relays.add(relay)

    def _look_ahead(self) -> None:
        """Have those relays set their timers to which something is due soon."""
        self._looker = None
        if self.relays:
            until_s = self.loop.time() + AHEAD_S
            for relay in self.relays:
                if isinstance(relay, Relay):
                    relay.look_ahead(until_s)
            self._looker = self.loop.call_later(AHEAD_S / 2, self._look_ahead)

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

    def meet(self, head: bytes, message: RawRequestMessage) -> "_Known | None":
        """Look at a head for the first time: return what a visit has to know of it.

        None if there cannot be one: something is unusual about it, or wrong.
        """
        raw_path = message.path
        if self.is_stopping or not heads.is_repeatable(
            head, raw_path, message.raw_headers
        ):
            return None
        target = self._targets.get(raw_path) or self._target(raw_path, message.url)
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
        known = self.known[head] = _Known(target, asked, user, more, _limit_s(asked))
        return known

    def visit(self, client: "Client", known: "_Known", body: bytes) -> "_Visit | None":
        """Answer a request that is whole, and the rest of which is known."""
        if self.is_stopping:  # it has to be said that the connection closes
            return None
        visit = _Visit(self, client, known)
        return visit if visit.begin(body) else None

    async def handle(self, request: web.BaseRequest) -> AnyResponse:
        """Answer one request, whatever happens, and write its log line."""
        client = cast(Client, request.protocol)
        raw_path = request.raw_path
        target = self._targets.get(raw_path) or self._target(raw_path, request.rel_url)
        reply = target.reply
        if reply is _HEALTHY and self.is_stopping:
            reply = _STOPPING
        if self.origins is not None and reply is None:
            reply = self.origins.preflight(request.method, request.headers)
        if reply is not None:
            response = self.response(client, request)
            response.reply(reply)
            return response
        is_exchange = target.is_exchange and (
            target.path != "/" or request.method == "POST"
        )
        handling = (_Request if is_exchange else _Page)(self, client, request, target)
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
            self.ended(handling)

    def response(
        self, client: "Client", request: web.BaseRequest, id: str = ""
    ) -> Response:
        response = Response(
            client,
            id,
            keep_alive=request.keep_alive,
            is_http11=request.version == (1, 1),
            is_head=request.method == "HEAD",
        )
        if self.origins is not None:
            response.more = self.origins.lines(request.headers)
        return response

    def ended(self, handling: "_Handling") -> None:
        """Write down how a request was answered."""
        outcome = handling.outcome
        outcome.duration_s = round(self.loop.time() - handling.started_s, 4)
        outcome.kind = outcome.kind or "ok"
        now_s = time.time()
        self.metrics.count(outcome, now_s)
        if handling.is_logged or outcome.kind != "ok":
            self.log.outcome(outcome, now_s)

    def vouch(self, head: Head, incoming: Incoming) -> tuple[str, Unauthorized | None]:
        """Return the name of the token that is given, and why it is none.

        Raises: Unauthorized: the latter, unless there is a provider that takes the
                client's own credential and may still admit it.
                ForeignOrigin
        """
        settings = self.settings
        origin = head.headers.get("Origin") if settings.open else None
        if origin is not None and is_foreign(origin, settings.origins):
            raise ForeignOrigin(
                "web pages of other machines may not ask without a token; allow one by "
                "its origin under origins in the proxy's configuration"
            )
        try:
            token = self.access.check(_authorization(head, settings.auth_header))
        except Unauthorized as refusal:
            if incoming.dialect != "cody" and refusal.message == NOT_GIVEN:
                refusal.message = (
                    "no token given: send the header Authorization: Bearer …"
                )
            if not self.takes_clients_credentials:
                raise
            return "", refusal
        return token.name if token is not None else "", None

    def _target(self, raw_path: str, url: URL) -> "_Target":
        """Say what a request's first line asks for; clients ask for few things."""
        path = _DUPLICATE_SLASHES.sub("/", url.path)
        query = url.query
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
        if len(raw_path) <= _MAX_KEPT_CHARS:
            if len(self._targets) >= _MAX_TARGETS:
                self._targets.clear()
            self._targets[raw_path] = target
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


class _Known(msgspec.Struct, frozen=True):
    """What a head comes to that was checked. ``more`` are header lines of the reply,
    ``limit_s`` how long the client says that it may take.
    """

    target: _Target
    head: Head
    user: str
    more: bytes
    limit_s: float | None


class Client(ClientConnection, Protocol):
    """The connection that a request came on."""

    @property
    def remote(self) -> str: ...

    def visited(self, *, keep_alive: bool) -> None:
        """A visit is over."""


# Path, feature, name of the model ("" for the default one), fast or not, streamed or not.
_Wish: TypeAlias = tuple[str, Feature, str, bool, bool]


class _Course(msgspec.Struct):
    """Who answers a wish; found once for all requests with the same one.

    ``natives`` says by the endpoint's identity how the client's bytes are handed on,
    and ``prepared`` how that request begins.
    """

    model: Model
    ref: str
    settings: ProviderSettings
    provider: Provider
    pool: Pool
    knobs: Knobs | None
    terms: Terms
    timeout_s: float
    profile: str
    is_native: bool = False
    natives: dict[int, Native | None] = {}
    prepared: dict[int, Prepared] = {}


class _Begun(msgspec.Struct):
    """How far a request was answered without a task. ``asked`` is with its knobs."""

    permit: Permit | None = None
    asked: "_Asked | None" = None
    attempt: "_Attempt | None" = None


class _Attempt(msgspec.Struct):
    """One endpoint that is being asked."""

    member: Member
    call: Call
    relay: Relay
    pool: Pool


class _Handling:
    """One request on its way; lives for as long as it is answered.

    Args: limit_s: how long the client says that it may take, None if it does not say.
    """

    is_logged = True
    _refusal: Unauthorized | None = None
    _say_error: Callable[[ProxyError], Reply]

    def __init__(
        self,
        proxy: Proxy,
        client: Client,
        target: _Target,
        head: Head,
        limit_s: float | None,
        response: Response,
        outcome: Outcome,
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._path = target.path
        self._incoming = target.incoming
        self._head = head
        self._limit_s = limit_s
        self.response = response
        self.outcome = outcome
        self.started_s = proxy.loop.time()

    async def _carry_out(self, answer: Coroutine[object, object, None]) -> None:
        """Say an answer, or why there is none.

        Raises: ConnectionError: the client is gone.
        """
        try:
            await answer
        except ProxyError as error:
            self.response.reply(self._say_error(self._noted(error)))
        except ConnectionError:
            raise
        except Exception:
            bug = self._noted(self._bug())
            if self.response.is_begun:
                self.response.abort()
                raise ConnectionResetError("aborted") from None
            self.response.reply(self._say_error(bug))

    def _check(self, head: Head) -> None:
        """Refuse what needs no look at the body, in the order clients know."""
        if self._proxy.is_closed:
            raise ShuttingDown
        if head.method != "POST":
            raise MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
        self._check_token(head)
        self._incoming.check(head)

    def _check_token(self, head: Head) -> None:
        vouched = self._proxy.vouch(head, self._incoming)
        self.outcome.user, self._refusal = vouched

    def _admit(self, settings: ProviderSettings) -> str:
        """Return the client's own credential where the provider asks for that, or "".

        Raises: Unauthorized: nobody vouches for the client.
        """
        if not settings.client_credentials:
            if self._refusal is not None:
                raise self._refusal
            return ""
        token = credential(_authorization(self._head, "Authorization"))
        if not token:
            raise Unauthorized("this model is asked with your own API key: send one")
        return token

    async def _complete(self, asked: "_Asked", begun: _Begun | None = None) -> None:
        """Ask one endpoint after the other, as long as nothing was said to the client.

        Args:   begun: what was done of that already.
        Raises: ProxyError: nothing was said, and nobody is left to ask.
        """
        while True:
            try:
                await self._ask(asked, begun)
                return
            except UpstreamFault as fault:
                model = asked.course.model
                if not fault.retryable or not model.fallback or asked.is_fallback:
                    raise
                self.outcome.tried += (f"{model.ref} {fault.kind}",)
                asked, begun = self._with_model(asked, model.fallback), None

    async def _ask(self, asked: "_Asked", begun: _Begun | None) -> None:
        if (door := self._proxy.admission) is None:
            await self._ask_pool(asked, begun)
            return
        permit = begun.permit if begun is not None else None
        feature, provider = asked.completion.feature, asked.course.settings.id
        async with self._place(door, feature, provider, asked.timeout_s, permit):
            await self._ask_pool(asked, begun)

    async def _ask_pool(self, asked: "_Asked", begun: _Begun | None) -> None:
        pool, loop = asked.course.pool, self._proxy.loop
        tried: list[Member] = []
        attempt = None
        if begun is not None and begun.asked is not None:
            asked, attempt = begun.asked, begun.attempt
        else:
            asked = self._adjusted(asked)
        attempt = attempt or self._attempt(asked, tried)
        while attempt is not None:
            try:
                await attempt.relay.run()
                return
            except UpstreamFault as fault:
                tried.append(attempt.member)
                is_in_time = loop.time() < self.started_s + asked.timeout_s
                if not (fault.retryable and is_in_time and len(tried) < len(pool)):
                    raise
                if not pool.may_retry():
                    raise
                self.outcome.tried += (f"{attempt.member.name} {fault.kind}",)
            finally:
                self._settle(attempt)
            attempt = self._attempt(asked, tried)

    def _adjusted(self, asked: "_Asked") -> "_Asked":
        """Turn the knobs of the model, for Cody's clients; there are none for others."""
        if (knobs := asked.course.knobs) is None:
            return asked
        # A copy: another model may yet be asked, and has other knobs.
        asked = structs.replace(asked, completion=structs.replace(asked.completion))
        knobs.apply(asked.completion, len(asked.body))
        asked.timeout_s = knobs.timeout_s(asked.completion, asked.timeout_s)
        return asked

    def _attempt(self, asked: "_Asked", tried: Collection[Member]) -> _Attempt | None:
        """Choose the next endpoint to ask; None if there is none."""
        proxy, course, outcome = self._proxy, asked.course, self.outcome
        pool, now_s = course.pool, proxy.loop.time()
        member = pool.pick(now_s, self, tried)
        if member is None:
            return None
        outcome.endpoint, outcome.upstream_status = member.name, 0
        prepared = None
        try:
            call = self._call(asked, member.endpoint)
            if asked.is_native and not asked.credential:  # the same every time
                key = id(member.endpoint)
                if (prepared := course.prepared.get(key)) is None:
                    # What is wrong with it is said when it is sent.
                    with contextlib.suppress(UpstreamFault):
                        prepared = prepare(call.url, call.headers)
                        course.prepared[key] = prepared
        except Exception:  # it cannot be said there: nothing was asked
            pool.finished(member, None, now_s, self, is_complete=False)
            raise
        relay = Relay(
            course.terms,
            self.response,
            asked.completion,
            asked.writer,
            call,
            outcome,
            self.started_s,
            asked.timeout_s,
            prepared,
        )
        proxy.started(relay)
        return _Attempt(member, call, relay, pool)

    def _settle(self, attempt: _Attempt) -> None:
        """An endpoint has been asked, however that ended."""
        proxy, relay = self._proxy, attempt.relay
        proxy.finished(relay)
        attempt.pool.finished(
            attempt.member,
            relay.error,
            proxy.loop.time(),
            self,
            is_complete=relay.is_complete,
        )
        relay.forget()
        if (usage := attempt.call.reader.usage) is not None:
            self.outcome.prompt_tokens = usage.prompt_tokens
            self.outcome.completion_tokens = usage.completion_tokens

    @contextlib.asynccontextmanager
    async def _place(
        self,
        door: Admission,
        feature: Feature,
        provider: str,
        timeout_s: float,
        permit: Permit | None = None,
    ) -> AsyncIterator[None]:
        """Have a place in flight, or keep the one that was given.

        Raises: LimitReached: the request is not let in.
        """
        outcome = self.outcome
        self._proxy.started(self)  # so that it is told if the proxy ends meanwhile
        try:
            if permit is None:
                permit = await door.enter(
                    outcome.user,
                    self._client.remote,
                    feature,
                    provider,
                    self.started_s + timeout_s,
                    is_counted=bool(outcome.tried),
                )
            outcome.waited_s = permit.waited_s
            try:
                yield
            finally:
                self._leave(door, permit)
        finally:
            self._proxy.finished(self)

    def _leave(self, door: Admission, permit: Permit) -> None:
        outcome = self.outcome
        tokens = (outcome.prompt_tokens or 0) + (outcome.completion_tokens or 0)
        door.leave(permit, tokens)

    def interrupt(self) -> None:
        """End the wait for a place."""
        if self._proxy.admission is not None:
            self._proxy.admission.interrupt()

    def _call(self, asked: "_Asked", endpoint: Endpoint) -> Call:
        """Hand the client's bytes on where the upstream speaks its dialect."""
        course = asked.course
        if asked.credential:
            endpoint = structs.replace(
                endpoint, access_token=asked.credential, headers={}
            )
        native = None
        if asked.is_native:
            native = course.natives.get(id(endpoint)) or self._native(
                asked.completion, course, endpoint
            )
        if native is None or asked.chosen is None:
            return course.provider.call(asked.completion, course.model, endpoint)
        asked.completion.dropped = []
        return pass_on(
            native,
            self._incoming.dialect,
            asked.chosen,
            course.model,
            asked.body,
            profile=course.profile,
            adjust=course.settings.adjust,
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

        Args:   chosen: None if it is of no dialect that passes.
                ref: of the model to ask instead of the one that is asked for.
        Raises: UnknownModel: nobody.
        """
        outcome, courses = self.outcome, self._proxy.courses
        feature, stream = completion.feature, completion.stream
        outcome.feature, outcome.stream = feature, stream
        completion.user = outcome.user
        name, fast = (ref, False) if ref else (completion.model, completion.fast)
        wish = (self._path, feature, name, fast, stream)
        if (course := courses.get(wish)) is None:
            course = self._find(wish, completion)
            if len(courses) >= _MAX_TARGETS:  # where any name will do, there is no end
                courses.clear()
            courses[wish] = course
        outcome.model = course.ref
        outcome.provider = course.settings.id
        given = ""
        if self._refusal is not None or course.settings.client_credentials:
            given = self._admit(course.settings)
        return _Asked(
            completion,
            writer,
            body,
            chosen,
            course,
            course.is_native and chosen is not None,
            given,
            bool(ref),
            self._limit_s or course.timeout_s,
        )

    def _find(self, wish: _Wish, completion: CompletionRequest) -> _Course:
        """Raises: UnknownModel"""
        proxy, incoming = self._proxy, self._incoming
        path, feature, name, fast, _ = wish
        model = proxy.models.choose(feature, name, fast)
        settings = proxy.models.providers[model.provider_id]
        provider, timeouts = proxy.providers[settings.id], settings.timeouts
        terms = Terms(
            upstream=proxy.upstreams[settings.id],
            loop=proxy.loop,
            log=proxy.log,
            redact=proxy.redact,
            source=provider.source,
            event_bytes=proxy.settings.limits.event_bytes,
            verbose=settings.verbose_logs,
            timeouts=timeouts,
            keep_alive=proxy.settings.keep_alive,
            reply_headers=routes.reply_headers(path, model),
            clients_credential=settings.client_credentials,
            shortest_s=shortest(timeouts, proxy.settings.keep_alive),
        )
        course = _Course(
            model,
            model.ref,
            settings,
            provider,
            proxy.pools[settings.id],
            proxy.knobs[model.ref] if incoming.dialect == "cody" else None,
            terms,
            timeouts.chat_s if feature == "chat" else timeouts.code_s,
            settings.server_profile,
        )
        if incoming.dialect in ADJUSTED:
            native = self._native(completion, course, settings.endpoints[0])
            course.is_native = native is not None
        return course

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
        self, completion: CompletionRequest, course: _Course, endpoint: Endpoint
    ) -> Native | None:
        natives, key = course.natives, id(endpoint)
        # A client's own credential belongs to no configured endpoint.
        is_clients = course.settings.client_credentials
        if is_clients or key not in natives:
            asked = Asked(self._incoming.dialect, self._path)
            native = course.provider.native(asked, completion, course.model, endpoint)
            if is_clients:
                return native
            natives[key] = native
        return natives[key]

    def _noted(self, error: ProxyError) -> ProxyError:
        self.outcome.kind = error.kind
        self.outcome.error = error.log_text
        if isinstance(error, LimitReached):
            self.outcome.limit = error.limit
        message = self._proxy.redact(error.message)
        if len(message) > MESSAGE_CHARS:  # it quotes something of the client's
            message = f"{message[:MESSAGE_CHARS]}…"
        error.message = message
        return error

    def _bug(self) -> ProxyError:
        logger.error(BUG, self.outcome.id, self._proxy.redact.trace())
        return ProxyError(f"internal error of the proxy, logged as {self.outcome.id}")


class _Asked(msgspec.Struct):
    """What a request asks for, and who is to answer it.

    ``is_native`` if the upstream speaks the client's dialect, so that ``body`` passes.
    ``credential`` is the client's own, where the upstream is asked with that.
    """

    completion: CompletionRequest
    writer: Writer
    body: bytes
    chosen: Chosen | None
    course: _Course
    is_native: bool
    credential: str
    is_fallback: bool
    timeout_s: float


class _Request(_Handling):
    """A request as aiohttp hands it over, and the task that answers it."""

    def __init__(
        self, proxy: Proxy, client: Client, request: web.BaseRequest, target: _Target
    ) -> None:
        id = f"{random.getrandbits(64):016x}"
        response = proxy.response(client, request, id)
        head = Head(request.method, target.path, target.query, request.headers)
        outcome = Outcome(
            id=id,
            route=target.path,
            api_version=target.api_version,
            client=target.client,
        )
        limit_s = _limit_s(head)
        super().__init__(proxy, client, target, head, limit_s, response, outcome)
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
            self._say_error = self._incoming.error_reply
        asked = self._parse(body)
        self._say_error = asked.writer.error_reply
        await self._complete(asked)

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
            limit_s = min(self._limit_s or timeouts.chat_s, timeouts.body_s)
            with self._proxy.interruptible():
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


class _Visit(_Handling):
    """A request of which only the body is new. Callbacks answer it, and a task goes on
    with it once anything has to be waited for but the upstream.
    """

    _task: asyncio.Task[None] | None = None
    _is_resting = False  # the task has begun with the rest
    _asked: "_Asked"
    _begun: _Begun

    def __init__(self, proxy: Proxy, client: Client, known: _Known) -> None:
        id = f"{random.getrandbits(64):016x}"
        target = known.target
        response = Response(client, id)
        response.more = known.more
        outcome = Outcome(
            id=id,
            route=target.path,
            api_version=target.api_version,
            client=target.client,
            user=known.user,
        )
        limit_s = known.limit_s
        super().__init__(proxy, client, target, known.head, limit_s, response, outcome)

    def begin(self, body: bytes) -> bool:
        """Ask an upstream. False: nothing was done; whatever it is that is wrong, or has
        to be waited for, the usual way will come to it, too.
        """
        door, permit = self._proxy.admission, None
        try:
            if len(body) > self._proxy.settings.limits.body_bytes:
                return False
            asked = self._parse(body)
            if door is not None:
                permit = door.enter_now(
                    self.outcome.user,
                    self._client.remote,
                    asked.completion.feature,
                    asked.course.settings.id,
                )
                if permit is None:
                    return False
        except Exception:
            return False
        self._asked = asked
        self._begun = begun = _Begun(permit)
        try:
            begun.asked = asked = self._adjusted(asked)
            begun.attempt = attempt = self._attempt(asked, ())
        except Exception:  # it will come again, and be said
            self._go_on()
            return True
        assert attempt is not None  # nobody was tried yet
        attempt.relay.begin(self._finish, self._go_on)
        return True

    def client_gone(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._is_resting:
            return
        # What was cancelled before its first step does not even end.
        if (attempt := self._begun.attempt) is not None:
            attempt.relay.abandon()
        self.outcome.kind = "client_gone"
        self._finish()

    def _finish(self) -> None:
        """All was said without a task, or nobody is there to hear it."""
        begun, door = self._begun, self._proxy.admission
        if begun.attempt is not None:
            self._settle(begun.attempt)
        if door is not None and begun.permit is not None:
            self._leave(door, begun.permit)
        self._end()

    def _end(self) -> None:
        self.outcome.status = self.response.status
        self._proxy.ended(self)
        self._client.visited(keep_alive=self.response.keep_alive)

    def _go_on(self) -> None:
        """Let a task do the rest."""
        self._task = self._proxy.loop.create_task(self._rest())

    async def _rest(self) -> None:
        self._is_resting = True
        self._say_error = self._asked.writer.error_reply
        try:
            await self._carry_out(self._complete(self._asked, self._begun))
        except asyncio.CancelledError:
            self.outcome.kind = "client_gone"
            raise
        except ConnectionError:
            if self.outcome.kind in ("", "ok"):
                self.outcome.kind = "client_gone"
            self.response.keep_alive = False
        finally:
            self._end()


class _Page(_Request):
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
        self.response.reply(reply)
        return self.response

    async def _visit(self, page: Page, head: Head) -> Response:
        """Answer as a Sourcegraph instance does."""
        if head.method not in page.methods:
            allowed = {"Allow": ", ".join(page.methods)}
            raise MethodNotAllowed("Method Not Allowed", headers=allowed)
        if page.needs_token:
            self._check_token(head)
        body = await self._read_body() if head.method == "POST" else b""
        reply = page.answer(Visit(head, self.outcome.user, body))
        self.is_logged = page.is_logged
        if reply.status >= 400:  # a refusal in words of its own
            is_token = reply.status == Unauthorized.status
            self.outcome.kind = (Unauthorized if is_token else InvalidRequest).kind
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
        return await door.windows(self.outcome.user, self._client.remote)

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
        timeout_s = self._limit_s or settings.timeouts.chat_s
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
        self.outcome.provider = settings.id
        given = self._admit(settings)
        member = pool.pick(self._proxy.loop.time(), self)
        assert member is not None  # nobody was tried yet
        endpoint = member.endpoint
        self.outcome.endpoint = member.name
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
                    own_headers(self.outcome.id) | self._cross_origin(),
                    self.outcome,
                    work,
                    body=body,
                    without=(proxy.settings.auth_header.lower(),),
                    limit_bytes=limit,
                    deadline_s=self.started_s + timeout_s,
                    is_optional=self._path in routes.FORWARDED,
                    clients_credential=settings.client_credentials,
                )
            is_complete = self.outcome.upstream_status < 500
            return response
        except UpstreamFault as error:
            fault = error
            if path == "/health" and isinstance(error, UpstreamUnreachable):
                error.status = 503
            raise
        finally:
            pool.finished(
                member, fault, self._proxy.loop.time(), self, is_complete=is_complete
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
        self.outcome.model = model.ref
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


def _limit_s(head: Head) -> float | None:
    """How long the request may take, if its client says so."""
    text = head.headers.get("X-Timeout-Ms", "").strip()
    if text.isascii() and text.isdigit() and int(text[:9]) > 0:
        return int(text[:9]) / 1000
    return None


def _authorization(head: Head, header: str) -> str | None:
    """What the client says it may do. Anthropic's clients have a header of their own,
    and a header that was configured may hold the token alone.
    """
    given = head.headers.get(header)
    if given is not None and header != "Authorization" and credential(given) is None:
        return f"Bearer {given}"
    key = head.headers.get("X-API-Key")
    return given or (f"Bearer {key}" if key else None)
