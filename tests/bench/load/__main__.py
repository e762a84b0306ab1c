"""``make load``: run it all, print it, judge it, draw it."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.load import draw, machine, measure, report, servers, tools
from tests.bench.load.measure import CROWD, LENGTHS, PACED, Dialect
from tests.bench.load.results import (
    CODY,
    CODY_V1,
    PASS,
    REFERENCE,
    Results,
    compiled,
)
from tests.bench.load.servers import Server, Starter
from tests.bench.load.tools import Figures

PARTS = ("requests", "paced", "crowd", "lengths", "rest")
# Scenarios that only Cody's clients know: wrk's kinds.
_CODY_KINDS = {
    "v1": "cody-v1",
    "legacy": "cody-legacy",
    "code": "cody-code",
    "mixed": "mixed",
}


@dataclass(frozen=True)
class Way:
    """Through which server, and how its client asks."""

    name: str
    start: Starter
    dialect: Dialect
    peer: bool = False


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if missing := tools.missing():
        print(
            f"make load needs {' and '.join(missing)} from the system's packages:"
            f" apt-get install {' '.join(missing)}, or what your system calls it",
            file=sys.stderr,
        )
        return 2
    parts = options.parts or PARTS
    if tools.compiled("upstream") is None or tools.compiled("streams") is None:
        print(
            "There is no C compiler (cc): the upstream is the simulator in Python, which"
            " costs more than a proxy does and answers with some 45 events; and only what"
            " wrk asks is measured.",
            file=sys.stderr,
        )
        parts = ("requests",)
    missing = tools.compile_proxy()
    if missing:
        print(
            f"The compiled proxy is not measured; missing: {'; '.join(missing)}",
            file=sys.stderr,
        )
    machine.allow_many_files()
    machine.step_aside()
    results = _measured(options, parts, with_compiled=not missing)
    print(report.text(results))
    if options.json:
        options.json.write_text(json.dumps(asdict(results), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(draw.svg(results))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests.bench.load", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(PARTS)}; all by default",
    )
    parser.add_argument("--quick", action="store_true", help="in a minute and a half")
    parser.add_argument("--rounds", type=int, metavar="N", help="3, or 1 if quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the results")
    parser.add_argument(
        "--peers",
        type=lambda names: [name for name in names.split(",") if name],
        default=[],
        metavar="NAME,…",
        help=f"measure these too, installing them first: {', '.join(servers.PEERS)}",
    )
    options = parser.parse_args(arguments)
    for given, known in ((options.parts, PARTS), (options.peers, servers.PEERS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def _ways(peers: list[str], *, with_compiled: bool) -> list[Way]:
    own = [
        Way(PASS, servers.proxy, measure.OPENAI),
        Way(CODY, servers.proxy, measure.CODY),
    ]
    if with_compiled:
        own += [
            Way(compiled(way.name), servers.compiled_proxy, way.dialect) for way in own
        ]
    return [
        Way(REFERENCE, servers.nginx, measure.OPENAI),
        *own,
        *(Way(name, servers.PEERS[name], measure.OPENAI, peer=True) for name in peers),
    ]


def _measured(
    options: argparse.Namespace, parts: tuple[str, ...], *, with_compiled: bool
) -> Results:
    ways = _ways(options.peers, with_compiled=with_compiled)
    now = datetime.datetime.now(datetime.UTC)
    results = Results(
        f"{now:%Y-%m-%d}",
        machine.description(),
        _versions(options.peers, with_compiled),
    )
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(servers.upstream())
        up = {
            start: stack.enter_context(start(upstream.port, measure.MODELS))
            for start in dict.fromkeys(way.start for way in ways)
        }
        for start, server in up.items():  # so that nobody is measured cold
            is_ours = start in (servers.proxy, servers.compiled_proxy)
            for kind in ("mixed",) if is_ours else ("openai-plain", "openai-stream"):
                measure.asked(server, upstream, kind, 1)
        for number in range(1, options.rounds + 1):
            found: dict[str, dict[str, Figures]] = {}
            results.rounds.append(found)
            for scenario, name, figures in _round(
                options.quick, parts, ways, up, upstream
            ):
                found.setdefault(scenario, {})[name] = figures
                print(
                    f"\rround {number}: {scenario}, {name:<30}", end="", file=sys.stderr
                )
    print(file=sys.stderr)
    return results


def _round(
    quick: bool,
    parts: tuple[str, ...],
    ways: list[Way],
    up: dict[Starter, Server],
    upstream: Server,
) -> Iterator[tuple[str, str, Figures]]:
    """Measure everything once; yield the scenario, the way, and the figures."""
    seconds = 1 if quick else 2
    own = [way for way in ways if not way.peer]
    cody = [way for way in own if way.dialect is measure.CODY]
    if "requests" in parts:
        for scenario, kind in (("plain", "plain"), ("burst", "stream")):
            for way in ways:
                kinds = f"{way.dialect.kinds}-{kind}"
                # What is unfinished at the end costs without being counted: with a
                # slow one that has to be little of the whole.
                patient, load = (4, 8) if way.peer else (1, measure.CONNECTIONS)
                figures = measure.asked(
                    up[way.start], upstream, kinds, seconds * patient, load
                )
                yield scenario, way.name, figures
        for scenario, kind in () if quick else _CODY_KINDS.items():
            for way in cody:
                figures = measure.asked(up[way.start], upstream, kind, seconds)
                yield scenario, way.name, figures
    if "paced" in parts:
        for way in ways:
            share = 0.2 if way.peer else 1  # some cannot keep up
            server = up[way.start]
            yield (
                "paced",
                way.name,
                measure.streamed(server, upstream, way.dialect, PACED, share),
            )
    if "crowd" in parts:
        for way in own:
            share = 0.25 if quick else 1  # of the replies; each has its connection
            server = up[way.start]
            yield (
                "crowd",
                way.name,
                measure.streamed(server, upstream, way.dialect, CROWD, share),
            )
    if "lengths" in parts:
        grown = [
            *own[1:],
            *(
                Way(way.name.replace(CODY, CODY_V1), way.start, measure.CODY_V1)
                for way in cody
            ),
        ]
        for tokens, paced in LENGTHS.items():
            for way in grown:
                share = 0.5 if quick else 1
                server = up[way.start]
                figures = measure.streamed(server, upstream, way.dialect, paced, share)
                yield f"length {tokens}", way.name, figures
    if "rest" in parts:
        for way in ways:
            if way not in cody:  # the same process as for passing through
                yield "started", way.name, measure.started(way.start, upstream)
        for way in own[1:] if quick else own:
            yield "held", way.name, measure.held(way.start, upstream, way.dialect)


def _versions(peers: list[str], with_compiled: bool) -> dict[str, str]:
    nginx = subprocess.run(
        [tools.where("nginx") or "nginx", "-v"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {
        platform.python_implementation(): platform.python_version(),
        "nginx": nginx.stderr.rpartition("/")[2].strip(),
    }
    for package in ("aiohttp", "uvloop", *(["Cython"] if with_compiled else [])):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found | {name: tools.version_of(name) for name in peers}


if __name__ == "__main__":
    sys.exit(main())
