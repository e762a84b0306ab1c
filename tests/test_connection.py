"""One connection to an upstream, fed with bytes: any reply, cut anywhere."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, strategies as st

from proxy.outbox import Outbox, Transport
from proxy.upstream.connection import (
    HIGH_WATER_BYTES,
    LINGER_BYTES,
    MAX_HEAD_BYTES,
    BadReply,
    Connection,
    ConnectionFailed,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Wire(asyncio.Transport):
    """Where a socket would be: notes what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self._is_aborted = self._is_paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._is_aborted

    def is_reading(self) -> bool:
        return not self._is_paused

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False

    def abort(self) -> None:
        self._is_aborted = True


class AtOnce(Outbox):
    """Keeps nothing, so that a reply may follow in the same turn."""

    def write(self, transport: Transport, data: bytes) -> bool:
        transport.write(data)
        return True


async def on_connection(use: Callable[[Connection, Wire], None]) -> None:
    wire = Wire()
    connection = Connection(AtOnce(asyncio.get_running_loop()))
    connection.connection_made(wire)
    use(connection, wire)


def state(connection: Connection) -> str:
    """What a caller sees of where a reply is; never two things at once."""
    seen = {
        "ending": connection.is_ending,
        "complete": connection.is_complete(),
        "broken": connection.error is not None,
    }
    assert not connection.is_reusable() or seen["complete"]
    return " ".join(word for word, is_so in seen.items() if is_so)


class Reply(NamedTuple):
    raw: bytes
    status: int
    pairs: list[tuple[bytes, bytes]]
    body: bytes
    has_end: bool = True  # of its own, without the connection's
    is_last: bool = False  # it says so, or is the last for having no end


def in_chunks(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def lines(pairs: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % pair for pair in pairs)


OTHERS = st.lists(
    st.sampled_from(
        [
            (b"Server", b"sim"),
            (b"Set-Cookie", b"a=1"),
            (b"set-cookie", b"b=2"),
            (b"Content-Type", b"text/event-stream"),
            (b"X-Empty", b""),
            (b"X-Odd", b"\xe9: chunked"),
            (b"Keep-Alive", b"timeout=7, max=3"),
        ]
    ),
    max_size=5,
)
BEFORE = st.lists(
    st.sampled_from(
        [
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Type: no\r\n\r\n",
        ]
    ),
    max_size=2,
)


@st.composite
def replies(draw: st.DrawFn, framings: str = "length chunks close none") -> Reply:
    framing = draw(st.sampled_from(framings.split()))
    status = draw(st.sampled_from([204, 304] if framing == "none" else [200, 404, 503]))
    # Such as looks like frames and heads itself.
    piece = st.sampled_from([b"data: x\n\n", b"\r\n", b"0\r\n\r\n", b"HTTP/1.1 200 OK"])
    body = b"" if framing == "none" else b"".join(draw(st.lists(piece, max_size=8)))
    pairs = draw(OTHERS)
    after, is_last = body, framing == "close"
    if framing == "length":
        pairs = [*pairs, (b"Content-Length", b"%d" % len(body))]
    elif framing == "chunks":
        pairs = [*pairs, (b"Transfer-Encoding", b"chunked")]
        trailers = lines(draw(OTHERS))
        after = in_chunks(body, draw(st.integers(1, 20))) + b"0\r\n%b\r\n" % trailers
    if framing != "close" and draw(st.booleans()):
        pairs, is_last = [*pairs, (b"Connection", b"close")], True
    head = b"HTTP/1.1 %d Any\r\n%b\r\n" % (status, lines(pairs))
    raw = b"".join(draw(BEFORE)) + head + after
    return Reply(raw, status, pairs, body, framing != "close", is_last)


CUTS = st.lists(st.floats(0, 1), max_size=12) | st.just([i / 400 for i in range(400)])


def cut(raw: bytes, places: list[float]) -> list[bytes]:
    at = sorted({0, len(raw), *(int(place * len(raw)) for place in places)})
    return [raw[start:end] for start, end in pairwise(at)]


def check(connection: Connection, reply: Reply, body: bytes) -> None:
    headers: dict[str, bytes] = {}
    for name, value in reply.pairs:
        headers.setdefault(name.decode("latin-1").lower(), value)
    assert connection.status == reply.status
    assert connection.pairs == reply.pairs
    assert list(connection.headers.items()) == list(headers.items())
    assert connection.keep_alive_s == (7 if "keep-alive" in headers else None)
    assert body == reply.body


@given(st.lists(replies(), min_size=1, max_size=3), CUTS, st.booleans(), st.booleans())
def test_any_reply_in_any_cut(given, places, is_listening, is_taken_late):
    """One after the other, until one of them is the last."""

    def use(connection: Connection, wire: Wire) -> None:
        for reply in given:
            connection.send(b"request")
            assert state(connection) == "ending"
            body = b""

            def take() -> None:
                nonlocal body
                if connection.is_head_in:
                    body += connection.take()

            connection.listener = take if is_listening and not is_taken_late else None
            for data in cut(reply.raw, places):
                assert state(connection) == "ending"
                connection.data_received(data)
                assert connection.has_received
                if not (is_listening or is_taken_late):
                    take()
            if not reply.has_end:
                assert state(connection) == "ending"
                connection.connection_lost(None)
            take()
            check(connection, reply, body)
            assert state(connection) == "complete"
            assert connection.is_reusable() is not reply.is_last
            if reply.is_last:
                return
            connection.release()

    asyncio.run(on_connection(use))


@given(replies("length chunks none"), st.integers(1, 10_000), CUTS)
def test_any_reply_that_breaks_off(reply, missing, places):
    """Whatever came of its body can be taken, and it is not complete."""
    raw = reply.raw[: -min(missing, len(reply.raw))]

    def use(connection: Connection, wire: Wire) -> None:
        connection.send(b"request")
        body = b""
        for data in cut(raw, places):
            connection.data_received(data)
            if connection.is_head_in:
                body += connection.take()
        assert state(connection) == "ending"
        connection.connection_lost(None)
        assert reply.body.startswith(body)
        assert state(connection) == "broken"
        assert str(connection.error) == "closed"

    asyncio.run(on_connection(use))


async def test_bad_chunk_after_good_ones():
    def use(connection: Connection, wire: Wire) -> None:
        connection.send(b"request")
        taken: list[bytes] = []
        connection.listener = lambda: taken.append(connection.take())
        connection.data_received(CHUNKED + in_chunks(b"abc", 1) + b"no chunk")
        assert b"".join(taken) == b"abc"
        assert state(connection) == "broken" and wire.is_closing()
        assert isinstance(connection.error, BadReply)

    await on_connection(use)


SURPLUS = st.sampled_from(
    [b"H", b"x", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nbody"]
)


@given(replies("length chunks none"), SURPLUS | replies().map(lambda r: r.raw), CUTS)
def test_what_follows_a_reply_is_not_of_it(reply, surplus, places):
    def use(connection: Connection, wire: Wire) -> None:
        connection.send(b"request")
        body = b""
        for data in cut(reply.raw + surplus, places):
            connection.data_received(data)
            body += connection.take() if connection.is_head_in else b""
        check(connection, reply, body)
        assert state(connection) == "complete" and not connection.is_reusable()

    asyncio.run(on_connection(use))


@given(replies("length chunks"), CUTS)
def test_a_reply_to_head_has_no_body_even_if_one_comes(reply, places):
    def use(connection: Connection, wire: Wire) -> None:
        connection.send(b"request", bodiless=True)
        for data in cut(reply.raw, places):
            connection.data_received(data)
            assert connection.take() == b""
        check(connection, reply, reply.body)
        assert state(connection) == "complete" and not connection.is_reusable()

    asyncio.run(on_connection(use))


@pytest.mark.parametrize("size", [1000, 300_000])
@pytest.mark.parametrize("excess", [-1, 1])
async def test_a_head_may_be_so_long(size, excess):
    """Its own length counts, not that of the reads it comes in."""
    value = b"v" * (MAX_HEAD_BYTES - len("AContent-Length5") - 8 + excess)
    raw = b"HTTP/1.1 200 OK\r\nA: %b\r\nContent-Length: 5\r\n\r\nhello" % value

    def use(connection: Connection, wire: Wire) -> None:
        connection.send(b"request")
        for start in range(0, len(raw), size):
            if not wire.is_closing():
                connection.data_received(raw[start : start + size])
        assert connection.is_head_in is (excess < 0)
        if excess < 0:
            assert connection.take() == b"hello" and connection.is_reusable()
        else:
            assert isinstance(connection.error, BadReply) and wire.is_closing()
            assert str(connection.error) == "its head is too long"

    await on_connection(use)


async def test_what_nobody_takes_is_counted_without_its_frames():
    chunk = in_chunks(b"x", 1)

    def use(connection: Connection, wire: Wire) -> None:
        connection.send(b"request")
        connection.data_received(CHUNKED)
        for _ in range(HIGH_WATER_BYTES // 1024):
            assert wire.is_reading()
            connection.data_received(chunk * 1024)
        assert wire.is_reading()
        connection.data_received(chunk)
        assert not wire.is_reading()
        assert connection.take() == b"x" * (HIGH_WATER_BYTES + 1)
        assert wire.is_reading()

    await on_connection(use)


async def test_what_is_taken_at_once_holds_nothing_back(monkeypatch):
    def use(connection: Connection, wire: Wire) -> None:
        paused: list[bool] = []
        monkeypatch.setattr(wire, "pause_reading", lambda: paused.append(True))
        connection.send(b"request")
        taken: list[bytes] = []
        connection.listener = lambda: taken.append(connection.take())
        connection.data_received(CHUNKED + in_chunks(b"x" * 200_000, 50_000))
        connection.data_received(in_chunks(b"y" * 200_000, 200_000) + b"0\r\n\r\n")
        assert b"".join(taken) == b"x" * 200_000 + b"y" * 200_000
        assert not paused and connection.is_reusable()

    await on_connection(use)


LONG = in_chunks(b"x" * (LINGER_BYTES + 1), 9)
LASTS = {
    "its end": (b"0\r\n\r\n", True),
    "too much, but its end": (LONG + b"0\r\n\r\n", True),
    "too much": (LONG, False),
    "no chunk": (b"no chunk", False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize("name", LASTS)
async def test_lingering_ends_once(name):
    last, is_reusable = LASTS[name]

    def use(connection: Connection, wire: Wire) -> None:
        ends: list[bool] = []
        connection.send(b"request")
        connection.data_received(CHUNKED + in_chunks(b"x" * 5000, 500))
        connection.linger(lambda: ends.append(connection.is_reusable()))
        connection.data_received(in_chunks(b"x" * 9, 3))
        assert ends == []
        if last:
            connection.data_received(last)
        connection.connection_lost(None)
        assert ends == [is_reusable]

    await on_connection(use)


async def test_a_reply_before_its_request_went_out_answers_nothing():
    """Though it comes in the same turn: the request may be sent to another server."""
    wire = Wire()
    connection = Connection(Outbox(asyncio.get_running_loop()))
    connection.connection_made(wire)
    connection.send(b"POST / HTTP/1.1\r\n\r\n")
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert isinstance(connection.error, ConnectionFailed)
    assert not (connection.is_head_in or connection.has_received)
    assert not connection.is_reusable() and wire.is_closing()
