"""What the figures should be, and whether they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.bench.load.results import (
    CODY,
    CODY_V1,
    PASS,
    Pick,
    Results,
    at,
    bytes_per_event,
    compiled,
    cpu_us,
    cpu_us_event,
)

# Of a cost that should not grow: what two measurements of one thing differ by here.
_FLAT = 1.15

Measure = Callable[[Results, str], float | None]


@dataclass(frozen=True)
class Goal:
    name: str
    measure: Measure  # for a way through the proxy
    limits: dict[str, float]


def _ratio(scenario: str, pick: Pick) -> Measure:
    return lambda results, way: results.ratio(scenario, way, pick)


def _median(scenario: str, pick: Pick) -> Measure:
    return lambda results, way: results.median(scenario, way, pick)


def _lost(results: Results, way: str) -> float | None:
    return results.total("crowd", way, lambda figures: float(figures["lost"]))


def _growth(shorter: int, longer: int, pick: Pick) -> Measure:
    long, short = f"length {longer}", f"length {shorter}"
    return lambda results, way: results.ratio(long, way, pick, to=way, of=short)


def _cost_to_bytes(results: Results, way: str) -> float | None:
    cost = _growth(1_000, 10_000, cpu_us_event)(results, way)
    size = _growth(1_000, 10_000, bytes_per_event)(results, way)
    return cost / size if cost and size else None


GOALS = (
    Goal("plain request, CPU × nginx", _ratio("plain", cpu_us), {PASS: 2.6, CODY: 3}),
    Goal(
        "burst of 64 events, CPU × nginx", _ratio("burst", cpu_us), {PASS: 1, CODY: 2.5}
    ),
    Goal(
        "paced stream, CPU per event × nginx",
        _ratio("paced", cpu_us_event),
        {PASS: 1.3, CODY: 1.4},
    ),
    Goal(
        "time to first text, p50 × nginx",
        _ratio("paced", at("ttft", 50)),
        {PASS: 1.5, CODY: 2},
    ),
    Goal(
        "time to first text, p99 × nginx",
        _ratio("paced", at("ttft", 99)),
        {PASS: 2, CODY: 2},
    ),
    Goal("1,000 streams, events lost", _lost, {PASS: 0, CODY: 0}),
    Goal(
        "1,000 streams, CPU per event × nginx",
        _ratio("crowd", cpu_us_event),
        {PASS: 1.3, CODY: 1.4},
    ),
    Goal(
        "1,000 streams, added gap p99 × nginx",
        _ratio("crowd", at("gap", 99)),
        {PASS: 2, CODY: 2},
    ),
    Goal(
        "memory per open stream, kB",
        _median("held", lambda figures: float(figures["stream_bytes"] / 1000)),
        {PASS: 30, CODY: 40},
    ),
    Goal(
        "idle memory, MB",
        _median("started", lambda figures: float(figures["idle_bytes"] / 1e6)),
        {PASS: 50},
    ),
    Goal(
        "start-up, s",
        _median("started", lambda figures: float(figures["start_s"])),
        {PASS: 0.5},
    ),
    Goal(
        "cost per event, 10,000 tokens × 100",
        _growth(100, 10_000, cpu_us_event),
        {PASS: _FLAT, CODY: _FLAT},
    ),
    Goal(
        "api-version 1, growth of cost to that of bytes",
        _cost_to_bytes,
        {CODY_V1: 1},
    ),
)


@dataclass(frozen=True)
class Verdict:
    """``compiled`` is what was measured of the compiled proxy: if it was, that counts."""

    goal: str
    way: str
    measured: float | None
    compiled: float | None
    limit: float

    @property
    def said(self) -> str:
        counts = self.measured if self.compiled is None else self.compiled
        if counts is None:
            return "not measured"
        return "pass" if counts <= self.limit else "MISS"


def verdicts(results: Results) -> Iterator[Verdict]:
    for goal in GOALS:
        for way, limit in goal.limits.items():
            yield Verdict(
                goal.name,
                way,
                goal.measure(results, way),
                goal.measure(results, compiled(way)),
                limit,
            )
