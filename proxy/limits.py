"""How much may be asked for: requests in flight at a time, and rates per client.

What is decided here is decided at once: who has a place, who waits for one and who is
next. The waiting itself is ``admission``'s. Rates are counted by the library `limits`,
in fixed windows that begin with the first request, as Sourcegraph's do. It is imported
where rates are configured: it and what it needs take 30 ms of a start, and 2.5 MiB.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import msgspec

from proxy.completion import Feature
from proxy.config import Rates as RateSettings, TokenLimits
from proxy.errors import RateLimited

if TYPE_CHECKING:
    from limits import RateLimitItem, WindowStats
    from limits.aio.strategies import FixedWindowRateLimiter, RateLimiter
    from redis.asyncio import ConnectionPool

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long an answer of Redis is waited for, for how long it is left alone if there was
# none, and how often that is said.
REDIS_S = 0.5
REDIS_PAUSE_S = 1.0
WARNING_S = 60.0

# What Sourcegraph calls the features.
FEATURES: dict[Feature, str] = {"chat": "chat_completions", "code": "code_completions"}

# ------------------------------------------------------------------ requests in flight

Scope: TypeAlias = Literal["all", "provider", "token"]


class Gauge:
    """Places for requests: how many there are, are taken and are waited for."""

    __slots__ = ("amount", "held", "name", "scope", "used", "waiting")

    def __init__(self, scope: Scope, name: str, amount: int) -> None:
        self.scope = scope
        self.name = name
        self.amount = amount
        self.used = 0
        self.waiting = 0
        self.held = 0  # by requests, wherever they are


Gauges: TypeAlias = tuple[Gauge, ...]


class Waiter:
    """A request in the queue. ``wake`` is called once it has its places."""

    __slots__ = ("blocked_by", "gauges", "has_place", "wake")

    def __init__(
        self, gauges: Gauges, blocked_by: Gauge, wake: Callable[[], None]
    ) -> None:
        self.gauges = gauges
        self.blocked_by = blocked_by
        self.wake = wake
        self.has_place = False


class InFlight:
    """Places in flight and the queue for them.

    A request needs a place in each of its gauges. One that finds all of them waits, and
    is not overtaken by a later one that needs the same place; one that needs other
    places goes ahead. Of each gauge at most ``most_waiting`` requests wait, so a client
    that uses up its own places does not fill the queue for the others.
    """

    def __init__(
        self, total: int | None, per_provider: Mapping[str, int], most_waiting: int
    ) -> None:
        self._total: Gauge | None = None
        self._providers: dict[str, Gauge] = {}
        self._clients: dict[str, Gauge] = {}
        # In the order of arrival; a dict, so that leaving costs nothing.
        self._queue: dict[Waiter, None] = {}
        self.configure(total, per_provider, most_waiting)

    def configure(
        self, total: int | None, per_provider: Mapping[str, int], most_waiting: int
    ) -> None:
        """Change the numbers; who has a place or waits for one keeps it."""
        self._most_waiting = most_waiting
        self._total = _changed(self._total, "all", "", total)
        self._providers = {
            id: gauge
            for id, amount in per_provider.items()
            if (gauge := _changed(self._providers.get(id), "provider", id, amount))
        }
        self._admit()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def gauges(self, client: str, amount: int | None, provider: str) -> Gauges:
        """Return what limits a request, the narrowest first.

        It is held on to until ``release``, ``leave`` or ``forget``, or until ``wait``
        says no.

        Args: client: whoever the limit ``amount`` is for; None: as many as it likes.
        """
        found: list[Gauge] = []
        gauge: Gauge | None
        if amount is not None:
            gauge = self._clients.get(client)
            if gauge is None:
                gauge = self._clients[client] = Gauge("token", client, amount)
            gauge.amount = amount
            gauge.held += 1
            found.append(gauge)
        if (gauge := self._providers.get(provider)) is not None:
            found.append(gauge)
        if self._total is not None:
            found.append(self._total)
        return tuple(found)

    def enter(self, gauges: Gauges) -> Gauge | None:
        """Take the places, or return what has none."""
        gauge: Gauge
        for gauge in gauges:
            if gauge.used >= gauge.amount:
                return gauge
        for gauge in gauges:
            gauge.used += 1
        return None

    def wait(
        self, gauges: Gauges, blocked_by: Gauge, wake: Callable[[], None]
    ) -> Waiter | None:
        """Join the queue; None if it is full. The caller ends it with ``leave``."""
        if blocked_by.waiting >= self._most_waiting:
            self.forget(gauges)
            return None
        blocked_by.waiting += 1
        waiter = Waiter(gauges, blocked_by, wake)
        self._queue[waiter] = None
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Give up: the place in the queue, or those that were just got."""
        if waiter.has_place:
            self.release(waiter.gauges)
        else:
            self._unqueue(waiter)
            self.forget(waiter.gauges)

    def release(self, gauges: Gauges) -> None:
        """Give the places back, and let those in whom they suffice, in their order."""
        gauge: Gauge
        for gauge in gauges:
            gauge.used -= 1
        if self._queue:
            self._admit()
        self.forget(gauges)

    def _admit(self) -> None:
        total = self._total
        for waiter in list(self._queue):
            if total is not None and total.used >= total.amount:
                return
            if self.enter(waiter.gauges) is None:
                self._unqueue(waiter)
                waiter.has_place = True
                waiter.wake()

    def _unqueue(self, waiter: Waiter) -> None:
        del self._queue[waiter]
        waiter.blocked_by.waiting -= 1

    def forget(self, gauges: Gauges) -> None:
        """Let go of gauges in which no place was taken."""
        # Clients may be addresses, of which there is no end.
        first: Gauge | None = gauges[0] if gauges else None
        if first is not None and first.scope == "token":
            first.held -= 1
            if not first.held:
                del self._clients[first.name]


def _changed(
    gauge: Gauge | None, scope: Scope, name: str, amount: int | None
) -> Gauge | None:
    if amount is None:
        return None
    if gauge is None:
        return Gauge(scope, name, amount)
    gauge.amount = amount
    return gauge


# ------------------------------------------------------------------------------- rates


Unit: TypeAlias = Literal["requests", "tokens"]
Period: TypeAlias = Literal["minute", "day"]


class Rate(msgspec.Struct, frozen=True):
    """One limit: ``name`` as in the configuration."""

    name: str
    unit: Unit
    per: Period
    item: "RateLimitItem"


class Plan(msgspec.Struct, frozen=True):
    """What one client may do with one feature."""

    in_flight: int | None
    requests: tuple[Rate, ...]
    tokens: Rate | None


def plans(limits: TokenLimits) -> dict[Feature, Plan]:
    return {
        "chat": _plan("chat", limits.in_flight, limits.chat),
        "code": _plan("code", limits.in_flight, limits.code),
    }


def _plan(feature: Feature, in_flight: int | None, rates: RateSettings) -> Plan:
    requests = []
    # What the minute refuses is not counted for the day.
    if (amount := rates.requests_per_minute) is not None:
        name = f"{feature}.requestsPerMinute"
        requests.append(_rate(name, "requests", "minute", amount))
    if (amount := rates.requests_per_day) is not None:
        name = f"{feature}.requestsPerDay"
        requests.append(_rate(name, "requests", "day", amount))
    tokens = None
    if (amount := rates.tokens_per_day) is not None:
        tokens = _rate(f"{feature}.tokensPerDay", "tokens", "day", amount)
    return Plan(in_flight, tuple(requests), tokens)


def _rate(name: str, unit: Unit, per: Period, amount: int) -> Rate:
    from limits import RateLimitItemPerDay, RateLimitItemPerMinute

    kind = RateLimitItemPerDay if per == "day" else RateLimitItemPerMinute
    return Rate(name, unit, per, kind(amount))


class RateCounter:
    """Counts what clients ask for, here or in Redis.

    While Redis does not answer each process counts for itself: an outage of it neither
    stops the service nor lifts the limits. ``failures`` counts the questions to which
    there was no answer.
    """

    def __init__(
        self, redis: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.redis = redis
        self._clock = clock
        self._redis: FixedWindowRateLimiter | None = None
        self._failed: tuple[type[Exception], ...] = (OSError,)
        self._pool: ConnectionPool | None = None
        if redis:
            self._pool = _redis_pool(redis)
            self._redis, errors = _redis_limiter(self._pool)
            self._failed += errors
        self._ask_redis_at_s = 0.0
        self._warn_at_s = 0.0
        self.failures = 0

    @cached_property
    def _here(self) -> "FixedWindowRateLimiter":
        from limits.aio.strategies import FixedWindowRateLimiter

        from proxy.memory_storage import MemoryStorage

        return FixedWindowRateLimiter(MemoryStorage(self._clock))

    async def check(self, client: str, feature: Feature, plan: Plan) -> None:
        """Count one request. Raises: RateLimited."""
        for rate in plan.requests:
            await self._check(client, feature, rate, 1)
        if plan.tokens is not None:
            # How many it takes is known at its end: one that begins in time may end
            # beyond the limit.
            await self._check(client, feature, plan.tokens, 0)

    async def test(self, client: str, feature: Feature, plan: Plan) -> None:
        """Say whether a request may be counted. Raises: RateLimited."""
        for rate in plan.requests:
            await self._check(client, feature, rate, 0)
        if plan.tokens is not None:
            await self._check(client, feature, plan.tokens, 0)

    async def spend(self, client: str, rate: Rate, tokens: int) -> None:
        """Count the tokens that a request took."""
        await self._ask(
            lambda limiter: limiter.hit(rate.item, client, rate.name, cost=tokens)
        )

    async def window(self, client: str, rate: Rate) -> "WindowStats":
        """Return how much is left, and until when."""
        return await self._ask(
            lambda limiter: limiter.get_window_stats(rate.item, client, rate.name)
        )

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.disconnect()

    async def _check(
        self, client: str, feature: Feature, rate: Rate, cost: int
    ) -> None:
        async def refused(limiter: "RateLimiter") -> "WindowStats | None":
            allows = limiter.hit if cost else limiter.test
            if await allows(rate.item, client, rate.name):
                return None
            return await limiter.get_window_stats(rate.item, client, rate.name)

        window = await self._ask(refused)
        if window is not None:
            raise RateLimited(
                limit=f"token.{rate.name}",
                amount=rate.item.amount,
                used=rate.item.amount - window.remaining,
                unit=rate.unit,
                per=rate.per,
                feature=FEATURES[feature],
                retry_at_s=window.reset_time,
                now_s=self._clock(),
            )

    async def _ask(self, question: Callable[["RateLimiter"], Awaitable[T]]) -> T:
        if self._redis is not None and self._clock() >= self._ask_redis_at_s:
            try:
                return await question(self._redis)
            except self._failed as error:
                self._note_failure(error)
        return await question(self._here)

    def _note_failure(self, error: Exception) -> None:
        now_s = self._clock()
        self.failures += 1
        self._ask_redis_at_s = now_s + REDIS_PAUSE_S
        if now_s >= self._warn_at_s:
            self._warn_at_s = now_s + WARNING_S
            # Not the error's text: it may name the address with its password.
            logger.warning(
                "Redis does not answer (%s); until it does, each process counts rates "
                "for itself",
                type(error).__name__,
            )


def _redis_pool(url: str) -> "ConnectionPool":
    from redis.asyncio import ConnectionPool
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    return ConnectionPool.from_url(
        url,
        socket_timeout=REDIS_S,
        socket_connect_timeout=REDIS_S,
        retry=Retry(NoBackoff(), 0),
    )


def _redis_limiter(
    pool: "ConnectionPool",
) -> tuple["FixedWindowRateLimiter", tuple[type[Exception], ...]]:
    """Return also what it raises where Redis does not answer."""
    from limits.aio.storage import RedisStorage
    from limits.aio.strategies import FixedWindowRateLimiter

    storage = RedisStorage(
        "async+redis://",
        implementation="redispy",
        key_prefix="completions-proxy",
        # The library names the types of few options, but passes all on.
        connection_pool=pool,  # type: ignore[arg-type]
    )
    errors = storage.base_exceptions
    all_errors = errors if isinstance(errors, tuple) else (errors,)
    return FixedWindowRateLimiter(storage), all_errors
