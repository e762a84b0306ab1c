"""Connections to upstreams, against a raw scripted server."""

import asyncio
import contextlib
import gzip
import itertools
import socket
import ssl
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from proxy.errors import (
    UpstreamFault,
    UpstreamGarbled,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.upstream import Upstream
from proxy.upstream.connection import HIGH_WATER_BYTES
from tests.support.upstream import (
    Close,
    Hang,
    Pause,
    Reset,
    ScriptedUpstream,
    Wait,
    chunk,
    json_reply,
    reply,
    sse,
    sse_head,
)


@contextlib.asynccontextmanager
async def serving(handler) -> AsyncIterator[str]:
    """Serve connections by ``handler(reader, writer)``; end them all at the end."""
    open_now: set[asyncio.Task[None]] = set()

    async def run(reader, writer) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.transport.abort()

    def accept(reader, writer) -> None:
        open_now.add(asyncio.get_running_loop().create_task(run(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=2**16)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for task in open_now:
        task.cancel()
    await asyncio.gather(*open_now, return_exceptions=True)
    await server.wait_closed()


@pytest.fixture
async def client() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    yield upstream
    await upstream.close()


async def fetch(client: Upstream, url: str, body=b"{}", **options) -> tuple[int, bytes]:
    out = b""
    async with client.open(url, {"X-Own": "1"}, body, "there", **options) as got:
        while data := await got.read():
            out += data
        return got.status, out


# -------------------------------------------------------------------------- requests


async def test_request_as_it_arrives(client, upstream):
    upstream.script(json_reply({}))
    await fetch(client, f"{upstream.url}/a/b?c=%2F&d")
    assert (upstream.last.method, upstream.last.path) == ("POST", "/a/b?c=%2F&d")
    assert upstream.last.headers == [
        ("Host", upstream.url.removeprefix("http://")),
        ("X-Own", "1"),
        ("Content-Length", "2"),
    ]
    assert upstream.last.body == b"{}"


async def test_password_in_a_url_is_a_header(client, upstream):
    upstream.script(json_reply({}))
    await fetch(client, upstream.url.replace("http://", "http://ann:p%20w@"))
    assert upstream.last.header("authorization") == "Basic YW5uOnAgdw=="


async def test_header_with_a_line_end_is_not_sent(client, upstream):
    with pytest.raises(UpstreamUnreachable) as caught:
        async with client.open(upstream.url, {"X": "a\r\nY: b"}, b"", "there"):
            pass
    assert caught.value.message == "a header for the upstream holds a line end"
    assert upstream.requests == []


async def pieces(*given: bytes | asyncio.Event) -> AsyncIterator[bytes]:
    for piece in given:
        if isinstance(piece, bytes):
            yield piece
        else:
            await piece.wait()


async def test_body_in_pieces_is_chunked(client, upstream):
    upstream.script(json_reply({}))
    await fetch(client, upstream.url, pieces(b"one", b"", b"two"))
    assert upstream.last.chunked and upstream.last.body == b"onetwo"


async def test_reply_may_come_before_the_body_has_ended(client):
    never = asyncio.Event()

    async def early(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await reader.read()

    async with serving(early) as there:
        body = pieces(b"x" * 1000, never)
        assert await fetch(client, f"http://{there}", body) == (413, b"no")


async def test_body_whose_source_fails_ends_the_request(client, upstream):
    async def broken() -> AsyncIterator[bytes]:
        yield b"one"
        raise OSError("gone")

    async with ScriptedUpstream() as other:
        with pytest.raises(UpstreamFault):
            await fetch(client, other.url, broken())
        other.malformed.clear()


# --------------------------------------------------------------------------- framings

FRAMED = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: 1\r\n\r\n",
    "after 1xx": b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "end of connection": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("name", FRAMED)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 120), max_size=4))
def test_any_framing_in_any_cut(name, cuts):
    async def check() -> None:
        edges = [0, *sorted({c for c in cuts if c < len(FRAMED[name])}), None]
        parts = [FRAMED[name][a:b] for a, b in itertools.pairwise(edges)]
        client = Upstream()
        async with ScriptedUpstream() as upstream:
            upstream.script([*parts, Close()])
            assert await fetch(client, upstream.url) == (200, b"hello")
            await client.close()

    asyncio.run(check())


@pytest.mark.parametrize("name", ["length", "chunks"])
async def test_reply_cut_at_every_byte_is_an_error(client, upstream, name):
    whole = FRAMED[name]
    for end in range(len(whole)):
        upstream.script([whole[:end], Close()])
    for end in range(len(whole)):
        with pytest.raises((UpstreamUnreachable, UpstreamTruncated)):
            await fetch(client, upstream.url)
        assert len(upstream.requests) == end + 1  # a fresh connection is not retried


@pytest.mark.parametrize("status", [204, 304])
async def test_replies_without_a_body(client, upstream, status):
    upstream.script(f"HTTP/1.1 {status} X\r\n\r\n".encode())
    for _ in range(2):
        assert await fetch(client, upstream.url) == (status, b"")
    assert upstream.opened == 1


async def test_reply_to_head_has_no_body(client, upstream):
    upstream.script(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    assert await fetch(client, upstream.url, None, method="HEAD") == (200, b"")


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
async def test_what_is_not_http(client, upstream, head):
    upstream.script([head, Hang()])
    with pytest.raises(UpstreamUnreachable) as caught:
        await fetch(client, upstream.url)
    assert caught.value.message == "upstream there: sent something that is not HTTP"


async def test_bad_chunk_in_mid_body(client, upstream):
    upstream.script([sse_head(), chunk(b"one"), Pause(0.02), b"zz\r\n", Hang()])
    with pytest.raises(UpstreamGarbled):
        await fetch(client, upstream.url)


# -------------------------------------------------------------------------- encodings

TEXT = b"hello " * 1000


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(TEXT)),
        ("x-gzip", gzip.compress(TEXT)),
        ("deflate", zlib.compress(TEXT)),
        ("identity", TEXT),
    ],
)
async def test_known_encodings_are_undone(client, upstream, encoding, body):
    upstream.script(reply(200, {"Content-Encoding": encoding}, body))
    assert await fetch(client, upstream.url) == (200, TEXT)
    assert await fetch(client, upstream.url, unpack=False) == (200, body)


async def test_unknown_encoding_is_named(client, upstream):
    upstream.script(reply(200, {"Content-Encoding": "br"}, b"x"))
    with pytest.raises(UpstreamGarbled) as caught:
        await fetch(client, upstream.url)
    assert caught.value.message == (
        'upstream sent content encoding "br", though none was asked for'
    )


async def test_broken_encoding(client, upstream):
    upstream.script(reply(200, {"Content-Encoding": "gzip"}, b"not gzip"))
    with pytest.raises(UpstreamGarbled):
        await fetch(client, upstream.url)


async def test_a_bomb_goes_off_in_small_pieces(client, upstream):
    bomb = gzip.compress(b"\0" * 50_000_000)
    upstream.script(reply(200, {"Content-Encoding": "gzip"}, bomb))
    async with client.open(upstream.url, {}, b"", "there") as got:
        assert len(await got.read()) <= 256 * 1024


# --------------------------------------------------------------------------- keep-alive


async def test_connection_is_used_again(client, upstream):
    upstream.script(json_reply({}))
    for _ in range(3):
        await fetch(client, upstream.url)
    assert upstream.opened == 1


async def test_connection_of_a_stream_that_was_left_at_its_last_word(client, upstream):
    upstream.script(sse(b"data: [DONE]\n\n"))
    for _ in range(3):
        async with client.open(upstream.url, {}, b"", "there") as got:
            await got.read()
        await asyncio.sleep(0.02)
    assert upstream.opened == 1


async def test_a_server_that_goes_on_is_hung_up_on(client, upstream):
    more = [step for _ in range(100) for step in (chunk(b"x" * 100), Pause(0.01))]
    upstream.script([sse_head(), chunk(b"last"), *more])
    async with client.open(upstream.url, {}, b"", "there") as got:
        await got.read()
    await upstream.closed(within_s=0.3)


async def test_an_error_hangs_up_at_once(client, upstream):
    upstream.script([sse_head(), chunk(b"one"), Hang()])
    with pytest.raises(ZeroDivisionError):
        async with client.open(upstream.url, {}, b"", "there") as got:
            await got.read()
            raise ZeroDivisionError
    await upstream.closed(within_s=0.05)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_connection_that_is_not_to_be_used_again(client, upstream, head):
    upstream.script([head])
    for _ in range(2):
        assert await fetch(client, upstream.url) == (200, b"ok")
    assert upstream.opened == 2


async def test_bytes_after_a_reply_answer_no_other_request(client, upstream):
    first = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\none"
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"
    for script in ([first + stray], [first, Pause(0.02), stray]):
        upstream.script(script)
    upstream.script([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntwo"])
    assert await fetch(client, upstream.url) == (200, b"one")
    assert await fetch(client, upstream.url) == (200, b"one")
    await asyncio.sleep(0.05)
    assert await fetch(client, upstream.url) == (200, b"two")


async def test_closed_idle_connection_is_not_noticed(client, upstream):
    upstream.script([json_reply({}), Close()])
    for _ in range(3):
        assert (await fetch(client, upstream.url))[0] == 200
        await asyncio.sleep(0.01)


async def test_connection_closing_under_a_request_is_tried_once_more(client, upstream):
    upstream.script(json_reply({}))
    upstream.script([Reset()])  # instead of a reply, on the kept connection
    upstream.script(json_reply({"again": 1}))
    await fetch(client, upstream.url)
    assert await fetch(client, upstream.url) == (200, b'{"again":1}')
    assert (upstream.opened, len(upstream.requests)) == (2, 3)


async def test_reply_that_has_begun_is_not_asked_for_again(client, upstream):
    upstream.script(json_reply({}))
    upstream.script([b"HTTP/1.1 2", Pause(0.02), Reset()])
    await fetch(client, upstream.url)
    with pytest.raises(UpstreamUnreachable):
        await fetch(client, upstream.url)
    assert len(upstream.requests) == 2


async def test_body_in_pieces_is_not_sent_twice(client, upstream):
    upstream.script(json_reply({}))
    upstream.script([Reset()])
    await fetch(client, upstream.url)
    with pytest.raises(UpstreamUnreachable):
        await fetch(client, upstream.url, pieces(b"x"))
    assert len(upstream.requests) == 2


# -------------------------------------------------------------------------- the way there


async def test_refused(client):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UpstreamUnreachable) as caught:
        await fetch(client, f"http://127.0.0.1:{port}")
    assert caught.value.message == "upstream there: connection refused"


async def test_name_that_is_none(client):
    with pytest.raises(UpstreamUnreachable) as caught:
        await fetch(client, "http://no-such-host.invalid")
    assert caught.value.message == "upstream there: host name cannot be resolved"


async def test_connect_timeout(upstream):
    client = Upstream()
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        with pytest.raises(UpstreamUnreachable) as caught:
            await fetch(client, f"http://127.0.0.1:{port}")
        for filler in fillers:
            filler.close()
    assert caught.value.message == "upstream there: connect timed out"


async def test_a_name_with_several_addresses(client, upstream):
    """``localhost`` may mean ::1 first, where nobody listens."""
    upstream.script(json_reply({}))
    status, _ = await fetch(client, f"http://localhost:{upstream.port}")
    assert status == 200
    assert upstream.last.header("host") == f"localhost:{upstream.port}"


async def test_tls_that_is_not_tls(client):
    async def plain(reader, writer):
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()

    async with serving(plain) as there:
        with pytest.raises(UpstreamUnreachable) as caught:
            await fetch(client, f"https://{there}")
    assert caught.value.message == "upstream there: TLS handshake failed"


async def test_tls_verifies_certificates(client, monkeypatch):
    seen: list = []

    async def note(*arguments, ssl=None, server_hostname=None, **options):
        seen.append((ssl, server_hostname))
        raise OSError

    async with ScriptedUpstream() as upstream:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "create_connection", note)
        with pytest.raises(UpstreamUnreachable):
            await fetch(client, f"https://127.0.0.1:{upstream.port}")
    ((context, name),) = seen
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    assert name == "127.0.0.1"


# ------------------------------------------------------------------------ back-pressure


async def test_a_reader_that_does_not_come_stops_the_server(client, upstream):
    block = chunk(b"x" * 65_536)
    upstream.script([sse_head(), *[block] * 400, b"0\r\n\r\n"])
    async with client.open(upstream.url, {}, b"", "there") as got:
        await asyncio.sleep(0.2)
        assert upstream.sent_bytes < 15_000_000  # of 26: the kernel's buffers
        size = 0
        while data := await got.read():
            assert len(data) <= HIGH_WATER_BYTES + 2**18
            size += len(data)
    assert size == 400 * 65_536


async def test_a_server_that_does_not_read_stops_the_body(client):
    go = asyncio.Event()
    taken = 0

    async def lazy(reader, writer):
        nonlocal taken
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        while taken < 20_000_000:
            taken += len(await reader.read(2**16))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()

    given = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(320):
            given += 65_536
            yield b"x" * 65_536

    async with serving(lazy) as there:
        asking = asyncio.create_task(fetch(client, f"http://{there}", source()))
        await asyncio.sleep(0.2)
        assert given < 12_000_000
        go.set()
        assert await asyncio.wait_for(asking, 10) == (200, b"")


async def test_cancelled_while_waiting_for_the_head(client, upstream):
    waiting = asyncio.Event()
    upstream.script([Wait(waiting), Hang()])
    asking = asyncio.create_task(fetch(client, upstream.url))
    await upstream.received()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await upstream.closed(within_s=0.1)


# -------------------------------------------------------- what once went wrong: kept out


async def test_reply_left_while_it_was_held_back_is_not_kept(client, upstream):
    upstream.script(reply(404, {}, b"x" * 120_000))
    async with client.open(upstream.url, {}, b"", "there") as got:
        assert got.status == 404
    upstream.script(json_reply({}))
    status, _ = await asyncio.wait_for(fetch(client, upstream.url), 2)
    assert status in (200, 404)


async def test_connection_with_an_unsent_request_is_not_kept(client):
    async def early(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await asyncio.Event().wait()

    async with serving(early) as there:
        body = b"x" * 20_000_000
        assert await fetch(client, f"http://{there}", body) == (413, b"no")
        answer = await asyncio.wait_for(fetch(client, f"http://{there}"), 2)
        assert answer == (413, b"no")


@pytest.mark.parametrize("given", [b"longer than it says", b"x"])
async def test_body_that_is_not_as_long_as_its_head_says(client, given):
    received = b""

    async def note(reader, writer):
        nonlocal received
        while data := await reader.read(1000):
            received += data

    async with serving(note) as there:
        with pytest.raises(UpstreamFault):
            async with client.open(
                f"http://{there}", {"Content-Length": "5"}, pieces(given), "there"
            ):
                pass
        await asyncio.sleep(0.02)
    assert b"longer" not in received


async def test_idle_connections_are_closed_in_time(upstream, monkeypatch):
    monkeypatch.setattr("proxy.upstream.client.IDLE_S", 0.05)
    client = Upstream()
    upstream.script([Pause(0.02), json_reply({})])
    await asyncio.gather(*(fetch(client, upstream.url) for _ in range(10)))
    assert upstream.open == 10
    await upstream.idle(within_s=0.5)
    await client.close()


async def test_head_without_an_end(client):
    async def endless(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not writer.is_closing():
            writer.write(b"y" * 10_000)
            await asyncio.sleep(0)

    async with serving(endless) as there:
        with pytest.raises(UpstreamUnreachable):
            await asyncio.wait_for(fetch(client, f"http://{there}"), 2)


async def test_trailers_are_no_headers(client, upstream):
    upstream.script(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\nContent-Encoding: gzip\r\nX-Evil: 1\r\n\r\n"
    )
    async with client.open(upstream.url, {}, b"", "there") as got:
        assert got.pairs == [("Transfer-Encoding", "chunked")]
        assert await got.read() == b"ok"


@pytest.mark.parametrize("cut", [1, 12, 30])
async def test_compressed_reply_that_is_cut(client, upstream, cut):
    packed = gzip.compress(TEXT)[:-cut]
    upstream.script(reply(200, {"Content-Encoding": "gzip"}, packed))
    with pytest.raises(UpstreamTruncated):
        await fetch(client, upstream.url)


async def test_compressed_in_other_ways(client, upstream):
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    for encoding, body in (
        ("deflate", raw.compress(TEXT) + raw.flush()),
        ("gzip", gzip.compress(TEXT[:100]) + gzip.compress(TEXT[100:])),
        ("gzip", b""),
    ):
        upstream.script(reply(200, {"Content-Encoding": encoding}, body))
        upstream.script(json_reply({}))
        expected = TEXT if body else b""
        assert await fetch(client, upstream.url) == (200, expected)
        await fetch(client, upstream.url)
        upstream._scripts.clear()


async def test_reply_that_ends_with_the_connection_while_we_still_send(client):
    async def rude(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        writer.write_eof()
        await asyncio.Event().wait()

    async with serving(rude) as there:
        asking = fetch(client, f"http://{there}", b"x" * 20_000_000)
        assert await asyncio.wait_for(asking, 2) == (200, b"hello")


@pytest.mark.parametrize("path", ["/a b", "/a\x7fb"])
async def test_url_with_blanks_is_not_sent(client, upstream, path):
    upstream.script(json_reply({}))
    with pytest.raises(UpstreamUnreachable):
        await fetch(client, upstream.url + path)
    assert upstream.requests == []


@pytest.mark.parametrize("before", [b"5;", b"5\r\nhello\r\n0\r\nX: "])
async def test_what_is_no_body_has_an_end_too(client, before):
    """A chunk's extension, a trailer: the parser keeps what nobody wants."""

    async def endless(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + before)
        while not writer.is_closing():
            writer.write(b"y" * 10_000)
            await asyncio.sleep(0)

    async with serving(endless) as there:
        with pytest.raises(UpstreamGarbled, match="broken"):
            await asyncio.wait_for(fetch(client, f"http://{there}"), 2)


async def test_large_reads_are_no_long_head(client, upstream):
    body = bytes(3_000_000)
    upstream.script(reply(200, {}, body))
    assert await fetch(client, upstream.url) == (200, body)
