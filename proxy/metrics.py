"""What Prometheus is told: counts of exchanges, by labels that no client chooses.

Counting is adding to integers; they become samples when somebody asks. The labels are
routes, providers, endpoints, models and users of the configuration, kinds of outcomes
and statuses, so their number is bounded. Of several worker processes one answers for all:
each leaves its counts in a directory, see ``Board``.
"""

import itertools
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from proxy import __version__
from proxy.outcome import Outcome
from proxy.usage import UsageCounter, Used

PREFIX = "completions_proxy"
FIRST_TOKEN_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DURATION_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# Of a path that is none of the proxy's own: there is no end of those.
OTHER = "other"
# How often a worker leaves its counts, and after how many times that it is taken for
# dead, so that what it had open is not counted any more.
PUBLISH_S = 2.0
DEAD_AFTER_S = 5 * PUBLISH_S

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


class _Family(NamedTuple):
    """A further number: ``label`` is "" where there is one value only."""

    help: str
    label: str
    is_counter: bool


# What the parts of the proxy count themselves; they say how to read it, see ``read``.
FAMILIES = {
    "in_flight": _Family("Exchanges that are running", "", False),
    "waiting": _Family("Requests in the queue for a place in flight", "", False),
    "client_connections": _Family("Open connections of clients", "", False),
    "upstream_connections": _Family(
        "Open connections to upstreams: in use, or kept for the next request",
        "state",
        False,
    ),
    "connections_refused": _Family(
        "Connections of clients that were ended before a whole head was in",
        "reason",
        True,
    ),
    "redis_failures": _Family(
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


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Snapshot).decode


class Metrics:
    """The counts of this process.

    Args: dialects: of each route that is counted under its own name.
          usage: what each user used is counted there.
    """

    def __init__(self, dialects: Mapping[str, str], usage: UsageCounter) -> None:
        self._dialects = dict(dialects)
        self.usage = usage
        self._exchanges: dict[ExchangeKey, int] = defaultdict(int)
        self._series: dict[SeriesKey, Series] = defaultdict(Series)
        self._limits: dict[str, int] = defaultdict(int)
        self._readers: dict[str, Callable[[], Values]] = {}
        self._before = Snapshot()

    def name(self, dialects: Mapping[str, str]) -> None:
        """Count other routes under their own names from now on."""
        self._dialects = dict(dialects)

    def read(self, name: str, reader: Callable[[], Values]) -> None:
        """Let ``reader`` say one of ``FAMILIES`` whenever somebody asks."""
        assert name in FAMILIES, name
        self._readers[name] = reader

    def count(self, outcome: Outcome) -> None:
        """Count one exchange; it has ended."""
        route, dialect = outcome.route, self._dialects.get(outcome.route)
        if dialect is None:
            route = dialect = OTHER
        provider, model = outcome.provider, outcome.model
        self._exchanges[
            route,
            dialect,
            provider,
            outcome.endpoint,
            model,
            outcome.kind,
            outcome.status,
        ] += 1
        if outcome.limit:
            self._limits[outcome.limit] += 1
        if not model:  # nobody was asked
            return
        series = self._series[dialect, provider, model]
        if (first_s := outcome.first_token_s) is not None:
            series.first_token.buckets[bisect_left(FIRST_TOKEN_S, first_s)] += 1
            series.first_token.sum += first_s
        if (duration_s := outcome.duration_s) is not None:
            series.duration.buckets[bisect_left(DURATION_S, duration_s)] += 1
            series.duration.sum += duration_s
        series.prompt_tokens += outcome.prompt_tokens or 0
        series.completion_tokens += outcome.completion_tokens or 0
        if outcome.adjusted:
            series.adjusted += 1

    def snapshot(self) -> bytes:
        return _encode(self._snapshot())

    def restore(self, snapshot: bytes) -> None:
        """Go on from what a process counted that was here before, so that a counter
        never goes back. Raises: ValueError: it is no snapshot.
        """
        try:
            self._before = Snapshot()
            self._before.add(_decode(snapshot), gauges=False)
        except msgspec.MsgspecError as error:
            raise ValueError(f"no snapshot of this version: {error}") from None

    def page(self, accept: str, others: Iterable[bytes] = ()) -> tuple[bytes, str]:
        """Return what to answer to Prometheus, and its content type.

        Args: accept: the header.
              others: snapshots of the other processes; what is none is left out.
        """
        whole = self._whole(others)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Samples(whole))
        encoder, content_type = choose_encoder(accept)
        return encoder(registry), content_type

    def used(self, others: Iterable[bytes] = ()) -> Used:
        """Return what was used, in the other processes as well."""
        return self._whole(others).used

    def _whole(self, others: Iterable[bytes]) -> Snapshot:
        whole = self._snapshot()
        for snapshot in others:
            add(whole, snapshot)
        return whole

    def _snapshot(self) -> Snapshot:
        whole = Snapshot()
        whole.add(self._before)
        others = {name: dict(read()) for name, read in self._readers.items()}
        used = self.usage.used
        whole.add(Snapshot(self._exchanges, self._series, self._limits, others, used))
        return whole


def add(whole: Snapshot, snapshot: bytes) -> None:
    try:
        whole.add(_decode(snapshot))
    except (msgspec.MsgspecError, ValueError):
        return  # of another version: one that is being replaced


class _Samples(Collector):
    """A snapshot as what Prometheus's client renders."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(f"{PREFIX}_info", "The version", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield self._exchanges()
        yield from self._measured()
        limits = CounterMetricFamily(
            f"{PREFIX}_limit_reached", "Requests that a limit refused", labels=["limit"]
        )
        for limit, count in self._snapshot.limits.items():
            limits.add_metric([limit], count)
        yield limits
        yield from self._used()
        for name, family in FAMILIES.items():
            yield _family(name, family, self._snapshot.others.get(name, {}))

    def _exchanges(self) -> Metric:
        family = CounterMetricFamily(
            f"{PREFIX}_exchanges",
            "Requests, by how they ended",
            labels=[
                *("route", "dialect", "provider", "endpoint", "model"),
                *("kind", "status"),
            ],
        )
        for (*texts, status), count in self._snapshot.exchanges.items():
            family.add_metric([*map(str, texts), str(status)], count)
        return family

    def _used(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            f"{PREFIX}_user_requests",
            "Requests that an upstream answered, by who asked",
            labels=["user", "feature"],
        )
        tokens = CounterMetricFamily(
            f"{PREFIX}_user_tokens",
            "Tokens as the upstreams counted them, by who asked",
            labels=["user", "feature", "of"],
        )
        for key, tally in self._snapshot.used.totals.items():
            requests.add_metric(key, tally.requests)
            tokens.add_metric([*key, "prompt"], tally.prompt_tokens)
            tokens.add_metric([*key, "completion"], tally.completion_tokens)
        return iter((requests, tokens))

    def _measured(self) -> Iterator[Metric]:
        labels = ["dialect", "provider", "model"]
        first_token = HistogramMetricFamily(
            f"{PREFIX}_first_token_seconds",
            "From a request's arrival to the first token of its answer",
            labels=labels,
        )
        duration = HistogramMetricFamily(
            f"{PREFIX}_duration_seconds",
            "From a request's arrival to the end of its answer",
            labels=labels,
        )
        tokens = CounterMetricFamily(
            f"{PREFIX}_tokens",
            "Tokens as the upstreams counted them",
            labels=[*labels, "of"],
        )
        adjusted = CounterMetricFamily(
            f"{PREFIX}_adjusted",
            "Exchanges in which something was changed for the server's or the client's"
            " sake",
            labels=labels,
        )
        for key, series in self._snapshot.series.items():
            _add_histogram(first_token, key, FIRST_TOKEN_S, series.first_token)
            _add_histogram(duration, key, DURATION_S, series.duration)
            tokens.add_metric([*key, "prompt"], series.prompt_tokens)
            tokens.add_metric([*key, "completion"], series.completion_tokens)
            adjusted.add_metric(key, series.adjusted)
        return iter((first_token, duration, tokens, adjusted))


def _add_histogram(
    family: HistogramMetricFamily,
    labels: Sequence[str],
    bounds: Sequence[float],
    histogram: Histogram,
) -> None:
    names = [*map(str, bounds), "+Inf"]
    counts = itertools.accumulate(histogram.buckets)
    family.add_metric(labels, list(zip(names, counts, strict=True)), histogram.sum)


def _family(name: str, family: _Family, values: Values) -> Metric:
    kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
    labels = [family.label] if family.label else []
    metric = kind(f"{PREFIX}_{name}", family.help, labels=labels)
    for value, number in values.items():
        metric.add_metric([value] if family.label else [], number)
    return metric


class Board:
    """Where the processes of one proxy leave their snapshots for one another.

    A file for each ``slot``, which is a number that a worker keeps when it is replaced;
    the new one goes on from what the file says.
    """

    def __init__(self, directory: Path, slot: int) -> None:
        self._directory = directory
        self._own = directory / f"{slot}.metrics"

    def left(self) -> bytes | None:
        """What the process in this slot left behind."""
        try:
            return self._own.read_bytes()
        except OSError:
            return None

    def publish(self, snapshot: bytes) -> None:
        """Raises: OSError: the directory cannot be written to."""
        draft = self._own.with_suffix(".draft")
        draft.write_bytes(snapshot)
        os.replace(draft, self._own)  # nobody reads half of it

    def others(self, now_s: float) -> list[bytes]:
        """Return what the other processes left, of dead ones without their gauges.

        Args: now_s: Unix time.
        """
        found = []
        for path in sorted(self._directory.glob("*.metrics")):
            if path == self._own:
                continue
            try:
                snapshot, left_s = path.read_bytes(), path.stat().st_mtime
            except OSError:
                continue
            is_dead = now_s - left_s > DEAD_AFTER_S
            found.append(_counters(snapshot) if is_dead else snapshot)
        return found


def _counters(snapshot: bytes) -> bytes:
    whole = Snapshot()
    try:
        whole.add(_decode(snapshot), gauges=False)
    except (msgspec.MsgspecError, ValueError):
        return b""
    return _encode(whole)
