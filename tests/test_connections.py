"""Clients' connections, over raw sockets: too many, too slow, too large, idle."""

import asyncio
import contextlib
import resource

import pytest

from proxy import connections
from tests.support.client import build_request, connect, request, stream
from tests.support.fixtures import QUESTION, Starter, model_configuration
from tests.support.metrics import scrape
from tests.support.upstream import Hang, chunk, openai_chunks, sse, sse_head

PATH = "/.api/completions/stream?api-version=2"
ANSWER = sse(*openai_chunks(["Hello"]))
HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


async def refused(url: str, reason: str) -> float:
    return (await scrape(url)).value("connections_refused_total", reason=reason)


# -------------------------------------------------------------------------- too many


async def test_one_connection_too_many(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), limits={"connections": 2})
    async with connect(proxy.url) as one, connect(proxy.url) as two:
        for connection in (one, two):
            await connection.send(HEAD + b"\r\n")
            assert (await connection.reply()).status == 200
        async with connect(proxy.url) as three:
            # It has a request on its way when it is refused.
            await three.send(
                build_request(proxy.url, "POST", PATH, {}, QUESTION, False)
            )
            raw = await three.reply()
            assert raw.status == 503
            assert raw.header("retry-after") == "5"
            assert raw.header("connection") == "close"
            assert raw.text == (
                "too many connections (limits.connections in the configuration)\n"
            )
            assert await three.at_end()
        await one.send(HEAD + b"\r\n")
        assert (await one.reply()).status == 200
    page = await scrape(proxy.url)  # there is room again
    assert page.value("connections_refused_total", reason="connections") == 1
    assert page.value("client_connections") == 1


async def test_many_connections_too_many_are_not_kept(
    start: Starter, upstream, monkeypatch
):
    monkeypatch.setattr(connections, "MOST_LINGERING", 3)
    proxy = await start(model_configuration(upstream.url), limits={"connections": 1})
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(connect(proxy.url))
        await first.send(HEAD + b"\r\n")
        assert (await first.reply()).status == 200
        told = 0
        for _ in range(6):
            other = await stack.enter_async_context(connect(proxy.url))
            with contextlib.suppress(AssertionError, ConnectionError):
                told += (await other.reply()).status == 503
        assert told == 3
        await asyncio.sleep(connections.LINGER_S + 0.1)
        again = await stack.enter_async_context(connect(proxy.url))
        assert (await again.reply()).status == 503
        await first.send(HEAD + b"\r\n")
        assert (await first.reply()).status == 200


@pytest.mark.parametrize(
    ("limits", "wanted", "given", "raised"),
    [
        ((1024, 4096), 100, 100, None),
        ((1024, 4096), 1000, 1000, 2064),
        ((1024, 4096), 8192, 2016, 4096),
        ((1024, resource.RLIM_INFINITY), 8192, 8192, 16448),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 8192, 8192, None),
    ],
)
def test_connections_that_open_files_allow(monkeypatch, limits, wanted, given, raised):
    seen = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: seen.append(new))
    assert connections.affordable(wanted) == given
    assert seen == ([(raised, limits[1])] if raised else [])


async def test_fewer_connections_than_wanted_are_announced(
    start: Starter, upstream, monkeypatch, caplog
):
    monkeypatch.setattr(connections, "affordable", lambda wanted: 7)
    await start(model_configuration(upstream.url))
    assert caplog.messages == [
        "limits.connections: 7 instead of 8192, so many open files are allowed"
    ]


# -------------------------------------------------------------------------- too slow


async def test_head_that_comes_slowly(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), timeouts={"header": 0.2})
    async with connect(proxy.url) as connection:
        started_s = asyncio.get_running_loop().time()
        with contextlib.suppress(ConnectionError):
            for byte in HEAD:  # never a pause, and no end in time
                await connection.send(bytes([byte]))
                await asyncio.sleep(0.02)
        raw = await connection.reply()
        assert raw.status == 408
        assert raw.text == "the head of the request did not come in time\n"
        assert await connection.at_end()
        assert asyncio.get_running_loop().time() - started_s < 1.5
    assert await refused(proxy.url, "header_timeout") == 1


async def test_second_head_that_comes_slowly(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), timeouts={"header": 0.1})
    async with connect(proxy.url) as connection:
        await connection.send(HEAD + b"\r\n")
        assert (await connection.reply()).status == 200
        await asyncio.sleep(0.2)  # no head is begun
        await connection.send(HEAD + b"\r\n")
        assert (await connection.reply()).status == 200
        await connection.send(HEAD)
        assert (await connection.reply()).status == 408


async def test_head_in_pieces_leaves_no_clock_behind(start: Starter, upstream):
    upstream.script([sse_head(), chunk(openai_chunks(["a"])[1]), Hang()])
    proxy = await start(model_configuration(upstream.url), timeouts={"header": 0.1})
    whole = build_request(proxy.url, "POST", PATH, {}, QUESTION, False)
    async with connect(proxy.url) as connection:
        await connection.send(whole[:20])
        await asyncio.sleep(0.02)
        await connection.send(whole[20:])
        reply = await connection.head()
        assert reply.status == 200
        await asyncio.sleep(0.2)
        await reply.read_until(b"a")
        assert not await connection.at_end(within_s=0.1)
    await upstream.closed()


async def test_next_request_that_comes_early_has_its_time(start: Starter, upstream):
    """A part of it arrives while the first one is being answered."""
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url), timeouts={"header": 0.3})
    whole = build_request(proxy.url, "POST", PATH, {}, QUESTION, False)
    async with connect(proxy.url) as connection:
        await connection.send(whole + HEAD)
        assert (await connection.reply()).status == 200
        await connection.send(b"\r\n")
        assert (await connection.reply()).status == 200


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (PATH, "the request's body did not come in time\n"),
        ("/v1/chat/completions", '"code":"request_timeout"'),
        ("/v1/messages", '"type":"timeout_error"'),
    ],
)
async def test_body_that_comes_slowly(start: Starter, upstream, path, text):
    proxy = await start(model_configuration(upstream.url), timeouts={"body": 0.2})
    async with connect(proxy.url) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        await connection.send(head.encode())
        for _ in range(15):
            await connection.send(b"{")
            await asyncio.sleep(0.02)
        raw = await connection.reply()
        assert raw.status == 408 and text in raw.text


async def test_connection_that_lies_idle(start: Starter, upstream):
    upstream.script([sse_head(), chunk(openai_chunks(["a"])[1]), Hang()])
    proxy = await start(model_configuration(upstream.url), timeouts={"idle": 0.2})
    async with (
        stream(proxy.url, path=PATH, body=QUESTION) as running,
        connect(proxy.url) as never_used,
        connect(proxy.url) as used,
    ):
        await used.send(HEAD + b"\r\n")
        assert (await used.reply()).status == 200
        assert not await used.at_end(within_s=0.05)
        assert await used.at_end(within_s=1)
        assert await never_used.at_end(within_s=1)
        await running.read_until(b"a")
        with pytest.raises(TimeoutError):
            await running.read(within_s=0.3)  # silent, but not idle
    await upstream.closed()


# -------------------------------------------------------------------------- too large


@pytest.mark.parametrize("size", [20_000, 2_000_000])
@pytest.mark.parametrize("place", ["header", "line"])
async def test_line_that_is_too_long(start: Starter, upstream, place, size, caplog):
    proxy = await start(model_configuration(upstream.url))
    long = b"s3cret" + b"x" * size
    async with connect(proxy.url) as connection:
        head = b"GET /" + long * (place == "line") + b" HTTP/1.1\r\nHost: x\r\n"
        with contextlib.suppress(ConnectionError):
            await connection.send(head + b"Cookie: " + long * (place == "header"))
            await connection.send(b"\r\n\r\n")
        raw = await connection.reply()
        assert raw.status == 431
        assert raw.header("content-type") == "text/plain; charset=utf-8"
        assert raw.text == (
            "the head of the request is too large: a line exceeds 16384 bytes"
            " (limits.headerBytes in the configuration)\n"
        )
        assert await connection.at_end(within_s=2)
    assert await refused(proxy.url, "header_size") == 1
    assert "s3cret" not in caplog.text and not caplog.records


async def test_head_that_is_too_long_in_all(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url), limits={"headerBytes": 1000})
    async with connect(proxy.url) as connection:
        await connection.send(HEAD)
        raw = None
        for number in range(10):
            await connection.send(b"X-%d: %s\r\n" % (number, b"x" * 800))
            await asyncio.sleep(0.01)
        raw = await connection.reply()
        assert raw.status == 431
        assert "too large: it exceeds 4000 bytes" in raw.text


async def test_too_many_headers(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    many = b"".join(b"X-%d: y\r\n" % number for number in range(200))
    async with connect(proxy.url) as connection:
        await connection.send(HEAD + many + b"\r\n")
        raw = await connection.reply()
        assert raw.status == 431 and "more than 128 headers" in raw.text
        assert await connection.at_end()


async def test_long_header_is_let_through_where_configured(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(
        model_configuration(upstream.url), limits={"headerBytes": 100_000}
    )
    headers = {"X-Long": "x" * 60_000}
    raw = await request(proxy.url, path=PATH, body=QUESTION, headers=headers)
    assert raw.status == 200


async def test_farewell_has_an_end(start: Starter, upstream, monkeypatch):
    """A client that neither reads nor closes is closed all the same."""
    monkeypatch.setattr(connections, "LINGER_S", 0.1)
    proxy = await start(model_configuration(upstream.url))
    async with connect(proxy.url) as connection:
        await connection.send(HEAD + b"Cookie: " + b"x" * 20_000 + b"\r\n\r\n")
        await asyncio.sleep(0.2)
        with pytest.raises(ConnectionError):
            for _ in range(10):
                await connection.send(b"x")
                await asyncio.sleep(0.01)


async def test_bad_request_names_no_software_but_ours(start: Starter, upstream):
    proxy = await start(model_configuration(upstream.url))
    async with connect(proxy.url) as connection:
        await connection.send(b"nonsense\r\n\r\n")
        raw = await connection.reply()
    assert raw.status == 400
    assert (raw.header("server") or "").startswith("completions-proxy/")
    assert "aiohttp" not in str(raw.headers) + raw.text
