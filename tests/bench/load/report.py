"""The results as text."""

from collections.abc import Callable, Iterator, Mapping

from tests.bench.load.goals import verdicts
from tests.bench.load.results import (
    Pick,
    Results,
    at,
    bad,
    bytes_per_event,
    cpu_us,
    cpu_us_event,
)

Column = Callable[[Results, str, str], float | None]

REQUESTS = {
    "plain": "plain request",
    "burst": "64 events in one burst",
    "v1": "the same for api-version 1",
    "legacy": "the same without api-version",
    "code": "the same as code completion",
    "mixed": "all kinds in turn",
}
STREAMS = {
    "paced": "100 streams, 5 ms apart",
    "crowd": "1,000 streams, 50 ms apart",
    "length 100": "100 tokens",
    "length 1000": "1,000 tokens",
    "length 10000": "10,000 tokens",
}
STATES = {"started": "just started", "held": "1,000 open streams"}


def _median(pick: Pick, divisor: float = 1) -> Column:
    return lambda results, scenario, way: results.median(
        scenario, way, lambda figures: pick(figures) / divisor
    )


def _ratio(pick: Pick) -> Column:
    return lambda results, scenario, way: results.ratio(scenario, way, pick)


def _total(pick: Pick) -> Column:
    return lambda results, scenario, way: results.total(scenario, way, pick)


def _per_s(key: str) -> Pick:
    return lambda figures: float(figures[key] / figures["seconds"])


_REQUEST_COLUMNS = {
    "CPU µs": _median(cpu_us),
    "× nginx": _ratio(cpu_us),
    "per s": _median(_per_s("requests")),
    "p50 ms": _median(at("total", 50), 1000),
    "p90 ms": _median(at("total", 90), 1000),
    "p99 ms": _median(at("total", 99), 1000),
    "failed": _total(bad),
}
_STREAM_COLUMNS = {
    "CPU µs": _median(cpu_us_event),
    "× nginx": _ratio(cpu_us_event),
    "streams/s": _median(_per_s("requests")),
    "events/s": _median(_per_s("events")),
    "bytes": _median(bytes_per_event),
    "byte p50": _median(at("ttfb", 50), 1000),
    "byte p99": _median(at("ttfb", 99), 1000),
    "text p50": _median(at("ttft", 50), 1000),
    "text p99": _median(at("ttft", 99), 1000),
    "delay p50": _median(at("delay", 50), 1000),
    "delay p99": _median(at("delay", 99), 1000),
    "gap p99": _median(at("gap", 99), 1000),
    "lost": _total(lambda figures: float(figures["lost"])),
    "failed": _total(bad),
}
_STATE_COLUMNS = {
    "start s": _median(lambda figures: float(figures["start_s"])),
    "idle MB": _median(lambda figures: float(figures["idle_bytes"] / 1e6)),
}
_HELD_COLUMNS = {
    "kB/stream": _median(lambda figures: float(figures["stream_bytes"] / 1e3)),
    "failed": _total(bad),
}


def text(results: Results) -> str:
    return "\n".join(_lines(results))


def _lines(results: Results) -> Iterator[str]:
    yield f"{results.date}; {results.machine}"
    yield ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield _busy(results)
    if failed := sum(
        bad(figures) for figures in results.figures() if "failed" in figures
    ):
        yield f"{failed:,.0f} replies were not as they should be: see what failed"
    yield from _table(results, "requests, by wrk", REQUESTS, _REQUEST_COLUMNS)
    yield from _table(results, "paced streams, per event", STREAMS, _STREAM_COLUMNS)
    yield "ms to the first byte, to the first text; an event's delay; a gap's growth"
    started, held = ({name: title} for name, title in STATES.items())
    yield from _table(results, "memory and start", started, _STATE_COLUMNS)
    yield from _table(results, "memory of streams", held, _HELD_COLUMNS)
    yield ""
    yield f"{'goals':<54}{'measured':>10}{'compiled':>10}{'at most':>10}"
    for verdict in verdicts(results):
        both = f"{_number(verdict.measured):>10}{_number(verdict.compiled):>10}"
        name = f"{verdict.goal}: {verdict.way}"
        yield f"{name:<54}{both}{verdict.limit:>10g}  {verdict.said}"


def _busy(results: Results) -> str:
    mean, most = results.others()
    return (
        f"meanwhile others kept {mean:.2f} CPUs busy, at most {most:.2f} (from 0.1 on,"
        " times are noise, and so is the CPU time of paced streams: who comes late"
        " takes several events at once; that of requests holds)"
    )


def _table(
    results: Results,
    title: str,
    scenarios: Mapping[str, str],
    columns: Mapping[str, Column],
) -> Iterator[str]:
    yield ""
    yield f"{title:<52}" + "".join(f"{column:>10}" for column in columns)
    for scenario, name in scenarios.items():
        for way in results.ways(scenario):
            cells = (column(results, scenario, way) for column in columns.values())
            row = "".join(f"{_number(cell):>10}" for cell in cells)
            yield f"{name:<28} {way:<23}{row}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value and abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:,.1f}" if abs(value) < 100 and value % 1 else f"{value:,.0f}"
