"""Kill -9 under load: clients see replies, errors in their dialect, and nothing else.

The clients are those of ``make soak``, without their worst habits; ``pytest -s`` prints
what they saw.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak import check, servers
from tests.soak.clients import Load
from tests.soak.servers import Process
from tests.support.process import until
from tests.support.redis import RedisServer

HABITS = ("converses", "reads slowly", "leaves in between")
CLIENTS = 20
# Around the kill, which is in the middle.
LOAD_S = 4.0
ALONE = "counts rates for itself"


@pytest.fixture
async def endpoints(tmp_path: Path) -> AsyncIterator[tuple[Process, Process]]:
    """Two simulators, each a process."""
    async with (
        started(servers.simulator(tmp_path, "first")) as first,
        started(servers.simulator(tmp_path, "second")) as second,
    ):
        yield first, second


@contextlib.asynccontextmanager
async def started(process: Process) -> AsyncIterator[Process]:
    try:
        yield await process.start()
    finally:
        await process.stop()


@contextlib.asynccontextmanager
async def proxied(
    directory: Path,
    endpoints: tuple[Process, Process],
    workers: int = 1,
    redis_url: str | None = None,
) -> AsyncIterator[Process]:
    config = directory / "proxy.yaml"
    servers.write_config(config, [each.url for each in endpoints], redis_url)
    async with started(servers.proxy(directory, config, workers)) as proxy:
        yield proxy


def show(load: Load, outcomes: list[dict[str, Any]]) -> None:
    tables = check.seen_table(load.asks), check.kinds_table(outcomes)
    sys.stdout.write("\n{}\n\n{}\n".format(*tables))


async def test_one_of_two_endpoints_is_killed(endpoints, tmp_path):
    async with proxied(tmp_path, endpoints) as proxy:
        load = Load(proxy.url, 1, habits=HABITS, faulty=0)
        loading = asyncio.create_task(load.run(CLIENTS, LOAD_S))
        await asyncio.sleep(LOAD_S / 2)
        killed_s = time.monotonic()
        await endpoints[1].kill()
        await loading
    outcomes, rest = check.log_lines(proxy.out)
    show(load, outcomes)
    assert load.violations == [] and rest == []
    assert check.compare(load.asks, outcomes) == []
    # Only what the endpoint was just saying is lost; the rest others answer.
    failed = [ask for ask in load.asks if ask.seen == "error"]
    assert all(ask.began_s < killed_s for ask in failed)
    kinds = {outcome["kind"] for outcome in outcomes}
    assert kinds <= {"ok", "client_gone", "upstream_truncated"}
    assert any(outcome.get("tried") for outcome in outcomes)
    later = [ask for ask in load.asks if ask.began_s > killed_s]
    assert Counter(ask.seen for ask in later)["ok"] > CLIENTS


async def test_one_of_two_workers_is_killed(endpoints, tmp_path):
    killed_s: list[float] = []

    def may_break(begun_s: float, ended_s: float) -> bool:
        return any(begun_s <= at_s <= ended_s for at_s in killed_s)

    async with proxied(tmp_path, endpoints, workers=2) as proxy:
        load = Load(proxy.url, 2, habits=HABITS, faulty=0, may_break=may_break)
        loading = asyncio.create_task(load.run(CLIENTS, LOAD_S))
        await asyncio.sleep(LOAD_S / 2)
        victim = proxy.children[0]
        killed_s.append(time.monotonic())
        os.kill(victim, signal.SIGKILL)
        await loading
        await until(lambda: len({*proxy.children} - {victim}) == 2)
    outcomes, rest = check.log_lines(proxy.out)
    show(load, outcomes)
    assert load.violations == [] and rest == []
    assert check.compare(load.asks, outcomes, may_be_lost=may_break) == []
    seen = Counter(ask.seen for ask in load.asks)
    assert 0 < seen["cut"] <= CLIENTS and seen["error"] == 0
    assert {outcome["kind"] for outcome in outcomes} <= {"ok", "client_gone"}


async def test_redis_is_killed(endpoints, tmp_path):
    redis = await RedisServer(tmp_path).start()
    try:
        async with proxied(tmp_path, endpoints, redis_url=redis.url) as proxy:
            habits = ("is limited", "converses")
            load = Load(proxy.url, 3, habits=habits, faulty=0)
            loading = asyncio.create_task(load.run(CLIENTS, LOAD_S))
            await asyncio.sleep(LOAD_S / 2)
            await redis.kill()
            await loading
            # On a busy machine nobody with a limit may have come since.
            for _ in range(5):
                if ALONE not in proxy.said:
                    await load.run(CLIENTS, 1)
    finally:
        await redis.kill()
    outcomes, rest = check.log_lines(proxy.out)
    show(load, outcomes)
    assert load.violations == [] and rest == []
    assert check.compare(load.asks, outcomes) == []
    failed = [ask for ask in load.asks if ask.seen == "error"]
    # Errors are only what the limits say.
    assert all(ask.habit == "is limited" for ask in failed)
    assert {ask.status for ask in failed} <= {429}
    assert ALONE in proxy.said
