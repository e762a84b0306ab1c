"""The door: lets a request in at once, when it is its turn, or not at all.

What a request may do is decided in ``limits``; here it waits for that.
"""

import asyncio
from collections.abc import Coroutine, Mapping

import msgspec

from proxy.completion import Feature
from proxy.config import Settings
from proxy.dialects.base import RETRY_AFTER_S
from proxy.dialects.gateway import Window
from proxy.errors import LimitReached, QueueFull, QueueTimeout, ShuttingDown
from proxy.limits import (
    FEATURES,
    Gauge,
    Gauges,
    InFlight,
    Plan,
    RateCounter,
    plans,
)
from proxy.outcome import rounded


class Permit(msgspec.Struct):
    """Of a request that was let in; ``waited_s`` is None if it was at once."""

    client: str
    plan: Plan
    gauges: Gauges
    waited_s: float | None = None


class Admission:
    """Every ``enter`` that returns is followed by one ``leave``."""

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.in_flight = InFlight(None, {}, 0)
        self.rates = RateCounter(settings.limits.redis)
        self._outdated: list[RateCounter] = []  # of former settings
        self._waiting: set[asyncio.Future[None]] = set()
        self._spending: set[asyncio.Task[None]] = set()
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Go by other settings from now on."""
        limits = settings.limits
        if limits.redis != self.rates.redis:
            self._outdated.append(self.rates)
            self.rates = RateCounter(limits.redis)
        per_provider = {
            id: provider.in_flight
            for id, provider in settings.models.providers.items()
            if provider.in_flight is not None
        }
        self._waiting_s = settings.timeouts.waiting_s
        self._default = plans(limits.token)
        self._plans = {
            token.name: plans(token.limits)
            for token in settings.tokens
            if token.limits is not None
        }
        in_flight = self.in_flight
        in_flight.configure(limits.in_flight, per_provider, limits.waiting)

    async def enter(
        self,
        user: str,
        address: str,
        feature: Feature,
        provider: str,
        until_s: float,
        *,
        is_counted: bool = False,
    ) -> Permit:
        """Let a request in.

        Args:   user: the name of its token, "" if none was asked for; then ``address``
                      is whose limits count.
                until_s: when it is too late, on the loop's clock.
                is_counted: its rates are: it was let in before, for another provider.
        Raises: LimitReached: it is not let in.
                ShuttingDown: nor anybody else.
        """
        client, all_plans = self._of(user, address)
        plan = all_plans[feature]
        if not is_counted and (plan.requests or plan.tokens is not None):
            await self.rates.check(client, feature, plan)
        in_flight = self.in_flight
        gauges = in_flight.gauges(client, plan.in_flight, provider)
        blocked_by = in_flight.enter(gauges)
        permit = Permit(client, plan, gauges)
        if blocked_by is not None:
            since_s = self._loop.time()
            until_s = min(until_s, since_s + self._waiting_s)
            await self._wait(gauges, blocked_by, feature, until_s)
            permit.waited_s = rounded(self._loop.time() - since_s)
        return permit

    def enter_now(
        self, user: str, address: str, feature: Feature, provider: str
    ) -> Permit | None:
        """Let a request in if nothing has to be waited for; None if it has.

        Raises: LimitReached: like ``enter``.
        """
        client, all_plans = self._of(user, address)
        plan: Plan = all_plans[feature]
        is_rated = bool(plan.requests) or plan.tokens is not None
        if is_rated and self.rates.redis is not None:
            return None
        in_flight = self.in_flight
        gauges = in_flight.gauges(client, plan.in_flight, provider)
        if in_flight.enter(gauges) is not None:
            in_flight.forget(gauges)
            return None
        if is_rated:
            try:
                if len(plan.requests) + (plan.tokens is not None) > 1:
                    # Who is refused asks again by ``enter``, and that counts.
                    _at_once(self.rates.test(client, feature, plan))
                _at_once(self.rates.check(client, feature, plan))
            except BaseException:
                in_flight.release(gauges)
                raise
        return Permit(client, plan, gauges)

    def _of(self, user: str, address: str) -> tuple[str, Mapping[Feature, Plan]]:
        """Return whose limits count, and which."""
        return user or f"address {address}", self._plans.get(user, self._default)

    async def windows(self, user: str, address: str) -> dict[str, Window]:
        """Return what is left of a client's day, by Sourcegraph's name of the feature."""
        client, all_plans = self._of(user, address)
        found = {}
        for feature, plan in all_plans.items():
            for rate in plan.requests:
                if rate.per == "day":
                    left = await self.rates.window(client, rate)
                    amount = rate.item.amount
                    used = amount - left.remaining
                    found[FEATURES[feature]] = Window(amount, used, left.reset_time)
        return found

    async def _wait(
        self, gauges: Gauges, blocked_by: Gauge, feature: Feature, until_s: float
    ) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not turn.done():
                turn.set_result(None)

        in_flight = self.in_flight
        waiter = in_flight.wait(gauges, blocked_by, wake)
        if waiter is None:
            raise _refusal(QueueFull, blocked_by, feature)
        self._waiting.add(turn)
        try:
            async with asyncio.timeout_at(until_s):
                await turn
        except TimeoutError:
            in_flight.leave(waiter)
            raise _refusal(QueueTimeout, blocked_by, feature) from None
        except BaseException:  # the client has left, or the proxy ends
            in_flight.leave(waiter)
            raise
        finally:
            self._waiting.discard(turn)

    def leave(self, permit: Permit, tokens: int) -> None:
        """Args: tokens: how many the request took, of its prompt and its answer."""
        in_flight = self.in_flight
        in_flight.release(permit.gauges)
        rate = permit.plan.tokens
        if rate is not None and tokens > 0:
            spend = self.rates.spend(permit.client, rate, tokens)
            task = self._loop.create_task(spend)
            self._spending.add(task)
            task.add_done_callback(self._spending.discard)

    async def close(self) -> None:
        if self._spending:
            await asyncio.wait(self._spending)
        for rates in (*self._outdated, self.rates):
            await rates.close()

    def interrupt(self) -> None:
        """Turn away whoever waits."""
        for turn in list(self._waiting):
            if not turn.done():
                turn.set_exception(ShuttingDown())


def admission(settings: Settings, loop: asyncio.AbstractEventLoop) -> Admission | None:
    """Return the door, None if everybody may enter."""
    own = [token.limits for token in settings.tokens if token.limits is not None]
    by_client = [
        plan
        for limits in (settings.limits.token, *own)
        for plan in plans(limits).values()
    ]
    is_limited = (
        settings.limits.in_flight is not None
        or any(p.in_flight is not None for p in settings.models.providers.values())
        or any(p.in_flight is not None or p.requests or p.tokens for p in by_client)
    )
    return Admission(settings, loop) if is_limited else None


def _at_once(work: Coroutine[object, object, None]) -> None:
    """Run what does not wait, though it could: memory answers in no time."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise AssertionError("counters in memory are not waited for")


def _refusal(
    kind: type[QueueFull | QueueTimeout], gauge: Gauge, feature: Feature
) -> LimitReached:
    whose = {
        "all": "of this proxy",
        "provider": f"of {gauge.name}",
        "token": f'for "{FEATURES[feature]}"',
    }[gauge.scope]
    is_full = kind is QueueFull
    then = "and the queue is full" if is_full else "and none became free in time"
    return kind(
        f"too many requests at a time: the limit {whose} is {gauge.amount}, {then};"
        f" try again in {RETRY_AFTER_S} s",
        limit="inFlight" if gauge.scope == "all" else f"{gauge.scope}.inFlight",
        amount=gauge.amount,
        feature=FEATURES[feature],
        retry_after_s=RETRY_AFTER_S,
        # Too much of one client is its own doing, of all together it is not.
        status=429 if gauge.scope == "token" else 503,
    )
