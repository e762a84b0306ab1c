"""One request on its way: who answers it, one endpoint after the other."""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Protocol

import msgspec
from msgspec import structs

from proxy import routes
from proxy.admission import Admission, Permit
from proxy.auth import credential
from proxy.completion import CompletionRequest, Feature
from proxy.dialects.adjust import REQUEST_FIXES, mend
from proxy.dialects.base import Chosen, Head, Reply, Writer, choose
from proxy.errors import (
    InvalidRequest,
    LimitReached,
    MethodNotAllowed,
    ProxyError,
    ShuttingDown,
    Unauthorized,
    UpstreamFault,
    drop_traceback,
)
from proxy.modelconfig.resolved import Endpoint, Provider as ProviderSettings
from proxy.outcome import Outcome
from proxy.pool import Member, Pool
from proxy.providers.base import Asked, Call, Native
from proxy.redact import BUG
from proxy.relay import Relay, Terms, shortest
from proxy.response import Client as ClientConnection, Response
from proxy.server.service import Course, Service, Wish, authorization
from proxy.server.target import Target
from proxy.upstream import prepare

logger = logging.getLogger(__name__)

MESSAGE_CHARS = 2000
# Wishes that are remembered with who answers them.
_MAX_WISHES = 1024


class Client(ClientConnection, Protocol):
    """The connection that a request came on."""

    @property
    def remote(self) -> str: ...

    def visited(self, now_s: float, *, keep_alive: bool) -> None:
        """A visit is over."""


class Begun(msgspec.Struct):
    """How far a request was answered without a task."""

    permit: Permit | None = None
    attempt: "Attempt | None" = None


class Attempt(msgspec.Struct):
    """One endpoint that is being asked."""

    member: Member
    call: Call
    relay: Relay
    pool: Pool


class Handling:
    """One request on its way; lives for as long as it is answered.

    Args: limit_s: how long the client says that it may take, None if it does not say.
    """

    is_logged = True
    _refusal: Unauthorized | None = None
    _say_error: Callable[[ProxyError], Reply]

    def __init__(
        self,
        service: Service,
        client: Client,
        target: Target,
        head: Head,
        limit_s: float | None,
        response: Response,
        outcome: Outcome,
    ) -> None:
        self._service = service
        self._client = client
        self._path = target.path
        self._incoming = target.incoming
        self._passing = target.passing
        self._head = head
        self._limit_s = limit_s
        self.response = response
        self.outcome = outcome
        self.started_s = service.loop.time()

    async def _carry_out(self, answer: Coroutine[object, object, None]) -> None:
        """Say an answer, or why there is none.

        Raises: ConnectionError: the client is gone.
        """
        try:
            await answer
        except ProxyError as error:
            self.response.reply(self._say_error(self._noted(error)))
            drop_traceback(error)
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
        if self._service.is_closed:
            raise ShuttingDown
        if head.method != "POST":
            raise MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
        self._check_token(head)
        self._incoming.check(head)

    def _check_token(self, head: Head) -> None:
        vouched = self._service.vouch(head, self._incoming)
        self.outcome.user, self._refusal = vouched

    def _admit(self, settings: ProviderSettings) -> str:
        """Return the client's own credential where the provider asks for that, or "".

        Raises: Unauthorized: nobody vouches for the client.
        """
        if not settings.client_credentials:
            if self._refusal is not None:
                raise self._refusal
            return ""
        token = credential(authorization(self._head, "Authorization"))
        if not token:
            raise Unauthorized("this model is asked with your own API key: send one")
        return token

    async def _complete(self, asked: "Asking", begun: Begun | None = None) -> None:
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

    async def _ask(self, asked: "Asking", begun: Begun | None) -> None:
        if (door := self._service.admission) is None:
            await self._ask_pool(asked, begun)
            return
        permit = begun.permit if begun is not None else None
        feature, provider = asked.completion.feature, asked.course.provider_id
        async with self._place(door, feature, provider, asked.timeout_s, permit):
            await self._ask_pool(asked, begun)

    async def _ask_pool(self, asked: "Asking", begun: Begun | None) -> None:
        pool, loop = asked.course.pool, self._service.loop
        tried: list[Member] = []
        attempt = begun.attempt if begun is not None else None
        if attempt is None:
            self._turn_knobs(asked)
            attempt = self._attempt(asked, loop.time(), tried)
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
                self._settle(attempt, loop.time())
            attempt = self._attempt(asked, loop.time(), tried)

    def _turn_knobs(self, asked: "Asking") -> None:
        """Those of the model, once, for Cody's clients; there are none for others."""
        knobs = asked.course.knobs
        if knobs is not None and not asked.is_adjusted:
            knobs.apply(asked.completion, len(asked.body))
            asked.timeout_s = knobs.timeout_s(asked.completion, asked.timeout_s)
            asked.is_adjusted = True

    def _attempt(
        self, asked: "Asking", now_s: float, tried: Collection[Member] = ()
    ) -> Attempt | None:
        """Choose the next endpoint to ask; None if there is none."""
        service, course, outcome = self._service, asked.course, self.outcome
        pool = course.pool
        member = pool.pick(now_s, self, tried)
        if member is None:
            return None
        outcome.endpoint, outcome.upstream_status = member.name, 0
        prepared = None
        try:
            call = self._call(asked, member.endpoint)
            if not asked.credential:  # mostly the same every time
                key = id(member.endpoint)
                prepared = course.prepared.get(key)
                if prepared is None or not prepared.is_of(call.url, call.headers):
                    prepared = None
                    # What is wrong with it is said when it is sent.
                    with contextlib.suppress(UpstreamFault):
                        prepared = prepare(call.url, call.headers)
                        course.prepared[key] = prepared
            relay = Relay(
                course.terms,
                self.response,
                asked.completion,
                asked.writer,
                call,
                outcome,
                self.started_s,
                asked.timeout_s,
                now_s,
                prepared,
            )
        except Exception:  # it cannot be said there: nothing was asked
            pool.finished(member, None, now_s, self, is_complete=False)
            raise
        service.started(relay)
        return Attempt(member, call, relay, pool)

    def _settle(self, attempt: Attempt, now_s: float) -> None:
        """An endpoint has been asked, however that ended."""
        service, relay = self._service, attempt.relay
        service.finished(relay)
        attempt.pool.finished(
            attempt.member,
            relay.error,
            now_s,
            self,
            is_complete=relay.is_complete(),
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
        self._service.started(self)  # so that it is told if the proxy ends meanwhile
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
            self._service.finished(self)

    def _leave(self, door: Admission, permit: Permit) -> None:
        outcome = self.outcome
        tokens = (outcome.prompt_tokens or 0) + (outcome.completion_tokens or 0)
        door.leave(permit, tokens)

    def interrupt(self) -> None:
        """End the wait for a place."""
        if self._service.admission is not None:
            self._service.admission.interrupt()

    def _call(self, asked: "Asking", endpoint: Endpoint) -> Call:
        """Hand the client's bytes on where the upstream speaks its dialect."""
        course = asked.course
        if asked.credential:
            endpoint = structs.replace(
                endpoint, access_token=asked.credential, headers={}
            )
        native: Native | None = None
        if asked.is_native:
            native = course.natives.get(id(endpoint)) or self._native(
                asked.completion, course, endpoint
            )
        if native is None or asked.chosen is None:
            return course.provider.call(asked.completion, course.model, endpoint)
        asked.completion.dropped = []
        return native.pass_on(
            self._incoming.dialect,
            asked.chosen,
            course.model,
            asked.body,
            fixes=course.fixes,
            adjust=course.settings.adjust,
        )

    def _parse(self, body: bytes) -> "Asking":
        """Say what is asked for, of which model, and of which endpoint."""
        incoming, passing, head = self._incoming, self._passing, self._head
        chosen = choose(body) if passing is not None else None
        if passing is not None and chosen is not None:
            # Where the upstream speaks the client's dialect, it says itself what is
            # wrong with the rest, and understands what cannot be translated.
            completion, writer = passing.sketch(head, chosen)
            asked = self._choose(completion, writer, body, chosen)
            if asked.is_native:
                return asked
        try:
            completion, writer = incoming.parse(head, body)
        except InvalidRequest:
            if (mended := mend(body)) is None:
                raise
            completion, writer = incoming.parse(head, mended)
            body = mended
        if passing is not None:
            chosen = choose(body)
        return self._choose(completion, writer, body, chosen)

    def _choose(
        self,
        completion: CompletionRequest,
        writer: Writer,
        body: bytes,
        chosen: Chosen | None,
        ref: str = "",
    ) -> "Asking":
        """Say who is to answer.

        Args:   chosen: None if it is of no dialect that passes.
                ref: of the model to ask instead of the one that is asked for.
        Raises: UnknownModel: nobody.
        """
        outcome, courses = self.outcome, self._service.courses
        feature, stream = completion.feature, completion.stream
        outcome.feature, outcome.stream = feature, stream
        completion.user = outcome.user
        name, fast = (ref, False) if ref else (completion.model, completion.fast)
        wish = (self._path, feature, name, fast, stream)
        course: Course | None = courses.get(wish)
        if course is None:
            course = self._find(wish, completion)
            if len(courses) >= _MAX_WISHES:  # where any name will do, there is no end
                courses.clear()
            courses[wish] = course
        outcome.model = course.ref
        outcome.provider = course.provider_id
        given = ""
        if self._refusal is not None or course.terms.clients_credential:
            given = self._admit(course.settings)
        return Asking(
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

    def _find(self, wish: Wish, completion: CompletionRequest) -> Course:
        """Raises: UnknownModel"""
        service, incoming = self._service, self._incoming
        path, feature, name, fast, _ = wish
        model = service.models.choose(feature, name, fast)
        settings = service.models.providers[model.provider_id]
        provider, timeouts = service.providers[settings.id], settings.timeouts
        terms = Terms(
            upstream=service.upstreams[settings.id],
            loop=service.loop,
            log=service.log,
            redact=service.redact,
            source=provider.source,
            event_bytes=service.settings.limits.event_bytes,
            verbose=settings.verbose_logs,
            timeouts=timeouts,
            connect_s=timeouts.connect_s,
            keep_alive=service.settings.keep_alive,
            reply_headers=routes.reply_headers(path, model),
            clients_credential=settings.client_credentials,
            shortest_s=shortest(timeouts, service.settings.keep_alive),
        )
        course = Course(
            model,
            model.ref,
            settings,
            settings.id,
            provider,
            service.pools[settings.id],
            service.knobs[model.ref] if incoming.dialect == "cody" else None,
            terms,
            timeouts.chat_s if feature == "chat" else timeouts.code_s,
            REQUEST_FIXES[settings.server_profile],
        )
        if self._passing is not None:
            native = self._native(completion, course, settings.endpoints[0])
            course.is_native = native is not None
        return course

    def _with_model(self, asked: "Asking", ref: str) -> "Asking":
        """The same request for another model."""
        if asked.is_native:
            other = self._choose(
                asked.completion, asked.writer, asked.body, asked.chosen, ref
            )
            if other.is_native:
                return other
        # What the first model made of it is not for this one; or it just passed.
        parsed = self._incoming.parse(self._head, asked.body)
        return self._choose(*parsed, asked.body, asked.chosen, ref)

    def _native(
        self, completion: CompletionRequest, course: Course, endpoint: Endpoint
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
        message = self._service.redact(error.message)
        if len(message) > MESSAGE_CHARS:  # it quotes something of the client's
            message = f"{message[:MESSAGE_CHARS]}…"
        error.message = message
        return error

    def _bug(self) -> ProxyError:
        logger.error(BUG, self.outcome.id, self._service.redact.trace())
        return ProxyError(f"internal error of the proxy, logged as {self.outcome.id}")


class Asking(msgspec.Struct):
    """What a request asks for, and who is to answer it.

    ``is_native`` if the upstream speaks the client's dialect, so that ``body`` passes.
    ``credential`` is the client's own, where the upstream is asked with that.
    ``is_adjusted`` once the model's knobs are turned.
    """

    completion: CompletionRequest
    writer: Writer
    body: bytes
    chosen: Chosen | None
    course: Course
    is_native: bool
    credential: str
    is_fallback: bool
    timeout_s: float
    is_adjusted: bool = False
