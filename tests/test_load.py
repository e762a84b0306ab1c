"""The load test: what it measures with is right, and it says what it found."""

import asyncio
import contextlib
import copy
import dataclasses
import json
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.load import __main__ as load, draw, goals, measure, report, tools
from tests.bench.load.measure import CODY, CODY_V1, OPENAI, Dialect, Paced
from tests.bench.load.results import PASS, Results
from tests.bench.load.servers import (
    BURST_MODEL,
    Server,
    Starter,
    compiled_proxy,
    nginx,
    proxy,
    upstream as simulator,
)
from tests.support.client import RawConnection, build_request, request
from tests.support.upstream import (
    Close,
    ScriptedUpstream,
    chunk,
    head,
    openai_chunk,
    openai_chunks,
    reply,
    sse,
    sse_head,
)

BURST = Paced(64, 0, connections=4, replies=20)
PACED = measure.PACED
BODY = OPENAI.body("sim-n3-d0")


def needs(*programs: str) -> None:
    for program in programs:
        if tools.where(program) is None:
            if "CI" in os.environ:
                pytest.fail(f"{program} is missing, and CI has to have it")
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def sim() -> Iterator[Server]:
    needs("cc", "make")
    with simulator() as server:
        yield server


@pytest.fixture(scope="module")
def own(sim: Server) -> Iterator[Server]:
    with proxy(sim.port, (BURST_MODEL, PACED.model)) as server:
        yield server


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/v1/chat/completions"


# ----------------------------------------------------------------------- the simulator


async def test_simulator_plain(sim: Server):
    reply = await request(url(sim), body={"model": "sim", "messages": []})
    assert (reply.status, reply.framing) == (200, "length")
    assert reply.json()["choices"][0]["message"]["content"].startswith("@")


async def test_simulator_burst(sim: Server):
    body = BODY | {"stream_options": {"include_usage": True}}
    reply = await request(url(sim), body=body)
    assert reply.status == 200 and reply.framing == "chunked"
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    deltas = [openai(event)["choices"] for event in events]
    texts = [choices[0]["delta"].get("content") for choices in deltas[:-1]]
    assert texts == ["", "@The", "@ of", "@ answer", None]
    assert deltas[-2][0]["finish_reason"] == "stop"
    assert openai(events[-1])["usage"]["completion_tokens"] == 3


async def test_simulator_legacy_completion(sim: Server):
    completions = url(sim).replace("/chat", "")
    reply = await request(completions, body=BODY)
    first = openai(reply.text.split("\n\n")[0])
    assert first["choices"][0]["text"] == "@The"


async def test_simulator_paces_and_stamps(sim: Server):
    reply = await request(url(sim), body=OPENAI.body("sim-n4-d20000"))
    _, *events, _, _, _ = reply.text.split("\n\n")
    texts = [openai(event)["choices"][0]["delta"]["content"] for event in events]
    read, _, first = texts[0].removeprefix("#").partition("@")
    sent = [int(first), *(int(text.removeprefix("@")) for text in texts[1:])]
    gaps = [b - a for a, b in zip([int(read), *sent[:-1]], sent, strict=True)]
    assert sum(gaps) >= 4 * 20_000 and len(gaps) == 4


async def test_simulator_takes_requests_in_pieces_and_in_a_row(sim: Server):
    connection = await RawConnection.open(url(sim))
    whole = build_request(url(sim), "POST", None, (), BODY, chunked=False)
    for part in (whole[:9], whole[9:70], whole[70:-3], whole[-3:] + whole + whole[:20]):
        await connection.send(part)
        await asyncio.sleep(0.01)
    await connection.send(whole[20:])
    replies = [await connection.reply() for _ in range(3)]
    assert [reply.text.count("@") for reply in replies] == [3, 3, 3]
    await connection.close()


async def test_simulator_waits_for_a_slow_reader(sim: Server):
    connection = await RawConnection.open(url(sim), receive_buffer=4096)
    body = OPENAI.body("sim-n30000-d0")
    await connection.send(
        build_request(url(sim), "POST", None, (), body, chunked=False)
    )
    await asyncio.sleep(0.1)
    reply = await connection.reply(within_s=10)
    assert reply.complete and reply.text.count("@") == 30_000
    await connection.close()


@pytest.mark.parametrize(
    ("model", "status"), [("sim-n0", 400), ("sim-n9999999", 400), ("sim-n2", 200)]
)
async def test_simulator_refuses_what_it_cannot_count(
    sim: Server, model: str, status: int
):
    assert (await request(url(sim), body=OPENAI.body(model))).status == status


def openai(event: str) -> Any:
    return json.loads(event.removeprefix("data: "))


# ----------------------------------------------------------------------- the client


def test_client_counts_every_event(sim: Server):
    figures = measure.streamed(sim, sim, OPENAI, BURST)
    assert figures["requests"] == 20 and figures["events"] == 20 * 64
    assert (figures["lost"], figures["failed"], figures["unfinished"]) == (0, 0, 0)
    assert 0 < figures["cpu_us"] < 5000


def test_client_times_paced_events(sim: Server):
    paced = Paced(5, 20_000, connections=10, replies=20, ramp_ms=50)
    figures = measure.streamed(sim, sim, OPENAI, paced)
    assert (figures["lost"], figures["failed"]) == (0, 0)
    for name in ("total", "ttfb", "ttft", "delay", "gap"):
        assert len(figures[name]) == 102
        assert figures[name] == sorted(figures[name])
    assert figures["total"][0] >= 5 * 20_000
    # Without the upstream's own waiting there is not much left.
    assert 0 < figures["ttft"][50] < 20_000
    assert figures["delay"][50] < 20_000


async def client(upstream: ScriptedUpstream, events: int) -> tools.Figures:
    return await asyncio.to_thread(
        tools.streams,
        upstream.port,
        OPENAI.path,
        BODY,
        "none",
        events=events,
        ending="[DONE]",
        connections=1,
        replies=1,
        within_s=5,
    )


EVENT = b"data: @a [DONE]\n\n"


@pytest.mark.parametrize(
    ("raw", "failed"),
    [
        (reply(200, body=EVENT), 0),
        (reply(500, body=EVENT), 1),
        (head(200) + EVENT, 0),
        (sse_head() + b"11;x=ab;y\r\n" + EVENT + b"\r\n0\r\nA: 1\r\n\r\n", 0),
        (sse_head() + b"A\r\n" + EVENT[:10] + b"\r\n", 1),
    ],
    ids=["length", "status", "until-close", "extension-and-trailer", "cut"],
)
async def test_client_knows_framings(
    upstream: ScriptedUpstream, raw: bytes, failed: int
):
    needs("cc", "make")
    upstream.script(raw, Close())
    figures = await client(upstream, 1)
    assert (figures["failed"], figures["unfinished"]) == (failed, 0)


async def test_client_misses_what_does_not_come(upstream: ScriptedUpstream):
    needs("cc", "make")
    upstream.script(sse(*openai_chunks(["@a", "@b"])))
    assert (await client(upstream, 2))["failed"] == 0
    upstream.script(sse(*openai_chunks(["@a", "@b"])))
    figures = await client(upstream, 3)
    assert (figures["lost"], figures["failed"], figures["requests"]) == (1, 1, 0)
    assert "2 of 3 events" in figures["first_failure"]


async def test_client_misses_the_end(upstream: ScriptedUpstream):
    needs("cc", "make")
    upstream.script(sse(openai_chunk({"content": "@a"})))
    figures = await client(upstream, 1)
    assert (figures["lost"], figures["failed"]) == (0, 1)
    assert "reply not whole" in figures["first_failure"]


async def test_client_misses_the_rest_of_a_cut_reply(upstream: ScriptedUpstream):
    needs("cc", "make")
    upstream.script(sse_head(), chunk(b"data: @a [DONE]\n\n"), Close())
    figures = await client(upstream, 1)
    assert figures["failed"] == 1
    assert "connection lost" in figures["first_failure"]


async def test_client_counts_the_whole_text_once(upstream: ScriptedUpstream):
    needs("cc", "make")
    texts = ["@a", "@a@b", "@a@b", "@a@b@c"]
    upstream.script(sse(*openai_chunks(texts)))
    cumulative = Dialect("openai", OPENAI.path, "[DONE]", cumulative=True)
    server = Server(os.getpid(), upstream.port, 0)
    paced = Paced(3, 0, connections=1, replies=1)
    figures = await asyncio.to_thread(
        measure.streamed, server, server, cumulative, paced
    )
    assert (figures["events"], figures["failed"]) == (3, 0)


# ----------------------------------------------------------------------- all together


@pytest.mark.parametrize("dialect", [OPENAI, CODY, CODY_V1])
def test_proxy_loses_nothing(sim: Server, own: Server, dialect: Dialect):
    paced = Paced(PACED.events, PACED.gap_us, connections=10, replies=10, ramp_ms=20)
    burst = measure.streamed(own, sim, dialect, BURST)
    figures = measure.streamed(own, sim, dialect, paced)
    for each in (burst, figures):
        assert (each["lost"], each["failed"], each["unfinished"]) == (0, 0, 0)
        assert 0 < each["cpu_us_event"] < 5000
    assert 0 < figures["ttft"][50] <= figures["ttft"][99]


def test_proxy_answers_every_kind_that_wrk_asks(sim: Server, own: Server):
    needs("wrk")
    figures = measure.asked(own, sim, "mixed", seconds=1, connections=7)
    assert figures["requests"] > 20 and figures["failed"] == 0
    assert len(figures["total"]) == 102 and 10 < figures["cpu_us"] < 50_000


async def test_proxy_that_runs_is_the_one_that_is_named(sim: Server, tmp_path: Path):
    shutil.copytree(tools.ROOT / "proxy", tmp_path / "proxy")
    with (tmp_path / "proxy" / "__init__.py").open("a") as file:
        file.write('__version__ = "another"\n')
    with proxy(sim.port, (BURST_MODEL,), root=tmp_path) as other:
        reply = await request(f"http://127.0.0.1:{other.port}/healthz")
    assert reply.text == "another"


@pytest.mark.parametrize("with_compiled", [False, True])
def test_compiled_proxy_is_asked_all_that_the_other_is(with_compiled: bool):
    ways = load._ways(["litellm"], with_compiled=with_compiled)
    own = {way.name: (way.start, way.dialect) for way in ways[1:-1]}
    expected: dict[str, tuple[Starter, Dialect]] = {
        PASS: (proxy, OPENAI),
        "Cody": (proxy, CODY),
    }
    if with_compiled:
        expected["pass-through, compiled"] = (compiled_proxy, OPENAI)
        expected["Cody, compiled"] = (compiled_proxy, CODY)
    assert own == expected
    assert [way.name for way in (ways[0], ways[-1])] == ["nginx", "litellm"]


def test_nginx_answers_wrk(sim: Server):
    needs("wrk", "nginx")
    with nginx(sim.port, ()) as server:
        figures = measure.asked(server, sim, "openai-stream", seconds=1, connections=4)
    assert figures["requests"] > 20 and figures["failed"] == 0
    assert 1 < figures["cpu_us"] < 5000  # of its worker, which the master started


def test_missing_programs_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert load.main(["--quick"]) == 2
    said = capsys.readouterr().err
    assert "needs wrk and nginx from the system's packages" in said
    assert "apt-get install wrk nginx" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "nobody"], "unknown: nobody; known are litellm"),
        (["nothing"], "unknown: nothing; known are requests"),
    ],
)
def test_unknown_names_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    with contextlib.suppress(SystemExit):
        load.main(arguments)
    assert said in capsys.readouterr().err


# ----------------------------------------------------------------------- what it says


def requests(cpu_us: float) -> tools.Figures:
    return {
        "requests": 1000,
        "failed": 0,
        "seconds": 2.0,
        "cpu_us": cpu_us,
        "cpus_others": 0.25,
        "total": list(range(100, 202)),
    }


def paced(cpu_us_event: float, us: int, **own: float) -> tools.Figures:
    curve = list(range(us, us + 102))
    times = dict.fromkeys(("total", "ttfb", "ttft", "delay", "gap"), curve)
    counts = {"events": 64_000, "bytes": 6_400_000, "lost": 0, "unfinished": 0}
    events = {"cpu_us_event": cpu_us_event, **counts, **times, **own}
    return requests(cpu_us_event * 64) | events


COMPILED = {"pass-through, compiled": 20.0, "Cody, compiled": 24.0}


def results(**others: float) -> Results:
    plain = {"nginx": 10.0, PASS: 25.0, "Cody": 31.0, **others}
    scenarios = {
        "plain": {way: requests(cpu) for way, cpu in plain.items()},
        "paced": {way: paced(cpu, round(cpu)) for way, cpu in plain.items()},
        "crowd": {
            "nginx": paced(10, 10),
            PASS: paced(12, 10, failed=6),
            "Cody": paced(12, 10, lost=3),
        },
        "length 100": {PASS: paced(9, 10), "Cody v1": paced(10, 10)},
        "length 1000": {"Cody v1": paced(10, 10, bytes=64_000_000)},
        "length 10000": {
            PASS: paced(9, 10),
            "Cody v1": paced(50, 10, bytes=640_000_000),
        },
    }
    found = Results("2026-01-02", "2 × <CPU> & more", {"nginx": "1.2"})
    slow = copy.deepcopy(scenarios)
    slow["plain"] = {way: requests(cpu * 3) for way, cpu in plain.items()}
    found.rounds = [scenarios, slow, copy.deepcopy(scenarios)]
    return found


def test_goals_are_judged_by_ratios_of_the_same_round():
    verdicts = {(v.goal, v.way): v for v in goals.verdicts(results())}
    plain = "plain request, CPU × nginx"
    assert (verdicts[plain, PASS].measured, verdicts[plain, PASS].said) == (2.5, "pass")
    assert (verdicts[plain, "Cody"].measured, verdicts[plain, "Cody"].said) == (
        3.1,
        "MISS",
    )
    lost = verdicts["1,000 streams, events lost", "Cody"]
    assert (lost.measured, lost.said) == (9, "MISS")
    flat = verdicts["cost per event, 10,000 tokens × 100", PASS]
    assert (flat.measured, flat.said) == (1, "pass")
    grown = verdicts["api-version 1, growth of cost to that of bytes", "Cody v1"]
    assert (grown.measured, grown.said) == (0.5, "pass")
    assert verdicts["start-up, s", PASS].said == "not measured"
    assert not any(verdict.compiled for verdict in verdicts.values())


def test_goals_are_judged_by_the_compiled_proxy_where_there_is_one():
    verdicts = {(v.goal, v.way): v for v in goals.verdicts(results(**COMPILED))}
    plain = verdicts["plain request, CPU × nginx", "Cody"]
    assert (plain.measured, plain.compiled, plain.said) == (3.1, 2.4, "pass")
    paced = verdicts["paced stream, CPU per event × nginx", PASS]
    assert (paced.measured, paced.compiled, paced.said) == (2.5, 2, "MISS")
    # Not measured of the compiled one: then the other counts.
    lost = verdicts["1,000 streams, events lost", "Cody"]
    assert (lost.measured, lost.compiled, lost.said) == (9, None, "MISS")


def test_report_says_figures_noise_and_verdicts():
    lines = report.text(results()).splitlines()
    assert lines[0] == "2026-01-02; 2 × <CPU> & more"
    assert "others kept 0.25 CPUs busy" in lines[2]
    row = next(
        line for line in lines if line.startswith("plain request") and PASS in line
    )
    assert row.split()[-7:] == ["25", "2.50", "500", "0.15", "0.19", "0.20", "0"]
    assert "18 replies were not as they should be" in lines[3]
    (goal,) = (x for x in lines if x.startswith("plain request, CPU × nginx: Cody"))
    assert goal.split()[-4:] == ["3.10", "–", "3", "MISS"]
    lines = report.text(results(**COMPILED)).splitlines()
    (row,) = (x for x in lines if x.startswith("plain request") and "Cody, comp" in x)
    assert row.split()[-7:-5] == ["24", "2.40"]
    (goal,) = (x for x in lines if x.startswith("plain request, CPU × nginx: Cody"))
    assert goal.split()[-4:] == ["3.10", "2.40", "3", "pass"]


def test_picture_shows_the_figures():
    root = ET.fromstring(draw.svg(results(**COMPILED, litellm=5000.0)))
    texts = ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("text")]
    assert "2026-01-02; 2 × <CPU> & more; others kept 0.2 CPUs busy" in texts
    assert "nginx 1.2" in texts
    for figure in ("10.0", "25.0 (× 2.5)", "31.0 (× 3.1)", "5,000 (× 500)"):
        assert figure in texts
    for figure in ("20.0 (× 2.0)", "24.0 (× 2.4)", "Cody, compiled"):
        assert figure in texts
    bars = {
        e.get("class"): float(e.get("width", "nan"))
        for e in root.iter()
        if (e.get("class") or "").startswith("bar")
    }
    assert bars["bar nginx"] / bars["bar cody"] == pytest.approx(10 / 31, rel=0.01)
    compiled = bars["bar cody-compiled"] / bars["bar cody"]
    assert compiled == pytest.approx(24 / 31, rel=0.01)
    assert (
        bars["bar peer"] == bars["bar cody"]
    )  # broken off: nothing leaves the picture
    curves = [e for e in root.iter() if (e.get("class") or "").startswith("curve")]
    assert len(curves) == 2 * 6
    numbers = " ".join(curve.get("d", "") for curve in curves)
    assert "nan" not in numbers and "inf" not in numbers


def test_picture_without_anything_measured_is_one_still():
    assert ET.fromstring(draw.svg(Results("2026-01-02", "", {}))).tag.endswith("svg")


def test_results_survive_their_file(tmp_path: Path):
    found = results(**COMPILED)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(dataclasses.asdict(found)))
    assert report.text(Results(**json.loads(file.read_text()))) == report.text(found)
