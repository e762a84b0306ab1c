"""Limits: who is let in, who waits, who is told to come back later, and how."""

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy import limits
from proxy.admission import Admission, Permit
from proxy.config import Rates, Settings, TokenLimits
from proxy.errors import QueueTimeout, RateLimited
from proxy.limits import InFlight, RateCounter, plans
from proxy.memory_storage import SWEPT_KEYS, MemoryStorage
from tests.support.client import RawReply, build_request, connect, request, stream
from tests.support.cody import read_chat
from tests.support.fixtures import (
    QUESTION,
    RunningProxy,
    Starter,
    load,
    model_configuration,
    running,
)
from tests.support.metrics import scrape
from tests.support.redis import RedisServer
from tests.support.upstream import (
    Hang,
    ScriptedUpstream,
    chunk,
    json_reply,
    openai_chunks,
    sse,
    sse_head,
)

PATH = "/.api/completions/stream?api-version=2"
ANSWER = sse(*openai_chunks(["Hello"], usage=(3, 4)))
BEGUN = [sse_head(), chunk(openai_chunks(["a"])[1]), Hang()]
CHAT: dict[str, Any] = {
    "model": "large-1",
    "messages": [{"role": "user", "content": "Hi"}],
}
ENDLESS = CHAT | {"max_tokens": 5}


def auth(*names: str, **own: object) -> dict[str, object]:
    tokens = []
    for name in names:
        digest = hashlib.sha256(name.encode()).hexdigest()
        token = {"name": name, "sha256": digest}
        tokens.append(token | ({"limits": own[name]} if name in own else {}))
    return {"tokens": tokens}


async def ask(proxy: RunningProxy, token: str = "ann", **options) -> RawReply:
    headers = {"Authorization": f"token {token}"}
    return await request(
        proxy.url, path=PATH, body=QUESTION, headers=headers, **options
    )


@contextlib.asynccontextmanager
async def asking(proxy: RunningProxy, token: str = "ann") -> AsyncIterator[None]:
    """A request that is being answered for as long as the block runs."""
    headers = {"Authorization": f"token {token}"}
    async with stream(proxy.url, path=PATH, body=QUESTION, headers=headers) as reply:
        assert reply.status == 200
        yield


async def waiting(proxy: RunningProxy, count: int, within_s: float = 2.0) -> None:
    """Wait until so many requests are in the queue."""
    headers = {"Authorization": "token ann"}
    try:
        async with asyncio.timeout(within_s):
            while (await scrape(proxy.url, headers)).value("waiting") != count:
                pass
    except TimeoutError:
        raise AssertionError(f"never {count} in the queue") from None


def exchanges(proxy: RunningProxy) -> list[dict]:
    return [line for line in proxy.outcomes if line["route"] != "/-/metrics"]


async def ended(proxy: RunningProxy, count: int) -> list[dict]:
    """Wait until so many requests are over; return their log lines."""
    async with asyncio.timeout(2):
        while len(found := exchanges(proxy)) < count:
            await scrape(proxy.url, {"Authorization": "token ann"})
    return found


# ------------------------------------------------------------------ places in flight


@pytest.mark.parametrize(
    ("own", "status", "limit", "whose"),
    [
        ({"limits": {"inFlight": 1, "waiting": 0}}, 503, "inFlight", "of this proxy"),
        (
            {"limits": {"waiting": 0}, "providers": {"acme": {"inFlight": 1}}},
            503,
            "provider.inFlight",
            "of acme",
        ),
        (
            {"limits": {"waiting": 0, "token": {"inFlight": 1}}},
            429,
            "token.inFlight",
            'for "chat_completions"',
        ),
    ],
)
async def test_queue_of_no_length(start: Starter, upstream, own, status, limit, whose):
    upstream.script(BEGUN)
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), auth=auth("ann"), **own)
    async with asking(proxy):
        raw = await ask(proxy)
        assert raw.status == status
        assert raw.header("retry-after") == "5"
        assert raw.header("content-type") == "text/plain; charset=utf-8"
        assert raw.text == (
            f"too many requests at a time: the limit {whose} is 1, and the queue is"
            " full; try again in 5 s\n"
        )
    await ended(proxy, 2)
    assert (await ask(proxy)).status == 200  # the place is free again
    refused = exchanges(proxy)[0]
    assert (refused["kind"], refused["limit"]) == ("queue_full", limit)
    assert len(upstream.requests) == 2


async def test_limits_of_a_token_are_its_own(start: Starter, upstream):
    upstream.script(BEGUN).script(BEGUN).script(BEGUN).script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann", "ben", ben={"inFlight": 2}),
        limits={"waiting": 0, "token": {"inFlight": 1}},
    )
    async with asking(proxy, "ann"), asking(proxy, "ben"), asking(proxy, "ben"):
        assert (await ask(proxy, "ann")).status == 429
        assert (await ask(proxy, "ben")).status == 429


async def test_without_tokens_an_address_is_a_client(start: Starter, upstream):
    upstream.script(BEGUN)
    proxy = await start(
        model_configuration(upstream.url),
        limits={"waiting": 0, "token": {"inFlight": 1}},
    )
    async with asking(proxy):
        assert (await ask(proxy)).status == 429


async def test_no_header_chooses_whose_limit_counts(start: Starter, upstream):
    upstream.script(ANSWER)
    limits = {"token": {"chat": {"requestsPerMinute": 1}}}
    proxy = await start(model_configuration(upstream.url), limits=limits)
    names = ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "Client-IP")
    for number, status in enumerate((200, 429, 429)):
        headers = dict.fromkeys(names, f"for=192.0.2.{number}")
        headers["Authorization"] = f"Bearer somebody-{number}"
        raw = await request(proxy.url, path=PATH, body=QUESTION, headers=headers)
        assert raw.status == status


async def put(group: asyncio.TaskGroup, proxy: RunningProxy, number: int, token="ann"):
    """Let a request that says its number join the queue."""

    async def wait() -> RawReply:
        body = {"messages": [{"speaker": "human", "text": f"number {number}"}]}
        headers = {"Authorization": f"token {token}"}
        return await request(proxy.url, path=PATH, body=body, headers=headers)

    return group.create_task(wait())


def asked_for(upstream: ScriptedUpstream) -> list[str]:
    return [each.json()["messages"][0]["content"] for each in upstream.requests[1:]]


async def test_those_who_wait_are_served_in_their_order(start: Starter, upstream):
    upstream.script(BEGUN)
    upstream.script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann"),
        limits={"inFlight": 1, "waiting": 5},
    )
    async with asyncio.TaskGroup() as group:
        async with asking(proxy):
            tasks = []
            for number in range(5):
                tasks.append(await put(group, proxy, number))
                await waiting(proxy, number + 1)
            assert (await ask(proxy)).status == 503  # the queue is full
            assert len(upstream.requests) == 1
        replies = [await task for task in tasks]
    assert [read_chat(raw, 2).text for raw in replies] == ["Hello"] * 5
    assert asked_for(upstream) == [f"number {number}" for number in range(5)]
    served = [line for line in await ended(proxy, 7) if line["kind"] == "ok"]
    assert all(0 < line["waited_s"] < line["first_token_s"] for line in served)
    assert (await scrape(proxy.url, {"Authorization": "token ann"})).value(
        "in_flight"
    ) == 0


async def test_who_waits_for_an_own_place_holds_up_nobody(start: Starter, upstream):
    upstream.script(BEGUN)
    upstream.script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann", "ben", ann={"inFlight": 1}),
        limits={"inFlight": 2, "waiting": 1},
    )
    async with asyncio.TaskGroup() as group:
        async with asking(proxy):
            late = await put(group, proxy, 1)
            await waiting(proxy, 1)
            assert (await ask(proxy, "ann")).status == 429
            assert (await ask(proxy, "ben")).status == 200
        assert (await late).status == 200


async def test_waiting_has_its_time(start: Starter, upstream):
    upstream.script(BEGUN)
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann"),
        limits={"inFlight": 1},
        timeouts={"waiting": 0.1},
    )
    async with asking(proxy):
        raw = await ask(proxy)
        assert raw.status == 503 and raw.header("retry-after") == "5"
        assert raw.text == (
            "too many requests at a time: the limit of this proxy is 1, and none became"
            " free in time; try again in 5 s\n"
        )
        await waiting(proxy, 0)
    line = exchanges(proxy)[0]
    assert (line["kind"], line["limit"]) == ("queue_timeout", "inFlight")
    assert 0.1 <= line["duration_s"] < 1


async def test_no_wait_is_longer_than_the_request_has(start: Starter, upstream):
    upstream.script(BEGUN)
    proxy = await start(
        model_configuration(upstream.url), auth=auth("ann"), limits={"inFlight": 1}
    )
    async with asking(proxy):
        headers = {"Authorization": "token ann", "X-Timeout-Ms": "100"}
        raw = await request(proxy.url, path=PATH, body=QUESTION, headers=headers)
        assert raw.status == 503
    assert exchanges(proxy)[0]["duration_s"] < 1


async def test_who_leaves_the_queue_gives_up_the_place(start: Starter, upstream):
    upstream.script(BEGUN)
    upstream.script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann"),
        limits={"inFlight": 1, "waiting": 2},
    )
    headers = {"Authorization": "token ann"}
    leaver = build_request(proxy.url, "POST", PATH, headers, QUESTION, False)
    async with asyncio.TaskGroup() as group:
        async with asking(proxy):
            async with connect(proxy.url) as connection:
                await connection.send(leaver)
                await waiting(proxy, 1)
                stayer = await put(group, proxy, 2)
                await waiting(proxy, 2)
            await waiting(proxy, 1, within_s=0.5)
        assert (await stayer).status == 200
    assert asked_for(upstream) == ["number 2"]
    kinds = [line["kind"] for line in await ended(proxy, 3)]
    assert sorted(kinds) == ["client_gone", "client_gone", "ok"]


async def test_shutdown_turns_away_who_waits(upstream):
    upstream.script(BEGUN)
    own = {"auth": auth("ann"), "limits": {"inFlight": 1}}
    block = {"modelConfiguration": model_configuration(upstream.url), **own}
    async with asyncio.TaskGroup() as group:
        async with running(load(block)) as proxy:
            headers = {"Authorization": "token ann"}
            begun = stream(proxy.url, path=PATH, body=QUESTION, headers=headers)
            reply = await begun.__aenter__()
            late = await put(group, proxy, 1)
            await waiting(proxy, 1)
        assert (await late).status == 503
        assert (await late).text == "the proxy is shutting down\n"
        assert b"the proxy is shutting down" in await reply.rest()
        await begun.__aexit__(None, None, None)


async def test_what_is_handed_on_needs_a_place_too(start: Starter, upstream):
    upstream.script(json_reply({"data": []}))
    upstream.script(BEGUN)
    proxy = await start(
        model_configuration(upstream.url), limits={"inFlight": 1, "waiting": 0}
    )
    embeddings = {"model": "large-1", "input": "Hi"}
    raw = await request(proxy.url, path="/v1/embeddings", body=embeddings)
    assert raw.status == 200
    async with asking(proxy):
        raw = await request(proxy.url, path="/v1/embeddings", body=embeddings)
        assert (raw.status, raw.json()["error"]["code"]) == (503, "queue_full")


async def test_model_that_is_asked_instead_needs_a_place_of_its_provider(
    start: Starter, upstream
):
    """And the request is counted once."""
    upstream.script(ANSWER).script(ANSWER).script(BEGUN)
    block = model_configuration(upstream.url)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    other = model_configuration(dead)
    other["providerOverrides"][0]["id"] = "dead"
    other["modelOverrides"][0]["modelRef"] = "dead::v1::large"
    for key in ("providerOverrides", "modelOverrides"):
        block[key] += other[key]
    block["defaultModels"]["chat"] = "dead::v1::large"
    proxy = await start(
        block,
        models={"dead::v1::large": {"fallback": "acme::v1::large"}},
        providers={"acme": {"inFlight": 1}, "dead": {"inFlight": 1}},
        limits={"waiting": 0, "token": {"chat": {"requestsPerDay": 4}}},
    )
    assert [(await proxy.chat()).status for _ in range(2)] == [200, 200]
    assert proxy.outcomes[0]["tried"]
    async with asking(proxy):
        raw = await proxy.chat()
        assert raw.status == 503 and "the limit of acme is 1" in raw.text
        assert (await proxy.chat()).status == 429


# -------------------------------------------------------------- rates, in each dialect

DAY = {"token": {"chat": {"requestsPerDay": 1}, "code": {"requestsPerDay": 1}}}


def seconds(raw: RawReply) -> int:
    value = raw.header("retry-after") or ""
    assert value.isdecimal(), value
    return int(value)


async def test_rate_limit_for_cody(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), limits=DAY)
    assert (await proxy.chat()).status == 200
    raw = await proxy.chat()
    assert raw.status == 429
    assert 86_000 < seconds(raw) <= 86_400
    assert raw.header("x-ratelimit-limit") == "1"
    assert raw.header("x-ratelimit-remaining") == "0"
    assert raw.header("x-is-cody-pro-user") is None
    text, _, date = raw.text.partition(" Retry after ")
    assert text == (
        "you exceeded the rate limit for chat_completions, only 1 requests are allowed"
        " per day at the moment to ensure the service stays functional. Current usage:"
        " 1."
    )
    assert parsedate_to_datetime(date).utcoffset() is not None
    outcome = read_chat(raw, 2)
    assert (outcome.kind, outcome.limit) == ("rate_limit", "1")
    # The other feature has a window of its own.
    assert (await proxy.code()).status != 429
    raw = await proxy.code()
    assert raw.status == 429 and "for code_completions, only 1 " in raw.text
    line = proxy.outcomes[1]
    assert (line["kind"], line["limit"]) == (
        "rate_limited",
        "token.chat.requestsPerDay",
    )


async def test_rate_limit_for_openai(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), limits=DAY)
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=f"{proxy.url}/v1", api_key="x", max_retries=0, http_client=http
    ) as client:
        await client.chat.completions.create(**CHAT)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(**CHAT)
    error, headers = caught.value, caught.value.response.headers
    assert error.code == "rate_limit_exceeded" and error.type == "rate_limit_error"
    assert "you exceeded the rate limit for chat_completions" in error.message
    assert headers["x-ratelimit-limit-requests"] == "1"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == f"{headers['retry-after']}s"


async def test_rate_limit_for_anthropic(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), limits=DAY)
    async with anthropic.AsyncAnthropic(
        base_url=proxy.url, api_key="x", max_retries=0
    ) as client:
        await client.messages.create(**ENDLESS)
        with pytest.raises(anthropic.RateLimitError) as caught:
            await client.messages.create(**ENDLESS)
    error, headers = caught.value, caught.value.response.headers
    body: Any = error.body
    assert body["error"]["type"] == "rate_limit_error"
    assert headers["anthropic-ratelimit-requests-limit"] == "1"
    assert headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert headers["retry-after"].isdecimal()


async def test_rate_limit_for_tgi(start: Starter, upstream):
    upstream.script(json_reply({"choices": [{"text": "x", "finish_reason": "stop"}]}))
    proxy = await start(model_configuration(upstream.url), limits=DAY)
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 5}}
    assert (await request(proxy.url, path="/generate", body=body)).status == 200
    raw = await request(proxy.url, path="/generate", body=body)
    assert (raw.status, raw.json()["error_type"]) == (429, "overloaded")
    assert "for code_completions" in raw.json()["error"]
    assert seconds(raw) > 86_000


@pytest.mark.parametrize("limit", ["rate", "in flight"])
async def test_limits_for_cody_gateway(start: Starter, upstream, limit):
    upstream.script(BEGUN)
    own = DAY if limit == "rate" else {"waiting": 0, "token": {"inFlight": 1}}
    proxy = await start(model_configuration(upstream.url), limits=own)
    options: dict[str, Any] = {
        "path": "/v1/completions/openai",
        "headers": {"X-Sourcegraph-Feature": "chat_completions"},
        "body": CHAT | {"stream": True},
    }
    async with stream(proxy.url, **options):
        raw = await request(proxy.url, **options)
    assert raw.status == 429
    assert raw.header("content-type") == "text/plain; charset=utf-8"
    date = raw.header("retry-after") or ""
    assert parsedate_to_datetime(date).utcoffset() is not None
    if limit == "rate":
        assert raw.header("x-ratelimit-limit") == "1"
        text = f"you have exceeded the rate limit of 1 requests. Retry after {date}\n"
    else:
        text = (
            "you have exceeded the concurrency limit of 1 requests for"
            f' "chat_completions". Retry after {date}\n'
        )
    assert raw.text == text


async def test_gateway_s_page_of_limits(start: Starter, upstream):
    upstream.script(ANSWER)
    limits = {"token": {"chat": {"requestsPerMinute": 9, "requestsPerDay": 5}}}
    proxy = await start(model_configuration(upstream.url), limits=limits)

    async def page() -> dict[str, Any]:
        return (await request(proxy.url, "GET", "/v1/limits")).json()

    models = ["acme/large-1"]
    chat = {"limit": 5, "interval": "24h0m0s", "usage": 0, "allowedModels": models}
    assert await page() == {
        "chat_completions": chat,
        "code_completions": chat | {"limit": 2**31 - 1},
    }
    for _ in range(2):
        await proxy.chat()
    now = (await page())["chat_completions"]
    expiry = datetime.fromisoformat(now.pop("expiry"))
    assert now == chat | {"usage": 2}
    assert 86_000 < (expiry - datetime.now(UTC)).total_seconds() <= 86_400


async def test_rate_limit_for_gemini(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), limits=DAY)
    options: dict[str, Any] = {
        "path": "/v1/completions/google",
        "headers": {"X-Sourcegraph-Feature": "chat_completions"},
        "body": {"model": "large-1", "contents": [{"parts": [{"text": "Hi"}]}]},
    }
    assert (await request(proxy.url, **options)).status == 200
    assert (await request(proxy.url, **options)).status == 429


async def test_tokens_of_a_day(start: Starter, upstream):
    upstream.script(ANSWER)  # 7 tokens
    proxy = await start(
        model_configuration(upstream.url),
        limits={"token": {"chat": {"tokensPerDay": 10}}},
    )
    assert (await proxy.chat()).status == 200
    assert (await proxy.chat()).status == 200  # begins with 3 left
    raw = await proxy.chat()
    assert raw.status == 429 and ", only 10 tokens are allowed per day " in raw.text
    assert (await proxy.code(QUESTION | {"stream": True})).status == 200


async def test_one_client_s_rate_is_not_another_s(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann", "ben", "eve", eve={"chat": {"requestsPerDay": 2}}),
        limits={"token": {"chat": {"requestsPerDay": 1}}},
    )
    for name, statuses in (
        ("ann", [200, 429]),
        ("ben", [200, 429]),
        ("eve", [200, 200, 429]),
    ):
        assert [(await ask(proxy, name)).status for _ in statuses] == statuses


# --------------------------------------------------------------- windows and clocks


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


async def refusal(counter: RateCounter, plan: limits.Plan, client: str = "ann"):
    try:
        await counter.check(client, "chat", plan)
    except RateLimited as error:
        return error
    return None


async def test_a_window_begins_with_the_first_request():
    clock = Clock()
    counter = RateCounter(clock=clock)
    plan = plans(TokenLimits(chat=Rates(requests_per_minute=2)))["chat"]
    assert await refusal(counter, plan) is None
    clock.now_s += 59.5
    assert await refusal(counter, plan) is None
    error = await refusal(counter, plan)
    assert error.retry_after_s == 1 and error.headers["retry-after"] == "1"
    assert await refusal(counter, plan, "ben") is None
    clock.now_s += 0.5
    assert [await refusal(counter, plan) is None for _ in range(3)] == [
        True,
        True,
        False,
    ]


async def test_what_the_minute_refuses_is_not_counted_for_the_day():
    clock = Clock()
    counter = RateCounter(clock=clock)
    rates = Rates(requests_per_minute=1, requests_per_day=2)
    plan = plans(TokenLimits(chat=rates))["chat"]
    names = []
    for _ in range(3):
        for _ in range(3):
            error = await refusal(counter, plan)
            names.append(error and error.limit.rpartition(".")[2])
        clock.now_s += 60
    minute, day = "requestsPerMinute", "requestsPerDay"
    assert names == [None, minute, minute, None, minute, minute, day, minute, minute]


async def test_counters_that_have_run_out_are_forgotten():
    clock = Clock()
    storage = MemoryStorage(clock)
    for number in range(5000):
        clock.now_s += 1
        await storage.incr(f"address {number}", 60)
    assert await storage.reset() <= SWEPT_KEYS


# ------------------------------------------------------------------------------ Redis


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisServer]:
    server = await RedisServer(tmp_path).start()
    yield server
    await server.kill()


async def test_replicas_share_their_rates_in_redis(start: Starter, upstream, redis):
    upstream.script(ANSWER)
    own = {
        "auth": auth("ann"),
        "limits": {
            "redis": redis.url,
            "token": {"chat": {"requestsPerMinute": 3, "tokensPerDay": 10_000}},
        },
    }
    one = await start(model_configuration(upstream.url), **own)
    two = await start(model_configuration(upstream.url), **own)
    statuses = [(await ask(proxy)).status for proxy in (one, two, one, two, one)]
    assert statuses == [200, 200, 200, 429, 429]
    assert 0 < seconds(await ask(two)) <= 60


async def test_without_redis_each_process_counts_for_itself(
    start: Starter, upstream, redis, caplog
):
    upstream.script(ANSWER)
    url = redis.url.replace("//", "//:s3cret@")
    proxy = await start(
        model_configuration(upstream.url),
        auth=auth("ann"),
        limits={
            "redis": redis.url,
            "token": {"chat": {"requestsPerMinute": 2, "tokensPerDay": 10_000}},
        },
    )
    assert (await ask(proxy)).status == 200
    await redis.kill()
    with caplog.at_level(logging.WARNING, "proxy.limits"):
        assert [(await ask(proxy)).status for _ in range(3)] == [200, 200, 429]
    assert len(caplog.records) == 1  # and not one for each request
    assert "Redis does not answer (ConnectionError)" in caplog.text
    page = await scrape(proxy.url, {"Authorization": "token ann"})
    assert page.value("redis_failures_total") >= 1
    await redis.start()
    await asyncio.sleep(limits.REDIS_PAUSE_S)
    # It has forgotten all, and counts again.
    assert [(await ask(proxy)).status for _ in range(3)] == [200, 200, 429]
    assert url not in caplog.text


async def test_no_client_notices_that_redis_is_killed(start: Starter, upstream, redis):
    upstream.script(ANSWER)
    rates = {"chat": {"requestsPerMinute": 10_000, "tokensPerDay": 1_000_000}}
    proxy = await start(
        model_configuration(upstream.url), limits={"redis": redis.url, "token": rates}
    )
    statuses: Counter[int] = Counter()

    async def client() -> None:
        for _ in range(30):
            statuses[(await proxy.chat()).status] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(client())
        await upstream.received(100, within_s=10)
        await redis.kill()
    page = await scrape(proxy.url)
    assert statuses == {200: 300}
    assert page.value("redis_failures_total") >= 1
    assert page.value("exchanges_total", kind="ok", route=PATH.partition("?")[0]) == 300


async def test_redis_that_is_silent_costs_little(start: Starter, upstream):
    upstream.script(ANSWER)

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    proxy = await start(
        model_configuration(upstream.url),
        limits={
            "redis": f"redis://127.0.0.1:{port}",
            "token": {"chat": {"requestsPerMinute": 100, "requestsPerDay": 100}},
        },
    )
    assert [(await proxy.chat()).status for _ in range(5)] == [200] * 5
    spent_s = sum(line["duration_s"] for line in proxy.outcomes)
    assert limits.REDIS_S <= spent_s < 2 * limits.REDIS_S
    silent.close()


# -------------------------------------------------------------- other settings


async def test_other_settings_change_the_numbers_and_forget_nobody():
    def settings(**own: Any) -> Settings:
        block = model_configuration("http://127.0.0.1:1")
        return load({"modelConfiguration": block, "listen": "127.0.0.1:0", **own})

    def limited(in_flight: int, per_day: int) -> Settings:
        rates = {"chat": {"requestsPerDay": per_day}}
        return settings(limits={"inFlight": in_flight, "token": rates})

    door = Admission(limited(1, 3), asyncio.get_running_loop())

    async def enter() -> Permit:
        until_s = asyncio.get_running_loop().time() + 0.1
        return await door.enter("", "127.0.0.1", "chat", "acme", until_s)

    first = await enter()
    late = asyncio.create_task(enter())
    await asyncio.sleep(0)
    assert door.in_flight.waiting == 1
    door.configure(limited(2, 3))
    assert (await late).waited_s is not None
    door.configure(limited(1, 3))
    door.leave(first, 0)
    with pytest.raises(QueueTimeout):
        await enter()
    door.leave(await late, 0)
    with pytest.raises(RateLimited):  # all three were counted
        await enter()
    assert door.in_flight.gauges("", None, "acme")[0].used == 0
    await door.close()


# ------------------------------------------------------------- the queue, by itself


class Queue(RuleBasedStateMachine):
    """Whatever comes and goes: no more places than there are, none of them idle."""

    def __init__(self) -> None:
        super().__init__()
        self.door = InFlight(3, {"slow": 1}, most_waiting=2)
        self.inside: list[limits.Gauges] = []
        self.queue: list[tuple[limits.Waiter, list[bool]]] = []

    @rule(
        client=st.sampled_from(["ann", "ben", "eve"]),
        provider=st.sampled_from(["slow", "other"]),
    )
    def come(self, client: str, provider: str) -> None:
        gauges = self.door.gauges(client, 2, provider)
        blocked_by = self.door.enter(gauges)
        if blocked_by is None:
            self.inside.append(gauges)
            return
        assert blocked_by.used == blocked_by.amount
        woken: list[bool] = []
        before = blocked_by.waiting
        waiter = self.door.wait(gauges, blocked_by, lambda: woken.append(True))
        assert (waiter is None) == (before == 2)
        if waiter is not None:
            self.queue.append((waiter, woken))

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.inside) - 1))
        self.door.release(self.inside.pop(index))
        self.welcome()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.queue) - 1))
        self.door.leave(self.queue.pop(index)[0])
        self.welcome()

    def welcome(self) -> None:
        for waiter, woken in list(self.queue):
            if woken:
                assert waiter.has_place and len(woken) == 1
                self.inside.append(waiter.gauges)
                self.queue.remove((waiter, woken))

    @invariant()
    def places_add_up(self) -> None:
        for gauges in (*self.inside, *(waiter.gauges for waiter, _ in self.queue)):
            for gauge in gauges:
                assert gauge.used == sum(gauge in each for each in self.inside)
                assert gauge.used <= gauge.amount
        assert self.door.waiting == len(self.queue)

    @invariant()
    def nobody_waits_who_could_enter(self) -> None:
        for waiter, _ in self.queue:
            assert any(gauge.used == gauge.amount for gauge in waiter.gauges)

    @invariant()
    def nothing_is_kept_of_who_is_gone(self) -> None:
        if not self.inside and not self.queue:
            assert not self.door._clients


TestQueue = Queue.TestCase
