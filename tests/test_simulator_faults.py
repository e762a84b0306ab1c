"""The simulator's faults are on the wire what their names say."""

import asyncio
import contextlib
import gzip
import itertools
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, get_args

import pytest

from proxy.__main__ import main
from proxy.simulator import (
    FaultError,
    Faults,
    Running,
    Settings,
    describe,
    parse,
    start,
)
from proxy.simulator.faults import _TERMS, EVER_S, Schedule, Shape, asked
from tests.support import client
from tests.support.cody import read_chat
from tests.support.fixtures import QUESTION, Starter, model_configuration

FAST = Settings(tokens_per_s=0, first_token_s=0)
BOM = b"\xef\xbb\xbf"
DONE = b"data: [DONE]\n\n"
HI = [{"role": "user", "content": "How are you?"}]

# Dialect -> where it is asked streamed, where whole, and how.
DIALECTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", "/v1/chat/completions", {"messages": HI}),
    "completions": ("/v1/completions", "/v1/completions", {"prompt": "def f():"}),
    "generate": ("/generate_stream", "/generate", {"inputs": "def f():"}),
}
EITHER = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
EACH = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture
async def simulated() -> AsyncIterator[Running]:
    async with serving(FAST) as running:
        yield running


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Running]:
    running = await start(settings)
    try:
        yield running
    finally:
        await running.stop()


@dataclass
class Wire:
    """All that a connection gave: its reads, when they came, and how it ended."""

    reads: list[tuple[float, bytes]]
    end: str  # "fin", "rst", or "open": silent until the test gave up

    @property
    def raw(self) -> bytes:
        return b"".join(data for _, data in self.reads)

    @property
    def head(self) -> str:
        return self.raw.partition(b"\r\n\r\n")[0].decode()

    @property
    def status(self) -> int:
        return int(self.head.split(" ")[1])

    def header(self, name: str) -> str | None:
        found = re.search(rf"(?im)^{name}: ([^\r]*)", self.head)
        return found[1] if found else None

    def _framed(self) -> tuple[list[bytes], bool]:
        """The chunks or the one body, and whether it ended as its framing says."""
        rest = self.raw.partition(b"\r\n\r\n")[2]
        if (length := self.header("content-length")) is not None:
            return [rest], len(rest) == int(length)
        chunks: list[bytes] = []
        while found := re.match(rb"([0-9a-f]+)\r\n", rest):
            size, start = int(found[1], 16), found.end()
            if not size:
                return chunks, rest == b"0\r\n\r\n"
            assert rest[start + size : start + size + 2] == b"\r\n"
            chunks.append(rest[start : start + size])
            rest = rest[start + size + 2 :]
        assert rest == b""
        return chunks, False

    @property
    def chunks(self) -> list[bytes]:
        return self._framed()[0]

    @property
    def body(self) -> bytes:
        """The body; `created` is the clock's, so all have the same here."""
        return re.sub(rb'"created":\d+', b'"created":0', b"".join(self.chunks))

    @property
    def is_complete(self) -> bool:
        return self._framed()[1]

    @property
    def events(self) -> list[bytes]:
        return re.findall(rb".*?\n\n", self.body, re.DOTALL)

    def silence_s(self) -> float:
        """The longest time between two reads."""
        times = [at for at, _ in self.reads]
        return max(b - a for a, b in itertools.pairwise(times))


def request_of(
    url: str, dialect: str, stream: bool, faults: str | None, **more: Any
) -> bytes:
    streamed, whole, body = DIALECTS[dialect]
    if dialect != "generate":
        body = {"stream": stream, **body}
    headers = [] if faults is None else [("X-Simulator-Faults", faults)]
    path = streamed if stream else whole
    return client.build_request(url, "POST", path, headers, {**body, **more}, False)


async def read(reader: asyncio.StreamReader) -> Wire:
    """Read until the connection ends, or is silent: briefly behind a whole reply."""
    reads: list[tuple[float, bytes]] = []
    began, quiet_s = time.monotonic(), 0.3
    try:
        while data := await asyncio.wait_for(reader.read(2**16), quiet_s):
            reads.append((time.monotonic() - began, data))
            quiet_s = 0.02 if is_whole(reads) else 0.3
        return Wire(reads, "fin")
    except TimeoutError:
        return Wire(reads, "open")
    except ConnectionResetError:
        return Wire(reads, "rst")


def is_whole(reads: list[tuple[float, bytes]]) -> bool:
    if reads[-1][1].endswith(b"0\r\n\r\n"):
        return True
    head = reads[0][1].partition(b"\r\n\r\n")[0]
    found = re.search(rb"(?i)content-length: (\d+)", head)
    got = sum(len(data) for _, data in reads) - len(head) - 4
    return found is not None and got == int(found[1])


async def ask(
    running: Running | str,
    faults: str | None,
    dialect: str = "chat",
    stream: bool = True,
    **more: Any,
) -> Wire:
    """Send one request over a connection of its own; return all that comes."""
    url = running if isinstance(running, str) else running.url
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request_of(url, dialect, stream, faults, **more))
    try:
        return await read(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


_PLAIN: dict[tuple[str, bool], Wire] = {}


async def plain_of(running: Running, dialect: str, stream: bool = True) -> Wire:
    """Return the reply without faults, which is always the same."""
    if (dialect, stream) not in _PLAIN:
        _PLAIN[dialect, stream] = await ask(running, None, dialect, stream)
    return _PLAIN[dialect, stream]


async def until_idle(running: Running) -> None:
    for _ in range(1000):
        if not running.busy:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"{running.busy} generations are still under way")


# --- how they are asked for ----------------------------------------------------------


def test_parse():
    assert parse("") == parse(" , ") == Faults()
    assert parse("cut=rst, after=3") == parse("cut=rst+after=3")
    assert parse("cut = rst ,after= 3") == Faults(cut="rst", after=3)
    assert parse("after=nothing").after == -1
    assert parse("after=head").after == 0
    assert parse("stall").stall == EVER_S
    assert parse("status=503").error == "tgi"
    assert parse("status=503").after == -1
    assert parse("status=503,error=openai,after=head").after == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutt", "no fault is called 'cutt'; there are: delay-head, delay-first, "),
        ("cut=rst,=", "no fault is called ''"),
        ("cut,cut=rst", "the fault 'cut' is given twice"),
        ("after", "the fault 'after' needs a value: after=N|nothing|head|end: "),
        ("cut=of", "the fault 'cut': Invalid enum value 'of'; cut=fin|rst|short: "),
        ("error=tgi2", "the fault 'error': Invalid enum value 'tgi2'; error=tgi|tgi-"),
        ("status=200", "the fault 'status': Expected `int` >= 400; status=N: "),
        ("after=-2", "the fault 'after': Expected `float` >= -1.0; "),
        ("after=nan", "the fault 'after': "),
        ("stall=inf", "the fault 'stall': "),
        ("for=x", "the fault 'for': Expected `float`, got `str`; for=S: "),
        ("bom=7", "the fault 'bom': Expected `bool`, got `str`; bom: "),
        ("content-type=a\r\nb", "the fault 'content-type': "),
    ],
)
def test_parse_refuses(text: str, message: str):
    with pytest.raises(FaultError) as refused:
        parse(text)
    assert str(refused.value).startswith(message)


def test_every_fault_is_described_and_exists():
    rows = re.findall(r"(?m)^  ([a-z0-9-]+)", describe())
    assert set(rows) == set(_TERMS) == set(Faults.__struct_encode_fields__)
    # What its name alone stands for can be read.
    for name, (_, _, alone) in _TERMS.items():
        if alone is not None:
            parse(name)


def test_asked():
    chat = b'{"model":"tgi+cut+after=2","messages":[]}'
    assert asked({}, chat) == parse("cut,after=2")
    assert asked({"x-simulator-faults": ""}, chat) == Faults()
    assert asked({}, b'{"parameters":{"adapter_id":"+bom"}}') == parse("bom")
    for body in (
        b'{"model":"tgi"}',
        b"+",
        b'{"inputs":"model+cut"}',
        b'"\xff+"',
        b"[]",
    ):
        assert asked({}, body) is None


def test_schedule():
    schedule = Schedule()
    third = parse("cut,every=3")
    assert [schedule.applies(third, 0) for _ in range(6)] == [False, False, True] * 2
    once = parse("cut,for=2")
    assert [schedule.applies(once, at) for at in (9, 10.9, 11, 99)] == [1, 1, 0, 0]
    again = parse("cut,for=2,pause=1")
    assert [schedule.applies(again, at) for at in (5, 6.9, 7, 7.9, 8)] == [
        1,
        1,
        0,
        0,
        1,
    ]
    for number in range(3000):
        schedule.applies(parse(f"every=2,after={number}"), 0)
    assert len(schedule._seen) <= 1000


@EITHER
async def test_unknown_fault_is_refused(simulated: Running, stream: bool):
    wire = await ask(simulated, "cutt", stream=stream)
    assert wire.status == 400
    refusal = json.loads(wire.body)
    assert refusal["error"].startswith("no fault is called 'cutt'; there are: ")
    assert all(name in refusal["error"] for name in _TERMS)
    wire = await ask(simulated, None, stream=stream, model="tgi+cutt")
    assert wire.status == 400


def test_unknown_fault_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["simulate", "--fault", "cutt=rst"])
    assert exited.value.code == 2
    said = capsys.readouterr().err
    assert "argument --fault: no fault is called 'cutt'; there are: " in said


async def test_on_the_command_line():
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "proxy", "simulate", "--port", "0", "--fault", "cut=rst+after=head"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        said = await asyncio.wait_for(process.stderr.readline(), 20)
        url = said.decode().split()[-1]
        raw = await client.request(url, "GET", "/health")
        assert raw.status == 200
        wire = await ask(url, None)
        assert (wire.status, wire.body, wire.end) == (200, b"", "rst")
    finally:
        process.terminate()
        await process.communicate()


@EACH
@EITHER
async def test_by_model(simulated: Running, dialect: str, stream: bool):
    name = "tgi+status=429+error=openai+retry-after=7"
    body: Any = {"parameters": {"adapter_id": name}}
    if dialect != "generate":
        body = {"model": name}
    wire = await ask(simulated, None, dialect, stream, **body)
    assert wire.status == 200  # error=… alone is not "after nothing"
    name += "+after=nothing"
    body = (
        {"parameters": {"adapter_id": name}}
        if "parameters" in body
        else {"model": name}
    )
    wire = await ask(simulated, None, dialect, stream, **body)
    assert wire.status == 429
    assert wire.header("retry-after") == "7"


@EACH
@EITHER
async def test_by_settings(dialect: str, stream: bool):
    faulty = Settings(tokens_per_s=0, first_token_s=0, faults=parse("status=503"))
    async with serving(faulty) as running:
        assert (await ask(running, None, dialect, stream)).status == 503
        assert (await ask(running, "", dialect, stream)).status == 200
        raw = await client.request(running.url, "GET", "/health")
        assert raw.status == 200


async def test_everywhere():
    faulty = Settings(tokens_per_s=0, faults=parse("status=503,everywhere"))
    async with serving(faulty) as running:
        raw = await client.request(running.url, "GET", "/health")
        assert raw.status == 503


# --- nothing at all ------------------------------------------------------------------


@EACH
@EITHER
async def test_no_fault_is_the_plain_reply(
    simulated: Running, dialect: str, stream: bool
):
    plain = await ask(simulated, None, dialect, stream)
    same = await ask(simulated, "", dialect, stream)
    assert plain.is_complete
    assert same.is_complete
    assert (same.body, same.chunks == []) == (plain.body, plain.chunks == [])
    assert same.header("content-type") == plain.header("content-type")
    assert same.end == "open"


# --- the end of the connection -------------------------------------------------------


@EACH
@EITHER
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_after_nothing(
    simulated: Running, dialect: str, stream: bool, how: str
):
    wire = await ask(simulated, f"cut={how},after=nothing", dialect, stream)
    assert (wire.raw, wire.end) == (b"", how)
    await until_idle(simulated)


@EACH
@EITHER
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_after_the_head(
    simulated: Running, dialect: str, stream: bool, how: str
):
    wire = await ask(simulated, f"cut={how},after=head", dialect, stream)
    assert wire.status == 200
    assert (wire.body, wire.end, wire.is_complete) == (b"", how, False)


@EACH
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_after_events(simulated: Running, dialect: str, how: str):
    plain = await plain_of(simulated, dialect)
    wire = await ask(simulated, f"cut={how},after=3", dialect)
    assert wire.events == plain.events[:3]
    assert (wire.end, wire.is_complete) == (how, False)
    await until_idle(simulated)


@EACH
async def test_cut_within_an_event(simulated: Running, dialect: str):
    plain = await plain_of(simulated, dialect)
    wire = await ask(simulated, "cut,after=1.5", dialect)
    assert wire.events == plain.events[:1]
    rest = wire.body.removeprefix(plain.events[0])
    assert rest
    assert plain.events[1].startswith(rest[:20])
    assert not rest.endswith(b"\n")


@EACH
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_before_the_end_of_the_body(
    simulated: Running, dialect: str, how: str
):
    plain = await plain_of(simulated, dialect)
    wire = await ask(simulated, f"cut={how},after=end", dialect)
    assert wire.body == plain.body
    assert (wire.end, wire.is_complete) == (how, False)


@EACH
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_cut_halves_a_whole_reply(simulated: Running, dialect: str, how: str):
    plain = await plain_of(simulated, dialect, False)
    for after in (1, 3):
        wire = await ask(simulated, f"cut={how},after={after}", dialect, False)
        assert wire.header("content-length") == plain.header("content-length")
        assert len(wire.body) == pytest.approx(len(plain.body) / 2, abs=10)
        assert (wire.end, wire.is_complete) == (how, False)


@EACH
async def test_cut_short_ends_the_body_properly(simulated: Running, dialect: str):
    plain = await plain_of(simulated, dialect)
    wire = await ask(simulated, "cut=short,after=2", dialect)
    assert wire.events == plain.events[:2]
    assert (wire.end, wire.is_complete) == ("open", True)
    wire = await ask(simulated, "cut=short,after=nothing", dialect)
    assert (wire.status, wire.body, wire.is_complete) == (200, b"", True)
    plain = await plain_of(simulated, dialect, False)
    wire = await ask(simulated, "cut=short", dialect, False)
    assert len(wire.body) == pytest.approx(len(plain.body) / 2, abs=10)
    assert (wire.end, wire.is_complete) == ("open", True)


@EITHER
@pytest.mark.parametrize("lie", ["idle", "next"])
async def test_keep_alive_lie(simulated: Running, stream: bool, lie: str):
    host, port = simulated.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request_of(simulated.url, "chat", stream, f"keep-alive-lie={lie}"))
    wire = await read(reader)
    assert wire.is_complete
    assert wire.header("connection") is None  # in HTTP/1.1: it will be kept
    assert wire.end == ("fin" if lie == "idle" else "open")
    if lie == "next":
        writer.write(request_of(simulated.url, "chat", stream, None))
        wire = await read(reader)
        assert (wire.raw, wire.end) == (b"", "fin")
    writer.close()
    await writer.wait_closed()
    assert (await ask(simulated, None, stream=stream)).is_complete
    await until_idle(simulated)


# --- silence -------------------------------------------------------------------------


@EACH
@EITHER
@pytest.mark.parametrize("after", ["nothing", "head", "1", "2.5", "end"])
async def test_stall(simulated: Running, dialect: str, stream: bool, after: str):
    plain = await plain_of(simulated, dialect, stream)
    wire = await ask(simulated, f"stall,after={after}", dialect, stream)
    assert wire.end == "open"
    if after == "nothing":
        assert wire.raw == b""
    elif stream:
        assert not wire.is_complete
        assert wire.status == 200
        shown = {"head": 0, "1": 1, "2.5": 2, "end": len(plain.events)}[after]
        assert wire.events == plain.events[:shown]
        assert len(wire.body) > sum(map(len, wire.events)) or after != "2.5"
    else:
        assert wire.is_complete == (after == "end")
        assert bool(wire.body) == (after != "head")
    # The hang-up of the client ends it.
    await until_idle(simulated)


@EACH
@EITHER
@pytest.mark.parametrize("after", ["nothing", "head", "1", "1.5", "end"])
async def test_stall_that_ends(
    simulated: Running, dialect: str, stream: bool, after: str
):
    plain = await plain_of(simulated, dialect, stream)
    wire = await ask(simulated, f"stall=0.1,after={after}", dialect, stream)
    assert wire.is_complete
    assert wire.body == plain.body
    if after == "nothing":
        assert wire.reads[0][0] >= 0.09
    elif stream or after != "end":
        assert wire.silence_s() >= 0.05


@EACH
@EITHER
async def test_delays(simulated: Running, dialect: str, stream: bool):
    plain = await plain_of(simulated, dialect, stream)
    for phase in ("head", "first", "gap", "end"):
        seconds = 0.01 if phase == "gap" else 0.1
        wire = await ask(simulated, f"delay-{phase}={seconds}", dialect, stream)
        assert wire.body == plain.body
        times = [at for at, _ in wire.reads]
        if phase == "head":
            assert times[0] >= 0.09
        elif phase == "first":
            assert times[1] - times[0] >= 0.05
            assert wire.reads[0][1].endswith(b"\r\n\r\n")
        elif phase == "gap":
            gaps = len(plain.events) - 1 if stream else 1
            assert times[-1] - times[0] >= 0.005 * gaps
        elif stream:
            assert times[-1] - times[-2] >= 0.05
            assert wire.reads[-1][1] == b"0\r\n\r\n"


# --- errors --------------------------------------------------------------------------

# What each shape looks like as a body, of an overload.
OVERLOADS: dict[str, Any] = {
    "tgi": {"error": "Model is overloaded", "error_type": "overloaded"},
    "tgi-openai": {
        "error": {"message": "Model is overloaded", "http_status_code": 422}
    },
    "openai": {
        "error": {
            "message": "Model is overloaded",
            "type": "rate_limit_exceeded",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    },
    "vllm": {
        "object": "error",
        "message": "Model is overloaded",
        "type": "rate_limit_exceeded",
        "param": None,
        "code": 429,
    },
    "ollama": {"error": "Model is overloaded"},
    "llamacpp": {
        "error": {
            "code": 429,
            "message": "Model is overloaded",
            "type": "rate_limit_exceeded",
        }
    },
    "anthropic": {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "Model is overloaded"},
    },
    "google": [
        {
            "error": {
                "code": 429,
                "message": "Model is overloaded",
                "status": "RESOURCE_EXHAUSTED",
            }
        }
    ],
    "fastapi": {"detail": "Model is overloaded"},
    "gateway": {"message": "Model is overloaded"},
}
BEFORE_DATA = {"anthropic": b"event: error\ndata: ", "llamacpp": b"error: "}


def test_every_shape_is_tested():
    assert {*OVERLOADS, "text", "html", "empty"} == set(get_args(Shape))


@EITHER
@pytest.mark.parametrize("shape", OVERLOADS)
async def test_error_as_a_status(simulated: Running, stream: bool, shape: str):
    faults = f"error={shape},status=429,after=nothing,retry-after=3"
    wire = await ask(simulated, faults, stream=stream)
    assert wire.status == 429
    assert wire.header("content-type") == "application/json"
    assert wire.header("retry-after") == "3"
    assert json.loads(wire.body) == OVERLOADS[shape]
    assert (wire.end, wire.is_complete) == ("open", True)


@EACH
@pytest.mark.parametrize("shape", OVERLOADS)
async def test_error_as_an_event(simulated: Running, dialect: str, shape: str):
    plain = await plain_of(simulated, dialect)
    for after, shown in (("head", 0), ("1", 1), ("2", 2), ("end", len(plain.events))):
        faults = f"error={shape},status=429,after={after}"
        wire = await ask(simulated, faults, dialect)
        assert_error_event(wire, plain.events[:shown], shape)


def assert_error_event(wire: Wire, expected: list[bytes], shape: str) -> None:
    assert wire.status == 200
    assert (wire.end, wire.is_complete) == ("open", True)
    *before, error = wire.events
    assert before == expected
    start = BEFORE_DATA.get(shape, b"data: ")
    assert error.startswith(start)
    assert json.loads(error.removeprefix(start)) == OVERLOADS[shape]


@pytest.mark.parametrize("shape", OVERLOADS)
async def test_error_as_a_body_of_status_200(simulated: Running, shape: str):
    wire = await ask(simulated, f"error={shape},status=429", stream=False)
    assert wire.status == 200
    assert json.loads(wire.body) == OVERLOADS[shape]


@EITHER
async def test_errors_that_are_no_json(simulated: Running, stream: bool):
    wire = await ask(simulated, "error=html,status=502,after=nothing", stream=stream)
    assert (wire.status, wire.header("content-type")) == (502, "text/html")
    assert b"<h1>502 " in wire.body
    wire = await ask(simulated, "error=text,after=nothing", stream=stream)
    assert (wire.status, wire.header("content-type")) == (500, "text/plain")
    assert wire.body == b"error: Request failed during generation: simulated"
    wire = await ask(simulated, "error=empty,status=503,after=nothing", stream=stream)
    assert (wire.status, wire.header("content-type")) == (503, None)
    assert (wire.header("content-length"), wire.body) == ("0", b"")


async def test_events_that_are_no_json(simulated: Running):
    wire = await ask(simulated, "error=text,after=1")
    assert (
        wire.events[1]
        == b"data: error: Request failed during generation: simulated\n\n"
    )
    wire = await ask(simulated, "error=html,after=head")
    assert wire.body.startswith(b"<html>")
    wire = await ask(simulated, "error=empty,after=2")
    assert len(wire.events) == 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "validation"),
        (429, "overloaded"),
        (500, "generation"),
        (503, "unavailable"),
    ],
)
async def test_words_follow_the_status(simulated: Running, status: int, kind: str):
    wire = await ask(simulated, f"status={status}")
    assert wire.status == status
    assert json.loads(wire.body)["error_type"] == kind


@EITHER
async def test_error_with_a_cut(simulated: Running, stream: bool):
    wire = await ask(simulated, "status=503,cut=rst", stream=stream)
    assert wire.status == 503
    assert (wire.end, wire.is_complete) == ("rst", False)
    assert b'{"error":' in wire.body
    wire = await ask(simulated, "error=openai,after=1,cut=rst")
    assert len(wire.events) == 2
    assert (wire.end, wire.is_complete) == ("rst", False)


@EITHER
async def test_redirect(simulated: Running, stream: bool):
    for faults, status in (("redirect", 307), ("redirect=301,after=1", 301)):
        wire = await ask(simulated, faults, stream=stream)
        assert (wire.status, wire.header("location")) == (status, "/health")
        assert wire.is_complete


@EITHER
async def test_every_third_is_refused(simulated: Running, stream: bool):
    faults = "status=429,retry-after=1,every=3"
    found = [(await ask(simulated, faults, stream=stream)).status for _ in range(6)]
    assert found == [200, 200, 429] * 2


async def test_burst_ends(simulated: Running):
    faults = "status=503,for=0.5,pause=60"
    assert (await ask(simulated, faults)).status == 503
    assert (await ask(simulated, faults)).status == 503
    await asyncio.sleep(0.5)
    assert (await ask(simulated, faults)).status == 200


# --- the form ------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(("lines", "end"), [("crlf", b"\r\n"), ("cr", b"\r")])
async def test_line_ends(simulated: Running, dialect: str, lines: str, end: bytes):
    plain = await plain_of(simulated, dialect)
    wire = await ask(simulated, f"lines={lines}", dialect)
    assert wire.body == plain.body.replace(b"\n", end)
    whole = await plain_of(simulated, dialect, False)
    assert (await ask(simulated, f"lines={lines}", dialect, False)).body == whole.body


@EACH
@EITHER
async def test_split_utf8(simulated: Running, dialect: str, stream: bool):
    plain = await plain_of(simulated, dialect, stream)
    wire = await ask(simulated, "split-utf8", dialect, stream)
    assert wire.body == plain.body
    undecodable = 0
    for _, data in wire.reads:
        try:
            data.decode()
        except UnicodeDecodeError:
            undecodable += 1
    # Both halves of each character that was cut.
    characters = (
        [event for event in plain.events if not event.isascii()]
        if stream
        else [plain.body]
    )
    assert undecodable >= 2
    assert undecodable <= 2 * len(characters) + 2


@EACH
@EITHER
async def test_bom(simulated: Running, dialect: str, stream: bool):
    plain = await plain_of(simulated, dialect, stream)
    wire = await ask(simulated, "bom", dialect, stream)
    assert wire.body == BOM + plain.body
    assert wire.is_complete


@EACH
@EITHER
async def test_no_done(simulated: Running, dialect: str, stream: bool):
    plain = await plain_of(simulated, dialect, stream)
    wire = await ask(simulated, "no-done", dialect, stream)
    assert wire.body == plain.body.replace(DONE, b"")
    assert (DONE in plain.body) == (stream and dialect != "generate")
    assert wire.is_complete


@EITHER
async def test_trickle(simulated: Running, stream: bool):
    plain = await ask(simulated, None, "completions", stream, max_tokens=3)
    wire = await ask(simulated, "trickle", "completions", stream, max_tokens=3)
    assert wire.body == plain.body
    assert wire.is_complete
    # A few may meet in one read when the reader is late.
    assert len(wire.reads) > len(plain.body) / 2
    if stream:
        assert {len(chunk) for chunk in wire.chunks} == {1}


@EACH
async def test_oversized_event(simulated: Running, dialect: str):
    plain = await plain_of(simulated, dialect)
    wire = await ask(simulated, "oversized=2000000,after=2", dialect)
    sizes = [len(event) for event in wire.events]
    # The number in `created` is the clock's.
    assert sizes[2] == pytest.approx(2_000_000, abs=20)
    assert max(sizes[:2] + sizes[3:]) < 1000
    assert wire.events[3:] == plain.events[3:]
    assert json.loads(wire.events[2].removeprefix(b"data: ")) == json.loads(
        plain.events[2].removeprefix(b"data: ")
    )


@EACH
async def test_oversized_body(simulated: Running, dialect: str):
    plain = await plain_of(simulated, dialect, False)
    wire = await ask(simulated, "oversized=2000000", dialect, False)
    assert len(wire.body) == 2_000_000 + len(plain.body)
    assert json.loads(wire.body) == json.loads(plain.body)
    assert wire.is_complete


@EITHER
async def test_bomb(simulated: Running, stream: bool):
    wire = await ask(simulated, "bomb=20000000", stream=stream)
    assert wire.header("content-encoding") == "gzip"
    assert wire.is_complete
    assert len(b"".join(wire.chunks)) < 100_000
    unpacked = gzip.decompress(b"".join(wire.chunks))
    assert len(unpacked) >= 20_000_000
    assert unpacked.startswith(b"data: " if stream else b" ")


@EITHER
async def test_content_type(simulated: Running, stream: bool):
    for faults, wanted in (
        ("content-type", "text/html"),
        ("content-type=text/event-stream; charset=x", "text/event-stream; charset=x"),
    ):
        wire = await ask(simulated, faults, stream=stream)
        assert wire.header("content-type") == wanted
        assert wire.is_complete


@EACH
@pytest.mark.parametrize("kind", ["comments", "pings", "empty"])
@pytest.mark.parametrize("after", ["head", "2"])
async def test_only(simulated: Running, dialect: str, kind: str, after: str):
    plain = await plain_of(simulated, dialect)
    faults = f"only={kind},interval=0.005,after={after}"
    async with asyncio.timeout(5):
        stream, given = await first_events(simulated, faults, dialect, 12)
    shown = 0 if after == "head" else 2
    assert given[:shown] == plain.events[:shown]
    rest = set(given[shown:])
    if kind == "comments":
        assert rest == {b":\n\n"}
    elif kind == "pings":
        assert rest == {b'event: ping\ndata: {"type": "ping"}\n\n'}
    else:
        assert len(rest) == 1
        assert text_of(given[-1]) == ""
        assert text_of(plain.events[shown]) != ""
    assert simulated.busy == 1
    await stream.close()
    await until_idle(simulated)


async def test_only_blanks_before_a_whole_reply(simulated: Running):
    request = request_of(
        simulated.url, "chat", False, "only=comments,after=head,interval=0.005"
    )
    async with client.connect(simulated.url) as connection:
        await connection.send(request)
        stream = await connection.head()
        assert [await stream.read() for _ in range(5)] == [b" "] * 5
        await connection.close()
    await until_idle(simulated)


async def first_events(
    running: Running, faults: str, dialect: str, count: int
) -> tuple[client.RawConnection, list[bytes]]:
    connection = await client.RawConnection.open(running.url)
    await connection.send(request_of(running.url, dialect, True, faults))
    stream = await connection.head()
    read = [await stream.read() for _ in range(count)]
    return connection, [
        re.sub(rb'"created":\d+', b'"created":0', data) for data in read
    ]


def text_of(event: bytes) -> str:
    value = json.loads(event.removeprefix(b"data: "))
    if "token" in value:
        return str(value["token"]["text"])
    choice = value["choices"][0]
    return str(choice["delta"]["content"] if "delta" in choice else choice["text"])


# --- through the proxy ---------------------------------------------------------------


async def test_a_model_name_chooses_a_fault_through_the_proxy(
    simulated: Running, start: Starter
):
    block = model_configuration(simulated.url)
    block["modelOverrides"] += [
        {"modelRef": f"acme::v1::{name}", "modelName": f"tgi+{faults}"}
        for name, faults in (
            ("cut", "cut=rst+after=3"),
            ("busy", "status=429+retry-after=9"),
            ("well", "no-done+lines=crlf+split-utf8+bom"),
        )
    ]
    proxy = await start(block)
    for name, kind in (
        ("cut", "upstream_truncated"),
        ("busy", "upstream_status"),
        ("well", "ok"),
    ):
        raw = await proxy.chat({**QUESTION, "model": f"acme::v1::{name}"})
        assert proxy.outcomes[-1]["kind"] == kind
        if name == "busy":
            assert (raw.status, raw.header("retry-after")) == (429, "9")
        elif name == "well":
            assert "“What is your name?”" in read_chat(raw, 2).text
