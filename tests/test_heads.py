"""Heads told by their bytes: only what can be read in one way is told so."""

import asyncio
from typing import Any

import pytest
from aiohttp.http import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given, strategies as st

from proxy.heads import MOST_BYTES, Again, cut, is_repeatable, is_waiting

BEFORE = b"POST /v1/messages HTTP/1.1\r\nHost: a"
LENGTH = b"Content-Length: "
AFTER = b"Authorization: Bearer x"
HEAD = (BEFORE, AFTER)


def request(
    length: bytes, body: bytes = b"{}", before: bytes = BEFORE, name: bytes = LENGTH
) -> bytes:
    lines = (before, name + length, AFTER)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_two_requests_that_differ_in_their_length_have_one_head():
    first, second = request(b"2"), request(b"12", b"{}" * 6)
    assert cut(first) == (HEAD, b"{}", 2)
    assert cut(second) == (HEAD, b"{}" * 6, 12)


def test_the_length_may_stand_last():
    head = BEFORE + b"\r\n" + LENGTH + b"2\r\n\r\n"
    assert cut(head + b"{}") == ((BEFORE, b""), b"{}", 2)


def test_what_is_not_there_yet_or_too_much_shows_in_the_body():
    whole = request(b"2")
    assert cut(whole[:-1]) == (HEAD, b"{", 2)
    assert cut(whole + b"POST") == (HEAD, b"{}POST", 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST / HTTP/1.1\r\nHost: a\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        request(b"-2"),
        request(b"+2"),
        request(b"2 "),
        request(b" 2"),
        request(b"0x2"),
        request(b"2,2"),
        request(b"\xb2"),
        request(b""),
        request(b"1234567890"),
        request(b"2", before=BEFORE + b"\r\nX: " + b"a" * MOST_BYTES),
    ],
)
def test_other_heads_are_left_to_the_parser(data):
    assert cut(data) is None


@pytest.mark.parametrize("spelling", [b"Content-Length", b"content-length"])
def test_a_plain_head_is_repeatable(spelling):
    parts = cut(request(b"2", name=spelling + b": "))
    assert parts is not None
    found = [(b"Host", b"a"), (spelling, b"2"), (b"Authorization", b"Bearer x")]
    assert is_repeatable(parts[0], "/v1/messages", found)


@pytest.mark.parametrize(
    "line",
    [
        b"content-length: 5",
        b"X: Content-Length: 5",
        b"Transfer-Encoding: chunked",
        b"Connection: close",
        b"Connection: keep-alive, X",
        b"Expect: 100-continue",
        b"Upgrade: h2c",
        b"Content-Encoding: gzip",
        b"X : a",
        b"X:a",
        b"X:  a",
        b"X: a ",
        b"X: a\x00b",
        b"X: \xe4",
        b" folded: a",
        b"X\n: a",
        b": a",
        b"",
    ],
)
def test_an_unusual_line_makes_a_head_unrepeatable(line):
    name, _, value = line.partition(b":")
    found = [(b"Host", b"a"), (b"Content-Length", b"7"), (name, value.strip())]
    assert not is_repeatable((BEFORE, line), "/v1/messages", found)
    assert not is_repeatable((BEFORE + b"\r\n" + line, b""), "/v1/messages", found)


def test_a_head_is_repeatable_only_as_what_the_parser_found():
    found = [
        (b"Host", b"a"),
        (b"Content-Length", b"7"),
        (b"Authorization", b"Bearer x"),
    ]
    assert not is_repeatable(HEAD, "/v1/complete", found)
    assert not is_repeatable(HEAD, "/v1/messages", found[:2])
    assert not is_repeatable(HEAD, "/v1/messages", [*found, (b"X", b"a")])
    put = (BEFORE.replace(b"POST", b"PUT"), AFTER)
    assert not is_repeatable(put, "/v1/messages", found)


def cut_by(again: Again, data: bytes) -> bytes | None:
    """What ``Again.body_of`` should say, by what ``cut`` does."""
    parts, first = cut(data), cut(FIRST)
    assert first is not None
    if parts is None or parts[0] != first[0] or len(parts[1]) != parts[2]:
        return None
    return parts[1]


FIRST = request(b"2")
LAST = BEFORE + b"\r\n" + LENGTH + b"2\r\n\r\n{}"


def test_a_head_that_comes_again_needs_no_cutting():
    for first in (FIRST, LAST):
        parts = cut(first)
        assert parts is not None
        again = Again(first, parts[0], "known")
        assert again.known == "known"
        # The number of digits is guessed from the last one; a wrong guess costs nothing.
        for size in (2, 2, 12, 1234, 0, 5, 123456):
            body = b"x" * size
            same = first.replace(b": 2\r\n", b": %d\r\n" % size)[:-2] + body
            assert again.body_of(same) == body


@given(
    st.sampled_from([b"2", b"12", b"02", b"", b"2 ", b"-2", b"1234567890", b"\xb2"]),
    st.sampled_from([b"{}", b"{", b"{}POST", b"", b"{}" * 6, b"\r\n\r\n"]),
    st.integers(0, len(FIRST)),
    st.sampled_from([b"", b"\r", b"\n", b"\r\n\r\n", b"x", LENGTH]),
)
def test_whatever_comes_again_is_what_cutting_it_would_find(length, body, at, more):
    parts = cut(FIRST)
    assert parts is not None
    again = Again(FIRST, parts[0], None)
    for guessed in (FIRST, request(b"12", b"{}" * 6)):
        assert again.body_of(guessed) is not None
        whole = request(length, body)
        for data in (whole, whole[:at] + more + whole[at:], whole[:at], whole + more):
            assert again.body_of(data) == cut_by(again, data)


def test_a_client_that_waits_for_leave_is_known():
    assert is_waiting((BEFORE, b"Expect: 100-Continue"))
    assert is_waiting((BEFORE + b"\r\nExpect: 100-Continue", AFTER))
    assert not is_waiting(HEAD)


class _Transport(asyncio.Protocol):
    """What aiohttp's parser asks of its protocol."""

    def pause_reading(self) -> None: ...
    def resume_reading(self, resume_parser: bool = True) -> None: ...


def parsed(data: bytes) -> tuple[Any, ...] | None:
    """What aiohttp's parser finds in one request, without the length of its body."""
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(_Transport(), loop, 2**16)  # type: ignore[arg-type]
        try:
            messages, _, _ = parser.feed_data(data)
        except HttpProcessingError:
            return None
        ((message, _),) = messages
    finally:
        loop.close()
    pairs = [p for p in message.raw_headers if p[0].lower() != b"content-length"]
    told = (message.should_close, message.upgrade, message.chunked, message.compression)
    return (message.method, message.path, message.version, pairs, *told)


names = st.sampled_from(
    [b"X", b"Host", b"Content-Length", b"content-length", b"TE", b"Expect", b"Cookie"]
)
values = st.one_of(
    st.sampled_from([b"2", b"a", b"", b"chunked", b"100-continue", b"a  b", b" a"]),
    st.binary(max_size=5),
)
lines = st.lists(
    st.one_of(
        st.tuples(names, st.sampled_from([b": ", b":", b" : "]), values).map(b"".join),
        st.binary(max_size=8),
    ),
    max_size=4,
)


@given(
    lines,
    st.sampled_from([b"/", b"/a?b=c", b"//a", b"*", b"/\xc3\xa4", b"/ "]),
    st.integers(0, 4),
)
def test_what_is_repeatable_means_the_same_with_another_length(more, path, at):
    more.insert(min(at, len(more)), b"Content-Length: 2")
    head = b"POST %b HTTP/1.1\r\nHost: a\r\n%b" % (path, b"\r\n".join(more))
    data = head + b"\r\n\r\n{}"
    parts, found = cut(data), parsed(data)
    if parts is None or found is None:
        return
    pairs = [*found[3], (b"Content-Length", b"2")]
    if not is_repeatable(parts[0], found[1], pairs):
        return
    other = data[:-2].replace(b"Content-Length: 2", b"Content-Length: 12") + b"{}" * 6
    assert cut(other) is not None
    assert cut(other)[0] == parts[0]  # type: ignore[index]
    assert parsed(other) == found
