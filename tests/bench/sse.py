"""How fast the event stream parser is, beside the decoder of the OpenAI SDK.

The stream is 200,000 chat chunks as an OpenAI-like server sends them, 263 bytes each on
average, one token in six not ASCII. The consumer only counts the events. A figure is the
median of five runs, in CPU time, so that a busy machine does not spoil it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable

from proxy.sse import Parser

EVENTS = 200_000
RUNS = 5
TOKENS = (" the", " stream", ",", " of", " events", " café 世界 😀")
CHUNK = (
    'data: {"id":"chatcmpl-9d1f6a2b7c3e48059b1c","object":"chat.completion.chunk",'
    '"created":1760000000,"model":"meta-llama/Llama-3.1-8B-Instruct",'
    '"system_fingerprint":"fp_44","choices":[{"index":0,"delta":'
    '{"content":"%s"},"logprobs":null,"finish_reason":null}]}\n\n'
)

Count = Callable[[Iterable[bytes]], int]


def run() -> None:
    chunks = [(CHUNK % token).encode() for token in TOKENS]
    events = [chunks[i % len(chunks)] for i in range(EVENTS)]
    named = [b"event: content_block_delta\n" + event for event in events]
    sdk = openai_decoder()

    size = sum(map(len, events))
    print(f"{EVENTS:,} events, {size / 1e6:.1f} MB, {size / EVENTS:.0f} bytes each;")
    print(f"median CPU time of {RUNS} runs; ratio to the decoder of the OpenAI SDK\n")
    print(
        f"{'parser':<22}{'reads':<12}{'k events/s':>10}{'MB/s':>8}{'µs/event':>10}"
        f"{'ratio':>8}"
    )
    rates: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for reads, data in cuts(events).items():
        theirs = events_per_second(sdk, data) if sdk else None
        ours = events_per_second(count_proxy, data)
        rates[reads] = ours
        if theirs:
            ratios[reads] = ours / theirs
            row("openai SDK", reads, theirs, size, 1.0)
        row("proxy.sse", reads, ours, size, ratios.get(reads))
    # Anthropic's form of a stream: an event line before each data line.
    for reads, data in cuts(named).items():
        rate = events_per_second(count_proxy, data)
        row("proxy.sse, event lines", reads, rate, sum(map(len, named)), None)

    print()
    for reads, rate, ratio in (("one event", 1e6, 1.5), ("16 KiB", 1.5e6, 2.0)):
        verdict(f"{rate / 1e3:,.0f} k events/s, {reads}", rates[reads] >= rate)
        if reads in ratios:
            verdict(f"{ratio} x the SDK, {reads}", ratios[reads] >= ratio)
        else:
            print(f"not compared: {ratio} x the SDK, {reads} (openai is not installed)")


def cuts(events: list[bytes]) -> dict[str, list[bytes]]:
    stream = b"".join(events)

    def cut(size: int) -> list[bytes]:
        return [stream[i : i + size] for i in range(0, len(stream), size)]

    return {"one event": events, "16 KiB": cut(16 * 1024), "64 KiB": cut(64 * 1024)}


def events_per_second(count: Count, reads: list[bytes]) -> float:
    times = []
    for _ in range(RUNS):
        gc.collect()
        start = time.process_time()
        counted = count(reads)
        times.append(time.process_time() - start)
        assert counted == EVENTS, counted
    return EVENTS / statistics.median(times)


def count_proxy(reads: Iterable[bytes]) -> int:
    feed = Parser().feed
    counted = 0
    for data in reads:
        counted += len(feed(data))
    return counted


def openai_decoder() -> Count | None:
    try:
        from openai._streaming import SSEDecoder
    except ImportError:
        return None

    def count(reads: Iterable[bytes]) -> int:
        counted = 0
        for _ in SSEDecoder().iter_bytes(iter(reads)):
            counted += 1
        return counted

    return count


def row(parser: str, reads: str, rate: float, size: int, ratio: float | None) -> None:
    print(
        f"{parser:<22} {reads:<11}{rate / 1e3:>10,.0f}{rate * size / EVENTS / 1e6:>8.0f}"
        f"{1e6 / rate:>10.2f}" + (f"{ratio:>8.2f}" if ratio else "")
    )


def verdict(floor: str, met: bool) -> None:
    print(f"floor {'met' if met else 'missed'}: {floor}")
