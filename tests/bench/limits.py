"""What limits and metrics cost per request, with no sockets in between."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from proxy.config import Rates, TokenLimits
from proxy.limits import InFlight, RateCounter, plans
from proxy.metrics import Metrics
from proxy.outcome import Outcome
from proxy.usage import UsageCounter

ROUNDS = 20_000
RUNS = 7
MANY = 10**9

OUTCOME = Outcome(
    id="x",
    route="/v1/chat/completions",
    kind="ok",
    status=200,
    model="acme::v1::m",
    provider="acme",
    endpoint="127.0.0.1:8000",
    first_token_s=0.2,
    duration_s=3.0,
    prompt_tokens=10,
    completion_tokens=200,
)


def run() -> None:
    metrics = Metrics({OUTCOME.route: "openai-chat"}, UsageCounter(0.0))
    door = InFlight(1000, {"acme": 100}, 10)

    def in_and_out() -> None:
        gauges = door.gauges("ann", 5, "acme")
        door.enter(gauges)
        door.release(gauges)

    show("metrics: count an exchange", best(lambda: metrics.count(OUTCOME, 0.0)))
    show("in flight: in and out, three limits", best(in_and_out))
    asyncio.run(rates())


async def rates() -> None:
    one = plans(TokenLimits(chat=Rates(MANY)))["chat"]
    all_of_them = plans(TokenLimits(chat=Rates(MANY, MANY, MANY)))["chat"]
    for clients in (1, 1000):
        counter = RateCounter()
        for number in range(clients):
            await counter.check(f"client {number}", "chat", all_of_them)
        for name, plan in (("one", one), ("three", all_of_them)):
            us = await best_awaited(partial(counter.check, "client 0", "chat", plan))
            show(f"rates: {name} checked, {clients} clients known", us)


def show(name: str, us: float) -> None:
    print(f"{name:45} {us:6.2f} µs")


def best(function: Callable[[], None]) -> float:
    found = []
    for _ in range(RUNS):
        began_s = time.perf_counter()
        for _ in range(ROUNDS):
            function()
        found.append(time.perf_counter() - began_s)
    return min(found) / ROUNDS * 1e6


async def best_awaited(function: Callable[[], Awaitable[None]]) -> float:
    found = []
    for _ in range(RUNS):
        began_s = time.perf_counter()
        for _ in range(ROUNDS):
            await function()
        found.append(time.perf_counter() - began_s)
    return min(found) / ROUNDS * 1e6
