"""Runs of events that no parser looks at: what it would have found must be the same."""

import itertools
import json

import pytest
from hypothesis import example, given, strategies as st

from proxy.completion import Delta, Start, Text
from proxy.dialects.adjust import ReplyFixer
from proxy.dialects.anthropic import MessagesReader
from proxy.dialects.anthropic_incoming import MessagesWriter
from proxy.dialects.base import quote_each
from proxy.dialects.cody import CumulativeWriter, DeltaWriter
from proxy.dialects.openai import OpenAIReader
from proxy.dialects.openai_incoming import ChatWriter, CompletionWriter
from proxy.dialects.runs import Runs, are_literal
from proxy.errors import UpstreamFault
from proxy.passthrough import PassThrough
from proxy.sse import Event, Parser
from proxy.stops import Cutter
from proxy.translation import Translation
from tests.support.upstream import anthropic_events, data, openai_chunk, openai_chunks

START, PLAIN, FINISH, DONE = openai_chunks(["word"])


class Collecting:
    """A writer that writes down what it is told to say."""

    stream_headers: dict[str, str] = {}

    def __init__(self):
        self.said = []

    def frames(self, deltas):
        self.said += deltas
        return b"x" * len(deltas)

    def end(self):
        return b"end"

    def keep_alive(self):
        raise AssertionError("nobody waits here")

    def literals(self, texts):
        return self.frames([Text(json.loads(b'"%b"' % text)) for text in texts])

    def body(self, deltas):
        raise AssertionError("these are streams")

    def error_reply(self, error):
        raise AssertionError("these have begun")

    def error(self, error):
        self.said.append(error.message)
        return b"error"


def parsed(reader, stream: bytes) -> list:
    """What a parser alone finds."""
    out: list = []
    try:
        for event in Parser().feed(stream):
            reader.read(event, out)
            if reader.ended:
                return out
        reader.eof()
    except UpstreamFault as fault:
        out.append(fault.message)
    return out


def exchanged(
    reader, reads: list[bytes], cutter: Cutter | None = None, learns: bool = True
) -> list:
    writer = Collecting()
    exchange = Translation(
        reader,
        writer,
        stream=True,
        content_type="text/event-stream",
        limit_bytes=10**6,
        cutter=cutter,
    )
    if not learns:
        exchange._runs.is_learning = False
        exchange._runs._lessons = 10**6
    try:
        for read in reads:
            exchange.receive_data(read)
        exchange.receive_eof()
    except UpstreamFault as fault:
        writer.said.append(fault.message)
    return writer.said


def spoken(deltas: list) -> list:
    """Usage is said at the end, and a missing finish is added: that is not at issue."""
    return [d for d in deltas if isinstance(d, Start | Text | str)]


def literal(text: str, ascii: bool) -> bytes:
    return json.dumps(text, ensure_ascii=ascii).encode("utf-8", "surrogatepass")


TEXTS = st.one_of(
    st.sampled_from(
        ["word", " a", "b", "", '"', "\\", '\\"', "\n", "é", "{", "\u2028"]
    ),
    st.sampled_from(["long" * 10, "long" * 10 + '"', "é" + "long" * 10]),
    st.text(max_size=6),
)
# Texts that are none, or half of one: seen only when the text is wanted.
BROKEN = [
    PLAIN.replace(b'"word"', b'"\xff"'),
    PLAIN.replace(b'"word"', b'"\\ud83d"'),
]
ODD = [
    data({"error": {"message": "boom"}}),
    data({"error": "x", "choices": [{"delta": {}}]}),
    b"event: error\n" + PLAIN,
    FINISH,
    DONE,
    openai_chunk(None, usage={"prompt_tokens": 1}),
    openai_chunk({"reasoning_content": "hm"}),
    PLAIN.replace(b"\n\n", b"\ndata: x\n\n"),
    PLAIN.replace(b"\n", b"\r\n"),
    PLAIN.replace(b"\n\n", b"\n: comment\n\n"),
    PLAIN.replace(b'"word"', b'"wo\nrd"'),
    PLAIN.replace(b'"word"', b'"wo\\"'),
    PLAIN.replace(b'"word"', b'"a","refusal":"b"'),
    PLAIN.replace(b'"word"', b"null"),
    b": ping\n\n",
    b"\n",
]
EVENTS = st.one_of(
    st.builds(
        lambda text, ascii: PLAIN.replace(b'"word"', literal(text, ascii)),
        TEXTS,
        st.booleans(),
    ),
    st.sampled_from([PLAIN, PLAIN, PLAIN, *ODD, *BROKEN]),
)


@given(st.lists(EVENTS, max_size=12), st.lists(st.integers(0, 5000), max_size=4))
def test_same_as_a_parser_finds(events, cuts):
    stream = b"".join([START, PLAIN, *events])
    edges = [0, *sorted({at % len(stream) for at in cuts}), len(stream)]
    reads = [stream[a:b] for a, b in itertools.pairwise(edges)]
    expected = spoken(parsed(OpenAIReader(), stream))
    got = spoken(exchanged(OpenAIReader(), reads))
    # An exchange leaves out texts that are empty, and knows one failure more.
    assert [d for d in got if d != Text("")] == [d for d in expected if d != Text("")]


# Of few characters, so that what is to be cut comes often, whole and in pieces.
PIECES = st.text("ab<\n", min_size=1, max_size=2)


@given(
    st.lists(st.lists(PIECES, max_size=3), max_size=6),
    st.lists(PIECES, max_size=2),
    st.lists(PIECES, max_size=2),
)
@example([["a"], ["b"]], ["a"], [])  # more than what is cut
@example([["a"], ["b"]], ["ab"], [])  # the rest of what is held back
@example([["<"], ["b"]], [], ["<"])
def test_the_same_is_cut_as_event_by_event(texts, stops, ends):
    reads = [START + PLAIN]
    for group in texts:
        events = [PLAIN.replace(b'"word"', literal(text, True)) for text in group]
        reads.append(b"".join(events))
    reads.append(FINISH + DONE)

    def said(learns):
        deltas = exchanged(OpenAIReader(), reads, Cutter(stops, ends), learns)
        text = "".join(delta.text for delta in deltas if isinstance(delta, Text))
        return text, [d for d in deltas if not isinstance(d, Text)]

    assert said(learns=True) == said(learns=False)


@given(st.lists(EVENTS, max_size=12))
def test_bytes_that_pass_are_all_there(events):
    stream = b"".join([START, PLAIN, *events])

    def passed(reads):
        passing = PassThrough(
            OpenAIReader(),
            Collecting(),
            dialect="openai-chat",
            limit_bytes=10**6,
            fixer=None,
        )
        return b"".join(passing.receive_data(read) for read in reads)

    assert passed([stream]) == stream
    assert passed([bytes([byte]) for byte in stream]) == stream


@given(st.lists(EVENTS, max_size=12), st.lists(st.integers(0, 5000), max_size=4))
def test_what_passes_is_what_passes_event_by_event(events, cuts):
    stream = b"".join([START, PLAIN, *events])
    edges = [0, *sorted({at % len(stream) for at in cuts}), len(stream)]

    def passed(reads):
        passing = PassThrough(
            OpenAIReader(),
            ChatWriter("m"),
            dialect="openai-chat",
            limit_bytes=10**6,
            fixer=ReplyFixer("openai-chat"),
        )
        try:
            out = b"".join(map(passing.receive_data, reads)) + passing.receive_eof()
        except UpstreamFault as fault:
            return fault.message
        # Not its bytes: comments go missing where another event is replaced.
        return Parser().feed(out), passing.adjusted(), passing.is_answering

    expected = passed([event + b"\n\n" for event in stream.split(b"\n\n")])
    assert passed([stream[a:b] for a, b in itertools.pairwise(edges)]) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeltaWriter(8, True),
        lambda: CumulativeWriter(1, True),
        lambda: ChatWriter("m"),
        lambda: CompletionWriter("m"),
        lambda: MessagesWriter("m"),
    ],
)
@given(st.lists(st.text('ab "\\\n/~', min_size=1), min_size=1))
def test_literals_are_said_like_any_text(make, texts):
    first: list[Delta] = [Start("id", "m"), Text("first")]
    quoted, plain = make(), make()
    assert quoted.frames(first) == plain.frames(first)
    raw = [json.dumps(text).encode("ascii")[1:-1] for text in texts]
    assert are_literal(raw)
    said = quoted.literals(raw)
    if said is not None:
        assert said == plain.frames([Text(text) for text in texts])
        assert quoted.keep_alive() == plain.keep_alive()


@pytest.mark.parametrize(
    "raw", [b"", b"\\/", b"\\u0041", b"\xc3\xa9", b"\x7f", b"\x01", b"\t"]
)
def test_what_is_no_literal(raw):
    assert not are_literal([b"a", raw, b"b"])


def test_what_can_wait_for_the_rest_of_its_event():
    runs = learnt()
    for size in range(1, len(PLAIN)):
        assert runs.can_wait(PLAIN[:size])
    assert not runs.can_wait(PLAIN)  # nothing is missing
    assert not runs.can_wait(PLAIN[:-2] + b"\r")
    assert not runs.can_wait(PLAIN[:-1] + b"error: {}\n")  # to be seen at once
    assert not runs.can_wait(PLAIN[:-1].replace(b"word", b"word" * 1024))
    assert not runs.can_wait(FINISH[:-1])
    assert not Runs().can_wait(b"data: ")


def learnt(first: bytes = PLAIN, text: str = "word") -> Runs:
    runs = Runs()
    events = Parser().feed(first)
    runs.learn(events[-1], text, first)
    return runs


@pytest.mark.parametrize("odd", ODD)
def test_what_a_parser_has_to_look_at(odd):
    runs = learnt()
    assert runs.split(odd) == (0, [])
    for before in (PLAIN, PLAIN * 3):
        assert runs.split(before)[0] == len(before)
        length, texts = runs.split(before + odd + PLAIN)
        assert (length, texts) == (len(before), [b"word"] * before.count(PLAIN))


def test_half_an_event_is_left():
    assert learnt().split(PLAIN * 2 + PLAIN[:-1]) == (2 * len(PLAIN), [b"word"] * 2)


@pytest.mark.parametrize("form", [b"data: ", b"data:"])
def test_events_with_names(form):
    events = [e.replace(b"data: ", form) for e in anthropic_events(["one", "two"])]
    texts = [e for e in events if b"text_delta" in e]
    runs = learnt(texts[0], "one")
    assert runs.split(texts[0] + texts[1]) == (
        len(texts[0] + texts[1]),
        [b"one", b"two"],
    )
    assert runs.split(events[-1]) == (0, [])
    assert parsed(MessagesReader(), b"".join(events)) == parsed(
        MessagesReader(), b"".join(anthropic_events(["one", "two"]))
    )


def test_text_that_stands_twice_in_its_event_teaches_nothing():
    event = Event("message", '{"id":"word","choices":[{"delta":{"content":"word"}}]}')
    runs = Runs()
    runs.learn(event, "word", f"data: {event.data}\n\n".encode())
    assert runs.split(f"data: {event.data}\n\n".encode()) == (0, [])


def test_events_that_are_never_alike_are_given_up():
    runs = Runs()
    for number in range(20):
        event = PLAIN.replace(b'"choices"', b'"n":%d,"choices"' % number)
        runs.split(event)
        if runs.is_learning:
            runs.learn(Parser().feed(event)[0], "word", event)
    assert not runs.is_learning


@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=1))
@example([",", "b"])
@example(["a", ",", "b", '"', '","', "\n", "\\", "]"])
def test_quote_each_is_what_quoting_one_by_one_gives(texts):
    written = quote_each(texts, '{"text":', "}\n\n")
    assert written == "".join(f'{{"text":{json.dumps(text)}}}\n\n' for text in texts)
