"""The curl lines that Cody's server was tested with when it learnt Anthropic's messages
(Sourcegraph's pull request 60953), host replaced: legacy and versioned, streamed and
not, chat and code, against Anthropic and through Cody Gateway.

Each runs over real sockets; the upstream records what it received.
"""

import json

import pytest

from tests.support.client import RawReply, request
from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.fixtures import Starter
from tests.support.upstream import (
    ScriptedUpstream,
    anthropic_events,
    json_reply,
    reply,
    sse,
)

# What curl sends with --data-raw.
HEADERS = {
    "authorization": "token TOKEN",
    "Content-Type": "application/x-www-form-urlencoded",
    "User-Agent": "curl/8.5.0",
    "Accept": "*/*",
}
HUMAN = {"speaker": "human", "text": "What is your name?"}
PARAMETERS = {
    "maxTokensToSample": 30,
    "temperature": 0,
    "stopSequences": [],
    "timeoutMs": 5000,
}
LEGACY = {"messages": [HUMAN, {"speaker": "assistant"}]} | PARAMETERS
SYSTEM = "You only answer using emoji."
VERSIONED = {"messages": [{"speaker": "system", "text": SYSTEM}, HUMAN]} | PARAMETERS
GATEWAY = {
    "temperature": 0.2,
    "topP": 0.95,
    "topK": 0,
    "model": "anthropic/claude-3-haiku-20240307",
}

STREAM, CODE = "/.api/completions/stream", "/.api/completions/code"
USER = {"role": "user", "content": [{"type": "text", "text": "What is your name?"}]}
ANSWER = "I am 🤖."


def message(text: str) -> bytes:
    return json_reply(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-3-haiku-20240307",
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 3, "output_tokens": 4},
        }
    )


def events(*texts: str) -> list:
    return sse(*anthropic_events(list(texts)))


def block(type: str, endpoint: str) -> dict:
    models = [("claude-3-haiku-20240307", "chat"), ("claude-instant-1", "code")]
    return {
        "providerOverrides": [
            {
                "id": "anthropic",
                "serverSideConfig": {
                    "type": type,
                    "accessToken": "sk-ant-secret",
                    "endpoint": endpoint,
                },
            }
        ],
        "modelOverrides": [
            {
                "modelRef": f"anthropic::2023-06-01::{name}",
                "modelName": name,
                "capabilities": ["chat", "autocomplete"],
                "category": "balanced",
                "status": "stable",
                "contextWindow": {"maxInputTokens": 7000, "maxOutputTokens": 4000},
            }
            for name, _ in models
        ],
        "defaultModels": {
            "chat": "anthropic::2023-06-01::claude-3-haiku-20240307",
            "fastChat": "anthropic::2023-06-01::claude-instant-1",
            "codeCompletion": "anthropic::2023-06-01::claude-instant-1",
        },
    }


async def curl(url: str, path: str, body: dict) -> RawReply:
    return await request(
        url, path=path, headers=HEADERS, body=json.dumps(body).encode()
    )


CASES = [
    # name, path, body
    ("legacy streaming", STREAM, LEGACY | {"stream": True}),
    ("legacy non-streaming", STREAM, LEGACY | {"stream": False}),
    ("legacy code", CODE, LEGACY | {"stream": True}),
    ("v1 streaming", f"{STREAM}?api-version=1", VERSIONED | {"stream": True}),
    ("v1 non-streaming", f"{STREAM}?api-version=1", VERSIONED | {"stream": False}),
    ("v1 code", f"{CODE}?api-version=1", VERSIONED | {"stream": True}),
]
IDS = [case[0] for case in CASES]


def check_reply(raw: RawReply, path: str, stream: bool) -> None:
    if not stream:
        assert raw.status == 200
        assert raw.header("content-type") == "application/json"
        assert raw.json() == {"completion": ANSWER, "stopReason": "end_turn"}
        return
    assert_ends_once(raw)
    assert raw.header("cache-control") == "no-cache"
    assert raw.header("connection") == "keep-alive"
    assert raw.header("x-accel-buffering") == "no"
    assert raw.framing == "chunked"
    outcome = read_chat(raw, 1)
    assert (outcome.text, outcome.stop_reason) == (ANSWER, "end_turn")
    assert (outcome.ended, outcome.violations) == ("complete", [])
    shown = read_autocomplete(raw, 1)
    assert (shown.text, shown.error, shown.violations) == (ANSWER, None, [])


@pytest.mark.parametrize(("name", "path", "body"), CASES, ids=IDS)
async def test_curl_to_anthropic(
    start: Starter, upstream: ScriptedUpstream, name, path, body
):
    stream = body["stream"]
    upstream.script(events("I am ", "🤖", ".") if stream else message(ANSWER))
    proxy = await start(block("anthropic", f"{upstream.url}/v1/messages"))
    check_reply(await curl(proxy.url, path, body), path, stream)

    received = upstream.last
    assert received.path == "/v1/messages"
    assert received.header("x-api-key") == "sk-ant-secret"
    assert received.header("anthropic-version") == "2023-06-01"
    assert received.header("authorization") is None
    code = path.startswith(CODE)
    expected = {
        "model": "claude-instant-1.2" if code else "claude-3-haiku-20240307",
        "messages": [USER],
        "max_tokens": 30,
        "temperature": 0,
        "stream": stream,
    }
    if "v1" in name:
        expected["system"] = SYSTEM
    assert received.json() == expected


@pytest.mark.parametrize(("name", "path", "body"), CASES, ids=IDS)
async def test_curl_through_cody_gateway(
    start: Starter, upstream: ScriptedUpstream, name, path, body
):
    stream = body["stream"]
    upstream.script(events("I am ", "🤖", ".") if stream else message(ANSWER))
    proxy = await start(block("sourcegraph", f"{upstream.url}/ignored?path=1"))
    check_reply(await curl(proxy.url, path, body | GATEWAY), path, stream)

    received = upstream.last
    assert received.path == "/v1/completions/anthropic-messages"
    assert received.header("authorization") == "Bearer sk-ant-secret"
    feature = "code_completions" if path.startswith(CODE) else "chat_completions"
    assert received.header("x-sourcegraph-feature") == feature
    assert received.header("x-sourcegraph-actor-uid")
    assert received.header("anthropic-version") == "2023-06-01"
    assert received.header("x-api-key") is None
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    assert received.json() == {
        "model": "claude-3-haiku-20240307",
        "messages": [system, USER] if "v1" in name else [USER],
        "max_tokens": 30,
        "temperature": 0.2,
        "stream": stream,
    }


REFUSAL = (
    '{"type":"error","error":{"type":"invalid_request_error",'
    '"message":"prompt: Field required"}}'
)


async def test_curl_to_a_hard_configured_complete_endpoint(
    start: Starter, upstream: ScriptedUpstream
):
    """The endpoint is taken for /v1/messages, and the start says so."""
    upstream.script(events("I am ", "🤖", "."), path="/v1/messages")
    proxy = await start(block("anthropic", f"{upstream.url}/v1/complete"))
    raw = await curl(proxy.url, f"{STREAM}?api-version=1", VERSIONED | {"stream": True})
    assert read_chat(raw, 1).text == ANSWER
    assert upstream.last.path == "/v1/messages"


async def test_curl_where_the_upstream_wants_a_prompt(
    start: Starter, upstream: ScriptedUpstream
):
    """An old endpoint behind another path: its refusal arrives word for word."""
    upstream.script(reply(400, {"Content-Type": "application/json"}, REFUSAL.encode()))
    proxy = await start(block("anthropic", f"{upstream.url}/old/complete"))
    raw = await curl(proxy.url, f"{STREAM}?api-version=1", VERSIONED | {"stream": True})
    assert raw.status == 200
    assert raw.body == (
        b"event: error\n"
        b'data: {"error":"Anthropic: unexpected status code 400: '
        b'{\\"type\\":\\"error\\",\\"error\\":{\\"type\\":\\"invalid_request_error\\",'
        b'\\"message\\":\\"prompt: Field required\\"}}"}\n\n'
        b"event: done\ndata: {}\n\n"
    )
