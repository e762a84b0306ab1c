"""Two things at the same moment: whichever comes first, there is one reply with one end."""

import asyncio
import gzip

import pytest

from tests.support.client import RawReply, build_request, connect, request
from tests.support.dead import full
from tests.support.dialects import ANTHROPIC, CHAT, CODY, Dialect
from tests.support.fixtures import RunningProxy, Starter, model_configuration
from tests.support.upstream import (
    Close,
    Hang,
    Pause,
    Reset,
    Script,
    Step,
    Wait,
    chunk,
    openai_chunks,
    reply,
    sse,
    sse_head,
)

THREE = [CODY, CHAT, ANTHROPIC]
HEAD, *TEXT = [chunk(event) for event in openai_chunks(["a", "b"])]


def wire(proxy: RunningProxy, dialect: Dialect, **headers: str) -> bytes:
    body = dialect.body(stream=True)
    return build_request(proxy.url, "POST", dialect.path, headers, body, False)


async def ask(proxy: RunningProxy, dialect: Dialect, **headers: str) -> RawReply:
    body = dialect.body(stream=True)
    return await request(proxy.url, path=dialect.path, headers=headers, body=body)


@pytest.mark.parametrize("dialect", THREE, ids=lambda dialect: dialect.name)
async def test_the_deadline_and_the_end(start: Starter, upstream, dialect):
    """A dozen times around the very moment."""
    proxy = await start(model_configuration(upstream.url), fallback=True)
    for i in range(12):
        pause = Pause(0.036 + i / 2000)
        upstream.script([sse_head(), HEAD, TEXT[0], pause, *TEXT[1:], b"0\r\n\r\n"])
        raw = await ask(proxy, dialect, **{"X-Timeout-Ms": "42"})
        seen = dialect.read(raw, stream=True)
        kind = proxy.outcomes[-1]["kind"]
        if seen.error is None:
            assert (seen.text, kind) == ("ab", "ok")
        else:
            assert kind == "deadline_exceeded"
    assert len(proxy.outcomes) == 12


ENDS: dict[str, Step] = {"end": b"0\r\n\r\n", "FIN": Close(), "RST": Reset()}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("dialect", THREE, ids=lambda dialect: dialect.name)
async def test_shutdown_and_the_end(start: Starter, upstream, dialect, how):
    go = asyncio.Event()
    proxy = await start(model_configuration(upstream.url), fallback=True)
    upstream.script([sse_head(), HEAD, TEXT[0], Wait(go), ENDS[how]])
    for turns in range(8):
        go.clear()
        asking = asyncio.create_task(ask(proxy, dialect))
        await upstream.received(turns + 1)
        await asyncio.sleep(0.01)
        go.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        for relay in list(proxy.inside.relays):
            relay.interrupt()
            relay.interrupt()
        seen = dialect.read(await asking, stream=True)
        assert seen.text == "a" and seen.error
    kinds = {outcome["kind"] for outcome in proxy.outcomes}
    assert kinds <= {"shutting_down", "upstream_truncated"}


async def test_shutdown_while_connecting(start: Starter):
    with full() as url:
        proxy = await start(model_configuration(url))
        asking = asyncio.create_task(ask(proxy, CODY))
        await asyncio.sleep(0.05)
        for relay in list(proxy.inside.relays):
            relay.interrupt()
        raw = await asking
    assert raw.status == 503 or "shutting down" in raw.text
    assert proxy.outcomes[0]["kind"] == "shutting_down"


async def test_requests_sent_without_waiting(start: Starter, upstream):
    """One after the other on one connection, each with its own reply, in order."""
    upstream.script(sse(*openai_chunks(["a"])))
    upstream.script(reply(503, body="no"))
    upstream.script(sse(Pause(0.02), *openai_chunks(["c"])))
    proxy = await start(model_configuration(upstream.url), fallback=True)
    async with connect(proxy.url) as connection:
        await connection.send(wire(proxy, CHAT) * 3)
        replies = [await connection.reply() for _ in range(3)]
    seen = [CHAT.read(raw, stream=True) for raw in replies]
    assert [each.text for each in seen] == ["a", "", "c"]
    assert [raw.status for raw in replies] == [200, 503, 200]


async def test_client_leaves_with_requests_behind(start: Starter, upstream):
    upstream.script(Hang())
    proxy = await start(model_configuration(upstream.url), fallback=True)
    async with connect(proxy.url) as connection:
        await connection.send(wire(proxy, CHAT) * 3)
        await upstream.received()
    await upstream.closed()
    await asyncio.sleep(0.02)
    assert len(upstream.requests) == 1 and not proxy.inside.relays


OLD: dict[str, tuple[Script, str | None]] = {
    "ok": (sse(*openai_chunks(["a"])), None),
    "error": ([sse_head(), HEAD, TEXT[0], Close()], "before the end of the reply"),
    "silence": ([sse_head(), HEAD, TEXT[0], Hang()], "go on with its answer"),
}


@pytest.mark.parametrize("name", OLD)
async def test_http_1_0(start: Starter, upstream, name):
    """Nothing but the end of the connection ends its replies, errors included."""
    script, error = OLD[name]
    upstream.script(script)
    timeouts = {"betweenTokens": 0.05}
    proxy = await start(model_configuration(upstream.url), timeouts=timeouts)
    async with connect(proxy.url) as connection:
        old = wire(proxy, CODY, Connection="keep-alive").replace(
            b"HTTP/1.1", b"HTTP/1.0"
        )
        await connection.send(old)
        raw = await connection.reply()
    seen = CODY.read(raw, stream=True)
    assert raw.framing == "close" and seen.text == "a"
    assert (seen.error is None) if error is None else error in (seen.error or "")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_bomb(start: Starter, upstream, streamed):
    """A few kilobytes that stand for 200 MB of blanks: an error, and soon."""
    content_type = "text/event-stream" if streamed else "application/json"
    bomb = gzip.compress(b" " * 200_000_000, 1)
    headers = {"Content-Type": content_type, "Content-Encoding": "gzip"}
    upstream.script(reply(200, headers, bomb))
    proxy = await start(
        model_configuration(upstream.url), limits={"eventBytes": 1_000_000}
    )
    raw = await request(proxy.url, path=CODY.path, body=CODY.body(stream=streamed))
    seen = CODY.read(raw, stream=streamed)
    assert seen.error
    assert proxy.outcomes[0]["kind"] in ("event_too_large", "upstream_garbled")
    assert proxy.outcomes[0]["duration_s"] < 1
