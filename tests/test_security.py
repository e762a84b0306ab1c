"""What an attacker would try, over raw sockets: at the door, and from behind.

SECURITY.md names the tests that hold what it says; the last ones here hold it to that.
"""

import ast
import contextlib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp.http_parser
import aiohttp.web_protocol
import pytest
import yaml

from proxy.__main__ import main
from proxy.server import handling, page
from tests.support.client import RawReply, connect, request
from tests.support.fixtures import (
    QUESTION,
    RunningProxy,
    Starter,
    model_configuration,
)
from tests.support.process import serve
from tests.support.upstream import (
    Close,
    ScriptedUpstream,
    chunk,
    encode,
    head,
    json_reply,
    openai_chunks,
    reply,
    sse,
)

ROOT = Path(__file__).parent.parent
CHAT, EMBED, TOKENIZE = "/v1/chat/completions", "/v1/embeddings", "/tokenize"
OTHER = "/v1/rerank"  # known to nobody, so handed on where passthrough is set
CODY = "/.api/completions/stream?api-version=2"
ASK = {"model": "large", "messages": [{"role": "user", "content": "hi"}]}
ANSWER = {"choices": [{"message": {"content": "one"}, "finish_reason": "stop"}]}
OTHER_ANSWER = {"choices": [{"message": {"content": "two"}, "finish_reason": "stop"}]}

# --------------------------------------------------------- smuggling: what clients send

BODY = encode(ASK)
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = chunk(BODY) + b"0\r\n\r\n"
SMUGGLED = b"POST /evil HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


def in_chunk(size: bytes, end: bytes = b"\r\n", last: bytes = b"0\r\n\r\n") -> bytes:
    return size + BODY + end + last


SIZE = b"%x" % len(BODY)
# Fields of a head and what follows it, framed in a way on which two parsers may differ.
AMBIGUOUS: Mapping[str, tuple[bytes, bytes]] = {
    "length and chunks": (LENGTH + CHUNKED, IN_CHUNKS),
    "chunks and length": (CHUNKED + b"Content-Length: 5\r\n", IN_CHUNKS),
    "two lengths": (LENGTH + b"Content-Length: 5\r\n", BODY),
    "one length twice": (LENGTH + LENGTH, BODY),
    "list of lengths": (b"Content-Length: %d, 5\r\n" % len(BODY), BODY),
    "length with a plus": (b"Content-Length: +%d\r\n" % len(BODY), BODY),
    "length with a minus": (b"Content-Length: -1\r\n", BODY),
    "length with an underscore": (b"Content-Length: 6_1\r\n", BODY),
    "hexadecimal length": (b"Content-Length: 0x3d\r\n", BODY),
    "length of other digits": ("Content-Length: ٦١\r\n".encode(), BODY),
    "empty length": (b"Content-Length: \r\n", BODY),
    "coding nobody knows": (b"Transfer-Encoding: xchunked\r\n", IN_CHUNKS),
    "such a coding and a length": (b"Transfer-Encoding: xchunked\r\n" + LENGTH, BODY),
    "coding twice": (CHUNKED + CHUNKED, IN_CHUNKS),
    "coding twice in one": (b"Transfer-Encoding: chunked, chunked\r\n", IN_CHUNKS),
    "coding, then none": (CHUNKED + b"Transfer-Encoding: identity\r\n", IN_CHUNKS),
    "coding before another": (b"Transfer-Encoding: chunked, gzip\r\n", IN_CHUNKS),
    "coding in quotes": (b'Transfer-Encoding: "chunked"\r\n', IN_CHUNKS),
    "coding after a tab that is none": (
        b"Transfer-Encoding: \x0bchunked\r\n",
        IN_CHUNKS,
    ),
    "coding and a NUL": (b"Transfer-Encoding: chunked\0\r\n", IN_CHUNKS),
    "space before the colon": (b"Transfer-Encoding : chunked\r\n", IN_CHUNKS),
    "space before a length's colon": (LENGTH.replace(b":", b" :"), BODY),
    "folded coding": (b"Transfer-Encoding:\r\n chunked\r\n", IN_CHUNKS),
    "length in a fold": (b"X: a\r\n Content-Length: 5\r\n" + LENGTH, BODY),
    "fold before any header": (b" X: a\r\n" + LENGTH, BODY),
    "bare LF": (b"X: a\nTransfer-Encoding: chunked\r\n" + LENGTH, BODY),
    "bare LF at the end": (LENGTH.replace(b"\r", b""), BODY),
    "bare CR": (b"X: a\rTransfer-Encoding: chunked\r\n" + LENGTH, BODY),
    "NUL in a value": (b"X: a\0b\r\n" + LENGTH, BODY),
    "NUL in a name": (b"X\0: a\r\n" + LENGTH, BODY),
    "no colon": (b"X\r\n" + LENGTH, BODY),
    "no name": (b": a\r\n" + LENGTH, BODY),
    "size that is none": (CHUNKED, in_chunk(b"zz\r\n")),
    "size with 0x": (CHUNKED, in_chunk(b"0x" + SIZE + b"\r\n")),
    "size with a minus": (CHUNKED, in_chunk(b"-" + SIZE + b"\r\n")),
    "size with a plus": (CHUNKED, in_chunk(b"+" + SIZE + b"\r\n")),
    "size with an underscore": (CHUNKED, in_chunk(b"0_" + SIZE + b"\r\n")),
    "size and a space": (CHUNKED, in_chunk(SIZE + b" \r\n")),
    "space and a size": (CHUNKED, in_chunk(b" " + SIZE + b"\r\n")),
    "size that overflows": (CHUNKED, in_chunk(b"1" + b"0" * 16 + SIZE + b"\r\n")),
    "size too small": (CHUNKED, in_chunk(b"3\r\n")),
    "size too large": (CHUNKED, in_chunk(b"%x\r\n" % (len(BODY) + 30))),
    "no size": (CHUNKED, in_chunk(b"\r\n")),
    "LF after a size": (CHUNKED, in_chunk(SIZE + b"\n")),
    "LF after a chunk": (CHUNKED, in_chunk(SIZE + b"\r\n", b"\n")),
    "LF at the end of chunks": (CHUNKED, in_chunk(SIZE + b"\r\n", last=b"0\n\n")),
    "LF in an extension": (CHUNKED, in_chunk(SIZE + b";a\n")),
    "CR in an extension": (CHUNKED, in_chunk(SIZE + b";a\rb\r\n")),
    "line end in an extension": (CHUNKED, in_chunk(SIZE + b';a="\r\n"\r\n')),
    "length in a trailer": (CHUNKED, IN_CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n"),
    "trailer that is none": (CHUNKED, IN_CHUNKS[:-2] + b"nonsense\r\n\r\n"),
}
# What aiohttp's parser in Python, which is there where its C one was not built, reads
# in its own way: as framed, or as something of which the rest has yet to come.
LENIENT = {
    "coding twice in one",
    "length in a trailer",
    "trailer that is none",
    "size too large",
    "size that overflows",
    "LF after a size",
    "LF at the end of chunks",
    "CR in an extension",
}


async def smuggle(proxy: RunningProxy, path: str, fields: bytes, body: bytes) -> int:
    """Send a request with another one hidden behind it; return the first status."""
    line = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
    async with connect(proxy.url) as connection:
        await connection.send(line + fields + b"\r\n" + body + SMUGGLED)
        status = (await connection.reply()).status
        assert await connection.at_end()
    return status


@pytest.mark.parametrize("path", [CHAT, EMBED, TOKENIZE, OTHER])
async def test_ambiguous_request_is_refused(start: Starter, upstream, path):
    upstream.script(json_reply(ANSWER))
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    for name, (fields, body) in AMBIGUOUS.items():
        assert await smuggle(proxy, path, fields, body) == 400, name
    assert upstream.requests == []
    raw = await request(proxy.url, path=path, body=BODY)  # with nothing wrong
    assert raw.status == 200


@pytest.mark.parametrize("path", [CHAT, TOKENIZE, OTHER])
async def test_chunks_of_http_1_0_are_refused(start: Starter, upstream, path):
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    async with connect(proxy.url) as connection:
        line = f"POST {path} HTTP/1.0\r\nHost: x\r\n".encode()
        await connection.send(line + CHUNKED + b"\r\n" + IN_CHUNKS + SMUGGLED)
        assert (await connection.reply()).status == 400
        assert await connection.at_end()
    assert upstream.requests == []


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (LENGTH, BODY),
        (b"Transfer-Encoding: CHUNKED\r\n", IN_CHUNKS),
        (b"Transfer-Encoding:\tchunked\r\n", IN_CHUNKS),
        (CHUNKED, in_chunk(SIZE + b";a=b\r\n", last=b"0;c\r\n\r\n")),
        (CHUNKED, in_chunk(SIZE + b";" + b"a" * 100_000 + b"\r\n")),
        (CHUNKED, IN_CHUNKS[:-2] + b"X-Trailer: 1\r\n\r\n"),
        (b"Transfer_Encoding: chunked\r\n" + LENGTH, BODY),
        (b"Connection: Content-Length\r\n" + LENGTH, BODY),
        (b"Connection: Transfer-Encoding, Host\r\n" + CHUNKED, IN_CHUNKS),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + LENGTH, BODY),
    ],
)
@pytest.mark.parametrize("path", [TOKENIZE, OTHER])
async def test_odd_framing_is_handed_on_as_plain_framing(
    start: Starter, upstream, path, fields, body
):
    """The upstream reads what we read: not one byte of framing is the client's."""
    upstream.script(json_reply([]))
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    line = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
    async with connect(proxy.url) as connection:
        await connection.send(line + fields + b"\r\n" + body)
        assert (await connection.reply()).status == 200
    # ``upstream`` fails by itself if anything is left over, or odd.
    assert [(r.path, r.body) for r in upstream.requests] == [(path, BODY)]
    assert "trailer" not in str(upstream.last.headers).lower()
    assert "upgrade" not in str(upstream.last.headers).lower()
    assert "_" not in "".join(name for name, _ in upstream.last.headers)


async def test_smuggling_past_the_parser_in_python(
    start: Starter, upstream, monkeypatch
):
    """Where aiohttp's C parser was not built, another one reads requests."""
    parser = aiohttp.http_parser.HttpRequestParserPy
    monkeypatch.setattr(aiohttp.web_protocol, "HttpRequestParser", parser)
    upstream.script(json_reply([]))
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    for name in AMBIGUOUS.keys() - LENIENT:
        fields, body = AMBIGUOUS[name]
        assert await smuggle(proxy, OTHER, fields, body) in (400, 424), name
    assert upstream.requests == []
    for name in LENIENT:
        fields, body = AMBIGUOUS[name]
        line = f"POST {OTHER} HTTP/1.1\r\nHost: x\r\n".encode()
        async with connect(proxy.url) as connection:
            await connection.send(line + fields + b"\r\n" + body + SMUGGLED)
            with contextlib.suppress(TimeoutError, AssertionError):
                await connection.reply(within_s=0.2)
                await connection.reply(within_s=0.2)
    # Whatever it takes for a request, body or next one is so for the upstream as well.
    received = {(r.path, r.body) for r in upstream.requests}
    assert received <= {(OTHER, BODY), ("/evil", b"{}")}


# ------------------------------------------------------ smuggling: what upstreams reply

SAID = encode(ANSWER)
SAID_IN_CHUNKS = chunk(SAID) + b"0\r\n\r\n"
SAID_LENGTH = b"Content-Length: %d\r\n" % len(SAID)
SAID_SIZE = b"%x" % len(SAID)
EVIL_REPLY = json_reply({"choices": [{"message": {"content": "EVIL"}}]})


def said(size: bytes, end: bytes = b"\r\n", last: bytes = b"0\r\n\r\n") -> bytes:
    return size + SAID + end + last


REFUSED_HEADS = {
    "length and chunks": (SAID_LENGTH + CHUNKED, SAID_IN_CHUNKS),
    "chunks and length": (CHUNKED + b"Content-Length: 5\r\n", SAID_IN_CHUNKS),
    "two lengths": (SAID_LENGTH + b"Content-Length: 5\r\n", SAID),
    "list of lengths": (b"Content-Length: 5, 64\r\n", SAID),
    "length with a plus": (b"Content-Length: +64\r\n", SAID),
    "length with a minus": (b"Content-Length: -64\r\n", SAID),
    "empty length": (b"Content-Length:\r\n", SAID),
    "length that overflows": (b"Content-Length: 99999999999999999999\r\n", SAID),
    "such a coding and a length": (b"Transfer-Encoding: x\r\n" + SAID_LENGTH, SAID),
    "space before the colon": (b"Transfer-Encoding : chunked\r\n", SAID_IN_CHUNKS),
    "folded coding": (b"Transfer-Encoding:\r\n chunked\r\n", SAID_IN_CHUNKS),
    "length in a fold": (b"X: a\r\n Content-Length: 5\r\n" + SAID_LENGTH, SAID),
    "bare LF": (b"X: a\nContent-Length: 5\r\n" + SAID_LENGTH, SAID),
    "bare CR": (b"X: a\rSet-Cookie: b\r\n" + SAID_LENGTH, SAID),
    "NUL in a value": (b"X: a\0b\r\n" + SAID_LENGTH, SAID),
    "NUL in a name": (b"X\0: a\r\n" + SAID_LENGTH, SAID),
}
REFUSED_BODIES = {
    "size that is none": said(b"zz\r\n"),
    "size with 0x": said(b"0x" + SAID_SIZE + b"\r\n"),
    "size with a minus": said(b"-" + SAID_SIZE + b"\r\n"),
    "size and a space": said(SAID_SIZE + b" \r\n"),
    "size that overflows": said(b"f" * 17 + b"\r\n"),
    "LF after a size": said(SAID_SIZE + b"\n"),
    "LF after a chunk": said(SAID_SIZE + b"\r\n", b"\n"),
    "CR in an extension": said(SAID_SIZE + b";a\rb\r\n"),
    "LF at the end": said(SAID_SIZE + b"\r\n", last=b"0\n\n"),
}


async def ask_twice(
    proxy: RunningProxy, upstream: ScriptedUpstream, path: str, first: bytes
) -> RawReply:
    """Ask for a reply with another one behind it, then for an ordinary one, which must
    be what is seen then; return the first.
    """
    upstream.script(first)
    upstream.script([json_reply(OTHER_ANSWER)])
    raw = await request(proxy.url, path=path, body=ASK, allow_truncated=True)
    second = await request(proxy.url, path=path, body=ASK)
    assert second.json() == OTHER_ANSWER
    assert b"EVIL" not in raw.body
    return raw


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
@pytest.mark.parametrize("name", REFUSED_HEADS)
async def test_ambiguous_reply_is_refused(start: Starter, name, path):
    fields, body = REFUSED_HEADS[name]
    async with ScriptedUpstream() as upstream:
        proxy = await start(model_configuration(upstream.url))
        whole = b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n" + body + EVIL_REPLY
        raw = await ask_twice(proxy, upstream, path, whole)
        assert raw.status == (502 if path == CHAT else 424)
        assert "sent something that is not HTTP" in raw.text
        assert raw.header("set-cookie") is None


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
@pytest.mark.parametrize("name", REFUSED_BODIES)
async def test_reply_of_bad_chunks_is_refused(start: Starter, name, path):
    async with ScriptedUpstream() as upstream:
        proxy = await start(model_configuration(upstream.url))
        whole = head(200, {"Transfer-Encoding": "chunked"}) + REFUSED_BODIES[name]
        raw = await ask_twice(proxy, upstream, path, whole + EVIL_REPLY)
        if path == CHAT:
            assert raw.status == 502 and "broken" in raw.text
        else:  # its head is gone down already
            assert not raw.complete
        assert proxy.outcomes[0]["kind"] == "upstream_garbled"


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
@pytest.mark.parametrize(
    "whole",
    [
        json_reply(ANSWER),
        head(200, {"Transfer-Encoding": "chunked"}) + SAID_IN_CHUNKS,
        json_reply(ANSWER, headers={"Connection": "Upgrade", "Upgrade": "h2c"}),
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + SAID_IN_CHUNKS,
    ],
)
async def test_reply_behind_a_reply_answers_nobody(start: Starter, whole, path):
    async with ScriptedUpstream() as upstream:
        proxy = await start(model_configuration(upstream.url))
        raw = await ask_twice(proxy, upstream, path, whole + EVIL_REPLY)
        assert raw.json() == ANSWER
        assert upstream.opened == 2  # what was spoilt is not used again


async def test_switching_protocols_is_refused(start: Starter, upstream):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    upstream.script(head(101, upgrade) + b"anything")
    proxy = await start(model_configuration(upstream.url))
    raw = await request(proxy.url, "POST", TOKENIZE, upgrade, b"{}")
    assert raw.status == 424
    assert upstream.last.header("upgrade") is None


# ---------------------------------------------------------------------- header injection

LINES = "large\r\nX-Evil: 1\r\n\r\nGET /evil HTTP/1.1\r\nHost: x\r\n\r\n"
QUESTIONS: Mapping[str, Mapping[str, object]] = {
    CHAT: ASK,
    "/v1/completions": {"prompt": "hi"},
    EMBED: {"input": "hi"},
    CODY: QUESTION,
    "/.api/completions/code": QUESTION,
    "/v1/messages": {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
    "/generate": {"inputs": "hi"},
    "/v1/completions/openai": ASK,
    TOKENIZE: {"text": "hi"},
}
FEATURE = {"X-Sourcegraph-Feature": "chat_completions"}


def assert_no_injection(raw: RawReply, upstream: ScriptedUpstream) -> None:
    assert raw.header("x-evil") is None
    for received in upstream.requests:
        assert received.path != "/evil" and received.header("x-evil") is None


@pytest.mark.parametrize("path", QUESTIONS)
@pytest.mark.parametrize("fallback", [True, False])
async def test_model_names_do_not_become_headers(
    start: Starter, upstream, path, fallback
):
    upstream.script(json_reply(ANSWER))
    block = model_configuration(upstream.url)
    proxy = await start(block, fallback=fallback)
    for fields in ({"model": LINES}, {LINES: LINES}, {"user": LINES, "model": "large"}):
        for streamed in (True, False):
            body = {**QUESTIONS[path], **fields, "stream": streamed}
            raw = await request(proxy.url, path=path, headers=FEATURE, body=body)
            assert raw.status < 500, raw.text
            assert_no_injection(raw, upstream)
    assert all(line["kind"] != "internal" for line in proxy.outcomes)


async def test_names_of_the_configuration_do_not_become_headers(
    start: Starter, upstream
):
    """A model's name of an upstream, an alias: they are said in bodies alone, or not."""
    upstream.script(json_reply(ANSWER))
    block = model_configuration(upstream.url)
    block["modelOverrides"][0]["modelName"] = LINES
    block["modelOverrides"][0]["displayName"] = LINES
    proxy = await start(block, aliases={LINES: "acme::v1::large"})
    for path, body in QUESTIONS.items():
        sent = {**body, "model": LINES}
        raw = await request(proxy.url, path=path, headers=FEATURE, body=sent)
        assert_no_injection(raw, upstream)
        assert raw.status < 500
    for path in ("/v1/models", "/.api/llm/models", "/v1/limits", "/info", "/"):
        assert_no_injection(await request(proxy.url, "GET", path), upstream)


TOKEN = "cp_client_0123456789"
AUTH = {
    "tokens": [{"name": "ann", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}]
}


@pytest.mark.parametrize("name", ["Authorization", "X-API-Key", "X-Team-Token"])
async def test_tokens_do_not_become_headers(start: Starter, upstream, name):
    """Nor does a client's own credential that is sent on."""
    upstream.script(json_reply(ANSWER))
    proxy = await start(
        model_configuration(upstream.url),
        auth={"header": "X-Team-Token"} | AUTH,
        providers={"acme": {"credentials": "client"}},
    )
    for value in (b"Bearer a\rX-Evil: 1", b"Bearer a\nX-Evil: 1", b"Bearer a\0b"):
        async with connect(proxy.url) as connection:
            line = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{name}: ".encode()
            await connection.send(line + value + b"\r\n" + LENGTH + b"\r\n" + BODY)
            raw = await connection.reply()
            assert raw.status == 400
            assert_no_injection(raw, upstream)
    assert upstream.requests == []
    for odd in ("Bearer \xe9\xff", "Bearer  a b", "Bearer ,", "Bearer \t"):
        raw = await request(proxy.url, path=CHAT, headers={name: odd}, body=ASK)
        assert raw.status in (200, 401, 502), odd
        assert_no_injection(raw, upstream)


async def test_paths_and_queries_do_not_become_headers(start: Starter, upstream):
    upstream.script(json_reply([]))
    endpoints = [{"url": f"{upstream.url}/v1?a=b", "accessToken": "t"}]
    block = model_configuration(upstream.url, endpoints=endpoints)
    proxy = await start(block, passthrough=True)
    line_end = "%0d%0aX-Evil:%201%0d%0a%0d%0aGET%20/evil"
    for target in (
        f"/x?q={line_end}",
        f"{CODY}&client-name={line_end}",
        f"/{line_end}",
    ):
        raw = await request(proxy.url, "GET", target)
        assert_no_injection(raw, upstream)
        for line in proxy.outcomes:
            assert "\n" not in json.dumps(line)
    # Encoded they stay in a query; a path with them is refused.
    assert [r.path for r in upstream.requests] == [f"/x?a=b&q={line_end}"]


async def test_request_ids_are_the_proxy_s_own(start: Starter, upstream):
    """A client's can neither forge a line of the log nor be somebody else's."""
    upstream.script(json_reply(ANSWER, headers={"X-Request-Id": "of-the-upstream"}))
    proxy = await start(model_configuration(upstream.url))
    sent = {
        "X-Request-Id": 'chosen","status":200',
        "X-Correlation-Id": "chosen",
        "X-Trace": "chosen",
        "Traceparent": "00-chosen",
    }
    for path in (CHAT, TOKENIZE, "/v1/models"):
        method = "GET" if path == "/v1/models" else "POST"
        raw = await request(proxy.url, method, path, sent, ASK)
        ids = [value for name, value in raw.headers if name.lower() == "x-request-id"]
        assert ids == [proxy.outcomes[-1]["id"]]
        assert re.fullmatch("[0-9a-f]{16}", ids[0])
    assert "chosen" not in proxy.log


async def test_upstream_s_words_do_not_become_headers(start: Starter, upstream):
    """What an upstream says of itself is put into frames, not into heads."""
    chunks = [part.replace(b"gpt-test", b"a\\r\\nX-Evil: 1") for part in ONE_STREAM]
    upstream.script(sse(*chunks))
    proxy = await start(model_configuration(upstream.url))
    for path in (CHAT, CODY, "/v1/messages", "/generate_stream"):
        body = {"inputs": "hi", "max_tokens": 5, "stream": True} | ASK
        body |= QUESTION if path == CODY else {}
        raw = await request(proxy.url, path=path, body=body)
        assert raw.status == 200
        assert_no_injection(raw, upstream)


ONE_STREAM = openai_chunks(["one"])

# --------------------------------------------------------------- what passes, and what not

HOP = ("connection", "keep-alive", "te", "trailer", "upgrade", "proxy-authorization")
LEFT_OUT_UP = (*HOP, "proxy-connection", "x-named", "cookie", "x-api-key", "api-key")
LEFT_OUT_DOWN = (*HOP, "proxy-authenticate", "x-named", "set-cookie", "x-powered-by")


@pytest.mark.parametrize("path", [TOKENIZE, OTHER, EMBED])
async def test_hop_by_hop_headers_are_stripped_both_ways(
    start: Starter, upstream, path
):
    down = {
        **dict.fromkeys(LEFT_OUT_DOWN, "from-upstream"),
        "Connection": "X-Named, close",
        "Keep-Alive": "timeout=9",
        "Server": "from-upstream",
        "X-Kept": "down",
    }
    upstream.script(json_reply([], headers=down))
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    up = {
        **dict.fromkeys(LEFT_OUT_UP, "from-client"),
        "Connection": "keep-alive, x-NAMED",
        "TE": "trailers",
        "Upgrade": "h2c",
        "X-Kept": "up",
    }
    raw = await request(proxy.url, path=path, headers=up, body=ASK)
    assert raw.status == 200
    assert raw.header("x-kept") == "down"
    assert upstream.last.header("x-kept") == "up"
    assert "from-client" not in str(upstream.last.headers)
    assert "from-upstream" not in str(raw.headers)
    assert {n.lower() for n, _ in raw.headers}.isdisjoint(
        {*LEFT_OUT_DOWN} - {"trailer"}
    )


@pytest.mark.parametrize("path", [CHAT, CODY, "/v1/messages", "/generate"])
@pytest.mark.parametrize("status", [200, 400, 500])
async def test_replies_of_exchanges_have_no_header_of_the_upstream_s(
    start: Starter, upstream, path, status
):
    """But for those that say something of limits and of the request."""
    given = {
        **dict.fromkeys((*LEFT_OUT_DOWN, "x-private", "via"), "from-upstream"),
        "Connection": "X-Named",
        "Keep-Alive": "timeout=9",
        "Server": "from-upstream",
        "Location": "http://from-upstream",
        "X-RateLimit-Remaining": "9",
    }
    upstream.script(json_reply(ANSWER, status, headers=given))
    proxy = await start(model_configuration(upstream.url))
    body = {"inputs": "hi", "max_tokens": 5} | ASK | {"stream": False}
    body |= QUESTION if path == CODY else {}
    raw = await request(proxy.url, path=path, body=body)
    assert "from-upstream" not in str(raw.headers)
    assert "from-client" not in str(upstream.last.headers)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", [CHAT, CODY, TOKENIZE, OTHER, EMBED])
async def test_redirects_are_not_followed(start: Starter, path, status):
    async with ScriptedUpstream() as upstream, ScriptedUpstream() as elsewhere:
        place = {"Location": f"{elsewhere.url}/evil", "Refresh": "0"}
        upstream.script(reply(status, place))
        proxy = await start(model_configuration(upstream.url), passthrough=True)
        body = QUESTION if path == CODY else ASK
        raw = await request(proxy.url, path=path, body=body)
        assert len(upstream.requests) == 1 and elsewhere.opened == 0
        if path in (CHAT, CODY):
            assert elsewhere.url not in raw.text + str(raw.headers)
        else:  # the client decides where to go: its token is not there
            assert raw.status == status


async def test_redirect_of_a_model_list_is_not_followed(start: Starter):
    async with ScriptedUpstream() as upstream, ScriptedUpstream() as elsewhere:
        upstream.script(reply(302, {"Location": f"{elsewhere.url}/v1/models"}))
        block = model_configuration(upstream.url)
        proxy = await start(block, listUpstreamModels=True)
        raw = await request(proxy.url, "GET", "/v1/models")
        assert [each["id"] for each in raw.json()["data"]] == ["large"]
        assert elsewhere.opened == 0


async def test_cookies_of_an_upstream_are_not_kept(start: Starter, upstream):
    upstream.script(json_reply(ANSWER, headers={"Set-Cookie": "a=b; Path=/"}))
    proxy = await start(model_configuration(upstream.url))
    for path in (CHAT, TOKENIZE, CHAT, TOKENIZE):
        raw = await request(proxy.url, path=path, headers={"Cookie": "c=d"}, body=ASK)
        assert raw.header("set-cookie") is None
    assert all(r.header("cookie") is None for r in upstream.requests)


# ------------------------------------------------------------------------ where requests go


@pytest.mark.parametrize(
    "target",
    [
        "http://{}/v1/rerank",
        "HTTP://{}/v1/rerank",
        "http://u:p@{}/v1/rerank",
        "https://{}/v1/rerank",
        "/v1/rerank",
    ],
)
@pytest.mark.parametrize("path", [OTHER, TOKENIZE, CHAT])
async def test_no_request_chooses_where_to_connect(start: Starter, path, target):
    async with ScriptedUpstream() as upstream, ScriptedUpstream() as other:
        upstream.script(json_reply(ANSWER))
        proxy = await start(model_configuration(upstream.url), passthrough=True)
        host = other.url.removeprefix("http://")
        headers = {
            "Host": host,
            "Forwarded": f"host={host}",
            "X-Forwarded-Host": host,
            "X-Forwarded-Server": host,
            "X-Original-URL": f"{other.url}/evil",
            "X-Rewrite-URL": "/evil",
        }
        asked = target.replace("/v1/rerank", path).format(host)
        raw = await request(proxy.url, "POST", asked, headers, ASK)
        assert raw.status == 200, raw.text
        assert other.opened == 0
        assert upstream.last.path == path
        assert upstream.last.header("host") == upstream.url.removeprefix("http://")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("CONNECT {}:443", 400),
        ("GET {}:443", 400),
        ("GET http://", 400),
        ("GET *", 400),
        ("GET ://{}/x", 400),
    ],
)
async def test_targets_that_are_no_path(start: Starter, upstream, line, status):
    proxy = await start(model_configuration(upstream.url), passthrough=True)
    async with connect(proxy.url) as connection:
        text = f"{line.format('127.0.0.1')} HTTP/1.1\r\nHost: x\r\n\r\n"
        await connection.send(text.encode())
        assert (await connection.reply()).status == status
    assert upstream.requests == []


async def test_body_that_names_a_host_is_not_asked_there(start: Starter):
    async with ScriptedUpstream() as upstream, ScriptedUpstream() as other:
        upstream.script(json_reply(ANSWER))
        proxy = await start(model_configuration(upstream.url))
        names = ("base_url", "api_base", "endpoint", "url", "provider", "callback_url")
        for path, body in QUESTIONS.items():
            given = {**dict.fromkeys(names, other.url), **body}
            await request(proxy.url, path=path, headers=FEATURE, body=given)
        assert upstream.requests and other.opened == 0


# ------------------------------------------------------------------- bombs and other sizes

LIMIT = 100_000
BOMBS = {
    "gzip": lambda body: gzip.compress(body),
    "deflate": lambda body: zlib.compress(body),
}


@pytest.mark.parametrize("coding", BOMBS)
@pytest.mark.parametrize("path", [CHAT, CODY, EMBED, TOKENIZE, OTHER])
async def test_packed_request_counts_as_unpacked(
    start: Starter, upstream, path, coding
):
    block = model_configuration(upstream.url)
    proxy = await start(block, passthrough=True, limits={"bodyBytes": LIMIT})
    bomb = BOMBS[coding](bytes(50_000_000))
    assert len(bomb) < LIMIT
    raw = await request(proxy.url, "POST", path, {"Content-Encoding": coding}, bomb)
    assert raw.status == 413
    assert upstream.requests == []


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "nonsense"])
async def test_packed_in_other_ways_is_an_error(start: Starter, upstream, coding):
    """Whether aiohttp knows it depends on what is installed: it is never half undone."""
    proxy = await start(model_configuration(upstream.url))
    packed = gzip.compress(gzip.compress(BODY))
    raw = await request(proxy.url, "POST", CHAT, {"Content-Encoding": coding}, packed)
    assert raw.status == 400
    assert upstream.requests == []


@pytest.mark.parametrize("coding", BOMBS)
@pytest.mark.parametrize("streamed", [True, False])
async def test_packed_reply_counts_as_unpacked(
    start: Starter, upstream, coding, streamed
):
    bomb = BOMBS[coding](b"data: " + bytes(50_000_000))
    kind = "text/event-stream" if streamed else "application/json"
    headers = {"Content-Encoding": coding, "Content-Type": kind}
    upstream.script(reply(200, headers, bomb))
    block = model_configuration(upstream.url)
    proxy = await start(block, limits={"eventBytes": LIMIT})
    raw = await request(proxy.url, path=CHAT, body=ASK | {"stream": streamed})
    assert raw.status == 502
    assert proxy.outcomes[-1]["kind"] in ("event_too_large", "upstream_garbled")


async def test_packed_model_list_counts_as_unpacked(start: Starter, upstream):
    headers = {"Content-Encoding": "gzip"}
    upstream.script(reply(200, headers, gzip.compress(bytes(50_000_000))))
    proxy = await start(model_configuration(upstream.url), listUpstreamModels=True)
    raw = await request(proxy.url, "GET", "/v1/models")
    assert [each["id"] for each in raw.json()["data"]] == ["large"]


@pytest.mark.parametrize("path", [CHAT, CODY])
async def test_oversized_events_end_the_stream(start: Starter, upstream, path):
    upstream.script(sse(ONE_STREAM[1], b"data: " + b"x" * (2 * LIMIT), Close()))
    block = model_configuration(upstream.url)
    proxy = await start(block, limits={"eventBytes": LIMIT})
    body = QUESTION if path == CODY else ASK | {"stream": True}
    raw = await request(proxy.url, path=path, body=body)
    assert "one" in raw.text and "error" in raw.text
    assert proxy.outcomes[-1]["kind"] == "event_too_large"


async def test_oversized_reply_in_one_piece(start: Starter, upstream):
    upstream.script(reply(200, {}, b'{"x":"' + b"x" * (3 * LIMIT) + b'"}'))
    block = model_configuration(upstream.url)
    proxy = await start(block, limits={"eventBytes": LIMIT})
    raw = await request(proxy.url, path=CHAT, body=ASK)
    assert raw.status == 502


# ------------------------------------------------------------------------------------ JSON


def deep(size: int = 100_000) -> bytes:
    return b"[" * size + b"]" * size


ODD_JSON = {
    "deep": b'{"messages":%b}' % deep(),
    "deep and open": b'{"a":' * 100_000,
    "deep beside": b'{"x":%b,"model":"large","messages":[]}' % deep(),
    "deep arguments": encode(
        ASK | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    ).replace(b'"f"', b'"f","parameters":{"a":%b}' % deep()),
    "deep model": b'{"model":%b,"messages":[]}' % deep(),
    "huge integer": b'{"max_tokens":%b,"messages":[]}' % (b"9" * 10_000),
    "huge exponent": b'{"temperature":1e999999999,"messages":[]}',
    "long fraction": b'{"temperature":0.%b,"messages":[]}' % (b"1" * 100_000),
    "NaN": b'{"temperature":NaN,"messages":[]}',
    "Infinity": b'{"temperature":-Infinity,"messages":[]}',
    "lone surrogate": b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    "NUL": b'{"model":"\\u0000","messages":[]}',
    "no UTF-8": b'{"model":"\xff","messages":[]}',
}


@pytest.mark.parametrize("name", ODD_JSON)
async def test_odd_json_of_a_client_is_its_mistake(start: Starter, upstream, name):
    upstream.script(json_reply(ANSWER))
    proxy = await start(model_configuration(upstream.url))
    for path in QUESTIONS:
        raw = await request(
            proxy.url, path=path, headers=FEATURE, body=ODD_JSON[name], within_s=10
        )
        assert raw.status < 500, (path, raw.text)
    assert all(line["kind"] != "internal" for line in proxy.outcomes)


async def test_of_two_models_in_one_body_one_is_asked(start: Starter, upstream):
    """The one that was checked: the upstream gets each key once where it is named."""
    upstream.script(json_reply(ANSWER))
    proxy = await start(model_configuration(upstream.url))
    messages = b'"messages":[{"role":"user","content":"hi"}]'
    for path in (CHAT, EMBED):
        for first, second in ((b"large", b"other"), (b"other", b"large")):
            body = b'{"model":"%b","model":"%b",%b}' % (first, second, messages)
            upstream.requests.clear()
            raw = await request(proxy.url, path=path, body=body)
            if raw.status == 200:
                sent = upstream.last.body
                assert sent.count(b'"model"') == 1 and b'"large-1"' in sent
            else:
                assert raw.status in (400, 404) and not upstream.requests


ODD_REPLIES = {
    "deep": deep(),
    "deep and open": b'{"choices":' * 100_000,
    "deep beside": b'{"x":%b,"choices":[]}' % deep(),
    "huge integer": b'{"usage":{"prompt_tokens":%b}}' % (b"9" * 10_000),
    "huge exponent": b'{"usage":{"prompt_tokens":1e999999999}}',
    "NaN": b'{"choices":NaN}',
    "no UTF-8": b'{"choices":"\xff\xfe"}',
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", ODD_REPLIES)
async def test_odd_json_of_an_upstream_is_its_mistake(
    start: Starter, upstream, name, streamed
):
    body = ODD_REPLIES[name]
    plain = {"Content-Type": "application/json"}
    if streamed:
        upstream.script(sse(b"data: " + body + b"\n\n", b"data: [DONE]\n\n"))
    else:
        upstream.script(reply(200, plain, body))
    proxy = await start(model_configuration(upstream.url))
    for path in (CHAT, CODY, "/v1/messages", "/generate"):
        asked = {"inputs": "hi", "max_tokens": 5} | ASK | {"stream": streamed}
        asked |= QUESTION if path == CODY else {}
        await request(proxy.url, path=path, body=asked, within_s=10)
    assert len(proxy.outcomes) == 4
    assert all(line["kind"] != "internal" for line in proxy.outcomes)


# --------------------------------------------------------------------------------- secrets

KEY, PASSWORD, HEADER_KEY, QUERY_KEY, REDIS_PASSWORD = (
    "upstream-key-0001",
    "url-password-0002",
    "header-key-0003",
    "query-key-0004",
    "redis-password-0005",
)
HANDED_ON = (EMBED, TOKENIZE)
SECRETS = (TOKEN, KEY, PASSWORD, HEADER_KEY, QUERY_KEY, REDIS_PASSWORD)


def shown_in(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


def secretive(upstream: ScriptedUpstream, **server_side: Any) -> dict[str, object]:
    """A provider with a secret in each place where there can be one."""
    host = upstream.url.removeprefix("http://")
    return model_configuration(
        upstream.url,
        endpoints=[
            {"url": f"http://me:{PASSWORD}@{host}/v1"},
            {"url": f"http://{host}/v1", "accessToken": KEY},
            {"url": f"http://{host}/v1", "headers": {"X-Key": HEADER_KEY}},
            {
                "url": f"http://{host}/v1",
                "accessToken": QUERY_KEY,
                "accessTokenQuery": "key",
            },
        ],
        **server_side,
    )


ECHO = f'{{"error":{{"message":"not good: {" ".join(SECRETS[:5])}"}}}}'
# Each way in which an upstream can fail, naming all secrets where it can name something.
FAILURES = {
    "status": reply(400, {"X-Request-Id": KEY}, ECHO),
    "server error": reply(500, {"X-Private": KEY}, ECHO),
    "not let in": reply(401, {"WWW-Authenticate": KEY}, ECHO),
    "in a stream": b"".join(
        part for part in sse(b"data: " + ECHO.encode() + b"\n\n") if type(part) is bytes
    ),
    "no JSON": reply(200, {"Content-Type": "application/json"}, ECHO[:-1]),
    "other JSON": reply(200, {"Content-Type": "application/json"}, f"[{ECHO}]"),
    "no HTTP": ECHO.encode() + b"\r\n\r\n",
    "other encoding": reply(200, {"Content-Encoding": KEY}, ECHO),
}


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("name", FAILURES)
async def test_secrets_are_in_no_error_and_no_log(
    start: Starter, name, verbose, caplog, capfd
):
    async with ScriptedUpstream() as upstream:
        upstream.script([FAILURES[name], Close()])
        block = secretive(upstream, enableVerboseLogs=verbose)
        proxy = await start(block, auth=AUTH)
        for path in QUESTIONS:
            headers = FEATURE | {"Authorization": f"Bearer {TOKEN}"}
            body = {**QUESTIONS[path], "model": "large"}
            raw = await request(
                proxy.url, path=path, headers=headers, body=body, within_s=10
            )
            # What is handed on is the upstream's, whatever it says.
            assert path in HANDED_ON or not shown_in(str(raw.headers) + raw.text)
        written = proxy.log + caplog.text + "".join(capfd.readouterr())
        assert not shown_in(written)
        assert upstream.requests


async def test_secrets_are_on_no_page(start: Starter, upstream):
    upstream.script(json_reply(ANSWER))
    proxy = await start(secretive(upstream), auth=AUTH)
    given = {"Authorization": f"Bearer {TOKEN}"}
    await request(proxy.url, path=CHAT, headers=given, body=ASK)
    pages = ("/", "/-/metrics", "/v1/models", "/.api/llm/models", "/v1/limits", "/info")
    instance = ("/.api/usage", "/.api/client-config", "/healthz", "/nowhere")
    for path in (*pages, *instance):
        for accept in ("*/*", "text/html"):
            for headers in ({"Accept": accept}, {"Accept": accept} | given):
                raw = await request(proxy.url, "GET", path, headers)
                assert not shown_in(str(raw.headers) + raw.text), path


def configuration(upstream: ScriptedUpstream) -> str:
    auth = {"tokens": [{"name": "ann", "token": TOKEN}]}
    return yaml.safe_dump(
        {
            "auth": auth,
            "modelConfiguration": secretive(upstream, enableVerboseLogs=True),
        }
    )


async def test_secrets_are_not_in_what_check_says(upstream, tmp_path, capsys):
    file = tmp_path / "proxy.yaml"
    file.write_text(configuration(upstream))
    assert main(["check", str(file)]) == 0
    assert "ann" in (shown := capsys.readouterr().out)
    # Each secret in a place where it is wrong, too.
    wrong = {
        "auth": {"tokens": [{"name": TOKEN, "token": [TOKEN]}, {"token": {}}]},
        "limits": {"bodyBytes": KEY},
        "redis": f"redis://:{REDIS_PASSWORD}@",
        "providers": {"acme": {"credentials": KEY}},
        "modelConfiguration": model_configuration(
            upstream.url,
            endpoints=[{"url": f"ftp://me:{PASSWORD}@x", "accessToken": [KEY]}],
        ),
    }
    file.write_text(yaml.safe_dump(wrong))
    assert main(["check", str(file)]) != 0
    said = "".join(capsys.readouterr())
    assert "modelConfiguration" in said
    assert not shown_in(shown + said)


def about(process: int, name: str) -> str:
    return Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace")


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_secrets_are_not_in_the_process_list(upstream, tmp_path, workers):
    """Of what is in a file. The environment is what its owner put there."""
    file = tmp_path / "proxy.yaml"
    file.write_text(configuration(upstream))
    upstream.script(json_reply(ANSWER))
    async with serve("--config", str(file), "--workers", workers) as running:
        given = {"Authorization": f"Bearer {TOKEN}"}
        for _ in range(8):
            raw = await request(running.url, path=CHAT, headers=given, body=ASK)
            assert raw.status == 200
        processes = [running.process.pid, *running.children]
        assert len(processes) >= int(workers)
        for each in processes:
            for name in ("cmdline", "environ", "comm"):
                assert not shown_in(about(each, name))
        _, log = await running.stop()
    assert not shown_in(log + running.said)


async def test_secrets_are_not_in_the_traceback_of_a_bug(
    start: Starter, upstream, monkeypatch, caplog
):
    """Not even if they are what it stumbled over."""
    upstream.script(json_reply(ANSWER))
    proxy = await start(secretive(upstream), auth=AUTH)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"a bug with {KEY} and {PASSWORD} and {QUERY_KEY}")

    monkeypatch.setattr(page, "forward", fail)
    monkeypatch.setattr(handling, "Relay", fail)
    given = {"Authorization": f"Bearer {TOKEN}"}
    for path in (CHAT, TOKENIZE):
        raw = await request(proxy.url, path=path, headers=given, body=ASK)
        assert raw.status == 500
        assert "a bug" not in raw.text
        assert proxy.outcomes[-1]["id"] in raw.text
    assert "RuntimeError: a bug with [redacted]" in caplog.text
    assert not shown_in(caplog.text + proxy.log)


# ----------------------------------------------------------------------------- SECURITY.md


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return file and name of each test that is named: a name is one of the file that
    was named last before it in the same row of a table, or paragraph.
    """
    found = []
    for part in re.split(r"\n(?=\|)|\n\n", text):
        file = ""
        for word in re.findall(r"`([^`]+)`", part):
            if re.fullmatch(r"tests/\w+\.py", word):
                file = word
            elif word.startswith("test_"):
                found.append((file, word))
    return found


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def test_tests_that_security_names_exist():
    named = named_tests((ROOT / "SECURITY.md").read_text())
    assert len(named) > 50
    wrong = [
        f"{file}: {name}"
        for file, name in named
        if not file or name not in names_in(ROOT / file)
    ]
    assert wrong == []


def test_tests_that_security_names_are_found():
    assert named_tests(
        "| a | `tests/test_a.py`: `test_b`, `test_c` |\n| `test_d` |"
    ) == [
        ("tests/test_a.py", "test_b"),
        ("tests/test_a.py", "test_c"),
        ("", "test_d"),
    ]


def test_tests_of_security_are_named():
    """Nothing here is held by a test that nobody can find."""
    named = {name for _, name in named_tests((ROOT / "SECURITY.md").read_text())}
    own = {name for name in names_in(Path(__file__)) if name.startswith("test_")}
    assert {name for name in own - named if "that_security_names" not in name} == {
        "test_tests_of_security_are_named"
    }
