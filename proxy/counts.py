"""Counts of exchanges, as processes hand them to one another."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import msgspec

from proxy.usage import Used

FIRST_TOKEN_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DURATION_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# route, dialect, provider, endpoint, model, kind, status
ExchangeKey: TypeAlias = tuple[str, str, str, str, str, str, int]
# dialect, provider, model
SeriesKey: TypeAlias = tuple[str, str, str]
# Further numbers by the value of their one label, "" where they have none.
Values: TypeAlias = Mapping[str, float]


class Histogram(msgspec.Struct, array_like=True):
    buckets: list[int]
    sum: float = 0.0

    def add(self, other: "Histogram") -> None:
        self.buckets = [sum(p) for p in zip(self.buckets, other.buckets, strict=True)]
        self.sum += other.sum


class Series(msgspec.Struct, array_like=True):
    """What is measured of the exchanges of one dialect with one model."""

    first_token: Histogram = msgspec.field(
        default_factory=lambda: Histogram([0] * (len(FIRST_TOKEN_S) + 1))
    )
    duration: Histogram = msgspec.field(
        default_factory=lambda: Histogram([0] * (len(DURATION_S) + 1))
    )
    prompt_tokens: int = 0
    completion_tokens: int = 0
    adjusted: int = 0

    def add(self, other: "Series") -> None:
        self.first_token.add(other.first_token)
        self.duration.add(other.duration)
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.adjusted += other.adjusted


class Family(NamedTuple):
    """A further number: ``label`` is "" where there is one value only."""

    help: str
    label: str
    is_counter: bool


# What the parts of the proxy count themselves; they say how to read it, see ``read``.
FAMILIES = {
    "in_flight": Family("Exchanges that are running", "", False),
    "waiting": Family("Requests in the queue for a place in flight", "", False),
    "client_connections": Family("Open connections of clients", "", False),
    "upstream_connections": Family(
        "Open connections to upstreams: in use, or kept for the next request",
        "state",
        False,
    ),
    "connections_refused": Family(
        "Connections of clients that were ended before a whole head was in",
        "reason",
        True,
    ),
    "redis_failures": Family(
        "Questions to Redis without an answer, so that rates were counted here",
        "",
        True,
    ),
}


class Snapshot(msgspec.Struct):
    """The counts of one process, or the sums of several."""

    exchanges: dict[ExchangeKey, int] = {}
    series: dict[SeriesKey, Series] = {}
    limits: dict[str, int] = {}
    others: dict[str, dict[str, float]] = {}
    used: Used = msgspec.field(default_factory=Used)

    def add(self, more: "Snapshot", *, gauges: bool = True) -> None:
        """Args: gauges: take also what is a state and no sum of events."""
        for key, count in more.exchanges.items():
            self.exchanges[key] = self.exchanges.get(key, 0) + count
        for name, series in more.series.items():
            self.series.setdefault(name, Series()).add(series)
        self.used.add(more.used)
        for limit, count in more.limits.items():
            self.limits[limit] = self.limits.get(limit, 0) + count
        for name_, values in more.others.items():
            family = FAMILIES.get(name_)
            if family is None or not (gauges or family.is_counter):
                continue
            sums = self.others.setdefault(name_, {})
            for label, value in values.items():
                sums[label] = sums.get(label, 0.0) + value
