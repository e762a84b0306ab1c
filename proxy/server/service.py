"""What requests share, and what is known of them all."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from proxy import heads, routes
from proxy.admission import admission
from proxy.auth import NOT_GIVEN, Access, credential
from proxy.completion import Feature
from proxy.config import Settings
from proxy.cors import Origins, is_foreign
from proxy.dialects.adjust import Fix
from proxy.dialects.base import Head, Incoming, Reply
from proxy.errors import ForeignOrigin, Unauthorized
from proxy.instance import Instance
from proxy.interrupt import Interruptible, Work
from proxy.knobs import Knobs, knobs_of
from proxy.log import ExchangeLog
from proxy.metrics import Board, Metrics
from proxy.modelconfig.resolved import Model, Provider as ProviderSettings
from proxy.outcome import Outcome, rounded
from proxy.pool import Pool
from proxy.providers import PROVIDERS
from proxy.providers.base import Native, Provider
from proxy.redact import Redactor
from proxy.relay import AHEAD_S, Relay, Terms
from proxy.server.target import Known, Target
from proxy.upstream import Prepared, Upstream
from proxy.usage import UsageCounter

# Path, feature, name of the model ("" for the default one), fast or not, streamed or not.
Wish: TypeAlias = tuple[str, Feature, str, bool, bool]


class Course(msgspec.Struct):
    """Who answers a wish; found once for all requests with the same one.

    ``natives`` says by the endpoint's identity how the client's bytes are handed on,
    and ``prepared`` how that request begins.
    """

    model: Model
    ref: str
    settings: ProviderSettings
    provider_id: str
    provider: Provider
    pool: Pool
    knobs: Knobs | None
    terms: Terms
    timeout_s: float
    fixes: tuple[Fix, ...]
    is_native: bool = False
    natives: dict[int, Native | None] = {}
    prepared: dict[int, Prepared] = {}


class Service:
    """What outlives a request."""

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
        self.body_bytes = settings.limits.body_bytes
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
        self.incoming = routes.incoming(settings)
        self.board = board
        usage = UsageCounter(time.time())
        self.metrics = Metrics(routes.dialects(self.incoming), usage)
        self._tell(self.metrics)
        self.courses: dict[Wish, Course] = {}
        self.targets: dict[str, Target] = {}  # by first lines
        self.known: dict[heads.Head, Known] = {}  # by heads
        self.origins = Origins(settings.origins) if settings.origins else None
        self.knobs = knobs_of(settings.models)
        self.instance = Instance(settings, self.access, self._usage_page)

    def take_over(self, old: "Service") -> None:
        """Go on with what another one counted that this one replaces."""
        if self.admission is not None and old.admission is not None:
            self.admission = old.admission
            self.admission.configure(self.settings)
        self.metrics = metrics = old.metrics
        metrics.name(routes.dialects(self.incoming))
        self._tell(metrics)
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
        metrics = self.metrics
        body, content_type = metrics.page(accept, self._other_counts())
        return Reply(200, content_type, body)

    def _usage_page(self, user: str) -> Reply:
        metrics = self.metrics
        return metrics.usage.reply(user, metrics.used(self._other_counts()))

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

    def ended(
        self, outcome: Outcome, started_s: float, ended_s: float, *, is_logged: bool
    ) -> None:
        """Write down how a request was answered. Args: both times: on the loop's clock."""
        outcome.duration_s = rounded(ended_s - started_s)
        outcome.kind = outcome.kind or "ok"
        now_s, metrics = time.time(), self.metrics
        metrics.count(outcome, now_s)
        if is_logged or outcome.kind != "ok":
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
            token = self.access.check(authorization(head, settings.auth_header))
        except Unauthorized as refusal:
            if incoming.dialect != "cody" and refusal.message == NOT_GIVEN:
                refusal.message = (
                    "no token given: send the header Authorization: Bearer …"
                )
            if not self.takes_clients_credentials:
                raise
            return "", refusal
        return token.name if token is not None else "", None


def authorization(head: Head, header: str) -> str | None:
    """What the client says it may do. Anthropic's clients have a header of their own,
    and a header that was configured may hold the token alone.
    """
    given = head.headers.get(header)
    if given is not None and header != "Authorization" and credential(given) is None:
        return f"Bearer {given}"
    key = head.headers.get("X-API-Key")
    return given or (f"Bearer {key}" if key else None)
