"""What one event costs: parsed, translated from OpenAI's to Cody's bytes, and relayed
through the whole proxy between two sockets.
"""

import asyncio
import gc
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from proxy import config
from proxy.dialects.cody import CumulativeWriter, DeltaWriter
from proxy.dialects.openai import OpenAIReader
from proxy.listener import Listener
from proxy.log import ExchangeLog
from proxy.redact import Redactor
from proxy.server import Proxy
from proxy.sse import Parser
from proxy.stops import Cutter
from proxy.translation import Translation
from proxy.upstream import Upstream
from tests.support.client import request
from tests.support.fixtures import QUESTION, model_configuration
from tests.support.upstream import ScriptedUpstream, openai_chunk, sse

EVENTS = 20_000
STREAM_EVENTS = 500  # of one cumulative stream, which is quadratic by design
STREAMS = 200
BURST = 64
RUNS = 5
FLOOR_US = 3.0

_WORDS = (" the", " model", " says", " naïve", "\n", "  return", " 日本")


def _reads(events: int, per_read: int) -> list[bytes]:
    chunks = [openai_chunk({"content": _WORDS[n % len(_WORDS)]}) for n in range(events)]
    return [
        b"".join(chunks[at : at + per_read]) for at in range(0, len(chunks), per_read)
    ]


def _median_us(run: Callable[[], object], events: int) -> float:
    times = []
    for _ in range(RUNS):
        gc.collect()
        before = time.process_time()
        run()
        times.append((time.process_time() - before) / events * 1e6)
    return statistics.median(times)


def _parse(reads: list[bytes]) -> None:
    parser = Parser()
    for data in reads:
        parser.feed(data)


def _translate(reads: list[bytes], version: int, cutter: bool) -> None:
    writer_type = DeltaWriter if version >= 2 else CumulativeWriter
    exchange = Translation(
        OpenAIReader(),
        writer_type(version, True),
        stream=True,
        content_type="text/event-stream",
        limit_bytes=2**20,
        cutter=Cutter(["\n\n", "\n\r\n"], ["</s>"]) if cutter else None,
    )
    for data in reads:
        exchange.receive_data(data)


def run() -> None:
    print(f"{'µs of CPU per event, one core':<44}{'1 a read':>10}{'64 a read':>11}")
    worst: dict[str, float] = {}
    for label, events, job in (
        ("parse", EVENTS, _parse),
        ("translate, api-version 2", EVENTS, lambda r: _translate(r, 2, False)),
        ("translate, cutting at stops", EVENTS, lambda r: _translate(r, 2, True)),
        (
            f"translate, api-version 1, {STREAM_EVENTS} events",
            STREAM_EVENTS,
            lambda r: _translate(r, 1, False),
        ),
    ):
        figures = []
        for per_read in (1, 64):
            reads = _reads(events, per_read)
            figures.append(_median_us(lambda j=job, r=reads: j(r), events))  # type: ignore[misc]
        print(f"{label:<44}{figures[0]:>10.2f}{figures[1]:>11.2f}")
        worst[label] = max(figures)
    met = worst["translate, api-version 2"] < FLOOR_US
    print(f"\ntranslation under {FLOOR_US} µs: {'met' if met else 'MISSED'}\n")
    print(f"{'whole exchange, proxy process only':<44}{'µs/event':>10}")
    print(
        f"{f'{BURST} events in one burst':<44}{asyncio.run(_measure_exchange()):>10.2f}"
    )


async def _measure_exchange() -> float:
    """Run upstream and client in processes of their own, the proxy in this one."""
    upstream = await _process("upstream")
    assert upstream.stdout is not None
    upstream_url = (await upstream.stdout.readline()).decode().strip()
    try:
        return await _exchange(upstream_url)
    finally:
        upstream.terminate()
        await upstream.wait()


async def _process(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, *arguments, stdout=asyncio.subprocess.PIPE
    )


async def _exchange(upstream_url: str) -> float:
    file = {
        "listen": "127.0.0.1:0",
        "modelConfiguration": model_configuration(upstream_url),
    }
    settings = config.load(yaml.safe_dump(file), environ={}, directory=Path())
    redact, upstream = Redactor(), Upstream()
    log = ExchangeLog(io.StringIO(), redact)
    listener = Listener(Proxy(settings, upstream, log, redact))
    (address,) = await listener.start()
    url = f"http://127.0.0.1:{address[1]}/.api/completions/stream?api-version=2"
    before = time.process_time()
    client = await _process("client", url)
    await client.wait()
    spent = time.process_time() - before
    await listener.stop()
    await upstream.close()
    assert client.returncode == 0
    return spent / STREAMS / BURST * 1e6


async def _serve() -> None:
    async with ScriptedUpstream() as upstream:
        chunks = [openai_chunk({"content": " word"}) for _ in range(BURST - 1)]
        last = openai_chunk({}, "stop") + b"data: [DONE]\n\n"
        upstream.script(sse(b"".join(chunks) + last))
        print(upstream.url, flush=True)
        await asyncio.Event().wait()


async def _ask(url: str) -> None:
    for _ in range(STREAMS):
        raw = await request(url, body=QUESTION)
        assert raw.body.count(b"deltaText") == BURST - 1


if __name__ == "__main__":
    if sys.argv[1] == "upstream":
        asyncio.run(_serve())
    else:
        asyncio.run(_ask(sys.argv[2]))
