"""A client that stops reading stops its upstream, and costs little memory meanwhile.

``pytest tests/test_backpressure.py -s`` prints how much, with what the upstream and the
client themselves need in the same process.
"""

import asyncio
import gc
import gzip
import sys
import tracemalloc

import pytest

from tests.support.client import RawConnection, build_request
from tests.support.dialects import ANTHROPIC, CHAT, CODY, CODY_1, TGI, Dialect
from tests.support.fixtures import RunningProxy, Starter, model_configuration
from tests.support.upstream import (
    Hang,
    Reset,
    Script,
    chunk,
    openai_chunks,
    reply,
    sse_head,
)
from tests.test_matrix import OPENAI_COMPLETIONS

STREAMS = 5
MIB = 2**20
ALLOWED_BYTES = MIB


def events_of(dialect: Dialect, text: str, number: int, finish: str | None) -> bytes:
    texts = [text] * number
    if dialect.wants_completions:
        return b"".join(OPENAI_COMPLETIONS.streamed(texts, finish, False))
    return b"".join(openai_chunks(texts, finish))


def plain(dialect: Dialect, text: str) -> Script:
    """Without an end, as fast as they are taken, 20 kB at a time."""
    block = events_of(dialect, text, max(1, 20_000 // (200 + len(text))), None)
    return [sse_head(), *[chunk(block)] * 2000, Hang()]


def packed(dialect: Dialect, text: str) -> Script:
    """20 MB that came in a few packets."""
    events = events_of(dialect, text, 20 * MIB // (200 + len(text)), "stop")
    return [reply(200, _PACKED_HEAD, gzip.compress(events, 1))]


_PACKED_HEAD = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}
# The longest for their text, and the oldest clients, who get all of the text so far.
CASES: dict[str, tuple[Dialect, str]] = {
    "passed, short texts": (CHAT, "word"),
    "to cody v2, all escaped": (CODY, "\u00e9" * 3000),
    "to cody v1, short texts": (CODY_1, "w"),
    "to anthropic": (ANTHROPIC, "word"),
    "to tgi": (TGI, "word"),
}


async def stalled(proxy: RunningProxy, dialect: Dialect) -> RawConnection:
    connection = await RawConnection.open(proxy.url, receive_buffer=4096)
    body = dialect.body(stream=True)
    await connection.send(
        build_request(proxy.url, "POST", dialect.path, dialect.headers, body, False)
    )
    return connection


@pytest.mark.parametrize("how", [plain, packed], ids=["plain", "packed"])
@pytest.mark.parametrize("name", CASES)
async def test_memory_of_a_client_that_does_not_read(
    start: Starter, upstream, name, how
):
    dialect, text = CASES[name]
    upstream.script(how(dialect, text))
    proxy = await start(model_configuration(upstream.url), fallback=True)
    # The first one makes what is made once.
    connections = [await stalled(proxy, dialect)]
    await asyncio.sleep(0.1)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(STREAMS):
            connections.append(await stalled(proxy, dialect))
        await upstream.received(STREAMS + 1, within_s=20)
        sent = -1
        while sent != upstream.sent_bytes:  # the kernel has buffers, too
            sent = upstream.sent_bytes
            await asyncio.sleep(0.15)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    each = (after - before) / STREAMS
    sys.stdout.write(
        f"\n{name}, {how.__name__}: {each / 1024:.0f} KiB per stream,"
        f" {(peak - before) / STREAMS / 1024:.0f} KiB at the peak"
    )
    assert len(proxy.inside.relays) == STREAMS + 1
    assert each < ALLOWED_BYTES
    for connection in connections:
        await connection.close()
    for _ in range(200):  # what had come as a whole may be asked again
        if upstream.open == proxy.inside.upstream.idle:
            break
        await asyncio.sleep(0.01)
    assert upstream.open == proxy.inside.upstream.idle
    for _ in range(100):
        if not proxy.inside.relays:
            break
        await asyncio.sleep(0.01)
    assert {outcome["kind"] for outcome in proxy.outcomes} == {"client_gone"}


async def read_late(proxy: RunningProxy, dialect: Dialect, after_s: float):
    connection = await stalled(proxy, dialect)
    await asyncio.sleep(after_s)
    raw = await connection.reply(within_s=20)
    await connection.close()
    return raw


@pytest.mark.parametrize("how", ["plain", "packed"])
@pytest.mark.parametrize(
    "dialect", [CHAT, CODY, ANTHROPIC, TGI], ids=lambda dialect: dialect.name
)
async def test_who_reads_late_gets_it_all(start: Starter, upstream, dialect, how):
    """What was held goes on: also what had come long before, packed or at its end."""
    number = 3000
    events = events_of(dialect, "wordy " * 40, number, "stop")
    if how == "packed":
        upstream.script([reply(200, _PACKED_HEAD, gzip.compress(events))])
    else:
        upstream.script([sse_head(), chunk(events), b"0\r\n\r\n"])
    # In a shorter time than the client takes: none of it is the upstream's.
    proxy = await start(
        model_configuration(upstream.url),
        fallback=True,
        timeouts={"betweenTokens": 0.15, "firstToken": 5},
        keepAlive={"every": 0.05},
    )
    raw = await read_late(proxy, dialect, 0.4)
    seen = dialect.read(raw, stream=True)
    assert seen.error is None and len(seen.text) == number * 240
    assert proxy.outcomes[0]["kind"] == "ok"


async def test_a_slow_client_is_not_taken_for_a_missing_first_token(
    start: Starter, upstream
):
    events = events_of(CODY, "wordy " * 40, 12_000, "stop")
    upstream.script([sse_head(), chunk(events), b"0\r\n\r\n"])
    proxy = await start(
        model_configuration(upstream.url),
        timeouts={"betweenTokens": 0.15, "firstToken": 0.3},
        keepAlive={"every": 0.05},
    )
    raw = await read_late(proxy, CODY, 0.4)
    assert CODY.read(raw, stream=True).error is None
    assert proxy.outcomes[0]["kind"] == "ok"


@pytest.mark.parametrize("dialect", [CHAT, CODY], ids=lambda dialect: dialect.name)
async def test_who_reads_late_gets_the_error(start: Starter, upstream, dialect):
    """The upstream broke off while the client did not read: after all that came."""
    events = events_of(dialect, "wordy " * 40, 2000, None)
    upstream.script([sse_head(), chunk(events), Reset()])
    proxy = await start(model_configuration(upstream.url), fallback=True)
    raw = await read_late(proxy, dialect, 0.2)
    seen = dialect.read(raw, stream=True)
    assert "before the end of the reply" in (seen.error or "")
    assert proxy.outcomes[0]["kind"] == "upstream_truncated"


async def test_a_silent_upstream_is_told_from_a_client_that_held_it(
    start: Starter, upstream
):
    """Once the client reads again the clock runs again."""
    events = events_of(CHAT, "wordy " * 40, 12_000, None)
    upstream.script([sse_head(), chunk(events), Hang()])
    proxy = await start(
        model_configuration(upstream.url), timeouts={"betweenTokens": 0.1}
    )
    raw = await read_late(proxy, CHAT, 0.4)
    seen = CHAT.read(raw, stream=True)
    assert len(seen.text) == 12_000 * 240 and "go on with its answer" in (
        seen.error or ""
    )
    (outcome,) = proxy.outcomes
    assert outcome["kind"] == "token_gap_timeout"
    assert 0.45 < outcome["duration_s"] < 1


async def test_the_deadline_ends_a_client_that_does_not_read(
    start: Starter, upstream, monkeypatch
):
    monkeypatch.setattr("proxy.relay.LAST_WRITE_S", 0.05)
    upstream.script(plain(CHAT, "x" * 5000))
    proxy = await start(model_configuration(upstream.url), timeouts={"chat": 0.3})
    connection = await stalled(proxy, CHAT)
    await upstream.closed(within_s=2)
    for _ in range(100):
        if proxy.outcomes:
            break
        await asyncio.sleep(0.01)
    (outcome,) = proxy.outcomes
    assert outcome["kind"] == "deadline_exceeded"
    (member,) = proxy.inside.pools["acme"].members
    assert member.failures == 0  # it was not the endpoint
    await connection.close()


async def test_who_is_late_for_the_deadline_still_gets_the_error(
    start: Starter, upstream
):
    upstream.script(plain(CODY, "x" * 5000))
    proxy = await start(model_configuration(upstream.url), timeouts={"chat": 0.3})
    raw = await read_late(proxy, CODY, 0.4)
    seen = CODY.read(raw, stream=True)
    assert "did not complete the reply within 300 ms" in (seen.error or "")
    assert proxy.outcomes[0]["kind"] == "deadline_exceeded"


async def test_who_does_not_read_at_shutdown_still_gets_the_error(
    start: Starter, upstream
):
    upstream.script(plain(CODY, "x" * 5000))
    proxy = await start(model_configuration(upstream.url))
    reading = asyncio.create_task(read_late(proxy, CODY, 0.4))
    await asyncio.sleep(0.3)
    for relay in list(proxy.inside.relays):
        relay.interrupt()
    seen = CODY.read(await reading, stream=True)
    assert "shutting down" in (seen.error or "")
    assert proxy.outcomes[0]["kind"] == "shutting_down"
