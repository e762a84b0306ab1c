"""What is measured, and how one figure comes about."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.load import machine, servers, tools
from tests.bench.load.servers import BURST_MODEL, PYTHON_MODEL, TOKEN, Server
from tests.bench.load.tools import Figures

CONNECTIONS = 32


@dataclass(frozen=True)
class Dialect:
    """How a client asks: by which of wrk's kinds, and for streams at which path."""

    kinds: str
    path: str
    ending: str
    cumulative: bool = False

    def body(self, model: str) -> dict[str, object]:
        question = "What is your name?"
        message = {
            "openai": {"role": "user", "content": question},
            "cody": {"speaker": "human", "text": question},
        }[self.kinds]
        return {"model": model, "stream": True, "messages": [message]}


OPENAI = Dialect("openai", "/v1/chat/completions", "[DONE]")
_CODY = "/.api/completions/stream?api-version="
CODY = Dialect("cody", f"{_CODY}8", "event: done")
CODY_V1 = Dialect("cody", f"{_CODY}1", "event: done", cumulative=True)


@dataclass(frozen=True)
class Paced:
    """Streams whose events come at a distance, on some connections at once."""

    events: int
    gap_us: int
    connections: int
    replies: int
    ramp_ms: int = 0  # over which the connections begin

    @property
    def model(self) -> str:
        return f"sim-n{self.events}-d{self.gap_us}"


PACED = Paced(64, 5_000, connections=100, replies=500, ramp_ms=320)
CROWD = Paced(64, 50_000, connections=1000, replies=2000, ramp_ms=3200)
OPEN = Paced(2, 1_000_000, connections=1000, replies=1000, ramp_ms=500)
# As many events at one pace, in ever longer answers.
LENGTHS = {n: Paced(n, 100, 1, replies=20_000 // n) for n in (100, 1_000, 10_000)}

_PACED = (PACED, CROWD, OPEN, *LENGTHS.values())
MODELS = (BURST_MODEL, PYTHON_MODEL, *(paced.model for paced in _PACED))


def asked(
    server: Server,
    upstream: Server,
    kind: str,
    seconds: int,
    connections: int = CONNECTIONS,
) -> Figures:
    """Measure a kind of request by wrk."""

    def run() -> Figures:
        return tools.wrk(
            server.port,
            kind,
            upstream.burst_model,
            TOKEN,
            connections=connections,
            seconds=seconds,
        )

    return _spent(server, upstream, run)


def streamed(
    server: Server,
    upstream: Server,
    dialect: Dialect,
    paced: Paced,
    share: float = 1,
) -> Figures:
    """Measure paced streams; with a share, only so many of the replies."""

    def run() -> Figures:
        return tools.streams(
            server.port,
            dialect.path,
            dialect.body(paced.model),
            TOKEN,
            events=paced.events,
            ending=dialect.ending,
            cumulative=dialect.cumulative,
            connections=paced.connections,
            replies=max(paced.connections, round(paced.replies * share)),
            ramp_ms=round(paced.ramp_ms * share),
        )

    return _spent(server, upstream, run)


def _spent(server: Server, upstream: Server, run: Callable[[], Figures]) -> Figures:
    """Add to a run's figures the CPU time it took, and what else kept the CPUs busy."""
    begun, busy, own = time.monotonic(), machine.busy_s(), machine.own_s()
    before, upstream_before = machine.cpu_s(server.pid), machine.cpu_s(upstream.pid)
    figures = run()
    spent = machine.cpu_s(server.pid) - before
    upstream_spent = machine.cpu_s(upstream.pid) - upstream_before
    took = time.monotonic() - begun
    ours = spent + upstream_spent + machine.own_s() - own
    figures["cpu_us"] = spent / max(1, figures["requests"]) * 1e6
    if "events" in figures:
        figures["cpu_us_event"] = spent / max(1, figures["events"]) * 1e6
    figures["cpus"] = spent / took
    figures["cpus_upstream"] = upstream_spent / took
    figures["cpus_others"] = max(0.0, (machine.busy_s() - busy - ours) / took)
    return figures


def started(start: servers.Starter, upstream: Server) -> Figures:
    """Measure how long a server takes to start, and its memory then."""
    with start(upstream.port, MODELS) as server:
        time.sleep(0.5)
        return {"start_s": server.start_s, "idle_bytes": machine.rss_bytes(server.pid)}


def held(start: servers.Starter, upstream: Server, dialect: Dialect) -> Figures:
    """Measure the memory of an open stream, in a server that has just begun to work."""
    with start(upstream.port, MODELS) as server:
        warm = Paced(64, 0, connections=1, replies=50)
        streamed(server, upstream, dialect, warm)
        before = machine.rss_bytes(server.pid)
        with _Highest(server.pid) as highest:
            figures = streamed(server, upstream, dialect, OPEN)
    figures["stream_bytes"] = (highest.bytes - before) / OPEN.connections
    return figures


class _Highest:
    """The most memory that a process had meanwhile."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_Highest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.bytes = max(self.bytes, machine.rss_bytes(self._pid))
