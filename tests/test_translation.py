"""One reply without I/O: upstream bytes in, client bytes out, whatever the cuts."""

import itertools
import json

import pytest
from hypothesis import example, given, strategies as st

from proxy.completion import CompletionRequest
from proxy.dialects import cody
from proxy.dialects.anthropic import MessagesReader
from proxy.dialects.openai import OpenAIReader
from proxy.errors import (
    DeadlineExceeded,
    EventTooLarge,
    ProxyError,
    UpstreamFault,
    UpstreamGarbled,
    UpstreamReported,
    UpstreamTruncated,
)
from proxy.stops import Cutter
from proxy.translation import Translation
from tests.support import recording, upstream as scripted
from tests.support.cody import frames_of
from tests.support.upstream import anthropic_events, data

SSE = "text/event-stream; charset=utf-8"
DONE = b"event: done\ndata: {}\n\n"


def exchange(version=2, *, reader=None, stream=True, kind=SSE, limit=10**6, **more):
    writer_type = cody.DeltaWriter if version > 1 else cody.CumulativeWriter
    return Translation(
        reader or OpenAIReader(),
        writer_type(version, stream),
        stream=stream,
        content_type=kind,
        limit_bytes=limit,
        **more,
    )


def run(subject: Translation, reads: list[bytes]) -> bytes:
    out = b"".join(map(subject.receive_data, reads))
    return out + subject.receive_eof()


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({at % (len(stream) + 1) for at in cuts}), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]


def texts(out: bytes) -> str:
    return "".join(f.payload.get("deltaText", "") for f in frames_of(out))


def openai_chunks(texts: list[str], **options) -> list[bytes]:
    """Text chunks, without the one that only says the role."""
    return scripted.openai_chunks(texts, **options)[1:]


STREAMS = {
    "plain": b"".join(openai_chunks(["Hello", " wörld", " 🤖"], usage=(3, 4))),
    "crlf": b"".join(openai_chunks(["a", "é"])).replace(b"\n", b"\r\n"),
    "comments": b": hi\n\n" + b": hi\n\n".join(openai_chunks(["a", "b"])),
    "error": b"".join(openai_chunks(["a"])[:1]) + data({"error": {"message": "boom"}}),
    "truncated": b"".join(openai_chunks(["a", "b"])[:2]),
    "error first": data({"error": "Model is overloaded", "error_type": "overloaded"}),
    "field": b'error: {"message":"in a field"}\n\n',
    "empty": b"",
    "done only": b"data: [DONE]\n\n",
    "stop": b"".join(openai_chunks(["one\n", "\ntwo", "three"], usage=(1, 2))),
}
for name in ("chat_stream_usage", "completion_stream", "gen_past_ctx_stream"):
    for server in ("llama-server", "vllm"):
        STREAMS[f"{server} {name}"] = recording.load(f"{server}/{name}").body


def result(stream: bytes, cuts: list[int], version: int) -> bytes | str:
    """The client's bytes, or the error that is told with a status."""
    subject = exchange(version, cutter=Cutter(["\n\n"], ["</s>"]))
    try:
        return run(subject, cut(stream, cuts))
    except UpstreamFault as error:
        return f"{error.kind}: {error.message}"


@pytest.mark.parametrize("name", STREAMS)
@given(
    cuts=st.lists(st.integers(0, 5000), max_size=12), version=st.sampled_from([1, 8])
)
@example(cuts=list(range(5000)), version=8)
def test_any_cut_of_a_stream_gives_the_same_bytes(name, cuts, version):
    whole = result(STREAMS[name], [], version)
    pieces = result(STREAMS[name], cuts, version)
    if isinstance(whole, str) and isinstance(pieces, bytes):
        # Text that came before the error in a read of its own has been said already.
        frames = frames_of(pieces)
        assert [frame.name for frame in frames[-2:]] == ["error", "done"]
        assert frames[-2].payload["error"] in whole
        return
    assert pieces == whole
    if isinstance(pieces, bytes):
        names = [frame.name for frame in frames_of(pieces)]
        assert names[-1] == "done" and names.count("done") == 1
        assert names.count("error") <= 1


@given(
    st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4), st.booleans()
)
def test_random_bytes_raise_only_documented_errors(stream, cuts, streamed):
    for kind in (SSE, "application/json", "text/html", ""):
        subject = exchange(stream=streamed, kind=kind, limit=100)
        try:
            run(subject, cut(stream, cuts))
        except UpstreamFault as error:
            assert subject.is_ended or isinstance(error, UpstreamGarbled)


def test_text_before_an_error_in_one_read_is_said_first():
    out = run(exchange(), [STREAMS["error"]])
    assert out == (
        b'event: completion\ndata: {"deltaText":"a"}\n\n'
        b'event: error\ndata: {"error":"boom"}\n\n' + DONE
    )


def test_an_error_in_a_field_is_seen_before_an_end_in_the_same_read():
    subject = exchange()
    out = subject.receive_data(b"".join(openai_chunks(["a", "b"], finish=None)[:2]))
    field = b'error: {"message":"out of memory"}\n\n'
    other = data({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
    out += subject.receive_data(field + other + b"data: [DONE]\n\n")
    assert texts(out) == "ab"
    assert b"out of memory" in out and subject.is_ended
    assert isinstance(subject.error, UpstreamReported)


def test_truncated_stream_says_what_there_was_and_an_error():
    subject = exchange()
    out = run(subject, [STREAMS["truncated"]])
    names = [frame.name for frame in frames_of(out)]
    assert names == ["completion", "completion", "error", "done"]
    assert isinstance(subject.error, UpstreamTruncated)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("error first", UpstreamReported, "overloaded: Model is overloaded"),
        ("field", UpstreamReported, "in a field"),
        ("empty", UpstreamTruncated, "stream closed with no events"),
        ("done only", UpstreamReported, "upstream ended the stream without an answer"),
    ],
)
def test_failure_before_anything_was_said_is_raised(name, kind, text):
    with pytest.raises(kind) as caught:
        run(exchange(), [STREAMS[name]])
    assert caught.value.message == text


def test_role_alone_starts_nothing():
    subject = exchange()
    chunk = data({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
    assert subject.receive_data(chunk) == b""
    assert not subject.is_answering
    with pytest.raises(UpstreamTruncated):
        subject.receive_eof()


def test_nothing_is_said_after_the_end():
    subject = exchange()
    out = subject.receive_data(b"".join(openai_chunks(["a"])))
    assert out.endswith(DONE) and subject.is_ended
    assert subject.receive_data(STREAMS["plain"]) == b""
    assert subject.receive_eof() == b""
    assert subject.receive_failure(DeadlineExceeded("late")) == b""


def test_failure_after_the_finish_reason_is_an_end():
    subject = exchange()
    subject.receive_data(b"".join(openai_chunks(["a"])[:-1]))
    assert subject.is_finishing()
    assert subject.receive_failure(UpstreamTruncated("cut")) == DONE
    assert subject.error is None


def test_anthropic_cut_between_stop_reason_and_message_stop_is_an_error():
    subject = exchange(reader=MessagesReader())
    subject.receive_data(b"".join(anthropic_events(["a"])[:-1]))
    out = subject.receive_failure(UpstreamTruncated("cut"))
    assert out == b'event: error\ndata: {"error":"cut"}\n\n' + DONE


def test_bug_after_frames_is_an_error_and_an_end():
    subject = exchange()
    subject.receive_data(openai_chunks(["a"])[0])
    out = subject.receive_failure(ProxyError("internal"))
    assert out == b'event: error\ndata: {"error":"internal"}\n\n' + DONE


def test_secrets_are_taken_out_of_errors():
    subject = exchange(redact=lambda text: text.replace("boom", "[redacted]"))
    assert b'{"error":"[redacted]"}' in run(subject, [STREAMS["error"]])


# ------------------------------------------------------------------------------ stops


def stopped(*reads: bytes, stops=("\n\n",), version=2) -> bytes:
    subject = exchange(version, cutter=Cutter(stops))
    out = b"".join(map(subject.receive_data, reads))
    return out if subject.is_ended else out + subject.receive_eof()


def test_cut_at_a_stop_sequence_ends_the_answer_at_once():
    subject = exchange(cutter=Cutter(["\n\n"]))
    out = subject.receive_data(b"".join(openai_chunks(["one\n", "\ntwo"])[:2]))
    assert [frame.payload for frame in frames_of(out)] == [
        {"deltaText": "one"},
        {"stopReason": "stop_sequence"},
    ]
    assert subject.is_finishing() and not subject.is_ended


def test_cut_then_the_upstream_s_own_end_keeps_its_usage():
    chunks = openai_chunks(["one", "\n\n"], finish="stop", usage=(3, 4))
    payloads = [f.payload for f in frames_of(stopped(*chunks, version=8))]
    assert payloads[1]["stopReason"] == "stop_sequence"
    assert payloads[2]["usage"]["completion_tokens"] == 4


def test_cut_then_more_text_ends_without_waiting():
    subject = exchange(cutter=Cutter(["\n\n"]))
    chunks = openai_chunks(["one\n\n", "more"])
    subject.receive_data(chunks[0])
    assert subject.receive_data(chunks[1]) == DONE
    assert subject.is_ended


def test_eof_after_a_cut_is_an_end():
    assert stopped(openai_chunks(["one\n\n"])[0]).endswith(DONE)


def test_what_was_held_back_comes_before_the_finish_reason():
    frames = frames_of(stopped(*openai_chunks(["one\n"])))
    assert [frame.payload for frame in frames] == [
        {"deltaText": "one"},
        {"deltaText": "\n"},
        {"stopReason": "stop"},
        {},
    ]


def test_what_was_held_back_comes_before_an_error():
    out = stopped(openai_chunks(["one\n"])[0])
    assert texts(out) == "one\n"
    assert frames_of(out)[-2].name == "error"


# ---------------------------------------------------------------------- other replies

BODY = {
    "model": "large-1",
    "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
}


def test_json_reply_to_a_stream_request_is_streamed():
    out = run(exchange(kind="application/json"), cut(json.dumps(BODY).encode(), [5, 9]))
    assert [frame.payload for frame in frames_of(out)] == [
        {"deltaText": "hi"},
        {"stopReason": "stop"},
        {},
    ]


def test_stream_reply_to_a_request_for_one_body():
    out = run(exchange(1, stream=False), [STREAMS["plain"]])
    assert json.loads(out) == {"completion": "Hello wörld 🤖", "stopReason": "stop"}


def test_body_is_cut_and_stripped_like_a_stream():
    body = json.dumps({"choices": [{"text": "a</s>", "finish_reason": "stop"}]})
    subject = exchange(1, stream=False, kind="", cutter=Cutter([], ["</s>"]))
    assert json.loads(run(subject, [body.encode()]))["completion"] == "a"


def test_events_under_another_content_type_are_understood():
    out = run(exchange(kind="text/plain"), [STREAMS["plain"]])
    assert texts(out) == "Hello wörld 🤖"


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        (
            "text/html; charset=utf-8",
            b"<html><h1>502 Bad Gateway</h1>",
            "upstream sent text/html instead of a completion: "
            "<html><h1>502 Bad Gateway</h1>",
        ),
        ("", b"", "upstream sent an empty reply (no content type)"),
        ("application/json", b"", "upstream sent an empty reply (application/json)"),
        (
            "application/json",
            b'{"hello":"world"}',
            'upstream sent a reply without choices: {"hello":"world"}',
        ),
        (
            "application/json",
            b"oops",
            "upstream sent application/json instead of a completion: oops",
        ),
        (SSE, b'{"error":"as JSON"}\n', "as JSON"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_no_completion(kind, body, text, stream):
    with pytest.raises(UpstreamFault) as caught:
        run(exchange(kind=kind, stream=stream), [body] if body else [])
    assert caught.value.message == text


def test_event_over_the_limit():
    subject = exchange(limit=100)
    with pytest.raises(EventTooLarge):
        subject.receive_data(b"data: " + b"x" * 200)


def test_body_over_the_limit():
    subject = exchange(limit=100, kind="application/json")
    with pytest.raises(UpstreamGarbled) as caught:
        run(subject, [b"{" + b" " * 200])
    assert caught.value.message == "upstream reply exceeds 100 bytes"


def test_request_defaults_are_not_shared():
    first, second = (CompletionRequest("chat", []) for _ in range(2))
    first.stop.append("x")
    assert second.stop == []
