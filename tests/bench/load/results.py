"""The results of a run, as they are written to a file, and what they come to."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.bench.load.tools import Figures

REFERENCE = "nginx"
PASS, CODY, CODY_V1 = "pass-through", "Cody", "Cody v1"


def compiled(way: str) -> str:
    """Return what the same way is called through the compiled proxy."""
    return f"{way}, compiled"


Pick = Callable[[Figures], float]


@dataclass
class Results:
    """``rounds``: per round, per scenario, per way through a proxy, its figures."""

    date: str
    machine: str
    versions: dict[str, str]
    rounds: list[dict[str, dict[str, Figures]]] = field(default_factory=list)

    def figures(self) -> Iterator[Figures]:
        for scenarios in self.rounds:
            for ways in scenarios.values():
                yield from ways.values()

    def others(self) -> tuple[float, float]:
        """Return how many CPUs others kept busy: in the mean, and at most."""
        busy = [f["cpus_others"] for f in self.figures() if "cpus_others" in f]
        return sum(busy) / max(1, len(busy)), max(busy, default=0.0)

    def ways(self, scenario: str) -> list[str]:
        return list(
            dict.fromkeys(way for r in self.rounds for way in r.get(scenario, ()))
        )

    def runs(self, scenario: str, way: str) -> list[Figures]:
        return [r[scenario][way] for r in self.rounds if way in r.get(scenario, ())]

    def median(self, scenario: str, way: str, pick: Pick) -> float | None:
        """Return None for what was not measured."""
        return _median([pick(figures) for figures in self.runs(scenario, way)])

    def total(self, scenario: str, way: str, pick: Pick) -> float | None:
        runs = self.runs(scenario, way)
        return sum(map(pick, runs)) if runs else None

    def ratio(
        self, scenario: str, way: str, pick: Pick, to: str = REFERENCE, of: str = ""
    ) -> float | None:
        """Return the median of the ratios to another way in the same round.

        With ``of``, the other is in that scenario.
        """
        return _median(
            [
                pick(r[scenario][way]) / divisor
                for r in self.rounds
                if way in r.get(scenario, ()) and to in r.get(of or scenario, ())
                if (divisor := pick(r[of or scenario][to]))
            ]
        )

    def curve(self, scenario: str, way: str, name: str) -> list[float]:
        """Return percentiles 0, 1, … 99, 99.9, 100: of each the median of the rounds."""
        curves = [figures[name] for figures in self.runs(scenario, way)]
        return [statistics.median(values) for values in zip(*curves, strict=True)]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def cpu_us(figures: Figures) -> float:
    return float(figures["cpu_us"])


def cpu_us_event(figures: Figures) -> float:
    return float(figures["cpu_us_event"])


def at(name: str, percent: int) -> Pick:
    """Pick a percentile, of 99 at most."""
    return lambda figures: float(figures[name][percent]) if figures[name] else 0.0


def bad(figures: Figures) -> float:
    """Return how many replies were not as they should be."""
    return float(figures["failed"] + figures.get("unfinished", 0))


def bytes_per_event(figures: Figures) -> float:
    return float(figures["bytes"] / max(1, figures["events"]))
