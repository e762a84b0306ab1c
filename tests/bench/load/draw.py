"""The results as one picture: bars of CPU time, curves of latency."""

import itertools
import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from tests.bench.load.results import (
    CODY,
    PASS,
    REFERENCE,
    Pick,
    Results,
    compiled,
    cpu_us,
    cpu_us_event,
)

_WIDTH = 900
_MARGIN = 24
_BARS = (
    ("plain", "Plain request, CPU µs", cpu_us),
    ("burst", "64 events in a burst, CPU µs", cpu_us),
    ("paced", "Paced stream, CPU µs per event", cpu_us_event),
)
_CURVES = (
    ("ttft", "100 streams: added time to the first text, ms"),
    ("delay", "100 streams: added delay of an event, ms"),
)
_ROW = 36  # of a bar with its label
_BARS_TOP = 108
_CURVE_HEIGHT = 180
# Where a percentile of the list stands, and which are labelled.
_PERCENTS = (*range(1, 100), 99.9)
_LABELLED = (50, 90, 99, 99.9)

# Light and dark.
_HUES = {
    "nginx": ("#818b98", "#9198a1"),
    "pass": ("#0969da", "#4493f8"),
    "cody": ("#bc4c00", "#f0883e"),
    "pass-compiled": ("#54aeff", "#a5d6ff"),
    "cody-compiled": ("#fb8f44", "#ffc680"),
    "peer": ("#8250df", "#ab7df8"),
}
_INKS = {
    "text": ("fill: #1f2328", "fill: #f0f6fc"),
    ".quiet": ("fill: #59636e", "fill: #9198a1"),
    ".paper": ("fill: #ffffff", "fill: #0d1117"),
    ".gap": ("stroke: #ffffff", "stroke: #0d1117"),
    ".grid": ("stroke: #d1d9e0", "stroke: #3d444d"),
} | {
    f".{name}": (f"fill: {light}; stroke: {light}", f"fill: {dark}; stroke: {dark}")
    for name, (light, dark) in _HUES.items()
}


def _style() -> str:
    light, dark = (
        " ".join(f"{name} {{ {inks[mode]} }}" for name, inks in _INKS.items())
        for mode in (0, 1)
    )
    return (
        f"svg {{ font: 12px system-ui, sans-serif }} {light}"
        " .title { font-size: 15px; font-weight: 600 } .head { font-weight: 600 }"
        " .bar { stroke: none } path { fill: none !important } .curve { stroke-width: 2 }"
        " .gap { stroke-width: 3 }"
        f" @media (prefers-color-scheme: dark) {{ {dark} }}"
    )


def svg(results: Results) -> str:
    """Draw what was measured; what was not is left out."""
    rows = max((len(results.ways(scenario)) for scenario, _, _ in _BARS), default=0)
    curves_top = _BARS_TOP + rows * _ROW + 24
    height = curves_top + _CURVE_HEIGHT + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" height="{height}" role="img">',
        f"<title>completions-proxy under load, {escape(results.date)}</title>",
        f"<style>{_style()}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        _text(_MARGIN, 30, "completions-proxy under load", "title"),
        _text(_MARGIN, 50, _when_and_where(results), "quiet"),
        _text(_MARGIN, 66, _versions(results), "quiet"),
        *_all_bars(results),
        *_all_curves(results, curves_top),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _when_and_where(results: Results) -> str:
    busy = f"others kept {results.others()[0]:.1f} CPUs busy"
    return f"{results.date}; {results.machine}; {busy}"


def _versions(results: Results) -> str:
    return ", ".join(f"{name} {version}" for name, version in results.versions.items())


def _class(way: str) -> str:
    names = {REFERENCE: "nginx", PASS: "pass", CODY: "cody"}
    names |= {compiled(way): f"{names[way]}-compiled" for way in (PASS, CODY)}
    return names.get(way, "peer")


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


# ----------------------------------------------------------------------- bars


def _all_bars(results: Results) -> Iterator[str]:
    width = (_WIDTH - _MARGIN * (len(_BARS) + 1)) / len(_BARS)
    for n, (scenario, title, pick) in enumerate(_BARS):
        x = _MARGIN + n * (width + _MARGIN)
        yield from _bars(results, scenario, title, pick, x, width)


def _bars(
    results: Results, scenario: str, title: str, pick: Pick, x: float, width: float
) -> Iterator[str]:
    medians = {
        way: results.median(scenario, way, pick) for way in results.ways(scenario)
    }
    values = {way: value for way, value in medians.items() if value}
    if not values:
        return
    # Beside a peer that takes a hundred times as long nothing else would be seen: so
    # the scale is that of the others, and its bar is broken off.
    most = max(
        v for way, v in values.items() if _class(way) != "peer" or len(values) == 1
    )
    yield _text(x, _BARS_TOP - 14, title, "head")
    for row, (way, value) in enumerate(values.items()):
        y = _BARS_TOP + row * _ROW
        ratio = results.ratio(scenario, way, pick)
        said = short(value) + (
            f" (× {short(ratio)})" if ratio and way != REFERENCE else ""
        )
        yield _text(x, y + 11, way, "quiet")
        yield _text(x + width, y + 11, said, anchor="end")
        yield (
            f'<rect class="bar {_class(way)}" x="{x:.1f}" y="{y + 16}"'
            f' width="{max(1, min(1, value / most) * width):.1f}" height="10" rx="2"/>'
        )
        if value > most:
            broken = x + width * 0.9
            yield f'<path class="gap" d="M{broken:.1f} {y + 28}l5 -14m6 0l-5 14"/>'


# ----------------------------------------------------------------------- curves


def _all_curves(results: Results, top: float) -> Iterator[str]:
    width = (_WIDTH - _MARGIN * 3) / 2
    for n, (name, title) in enumerate(_CURVES):
        x = _MARGIN + n * (width + _MARGIN)
        curves = {
            way: results.curve("paced", way, name) for way in results.ways("paced")
        }
        drawn = {way: values for way, values in curves.items() if values}
        if drawn:
            yield from _plot(drawn, title, x, top, width)


def _plot(
    curves: dict[str, list[float]], title: str, x: float, top: float, width: float
) -> Iterator[str]:
    left, right, bottom = x + 44, x + width - 132, top + 24 + _CURVE_HEIGHT
    every = [max(1.0, values[n + 1]) for values in curves.values() for n in range(100)]
    lowest = math.floor(math.log10(min(every)))
    highest = max(lowest + 1, math.ceil(math.log10(max(every))))

    def across(percent: float) -> float:
        return left + (right - left) * math.log10(100 / (100 - percent)) / 3

    def up(us: float) -> float:
        share = (math.log10(max(1.0, us)) - lowest) / (highest - lowest)
        return bottom - share * _CURVE_HEIGHT

    yield _text(x, top + 8, title, "head")
    for power in range(lowest, highest + 1):
        y = up(10.0**power)
        yield f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>'
        yield _text(left - 6, y + 4, f"{10.0 ** (power - 3):g}", "quiet", "end")
    for percent in _LABELLED:
        yield f'<path class="grid" d="M{across(percent):.1f} {bottom:.1f}v5"/>'
        yield _text(across(percent), bottom + 18, f"p{percent:g}", "quiet", "middle")
    ends = _apart([up(values[100]) for values in curves.values()], 14)
    for (way, values), end in zip(curves.items(), ends, strict=True):
        points = (
            f"{across(percent):.1f} {up(values[n + 1]):.1f}"
            for n, percent in enumerate(_PERCENTS)
        )
        yield f'<path class="curve {_class(way)}" d="M{" L".join(points)}"/>'
        yield _text(right + 6, end + 4, way)


def _apart(places: Sequence[float], distance: float) -> list[float]:
    """Move labels down until none covers another; in the order given."""
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + distance)
    return moved
