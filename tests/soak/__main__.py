"""The proxy under everything at once: ``python -m tests.soak [--minutes N]``.

Clients of every dialect, many with bad habits, in front of two endpoints of which one
is sick now and then, killed and started again, and of models that fail in every way
the simulator knows. At the end: does the log have one line for each request that says
what its client saw, did everything end, is nothing left open, and has memory stayed
flat? Then the same for a short time with two workers, one killed after the other.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.load import machine
from tests.soak import check, servers
from tests.soak.clients import Load
from tests.support.metrics import scrape
from tests.support.redis import RedisServer

MIB = 1 << 20
CLIENTS = 60
PROGRESS_S = 10
# The load pauses so often, and memory is measured when nothing runs: what it rises by
# from the second pause to the last is what stays.
ROUNDS = 5
WARM_UP = 2
GROWTH_BYTES = 10 * MIB
# An idle upstream connection is kept for 30 s and looked for every 30 s.
QUIET_S = 65
WORKERS_S = 25
KILL_EVERY_S = 4
# Connections may still be made to a worker that was killed, for so long at most: one
# that is killed again and again listens no more until its successor is there.
GONE_S = 0.5
_HEADERS = {"Authorization": f"Bearer {servers.TOKEN}"}


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak = Soak(Path(directory), options.minutes, options.clients, options.seed)
        return asyncio.run(soak.run())


class Soak:
    def __init__(
        self, directory: Path, minutes: float, clients: int, seed: int
    ) -> None:
        self._directory = directory
        self._seconds = minutes * 60
        self._clients = clients
        self._seed = seed
        self._config = directory / "proxy.yaml"
        self._steady = servers.simulator(directory, "steady")
        self._sick = servers.simulator(directory, "sick", "status=503+for=3+pause=12")
        self._redis = RedisServer(directory) if servers.has_redis() else None
        # Its connections are kept for as long as they last.
        self._redis_port = self._redis.port if self._redis is not None else 0
        self._kills = {"endpoint": 0, "Redis": 0, "worker": 0}
        self._at_rest: list[int] = []  # bytes, after each round
        self._most_bytes = self._most_files = 0
        self._violations: list[str] = []

    async def run(self) -> int:
        print(f"seed {self._seed}, {self._clients} clients", flush=True)
        try:
            await self._steady.start()
            await self._sick.start()
            if self._redis is not None:
                await self._redis.start()
            url = self._redis.url if self._redis is not None else None
            endpoints = [self._steady.url, self._sick.url]
            servers.write_config(self._config, endpoints, url)
            await self._in_one_process()
            await self._with_workers()
        finally:
            await self._steady.stop()
            await self._sick.stop()
            if self._redis is not None:
                await self._redis.kill()
        print(f"\nviolations: {len(self._violations)}")
        for violation in self._violations[:40]:
            print(f"  {violation}")
        return 1 if self._violations else 0

    # ----------------------------------------------------------------- in one process

    async def _in_one_process(self) -> None:
        proxy = servers.proxy(self._directory, self._config)
        await proxy.start()
        try:
            await self._soak(proxy)
        finally:
            status = await proxy.stop()
        if status:
            self._violations.append(f"the proxy ended with {status}: {proxy.said}")

    async def _soak(self, proxy: servers.Process) -> None:
        load = Load(proxy.url, self._seed)
        await scrape(f"{proxy.url}/-/metrics", _HEADERS)  # whatever is made at first
        files, sockets = await servers.settled(proxy.pid, 0, 0, self._redis_port)
        start = machine.rss_bytes(proxy.pid)
        began_s, cpu_s = time.monotonic(), machine.cpu_s(proxy.pid)
        async with contextlib.AsyncExitStack() as stack:
            for helper in (self._watch(proxy, load, began_s), self._kill_servers()):
                task = asyncio.create_task(helper)
                stack.push_async_callback(_cancelled, task)
            for _ in range(ROUNDS):
                await load.run(self._clients, self._seconds / ROUNDS)
                self._at_rest.append(machine.rss_bytes(proxy.pid))
        cpu_s = machine.cpu_s(proxy.pid) - cpu_s
        took_s = time.monotonic() - began_s
        print(f"{'':6}quiet; what is idle is closed within {QUIET_S} s", flush=True)
        left_files, left_sockets = await servers.settled(
            proxy.pid, files, QUIET_S, self._redis_port
        )
        page = await scrape(f"{proxy.url}/-/metrics", _HEADERS)
        outcomes, rest = check.log_lines(proxy.out)
        self._violations += load.violations + check.compare(load.asks, outcomes)
        self._violations += [f"no line of the log: {line[:200]}" for line in rest]
        if "this is a bug" in proxy.said or "Traceback" in proxy.said:
            self._violations.append(f"a bug: {proxy.said[-3000:]}")
        self._expect("files open", left_files, files)
        self._expect("sockets open", left_sockets, sockets)
        for name in ("in_flight", "waiting"):
            self._expect(name, page.value(name), 0)
        in_use = page.value("upstream_connections", state="in_use")
        self._expect("upstream connections in use", in_use, 0)
        # The scrape has one itself.
        self._expect("client connections", page.value("client_connections"), 1)
        # That of the page itself is not yet.
        counted = page.value("exchanges_total") - 1
        logged = sum(bool(outcome.get("client")) for outcome in outcomes)
        self._expect("requests counted, of those with lines,", counted, logged)
        growth = self._at_rest[-1] - self._at_rest[WARM_UP - 1]
        if growth > GROWTH_BYTES:
            self._violations.append(f"memory grows: {growth / MIB:.1f} MiB")
        print(f"\n{check.seen_table(load.asks)}")
        print(f"\n{check.kinds_table(outcomes)}\n")
        asked = len(load.asks)
        plain = [
            ask.seen
            for ask in load.asks
            if ask.model in (servers.STEADY, servers.TGI) and ask.habit == "converses"
        ]
        unheard = sum(
            ask.seen == "refused" and not ask.expected_kinds for ask in load.asks
        )
        retried = sum("tried" in outcome for outcome in outcomes)
        figures = [
            ("one process", ""),
            ("time, s", f"{took_s:.0f}"),
            ("requests", f"{asked} ({asked / took_s:.0f}/s)"),
            ("CPU of the proxy, s", f"{cpu_s:.0f}"),
            ("longest reply, s", f"{check.longest_s(load.asks):.1f}"),
            (
                "asked of models without faults",
                f"{plain.count('ok')} of {len(plain)} ok",
            ),
            ("asked more than one endpoint or model", retried),
            ("left so early that there is no line", len(load.asks) - logged - unheard),
            ("kill -9 of an endpoint, of Redis", self._kills_text()),
            (
                "open files before, at most, after",
                f"{files}, {self._most_files}, {left_files}",
            ),
            ("sockets of them before, after", f"{sockets}, {left_sockets}"),
            ("memory before, at most, MiB", f"{_mib(start)}, {_mib(self._most_bytes)}"),
            ("memory at rest, after each fifth", ", ".join(map(_mib, self._at_rest))),
            (
                "growth of that, after two of them",
                f"{_mib(growth)} (bound {_mib(GROWTH_BYTES)})",
            ),
        ]
        print(check.table(figures))

    def _expect(self, what: str, found: float, expected: float) -> None:
        if found != expected:
            self._violations.append(f"{what}: {found:g} instead of {expected:g}")

    def _kills_text(self) -> str:
        redis = self._kills["Redis"] if self._redis is not None else "not installed"
        return f"{self._kills['endpoint']}, {redis}"

    async def _watch(self, proxy: servers.Process, load: Load, began_s: float) -> None:
        shown_s, shown = began_s, 0
        while True:
            await asyncio.sleep(1)
            now_s = time.monotonic()
            size = machine.rss_bytes(proxy.pid)
            files, _ = servers.open_files(proxy.pid, self._redis_port)
            self._most_bytes = max(self._most_bytes, size)
            self._most_files = max(self._most_files, files)
            if now_s - shown_s >= PROGRESS_S:
                rate = (len(load.asks) - shown) / (now_s - shown_s)
                shown_s, shown = now_s, len(load.asks)
                print(
                    f"{now_s - began_s:4.0f} s  {shown} requests ({rate:.0f}/s),"
                    f" {load.open} open, {size / MIB:.1f} MiB, {files} files,"
                    f" {len(load.violations)} violations",
                    flush=True,
                )

    async def _kill_servers(self) -> None:
        """Kill the sick endpoint every now and then, and Redis; both come back."""
        while True:
            await asyncio.sleep(17)
            await self._sick.kill()
            self._kills["endpoint"] += 1
            await asyncio.sleep(3)
            await self._sick.start()
            if self._redis is not None:
                await self._redis.kill()
                self._kills["Redis"] += 1
                await asyncio.sleep(3)
                await self._redis.start()

    # ------------------------------------------------------------------- with workers

    async def _with_workers(self) -> None:
        killed_s: list[float] = []

        def may_break(begun_s: float, ended_s: float) -> bool:
            return any(begun_s - GONE_S <= at_s <= ended_s for at_s in killed_s)

        proxy = servers.proxy(self._directory, self._config, 2)
        await proxy.start()
        load = Load(proxy.url, self._seed + 1, faulty=0.2, may_break=may_break)
        killing = asyncio.create_task(_kill_workers(proxy, killed_s))
        try:
            await load.run(self._clients, WORKERS_S)
        finally:
            await _cancelled(killing)
            await asyncio.sleep(1)  # the last one's successor starts
            status = await proxy.stop()
        if status:
            self._violations.append(f"the workers' parent ended with {status}")
        outcomes, rest = check.log_lines(proxy.out)
        self._violations += load.violations
        self._violations += check.compare(load.asks, outcomes, may_be_lost=may_break)
        self._violations += [f"no line of the log: {line[:200]}" for line in rest]
        if len(killed_s) < 2:
            self._violations.append("no worker was killed")
        print(f"\n{check.seen_table(load.asks)}\n")
        cut = sum(ask.seen == "cut" for ask in load.asks)
        figures = [
            ("two workers", ""),
            ("time, s", WORKERS_S),
            ("requests", len(load.asks)),
            ("kill -9 of a worker", len(killed_s)),
            ("connections that broke then", cut),
            ("lines in the log", len(outcomes)),
        ]
        print(check.table(figures))


async def _kill_workers(proxy: servers.Process, killed_s: list[float]) -> None:
    """Kill the worker that has lived longest, again and again."""
    while True:
        await asyncio.sleep(KILL_EVERY_S)
        victims = proxy.children
        if len(victims) == 2:
            killed_s.append(time.monotonic())
            os.kill(victims[0], signal.SIGKILL)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}"


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    sys.exit(main())
