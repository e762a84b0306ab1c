"""Five clocks: each ends a request by itself, is told from the others, and is reset only
by what goes on with the answer.
"""

import asyncio
import io
import time

import pytest

from proxy.listener import Listener
from proxy.log import ExchangeLog
from proxy.redact import Redactor
from proxy.relay import Relay
from proxy.server import Proxy
from proxy.upstream import Upstream
from tests.support.client import RawReply, request, stream
from tests.support.dead import full
from tests.support.dialects import ANTHROPIC, CHAT, CODY, DIALECTS, Dialect
from tests.support.fixtures import (
    Block,
    RunningProxy,
    Starter,
    load,
    model_configuration,
)
from tests.support.upstream import (
    Hang,
    Pause,
    Script,
    chunk,
    data,
    event,
    openai_chunk,
    sse_head,
)
from tests.test_matrix import (
    ANTHROPIC as ANTHROPIC_WIRE,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    Wire,
)

CLOCK_S = 0.05
# One that a busy machine may take longer than its time for.
SLACK_S = 0.5

BEGIN = "did not begin its reply"
FIRST = "did not begin its answer"
GAP = "did not go on with its answer"
TOTAL = "did not complete the reply"


async def ask(
    proxy: RunningProxy, dialect: Dialect, *, streamed: bool = True, **headers: str
) -> RawReply:
    return await request(
        proxy.url,
        path=dialect.path,
        headers={**dialect.headers, **headers},
        body=dialect.body(stream=streamed),
        within_s=2,
    )


async def check_expired(
    proxy: RunningProxy,
    dialect: Dialect,
    kind: str,
    message: str,
    *,
    text: str = "",
    streamed: bool = True,
    **headers: str,
) -> None:
    began = time.monotonic()
    raw = await ask(proxy, dialect, streamed=streamed, **headers)
    took_s = time.monotonic() - began
    assert CLOCK_S <= took_s < CLOCK_S + SLACK_S
    seen = dialect.read(raw, stream=streamed)
    assert seen.text == text
    if text:
        assert raw.status == 200
    elif dialect.says_status or not streamed:
        assert raw.status == 504
    if dialect.name != "gateway" or text:
        assert message in (seen.error or "")
    else:  # it names the vendor only
        assert "upstream provider openai" in (seen.error or "")
    (outcome,) = proxy.outcomes
    assert outcome["kind"] == kind
    assert "http" not in outcome["error"]  # no URL


def timed(seconds: Block, **more) -> Block:
    providers = {"acme": {"timeouts": seconds}}
    return {"providers": providers, "fallback": True, "keepAlive": {"every": 0}, **more}


def wire_of(dialect: Dialect, kind: str) -> Wire:
    if kind == "anthropic":
        return ANTHROPIC_WIRE
    return OPENAI_COMPLETIONS if dialect.wants_completions else OPENAI_CHAT


def configured(url: str, kind: str) -> Block:
    if kind == "anthropic":
        endpoint = f"{url}/v1/messages"
        return model_configuration(url, kind, endpoint=endpoint, accessToken="sk-up")
    return model_configuration(url)


# What says nothing: before the answer and within it.
EMPTY_COMPLETION = data(
    {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "gpt-test",
        "choices": [{"index": 0, "text": "", "finish_reason": None}],
    }
)
NOISE: dict[tuple[str, str], tuple[str, bytes]] = {
    ("openai", "silence"): ("openaicompatible", b""),
    ("openai", "comments"): ("openaicompatible", b": still here\n\n"),
    ("openai", "empty lines"): ("openaicompatible", b"\n\n"),
    ("openai", "empty deltas"): ("openaicompatible", openai_chunk({"content": ""})),
    ("openai", "no choices"): ("openaicompatible", openai_chunk(None)),
    ("openai", "unknown events"): ("openaicompatible", event("queued", {"place": 3})),
    ("anthropic", "pings"): ("anthropic", event("ping", {"type": "ping"})),
    ("anthropic", "empty deltas"): (
        "anthropic",
        event(
            "content_block_delta",
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": ""},
            },
        ),
    ),
}
CASES = [
    (dialect, *noise)
    for dialect in DIALECTS
    for noise in NOISE
    if noise[0] == "openai" or dialect.name != "gateway"
]
IDS = [f"{dialect.name} | {wire} {noise}" for dialect, wire, noise in CASES]


def forever(noise: bytes) -> Script:
    if not noise:
        return [Hang()]
    return [each for _ in range(100) for each in (chunk(noise), Pause(0.01))]


def noise_for(dialect: Dialect, wire: str, name: str) -> tuple[str, bytes]:
    kind, noise = NOISE[wire, name]
    if dialect.wants_completions and (wire, name) == ("openai", "empty deltas"):
        noise = EMPTY_COMPLETION
    return kind, noise


@pytest.mark.parametrize(("dialect", "wire", "name"), CASES, ids=IDS)
async def test_first_token(start: Starter, upstream, dialect, wire, name):
    kind, noise = noise_for(dialect, wire, name)
    events = wire_of(dialect, kind).streamed([], None, False)
    upstream.script([sse_head(), *map(chunk, events[:2]), *forever(noise)])
    settings = timed({"firstToken": CLOCK_S, "headers": 30, "betweenTokens": 30})
    proxy = await start(configured(upstream.url, kind), **settings)
    await check_expired(proxy, dialect, "first_token_timeout", f"{FIRST} within 50 ms")
    await upstream.closed()


@pytest.mark.parametrize(("dialect", "wire", "name"), CASES, ids=IDS)
async def test_gap_between_tokens(start: Starter, upstream, dialect, wire, name):
    kind, noise = noise_for(dialect, wire, name)
    # Several texts: from the second one on they need no parser.
    events = wire_of(dialect, kind).streamed(["a", "b", "c"], None, False)
    upstream.script([sse_head(), *map(chunk, events), *forever(noise)])
    settings = timed({"firstToken": 30, "headers": 30, "betweenTokens": CLOCK_S})
    proxy = await start(configured(upstream.url, kind), **settings)
    message = f"{GAP} within 50 ms"
    await check_expired(proxy, dialect, "token_gap_timeout", message, text="abc")
    await upstream.closed()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
async def test_headers(start: Starter, upstream, dialect):
    upstream.script(Hang())
    proxy = await start(
        model_configuration(upstream.url), **timed({"headers": CLOCK_S})
    )
    await check_expired(proxy, dialect, "headers_timeout", f"{BEGIN} within 50 ms")
    await upstream.closed()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
async def test_connect(start: Starter, dialect, streamed):
    with full() as url:
        proxy = await start(model_configuration(url), **timed({"connect": CLOCK_S}))
        message = "connect timed out"
        if dialect.name == "gateway":  # for that it has a status of its own
            raw = await ask(proxy, dialect, streamed=streamed)
            assert raw.status == 504 or "failed to make request" in raw.text
            assert proxy.outcomes[0]["kind"] == "connect_timeout"
            return
        await check_expired(
            proxy, dialect, "connect_timeout", message, streamed=streamed
        )


@pytest.mark.parametrize("given", ["by the client", "by the configuration"])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
async def test_total_before_text(start: Starter, upstream, dialect, streamed, given):
    upstream.script(Hang())
    seconds: Block = {} if "client" in given else {"chat": CLOCK_S, "code": CLOCK_S}
    headers = {"X-Timeout-Ms": "50"} if "client" in given else {}
    proxy = await start(model_configuration(upstream.url), **timed(seconds))
    message = f"{TOTAL} within 50 ms"
    await check_expired(
        proxy, dialect, "deadline_exceeded", message, streamed=streamed, **headers
    )
    await upstream.closed()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
async def test_total_while_tokens_flow(start: Starter, upstream, dialect):
    wire = wire_of(dialect, "openaicompatible")
    texts = wire.streamed(["a"] * 100, None, False)
    paced = [each for text in texts for each in (chunk(text), Pause(0.01))]
    upstream.script([sse_head(), *paced])
    seconds = {"firstToken": 0.1, "betweenTokens": 0.1, "headers": 0.1}
    proxy = await start(model_configuration(upstream.url), **timed(seconds))
    headers = {**dialect.headers, "X-Timeout-Ms": "200"}
    raw = await request(
        proxy.url, path=dialect.path, headers=headers, body=dialect.body(stream=True)
    )
    seen = dialect.read(raw, stream=True)
    assert seen.text.count("a") > 5 and TOTAL in (seen.error or "")
    assert proxy.outcomes[0]["kind"] == "deadline_exceeded"
    await upstream.closed()


async def test_slow_tokens_are_no_gap(start: Starter, upstream):
    events = OPENAI_CHAT.streamed(["a", "b", "c", "d"], "stop", False)
    paced = [each for text in events for each in (chunk(text), Pause(0.05))]
    upstream.script([sse_head(), *paced, b"0\r\n\r\n"])
    seconds = {"firstToken": 0.15, "betweenTokens": 0.15, "headers": 0.15}
    proxy = await start(model_configuration(upstream.url), **timed(seconds))
    raw = await ask(proxy, CHAT)
    assert CHAT.read(raw, stream=True).text == "abcd"
    assert proxy.outcomes[0]["kind"] == "ok"


@pytest.mark.parametrize("dialect", [CODY, CHAT, ANTHROPIC], ids=lambda d: d.name)
async def test_a_provider_has_its_own(start: Starter, upstream, dialect):
    """And what it does not say is as for all."""
    upstream.script([sse_head(), Hang()])
    general = {"headers": 20, "firstToken": CLOCK_S}
    settings = timed({"headers": 30}, timeouts=general)
    proxy = await start(model_configuration(upstream.url), **settings)
    await check_expired(proxy, dialect, "first_token_timeout", f"{FIRST} within 50 ms")


async def test_replies_in_one_piece_have_only_the_deadline(start: Starter, upstream):
    """Their headers come when all is said."""
    upstream.script(Pause(0.15), [sse_head()], Pause(0.15), chunk(b"{}"), b"0\r\n\r\n")
    seconds = {"headers": 0.05, "firstToken": 0.05, "betweenTokens": 0.05}
    proxy = await start(model_configuration(upstream.url), **timed(seconds))
    await ask(proxy, CODY, streamed=False)
    assert proxy.outcomes[0]["kind"] not in ("headers_timeout", "first_token_timeout")
    assert proxy.outcomes[0]["duration_s"] > 0.25


async def test_after_the_finish_no_token_is_waited_for(
    start: Starter, upstream, monkeypatch
):
    """Only usage, for a short time: the answer is whole."""
    monkeypatch.setattr("proxy.relay.GRACE_S", CLOCK_S)
    events = OPENAI_CHAT.streamed(["a"], "stop", False)[:-1]
    upstream.script([sse_head(), *map(chunk, events), Hang()])
    proxy = await start(model_configuration(upstream.url), **timed({}))
    raw = await ask(proxy, CHAT)
    assert CHAT.read(raw, stream=True).text == "a"
    assert proxy.outcomes[0]["kind"] == "ok"
    assert CLOCK_S <= proxy.outcomes[0]["duration_s"] < CLOCK_S + SLACK_S


async def test_a_tick_in_the_turn_in_which_the_client_goes(upstream):
    """Its connection is closing, but nobody has been told so far."""
    upstream.script([sse_head(), chunk(openai_chunk({"content": "a"})), Hang()])
    settings = load(
        {
            "modelConfiguration": model_configuration(upstream.url),
            "keepAlive": {"every": 0.001},
        }
    )
    log = io.StringIO()
    redact = Redactor([])
    proxy = Proxy(settings, Upstream(), ExchangeLog(log, redact), redact)
    listener = Listener(proxy)
    host, port = (await listener.start())[0]
    try:
        asking = stream(
            f"http://{host}:{port}", path=CODY.path, body=CODY.body(stream=True)
        )
        async with asking as reply:
            await reply.read_until(b'"a"')
            (relay,) = proxy.relays
            assert isinstance(relay, Relay)
            transport = relay._response._client.transport
            assert transport is not None
            transport.abort()
            for _ in range(2):  # the first one may only see that something was said
                time.sleep(0.002)  # noqa: ASYNC251  # within one turn
                relay._tick()
        await asyncio.wait_for(proxy.is_idle.wait(), 2)
    finally:
        await listener.stop()
    assert '"kind":"client_gone"' in log.getvalue()
    await upstream.closed()
