"""Replies that pass through, without I/O: bytes that stay, events that are mended."""

import itertools
import json

import pytest
from hypothesis import given, strategies as st

from proxy.dialects.adjust import (
    REQUEST_FIXES,
    ReplyFixer,
    decode_fields,
    encode_fields,
    fix_request,
)
from proxy.dialects.anthropic import MessagesReader
from proxy.dialects.anthropic_incoming import Messages
from proxy.dialects.base import Head
from proxy.dialects.openai import OpenAIReader, _as_text_reply
from proxy.dialects.openai_incoming import ChatCompletions
from proxy.errors import (
    InvalidRequest,
    UpstreamFault,
    UpstreamReported,
    UpstreamTruncated,
)
from proxy.passthrough import PassedBody, PassThrough
from tests.support import recording
from tests.support.upstream import (
    anthropic_events,
    data,
    openai_chunk,
    openai_chunks,
    tgi_chat_chunks,
    tgi_completion_chunks,
)

HEAD = Head("POST", "/", {}, {})


def chat_writer(stream=True):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    return ChatCompletions().parse(
        HEAD, json.dumps(body | {"stream": stream}).encode()
    )[1]


def subject(*, adjust=True, dialect="openai-chat", several=False, limit=10**6):
    anthropic = dialect == "anthropic"
    body = {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "x"}],
    }
    writer = Messages().parse(HEAD, json.dumps(body).encode())[1] if anthropic else None
    return PassThrough(
        MessagesReader() if anthropic else OpenAIReader(),
        writer or chat_writer(),
        dialect=dialect,
        limit_bytes=limit,
        fixer=ReplyFixer(dialect) if adjust else None,
        several=several,
    )


def run(passing: PassThrough, reads: list[bytes]) -> bytes:
    return b"".join(map(passing.receive_data, reads)) + passing.receive_eof()


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({at % (len(stream) + 1) for at in cuts}), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]


cuts = st.lists(st.integers(0, 5000), max_size=12)
CLEAN = {
    "made": b"".join(openai_chunks(["Hello", " wörld"], usage=(3, 4))),
    "comments": b": hi\n\n" + b": hi\n\n".join(openai_chunks(["a", "b"])),
    **{
        f"{server} {name}": recording.load(f"{server}/{name}").body
        for server in ("llama-server", "vllm")
        for name in ("chat_stream", "chat_stream_usage", "chat_stream_logprobs")
    },
}


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("name", CLEAN)
@given(cuts=cuts)
def test_clean_streams_keep_every_byte(name, adjust, cuts):
    stream = CLEAN[name]
    assert run(subject(adjust=adjust), cut(stream, cuts)) == stream


@given(cuts=cuts)
def test_byte_order_mark_is_taken_off(cuts):
    stream = CLEAN["vllm chat_stream"]
    assert run(subject(), cut(b"\xef\xbb\xbf" + stream, cuts)) == stream


@given(st.binary(max_size=300), cuts)
def test_any_bytes_pass_where_nothing_is_adjusted(stream, cuts):
    passing = subject(adjust=False)
    out = b"".join(map(passing.receive_data, cut(stream, cuts)))
    assert out == stream
    if stream:
        assert passing.receive_eof() == b""


@given(st.binary(max_size=300), cuts)
def test_any_bytes_raise_only_documented_errors(stream, cuts):
    passing = subject(limit=100)
    try:
        run(passing, cut(stream, cuts))
    except UpstreamFault:
        assert passing.is_ended


@pytest.mark.parametrize("server", ["llama-server", "vllm"])
def test_recorded_messages_keep_every_byte(server):
    raw = recording.load(f"{server}/messages_stream")
    passing = subject(dialect="anthropic")
    assert run(passing, [data for _, data in raw.reads]) == raw.body


def values_of(out: bytes) -> list:
    lines = [line[6:] for line in out.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def test_tgi_chunks_are_mended():
    passing = subject()
    out = run(passing, tgi_chat_chunks(["a", "b"], finish="stop_sequence"))
    values = values_of(out)
    assert {v["id"] for v in values} == {values[0]["id"]} != {""}
    assert values[-1]["choices"][0]["finish_reason"] == "stop"
    assert out.endswith(b"data: [DONE]\n\n")
    assert list(passing.adjusted()) == ["reply.id", "reply.finish_reason"]


def test_tgi_completions_are_mended():
    passing = subject(dialect="openai-completions")
    values = values_of(run(passing, tgi_completion_chunks(["a", "b"])))
    reasons = [v["choices"][0]["finish_reason"] for v in values]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_missing_done_is_added():
    passing = subject()
    stream = b"".join(openai_chunks(["a"])[:-1])
    assert run(passing, [stream]) == stream + b"data: [DONE]\n\n"
    assert list(passing.adjusted()) == ["reply.done"]


def test_data_null_is_left_out():
    passing = subject()
    stream = b"".join(openai_chunks(["a"]))
    assert run(passing, [data(None) + stream]) == stream
    assert list(passing.adjusted()) == ["reply.data"]


def test_other_line_ends_become_ours():
    stream = b"".join(openai_chunks(["a", "b"]))
    assert run(subject(), cut(stream.replace(b"\n", b"\r\n"), [50, 51, 99])) == stream


ERROR = data({"error": "boom", "error_type": "generation"})


def test_error_after_text_is_said_in_the_client_s_words():
    text = openai_chunks(["a"])[:2]
    out = run(subject(), [b"".join(text), ERROR, b"data: [DONE]\n\n"])
    assert out.startswith(b"".join(text))
    error = values_of(out)[-1]["error"]
    assert (error["message"], error["param"]) == ("generation: boom", None)
    assert b"[DONE]" not in out


def test_error_before_text_is_raised():
    with pytest.raises(UpstreamReported):
        run(subject(), [openai_chunks([])[0], ERROR])


def test_cut_stream_ends_in_an_error():
    text = b"".join(openai_chunks(["a"])[:2])
    passing = subject()
    out = run(passing, [text])
    assert out.startswith(text)
    assert "before the end" in values_of(out)[-1]["error"]["message"]
    assert isinstance(passing.error, UpstreamTruncated)


def test_cut_stream_is_watched_where_nothing_is_adjusted():
    text = b"".join(openai_chunks(["a"])[:2])
    passing = subject(adjust=False)
    assert run(passing, [text]) == text
    assert isinstance(passing.error, UpstreamTruncated)


def test_several_answers_are_not_ended_by_the_first():
    def chunk(index, delta, finish=None):
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return data({"id": "c", "choices": [choice]})

    stream = [chunk(0, {"content": "a"}), chunk(0, {}, "stop")]
    passing = subject(several=True)
    assert b"".join(map(passing.receive_data, stream)) == b"".join(stream)
    assert not passing.is_finishing()
    rest = chunk(1, {"content": "b"}) + b"data: [DONE]\n\n"
    assert passing.receive_data(rest) == rest


@pytest.mark.parametrize("end", ["eof", "failure"])
def test_several_answers_cut_after_the_first_are_an_error(end):
    choices = [
        {"index": 0, "delta": {"content": "a"}},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
        {"index": 1, "delta": {"content": "b"}},
    ]
    passing = subject(several=True)
    out = b"".join(passing.receive_data(data({"choices": [c]})) for c in choices)
    if end == "eof":
        out += passing.receive_eof()
    else:
        out += passing.receive_failure(UpstreamTruncated("cut"))
    assert "error" in values_of(out)[-1] and b"[DONE]" not in out


def test_anthropic_error_of_another_shape_gets_the_envelope():
    events = anthropic_events(["a"])
    passing = subject(dialect="anthropic")
    out = run(
        passing,
        [
            b"".join(events[:4]),
            b'event: error\ndata: {"code":500,"message":"m","type":"t"}\n\n',
        ],
    )
    last = out.rpartition(b"event: error\ndata: ")[2]
    assert json.loads(last)["type"] == "error"
    assert "m" in json.loads(last)["error"]["message"]


# ------------------------------------------------------------------------------ bodies


def body(adjust=True, dialect="openai-chat") -> PassedBody:
    return PassedBody(
        OpenAIReader(),
        dialect=dialect if adjust else "",
        limit_bytes=10**6,
    )


def test_clean_body_keeps_every_byte():
    raw = recording.load("vllm/chat_nonstream").body
    passing = body()
    assert passing.receive_data(raw[:100]) + passing.receive_data(raw[100:]) == b""
    assert passing.receive_eof() == raw
    assert list(passing.adjusted()) == []


def test_body_is_mended():
    passing = body()
    reply = {"id": "", "choices": [{"text": "a", "finish_reason": "eos_token"}]}
    passing.receive_data(json.dumps(reply).encode())
    fixed = json.loads(passing.receive_eof())
    assert fixed["id"] and fixed["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "is_text"),
    [
        ({}, True),
        ({"id": ""}, False),
        ({"error": "x"}, False),
        ({"message": {"content": "a", "tool_calls": []}}, True),
        ({"message": {"content": "a", "tool_calls": [{}]}}, False),
        ({"message": {"content": None}}, False),
        ({"message": {"content": "a", "refusal": "b"}}, False),
        ({"message": None, "text": "a"}, True),
        ({"text": None}, True),
        ({"text": "a"}, False),
        ({"message": None}, False),
        ({"delta": {"content": "b"}}, False),
        ({"finish_reason": "eos_token"}, False),
        ({"finish_reason": "tool_calls"}, False),
        ({"index": 1}, False),
        ({"usage": {"prompt_tokens": "1"}}, False),
    ],
)
def test_bodies_of_text_alone_are_known_to_be_clean(change, is_text):
    reply = {"id": "x", "model": "m", "usage": {"prompt_tokens": 1}}
    choice = {"message": {"content": "a"}, "finish_reason": "stop"}
    for field, value in change.items():
        (reply if field in ("id", "error", "usage") else choice)[field] = value
    body = json.dumps(reply | {"choices": [choice]}).encode()
    assert (_as_text_reply(body) is not None) == is_text
    if is_text:
        # It is read as any other one: what stops the short way here means nothing.
        longer = json.dumps(reply | {"choices": [choice], "error": ""}).encode()
        short, long = OpenAIReader(), OpenAIReader()
        assert short.check_body(body) and not long.check_body(longer)
        assert ReplyFixer("openai-chat").fix(body.decode()) == body.decode()
        assert short.read_body(body) == long.read_body(longer)
        assert short.usage == long.usage
        for reader in (short, long):
            assert (reader.model, reader.understood) == ("m", True)
            assert reader.finished and reader.ended


def test_body_that_is_not_utf8_is_left_as_it_is():
    passing = body()
    reply = b'{"id":"","choices":[{"text":"\xff","finish_reason":"stop"}]}'
    passing.receive_data(reply)
    assert passing.receive_eof() == reply


def test_error_in_a_body_of_status_200():
    passing = body()
    passing.receive_data(b'{"error":"no model loaded"}')
    with pytest.raises(UpstreamReported):
        passing.receive_eof()
    passing = body(adjust=False)
    passing.receive_data(b'{"error":"no model loaded"}')
    assert passing.receive_eof() == b'{"error":"no model loaded"}'


# ---------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("profile", "given", "fixed", "names"),
    [
        ("tgi", '{"top_p":1}', "{}", ["request.top_p"]),
        ("tgi", '{"top_p":0.0}', "{}", ["request.top_p"]),
        ("tgi", '{"top_p":1%s}' % ("0" * 400), "{}", ["request.top_p"]),
        ("tgi", '{"top_p":-1%s}' % ("0" * 400), "{}", ["request.top_p"]),
        ("tgi", '{"top_p":0.90}', '{"top_p":0.90}', []),
        ("tgi", '{"presence_penalty":0}', "{}", ["request.presence_penalty"]),
        ("tgi", '{"presence_penalty":0.5}', "{}", ["request.presence_penalty"]),
        ("tgi", '{"stop":"x"}', '{"stop":["x"]}', ["request.stop"]),
        ("tgi", '{"stop":["x"]}', '{"stop":["x"]}', []),
        ("tgi", '{"stream":null}', "{}", ["request.stream"]),
        ("tgi", '{"stream_options":null}', "{}", ["request.stream_options"]),
        ("tgi", '{"logit_bias":{"1":2}}', "{}", ["request.logit_bias"]),
        (
            "tgi",
            '{"max_completion_tokens":5}',
            '{"max_tokens":5}',
            ["request.max_tokens"],
        ),
        (
            "tgi",
            '{"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"a":1}}}}',
            '{"response_format":{"type":"json","value":{"a":1}}}',
            ["request.response_format"],
        ),
        (
            "tgi",
            '{"response_format":{"type":"json_object"}}',
            '{"response_format":{"type":"json","value":'
            '{"type":"object","properties":{}}}}',
            ["request.response_format"],
        ),
        (
            "tgi",
            '{"response_format":{"type":"text"}}',
            "{}",
            ["request.response_format"],
        ),
        (
            "tgi",
            '{"messages":[{"role":"user","content":null}]}',
            '{"messages":[{"role":"user","content":""}]}',
            ["request.messages"],
        ),
        (
            "tgi",
            '{"messages":[{"content":null,"tool_calls":[1]}]}',
            '{"messages":[{"content":null,"tool_calls":[1]}]}',
            [],
        ),
        ("vllm", '{"top_p":1,"stop":"x"}', '{"top_p":1,"stop":"x"}', []),
        ("openai", '{"stream":null}', '{"stream":null}', []),
        (
            "anthropic",
            '{"messages":[{"role":"system","content":"s"},{"role":"user"}]}',
            '{"messages":[{"role":"user"}],"system":"s"}',
            ["request.system"],
        ),
        ("ollama", '{"tools":null}', "{}", ["request.tools"]),
    ],
)
def test_request_fixes(profile, given, fixed, names):
    fields = decode_fields(given.encode())
    assert fix_request(REQUEST_FIXES[profile], fields) == names
    assert encode_fields(fields).decode() == fixed


numbers = st.sampled_from(
    ["1", "1.0", "1e5", "0.10", "-0", "1E-7", "123456789012345678901"]
)
values = st.one_of(numbers, st.text(max_size=5).map(json.dumps), st.just("[1, 2.50]"))
names = st.text("abcxyz_", min_size=1, max_size=8)


@given(st.dictionaries(names, values, max_size=6))
def test_what_is_not_fixed_keeps_its_bytes(fields):
    body = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
    decoded = decode_fields(body.encode())
    fix_request(REQUEST_FIXES["tgi"], decoded)
    assert encode_fields(decoded) == body.encode()


def test_fields_must_be_an_object():
    for body in (b"[1]", b'{"\xff":1}', b"", b'{"a":' * 5000):
        with pytest.raises(InvalidRequest) as caught:
            decode_fields(body)
        assert caught.value.message.startswith("could not decode request body: ")


def test_openai_chunk_helper_has_an_id():
    assert b'"id":"chatcmpl-1"' in openai_chunk({"content": "x"}).replace(b": ", b":")


def test_tgi_tool_calls_are_mended():
    function = {"name": "f", "arguments": {"a": 1}}
    call = {"index": 0, "id": "0", "function": function}
    passing = subject()
    stream = openai_chunk({"tool_calls": call}) + b"data: [DONE]\n\n"
    first, last = values_of(run(passing, [stream]))
    assert first["choices"][0]["delta"]["tool_calls"] == [
        call | {"function": {"name": "f", "arguments": '{"a":1}'}}
    ]
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert list(passing.adjusted()) == ["reply.tool_calls", "reply.finish_reason"]
    message = {"message": {"tool_calls": [call]}, "finish_reason": "stop"}
    whole = body()
    whole.receive_data(
        json.dumps({"id": "x", "choices": [message]}, separators=(",", ":")).encode()
    )
    choice = json.loads(whole.receive_eof())["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a":1}'
    assert choice["finish_reason"] == "tool_calls"
