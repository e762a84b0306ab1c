"""The proxy over real sockets: the order of its checks, its errors, its ends."""

import asyncio
import contextlib
import gzip
import hashlib
import json
import socket

import pytest
from aiohttp import ClientSession
from aiohttp_sse_client.client import EventSource

from proxy.dialects import cody
from tests.support.client import build_request, connect, request, stream
from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.fixtures import (
    QUESTION,
    Starter,
    load,
    model_configuration,
    running,
)
from tests.support.upstream import (
    Close,
    Hang,
    Pause,
    Reset,
    ScriptedUpstream,
    chunk,
    data,
    head,
    json_reply,
    openai_chunks,
    reply,
    sse,
    sse_head,
    tgi_chat_chunks,
    tgi_completion_chunks,
)

PATH = "/.api/completions/stream"
TOKEN = "cp_0123456789"
AUTH = {
    "tokens": [{"name": "ann", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}]
}
ANSWER = sse(*openai_chunks(["Hello", " wörld"]))


# ----------------------------------------------------------------------- plain answers


@pytest.mark.parametrize("version", [None, "", "0", "1", "2", "5", "8", "42"])
async def test_chat_streams_for_every_version(start: Starter, upstream, version):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(version=version)
    assert_ends_once(raw)
    number = min(int(version or 0), 8)
    outcome = read_chat(raw, number)
    assert (outcome.text, outcome.stop_reason) == ("Hello wörld", "stop")
    assert (outcome.ended, outcome.violations) == ("complete", [])
    assert read_autocomplete(raw, number).text == "Hello wörld"
    body = upstream.last.json()
    assert body["messages"] == [{"role": "user", "content": "What is your name?"}]
    assert body["stream"] is True
    assert upstream.last.path == "/v1/chat/completions"


async def test_code_defaults_to_one_body_from_completions(start: Starter, upstream):
    upstream.script(
        json_reply({"choices": [{"text": "x = 1", "finish_reason": "stop"}]})
    )
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.code(version="1")
    assert raw.json() == {"completion": "x = 1", "stopReason": "stop"}
    assert upstream.last.path == "/v1/completions"
    assert upstream.last.json()["prompt"] == "What is your name?"
    assert read_autocomplete(raw, 1).text == "x = 1"


async def test_code_goes_to_chat_where_completions_are_legacy(start: Starter, upstream):
    upstream.script(ANSWER)
    block = model_configuration(upstream.url, useLegacyCompletions=False)
    proxy = await start(block)
    await proxy.code(QUESTION | {"stream": True})
    assert upstream.last.path == "/v1/chat/completions"


async def test_each_endpoint_gets_some_requests(start: Starter):
    async with ScriptedUpstream() as one, ScriptedUpstream() as two:
        one.script(ANSWER)
        two.script(ANSWER)
        endpoints = [{"url": f"{one.url}/v1/"}, {"url": f"{two.url}/v1?a=b"}]
        proxy = await start(model_configuration(one.url, endpoints=endpoints))
        for _ in range(30):
            await proxy.chat()
        assert {r.path for r in one.requests} == {"/v1/chat/completions"}
        assert {r.path for r in two.requests} == {"/v1/chat/completions?a=b"}


@pytest.mark.parametrize(
    ("endpoint", "header", "value", "path"),
    [
        ({"accessToken": "sk-secret"}, "authorization", "Bearer sk-secret", ""),
        ({}, "authorization", None, ""),
        ({"accessToken": "sk-1", "headers": {"X-Key": "k"}}, "x-key", "k", ""),
        ({"accessToken": "sk-1", "headers": {"X-Key": "k"}}, "authorization", None, ""),
        (
            {"accessToken": "sk-1", "accessTokenQuery": "key"},
            "authorization",
            None,
            "?key=sk-1",
        ),
    ],
)
async def test_credentials_of_an_endpoint(
    start: Starter, upstream, endpoint, header, value, path
):
    upstream.script(ANSWER)
    endpoints = [{"url": f"{upstream.url}/v1", **endpoint}]
    proxy = await start(model_configuration(upstream.url, endpoints=endpoints))
    await proxy.chat()
    assert upstream.last.header(header) == value
    assert upstream.last.path == f"/v1/chat/completions{path}"


async def test_an_independent_client_reads_what_we_send(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    seen = []
    async with ClientSession() as session:
        source = EventSource(
            f"{proxy.url}{PATH}?api-version=2",
            option={"method": "POST"},
            session=session,
            json=QUESTION,
        )
        async with source:
            async for event in source:
                seen.append((event.type, json.loads(event.data)))
                if event.type == "done":  # it would reconnect and ask again
                    break
    assert seen == [
        ("completion", {"deltaText": "Hello"}),
        ("completion", {"deltaText": " wörld"}),
        ("completion", {"stopReason": "stop"}),
        ("done", {}),
    ]


# ------------------------------------------------------------------- the order of checks

BAD_JSON = b"{"
UNKNOWN_MODEL = QUESTION | {"model": "nobody/nothing"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "text"),
    [
        ("GET", PATH, {}, None, 405, "Method Not Allowed"),
        ("PUT", f"{PATH}?api-version=x", {}, BAD_JSON, 405, "Method Not Allowed"),
        (
            "POST",
            f"{PATH}?api-version=x",
            {},
            BAD_JSON,
            401,
            "cody is not enabled: not authenticated",
        ),
        (
            "POST",
            f"{PATH}?api-version=x",
            {"Authorization": "token nope"},
            BAD_JSON,
            401,
            "Invalid access token.",
        ),
        (
            "POST",
            f"{PATH}?api-version=x",
            {"Authorization": f"token {TOKEN}"},
            BAD_JSON,
            406,
            "Unsupported API Version (Please update your client)",
        ),
        (
            "POST",
            PATH,
            {"Authorization": f"Bearer {TOKEN}"},
            BAD_JSON,
            400,
            "could not decode request body: Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)",
        ),
        (
            "POST",
            PATH,
            {"Authorization": f'token token="{TOKEN}"'},
            UNKNOWN_MODEL,
            400,
            'Unsupported chat model "nobody/nothing" (default "acme::v1::large")',
        ),
        (
            "POST",
            "/.api/completions/code",
            {"Authorization": f"TOKEN  {TOKEN} "},
            UNKNOWN_MODEL,
            400,
            'Unsupported code completion model "nobody/nothing" '
            '(default "acme::v1::large")',
        ),
    ],
)
async def test_checks_come_in_order(
    start: Starter, upstream, method, path, headers, body, status, text
):
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    raw = await request(proxy.url, method, path, headers, body)
    assert (raw.status, raw.text) == (status, f"{text}\n")
    assert raw.header("content-type") == "text/plain; charset=utf-8"
    assert raw.header("x-content-type-options") == "nosniff"
    assert upstream.requests == []


async def test_a_known_token_is_let_in_and_named_in_the_log(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    raw = await proxy.chat(headers={"Authorization": f"token {TOKEN}"})
    assert read_chat(raw, 2).ended == "complete"
    assert proxy.outcomes[-1]["user"] == "ann"
    assert TOKEN not in proxy.log


async def test_duplicate_slashes_and_health(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    raw = await request(proxy.url, path="//.api//completions/stream", body=QUESTION)
    assert raw.status == 200
    assert (await request(proxy.url, "GET", "/healthz")).status == 200


# -------------------------------------------------------------------------- the body


async def test_body_may_be_chunked_and_of_any_content_type(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    body = json.dumps(QUESTION | {"x": "y" * 5000}).encode()
    raw = await proxy.chat(body, headers=headers, chunked=True)
    assert read_chat(raw, 2).ended == "complete"


async def test_body_may_be_compressed(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    body = gzip.compress(json.dumps(QUESTION).encode())
    raw = await proxy.chat(body, headers={"Content-Encoding": "gzip"})
    assert read_chat(raw, 2).ended == "complete"


@pytest.mark.parametrize("chunked", [True, False])
async def test_body_over_the_limit(start: Starter, upstream, chunked):
    proxy = await start(model_configuration(upstream.url), limits={"bodyBytes": 1000})
    raw = await proxy.chat(b" " * 2000, chunked=chunked)
    assert raw.status == 413
    assert raw.text == (
        "request body exceeds 1000 bytes (limits.bodyBytes in the configuration)\n"
    )


async def test_compressed_body_over_the_limit(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), limits={"bodyBytes": 1000})
    body = gzip.compress(b" " * 10**6)
    raw = await proxy.chat(body, headers={"Content-Encoding": "gzip"})
    assert raw.status == 413


async def test_body_that_is_not_what_its_headers_say(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(b"not gzip", headers={"Content-Encoding": "gzip"})
    assert raw.status == 400


async def test_expect_100_continue_is_answered_before_the_body(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    message = build_request(
        proxy.url, "POST", PATH, {"Expect": "100-continue"}, QUESTION, False
    )
    head, _, body = message.partition(b"\r\n\r\n")
    port = int(proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(head + b"\r\n\r\n")
        interim = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        final = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        assert final.startswith(b"HTTP/1.1 200 OK\r\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
    await writer.wait_closed()


# -------------------------------------------------- validation of messages, section 7.2


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"speaker": "robot", "text": "x"}], "unexpected role: robot"),
        (
            [{"speaker": "human", "text": "x"}, {"speaker": "system", "text": "y"}],
            "system role can only be used in the first message",
        ),
        (
            [{"speaker": "human", "text": ""}, {"speaker": "human", "text": "x"}],
            "message content cannot be empty",
        ),
        ([], "found zero messages in prompt"),
    ],
)
async def test_messages_that_no_model_takes(start: Starter, upstream, messages, text):
    block = model_configuration(upstream.url, "anthropic", accessToken="t")
    proxy = await start(block)
    raw = await proxy.chat({"messages": messages}, version="1")
    assert_ends_once(raw)
    assert read_chat(raw, 1).errors == [text]
    raw = await proxy.chat({"messages": messages, "stream": False}, version="1")
    assert (raw.status, raw.text) == (400, f"{text}\n")
    assert upstream.requests == []
    assert [line["kind"] for line in proxy.outcomes] == ["invalid_prompt"] * 2


async def test_images_need_a_model_with_vision(start: Starter, upstream):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    question = {"messages": [{"speaker": "human", "content": [image]}]}
    block = model_configuration(upstream.url)
    raw = await (await start(block)).chat(question, version="8")
    assert read_chat(raw).errors == [
        'model "acme::v1::large" does not take images; if it does, add "vision" to '
        "its capabilities in modelConfiguration"
    ]
    block["modelOverrides"][0]["capabilities"].append("vision")
    upstream.script(ANSWER)
    assert read_chat(await (await start(block)).chat(question, version="8")).text
    sent = upstream.last.json()["messages"][0]["content"]
    assert sent == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    ]


# ------------------------------------------------------------- failures of the upstream


def refused_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500, 502, 503, 529, 302])
async def test_upstream_status_is_an_error_in_the_stream(
    start: Starter, upstream, status
):
    upstream.script(
        reply(status, {"Set-Cookie": "a=b", "Location": "http://x/"}, b'{"error":"no"}')
    )
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert_ends_once(raw)
    assert read_chat(raw, 2).errors == [
        f'OpenAI: unexpected status code {status}: {{"error":"no"}}'
    ]
    assert raw.header("set-cookie") is None and raw.header("location") is None
    outcome = proxy.outcomes[-1]
    assert (outcome["kind"], outcome["upstream_status"]) == ("upstream_status", status)


@pytest.mark.parametrize(
    ("status", "expected"), [(400, 503), (401, 503), (403, 503), (500, 503), (504, 504)]
)
async def test_upstream_status_without_streaming(
    start: Starter, upstream, status, expected
):
    headers = {
        "retry-after": "3",
        "Content-Type": "text/html",
        "Set-Cookie": "a=b",
        "Content-Encoding": "identity",
    }
    upstream.script(reply(status, headers, b"no"))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(QUESTION | {"stream": False})
    assert raw.status == expected
    assert raw.text == f"OpenAI: unexpected status code {status}: no\n"
    assert raw.header("retry-after") == "3"
    assert raw.header("set-cookie") is None
    assert raw.header("content-encoding") is None
    assert raw.header("content-type") == "text/plain; charset=utf-8"


@pytest.mark.parametrize("streamed", [True, False])
async def test_429_of_the_upstream_stays_429(start: Starter, upstream, streamed):
    headers = {
        "retry-after": "3600",
        "x-ratelimit-limit": "100",
        "x-is-cody-pro-user": "false",
    }
    upstream.script(reply(429, headers, b"slow down"))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(QUESTION | {"stream": streamed})
    assert raw.status == 429
    assert raw.text == "OpenAI: unexpected status code 429: slow down\n"
    assert raw.header("retry-after") == "3600"
    assert raw.header("x-ratelimit-limit") == "100"
    assert raw.header("x-is-cody-pro-user") is None
    assert read_chat(raw, 2).kind == "rate_limit"


OVERLOADS = {
    "TGI native": data({"error": "Model is overloaded", "error_type": "overloaded"}),
    "TGI": data({"error": {"message": "Model is overloaded", "http_status_code": 422}})
    + b"data: [DONE]\n\n",
    "OpenAI": data(
        {
            "error": {
                "message": "Slow",
                "type": "requests",
                "code": "rate_limit_exceeded",
            }
        }
    ),
}


@pytest.mark.parametrize("name", OVERLOADS)
async def test_overload_as_first_event_is_429(start: Starter, upstream, name):
    upstream.script(sse(b": wait\n\n", OVERLOADS[name]))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert raw.status == 429
    assert raw.header("retry-after") == "5"


@pytest.mark.parametrize("name", OVERLOADS)
async def test_overload_after_text_is_an_error_event(start: Starter, upstream, name):
    upstream.script(sse(*openai_chunks(["a"])[:2], OVERLOADS[name]))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    frames = assert_ends_once(raw)
    assert [frame.name for frame in frames] == ["completion", "error", "done"]
    assert proxy.outcomes[-1]["kind"] == "upstream_reported"


async def test_validation_error_of_tgi_is_shown(start: Starter, upstream):
    text = "Input validation error: `inputs` must have less than 8 tokens. Given: 9"
    upstream.script(
        sse(
            data({"error": {"message": text, "http_status_code": 422}}),
            b"data: [DONE]\n\n",
        )
    )
    proxy = await start(model_configuration(upstream.url))
    limit = "(the prompt exceeds the model's token limit)"
    assert read_chat(await proxy.chat(), 2).errors == [f"{text} {limit}"]


CUTS = {
    "FIN after text": [sse_head(), chunk(openai_chunks(["a"])[1]), Close()],
    "RST after text": [
        sse_head(),
        chunk(openai_chunks(["a"])[1]),
        Pause(0.05),
        Reset(),
    ],
    "end after text": sse(openai_chunks(["a"])[1]),
}


@pytest.mark.parametrize("name", CUTS)
async def test_stream_that_is_cut_ends_in_an_error(start: Starter, upstream, name):
    upstream.script(CUTS[name])
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    frames = assert_ends_once(raw)
    assert [frame.name for frame in frames] == ["completion", "error", "done"]
    assert proxy.outcomes[-1]["kind"] == "upstream_truncated"
    assert proxy.outcomes[-1]["status"] == 200


FAILURES = {
    "cut before the first event": (
        [sse_head(), Close()],
        "connection broke before the end",
    ),
    "reset before the head": ([Reset()], "connection closed before a reply"),
    "closed before the head": ([Close()], "connection closed before a reply"),
    "no HTTP": ([b"SSH-2.0-OpenSSH\r\n", Close()], "sent something that is not HTTP"),
    "empty stream": (sse(), "stream closed with no events"),
    "HTML": (
        reply(200, {"Content-Type": "text/html"}, b"<h1>Login</h1>"),
        "text/html instead of a completion: <h1>Login</h1>",
    ),
    "JSON error": (json_reply({"error": "no model loaded"}), "no model loaded"),
    "huge event": (sse(b"data: " + b"x" * 5000), "limit"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("streamed", [True, False])
async def test_failure_before_the_first_event(start: Starter, upstream, name, streamed):
    script, text = FAILURES[name]
    upstream.script(script)
    proxy = await start(model_configuration(upstream.url), limits={"eventBytes": 4000})
    raw = await proxy.chat(QUESTION | {"stream": streamed})
    if streamed:
        assert_ends_once(raw)
        (error,) = read_chat(raw, 2).errors
    else:
        assert raw.status in (502, 503)
        error = raw.text
    assert text in error
    assert "127.0.0.1" not in error or "upstream 127.0.0.1" in error


@pytest.mark.parametrize("streamed", [True, False])
async def test_refused_connection(start: Starter, streamed):
    url = refused_url()
    proxy = await start(model_configuration(url))
    raw = await proxy.chat(QUESTION | {"stream": streamed})
    text = f"upstream {url.removeprefix('http://')}: connection refused"
    if streamed:
        assert read_chat(raw, 2).errors == [text]
    else:
        assert (raw.status, raw.text) == (502, f"{text}\n")


async def test_a_kept_connection_that_was_closed_is_not_noticed(
    start: Starter, upstream
):
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Keep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = [head, chunk(b"".join(openai_chunks(["a"]))), b"0\r\n\r\n"]
    upstream.script([*answer, Pause(0.003), Close()])
    proxy = await start(model_configuration(upstream.url))
    for _ in range(5):
        assert read_chat(await proxy.chat(), 2).ended == "complete"


async def test_json_reply_to_a_stream_request(start: Starter, upstream):
    choice = {
        "message": {"role": "assistant", "content": "hi"},
        "finish_reason": "stop",
    }
    upstream.script(json_reply({"choices": [choice]}))
    proxy = await start(model_configuration(upstream.url))
    assert read_chat(await proxy.chat(), 2).text == "hi"


async def test_finish_without_done_ends_after_a_short_wait(
    start: Starter, upstream, monkeypatch
):
    monkeypatch.setattr("proxy.relay.GRACE_S", 0.1)
    chunks = openai_chunks(["a"])[:-1]
    upstream.script([sse_head(), *map(chunk, chunks), Hang()])
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert_ends_once(raw)
    assert read_chat(raw, 2).stop_reason == "stop"
    await upstream.closed()


# -------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize(
    "script",
    [[Hang()], [sse_head(), Hang()], [sse_head(), chunk(b": ping\n\n"), Hang()]],
    ids=["before the head", "before the first event", "comments only"],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_deadline_before_the_first_event(
    start: Starter, upstream, script, streamed
):
    upstream.script(script)
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(
        QUESTION | {"stream": streamed}, headers={"X-Timeout-Ms": "100"}
    )
    text = (
        "context deadline exceeded: the upstream did not complete the reply within "
        "100 ms"
    )
    if streamed:
        assert_ends_once(raw)
        assert read_chat(raw, 2).errors == [text]
    else:
        assert (raw.status, raw.text) == (504, f"{text}\n")
    await upstream.closed()
    assert proxy.outcomes[-1]["kind"] == "deadline_exceeded"


async def test_deadline_after_text(start: Starter, upstream):
    upstream.script([sse_head(), chunk(openai_chunks(["a"])[1]), Hang()])
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(headers={"X-Timeout-Ms": "100"})
    names = [frame.name for frame in assert_ends_once(raw)]
    assert names == ["completion", "error", "done"]
    await upstream.closed()


@pytest.mark.parametrize("value", ["", "soon", "-5", "0", "1e3", "²"])
async def test_deadline_that_is_no_number_is_ignored(start: Starter, upstream, value):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    headers = [("X-Timeout-Ms", value.encode().decode("latin-1"))]
    assert read_chat(await proxy.chat(headers=headers), 2).ended == "complete"


async def test_deadline_of_the_configuration(start: Starter, upstream):
    upstream.script([Hang()])
    proxy = await start(
        model_configuration(upstream.url), timeouts={"chat": 0.1, "code": 0.05}
    )
    assert "within 100 ms" in read_chat(await proxy.chat(), 2).errors[0]
    raw = await proxy.code()
    assert raw.status == 504 and "within 50 ms" in raw.text


# ------------------------------------------------------------------------ cancellation

PHASES = {
    "before the head": [Hang()],
    "before the first event": [sse_head(), Hang()],
    "mid-stream": [sse_head(), chunk(openai_chunks(["a"])[1]), Hang()],
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_closes_the_upstream(
    start: Starter, upstream, phase, streamed
):
    upstream.script(PHASES[phase])
    proxy = await start(model_configuration(upstream.url))
    async with connect(proxy.url) as connection:
        body = QUESTION | {"stream": streamed}
        await connection.send(build_request(proxy.url, "POST", PATH, {}, body, False))
        await upstream.received()
        if phase == "mid-stream" and streamed:
            await connection.head()
    await upstream.closed(within_s=0.5)
    await asyncio.sleep(0)
    assert proxy.outcomes[-1]["kind"] == "client_gone"


async def test_a_slow_client_slows_the_upstream(start: Starter, upstream):
    text = "x" * 10_000
    many = [chunk(b"".join(openai_chunks([text] * 20)[1:21])) for _ in range(200)]
    upstream.script([sse_head(), *many, Hang()])
    proxy = await start(model_configuration(upstream.url))
    async with stream(
        proxy.url, path=f"{PATH}?api-version=2", body=QUESTION, receive_buffer=4096
    ) as incoming:
        assert incoming.status == 200
        await asyncio.sleep(0.3)
        assert upstream.sent_bytes < 12_000_000  # of 41 million
    await upstream.closed()


# ----------------------------------------------------------------- what is written down


async def test_one_line_per_exchange(start: Starter, upstream):
    upstream.script(sse(*openai_chunks(["a"], usage=(3, 4))))
    proxy = await start(model_configuration(upstream.url))
    await request(
        proxy.url,
        path=f"{PATH}?api-version=5&client-name=vscode&client-version=1.2",
        body=QUESTION,
    )
    (line,) = proxy.lines
    assert line.pop("time").endswith("Z")
    assert len(line.pop("id")) == 16
    assert 0 < line.pop("first_token_s") <= line.pop("duration_s")
    assert line == {
        "event": "exchange",
        "route": PATH,
        "kind": "ok",
        "status": 200,
        "api_version": "5",
        "client": "vscode/1.2",
        "feature": "chat",
        "stream": True,
        "model": "acme::v1::large",
        "provider": "acme",
        "endpoint": upstream.url.removeprefix("http://"),
        "upstream_status": 200,
        "prompt_tokens": 3,
        "completion_tokens": 4,
    }


SECRET, PROMPT, REPLY_TEXT = (
    "sk-very-secret-1",
    "my private prompt",
    "my private answer",
)


def private(upstream: ScriptedUpstream, **more) -> dict:
    endpoints = [{"url": f"{upstream.url}/v1", "accessToken": SECRET}]
    return model_configuration(upstream.url, endpoints=endpoints, **more)


ASKED = {"messages": [{"speaker": "human", "text": PROMPT}]}


@pytest.mark.parametrize(
    "script",
    [
        sse(*openai_chunks([REPLY_TEXT])),
        sse(data({"error": f"cannot answer {PROMPT} ({REPLY_TEXT})"})),
        reply(400, {}, f"{PROMPT} {REPLY_TEXT} {SECRET}".encode()),
        reply(200, {"Content-Type": "text/html"}, f"{PROMPT} {REPLY_TEXT}".encode()),
    ],
    ids=["answer", "error event", "status", "HTML"],
)
async def test_no_prompt_no_answer_no_secret_is_logged(
    start: Starter, upstream, script, caplog
):
    upstream.script(script)
    proxy = await start(private(upstream))
    raw = await proxy.chat(ASKED)
    for text in (proxy.log, caplog.text):
        assert not any(word in text for word in (PROMPT, REPLY_TEXT, SECRET))
    assert SECRET not in raw.text


async def test_bad_requests_are_not_quoted_in_the_log(start: Starter, upstream):
    proxy = await start(private(upstream))
    await proxy.chat({"messages": [{"speaker": PROMPT, "text": "x"}]}, version="1")
    await proxy.chat(ASKED | {"model": PROMPT})
    await proxy.chat(b'{"temperature":"' + PROMPT.encode() + b'"}')
    assert PROMPT not in proxy.log
    assert len(proxy.outcomes) == 3


async def test_verbose_logs_have_the_payloads_without_secrets(start: Starter, upstream):
    upstream.script(sse(*openai_chunks([REPLY_TEXT]), headers={"Set-Cookie": "a=b"}))
    proxy = await start(private(upstream, enableVerboseLogs=True))
    await proxy.chat(ASKED)
    lines = {line["event"]: line for line in proxy.lines}
    assert len({line["id"] for line in proxy.lines}) == 1
    sent = lines["upstream_request"]
    assert PROMPT in sent["body"]
    assert sent["headers"]["Authorization"] == "[redacted]"
    assert lines["upstream_reply"]["headers"]["Set-Cookie"] == "[redacted]"
    received = "".join(x["data"] for x in proxy.lines if x["event"] == "upstream_data")
    assert REPLY_TEXT in received
    assert SECRET not in proxy.log


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("cut", range(2, len(SECRET), 7))
async def test_verbose_logs_know_a_secret_in_two_pieces(
    start: Starter, upstream, status, cut
):
    said = f'{{"error":"no such key: {SECRET}"}}'.encode()
    at = said.index(SECRET.encode()) + cut
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(said)))]
    upstream.script([head(status, headers), said[:at], Pause(0.05), said[at:]])
    proxy = await start(private(upstream, enableVerboseLogs=True))
    await proxy.chat(ASKED)
    received = [x["data"] for x in proxy.lines if x["event"] == "upstream_data"]
    assert received == ['{"error":"no such key: [redacted]"}']


# ------------------------------------------------------------------------------- TGI


@pytest.mark.parametrize("streamed", [True, False])
async def test_tgi_end_of_text_and_stop_text_do_not_leak(
    start: Starter, upstream, streamed
):
    texts = ["def f():", "\n", "    pass", "<|endof", "text|>"]
    upstream.script(sse(b": keep-alive\n\n", *tgi_completion_chunks(texts)))
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    raw = await proxy.code(QUESTION | {"stream": streamed})
    if streamed:
        assert read_chat(raw, 2).text == "def f():\n    pass"
    else:
        assert raw.json()["completion"] == "def f():\n    pass"


async def test_tgi_gets_what_it_takes(start: Starter, upstream):
    upstream.script(sse(*tgi_completion_chunks(["x"])))
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    stops = ["\n\n", "\n\r\n", "<a>", "<b>", "<c>", "<d>"]
    await proxy.code(
        QUESTION
        | {
            "stopSequences": stops,
            "topP": 1,
            "topK": 5,
            "temperature": 0,
            "stream": True,
        }
    )
    assert upstream.last.json() == {
        "model": "tgi",
        "prompt": "What is your name?",
        "max_tokens": 256,
        "temperature": 0,
        "stop": stops[:4],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_stop_sequences_beyond_the_limit_are_cut_at_locally(
    start: Starter, upstream
):
    texts = ["one", "<d", ">two", " three"]
    upstream.script(sse(*tgi_completion_chunks(texts)))
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    stops = ["\n\n", "\n\r\n", "<a>", "<b>", "<c>", "<d>"]
    raw = await proxy.code(QUESTION | {"stopSequences": stops, "stream": True})
    assert_ends_once(raw)
    outcome = read_chat(raw, 2)
    assert (outcome.text, outcome.stop_reason) == ("one", "stop_sequence")


async def test_strict_templates_get_folded_messages(start: Starter, upstream):
    upstream.script(sse(*tgi_chat_chunks(["x"])))
    proxy = await start(
        model_configuration(upstream.url, "huggingface-tgi"),
        models={"acme::v1::large": {"strictTemplate": True}},
    )
    turns = [
        ("system", "Be brief."),
        ("assistant", "early"),
        ("human", "one"),
        ("human", "two"),
        ("assistant", "three"),
        ("assistant", "four"),
        ("human", "five"),
        ("assistant", ""),
    ]
    messages = [{"speaker": who, "text": text} for who, text in turns]
    await proxy.chat({"messages": messages}, version="1")
    assert [(m["role"], m["content"]) for m in upstream.last.json()["messages"]] == [
        ("user", "Be brief.\n\none\n\ntwo"),
        ("assistant", "three\n\nfour"),
        ("user", "five"),
    ]


# ----------------------------------------------------------------------------- headers


async def test_reply_headers_name_no_software_but_ours(start: Starter, upstream):
    upstream.script(sse(*openai_chunks(["a"]), headers={"X-Powered-By": "gpu-7"}))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert (raw.header("server") or "").startswith("completions-proxy/")
    assert raw.header("x-powered-by") is None
    assert raw.header("x-request-id") == proxy.outcomes[-1]["id"]


async def test_connections_to_the_client_are_kept(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    message = build_request(proxy.url, "POST", PATH, {}, QUESTION, False)
    async with connect(proxy.url) as connection:
        for _ in range(3):
            await connection.send(message)
            assert (await connection.reply()).complete


async def test_http_1_0_gets_a_reply_that_ends_with_the_connection(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    message = build_request(
        proxy.url, "POST", f"{PATH}?api-version=2", {}, QUESTION, False
    )
    async with connect(proxy.url) as connection:
        await connection.send(message.replace(b"HTTP/1.1", b"HTTP/1.0"))
        raw = await connection.reply()
    assert raw.framing == "close"
    assert read_chat(raw, 2).text == "Hello wörld"


# -------------------------------------------------------- what once went wrong: kept out


def openai_text(text: str, **more) -> bytes:
    choice = {"index": 0, "delta": {"content": text}}
    return data({"choices": [choice], **more})


async def test_bug_in_mid_stream_still_ends_the_stream(
    start: Starter, upstream, monkeypatch, caplog
):
    upstream.script(sse(openai_text("hi"), Pause(0.02), openai_text("boom")))
    proxy = await start(model_configuration(upstream.url))
    frames = cody.DeltaWriter.frames

    def failing(self, deltas):
        if any(getattr(delta, "text", "") == "boom" for delta in deltas):
            raise ZeroDivisionError
        return frames(self, deltas)

    monkeypatch.setattr(cody.DeltaWriter, "frames", failing)
    raw = await proxy.chat()
    names = [frame.name for frame in assert_ends_once(raw)]
    assert names == ["completion", "error", "done"]
    assert "ZeroDivisionError" in caplog.text
    assert proxy.outcomes[-1]["kind"] == "internal"


async def test_bug_in_saying_an_error_says_no_second_reply(
    start: Starter, upstream, monkeypatch, caplog
):
    upstream.script(sse(openai_text("hi"), Pause(0.02), Reset()))
    proxy = await start(model_configuration(upstream.url))

    def failing(self, error):
        raise ZeroDivisionError

    monkeypatch.setattr(cody.DeltaWriter, "error", failing)
    async with connect(proxy.url) as connection:
        await connection.send(
            build_request(proxy.url, "POST", f"{PATH}?api-version=2", {}, ASKED, False)
        )
        raw = await connection.reply()  # fails at anything that is no chunk
        assert await connection.at_end()
    assert "hi" in raw.text and not raw.complete
    assert "ZeroDivisionError" in caplog.text
    assert proxy.outcomes[-1]["kind"] != "ok"


async def test_http_1_0_keep_alive_still_ends(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    headers = {"Connection": "keep-alive"}
    message = build_request(
        proxy.url, "POST", f"{PATH}?api-version=2", headers, QUESTION, False
    )
    async with connect(proxy.url) as connection:
        await connection.send(message.replace(b"HTTP/1.1", b"HTTP/1.0"))
        raw = await connection.reply()
    assert raw.header("connection") == "close"
    assert read_chat(raw, 2).text == "Hello wörld"


async def test_body_that_does_not_come(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    headers = {"Content-Length": "1000", "X-Timeout-Ms": "100"}
    raw = await proxy.chat(b"{", headers=headers)
    assert raw.status == 408
    assert raw.text == "the request's body did not come in time\n"


ODD_CHUNKS = [
    {"usage": {"prompt_tokens": 1.5}},
    {"usage": {"prompt_tokens": "3"}},
    {"usage": []},
    {"usage": ""},
    {"id": 5},
    {"model": {}},
]


@pytest.mark.parametrize("odd", ODD_CHUNKS)
async def test_odd_fields_beside_the_text_do_not_cost_it(start: Starter, upstream, odd):
    chunks = [openai_text("a"), openai_text("b", **odd), *openai_chunks(["c"])]
    upstream.script(sse(*chunks))
    proxy = await start(model_configuration(upstream.url))
    assert read_chat(await proxy.chat(), 2).text == "abc"


async def test_an_event_that_cannot_be_read_is_an_error(start: Starter, upstream):
    odd = data({"choices": [{"delta": {"content": {"what": "is this"}}}]})
    upstream.script(sse(openai_text("a"), odd, *openai_chunks(["c"])))
    proxy = await start(model_configuration(upstream.url))
    (error,) = read_chat(await proxy.chat(), 2).errors
    assert error.startswith("upstream sent an event that makes no sense: ")


@pytest.mark.parametrize("version", ["1", "2"])
async def test_done_without_a_finish_reason(start: Starter, upstream, version):
    thinking = data({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    upstream.script(sse(thinking, b"data: [DONE]\n\n"))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(version=version)
    assert_ends_once(raw)
    assert read_autocomplete(raw, int(version)).text == ""


@pytest.mark.parametrize("end", [Reset(), Hang()], ids=["reset", "stall"])
async def test_status_counts_even_if_its_body_breaks(
    start: Starter, upstream, end, monkeypatch
):
    monkeypatch.setattr("proxy.relay.ERROR_BODY_S", 0.1)
    head = b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: 99\r\n\r\nslow"
    upstream.script([head, Pause(0.02), end])
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert (raw.status, raw.header("retry-after")) == (429, "7")
    assert raw.text == "OpenAI: unexpected status code 429: slow\n"


async def test_pings_after_the_finish_reason_do_not_prolong_it(
    start: Starter, upstream, monkeypatch
):
    monkeypatch.setattr("proxy.relay.GRACE_S", 0.15)
    pings = [step for _ in range(40) for step in (Pause(0.05), chunk(b": ping\n\n"))]
    chunks = openai_chunks(["a"])[:-1]
    upstream.script([sse_head(), *map(chunk, chunks), *pings])
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert_ends_once(raw)
    assert raw.reads[-1][0] < 1


async def test_error_after_our_own_cut_is_no_error(start: Starter, upstream):
    upstream.script(sse(openai_text("a\n\n"), Pause(0.02), data({"error": "late"})))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(QUESTION | {"stopSequences": ["\n\n"]})
    assert read_chat(raw, 2).ended == "complete"


async def test_two_calls_of_one_id_stay_apart(start: Starter, upstream):
    def call(index: int, name: str) -> dict:
        function = {"name": name, "arguments": "{}"}
        return {"index": index, "id": "0", "function": function}

    pieces = [
        data({"choices": [{"delta": {"tool_calls": [c]}}]})
        for c in (call(0, "f"), call(1, "g"))
    ]
    upstream.script(sse(*pieces, b"data: [DONE]\n\n"))
    proxy = await start(model_configuration(upstream.url))
    calls = read_chat(await proxy.chat(version="8")).tool_calls
    assert [(c.name, c.arguments) for c in calls] == [("f", "{}"), ("g", "{}")]


async def test_call_whose_name_comes_late(start: Starter, upstream):
    functions = [{"arguments": '{"a"'}, {"name": "f", "arguments": ":1}"}]
    pieces = [
        data({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": f}]}}]})
        for f in functions
    ]
    upstream.script(sse(*pieces, b"data: [DONE]\n\n"))
    proxy = await start(model_configuration(upstream.url))
    calls = read_chat(await proxy.chat(version="8")).tool_calls
    assert [(c.name, c.arguments) for c in calls] == [("f", '{"a":1}')]


async def test_tools_of_a_client_that_cannot_read_calls(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    tools = [{"type": "function", "function": {"name": "f"}}]
    await proxy.chat(QUESTION | {"tools": tools}, version="7")
    assert "tools" not in upstream.last.json()
    await proxy.chat(QUESTION | {"tools": tools}, version="8")
    assert upstream.last.json()["tools"][0]["function"]["name"] == "f"


async def test_events_without_a_content_type_byte_by_byte(start: Starter, upstream):
    stream_bytes = b"".join(openai_chunks(["Hello"]))
    steps = [sse_head({"Content-Type": "text/plain"})]
    steps += [chunk(bytes([byte])) for byte in stream_bytes[:30]]
    upstream.script([*steps, chunk(stream_bytes[30:]), b"0\r\n\r\n"])
    proxy = await start(model_configuration(upstream.url))
    assert read_chat(await proxy.chat(), 2).text == "Hello"


async def test_pretty_json_error_called_a_stream(start: Starter, upstream):
    error = {"error": {"message": "slow down", "code": 429}}
    upstream.script(sse(json.dumps(error, indent=2).encode() + b"\n"))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert (raw.status, raw.text) == (429, "slow down\n")


async def test_odd_header_of_an_upstream_is_left_out(start: Starter, upstream):
    head = b"HTTP/1.1 429 Slow\r\nRetry-After: a\xe9b\r\nx-request-id: up\r\n"
    upstream.script([head + b"Content-Length: 4\r\n\r\nslow"])
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat()
    assert (raw.status, raw.header("retry-after")) == (429, "5")
    ids = [value for name, value in raw.headers if name.lower() == "x-request-id"]
    assert ids == [proxy.outcomes[-1]["id"]]


async def test_malformed_requests_leave_no_header_in_the_log(
    start: Starter, upstream, caplog
):
    proxy = await start(model_configuration(upstream.url))
    async with connect(proxy.url) as connection:
        await connection.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: token cp_sec\x01ret\r\n\r\n"
        )
        assert (await connection.reply()).status == 400
    assert "cp_sec" not in caplog.text


async def test_long_model_names_are_not_echoed_whole(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(QUESTION | {"model": "x" * 100_000})
    assert raw.status == 400 and len(raw.body) < 3000


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["x" * 1001], "a stop sequence has more than 1000 characters"),
        ([str(n) for n in range(129)], "129 stop sequences; at most 128 are taken"),
    ],
)
async def test_stop_sequences_have_limits(start: Starter, upstream, stops, text):
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.chat(QUESTION | {"stopSequences": stops})
    assert (raw.status, raw.text) == (400, f"{text}\n")


async def test_token_in_a_query_is_redacted_as_it_stands_there(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    token = "ab/cd+ef=12345"
    endpoints = [
        {"url": f"{upstream.url}/v1", "accessToken": token, "accessTokenQuery": "code"}
    ]
    block = model_configuration(
        upstream.url, endpoints=endpoints, enableVerboseLogs=True
    )
    proxy = await start(block)
    await proxy.chat()
    assert upstream.last.path.endswith("?code=ab/cd%2Bef%3D12345")
    assert "cd%2Bef" not in proxy.log and "12345" not in proxy.log


@pytest.mark.parametrize("streamed", [True, False])
async def test_shutdown_ends_what_is_open(upstream, streamed):
    upstream.script([sse_head(), chunk(openai_text("a")), Hang()])
    settings = load({"modelConfiguration": model_configuration(upstream.url)})
    async with running(settings, grace_s=0.1) as proxy:
        body = QUESTION | {"stream": streamed}
        asking = asyncio.create_task(proxy.chat(body))
        await upstream.received()
        await asyncio.sleep(0.05)
    raw = await asking
    if streamed:
        names = [frame.name for frame in assert_ends_once(raw)]
        assert names == ["completion", "error", "done"]
        assert read_chat(raw, 2).errors == ["the proxy is shutting down"]
    else:
        assert (raw.status, raw.text) == (503, "the proxy is shutting down\n")
    assert proxy.outcomes[-1]["kind"] == "shutting_down"
    await upstream.closed()


@pytest.mark.parametrize("value", [TOKEN, f"Bearer {TOKEN}"])
async def test_token_in_a_header_of_one_s_own(start: Starter, upstream, value):
    upstream.script(ANSWER)
    block = model_configuration(upstream.url)
    proxy = await start(block, auth=AUTH | {"header": "X-Team-Token"})
    raw = await proxy.chat(headers={"X-Team-Token": value})
    assert read_chat(raw, 2).ended == "complete"
    raw = await proxy.chat(headers={"Authorization": f"Bearer {TOKEN}"})
    assert raw.status == 401


@pytest.mark.parametrize("late", [False, True])
async def test_client_that_takes_its_time_for_the_last_bytes(
    start: Starter, upstream, monkeypatch, late
):
    """The short wait after the finish reason is for the upstream, not for the client."""
    monkeypatch.setattr("proxy.relay.GRACE_S", 0.05)
    monkeypatch.setattr("proxy.relay.LAST_WRITE_S", 0.1)
    text = "x" * 6_000_000
    upstream.script(sse(b"".join([openai_text(text), *openai_chunks(["b"])])))
    proxy = await start(model_configuration(upstream.url))
    headers = {"X-Timeout-Ms": "300" if late else "5000"}
    async with stream(
        proxy.url,
        path=f"{PATH}?api-version=2",
        body=QUESTION,
        headers=headers,
        receive_buffer=4096,
    ) as incoming:
        await asyncio.sleep(0.5)
        received = await incoming.rest()
    if late:  # its time was up: it is cut off, and nothing else is written in between
        assert b"HTTP/1.1" not in received and not incoming.reply.complete
        assert proxy.outcomes[-1]["kind"] == "client_gone"
    else:
        assert received.endswith(b"event: done\ndata: {}\n\n")
        assert proxy.outcomes[-1]["kind"] == "ok"


@pytest.mark.parametrize(
    "origin,status",
    [
        (None, 200),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8080", 200),
        ("http://[::1]:8080", 200),
        ("vscode-webview://x", 200),
        ("https://cody.example.com", 200),
        ("https://evil.example.com", 403),
        ("http://localhost.evil.example.com", 403),
        ("null", 403),
    ],
)
async def test_open_proxy_and_web_pages(start: Starter, upstream, origin, status):
    upstream.script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url), origins=["https://cody.example.com"]
    )
    headers = {} if origin is None else {"Origin": origin}
    raw = await proxy.code(headers=headers)
    assert raw.status == status, raw.text
    assert len(upstream.requests) == (status == 200)


async def test_web_page_with_a_token_may_ask(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), auth=AUTH)
    headers = {"Origin": "https://evil.example.com", "Authorization": f"token {TOKEN}"}
    assert (await proxy.code(headers=headers)).status == 200
