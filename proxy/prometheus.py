"""Counts as Prometheus reads them."""

import itertools
from collections.abc import Iterator, Sequence

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
from proxy.counts import (
    DURATION_S,
    FAMILIES,
    FIRST_TOKEN_S,
    Family,
    Histogram,
    Snapshot,
    Values,
)

PREFIX = "completions_proxy"


def page(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Return what to answer to Prometheus, and its content type.

    Args: accept: the header.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Samples(snapshot))
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


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


def _family(name: str, family: Family, values: Values) -> Metric:
    kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
    labels = [family.label] if family.label else []
    metric = kind(f"{PREFIX}_{name}", family.help, labels=labels)
    for value, number in values.items():
        metric.add_metric([value] if family.label else [], number)
    return metric
