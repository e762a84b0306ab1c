"""Drop-in clients over real sockets: what passes, what is translated, who is let in."""

import asyncio
import gzip
import hashlib
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.support.client import RawReply, connect, request, stream
from tests.support.fixtures import Block, Starter, load, model_configuration, running
from tests.support.upstream import (
    Hang,
    Pause,
    ScriptedUpstream,
    Wait,
    anthropic_events,
    chunk,
    data,
    json_reply,
    openai_chunk,
    openai_chunks,
    reply,
    sse,
    sse_head,
    tgi_chat_chunks,
    tgi_generate_events,
)

CHAT = "/v1/chat/completions"
ASK: Block = {"model": "large-1", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = sse(*openai_chunks(["Hello", " wörld"], usage=(3, 4)))
TOKEN = "cp_0123456789"
AUTH = {
    "tokens": [{"name": "ann", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}]
}


async def post(url: str, path: str, body: object, **headers: str) -> RawReply:
    return await request(url, path=path, body=body, headers=headers)


# ------------------------------------------------------------------------ pass-through


@pytest.mark.parametrize("path", [CHAT, "/.api/llm/chat/completions"])
async def test_same_dialect_keeps_the_bytes(start: Starter, upstream, path):
    events = openai_chunks(["Hello", " wörld"], usage=(3, 4))
    upstream.script(sse(*events))
    proxy = await start(model_configuration(upstream.url))
    body = (
        b'{"model":"large-1", "messages":[{"role":"user","content":"hi"}],'
        b'"temperature":0.10,"stream":true,"vendor_field":{"x":[1,2.50]}}'
    )
    raw = await post(proxy.url, path, body)
    assert raw.body == b"".join(events)
    assert raw.header("content-type") == "text/event-stream"
    assert raw.header("x-proxy-adjusted") is None
    assert upstream.last.body == body
    outcome = proxy.outcomes[-1]
    assert (outcome["kind"], outcome["completion_tokens"]) == ("ok", 4)


async def test_only_what_must_change_changes(start: Starter, upstream):
    upstream.script(sse(*tgi_chat_chunks(["a"])))
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    body = (
        b'{"model":"acme::v1::large","messages":[{"role":"user","content":"\\u00e9"}],'
        b'"temperature":0.10,"top_p":1.0,"seed":12345678901234567890,"stream":true}'
    )
    raw = await post(proxy.url, CHAT, body)
    assert upstream.last.body == (
        b'{"model":"tgi","messages":[{"role":"user","content":"\\u00e9"}],'
        b'"temperature":0.10,"seed":12345678901234567890,"stream":true}'
    )
    assert raw.header("x-proxy-adjusted") == "request.top_p, reply.id"
    assert proxy.outcomes[-1]["adjusted"] == ["request.top_p", "reply.id"]


async def test_a_reply_in_one_piece_keeps_its_bytes(start: Starter, upstream):
    text = b'{"id": "x",\n "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}'
    upstream.script(reply(200, {"Content-Type": "application/json"}, text))
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, CHAT, ASK)
    assert raw.body == text


OFF = {"providers": {"acme": {"adjust": False}}}
bodies = st.dictionaries(
    st.sampled_from(["temperature", "stop", "x-y", "n", "logprobs", "top_p"]),
    st.sampled_from(['"x"', "1", "1.0", "0.10", "null", '[1, "é"]', '{"a": {}}']),
    max_size=4,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=bodies,
    stream_bytes=st.binary(min_size=1, max_size=200),
    cuts=st.lists(st.integers(1, 199), max_size=5),
    status=st.sampled_from([200, 200, 400, 503]),
)
def test_bytes_are_bytes_with_adjust_off(fields, stream_bytes, cuts, status):
    pairs = "".join(f', "{name}" : {value}' for name, value in fields.items())
    asked = f'{{"model": "large-1", "messages": [], "stream": true{pairs}}}'.encode()

    async def check() -> None:
        edges = [
            0,
            *sorted({c for c in cuts if c < len(stream_bytes)}),
            len(stream_bytes),
        ]
        pieces = [stream_bytes[a:b] for a, b in itertools.pairwise(edges)]
        async with ScriptedUpstream() as upstream:
            head = (
                f"HTTP/1.1 {status} X\r\nContent-Type: text/event-stream\r\n"
                "Transfer-Encoding: chunked\r\n\r\n"
            ).encode()
            upstream.script([head, *map(chunk, pieces), b"0\r\n\r\n"])
            block = model_configuration(upstream.url)
            async with running(load({"modelConfiguration": block, **OFF})) as proxy:
                raw = await request(
                    proxy.url, path=CHAT, body=asked, allow_truncated=True
                )
                assert raw.status == status
                assert raw.body == stream_bytes
                assert upstream.last.body == asked

    asyncio.run(check())


async def test_a_cut_stream_is_cut_with_adjust_off(start: Starter, upstream):
    upstream.script(sse(*openai_chunks(["a"])[:2]))
    proxy = await start(model_configuration(upstream.url), **OFF)
    raw = await request(
        proxy.url, path=CHAT, body=ASK | {"stream": True}, allow_truncated=True
    )
    assert raw.body == b"".join(openai_chunks(["a"])[:2])
    assert proxy.outcomes[-1]["kind"] == "upstream_truncated"


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        {"messages": [{"role": "critic", "content": "hm"}]},
        {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
        {"temperature": "hot"},
    ],
)
async def test_what_cannot_be_translated_still_passes(start: Starter, upstream, more):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, CHAT, ASK | {"stream": True} | more)
    assert raw.status == 200
    assert upstream.last.json() == ASK | {"stream": True} | more
    block = model_configuration(upstream.url, "anthropic", accessToken="t")
    raw = await post((await start(block)).url, CHAT, ASK | more)
    assert raw.status == 400 and raw.json()["error"]["message"]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_half_an_emoji_costs_only_itself(start: Starter, upstream, path):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    body = (
        b'{"model":"large-1","stream":true,"max_tokens":5,'
        b'"messages":[{"role":"user","content":"cut \\ud83d"}]}'
    )
    assert (await post(proxy.url, path, body)).status == 200
    assert upstream.last.json()["messages"][0]["content"] == "cut \ufffd"


# ------------------------------------------------------------------------- translation


async def test_openai_client_of_an_anthropic_model(start: Starter, upstream):
    upstream.script(sse(*anthropic_events(["Hello", " wörld"], usage=(3, 4))))
    block = model_configuration(
        upstream.url, "anthropic", endpoint=f"{upstream.url}/v1/messages"
    )
    proxy = await start(block)
    asked = ASK | {
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
    }
    raw = await post(proxy.url, CHAT, asked)
    values = [
        json.loads(line[6:])
        for line in raw.text.split("\n")
        if line.startswith("data: {")
    ]
    text = "".join(
        v["choices"][0]["delta"].get("content") or "" for v in values if v["choices"]
    )
    assert text == "Hello wörld"
    assert values[-1]["usage"]["completion_tokens"] == 4
    assert raw.text.endswith("data: [DONE]\n\n")
    assert raw.header("x-proxy-adjusted") == "request.logprobs"
    assert upstream.last.json()["max_tokens"] == 5000


async def test_anthropic_client_of_an_anthropic_model(start: Starter, upstream):
    events = anthropic_events(["Hello"])
    upstream.script(sse(*events))
    block = model_configuration(
        upstream.url, "anthropic", endpoint=f"{upstream.url}/v1/messages"
    )
    proxy = await start(block)
    asked = {
        "model": "large",
        "max_tokens": 5,
        "stream": True,
        "messages": ASK["messages"],
    }
    raw = await post(proxy.url, "/v1/messages", asked)
    assert raw.body == b"".join(events)
    assert upstream.last.json() == asked | {"model": "large-1"}
    assert upstream.last.header("anthropic-version") == "2023-06-01"


@pytest.mark.parametrize(
    ("path", "there", "whole"),
    [
        ("/generate", "/generate", False),
        ("/generate_stream", "/generate_stream", True),
        ("/", "/", False),
        ("/invocations", "/invocations", False),
    ],
)
async def test_tgi_client_of_tgi(start: Starter, upstream, path, there, whole):
    events = tgi_generate_events(["Hello", " wörld"])
    upstream.script(sse(*events) if whole else json_reply([{"generated_text": "x"}]))
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    asked = {"inputs": "hi", "parameters": {"max_new_tokens": 5, "top_p": None}}
    raw = await post(proxy.url, path, asked)
    assert raw.body == (b"".join(events) if whole else b'[{"generated_text":"x"}]')
    assert upstream.last.path == there
    assert upstream.last.json() == asked


async def test_tgi_client_of_another_server(start: Starter, upstream):
    upstream.script(
        json_reply({"choices": [{"text": "Hello", "finish_reason": "stop"}]})
    )
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, "/", {"inputs": "hi", "parameters": {}})
    assert raw.json()[0]["generated_text"] == "Hello"
    assert upstream.last.path == "/v1/completions"
    assert upstream.last.json()["prompt"] == "hi"


@pytest.mark.parametrize(
    ("path", "body", "feature"),
    [
        ("anthropic-messages", ASK | {"max_tokens": 5}, "chat_completions"),
        ("openai", ASK, "chat_completions"),
        ("fireworks", ASK, "chat_completions"),
        ("fireworks", {"model": "large-1", "prompt": "hi"}, "code_completions"),
        (
            "google",
            {
                "model": "large-1",
                "contents": [{"role": "user", "parts": [{"text": "hi"}]}],
            },
            "chat_completions",
        ),
        (
            "anthropic",
            {
                "model": "acme/large-1",
                "prompt": "\n\nHuman: hi\n\nAssistant:",
                "max_tokens_to_sample": 5,
            },
            "chat_completions",
        ),
    ],
)
async def test_gateway_clients(start: Starter, upstream, path, body, feature):
    choice = {"message": {"content": "Hello"}, "text": "Hello", "finish_reason": "stop"}
    upstream.script(json_reply({"id": "x", "choices": [choice]}))
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Sourcegraph-Feature": feature}
    raw = await post(proxy.url, f"/v1/completions/{path}", body, **headers)
    assert raw.status == 200 and "Hello" in raw.text
    assert raw.header("x-cody-resolved-model") == "acme/large-1"


async def test_gateway_turns_429_into_503(start: Starter, upstream):
    upstream.script(reply(429, {"retry-after": "9"}, b"slow"))
    proxy = await start(model_configuration(upstream.url))
    headers = {"X-Sourcegraph-Feature": "chat_completions"}
    raw = await post(proxy.url, "/v1/completions/openai", ASK, **headers)
    assert (raw.status, raw.header("retry-after")) == (503, "9")
    assert "error" in raw.json()


async def test_gateway_wants_a_feature(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, "/v1/completions/openai", ASK)
    assert (raw.status, raw.json()) == (
        400,
        {"error": "X-Sourcegraph-Feature header is required"},
    )


# -------------------------------------------------------------------------- credentials


async def test_anthropic_clients_may_say_their_token_in_their_own_header(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    asked = ASK | {"max_tokens": 5}
    assert (await post(proxy.url, "/v1/messages", asked)).status == 401
    key = {"x-api-key": TOKEN}
    assert (await post(proxy.url, "/v1/messages", asked, **key)).status == 200
    assert upstream.last.header("x-api-key") is None


CLIENTS = {"providers": {"acme": {"credentials": "client"}}}


async def test_the_client_s_credential_is_forwarded_and_admits_it(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    endpoints = [{"url": f"{upstream.url}/v1", "accessToken": "sk-configured"}]
    block = model_configuration(upstream.url, endpoints=endpoints)
    proxy = await start(block, auth=AUTH, **CLIENTS)
    asked = ASK | {"stream": True}
    raw = await post(proxy.url, CHAT, asked, Authorization="Bearer sk-mine")
    assert raw.status == 200
    assert upstream.last.header("authorization") == "Bearer sk-mine"
    raw = await post(proxy.url, CHAT, asked)
    assert raw.status == 401
    assert raw.json()["error"]["message"] == (
        "this model is asked with your own API key: send one"
    )
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(("own", "status"), [(CLIENTS, 401), ({}, 502)])
async def test_401_is_the_client_s_only_if_the_credential_was(
    start: Starter, upstream, own, status
):
    upstream.script(json_reply({"error": {"message": "bad key"}}, 401))
    proxy = await start(model_configuration(upstream.url), **own)
    raw = await post(proxy.url, CHAT, ASK, Authorization="Bearer sk-mine")
    assert raw.status == status
    assert raw.json()["error"]["message"] == "bad key"


# ------------------------------------------------------------------- lists and handing on


async def test_model_lists(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    raw = await request(proxy.url, "GET", "/v1/models")
    assert raw.json() == {
        "object": "list",
        "data": [{"id": "large", "object": "model", "created": 0, "owned_by": "acme"}],
    }
    raw = await request(proxy.url, "GET", "//.api/llm/models/acme::v1::large")
    assert raw.json()["id"] == "acme::v1::large"
    raw = await request(proxy.url, "GET", "/v1/models/none")
    assert raw.status == 404
    assert raw.json()["error"]["message"] == "The model 'none' does not exist"
    headers = {"anthropic-version": "2023-06-01"}
    raw = await request(proxy.url, "GET", "/v1/models", headers=headers)
    assert raw.json()["data"][0]["type"] == "model"
    assert upstream.requests == []


async def test_model_lists_of_the_upstreams(start: Starter, upstream):
    models = {"data": [{"id": "large"}, {"id": "other"}], "object": "list"}
    upstream.script(json_reply(models))
    proxy = await start(model_configuration(upstream.url), listUpstreamModels=True)
    raw = await request(proxy.url, "GET", "/v1/models")
    assert [model["id"] for model in raw.json()["data"]] == ["large", "other"]
    upstream.script(reply(500))
    await request(proxy.url, "GET", "/v1/models")
    raw = await request(proxy.url, "GET", "/v1/models")
    assert [model["id"] for model in raw.json()["data"]] == ["large"]


async def test_embeddings_go_to_the_model_s_server(start: Starter, upstream):
    upstream.script(json_reply({"data": [{"embedding": [0.10]}]}))
    proxy = await start(model_configuration(upstream.url))
    body = b'{"model":"acme/large","input":["x"],"dimensions":1.0}'
    raw = await post(proxy.url, "/v1/embeddings", body)
    assert raw.json()["data"] == [{"embedding": [0.1]}]
    assert upstream.last.path == "/v1/embeddings"
    assert upstream.last.body == (b'{"model":"large-1","input":["x"],"dimensions":1.0}')


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages/count_tokens"])
async def test_what_an_upstream_has_not_is_a_clear_error(
    start: Starter, upstream, path
):
    upstream.script(reply(404, {}, b"Not Found"))
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, path, {"model": "large"})
    assert raw.status == 404
    text = f"upstream {upstream.url[7:]} does not serve {path}: it answered 404"
    assert text in raw.json()["error"]["message"]


async def test_unknown_paths_are_handed_on_only_if_asked_for(start: Starter, upstream):
    upstream.script(reply(200, {"X-Up": "1"}, b"there"))
    proxy = await start(model_configuration(upstream.url))
    assert (await request(proxy.url, "GET", "/v1/rerank")).status == 404
    assert upstream.requests == []
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    raw = await request(proxy.url, "GET", "/v1/rerank?a=%2F&b")
    assert (raw.status, raw.body, raw.header("x-up")) == (200, b"there", "1")
    assert upstream.last.path == "/v1/rerank?a=%2F&b"
    for own in ("/.api/unknown", "/.api/../v1/x", "/.api%2Fx"):
        raw = await request(proxy.url, "GET", own)
        assert raw.status == 404, own
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
async def test_any_method_is_handed_on(start: Starter, upstream, method):
    upstream.script(reply(201, {"Content-Length": "0"}))
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    body = None if method in ("GET", "HEAD") else b"body"
    raw = await request(proxy.url, method, "/x", body=body)
    assert raw.status == 201
    assert (upstream.last.method, upstream.last.body) == (method, body or b"")


async def test_headers_of_the_hop_stay_on_the_hop(start: Starter, upstream):
    upstream.script(
        reply(
            200,
            {
                "Connection": "close, X-Private",
                "X-Private": "1",
                "Keep-Alive": "timeout=5",
                "Set-Cookie": "a=b",
                "Server": "gpu",
                "X-Kept": "yes",
            },
            b"ok",
        )
    )
    endpoints = [{"url": f"{upstream.url}/v1", "accessToken": "sk-configured"}]
    block = model_configuration(upstream.url, endpoints=endpoints)
    proxy = await start(block, passthrough=True)
    sent = {
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "TE": "trailers",
        "Proxy-Authorization": "x",
        "Cookie": "c=d",
        "Authorization": "Bearer mine",
        "Host": "evil.example",
        "X-Kept": "yes",
    }
    raw = await request(proxy.url, "GET", "/x", headers=sent)
    received = {name.lower(): value for name, value in upstream.last.headers}
    assert received["authorization"] == "Bearer sk-configured"
    assert received["host"] == upstream.url.removeprefix("http://")
    assert received["x-kept"] == "yes"
    for name in ("x-hop", "te", "proxy-authorization", "cookie"):
        assert name not in received, name
    names = {name.lower() for name, _ in raw.headers}
    assert not names & {"x-private", "set-cookie", "keep-alive"}
    assert raw.header("x-kept") == "yes"
    assert (raw.header("server") or "").startswith("completions-proxy/")


async def test_no_client_chooses_the_host(start: Starter, upstream):
    upstream.script(reply(200, {}, b"ours"))
    async with ScriptedUpstream() as other:
        other.script(reply(200, {}, b"theirs"))
        proxy = await start(model_configuration(upstream.url), passthrough=True)
        raw = await request(proxy.url, "GET", f"{other.url}/x")
        assert raw.status in (200, 400, 404) and raw.body != b"theirs"
        for path in ("//127.0.0.1:1/x", "/@127.0.0.1:1/x", "/\\127.0.0.1/x"):
            raw = await request(proxy.url, "GET", path)
            assert raw.body != b"theirs"
        assert other.requests == []


async def test_bodies_stream_both_ways(start: Starter, upstream):
    """The reply begins before the request's body has ended."""
    seen = asyncio.Event()
    upstream.script(
        [sse_head(), chunk(b"one"), Wait(seen), chunk(b"two"), b"0\r\n\r\n"]
    )
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    async with stream(
        proxy.url, path="/x", body=b"x" * 100_000, chunked=True
    ) as incoming:
        assert await incoming.read() == b"one"
        seen.set()
        assert await incoming.rest() == b"two"
    assert upstream.last.chunked and len(upstream.last.body) == 100_000


async def test_a_client_that_leaves_ends_what_is_handed_on(start: Starter, upstream):
    upstream.script([sse_head(), chunk(b"one"), Hang()])
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    async with stream(proxy.url, path="/x", body=b"x") as incoming:
        assert await incoming.read() == b"one"
    await upstream.closed(within_s=0.5)


async def test_health_is_the_upstream_s(start: Starter, upstream):
    upstream.script(reply(200), path="/health")
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    for path in ("/health", "/"):
        assert (await request(proxy.url, "GET", path)).status == 200
    await upstream.stop()
    raw = await request(proxy.url, "GET", "/health")
    assert raw.status == 503
    assert "connection" in raw.json()["error"]


async def test_info_of_a_server_that_is_not_tgi(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    raw = await request(proxy.url, "GET", "/info")
    assert raw.json()["model_id"] == "large-1"


async def test_errors_before_parsing_are_in_the_client_s_shape(
    start: Starter, upstream
):
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    raw = await post(proxy.url, CHAT, ASK)
    assert (raw.status, raw.json()["error"]["type"]) == (401, "authentication_error")
    raw = await post(proxy.url, "/v1/messages", ASK)
    assert raw.json()["error"]["type"] == "authentication_error"
    raw = await post(proxy.url, "/generate", {"inputs": "x"})
    assert raw.status == 401 and "error_type" in raw.json()
    raw = await request(proxy.url, "GET", CHAT)
    assert raw.status == 405 and raw.json()["error"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_completions_are_asked_with_post(start: Starter, upstream, method):
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    paths = (
        *("/.api/completions/stream", "/.api/completions/code"),
        *("/v1/chat/completions", "/.api/llm/chat/completions"),
        *("/v1/completions", "/.api/llm/completions", "/v1/messages", "/v1/complete"),
        *("/generate", "/generate_stream", "/invocations"),
        *("/v1/completions/anthropic", "/v1/completions/anthropic-messages"),
        *("/v1/completions/openai", "/v1/completions/fireworks"),
        "/v1/completions/google",
    )
    for path in paths:
        raw = await request(proxy.url, method, path)
        assert (raw.status, raw.header("allow")) == (405, "POST"), path
        assert "Method Not Allowed" in raw.text
    assert not upstream.requests


async def test_pipelined_requests_get_their_own_replies(start: Starter, upstream):
    upstream.script(json_reply({"choices": [{"message": {"content": "1"}}]}))
    upstream.script(json_reply({"choices": [{"message": {"content": "2"}}]}))
    proxy = await start(model_configuration(upstream.url))
    body = json.dumps(ASK).encode()
    one = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    async with connect(proxy.url) as connection:
        await connection.send(one + one)
        texts = [
            (await connection.reply()).json()["choices"][0]["message"]["content"]
            for _ in "12"
        ]
    assert texts == ["1", "2"]


def test_chunk_helpers_speak_openai():
    assert data({"a": 1}).startswith(b"data: ")
    assert openai_chunk(None, usage={}).count(b"choices") == 1


# -------------------------------------------------------- what once went wrong: kept out


async def test_packed_body_cannot_hide_another_request(start: Starter, upstream):
    upstream.script(json_reply(["ok"]))
    proxy = await start(model_configuration(upstream.url))
    hidden = b"GET /evil HTTP/1.1\r\nHost: x\r\n\r\n"
    bodies = (b"x" * filler for filler in range(200))
    body = next(b for b in bodies if len(gzip.compress(b + hidden)) == len(b))
    packed = gzip.compress(body + hidden)
    raw = await request(
        proxy.url, path="/tokenize", body=packed, headers={"Content-Encoding": "gzip"}
    )
    assert raw.status == 200
    assert [r.path for r in upstream.requests] == ["/tokenize"]
    assert upstream.last.body == body + hidden
    assert upstream.last.header("content-encoding") is None


async def test_broken_reply_is_broken_off_when_handed_on(start: Starter, upstream):
    upstream.script([sse_head(), chunk(b"hello"), Pause(0.02), b"zz\r\n", Hang()])
    proxy = await start(model_configuration(upstream.url))
    raw = await request(proxy.url, path="/tokenize", body=b"{}", allow_truncated=True)
    assert raw.body == b"hello" and not raw.complete
    assert proxy.outcomes[-1]["kind"] == "upstream_garbled"


async def test_token_in_a_header_of_one_s_own_stays_here(start: Starter, upstream):
    upstream.script(json_reply([]))
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH | {"header": "X-Team-Token"})
    headers = {"X-Team-Token": TOKEN, "x-goog-api-key": "mine"}
    raw = await post(proxy.url, "/tokenize", {}, **headers)
    assert raw.status == 200
    assert TOKEN not in str(upstream.last.headers)
    assert upstream.last.header("x-goog-api-key") is None


RAW_PATHS = ["/a%20b", "/a%3Fb=c", "/a%23b", "/a%2Fb", "/a%25b", "/caf%C3%A9", "/a//b"]


@pytest.mark.parametrize("path", RAW_PATHS)
async def test_paths_are_handed_on_as_they_came(start: Starter, upstream, path):
    upstream.script(json_reply([]))
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    assert (await request(proxy.url, "GET", path)).status == 200
    assert upstream.last.path == path


@pytest.mark.parametrize(
    "path",
    [
        "/%2e%2e/up",
        "/x/../.api/y",
        "/./.api/x",
        "/%2E%2E%2F.api/x",
        "/.api",
        "/.API/x",
        "/%252e%252e/x",
        "//.api/x",
        "/\\.api/x",
        "/.api;v=1/x",
        "/x/..;/.api/y",
        "/.api%3bx/y",
        "/.api%00/x",
        "/.api%20/x",
        "/x%0d%0aHost:%20y",
        "/%c0%ae%c0%ae/x",
        "/%ef%bc%8eapi/x",
        "/%u002eapi/x",
        "/x%",
    ],
)
async def test_paths_in_disguise_are_not_handed_on(start: Starter, upstream, path):
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    raw = await request(proxy.url, "GET", path)
    assert raw.status in (400, 404)
    assert upstream.requests == []


@pytest.mark.parametrize("target", ["*", "http://evil.com", "evil.com:443"])
async def test_request_targets_without_a_path(start: Starter, upstream, target):
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    method = "CONNECT" if target.endswith("443") else "OPTIONS"
    raw = await request(proxy.url, method, target)
    assert raw.status in (400, 404)
    assert "Server got itself in trouble" not in raw.text
    assert upstream.requests == []


async def test_stream_to_a_plain_request_with_adjust_off(start: Starter, upstream):
    events = openai_chunks(["a", "b", "c"])
    upstream.script(sse(*events))
    proxy = await start(model_configuration(upstream.url), **OFF)
    raw = await post(proxy.url, CHAT, ASK)
    assert raw.body == b"".join(events)


async def test_expect_100_continue_of_what_is_handed_on(start: Starter, upstream):
    upstream.script(json_reply(["ok"]))
    proxy = await start(model_configuration(upstream.url))
    port = int(proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        b"Content-Length: 2\r\n\r\n"
    )
    interim = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"{}")
    final = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
    assert final.startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    await writer.wait_closed()


async def test_silent_upstream_of_what_is_handed_on(start: Starter, upstream):
    upstream.script([Hang()])
    proxy = await start(model_configuration(upstream.url))
    raw = await request(
        proxy.url, "GET", "/upstream/metrics", headers={"X-Timeout-Ms": "100"}
    )
    assert raw.status == 504
    await upstream.closed()


async def test_401_of_what_is_handed_on_is_not_the_client_s(start: Starter, upstream):
    upstream.script(json_reply({"error": "no"}, 401))
    block = model_configuration(upstream.url)
    proxy = await start(block)
    raw = await post(proxy.url, "/v1/embeddings", {"model": "large"})
    assert raw.status == 502
    assert proxy.outcomes[-1]["upstream_status"] == 401
    raw = await post(
        (await start(block, **CLIENTS)).url,
        "/v1/embeddings",
        {"model": "large"},
        Authorization="Bearer x",
    )
    assert raw.status == 401


async def test_credential_in_a_query_is_handed_on_too(start: Starter, upstream):
    upstream.script(json_reply([]))
    endpoints = [
        {"url": f"{upstream.url}/v1", "accessToken": "t1", "accessTokenQuery": "key"}
    ]
    proxy = await start(model_configuration(upstream.url, endpoints=endpoints))
    await post(proxy.url, "/tokenize?a=b", {})
    assert upstream.last.path == "/tokenize?a=b&key=t1"


@pytest.mark.parametrize(
    "body", [b'{"\xff":1}', b'{"a":' * 3000, b'{"model":7}', b"[1]", b""]
)
async def test_odd_bodies_are_the_client_s_mistake(start: Starter, upstream, body):
    upstream.script(json_reply({}))
    proxy = await start(model_configuration(upstream.url))
    for path in (CHAT, "/v1/embeddings", "/v1/messages", "/generate"):
        raw = await post(proxy.url, path, body)
        assert raw.status in (400, 422), path
    assert all(line["kind"] != "internal" for line in proxy.outcomes)


async def test_headers_of_a_reply_that_passes(start: Starter, upstream):
    headers = {"x-ratelimit-remaining": "9", "x-compute-time": "1", "x-private": "1"}
    upstream.script(sse(*openai_chunks(["a"]), headers=headers))
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, CHAT, ASK | {"stream": True})
    assert raw.header("x-ratelimit-remaining") == "9"
    assert raw.header("x-compute-time") == "1"
    assert raw.header("x-private") is None


@pytest.mark.parametrize("whole", [True, False])
async def test_cut_stream_of_a_response_is_broken_off(start: Starter, upstream, whole):
    events = [
        b'event: response.created\ndata: {"type":"response.created"}\n\n',
        b"event: response.compl",
        b'eted\ndata: {"type":"response.completed"}\n\n',
    ]
    upstream.script(sse(*events[: 3 if whole else 1]))
    proxy = await start(model_configuration(upstream.url))
    body = {"model": "large", "input": "x", "stream": True}
    raw = await request(
        proxy.url, path="/v1/responses", body=body, allow_truncated=True
    )
    assert raw.complete is whole
    assert proxy.outcomes[-1]["kind"] == ("ok" if whole else "upstream_truncated")


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (ASK, "/v1/chat/completions"),
        ({"model": "large-1", "prompt": "hi"}, "/v1/completions"),
    ],
)
async def test_invocations_take_openai_s_bodies_too(
    start: Starter, upstream, body, path
):
    reply_body = {"id": "x", "choices": [{"message": {"content": "a"}, "text": "a"}]}
    upstream.script(json_reply(reply_body))
    proxy = await start(model_configuration(upstream.url))
    raw = await post(proxy.url, "/invocations", body)
    assert raw.json() == reply_body
    assert upstream.last.path == path


async def test_help_for_who_has_no_token(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    raw = await post(proxy.url, "/v1/messages", {})
    assert raw.json()["error"]["message"] == (
        "no token given: send the header Authorization: Bearer …"
    )


@pytest.mark.parametrize("whole", [True, False])
async def test_body_that_is_handed_on_has_a_limit(start: Starter, upstream, whole):
    upstream.script(json_reply([]))
    block = model_configuration(upstream.url)
    proxy = await start(block, limits={"bodyBytes": 1000})
    sent = {"headers": {"Content-Encoding": "gzip"}} if whole else {"chunked": True}
    body = gzip.compress(bytes(10**6)) if whole else bytes(10**6)
    raw = await request(proxy.url, path="/tokenize", body=body, **sent)
    assert raw.status == 413 and "exceeds 1000 bytes" in raw.text
    raw = await request(proxy.url, path="/tokenize", body=bytes(1001))
    assert raw.status == 413
    assert [line["kind"] for line in proxy.outcomes] == 2 * ["payload_too_large"]
    assert upstream.requests == []
    raw = await request(proxy.url, path="/tokenize", body=bytes(1000))
    assert raw.status == 200


BAD_BODIES = {
    "chunk": (
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{",
        b"}zz\r\n",
        408,
    ),  # aiohttp keeps that to itself
    "gzip": (
        b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"8\r\nnot gzip\r\n0\r\n\r\n",
        422,
    ),
    "late": (b"Content-Length: 2\r\n\r\n{", b"", 408),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_body_is_not_the_upstream_s_fault(start: Starter, name):
    """Nobody can have an endpoint taken for sick by sending what is no body."""
    first, rest, status = BAD_BODIES[name]
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nX-Timeout-Ms: 300\r\n"
    async with ScriptedUpstream() as one, ScriptedUpstream() as two:
        endpoints = [{"url": f"{each.url}/v1"} for each in (one, two)]
        proxy = await start(model_configuration("", endpoints=endpoints))
        for _ in range(6):
            async with connect(proxy.url) as connection:
                await connection.send(head + first)
                await asyncio.sleep(0.03)
                await connection.send(rest)
                assert (await connection.reply()).status == status
        one.script(json_reply([]))
        two.script(json_reply([]))
        for _ in range(40):
            raw = await request(proxy.url, path="/tokenize", body=b"{}")
            assert raw.status == 200
        # Neither is left out: both are asked as before.
        assert one.requests and two.requests
    assert "unreachable" not in proxy.log and "deadline" not in proxy.log


async def test_who_may_read_is_not_the_upstream_s_say(start: Starter, upstream):
    headers = {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Credentials": "true",
        "Strict-Transport-Security": "max-age=9999999; includeSubDomains",
        "Alt-Svc": 'h3=":443"',
        "X-Powered-By": "gpu",
        "Via": "1.1 inner",
        "X-Kept": "1",
    }
    upstream.script(json_reply([], headers=headers))
    origin = "https://cody.example"
    proxy = await start(model_configuration(upstream.url), origins=[origin])
    raw = await request(proxy.url, "GET", "/upstream/metrics")
    names = {name.lower() for name, _ in raw.headers}
    assert "x-kept" in names
    assert not names & {name.lower() for name in headers if name != "X-Kept"}
    raw = await request(proxy.url, "GET", "/upstream/metrics", {"Origin": origin})
    assert raw.header("access-control-allow-origin") == origin
    assert raw.header("access-control-allow-credentials") is None


async def test_underscore_does_not_disguise_a_header(start: Starter, upstream):
    upstream.script(json_reply([]))
    endpoints = [{"url": f"{upstream.url}/v1", "accessToken": "sk-configured"}]
    proxy = await start(model_configuration(upstream.url, endpoints=endpoints))
    sent = {
        "Transfer_Encoding": "chunked",
        "Proxy_Authorization": "x",
        "X_Api_Key": "mine",
        "Connection": "X-Hop",
        "X_Hop": "1",
        "X_Kept": "1",
    }
    await request(proxy.url, path="/tokenize", headers=sent, body=b"{}")
    names = {name.lower() for name, _ in upstream.last.headers}
    assert {name for name in names if "_" in name} == {"x_kept"}
