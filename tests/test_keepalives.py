"""What a client hears while the upstream is silent: in its dialect's safe form, in time,
between two events only, and readable by its own parser.
"""

import pytest

from proxy.dialects.base import COMMENT
from tests.support.client import RawReply, request
from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.dialects import (
    ANTHROPIC,
    CHAT,
    CODY,
    CODY_1,
    COMPLETIONS,
    DIALECTS,
    GATEWAY,
    LEGACY,
    Dialect,
)
from tests.support.fixtures import Block, RunningProxy, Starter, model_configuration
from tests.support.sdk import AnthropicMessages, OpenAIChat, OpenAICompletions
from tests.support.upstream import (
    Close,
    Hang,
    Pause,
    Script,
    chunk,
    reply,
    sse_head,
)
from tests.test_matrix import (
    ANTHROPIC as ANTHROPIC_WIRE,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    TEXT,
    TEXTS,
    Wire,
)

EVERY_S = 0.025
SILENCE_S = 0.1
FORMS = {
    "cody v2": b'event: completion\ndata: {"deltaText":""}\n\n',
    "cody v1": b'event: completion\ndata: {"completion":"Hello","stopReason":""}\n\n',
    "legacy": b'event: completion\ndata: {"completion":"Hello","stopReason":""}\n\n',
    "openai chat": COMMENT,
    "openai completions": COMMENT,
    "anthropic": b'event: ping\ndata: {"type":"ping"}\n\n',
    "tgi": COMMENT,
}
SPEAKING = [dialect for dialect in DIALECTS if dialect.name in FORMS]


def wire_of(dialect: Dialect) -> Wire:
    return OPENAI_COMPLETIONS if dialect.wants_completions else OPENAI_CHAT


def settings(**keep_alive: object) -> Block:
    return {"fallback": True, "keepAlive": {"every": EVERY_S, **keep_alive}}


def silent_within(wire: Wire) -> Script:
    """Silence after the first text, and within an event of the second."""
    events = wire.streamed(TEXTS, "stop", True)
    at = next(i for i, event in enumerate(events) if b"Hello" in event)
    begin, half, rest = events[: at + 1], events[at + 1], events[at + 2 :]
    return [
        sse_head(),
        *map(chunk, begin),
        Pause(SILENCE_S),
        chunk(half[:20]),
        Pause(SILENCE_S),
        chunk(half[20:]),
        *map(chunk, rest),
        b"0\r\n\r\n",
    ]


def silent_before(wire: Wire) -> Script:
    events = wire.streamed(TEXTS, "stop", True)
    silence = Pause(SILENCE_S)
    return [silence, sse_head(), silence, *map(chunk, events), b"0\r\n\r\n"]


async def ask(proxy: RunningProxy, dialect: Dialect, **headers: str) -> RawReply:
    return await request(
        proxy.url,
        path=dialect.path,
        headers={**dialect.headers, **headers},
        body=dialect.body(stream=True),
        within_s=3,
    )


def check_timing(raw: RawReply, form: bytes, pings: int) -> None:
    """None before its time, and none left out."""
    # Without the first text itself, which the oldest clients are told again.
    at = [at for at, piece in raw.reads if piece == form][-pings:]
    assert len(at) == pings
    # A busy machine makes both ends late, so only their number tells.
    assert 2 <= pings <= raw.reads[-1][0] / EVERY_S + 1


@pytest.mark.parametrize("dialect", SPEAKING, ids=lambda dialect: dialect.name)
async def test_in_the_answer(start: Starter, upstream, dialect):
    upstream.script(silent_within(wire_of(dialect)))
    proxy = await start(model_configuration(upstream.url), **settings())
    raw = await ask(proxy, dialect)
    seen = dialect.read(raw, stream=True)
    assert (seen.text, seen.error) == (TEXT, None)
    check_timing(raw, FORMS[dialect.name], seen.pings)
    assert proxy.outcomes[0]["kind"] == "ok"


@pytest.mark.parametrize("dialect", SPEAKING, ids=lambda dialect: dialect.name)
async def test_before_the_answer(start: Starter, upstream, dialect):
    upstream.script(silent_before(wire_of(dialect)))
    own = settings(beforeFirstToken=True)
    proxy = await start(model_configuration(upstream.url), **own)
    raw = await ask(proxy, dialect)
    seen = dialect.read(raw, stream=True)
    assert (raw.status, seen.text, seen.error) == (200, TEXT, None)
    form = FORMS[dialect.name].replace(b'"Hello"', b'""')
    check_timing(raw, form, seen.pings)
    assert raw.reads[0][1].endswith(form)
    content_type = raw.header("content-type") or ""
    assert content_type.partition(";")[0] == "text/event-stream"


@pytest.mark.parametrize("dialect", [CODY, CHAT, ANTHROPIC], ids=lambda d: d.name)
async def test_not_before_the_answer_unless_asked_for(
    start: Starter, upstream, dialect
):
    upstream.script(silent_before(wire_of(dialect)))
    proxy = await start(model_configuration(upstream.url), **settings())
    raw = await ask(proxy, dialect)
    assert raw.reads[0][0] > 2 * SILENCE_S
    assert dialect.read(raw, stream=True).pings == 0


async def test_none_where_clients_cannot_read_any(start: Starter, upstream):
    upstream.script(silent_within(OPENAI_CHAT))
    own = settings(beforeFirstToken=True)
    proxy = await start(model_configuration(upstream.url), **own)
    seen = GATEWAY.read(await ask(proxy, GATEWAY), stream=True)
    assert (seen.text, seen.pings) == (TEXT, 0)


@pytest.mark.parametrize("dialect", [CODY, CHAT, ANTHROPIC], ids=lambda d: d.name)
async def test_none_while_the_upstream_speaks(start: Starter, upstream, dialect):
    events = OPENAI_CHAT.streamed(["a"] * 12, "stop", True)
    paced = [each for one in events for each in (chunk(one), Pause(0.02))]
    upstream.script([sse_head(), *paced, b"0\r\n\r\n"])
    proxy = await start(model_configuration(upstream.url), **settings(every=0.1))
    seen = dialect.read(await ask(proxy, dialect), stream=True)
    assert (seen.text, seen.pings) == ("a" * 12, 0)


async def test_switched_off(start: Starter, upstream):
    upstream.script(silent_within(OPENAI_CHAT))
    proxy = await start(model_configuration(upstream.url), **settings(every=0))
    assert CHAT.read(await ask(proxy, CHAT), stream=True).pings == 0


async def test_none_in_replies_of_one_piece(start: Starter, upstream):
    upstream.script(Pause(SILENCE_S), reply(200, body="{}"))
    own = settings(beforeFirstToken=True)
    proxy = await start(model_configuration(upstream.url), **own)
    raw = await request(proxy.url, path=CODY.path, body=CODY.body(stream=False))
    assert raw.status == 502


async def test_none_where_bytes_are_to_stay_as_they_are(start: Starter, upstream):
    script = silent_within(OPENAI_CHAT)
    upstream.script(script)
    own = settings(beforeFirstToken=True)
    own["providers"] = {"acme": {"adjust": False}}
    proxy = await start(model_configuration(upstream.url), **own)
    raw = await ask(proxy, CHAT)
    assert raw.body == b"".join(OPENAI_CHAT.streamed(TEXTS, "stop", True))


# ------------------------------------------------------------------- read by the clients


@pytest.mark.parametrize("version", [0, 1, 2, 8])
@pytest.mark.parametrize("place", [silent_before, silent_within])
async def test_cody_clients_read_through_them(start: Starter, upstream, version, place):
    """The parser of its chat stops for good at what it does not know."""
    upstream.script(place(OPENAI_CHAT))
    own = settings(beforeFirstToken=True)
    proxy = await start(model_configuration(upstream.url), **own)
    raw = await proxy.chat(version=str(version) if version else None)
    assert_ends_once(raw)
    chat, code = read_chat(raw, version), read_autocomplete(raw, version)
    assert (chat.ended, chat.text, chat.violations) == ("complete", TEXT, [])
    assert (code.text, code.stop_reason, code.violations) == (TEXT, "stop", [])


@pytest.mark.parametrize("place", [silent_before, silent_within])
@pytest.mark.parametrize(
    "client",
    [OpenAIChat(), OpenAICompletions(), AnthropicMessages()],
    ids=lambda client: client.name,
)
async def test_official_clients_read_through_them(
    start: Starter, upstream, client, place
):
    dialect = COMPLETIONS if client.name == "openai completions" else CHAT
    upstream.script(place(wire_of(dialect)))
    own = settings(beforeFirstToken=True)
    proxy = await start(model_configuration(upstream.url), **own)
    answer = await client.streamed(proxy.url)
    assert answer.text == TEXT


@pytest.mark.parametrize("place", [silent_before, silent_within])
async def test_official_client_of_what_passes_from_anthropic(
    start: Starter, upstream, place
):
    upstream.script(place(ANTHROPIC_WIRE))
    endpoint = f"{upstream.url}/v1/messages"
    block = model_configuration(
        upstream.url, "anthropic", endpoint=endpoint, accessToken="sk-up"
    )
    proxy = await start(block, **settings(beforeFirstToken=True))
    answer = await AnthropicMessages().streamed(proxy.url)
    assert answer.text == TEXT


# ------------------------------------------------------ errors after an early beginning

ERRORS: dict[str, tuple[Script, str, str]] = {
    "status": ([reply(503, body="loading")], "upstream_status", "loading"),
    "closed": ([Close()], "upstream_unreachable", "closed before a reply"),
    "event": (
        [sse_head(), chunk(OPENAI_CHAT.overload), Hang()],
        "upstream_reported",
        "overloaded",
    ),
    "cut": ([sse_head(), Close()], "upstream_truncated", "before the end"),
    "HTML": (
        [reply(200, {"Content-Type": "text/html"}, "<h1>Oh</h1>")],
        "upstream_garbled",
        "Oh",
    ),
    "deadline": ([Hang()], "deadline_exceeded", "context deadline exceeded"),
    "deadline after the head": (
        [sse_head(), Hang()],
        "deadline_exceeded",
        "context deadline exceeded",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("dialect", SPEAKING, ids=lambda dialect: dialect.name)
async def test_error_after_an_early_beginning(start: Starter, upstream, dialect, name):
    script, kind, message = ERRORS[name]
    upstream.script(Pause(3 * EVERY_S), *script)
    own = settings(beforeFirstToken=True)
    proxy = await start(model_configuration(upstream.url), **own)
    raw = await ask(proxy, dialect, **{"X-Timeout-Ms": "150"})
    seen = dialect.read(raw, stream=True)
    assert raw.status == 200 and seen.pings >= 1
    assert seen.text == "" and message in (seen.error or "")
    assert proxy.outcomes[0]["kind"] == kind
    assert proxy.outcomes[0]["status"] == 200


@pytest.mark.parametrize("dialect", [CODY_1, LEGACY], ids=lambda d: d.name)
async def test_no_other_endpoint_after_an_early_beginning(
    start: Starter, upstream, dialect
):
    upstream.script(Pause(3 * EVERY_S), reply(503, body="loading"))
    endpoints = [{"url": f"{upstream.url}/v1"}, {"url": f"{upstream.url}/v1"}]
    block = model_configuration("", endpoints=endpoints)
    proxy = await start(block, **settings(beforeFirstToken=True))
    seen = dialect.read(await ask(proxy, dialect), stream=True)
    assert "loading" in (seen.error or "") and len(upstream.requests) == 1
