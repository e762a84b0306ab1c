"""Requests that are answered without a task: they look like all the others."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from proxy import connections, metrics, relay, server
from proxy.outbox import Outbox
from tests.support.client import RawConnection, RawReply, build_request, connect
from tests.support.dialects import ANTHROPIC, CHAT, CODY, Dialect
from tests.support.fixtures import (
    QUESTION,
    RunningProxy,
    Starter,
    load,
    model_configuration,
    running,
)
from tests.support.process import until
from tests.support.upstream import (
    Close,
    Hang,
    Script,
    ScriptedUpstream,
    Step,
    Wait,
    chunk,
    json_reply,
    openai_chunk,
    openai_chunks,
    sse,
    sse_head,
)

TEXTS = ["a", "b"]
GOOD = sse(*openai_chunks(TEXTS))
BEGUN: Script = [sse_head(), *(chunk(event) for event in openai_chunks(TEXTS, None))]
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "large-1",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "ab"},
            "finish_reason": "stop",
        }
    ],
}


def asking(
    proxy: RunningProxy,
    dialect: Dialect = CHAT,
    *,
    stream: bool = False,
    text: str = "",
) -> bytes:
    body = json.loads(json.dumps(dialect.body(stream=stream)).replace("{text}", text))
    if text:
        body["messages"].append({"role": "user", "content": text})
    return build_request(proxy.url, "POST", dialect.path, dialect.headers, body, False)


@pytest.fixture
async def bare(upstream: ScriptedUpstream, start: Starter) -> RunningProxy:
    return await start(model_configuration(upstream.url))


@pytest.fixture
async def proxy(upstream: ScriptedUpstream, bare: RunningProxy) -> RunningProxy:
    upstream.script(json_reply(ANSWER))
    return bare


async def ask(connection: RawConnection, data: bytes) -> RawReply:
    await connection.send(data)
    return await connection.reply()


async def test_whole_requests_need_no_task(proxy):
    """If this fails, all others here show nothing: aiohttp's inside has changed."""
    async with connect(proxy.url) as connection:
        for text in ("", "x", "xy"):
            answered = await ask(connection, asking(proxy, text=text))
            assert (answered.status, answered.json()) == (200, ANSWER)
    assert len(proxy.outcomes) == 3
    # The first has to connect; no other one does.
    assert proxy.tasks == 0


async def test_an_unknown_aiohttp_gets_all_requests(proxy, monkeypatch):
    monkeypatch.setattr(connections, "CAN_VISIT", False)
    async with connect(proxy.url) as connection:
        for _ in range(2):
            assert (await ask(connection, asking(proxy))).json() == ANSWER
    assert proxy.tasks == 2


async def test_a_visit_is_logged_and_counted_as_any_request(proxy):
    async with connect(proxy.url) as connection:
        await ask(connection, asking(proxy))
        await ask(connection, asking(proxy))
    first, second = proxy.outcomes
    for each in (first, second):
        assert each.pop("id") and each.pop("time")
        assert (
            0 <= each.pop("duration_s") < 1 and 0 < each.pop("first_token_s", 0.1) < 1
        )
    assert first == second
    assert second["kind"] == "ok" and second["model"] == "acme::v1::large"


@pytest.mark.parametrize("pause_s", [0.0, 0.01])
async def test_a_body_that_comes_later_is_waited_for(proxy, pause_s):
    data = asking(proxy)
    at = data.index(b"\r\n\r\n") + 4
    async with connect(proxy.url) as connection:
        for cut in (at, at + 1, len(data) - 1):
            await connection.send(data[:cut])
            await asyncio.sleep(pause_s)
            assert (await ask(connection, data[cut:])).json() == ANSWER
    assert proxy.tasks == 0


async def test_a_body_that_does_not_come_is_aiohttps(upstream, start, monkeypatch):
    monkeypatch.setattr(connections, "HOLD_S", 0.05)
    upstream.script(json_reply(ANSWER))
    proxy = await start(model_configuration(upstream.url), timeouts={"body": 0.3})
    data = asking(proxy)
    async with connect(proxy.url) as connection:
        await connection.send(data[:-1])
        late = await connection.reply()
    assert late.status == 408
    assert [each["kind"] for each in proxy.outcomes] == ["request_timeout"]
    async with connect(proxy.url) as connection:
        await connection.send(data[:-1])
        await asyncio.sleep(0.1)
        assert (await ask(connection, data[-1:])).json() == ANSWER
    assert proxy.tasks == 2


async def test_a_client_that_leaves_its_body_out_leaves_nothing(proxy):
    data = asking(proxy)
    async with connect(proxy.url) as connection:
        await connection.send(data[:-1])
        await asyncio.sleep(0.05)
        assert len(proxy.listener._connections.incomplete) == 1
    async with connect(proxy.url) as connection:
        assert (await ask(connection, data)).json() == ANSWER
    assert not proxy.listener._connections.incomplete


async def test_requests_in_a_row_are_answered_in_a_row(bare, upstream):
    proxy = bare
    for number in range(6):
        upstream.script(json_reply({**ANSWER, "id": str(number)}))
    data = b"".join(asking(proxy, text="x" * number) for number in range(6))
    async with connect(proxy.url) as connection:
        await connection.send(data[:700])
        await asyncio.sleep(0.01)
        await connection.send(data[700:])
        ids = [(await connection.reply()).json()["id"] for _ in range(6)]
    assert ids == list("012345")
    asked = [each.json()["messages"][1:] for each in upstream.requests]
    assert [len(more[0]["content"]) if more else 0 for more in asked] == list(range(6))


async def test_the_rest_of_a_request_is_none_of_its_own(proxy):
    """Though it looks like one: its beginning came together with another request."""
    data = asking(proxy)
    plain = build_request(proxy.url, "GET", "/healthz", (), None, False)
    begun = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: "
    async with connect(proxy.url) as connection:
        assert (await ask(connection, data)).json() == ANSWER
        assert (await ask(connection, plain + begun)).status == 200
        await asyncio.sleep(0.01)
        answered = await ask(connection, data)
        assert answered.header("Content-Type") == "text/plain; charset=utf-8"
    assert len(proxy.outcomes) == 1


async def test_a_connection_has_visits_again_after_other_requests(proxy):
    plain = build_request(proxy.url, "GET", "/healthz", (), None, False)
    async with connect(proxy.url) as connection:
        for _ in range(3):
            assert (await ask(connection, asking(proxy))).json() == ANSWER
            assert (await ask(connection, plain)).status == 200
    assert proxy.tasks == 3


async def test_a_head_too_large_is_refused_after_the_reply_before_it(start):
    """Both come in one turn of the loop, at the end of which the reply goes out."""
    loop = asyncio.get_running_loop()
    wrong: list[Any] = []
    loop.set_exception_handler(lambda _, context: wrong.append(context))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        block = model_configuration(f"http://127.0.0.1:{listening.getsockname()[1]}")
        proxy = await start(block, limits={"headerBytes": 1024})
        port = int(proxy.url.rpartition(":")[2])
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(asking(proxy))
        asked, _ = await loop.sock_accept(listening)
        with client, asked:
            asked.setblocking(False)
            client.setblocking(False)
            await loop.sock_recv(asked, 2**16)
            asked.send(json_reply(ANSWER))
            await loop.sock_recv(client, 2**16)
            client.send(asking(proxy))
            await loop.sock_recv(asked, 2**16)
            asked.send(json_reply(ANSWER))
            client.send(b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % (b"a" * 800) * 7)
            heard = b""
            while data := await loop.sock_recv(client, 2**16):
                heard += data
    assert re.findall(rb"HTTP/1.1 (\d+)", heard) == [b"200", b"431"]
    assert not wrong


async def test_more_than_is_held_is_left_with_the_client(bare, upstream, monkeypatch):
    proxy = bare
    monkeypatch.setattr(connections, "MOST_HELD_BYTES", 64 * 1024)
    gate = asyncio.Event()
    upstream.script([Wait(gate), json_reply(ANSWER)]).script(json_reply(ANSWER))
    data = asking(proxy, text="x" * 30_000)
    async with connect(proxy.url) as connection:
        await connection.send(asking(proxy))
        await upstream.received()
        sending = asyncio.create_task(connection.send(data * 600))
        await asyncio.sleep(0.2)
        assert not sending.done()
        gate.set()
        for _ in range(601):
            assert (await connection.reply()).json() == ANSWER
        await sending


async def test_a_new_connection_is_made_by_a_task(upstream, start):
    """Nothing is open at first, and a server may close what was."""
    upstream.script([json_reply(ANSWER), Close()])
    proxy = await start(model_configuration(upstream.url))
    async with connect(proxy.url) as connection:
        for _ in range(3):
            assert (await ask(connection, asking(proxy))).json() == ANSWER
            await asyncio.sleep(0.01)
    assert upstream.opened == 3
    assert [each["kind"] for each in proxy.outcomes] == ["ok"] * 3


async def warmed(
    proxy: RunningProxy,
    upstream: ScriptedUpstream,
    dialect: Dialect,
    *then: Step | Script,
) -> RawConnection:
    """A connection whose next request meets an open connection to the upstream.

    Args: then: what the upstream says to the requests that follow.
    """
    upstream.script(GOOD)
    for script in then:
        upstream.script(script)
    connection = await RawConnection.open(proxy.url)
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.status == 200 and answered.complete
    return connection


@pytest.fixture(params=[CODY, CHAT, ANTHROPIC], ids=lambda dialect: dialect.name)
def dialect(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_an_error_status_is_said(bare, upstream, dialect):
    proxy, refusal = bare, json_reply({"error": {"message": "too long"}}, 400)
    connection = await warmed(proxy, upstream, dialect, refusal, GOOD)
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert b"too long" in answered.body
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.status == 200 and answered.complete
    assert [each["kind"] for each in proxy.outcomes][1:] == ["upstream_status", "ok"]
    await connection.close()


async def test_an_error_in_mid_stream_is_said(bare, upstream, dialect):
    proxy, broken = bare, chunk(b'data: {"error": {"message": "out of memory"}}\n\n')
    connection = await warmed(proxy, upstream, dialect, [*BEGUN, broken, Hang()])
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.complete and b"out of memory" in answered.body
    assert proxy.outcomes[-1]["kind"] == "upstream_reported"
    await connection.close()


async def test_a_connection_that_breaks_is_said(bare, upstream, dialect):
    proxy = bare
    connection = await warmed(proxy, upstream, dialect, [*BEGUN, Close()])
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.complete
    assert proxy.outcomes[-1]["kind"] == "upstream_truncated"
    await connection.close()


async def test_a_stale_connection_is_not_the_clients_business(bare, upstream, dialect):
    """It is closed as the request goes out, before anything of a reply."""
    proxy = bare
    connection = await warmed(proxy, upstream, dialect, [Close()], GOOD)
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.status == 200 and answered.complete
    assert [each["kind"] for each in proxy.outcomes] == ["ok", "ok"]
    await connection.close()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_hangs_up_is_noticed(bare, upstream, dialect, begun):
    proxy, script = bare, BEGUN if begun else []
    connection = await warmed(proxy, upstream, dialect, [*script, Hang()])
    await connection.send(asking(proxy, dialect, stream=True))
    await upstream.received(2)
    if begun:
        await (await connection.head()).read()
    await connection.close()
    await upstream.closed(1)
    assert [each["kind"] for each in proxy.outcomes] == ["ok", "client_gone"]
    assert not proxy.inside.relays


async def test_a_deadline_is_kept(upstream, start, dialect):
    block = model_configuration(upstream.url)
    proxy = await start(block, timeouts={"betweenTokens": 0.2})
    connection = await warmed(proxy, upstream, dialect, [*BEGUN, Hang()])
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.complete and b"200 ms" in answered.body
    assert proxy.outcomes[-1]["kind"] == "token_gap_timeout"
    await connection.close()


async def test_a_shutdown_is_said(upstream, start, dialect):
    block = model_configuration(upstream.url)
    async with running(load({"modelConfiguration": block})) as proxy:
        connection = await warmed(proxy, upstream, dialect, [*BEGUN, Hang()])
        await connection.send(asking(proxy, dialect, stream=True))
        await (await connection.head()).read()
        stopping = asyncio.create_task(proxy.listener.stop())
        body = await connection._reader.read()
        assert b"shutting down" in body
        await stopping
        assert proxy.outcomes[-1]["kind"] == "shutting_down"
    await connection.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_may_still_come_after_the_signal_to_stop(upstream, chunked):
    upstream.script(json_reply(ANSWER))
    block = model_configuration(upstream.url)
    async with running(load({"modelConfiguration": block}), grace_s=2) as proxy:
        body = CHAT.body(stream=False)
        data = build_request(proxy.url, "POST", CHAT.path, (), body, chunked)
        async with connect(proxy.url) as connection:
            await connection.send(data[:-1])
            await asyncio.sleep(0.05)
            stopping = asyncio.create_task(proxy.listener.stop())
            await asyncio.sleep(0.05)
            answered = await ask(connection, data[-1:])
            assert answered.json() == ANSWER
            await stopping


async def test_a_bug_in_a_callback_is_ours_and_said(
    bare, upstream, dialect, monkeypatch
):
    proxy = bare
    connection = await warmed(proxy, upstream, dialect, GOOD)

    class Broken(dict[str, bool]):
        def __missing__(self, text: str) -> bool:
            raise RuntimeError("made up")

    monkeypatch.setattr(relay, "_IS_STREAM", Broken())
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert b"internal error" in answered.body
    assert proxy.outcomes[-1]["kind"] == "internal"
    await connection.close()


class BrokenOutbox(Outbox):
    def write(self, transport: object, data: bytes) -> bool:
        raise RuntimeError("made up")


async def test_a_bug_in_asking_is_ours_and_said(bare, upstream, dialect, monkeypatch):
    proxy = bare
    connection = await warmed(proxy, upstream, dialect, GOOD)
    inside = proxy.inside.upstream
    await until(lambda: inside.idle == 1)
    ((idle,),) = inside._idle.values()
    with monkeypatch.context() as patch:
        patch.setattr(idle, "_outbox", BrokenOutbox(asyncio.get_running_loop()))
        answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert b"internal error" in answered.body
    assert proxy.outcomes[-1]["kind"] == "internal" and not proxy.inside.relays
    answered = await ask(connection, asking(proxy, dialect, stream=True))
    assert answered.status == 200 and answered.complete
    await connection.close()


async def test_a_bug_in_counting_leaves_the_connection_usable(
    bare, upstream, monkeypatch
):
    proxy = bare
    connection = await warmed(proxy, upstream, CHAT, GOOD)
    await asyncio.sleep(0.05)  # the end of that reply may come a little later
    wrong: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: wrong.append(context["exception"]))

    def fail(*_: object) -> None:
        raise RuntimeError("made up")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_BATCH", 1)
        patch.setattr(metrics, "bisect_left", fail)
        assert (await ask(connection, asking(proxy, CHAT, stream=True))).complete
    assert list(map(str, wrong)) == ["made up"]
    assert (await ask(connection, asking(proxy, CHAT, stream=True))).complete
    await connection.close()


async def test_whoever_finds_no_place_waits_for_one(upstream, start):
    proxy = await start(model_configuration(upstream.url), limits={"inFlight": 1})
    gate = asyncio.Event()
    answer = json_reply(ANSWER)
    connection = await warmed(proxy, upstream, CHAT, [Wait(gate), answer], answer)
    async with connect(proxy.url) as other:
        await connection.send(asking(proxy))
        await upstream.received(2)
        await other.send(asking(proxy))
        await asyncio.sleep(0.05)
        assert len(upstream.requests) == 2
        gate.set()
        assert (await connection.reply()).json() == ANSWER
        assert (await other.reply()).json() == ANSWER
    waited = [each.get("waited_s") for each in proxy.outcomes]
    assert waited[:2] == [None, None] and waited[2] >= 0.04
    await connection.close()


async def test_rates_count_every_request_once(upstream, start):
    upstream.script(json_reply(ANSWER))
    proxy = await start(
        model_configuration(upstream.url),
        limits={"token": {"chat": {"requestsPerMinute": 3}}},
    )
    async with connect(proxy.url) as connection:
        statuses = [(await ask(connection, asking(proxy))).status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


async def test_what_the_day_refuses_counts_once_for_the_minute(upstream, start):
    upstream.script(json_reply(ANSWER))
    limits = {"requestsPerMinute": 5, "requestsPerDay": 1}
    proxy = await start(
        model_configuration(upstream.url), limits={"token": {"chat": limits}}
    )
    async with connect(proxy.url) as connection:
        for _ in range(6):
            await ask(connection, asking(proxy))
    day, minute = "token.chat.requestsPerDay", "token.chat.requestsPerMinute"
    refused_by = [each.get("limit") for each in proxy.outcomes]
    assert refused_by == [None, day, day, day, day, minute]


async def test_a_head_that_was_let_in_is_not_let_in_by_other_settings(upstream, start):
    upstream.script(json_reply(ANSWER))
    proxy = await start(
        model_configuration(upstream.url),
        auth={"tokens": [{"name": "a", "token": "x" * 16}]},
    )
    data = asking(proxy).replace(
        b"\r\n\r\n", b"\r\nAuthorization: Bearer %b\r\n\r\n" % (b"x" * 16), 1
    )
    async with connect(proxy.url) as connection:
        assert (await ask(connection, data)).status == 200
        other = load(
            {
                "modelConfiguration": model_configuration(upstream.url),
                "auth": {"tokens": [{"name": "b", "token": "y" * 16}]},
            }
        )
        old = proxy.inside
        proxy.listener.swap(server.Proxy(other, old.upstream, old.log, old.redact))
        assert (await ask(connection, data)).status == 401


async def test_a_connection_is_idle_only_between_requests(upstream, start):
    proxy = await start(model_configuration(upstream.url), timeouts={"idle": 0.3})
    gate = asyncio.Event()
    upstream.script([Wait(gate), json_reply(ANSWER)])
    async with connect(proxy.url) as connection:
        await connection.send(asking(proxy))
        await asyncio.sleep(0.5)
        gate.set()
        assert (await connection.reply()).json() == ANSWER
        await asyncio.sleep(0.2)
        assert (await ask(connection, asking(proxy))).json() == ANSWER
        assert await connection.at_end(1)
    assert proxy.tasks == 0


async def test_a_connection_is_not_idle_within_a_request(upstream, start):
    """A body may be on its way when the time is up."""
    upstream.script(json_reply(ANSWER))
    proxy = await start(model_configuration(upstream.url), timeouts={"idle": 0.3})
    data = asking(proxy)
    async with connect(proxy.url) as connection:
        await asyncio.sleep(0.2)
        await connection.send(data[:-1])
        await asyncio.sleep(0.2)
        assert (await ask(connection, data[-1:])).json() == ANSWER


@pytest.fixture
async def both(upstream: ScriptedUpstream) -> AsyncIterator[list[RunningProxy]]:
    """A proxy with visits, and one without."""
    block = {"modelConfiguration": model_configuration(upstream.url)}
    async with running(load(block)) as one, running(load(block)) as other:
        other.listener._connections.visitor = _Nobody()  # type: ignore[assignment]
        yield [one, other]


class _Nobody:
    known: dict[bytes, object] = {}

    def meet(self, head: bytes, message: object) -> None:
        return None


def _requests(url: str) -> list[bytes]:
    def made(method: str, path: str, body: Any, *headers: tuple[str, str]) -> bytes:
        return build_request(url, method, path, headers, body, False)

    chat, cody = CHAT.path, CODY.path
    return [
        made("POST", chat, CHAT.body(stream=False)),
        made("POST", chat, CHAT.body(stream=True)),
        made("POST", chat, b'{"model": "nobody", "messages": []}'),
        made("POST", chat, b"{"),
        made("POST", chat, b""),
        made("POST", cody, QUESTION),
        made("POST", cody, CODY.body(stream=False)),
        made("POST", "/v1/messages", ANTHROPIC.body(stream=True)),
        made("POST", "/nowhere", b"{}"),
        made("GET", "/healthz", None),
        made("POST", chat, CHAT.body(stream=False), ("Expect", "100-continue")),
        build_request(url, "POST", chat, (), CHAT.body(stream=False), True),
    ]


def _told(answered: RawReply) -> tuple[Any, ...]:
    """What must be the same in two replies to one request."""
    changing = ("date", "x-request-id")
    headers = [pair for pair in answered.headers if pair[0].lower() not in changing]
    body = re.sub(rb'"created":\d+', b"", answered.body)
    return answered.status, headers, answered.framing, answered.complete, body


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_replies_are_the_same_with_and_without_visits(both, upstream, data):
    upstream.script(sse(openai_chunk({"content": "a"}), *openai_chunks(TEXTS)))
    picks = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=6))
    length = sum(len(_requests(both[0].url)[pick]) for pick in picks)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    told = []
    for proxy in both:
        sent = b"".join(_requests(proxy.url)[pick] for pick in picks)
        async with connect(proxy.url) as connection:
            for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
                await connection.send(sent[start:end])
                await asyncio.sleep(0.001)
            told.append([_told(await connection.reply()) for _ in picks])
    assert told[0] == told[1]
