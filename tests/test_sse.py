"""The event stream parser and writer against the WHATWG text and the traps around it."""

import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import example, given, strategies as st

from proxy.errors import EventTooLarge
from proxy.sse import Event, Parser, frame

BOM = b"\xef\xbb\xbf"


# --- The reference: the standard line by line, for a complete input. ---


class Reading(NamedTuple):
    """What an EventSource would hold once it has read a stream."""

    events: list[Event]
    last_event_id: str
    retry_ms: int | None
    ignored: str | None


def lines_of(text: str) -> Iterator[str]:
    """Yield the lines that have ended: by CR LF, by LF or by CR."""
    line = ""
    i = 0
    while i < len(text):
        if text[i] == "\r":
            yield line
            line = ""
            if text[i + 1 : i + 2] == "\n":
                i += 1
        elif text[i] == "\n":
            yield line
            line = ""
        else:
            line += text[i]
        i += 1


def reference(stream: bytes) -> Reading:
    text = stream.decode("utf-8", "replace")
    if text[:1] == "\ufeff":
        text = text[1:]

    events = []
    data = event_type = event_id = last_event_id = ""
    retry_ms = ignored = None
    for line in lines_of(text):
        if line == "":
            last_event_id = event_id
            if data == "":
                event_type = ""
                continue
            if data[-1] == "\n":
                data = data[:-1]
            type = "message" if event_type == "" else event_type
            events.append(Event(type, data, last_event_id))
            data = event_type = ""
            continue
        if line[0] == ":":
            continue
        if ":" in line:
            field, value = line.split(":", 1)
            if value[:1] == " ":
                value = value[1:]
        else:
            field, value = line, ""
        if field == "event":
            event_type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id":
            if "\0" not in value:
                event_id = value
        elif field == "retry":
            if value and all(c in "0123456789" for c in value):
                retry_ms = int(value)
        else:
            ignored = line[:1024]
    return Reading(events, last_event_id, retry_ms, ignored)


def exceeds(stream: bytes, limit: int) -> bool:
    """Say whether some event of ``stream`` is longer than ``limit``, ends counted 1."""
    size = 0
    *lines, unfinished = (
        stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    )
    if lines[:1] == [BOM]:
        lines[0] = b""
    for line in lines:
        size = size + len(line) + 1 if line else 0
        if size > limit:
            return True
    return size + len(unfinished) > limit


# --- Feeding a parser. ---


def reading(parser: Parser, events: list[Event]) -> Reading:
    return Reading(events, parser.last_event_id, parser.retry_ms, parser.ignored)


def parse(*reads: bytes) -> Reading:
    parser = Parser()
    events = [event for data in reads for event in parser.feed(data)]
    events += parser.end()
    return reading(parser, events)


def every_cut(stream: bytes) -> Iterator[Sequence[bytes]]:
    yield [stream]
    yield [stream[i : i + 1] for i in range(len(stream))]
    yield [stream[i : i + 3] for i in range(0, len(stream), 3)]
    for i in range(len(stream) + 1):
        yield stream[:i], stream[i:]
        yield stream[:i], b"", stream[i:]


# --- The tables. ---

# name: (stream, [(type, data, id) or just data of a message without an id])
EVENTS: dict[str, tuple[bytes, list[tuple[str, str, str] | str]]] = {
    # Lines and events.
    "empty stream": (b"", []),
    "only blank lines": (b"\n\r\n\r\r\n\n", []),
    "one event": (b"data: a\n\n", ["a"]),
    "two events": (b"data: a\n\ndata: b\n\n", ["a", "b"]),
    "typed event": (b"event: x\ndata: a\n\n", [("x", "a", "")]),
    "typed events": (
        b"event: x\ndata: a\n\nevent: y\ndata: b\n\ndata: c\n\n",
        [("x", "a", ""), ("y", "b", ""), "c"],
    ),
    "typed events without spaces": (
        b"event:x\ndata:a\n\nevent:yy\ndata: b\n\n",
        [("x", "a", ""), ("yy", "b", "")],
    ),
    "type behind the data": (b"data: a\nevent: x\n\n", [("x", "a", "")]),
    "last type counts": (b"event: x\nevent: y\ndata: a\n\n", [("y", "a", "")]),
    "empty type is message": (
        b"event: x\nevent\ndata: a\n\nevent: \ndata: b\n\n",
        ["a", "b"],
    ),
    "type without its data": (b"event: x\n\ndata: a\n\n", ["a"]),
    "done is data": (b"data: a\n\ndata: [DONE]\n\n", ["a", "[DONE]"]),
    "extra blank lines": (b"\n\ndata: a\n\n\n\n\ndata: b\n\n\n", ["a", "b"]),
    # Line ends.
    "CR": (b"data: a\r\rdata: b\rdata: c\r\r", ["a", "b\nc"]),
    "CR LF": (b"data: a\r\n\r\ndata: b\r\ndata: c\r\n\r\n", ["a", "b\nc"]),
    "LF then CR LF": (b"data: a\n\r\ndata: b\n\r\n", ["a", "b"]),
    "CR LF then LF": (b"data: a\r\n\ndata: b\r\n\n", ["a", "b"]),
    "CR LF then CR": (b"data: a\r\n\rdata: b\r\n\r", ["a", "b"]),
    "LF then CR": (b"data: a\n\rdata: b\n\r", ["a", "b"]),
    "CR then CR LF": (b"data: a\r\r\ndata: b\r\r\n", ["a", "b"]),
    "LF CR LF CR": (b"data: a\n\r\n\rdata: b\n\r\n\r", ["a", "b"]),
    "CR CR at the end": (b"data: a\r\r", ["a"]),
    "CR inside an event line": (b"event: x\rdata: a\n\n", [("x", "a", "")]),
    "CR inside a typed event": (
        b"\nevent: x\ndata: a\rdata: b\n\n",
        [("x", "a\nb", "")],
    ),
    "CR LF is one end": (b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
    "no other line ends": (
        "data: a\u2028b\u2029c\u0085d\v\f\x1c\x1d\x1ee\n\n".encode(),
        ["a\u2028b\u2029c\u0085d\v\f\x1c\x1d\x1ee"],
    ),
    # Fields and values.
    "no space": (b"data:a\n\n", ["a"]),
    "one space goes": (b"data:  a \n\ndata:   b\n\n", [" a ", "  b"]),
    "a tab stays": (b"data:\ta\n\n", ["\ta"]),
    "colons in the value": (b"data: a: b\n\ndata:: c\n\n", ["a: b", ": c"]),
    "data line before others": (b"data: a\nid: 1\n", []),
    "several data lines": (b"data: a\ndata:b\ndata:  c\n\n", ["a\nb\n c"]),
    "data line between others": (
        b"data: a\nid: 1\nother\ndata: b\n\n",
        [("message", "a\nb", "1")],
    ),
    "empty data": (b"data:\n\ndata: \n\ndata\n\n", ["", "", ""]),
    "data of line ends": (b"data\ndata\n\ndata:a\ndata:\ndata: \n\n", ["\n", "a\n\n"]),
    "typed event, empty data": (
        b"event: x\ndata: \n\nevent: y\ndata\n\n",
        [("x", "", ""), ("y", "", "")],
    ),
    "names are exact": (b"Data: a\n data: b\ndata : c\ndat: d\ndatas: e\n\n", []),
    "comments": (b":\n: a\n:data: b\n::\ndata: c\n: d\n\n:\n\n", ["c"]),
    "keep-alive between": (b"data: a\n\n: ping\n\ndata: b\n\n", ["a", "b"]),
    "keep-alive without blank line": (b": ping\ndata: a\n\n: ping\n", ["a"]),
    "unknown field": (b"data: a\nfoo: b\nbar\n\n", ["a"]),
    "event text inside data": (b"\ndata: a\ndata: data: b\n\n", ["a\ndata: b"]),
    # Blocks without data are not events.
    "only an id": (b"id: 1\n\ndata: a\n\n", [("message", "a", "1")]),
    "only a type": (b"event: x\n\nevent: y\n\ndata: a\n\n", ["a"]),
    "only retry": (b"retry: 3000\n\ndata: a\n\n", ["a"]),
    "keep-alive after an id": (
        b"id: 1\ndata: a\n\n: ping\n\n\n: ping\n\n",
        [("message", "a", "1")],
    ),
    # Ids.
    "id stays": (
        b"data: a\n\nid: 1\ndata: b\n\ndata: c\n\ndata: d\n\nid: 2\ndata: e\n\n",
        [
            "a",
            ("message", "b", "1"),
            ("message", "c", "1"),
            ("message", "d", "1"),
            ("message", "e", "2"),
        ],
    ),
    "id stays for types": (b"id: 1\n\nevent: x\ndata: a\n\n", [("x", "a", "1")]),
    "id is emptied": (
        b"id: 1\ndata: a\n\nid\ndata: b\n\n",
        [("message", "a", "1"), "b"],
    ),
    "id with NUL": (
        b"id: 1\nid: 2\0\ndata: a\n\nid: \0\ndata: b\n\n",
        [("message", "a", "1"), ("message", "b", "1")],
    ),
    "id keeps spaces": (b"id:  1 \ndata: a\n\n", [("message", "a", " 1 ")]),
    # The end of the stream.
    "unfinished line": (b"data: a\n\ndata: b", ["a"]),
    "unfinished event": (b"data: a\n\nevent: x\nid: 2\ndata: b\n", ["a"]),
    "blank line cut off": (b"data: a\n\ndata: b\r\n", ["a"]),
    # Text.
    "BOM": (BOM + b"data: a\n\n", ["a"]),
    "BOM before a type": (BOM + b"event: x\ndata: a\n\n", [("x", "a", "")]),
    "only one BOM": (BOM + BOM + b"data: a\n\ndata: b\n\n", ["b"]),
    "BOM, then a blank line": (BOM + b"\ndata: a\n\n", ["a"]),
    "BOM later is text": (
        b"data: a\n\n" + BOM + b"data: b\n\ndata: " + BOM + b"\n\n",
        ["a", "\ufeff"],
    ),
    "half a BOM": (b"\xef\xbbdata: a\n\ndata: b\n\n", ["b"]),
    "only a BOM": (BOM, []),
    "characters of all lengths": ("data: aé世😀\n\n".encode(), ["aé世😀"]),
    "characters everywhere": (
        "event: é\nid: 世\ndata: 😀\n\n".encode(),
        [("é", "😀", "世")],
    ),
    "bad byte in data": (b"data: a\xffb\n\ndata: c\n\n", ["a\ufffdb", "c"]),
    "bad byte in a comment": (b": \xff\ndata: a\n\n", ["a"]),
    "bad byte in a name": (b"data\xff: a\ndata: b\n\n", ["b"]),
    "bad byte in type and id": (
        b"event: \xff\nid: \xfe\ndata: a\n\n",
        [("\ufffd", "a", "\ufffd")],
    ),
    "cut character": (
        b"data: \xe4\xb8\n\ndata: \xf0\x9f\x98\r\r",
        ["\ufffd", "\ufffd"],
    ),
    "surrogate, overlong, too high": (
        b"data: \xed\xa0\x80|\xc0\xaf|\xf5\x80|\xf4\x90\x80\x80\n\n",
        ["\ufffd\ufffd\ufffd|\ufffd\ufffd|\ufffd\ufffd|\ufffd\ufffd\ufffd\ufffd"],
    ),
    "NUL in data": (b"data: a\0b\n\n", ["a\0b"]),
}

# name: (stream, last event id, reconnection time, ignored line)
STATE: dict[str, tuple[bytes, str, int | None, str | None]] = {
    "nothing": (b"data: a\n\n", "", None, None),
    # The id changes at blank lines.
    "id": (b"id: 1\n\n", "1", None, None),
    "id of an unfinished event": (b"id: 1\n\nid: 2\ndata: a\n", "1", None, None),
    "id without colon": (b"id: 1\n\nid\n\n", "", None, None),
    "last id counts": (b"id: 1\nid: 2\n\n", "2", None, None),
    # The reconnection time changes at once.
    "retry": (b"retry: 3000\n\n", "", 3000, None),
    "retry without blank line": (b"data: a\n\nretry: 42\n", "", 42, None),
    "retry without line end": (b"retry: 1\nretry: 42", "", 1, None),
    "retry ended by CR": (b"retry: 42\r", "", 42, None),
    "last retry counts": (b"retry: 1\nretry: 2\n\nretry: 3\n", "", 3, None),
    "retry without space": (b"retry:7\n", "", 7, None),
    "retry with leading zeros": (b"retry: 007\n", "", 7, None),
    "retry zero": (b"retry: 1\nretry: 000\n", "", 0, None),
    "retry of 30 digits": (b"retry: " + b"9" * 30 + b"\n", "", 10**30 - 1, None),
    "retry of 5,000 digits": (b"retry: " + b"9" * 5000 + b"\n", "", 10**4300, None),
    "retry after 5,000 zeros": (b"retry: " + b"0" * 5000 + b"1\n", "", 1, None),
    "retry empty": (b"retry: 1\nretry\nretry:\nretry: \n", "", 1, None),
    "retry with sign": (b"retry: -5\nretry: +5\n", "", None, None),
    "retry with underscore": (b"retry: 1_000\n", "", None, None),
    "retry with spaces": (b"retry:  50\nretry: 50 \n", "", None, None),
    "retry with fraction": (b"retry: 1.5\nretry: 1e3\n", "", None, None),
    "retry in Arabic digits": ("retry: ٣٠٠\n".encode(), "", None, None),
    # Lines of unknown fields.
    "unknown field": (b'error: {"code":500}\n\n', "", None, 'error: {"code":500}'),
    "latest unknown field": (b"a: 1\n\nb\n\ndata: c\n\n", "", None, "b"),
    "unknown field, no line end": (b"a\nerror: {}", "", None, "a"),
    "known names are not unknown": (
        b"data\nevent\nid: \0\nretry: x\n: y\n:\n\n",
        "",
        None,
        None,
    ),
    "long unknown field": ("世".encode() * 2000 + b"\n", "", None, "世" * 1024),
    "unknown field with a bad byte": (b"\xff: \xff\n", "", None, "\ufffd: \ufffd"),
}


@pytest.mark.parametrize(
    ("stream", "expected"), EVENTS.values(), ids=list(EVENTS.keys())
)
def test_feed_table(stream: bytes, expected: list[tuple[str, str, str] | str]) -> None:
    events = [Event(data=e) if isinstance(e, str) else Event(*e) for e in expected]
    assert reference(stream).events == events
    for reads in every_cut(stream):
        assert parse(*reads) == reference(stream), reads
        # The first read is never taken for a whole event. Behind a blank line it may be.
        assert parse(b"\n", *reads) == reference(b"\n" + stream), reads


@pytest.mark.parametrize(
    ("stream", "last_event_id", "retry_ms", "ignored"),
    STATE.values(),
    ids=list(STATE.keys()),
)
def test_feed_state_table(
    stream: bytes, last_event_id: str, retry_ms: int | None, ignored: str | None
) -> None:
    cuts = (
        every_cut(stream)
        if len(stream) < 100
        else [[stream], [stream[:4500], stream[4500:]]]
    )
    for reads in cuts:
        _, *state = parse(*reads)
        assert state == [last_event_id, retry_ms, ignored], reads


# --- When an event is handed out. ---


@pytest.mark.parametrize(
    "end", [b"\n\n", b"\r\r", b"\r\n\r", b"\n\r", b"\r\n\n", b"\r\r\n", b"\n\r\n"]
)
def test_feed_event_with_its_blank_line(end: bytes) -> None:
    parser = Parser()
    stream = b"data: a" + end
    # A last LF behind a CR adds nothing.
    complete = len(stream) - end.endswith(b"\r\n")
    at = [i for i in range(len(stream)) if parser.feed(stream[i : i + 1])]
    assert at == [complete - 1]
    assert parser.end() == []


def test_feed_cr_at_end_of_read() -> None:
    parser = Parser()
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\r") == [Event(data="a")]
    assert parser.feed(b"\ndata: b\r") == []
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\r") == [Event(data="b")]


def test_feed_empty_read_between_cr_and_lf() -> None:
    parser = Parser()
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"") == []
    assert parser.feed(b"\ndata: b\n\n") == [Event(data="a\nb")]


def test_feed_whole_event_after_cr() -> None:
    parser = Parser()
    assert parser.feed(b"data: a\r\r") == [Event(data="a")]
    assert parser.feed(b"data: b\n\n") == [Event(data="b")]
    assert parser.feed(b"data: c\r\r") == [Event(data="c")]
    assert parser.feed(b"\nevent: x\ndata: d\n\n") == [Event("x", "d")]


def test_feed_id_before_its_blank_line() -> None:
    parser = Parser()
    assert parser.feed(b"id: 1\ndata: a\n") == []
    assert parser.last_event_id == ""
    assert parser.feed(b"\n") == [Event(data="a", id="1")]
    assert parser.last_event_id == "1"
    assert parser.feed(b"data: b\n\n") == [Event(data="b", id="1")]


def test_feed_retry_before_the_event_ends() -> None:
    parser = Parser()
    assert parser.feed(b"data: a\nretry: 5\ndata: b") == []
    assert parser.retry_ms == 5


def test_end_discards_unfinished_event() -> None:
    parser = Parser()
    assert parser.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n") == [
        Event(data="a", id="1")
    ]
    assert parser.end() == []
    assert parser.last_event_id == "1"


def test_feed_read_larger_than_a_slice() -> None:
    # Events, comments, ids and odd line ends laid across the slices of a long read.
    block = "data: {世}\n\n: ping\n\nevent: x\r\ndata: a\r\n\r\nid: 9\ndata: b\ndata: 😀\n\n"
    stream = block.encode() * 10_000 + b"data: c\n\n" * 50_000
    events, last_event_id, _, _ = parse(stream)
    first = [Event(data="{世}"), Event("x", "a"), Event(data="b\n😀", id="9")]
    later = [Event(data="{世}", id="9"), Event("x", "a", "9"), first[2]]
    assert events[:3] == first
    assert events[3:30_000] == later * 9_999
    assert events[30_000:] == [Event(data="c", id="9")] * 50_000
    assert last_event_id == "9"


# --- Random streams. ---

FRAGMENTS = [
    b"data",
    b"data:",
    b"data: ",
    b"data: a\n\n",
    b"data: \n\n",
    b"data: b\ndata: c\n\n",
    b"data: d\r\n\r\n",
    "data: é世😀\n\n".encode(),
    b"event: x\ndata: e\n\n",
    b"event:\ndata: f\n\n",
    b"event: y\n\n",
    b"event: ",
    b"event",
    b"id: 1\n\n",
    b"id: 2\ndata: g\n\n",
    b"id",
    b"id:",
    b"retry: ",
    b"retry: 1000\n\n",
    b"12",
    "٣".encode(),
    b"error: {}\n\n",
    b": ping\n\n",
    b":",
    b" ",
    b"\n",
    b"\n\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\t",
    BOM,
    "\u2028\u0085\v".encode(),
    b"\xe4\xb8",
    b"\x96",
    b"\xf0\x9f",
    b"\xff",
    b"\xed\xa0\x80",
]
fragments = st.sampled_from(FRAGMENTS) | st.binary(max_size=3)
reads = st.lists(st.lists(fragments, max_size=5).map(b"".join), max_size=12)
streams = st.lists(fragments, max_size=40).map(b"".join)


def cut(stream: bytes, at: Sequence[int]) -> list[bytes]:
    places = sorted(i % (len(stream) + 1) for i in at)
    return [
        stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)
    ]


@given(reads=reads)
@example(reads=[b"data: a\r", b"", b"\n", b"\n"])
@example(reads=[b"", b"data: a\n\n", BOM + b"data: b\n\n"])
@example(reads=[b"\n", b"data: a\n\n\ndata: b\n\n", b"data: c\n\n"])
@example(reads=[b"\n", b"event: \ndata: a\n\n", b"event: b\n\n", b"data: c\n\n"])
def test_feed_any_stream_as_the_reference(reads: list[bytes]) -> None:
    # After each read, not only at the end: an event must not come late.
    parser = Parser()
    events: list[Event] = []
    so_far = b""
    for data in reads:
        events += parser.feed(data)
        so_far += data
        assert reading(parser, events) == reference(so_far)
    assert parser.end() == []
    assert reading(parser, events) == reference(so_far)


@given(stream=streams, at=st.lists(st.integers(0, 1000), max_size=20))
def test_feed_any_cut(stream: bytes, at: list[int]) -> None:
    assert parse(*cut(stream, at)) == reference(stream)


@given(reads=st.lists(st.binary(max_size=200), max_size=10))
def test_feed_random_bytes(reads: list[bytes]) -> None:
    assert parse(*reads) == reference(b"".join(reads))


# --- The limit. ---


@given(
    stream=streams,
    at=st.lists(st.integers(0, 1000), max_size=20),
    limit=st.integers(len(BOM), 40),
)
@example(stream=BOM + b"data: a\n\n", at=[], limit=9)
@example(stream=BOM + b"data: a\n\n", at=[10], limit=9)
@example(stream=b"\ndata: a\n\ndata: bb\n\n", at=[1, 10], limit=8)
@example(stream=b"\nevent: x\ndata: a\n\n", at=[1], limit=16)
def test_feed_limit_any_cut(stream: bytes, at: list[int], limit: int) -> None:
    parser = Parser(limit)
    try:
        events = [event for data in cut(stream, at) for event in parser.feed(data)]
    except EventTooLarge:
        assert exceeds(stream, limit)
    else:
        assert not exceeds(stream, limit)
        assert reading(parser, events) == reference(stream)


@pytest.mark.parametrize(
    "event",
    [
        b"data: 0123456789\n",
        b"data:\ndata:\ndata\n",
        b":012345678901234\n",
        b"event: x\ndata:a\n",
        b"\nevent: x\ndata:a\n",
        b"\ndata: 0123456789\n",
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_feed_event_as_long_as_the_limit(event: bytes, size: int) -> None:
    limit = len(event.lstrip(b"\n"))
    stream = event + b"\n" + event.lstrip(b"\n") + b"\n"
    for number in (limit, limit - 1):
        parser = Parser(number)
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        if number == limit:
            for data in pieces:
                parser.feed(data)
            continue
        with pytest.raises(EventTooLarge):
            for data in pieces:
                parser.feed(data)


def test_feed_beyond_the_limit_raises_again() -> None:
    parser = Parser(limit=1000)
    message = "an event of the stream exceeds the limit of 1000 bytes"
    assert parser.feed(b"id: 1\ndata: a\n\n") == [Event(data="a", id="1")]
    with pytest.raises(EventTooLarge, match=message):
        parser.feed(b"data: " + b"a" * 1000)
    for data in (b"\n\n", b"", b"data: a\n\n", b"data: a\n\n" * 10_000):
        with pytest.raises(EventTooLarge, match=message):
            parser.feed(data)
    assert parser.end() == []
    assert parser.last_event_id == "1"


def test_feed_limit_is_ten_mebibytes_unless_told() -> None:
    parser = Parser()
    half = b"a" * (5 * 1024 * 1024)
    assert parser.feed(b"data: " + half) == []
    assert parser.feed(half[7:] + b"\n") == []
    with pytest.raises(EventTooLarge, match="10485760"):
        parser.feed(b":")


def test_feed_limit_is_for_one_event_not_for_a_read() -> None:
    events = parse_with_limit(100, b"data: 0123456789\n\n" * 20_000)
    assert events == [Event(data="0123456789")] * 20_000
    assert parse_with_limit(100, b": ping\n\n" * 20_000) == []
    assert parse_with_limit(100, b"\n" * 1_000_000) == []


def parse_with_limit(limit: int, stream: bytes) -> list[Event]:
    return Parser(limit).feed(stream)


@pytest.mark.parametrize(
    "piece",
    [b"a", b"ab", b":a\n", b"data:x\n", b"data\n", b"id: 1\n", b"\xf0\x9f\x98\x80"],
)
def test_feed_endless_event_takes_little_more_than_the_limit(piece: bytes) -> None:
    limit = 256 * 1024
    parser = Parser(limit)
    tracemalloc.start()
    try:
        with pytest.raises(EventTooLarge):
            for _ in range(limit + 1):
                parser.feed(piece)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A bytearray that grows may exist twice for a moment.
    assert peak < 3 * limit
    assert left < limit / 4


def test_feed_long_line_byte_by_byte_is_linear() -> None:
    # Four times the bytes may take four times the time, for which ten is generous. With
    # a copy or a search of the whole line per read it would be far more than sixteen.
    def seconds(size: int) -> float:
        parser = Parser()
        a = b"a"
        parser.feed(b"data: ")
        start = time.process_time()
        for _ in range(size):
            parser.feed(a)
        taken = time.process_time() - start
        assert parser.feed(b"\n\n") == [Event(data="a" * size)]
        return taken

    short = min(seconds(256 * 1024) for _ in range(3))
    assert seconds(1024 * 1024) < 10 * short


def test_feed_many_data_lines_is_linear() -> None:
    def seconds(lines: int) -> float:
        parser = Parser()
        start = time.process_time()
        for _ in range(lines):
            parser.feed(b"data: a\n")
        taken = time.process_time() - start
        assert parser.feed(b"\n") == [Event(data="\n".join("a" * lines))]
        return taken

    short = min(seconds(32 * 1024) for _ in range(3))
    assert seconds(128 * 1024) < 10 * short


# --- The writer. ---


@pytest.mark.parametrize(
    ("type", "data", "expected"),
    [
        ("message", "a", b"data: a\n\n"),
        ("", "a", b"data: a\n\n"),
        ("message", "", b"data: \n\n"),
        ("x", "a", b"event: x\ndata: a\n\n"),
        ("message", " a ", b"data:  a \n\n"),
        (" x", "a", b"event:  x\ndata: a\n\n"),
        ("message", "a\nb", b"data: a\ndata: b\n\n"),
        ("message", "\n", b"data: \ndata: \n\n"),
        ("x", "a\n", b"event: x\ndata: a\ndata: \n\n"),
        ("message", "é世😀\u2028", "data: é世😀\u2028\n\n".encode()),
        # What the format cannot express.
        ("message", "a\rb\r\nc", b"data: a\ndata: b\ndata: c\n\n"),
        ("x\ndata: y\r", "a", b"event: x data: y \ndata: a\n\n"),
        ("message", "\ud83d", b"data: ?\n\n"),
        ("\ud83d", "a", b"event: ?\ndata: a\n\n"),
    ],
)
def test_frame_table(type: str, data: str, expected: bytes) -> None:
    assert frame(type, data) == expected


scalars = st.characters(exclude_categories=["Cs"])
expressible = st.builds(
    Event,
    type=st.just("message")
    | st.text(scalars, min_size=1).filter(lambda t: not set(t) & set("\r\n")),
    data=st.text(scalars | st.just("\n")).map(lambda t: t.replace("\r", "")),
)


@given(events=st.lists(expressible))
def test_frame_is_read_back(events: list[Event]) -> None:
    frames = [frame(event.type, event.data) for event in events]
    assert parse(*frames).events == events
    assert parse(b"".join(frames)).events == events


@given(type=st.text(), data=st.text())
def test_frame_of_any_text_is_one_event(type: str, data: str) -> None:
    stream = frame(type, data)
    assert len(parse(stream, stream).events) == 2
