"""Which worker gets a connection? ``python -m tests.bench.sharing``

Two workers, 200 µs of CPU per request: one listening socket that both have inherited,
against a socket each on one port (SO_REUSEPORT). The figure is the share of requests that
the busier worker answers; 0.5 is fair.
"""

import asyncio
import collections
import os
import signal
import socket
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import cast

import uvloop

from proxy import sockets

ROUNDS = 20
BUSY_S = 200e-6


class _Busy(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        end = time.perf_counter() + BUSY_S
        while time.perf_counter() < end:
            pass
        self._transport.write(b"%8d" % os.getpid())


async def _serve(listening: socket.socket) -> None:
    await asyncio.get_running_loop().create_server(_Busy, sock=listening)
    await asyncio.Event().wait()


async def _burst(port: int, connections: int, requests: int) -> list[int]:
    """Open all at once, then ask on each of them."""
    opening = (asyncio.open_connection("127.0.0.1", port) for _ in range(connections))
    opened = await asyncio.gather(*opening)
    answered: list[int] = []
    for _ in range(requests):
        for _, writer in opened:
            writer.write(b"x")
        for reader, _ in opened:
            answered.append(int(await reader.readexactly(8)))
    for _, writer in opened:
        writer.close()
    return answered


async def _one_by_one(port: int, connections: int) -> list[int]:
    """Open one after the other; they stay open, as streams do."""
    answered, opened = [], []
    for _ in range(connections):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        answered.append(int(await reader.readexactly(8)))
        opened.append(writer)
    for writer in opened:
        writer.close()
    return answered


CASES: dict[str, Callable[[int], Awaitable[list[int]]]] = {
    "burst of 8, kept": lambda port: _burst(port, 8, 50),
    "burst of 64, kept": lambda port: _burst(port, 64, 50),
    "burst of 256": lambda port: _burst(port, 256, 4),
    "one by one, 64 open": lambda port: _one_by_one(port, 64),
}


def _measure(kind: str, listening: list[socket.socket]) -> None:
    port = listening[0].getsockname()[1]
    workers = []
    for own in listening:
        if not (pid := os.fork()):
            sockets.close(each for each in listening if each is not own)
            uvloop.run(_serve(own))
            os._exit(0)
        workers.append(pid)
    sockets.close(listening)
    time.sleep(0.3)
    try:
        for name, ask in CASES.items():
            shares = []
            for _ in range(ROUNDS):
                answered = collections.Counter(uvloop.run(_asked(ask, port)))
                shares.append(max(answered.values()) / answered.total())
            median, worst = statistics.median(shares), max(shares)
            print(f"{kind:<12}{name:<22}{median:>8.2f}{worst:>8.2f}", flush=True)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


async def _asked(ask: Callable[[int], Awaitable[list[int]]], port: int) -> list[int]:
    return await ask(port)


def main() -> None:
    print(f"{'':<34}{'median':>8}{'worst':>8}")
    (shared,) = sockets.listen([("127.0.0.1", 0)])
    _measure("shared", [shared, shared.dup()])
    first = sockets.listen([("127.0.0.1", 0)], share=True)
    _measure("reuseport", first + sockets.beside(first))


if __name__ == "__main__":
    main()
