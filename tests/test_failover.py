"""Several endpoints: another one answers while nothing was said, and the client sees
nothing of it; one that fails is left alone and comes back.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import pytest

from tests.support.client import RawReply, build_request, connect, request, stream
from tests.support.dead import full, not_tls, refusing
from tests.support.dialects import ANTHROPIC, CHAT, CODY, DIALECTS, Dialect
from tests.support.fixtures import QUESTION, Block, Starter, model_configuration
from tests.support.upstream import (
    Close,
    Hang,
    Reset,
    ScriptedUpstream,
    Step,
    Wait,
    anthropic_events,
    chunk,
    json_reply,
    openai_chunks,
    reply,
    sse,
    sse_head,
)
from tests.test_matrix import OPENAI_CHAT, OPENAI_COMPLETIONS, TEXT, TEXTS, Wire

Script = list[Step]
REF = "acme::v1::large"
CODY_PATH = CODY.path


def wire_of(dialect: Dialect) -> Wire:
    return OPENAI_COMPLETIONS if dialect.wants_completions else OPENAI_CHAT


def good(dialect: Dialect, *, streamed: bool) -> Script:
    wire = wire_of(dialect)
    if not streamed:
        return [json_reply(wire.plain("stop"))]
    return sse(*wire.streamed(TEXTS, "stop", True))


async def ask(url: str, dialect: Dialect, *, streamed: bool, **more) -> RawReply:
    more.setdefault("within_s", 2)
    headers = {**dialect.headers, **more.pop("headers", {})}
    body = dialect.body(stream=streamed)
    return await request(url, path=dialect.path, headers=headers, body=body, **more)


def pool_of(*urls: str) -> Block:
    return model_configuration("", endpoints=[{"url": f"{url}/v1"} for url in urls])


# The first endpoint is asked first, so that a test knows who has what to say.
IN_TURN: Block = {"providers": {"acme": {"balance": "round-robin"}}, "fallback": True}


def timed(**seconds: float) -> Block:
    return {
        "providers": {"acme": {"balance": "round-robin", "timeouts": seconds}},
        "fallback": True,
    }


@pytest.fixture
async def second() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as scripted:
        yield scripted


def name_of(url: str) -> str:
    return urlsplit(url).netloc


# ----------------------------------------------------------------- another one answers

OVERLOAD = json_reply({"error": {"message": "busy", "code": 429}}, 429)
HTML = reply(200, {"Content-Type": "text/html"}, "<h1>Bad gateway</h1>")
STATUSES = (408, 425, 429, 502, 503, 504, 529)


def _status(code: int) -> Callable[[Wire], Script]:
    return lambda wire: [reply(code, body="no")]


FAILURES: dict[str, tuple[str, Callable[[Wire], Script]]] = {
    **{f"status {code}": ("upstream_status", _status(code)) for code in STATUSES},
    "closed": ("upstream_unreachable", lambda wire: [Close()]),
    "reset": ("upstream_unreachable", lambda wire: [Reset()]),
    "no HTTP": ("upstream_unreachable", lambda wire: [b"SSH-2.0-x\r\n\r\n"]),
    "half a head": (
        "upstream_unreachable",
        lambda wire: [b"HTTP/1.1 200 OK\r\nContent-", Close()],
    ),
    "HTML": ("upstream_garbled", lambda wire: [HTML]),
    "odd encoding": (
        "upstream_garbled",
        lambda wire: [reply(200, {"Content-Encoding": "br"}, "x")],
    ),
}
STREAM_FAILURES: dict[str, tuple[str, Callable[[Wire], Script]]] = {
    "error as first event": ("upstream_reported", lambda wire: sse(wire.overload)),
    "cut before the first event": (
        "upstream_truncated",
        lambda wire: [sse_head(), Close()],
    ),
    "reset before the first event": (
        "upstream_truncated",
        lambda wire: [sse_head(), Reset()],
    ),
    "cut after the role": (
        "upstream_truncated",
        lambda wire: sse(openai_chunks([])[0], Close()),
    ),
    "no event": ("upstream_truncated", lambda wire: sse()),
    "broken chunk": ("upstream_garbled", lambda wire: [sse_head(), b"zz\r\n"]),
}
PLAIN_FAILURES: dict[str, tuple[str, Callable[[Wire], Script]]] = {
    "cut body": (
        "upstream_truncated",
        lambda wire: [json_reply(wire.plain("stop"))[:-9], Close()],
    ),
}


async def check_failover(
    start: Starter,
    dialect: Dialect,
    first: str,
    second: ScriptedUpstream,
    kind: str,
    streamed: bool,
    settings: Block = IN_TURN,
) -> None:
    second.script(good(dialect, streamed=streamed))
    proxy = await start(pool_of(first, second.url), **settings)
    raw = await ask(proxy.url, dialect, streamed=streamed)
    seen = dialect.read(raw, stream=streamed)
    assert (raw.status, seen.text, seen.error) == (200, TEXT, None)
    (outcome,) = proxy.outcomes
    assert (outcome["kind"], outcome["endpoint"]) == ("ok", name_of(second.url))
    assert outcome["tried"] == [f"{name_of(first)} {kind}"]
    assert outcome["upstream_status"] == 200
    assert [member.in_flight for member in proxy.inside.pools["acme"].members] == [0, 0]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("name", [*FAILURES, *STREAM_FAILURES])
async def test_another_one_streams(start: Starter, upstream, second, name, dialect):
    kind, script = (FAILURES | STREAM_FAILURES)[name]
    upstream.script(script(wire_of(dialect)))
    await check_failover(start, dialect, upstream.url, second, kind, True)


@pytest.mark.parametrize("name", [*FAILURES, *PLAIN_FAILURES])
async def test_another_one_answers_in_one_piece(start: Starter, upstream, second, name):
    kind, script = (FAILURES | PLAIN_FAILURES)[name]
    upstream.script(script(wire_of(CODY)))
    await check_failover(start, CODY, upstream.url, second, kind, False)


@pytest.mark.parametrize("streamed", [True, False])
async def test_refused_never_accepted_or_no_tls(start: Starter, second, streamed):
    connecting = timed(connect=0.05)
    with refusing() as url:
        await check_failover(start, CODY, url, second, "upstream_unreachable", streamed)
    with full() as url:
        kind = "connect_timeout"
        await check_failover(start, CODY, url, second, kind, streamed, connecting)
    async with not_tls() as url:
        await check_failover(start, CODY, url, second, "upstream_unreachable", streamed)


@pytest.mark.parametrize("clock", ["headers", "firstToken"])
async def test_another_one_answers_after_a_clock(
    start: Starter, upstream, second, clock
):
    upstream.script(Hang() if clock == "headers" else [sse_head(), Hang()])
    kind = {"headers": "headers_timeout", "firstToken": "first_token_timeout"}[clock]
    settings = timed(**{clock: 0.05})
    await check_failover(start, CODY, upstream.url, second, kind, True, settings)
    await upstream.closed()


async def test_the_third_one_answers(start: Starter, upstream, second):
    upstream.script(OVERLOAD)
    second.script(good(CHAT, streamed=True))
    with refusing() as url:
        proxy = await start(pool_of(upstream.url, url, second.url), **IN_TURN)
        raw = await ask(proxy.url, CHAT, streamed=True)
    assert CHAT.read(raw, stream=True).text == TEXT
    kinds = [each.split()[1] for each in proxy.outcomes[0]["tried"]]
    assert kinds == ["upstream_status", "upstream_unreachable"]


async def test_what_no_endpoint_takes_is_named_once(start: Starter, upstream, second):
    upstream.script(OVERLOAD)
    second.script(good(CODY, streamed=True))
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    body = CODY.body(stream=True) | {"maxTokensToSample": 10**6}
    raw = await request(proxy.url, path=CODY.path, headers=CODY.headers, body=body)
    assert len(proxy.outcomes[0]["tried"]) == 1
    assert raw.header("x-proxy-adjusted") == "request.max_tokens"


async def test_the_error_of_the_last_one_is_told(start: Starter, upstream, second):
    upstream.script(reply(503, body="starting"))
    second.script(reply(529, body="too busy"))
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    raw = await ask(proxy.url, CHAT, streamed=True)
    assert "too busy" in (CHAT.read(raw, stream=True).error or "")
    (outcome,) = proxy.outcomes
    assert (outcome["kind"], outcome["upstream_status"]) == ("upstream_status", 529)
    assert len(upstream.requests) == len(second.requests) == 1


# --------------------------------------------------------------------- no other is asked


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("code", [400, 401, 403, 404, 413, 422, 500, 501, 302])
async def test_what_is_not_asked_again(
    start: Starter, upstream, second, code, streamed
):
    upstream.script(reply(code, body="no"))
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    raw = await ask(proxy.url, CODY, streamed=streamed)
    assert CODY.read(raw, stream=streamed).error
    assert (len(upstream.requests), second.requests) == (1, [])
    assert "tried" not in proxy.outcomes[0]


LATE: dict[str, Script] = {
    "error event": [chunk(OPENAI_CHAT.overload)],
    "cut": [Close()],
    "reset": [Reset()],
    "broken chunk": [b"zz\r\n"],
    "silence": [Hang()],
}


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("dialect", [CODY, CHAT, ANTHROPIC], ids=lambda d: d.name)
async def test_no_other_is_asked_after_the_first_byte(
    start: Starter, upstream, second, name, dialect
):
    text = [chunk(event) for event in openai_chunks(["a"], None)]
    upstream.script([sse_head(), *text, *LATE[name]])
    settings = timed(betweenTokens=0.1)
    proxy = await start(pool_of(upstream.url, second.url), **settings)
    raw = await ask(proxy.url, dialect, streamed=True)
    seen = dialect.read(raw, stream=True)
    assert seen.text == "a" and seen.error
    assert second.requests == [] and "tried" not in proxy.outcomes[0]


async def test_no_other_is_asked_when_the_client_is_gone(
    start: Starter, upstream, second
):
    upstream.script([Hang()])
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    async with connect(proxy.url) as connection:
        await connection.send(_cody_request(proxy.url))
        await upstream.received()
    await upstream.closed()
    await asyncio.sleep(0.02)
    assert second.requests == []
    assert proxy.outcomes[0]["kind"] == "client_gone"


def _cody_request(url: str) -> bytes:
    return build_request(url, "POST", CODY_PATH, {}, QUESTION, False)


# ------------------------------------------------------------------------- what bounds it


async def test_the_deadline_bounds_all_of_it(start: Starter, upstream, second):
    upstream.script(Hang())
    second.script(Hang())
    proxy = await start(pool_of(upstream.url, second.url), **timed(headers=0.1))
    began = time.monotonic()
    headers = {"X-Timeout-Ms": "150"}
    raw = await ask(proxy.url, CODY, streamed=True, headers=headers)
    assert time.monotonic() - began < 0.3
    error = CODY.read(raw, stream=True).error or ""
    assert "complete the reply within 150 ms" in error
    (outcome,) = proxy.outcomes
    assert outcome["kind"] == "deadline_exceeded"
    assert outcome["tried"] == [f"{name_of(upstream.url)} headers_timeout"]


async def test_the_budget_bounds_the_load_of_an_outage(
    start: Starter, upstream, second, monkeypatch
):
    monkeypatch.setattr("proxy.pool.MOST_RETRIES", 2.0)
    upstream.script(OVERLOAD)
    second.script(OVERLOAD)
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    for _ in range(20):
        assert (await ask(proxy.url, CHAT, streamed=True)).status == 429
    assert len(upstream.requests) + len(second.requests) <= 20 + 2 + 20 * 0.2
    assert sum("tried" in outcome for outcome in proxy.outcomes) <= 6


# ------------------------------------------------------------------------ another model


def two_models(first: str, other: str, other_type: str = "openaicompatible") -> Block:
    """A model ``acme::v1::large``, and ``spare::v1::small`` of another provider."""
    block = model_configuration(first)
    side: Block = {"type": other_type, "endpoints": [{"url": f"{other}/v1"}]}
    if other_type == "anthropic":
        side = {"type": other_type, "endpoint": f"{other}/v1/messages"}
        side["accessToken"] = "sk-up"
    (model,) = block["modelOverrides"]
    block["providerOverrides"].append({"id": "spare", "serverSideConfig": side})
    for ref, name in (("spare::v1::small", "small-1"), ("acme::v1::small", "small-0")):
        block["modelOverrides"].append({**model, "modelRef": ref, "modelName": name})
    return block


def falling_back(ref: str) -> Block:
    return {"models": {REF: {"fallback": ref}}, "fallback": True}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
async def test_fallback_to_a_model_of_the_same_provider(
    start: Starter, upstream, second, dialect, streamed
):
    upstream.script(OVERLOAD).script(good(dialect, streamed=streamed))
    block = two_models(upstream.url, second.url)
    proxy = await start(block, **falling_back("acme::v1::small"))
    raw = await ask(proxy.url, dialect, streamed=streamed)
    assert dialect.read(raw, stream=streamed).text == TEXT
    assert [each.json()["model"] for each in upstream.requests] == [
        "large-1",
        "small-0",
    ]
    (outcome,) = proxy.outcomes
    assert outcome["tried"] == [f"{REF} upstream_status"]
    assert (outcome["kind"], outcome["model"]) == ("ok", "acme::v1::small")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
async def test_fallback_to_a_provider_of_another_dialect(
    start: Starter, upstream, second, dialect, streamed
):
    """What just passed is now translated, and the other way round."""
    upstream.script(reply(503, body="no"))
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    second.script(sse(*anthropic_events(TEXTS)) if streamed else [json_reply(message)])
    block = two_models(upstream.url, second.url, "anthropic")
    proxy = await start(block, **falling_back("spare::v1::small"))
    raw = await ask(proxy.url, dialect, streamed=streamed)
    assert dialect.read(raw, stream=streamed).text == TEXT
    asked = second.last.json()
    assert second.last.path == "/v1/messages" and asked["model"] == "small-1"
    assert asked["messages"][0]["role"] == "user"
    (outcome,) = proxy.outcomes
    assert (outcome["kind"], outcome["provider"]) == ("ok", "spare")


async def test_no_fallback_for_a_request_that_is_wrong(
    start: Starter, upstream, second
):
    upstream.script(reply(400, body="no"))
    block = two_models(upstream.url, second.url)
    proxy = await start(block, **falling_back("spare::v1::small"))
    raw = await ask(proxy.url, CHAT, streamed=True)
    assert raw.status == 400 and second.requests == []


async def test_fallback_only_once(start: Starter, upstream, second):
    upstream.script(OVERLOAD)
    second.script(reply(503, body="also out of order"))
    block = two_models(upstream.url, second.url)
    settings = falling_back("spare::v1::small")
    settings["models"]["spare::v1::small"] = {"fallback": REF}
    proxy = await start(block, **settings)
    raw = await ask(proxy.url, CHAT, streamed=True)
    assert raw.status == 503 and "also out of order" in raw.text
    assert len(upstream.requests) == len(second.requests) == 1


# ----------------------------------------------------------------- left alone, and back


async def test_left_alone_and_back(start: Starter, second, monkeypatch):
    monkeypatch.setattr("proxy.pool.FIRST_BACK_OFF_S", 0.1)
    second.script(good(CHAT, streamed=True))
    first = ScriptedUpstream().script(good(CHAT, streamed=True))
    await first.start()
    await first.stop()  # its port is free now, and refuses
    proxy = await start(pool_of(first.url, second.url), **IN_TURN)
    for _ in range(6):
        await ask(proxy.url, CHAT, streamed=True)
    assert [len(o.get("tried", ())) for o in proxy.outcomes] == [1, 0, 0, 0, 0, 0]
    await first.start(first.port)
    await asyncio.sleep(0.11)
    for _ in range(6):
        raw = await ask(proxy.url, CHAT, streamed=True)
        assert CHAT.read(raw, stream=True).text == TEXT
    assert len(first.requests) >= 2  # the probe, and then its share
    assert not proxy.inside.pools["acme"].members[0].is_closed
    await first.stop()


async def test_success_counts_at_the_end_of_the_stream(
    start: Starter, upstream, second, monkeypatch
):
    """One request at a time until one has a whole reply, not only a good beginning."""
    monkeypatch.setattr("proxy.pool.FIRST_BACK_OFF_S", 0.05)
    go = asyncio.Event()
    events = [chunk(event) for event in openai_chunks(["a"])]
    upstream.script([Close()])
    upstream.script([sse_head(), *events[:2], Wait(go), *events[2:], b"0\r\n\r\n"])
    upstream.script(good(CHAT, streamed=True))
    second.script(good(CHAT, streamed=True))
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    await ask(proxy.url, CHAT, streamed=True)
    await asyncio.sleep(0.06)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):  # one of them is the probe
            asked = stream(proxy.url, path=CHAT.path, body=CHAT.body(stream=True))
            await stack.enter_async_context(asked)
        await upstream.received(2)
        for _ in range(4):
            await ask(proxy.url, CHAT, streamed=True)
        assert len(upstream.requests) == 2
        go.set()
        for _ in range(100):
            if not proxy.inside.pools["acme"].members[0].is_closed:
                break
            await asyncio.sleep(0.01)
    for _ in range(4):
        await ask(proxy.url, CHAT, streamed=True)
    assert len(upstream.requests) > 2


async def test_streams_that_break_off_close_an_endpoint(
    start: Starter, upstream, second
):
    """However well each of them begins."""
    upstream.script(sse(*openai_chunks(["a"], None), Reset()))
    second.script(good(CHAT, streamed=True))
    proxy = await start(pool_of(upstream.url, second.url), **IN_TURN)
    for _ in range(12):
        await ask(proxy.url, CHAT, streamed=True)
    assert len(upstream.requests) == 3


async def test_clients_with_little_time_close_no_endpoint(start: Starter, upstream):
    upstream.script(Hang())
    proxy = await start(pool_of(upstream.url, upstream.url), **IN_TURN)
    for _ in range(8):
        headers = {"X-Timeout-Ms": "10"}
        await ask(proxy.url, CODY, streamed=True, headers=headers)
    assert {outcome["kind"] for outcome in proxy.outcomes} == {"deadline_exceeded"}
    members = proxy.inside.pools["acme"].members
    assert not any(member.is_closed or member.in_flight for member in members)


async def test_a_request_that_cannot_be_put_counts_nowhere(start: Starter, upstream):
    proxy = await start(pool_of(upstream.url, upstream.url), **IN_TURN)
    body = {"messages": [{"speaker": "human", "text": ""}]}
    raw = await proxy.chat(body)
    assert raw.status == 200 and b"event: error" in raw.body
    members = proxy.inside.pools["acme"].members
    assert [member.in_flight for member in members] == [0, 0]


async def test_an_unhealthy_answer_does_not_open_an_endpoint(start: Starter, upstream):
    upstream.script([Close()]).script(reply(503, body="loading"))
    proxy = await start(pool_of(upstream.url), **IN_TURN)
    await ask(proxy.url, CHAT, streamed=True)
    (member,) = proxy.inside.pools["acme"].members
    assert member.is_closed
    raw = await request(proxy.url, "GET", "/health")
    assert raw.status == 503 and member.is_closed
