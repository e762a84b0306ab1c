"""Anthropic's dialect as clients speak it: requests parsed, replies worded."""

import json

import anthropic
import pytest
from aiohttp import web
from anthropic.types import Message as SdkMessage, RawMessageStreamEvent
from hypothesis import example, given, strategies as st
from pydantic import TypeAdapter

from proxy.completion import (
    Delta,
    Finish,
    ImagePart,
    Message,
    Start,
    Text,
    TextPart,
    Thinking,
    Tool,
    ToolCall,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from proxy.dialects.anthropic import MessagesReader
from proxy.dialects.anthropic_incoming import Complete, Messages
from proxy.dialects.base import Head, Incoming
from proxy.errors import (
    DeadlineExceeded,
    InvalidPrompt,
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    ProxyError,
    Unauthorized,
    UnknownModel,
    UpstreamReported,
    UpstreamStatus,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.sse import Parser

INCOMING: dict[str, Incoming] = {"messages": Messages(), "complete": Complete()}


def parse(path: str, body: object, version: str = "2023-06-01"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = Head("POST", "/", {}, {"anthropic-version": version})
    return INCOMING[path].parse(head, data)


def messages(**fields):
    hello = [{"role": "user", "content": "Hello"}]
    body = {"model": "large", "max_tokens": 100, "messages": hello} | fields
    return parse("messages", body)[0]


def complete(prompt: str, **fields):
    return parse("complete", {"prompt": prompt, "max_tokens_to_sample": 100} | fields)[
        0
    ]


def turns_of(request) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in request.messages]


def parts_of(*blocks: dict):
    return messages(messages=[{"role": "user", "content": blocks}]).messages[0].parts


# ------------------------------------------------------------------ requests: messages


def test_messages_takes_what_clients_send():
    request = messages(
        model=" claude-sonnet ",
        system="Be brief.",
        stream=True,
        temperature=0,
        top_p=0.5,
        top_k=40,
        stop_sequences=["\n\n", "", "END", "END"],
        metadata={"user_id": "u"},
        service_tier="auto",
        something_new=[1],
    )
    assert request.feature == "chat"
    assert request.model == "claude-sonnet"
    assert turns_of(request) == [("system", "Be brief."), ("user", "Hello")]
    assert request.stream is True
    assert (request.max_tokens, request.temperature) == (100, 0)
    assert (request.top_p, request.top_k) == (0.5, 40)
    assert request.stop == ["\n\n", "END"]
    assert request.dropped == []


def test_messages_leaves_unset_what_is_not_said():
    request = messages()
    assert request.stream is False
    assert (request.temperature, request.top_p, request.top_k) == (None, None, None)
    assert (request.stop, request.tools, request.tool_choice) == ([], [], None)
    assert request.reasoning_effort is None


@pytest.mark.parametrize(
    "field",
    [{"top_p": 1}, {"top_p": -1}, {"top_k": -1}, {"top_k": 0}, {"temperature": -1}],
)
def test_sampling_outside_its_range_is_unset(field):
    request = messages(**field)
    assert (request.temperature, request.top_p, request.top_k) == (None, None, None)


HI = {"role": "user", "content": "Hi"}
SYSTEMS = [
    ({"system": "a"}, [TextPart("a")]),
    ({"system": [{"type": "text", "text": "a"}]}, [TextPart("a")]),
    (
        {
            "system": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b"},
            ]
        },
        [TextPart("a", cached=True), TextPart("b")],
    ),
    ({"messages": [{"role": "system", "content": "a"}, HI]}, [TextPart("a")]),
    (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, HI]},
        [TextPart("a"), TextPart("b")],
    ),
]


@pytest.mark.parametrize(("fields", "parts"), SYSTEMS)
def test_system_prompt_is_the_first_message(fields, parts):
    request = messages(**fields)
    assert request.messages[0] == Message("system", parts)
    assert [message.role for message in request.messages] == ["system", "user"]


@pytest.mark.parametrize("system", ["", [], None, [{"type": "text", "text": ""}]])
def test_empty_system_prompt_is_none(system):
    assert turns_of(messages(system=system)) == [("user", "Hello")]


BLOCKS = [
    ({"type": "text", "text": "a"}, [TextPart("a")]),
    (
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        [TextPart("a", cached=True)],
    ),
    (
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
        },
        [ImagePart("data:image/png;base64,AA==")],
    ),
    (
        {"type": "image", "source": {"type": "url", "url": "https://a.example/b"}},
        [ImagePart("https://a.example/b")],
    ),
    (
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1, "é"]}},
        [ToolCallPart("t1", "f", '{"a":[1,"é"]}')],
    ),
    (
        {"type": "tool_result", "tool_use_id": "t1", "content": "42"},
        [ToolResultPart("t1", "42")],
    ),
    (
        {
            "type": "tool_result",
            "tool_use_id": "t1",
            "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}],
        },
        [ToolResultPart("t1", "42")],
    ),
    ({"type": "tool_result", "tool_use_id": "t1"}, [ToolResultPart("t1", "")]),
    (
        {
            "type": "tool_result",
            "tool_use_id": "t1",
            "content": "no file",
            "is_error": True,
        },
        [ToolResultPart("t1", "Error: no file")],
    ),
    ({"type": "thinking", "thinking": "hm", "signature": "x"}, []),
    ({"type": "redacted_thinking", "data": "x"}, []),
]


@pytest.mark.parametrize(("block", "parts"), BLOCKS)
def test_blocks_of_every_kind(block, parts):
    assert parts_of(block, {"type": "text", "text": "end"}) == [*parts, TextPart("end")]


def test_message_of_nothing_but_thinking_is_no_message():
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}
    request = messages(messages=[HI, thought, HI])
    assert turns_of(request) == [("user", "Hi"), ("user", "Hi")]


def test_empty_answer_at_the_end_is_dropped_and_a_prefill_is_kept():
    empty, prefill = (
        {"role": "assistant", "content": content} for content in ("", "Roses")
    )
    assert turns_of(messages(messages=[HI, empty])) == [("user", "Hi")]
    assert turns_of(messages(messages=[HI, prefill]))[1:] == [("assistant", "Roses")]


THINKING = [
    ({"type": "enabled", "budget_tokens": 1024}, "low"),
    ({"type": "enabled", "budget_tokens": 1025}, "high"),
    ({"type": "disabled"}, None),
    (None, None),
]


@pytest.mark.parametrize(("thinking", "effort"), THINKING)
def test_thinking_is_an_effort(thinking, effort):
    request = messages(thinking=thinking)
    assert (request.reasoning_effort, request.dropped) == (effort, [])


SCHEMA: dict[str, object] = {"type": "object", "properties": {"tz": {"type": "string"}}}
CLOCK = {"name": "clock", "description": "Tells it.", "input_schema": SCHEMA}


def test_tools_become_tools():
    request = messages(tools=[CLOCK, {"type": "custom", "name": "noop"}])
    assert request.tools == [Tool("clock", "Tells it.", SCHEMA), Tool("noop")]
    assert request.dropped == []


CHOICES = [
    ({"type": "auto"}, "auto"),
    ({"type": "any"}, "required"),
    ({"type": "none"}, "none"),
    ({"type": "tool", "name": "clock"}, "clock"),
]


@pytest.mark.parametrize(("choice", "expected"), CHOICES)
def test_tool_choice(choice, expected):
    request = messages(tools=[CLOCK], tool_choice=choice)
    assert (request.tool_choice, request.dropped) == (expected, [])


SEARCH = {"type": "web_search_20250305", "name": "web_search"}
DROPPED = [
    ({"tools": [SEARCH, CLOCK]}, ["tools.web_search_20250305"]),
    (
        {"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}},
        ["tools.web_search_20250305", "tool_choice"],
    ),
    (
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ["tool_choice.disable_parallel_tool_use"],
    ),
    (
        {"mcp_servers": [{"name": "m"}], "container": "c"},
        ["container", "mcp_servers"],
    ),
    ({"mcp_servers": [], "container": None}, []),
    ({"thinking": {"type": "adaptive"}}, ["thinking"]),
    ({"output_config": {"effort": "low"}}, ["output_config"]),
]


@pytest.mark.parametrize(("fields", "dropped"), DROPPED)
def test_what_cannot_be_said_is_named(fields, dropped):
    assert messages(**fields).dropped == dropped


def body_with(**fields) -> dict:
    return {"max_tokens": 1, "messages": [HI]} | fields


def body_of(*blocks: dict) -> dict:
    return body_with(messages=[HI, {"role": "user", "content": blocks}])


BAD_MESSAGES = [
    (b"", "request body: not valid JSON: Input data was truncated"),
    (
        b'{"max_tokens":1,"messages":[]} x',
        "request body: not valid JSON: JSON is malformed: trailing characters",
    ),
    (b'{"model":"\xff"}', "request body: not valid JSON: 'utf-8' codec can't decode"),
    (b"[" * 100_000, "request body: "),
    (
        b'{"max_tokens":1,"messages":[],"tools":[{"name":"f","input_schema":'
        + b'{"a":' * 100_000,
        "request body: nested too deeply",
    ),
    (b"[]", "request body: Expected `object`, got `array`"),
    ({"messages": []}, "max_tokens: Field required"),
    ({"max_tokens": 1}, "messages: Field required"),
    (body_with(max_tokens="1"), "max_tokens: Expected `int`, got `str`"),
    (body_with(max_tokens=0), "max_tokens: Expected `int` >= 1"),
    (
        body_with(temperature="hot"),
        "temperature: Expected `float | null`, got `str`",
    ),
    (
        body_with(stop_sequences=["a", 7]),
        "stop_sequences.1: Expected `str`, got `int`",
    ),
    (
        body_with(messages=[{"role": "user", "content": 7}]),
        "messages.0.content: Expected `str | array`, got `int`",
    ),
    (body_with(messages=[{"role": "user"}]), "messages.0.content: Field required"),
    (
        body_with(messages=[{"role": "robot", "content": ""}]),
        "messages.0.role: 'robot' is not supported",
    ),
    (
        body_with(messages=[HI, {"role": "system", "content": "x"}]),
        "messages.1.role: 'system' is only for the first message",
    ),
    (
        body_of({"type": "text", "text": "a"}, {"type": "document", "source": {}}),
        "messages.1.content.1.type: 'document' is not supported",
    ),
    (body_of({"text": "a"}), "messages.1.content.0.type: Field required"),
    (body_of({"type": "text"}), "messages.1.content.0.text: Field required"),
    (
        body_of({"type": "image", "source": {"type": "file", "file_id": "f"}}),
        "messages.1.content.0.source.type: 'file' is not supported",
    ),
    (
        body_of({"type": "tool_use", "id": "1", "name": "f", "input": "x"}),
        "messages.1.content.0.input: Expected `object`, got `str`",
    ),
    (
        body_of(
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}
        ),
        "messages.1.content.0.content.0.type: 'image' is not supported",
    ),
    (
        body_with(system=[{"type": "image"}]),
        "system.0.type: 'image' is not supported",
    ),
    (body_with(tools=[{"description": "x"}]), "tools.0.name: Field required"),
    (
        body_with(tools=[{"name": "f", "input_schema": []}]),
        "tools.0.input_schema: Expected `object | null`, got `array`",
    ),
    (
        body_with(tool_choice={"type": "some"}),
        "tool_choice.type: 'some' is not supported",
    ),
    (body_with(tool_choice={"type": "tool"}), "tool_choice.name: Field required"),
    (
        body_with(thinking={"type": "enabled"}),
        "thinking.budget_tokens: Field required",
    ),
]


@pytest.mark.parametrize(("body", "text"), BAD_MESSAGES)
def test_bad_messages_are_named(body, text):
    with pytest.raises(InvalidRequest) as caught:
        parse("messages", body)
    assert caught.value.message.startswith(text)
    assert caught.value.status == 400


# ------------------------------------------------------------------ requests: complete

PROMPTS = [
    ("\n\nHuman: Hi\n\nAssistant:", [("user", "Hi")]),
    ("\n\nHuman: Hi\n\nAssistant: ", [("user", "Hi")]),
    (
        "\n\nHuman: Hi\n\nAssistant: Roses are",
        [("user", "Hi"), ("assistant", "Roses are")],
    ),
    (
        "Be brief.\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:",
        [
            ("system", "Be brief."),
            ("user", "a\n\nb"),
            ("assistant", "c"),
            ("user", "d"),
        ],
    ),
    ("Human: Hi\n\nAssistant:", [("user", "Hi")]),
    ("\n\nHuman:   indented", [("user", "  indented")]),
    ("\n\nHuman: Who is\nHuman: ?", [("user", "Who is\nHuman: ?")]),
    ("once upon a time", [("user", "once upon a time")]),
]


@pytest.mark.parametrize(("prompt", "expected"), PROMPTS)
def test_prompt_is_split_into_turns(prompt, expected):
    assert turns_of(complete(prompt)) == expected


def test_complete_takes_what_clients_send():
    request = complete(
        "\n\nHuman: Hi\n\nAssistant:",
        model="claude-2",
        stream=True,
        stop_sequences=["\n\nHuman:"],
        temperature=0.2,
        top_k=-1,
        top_p=-1,
        metadata={"user_id": "u"},
    )
    assert (request.model, request.stream) == ("claude-2", True)
    assert (request.max_tokens, request.temperature) == (100, 0.2)
    assert (request.top_k, request.top_p) == (None, None)
    assert request.stop == ["\n\nHuman:"]


BAD_COMPLETE = [
    (b"", "request body: not valid JSON: "),
    ({"max_tokens_to_sample": 1}, "prompt: Field required"),
    ({"prompt": "a"}, "max_tokens_to_sample: Field required"),
    (
        {"prompt": 1, "max_tokens_to_sample": 1},
        "prompt: Expected `str`, got `int`",
    ),
]


@pytest.mark.parametrize(("body", "text"), BAD_COMPLETE)
def test_bad_complete_requests_are_named(body, text):
    with pytest.raises(InvalidRequest) as caught:
        parse("complete", body)
    assert caught.value.message.startswith(text)


@pytest.mark.parametrize("path", INCOMING)
def test_method_other_than_post(path):
    error = MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
    reply = INCOMING[path].error_reply(error)
    assert (reply.status, reply.headers) == (405, {"Allow": "POST"})


@pytest.mark.parametrize("path", INCOMING)
def test_nothing_else_is_checked(path):
    INCOMING[path].check(Head("POST", "/", {}, {}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
TYPES = "text image tool_use tool_result thinking base64 url enabled tool user custom"
BLOCK_KEYS = [
    "text",
    "source",
    "input",
    "id",
    "name",
    "tool_use_id",
    "content",
    "is_error",
]
FIELDS = [
    "model",
    "system",
    "tools",
    "tool_choice",
    "thinking",
    "stream",
    "stop_sequences",
    "top_p",
    "top_k",
    "temperature",
    "container",
]
KEYS = ["type", "role", "media_type", "data", "budget_tokens", *BLOCK_KEYS, *FIELDS]
plausible = st.recursive(
    json_values | st.sampled_from(TYPES.split()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=12,
)
requests = st.fixed_dictionaries(
    {
        "max_tokens": st.just(1),
        "messages": st.just([HI]) | plausible,
        "max_tokens_to_sample": st.just(1),
        "prompt": st.text(max_size=20) | st.sampled_from([p for p, _ in PROMPTS]),
    },
    optional=dict.fromkeys(FIELDS, plausible),
)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(TYPES.split())},
    optional=dict.fromkeys(BLOCK_KEYS, plausible),
)


@pytest.mark.parametrize("path", INCOMING)
@given(
    body=st.binary(max_size=60)
    | (plausible | requests | blocks.map(body_of)).map(json.dumps).map(str.encode)
)
def test_random_bodies_raise_only_what_is_documented(path, body):
    try:
        parse(path, body)
    except InvalidRequest as error:
        assert error.message


# ------------------------------------------------------------------- replies: messages


def writer_of(path: str, version: str = "2023-06-01"):
    body = {"model": "asked", "max_tokens": 1, "messages": []}
    return parse(path, body | {"prompt": "", "max_tokens_to_sample": 1}, version)[1]


def stream(deltas, path="messages", version="2023-06-01"):
    writer = writer_of(path, version)
    return writer.frames(deltas) + writer.end()


def events_of(data: bytes) -> list:
    return Parser().feed(data)


def payloads(data: bytes) -> list[dict]:
    events = events_of(data)
    found = [json.loads(event.data) for event in events]
    assert [event.type for event in events] == [payload["type"] for payload in found]
    return found


DELTAS = [
    Start("msg_1", "large-1"),
    Text("Hello"),
    Text(" wörld"),
    Finish("stop"),
    Usage(3, 5),
]


def test_message_frames_byte_for_byte():
    assert stream(DELTAS) == (
        b"event: message_start\n"
        b'data: {"type":"message_start","message":{"id":"msg_1","type":"message",'
        b'"role":"assistant","model":"large-1","content":[],"stop_reason":null,'
        b'"stop_sequence":null,"usage":{"input_tokens":0,"output_tokens":0}}}\n\n'
        b"event: content_block_start\n"
        b'data: {"type":"content_block_start","index":0,'
        b'"content_block":{"type":"text","text":""}}\n\n'
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"Hello"}}\n\n'
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":" w\\u00f6rld"}}\n\n'
        b"event: content_block_stop\n"
        b'data: {"type":"content_block_stop","index":0}\n\n'
        b"event: message_delta\n"
        b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn",'
        b'"stop_sequence":null},"usage":{"input_tokens":3,"output_tokens":5}}\n\n'
        b"event: message_stop\n"
        b'data: {"type":"message_stop"}\n\n'
    )


def test_reads_do_not_change_the_frames():
    writer = writer_of("messages")
    pieces = [writer.frames([delta]) for delta in DELTAS]
    assert b"".join(pieces) + writer.end() == stream(DELTAS)


def test_nothing_is_said_before_the_first_content_nor_at_the_finish():
    writer = writer_of("messages")
    assert writer.frames([Start("id", "m"), Text(""), Thinking("")]) == b""
    assert writer.frames([Finish("stop"), Usage(1, 2)]) == b""


MIXED = [
    Start("msg_1", "large-1"),
    Thinking("h"),
    Thinking("m"),
    Text("It "),
    ToolCall(0, "call_1", "clock", '{"tz":'),
    ToolCall(0, "call_1", "clock", '"UTC"}'),
    ToolCall(1, "call_2", "noop", ""),
    Text("is"),
    Finish("stop"),
    Usage(10, 20, 4),
]


def blocks_of(data: bytes) -> list[tuple]:
    """The events between the first and the last two, short."""
    shown: list[tuple] = []
    for payload in payloads(data)[1:-2]:
        kind = payload["type"].removeprefix("content_block_")
        value = payload.get("content_block") or payload.get("delta")
        shown.append((kind, payload["index"], *([value] if value else [])))
    return shown


def test_blocks_alternate_with_their_indexes():
    assert blocks_of(stream(MIXED)) == [
        ("start", 0, {"type": "thinking", "thinking": "", "signature": ""}),
        ("delta", 0, {"type": "thinking_delta", "thinking": "h"}),
        ("delta", 0, {"type": "thinking_delta", "thinking": "m"}),
        ("stop", 0),
        ("start", 1, {"type": "text", "text": ""}),
        ("delta", 1, {"type": "text_delta", "text": "It "}),
        ("stop", 1),
        (
            "start",
            2,
            {"type": "tool_use", "id": "call_1", "name": "clock", "input": {}},
        ),
        ("delta", 2, {"type": "input_json_delta", "partial_json": '{"tz":'}),
        ("delta", 2, {"type": "input_json_delta", "partial_json": '"UTC"}'}),
        ("stop", 2),
        (
            "start",
            3,
            {"type": "tool_use", "id": "call_2", "name": "noop", "input": {}},
        ),
        ("stop", 3),
        ("start", 4, {"type": "text", "text": ""}),
        ("delta", 4, {"type": "text_delta", "text": "is"}),
        ("stop", 4),
    ]


def test_cached_tokens_are_no_part_of_the_input():
    usage = {
        "input_tokens": 6,
        "cache_read_input_tokens": 4,
        "output_tokens": 20,
    }
    assert payloads(stream(MIXED))[-2]["usage"] == usage


def test_message_without_content():
    types = [payload["type"] for payload in payloads(stream([Finish("stop")]))]
    assert types == ["message_start", "message_delta", "message_stop"]


def test_missing_names_are_made_up():
    message = payloads(stream([Start("", ""), Text("a")]))[0]["message"]
    assert message["id"].startswith("msg_")
    assert message["model"] == "asked"


CALL = ToolCall(0, "1", "f", "{}")
REASONS = [
    ("end_turn", "end_turn", "stop_sequence"),
    ("stop", "end_turn", "stop_sequence"),
    ("eos_token", "end_turn", "stop_sequence"),
    ("STOP", "end_turn", "stop_sequence"),
    ("", "end_turn", "stop_sequence"),
    ("who knows", "end_turn", "stop_sequence"),
    ("length", "max_tokens", "max_tokens"),
    ("max_tokens", "max_tokens", "max_tokens"),
    ("MAX_TOKENS", "max_tokens", "max_tokens"),
    ("model_context_window_exceeded", "model_context_window_exceeded", "max_tokens"),
    ("stop_sequence", "stop_sequence", "stop_sequence"),
    ("tool_calls", "tool_use", "stop_sequence"),
    ("function_call", "tool_use", "stop_sequence"),
    ("tool_use", "tool_use", "stop_sequence"),
    ("pause_turn", "pause_turn", "stop_sequence"),
    ("refusal", "refusal", "stop_sequence"),
    ("content_filter", "refusal", "stop_sequence"),
    ("SAFETY", "refusal", "stop_sequence"),
]


@pytest.mark.parametrize(("word", "reason", "old"), REASONS)
def test_stop_reasons_are_worded_as_clients_know_them(word, reason, old):
    deltas = [Text("a"), Finish(word)]
    assert payloads(stream(deltas))[-2]["delta"]["stop_reason"] == reason
    assert json.loads(writer_of("messages").body(deltas))["stop_reason"] == reason
    assert payloads(stream(deltas, "complete"))[-1]["stop_reason"] == old
    assert json.loads(writer_of("complete").body(deltas))["stop_reason"] == old


@pytest.mark.parametrize(
    ("word", "reason"),
    [("stop", "tool_use"), ("eos_token", "tool_use"), ("length", "max_tokens")],
)
def test_reply_with_a_call_ends_for_its_sake(word, reason):
    deltas = [CALL, Finish(word)]
    assert payloads(stream(deltas))[-2]["delta"]["stop_reason"] == reason
    assert json.loads(writer_of("messages").body(deltas))["stop_reason"] == reason


def test_message_body_byte_for_byte():
    assert writer_of("messages").body(DELTAS) == (
        b'{"id":"msg_1","type":"message","role":"assistant","model":"large-1",'
        b'"content":[{"type":"text","text":"Hello w\\u00f6rld"}],'
        b'"stop_reason":"end_turn","stop_sequence":null,'
        b'"usage":{"input_tokens":3,"output_tokens":5}}'
    )


def test_message_body_has_its_blocks_in_order():
    body = json.loads(writer_of("messages").body(MIXED))
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "It "},
        {"type": "tool_use", "id": "call_1", "name": "clock", "input": {"tz": "UTC"}},
        {"type": "tool_use", "id": "call_2", "name": "noop", "input": {}},
        {"type": "text", "text": "is"},
    ]
    assert body["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "arguments", ["", "{", "[1]", "7", '{"a":NaN}', '{"a":1e999}', '{"a":' * 100_000]
)
def test_arguments_that_are_no_object_are_an_empty_one(arguments):
    body = json.loads(writer_of("messages").body([ToolCall(0, "1", "f", arguments)]))
    assert body["content"][0]["input"] == {}


def test_stream_headers():
    assert writer_of("messages").stream_headers == {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }


texts = st.text(st.characters(exclude_categories=()), max_size=8)  # surrogates too


@given(st.lists(texts, max_size=8))
@example(["\ud800", "\udc00", "\u2028\r\n\x00"])
def test_any_text_survives(pieces):
    deltas = [Text(piece) for piece in pieces]
    shown = [
        payload["delta"]["text"]
        for payload in payloads(stream(deltas))
        if payload["type"] == "content_block_delta"
    ]
    assert "".join(shown) == "".join(pieces)
    completions = [p["completion"] for p in payloads(stream(deltas, "complete"))]
    assert "".join(completions) == "".join(pieces)
    content = json.loads(writer_of("messages").body(deltas))["content"]
    # Two halves of a character, one in each piece, have become one.
    joined = json.loads(json.dumps("".join(pieces)))
    assert "".join(block["text"] for block in content) == joined


names = st.text(min_size=1, max_size=4)
calls = st.builds(
    lambda index, arguments: ToolCall(index, f"call_{index}", "f", arguments),
    st.integers(0, 2),
    st.text(max_size=4),
)
contents = st.one_of(
    st.builds(Text, st.text(max_size=4)),
    st.builds(Thinking, st.text(max_size=4)),
    calls,
)
usages = st.builds(
    lambda fresh, out, cached: Usage(fresh + (cached or 0), out, cached),
    st.integers(0, 99),
    st.integers(0, 99),
    st.none() | st.integers(0, 9),
)
replies = st.tuples(
    st.builds(Start, names, names),
    st.lists(contents, max_size=8),
    st.sampled_from(["end_turn", "max_tokens", "stop_sequence", "refusal"]),
    usages,
)


def said(deltas) -> dict:
    """What a reply says, however it is cut into deltas."""
    called: dict[int, str] = {}
    order: dict[int, int] = {}
    for delta in deltas:
        if isinstance(delta, ToolCall):
            number = order.setdefault(delta.index, len(order))
            called[number] = called.get(number, "") + delta.arguments
    return {
        "start": [delta for delta in deltas if isinstance(delta, Start)],
        "text": "".join(delta.text for delta in deltas if isinstance(delta, Text)),
        "thinking": "".join(d.text for d in deltas if isinstance(d, Thinking)),
        "calls": called,
        "names": {(d.id, d.name) for d in deltas if isinstance(d, ToolCall)},
        "usage": [delta for delta in deltas if isinstance(delta, Usage)],
    }


@given(replies)
def test_upstream_half_reads_what_this_half_writes(reply):
    start, content, reason, usage = reply
    deltas = [start, *content, Finish(reason), usage]
    reader = MessagesReader()
    found: list[Delta] = []
    for event in events_of(stream(deltas)):
        reader.read(event, found)
    reader.eof()
    assert reader.ended
    assert said([*found, reader.usage]) == said(deltas)
    is_call = any(isinstance(delta, ToolCall) for delta in content)
    expected = "tool_use" if is_call and reason == "end_turn" else reason
    assert [d for d in found if isinstance(d, Finish)] == [Finish(expected)]

    reader = MessagesReader()
    found = reader.read_body(writer_of("messages").body(deltas))
    whole = said([*found, reader.usage])
    assert whole | {"calls": 0} == said(deltas) | {"calls": 0}


sdk_event = TypeAdapter(RawMessageStreamEvent)
sdk_message = TypeAdapter(SdkMessage)


@pytest.mark.parametrize("deltas", [DELTAS, MIXED, [Finish("")]])
def test_official_types_take_what_is_written(deltas):
    for payload in payloads(stream(deltas)):
        sdk_event.validate_python(payload)
    sdk_message.validate_json(writer_of("messages").body(deltas))


# ------------------------------------------------------------------- replies: complete


def test_completion_frames_byte_for_byte():
    assert stream(DELTAS, "complete") == (
        b"event: completion\n"
        b'data: {"type":"completion","id":"msg_1","completion":"Hello",'
        b'"stop_reason":null,"model":"large-1"}\n\n'
        b"event: completion\n"
        b'data: {"type":"completion","id":"msg_1","completion":" w\\u00f6rld",'
        b'"stop_reason":null,"model":"large-1"}\n\n'
        b"event: completion\n"
        b'data: {"type":"completion","id":"msg_1","completion":"",'
        b'"stop_reason":"stop_sequence","model":"large-1"}\n\n'
    )


def test_first_version_repeats_the_whole_text():
    shown = payloads(stream(DELTAS, "complete", "2023-01-01"))
    assert [payload["completion"] for payload in shown] == [
        "Hello",
        "Hello wörld",
        "Hello wörld",
    ]
    assert [p["stop_reason"] for p in shown] == [None, None, "stop_sequence"]


def test_completions_know_neither_thinking_nor_tools():
    shown = payloads(stream(MIXED, "complete"))
    assert [payload["completion"] for payload in shown] == ["It ", "is", ""]


def test_missing_id_of_a_completion_stays_the_same():
    shown = payloads(stream([Text("a"), Text("b")], "complete"))
    assert len({payload["id"] for payload in shown}) == 1
    assert shown[0]["id"].startswith("compl_")
    assert shown[0]["model"] == "asked"


def test_completion_body_byte_for_byte():
    assert writer_of("complete").body(DELTAS) == (
        b'{"type":"completion","completion":"Hello w\\u00f6rld",'
        b'"stop_reason":"stop_sequence","model":"large-1","id":"msg_1"}'
    )


# ----------------------------------------------------------------------------- errors


def status(code: int, body: str, **headers: str) -> UpstreamStatus:
    return UpstreamStatus("Anthropic", code, body, headers=headers)


def said_to_client(error: ProxyError) -> ProxyError:
    error.is_clients_credential = True  # type: ignore[attr-defined]
    return error


OVERLOADED = (
    '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
)
FAILURES = [
    # error, status, type, message, exception of the official client
    (InvalidRequest("a: b"), 400, "invalid_request_error", "a: b", "BadRequestError"),
    (InvalidPrompt("empty"), 400, "invalid_request_error", "empty", "BadRequestError"),
    (Unauthorized("who?"), 401, "authentication_error", "who?", "AuthenticationError"),
    (UnknownModel("model: x"), 404, "not_found_error", "model: x", "NotFoundError"),
    (PayloadTooLarge("big"), 413, "request_too_large", "big", "APIStatusError"),
    (
        status(400, '{"error":{"message":"prompt is too long","type":"x"}}'),
        400,
        "invalid_request_error",
        "prompt is too long",
        "BadRequestError",
    ),
    (
        status(422, '{"error":"too many tokens","error_type":"validation"}'),
        422,
        "invalid_request_error",
        "too many tokens",
        "UnprocessableEntityError",
    ),
    (
        status(404, "nothing here"),
        404,
        "not_found_error",
        "Anthropic: unexpected status code 404: nothing here",
        "NotFoundError",
    ),
    (
        status(413, '{"message":"too big"}'),
        413,
        "request_too_large",
        "too big",
        "APIStatusError",
    ),
    (status(408, '"late"'), 408, "timeout_error", "", "APIStatusError"),
    (
        status(429, '{"error":{"message":"slow down"}}'),
        429,
        "rate_limit_error",
        "slow down",
        "RateLimitError",
    ),
    (status(500, '{"error":"x"}'), 500, "api_error", "x", "InternalServerError"),
    (
        status(503, '{"detail":"loading"}'),
        503,
        "overloaded_error",
        "loading",
        "APIStatusError",
    ),
    (status(529, OVERLOADED), 529, "overloaded_error", "Overloaded", "APIStatusError"),
    (
        status(401, '{"error":{"message":"invalid x-api-key"}}'),
        502,
        "api_error",
        "invalid x-api-key",
        "InternalServerError",
    ),
    (status(403, "{}"), 502, "api_error", "", "InternalServerError"),
    (status(402, "{}"), 502, "api_error", "", "InternalServerError"),
    (status(302, ""), 502, "api_error", "", "InternalServerError"),
    (
        said_to_client(status(401, '{"error":{"message":"invalid x-api-key"}}')),
        401,
        "authentication_error",
        "invalid x-api-key",
        "AuthenticationError",
    ),
    (
        said_to_client(status(403, '{"error":"no"}')),
        403,
        "permission_error",
        "no",
        "PermissionDeniedError",
    ),
    (
        UpstreamReported("overloaded: busy", status=429, detail="busy"),
        429,
        "rate_limit_error",
        "busy",
        "RateLimitError",
    ),
    (
        UpstreamReported("cannot", status=424),
        502,
        "api_error",
        "cannot",
        "InternalServerError",
    ),
    (UpstreamUnreachable("gone"), 502, "api_error", "gone", "InternalServerError"),
    (DeadlineExceeded("late"), 504, "timeout_error", "late", "APIStatusError"),
    (ProxyError("bug"), 500, "api_error", "bug", "InternalServerError"),
]


@pytest.mark.parametrize("path", INCOMING)
@pytest.mark.parametrize("failure", FAILURES)
def test_error_before_the_first_frame(path, failure):
    error, code, kind, text, _ = failure
    reply = INCOMING[path].error_reply(error)
    assert reply == writer_of(path).error_reply(error)
    assert (reply.status, reply.content_type) == (code, "application/json")
    expected = {"type": kind, "message": text or error.message}
    assert json.loads(reply.body) == {"type": "error", "error": expected}


def test_error_byte_for_byte():
    reply = INCOMING["messages"].error_reply(status(400, '{"error":"é\ud800"}'))
    assert reply.body == (
        b'{"type":"error","error":{"type":"invalid_request_error",'
        b'"message":"\\u00e9\\ud800"}}'
    )


def test_error_names_the_upstreams_request():
    error = status(529, OVERLOADED, **{"request-id": "req_1"})
    reply = INCOMING["messages"].error_reply(error)
    assert json.loads(reply.body)["request_id"] == "req_1"
    assert reply.headers == {"request-id": "req_1"}


def test_429_keeps_or_gets_its_retry_after():
    say = INCOMING["messages"].error_reply
    assert say(status(429, "x", **{"retry-after": "7"})).headers["retry-after"] == "7"
    error = UpstreamReported("Model is overloaded", status=429)
    assert say(error).headers["retry-after"] == "5"


SECRET = "sk-ant-secret"
LEAKS = [
    status(400, f'{{"error":"bad key {SECRET}"}}'),
    UpstreamReported(f"bad key {SECRET}", status=400),
    UpstreamReported("x: bad key " + SECRET, status=400, detail=f"bad key {SECRET}"),
]


@pytest.mark.parametrize("error", LEAKS)
def test_what_was_taken_out_of_the_message_stays_out(error):
    error.message = error.message.replace(SECRET, "[redacted]")
    body = INCOMING["messages"].error_reply(error).body
    assert b"bad key [redacted]" in body
    assert SECRET.encode() not in body


@pytest.mark.parametrize("path", INCOMING)
def test_error_after_frames_is_the_last_event(path):
    writer = writer_of(path)
    writer.frames([Text("a")])
    assert writer.error(UpstreamTruncated("cut – short")) == (
        b"event: error\n"
        b'data: {"type":"error","error":{"type":"api_error",'
        b'"message":"cut \\u2013 short"}}\n\n'
    )


IN_STREAM = [
    (UpstreamReported("a", type="overloaded_error", status=429), "overloaded_error"),
    (UpstreamReported("a", type="overloaded", status=429), "rate_limit_error"),
    (UpstreamReported("a", type="validation", status=422), "invalid_request_error"),
    (DeadlineExceeded("a"), "timeout_error"),
]


@pytest.mark.parametrize(("error", "kind"), IN_STREAM)
def test_error_in_a_stream_keeps_the_upstreams_type_if_clients_know_it(error, kind):
    (event,) = events_of(writer_of("messages").error(error))
    assert json.loads(event.data)["error"] == {"type": kind, "message": "a"}


# ------------------------------------------------------------------ the official client


@pytest.fixture
async def serve(aiohttp_raw_server):
    """Return a function: a client of a server that gives one reply to everything."""

    async def serve(status: int, content_type: str, body: bytes):
        async def handle(request: web.BaseRequest) -> web.Response:
            headers = {"Content-Type": content_type}
            return web.Response(status=status, body=body, headers=headers)

        server = await aiohttp_raw_server(handle)
        return anthropic.AsyncAnthropic(
            api_key="k", base_url=str(server.make_url("")), max_retries=0
        )

    return serve


ASK = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("failure", FAILURES)
async def test_client_raises_its_typed_exception(serve, failure):
    error, code, kind, text, exception = failure
    reply = INCOMING["messages"].error_reply(error)
    client = await serve(reply.status, reply.content_type, reply.body)
    async with client:
        with pytest.raises(getattr(anthropic, exception)) as caught:
            await client.messages.create(**ASK)
    assert caught.value.status_code == code
    assert caught.value.body["error"]["type"] == kind
    assert (text or error.message) in str(caught.value)


async def test_client_puts_the_stream_together(serve):
    writer = writer_of("messages")
    content_type = writer.stream_headers["Content-Type"]
    client = await serve(200, content_type, stream(MIXED))
    async with client, client.messages.stream(**ASK) as events:
        message = await events.get_final_message()
    body = json.loads(writer.body(MIXED))
    blocks = [block.to_dict() for block in message.content]
    shown = [
        {key: block[key] for key in want}
        for block, want in zip(blocks, body["content"], strict=True)
    ]
    assert shown == body["content"]
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (6, 20)


async def test_client_raises_what_a_stream_reports(serve):
    writer = writer_of("messages")
    out = writer.frames([Text("a")]) + writer.error(UpstreamTruncated("cut short"))
    client = await serve(200, writer.stream_headers["Content-Type"], out)
    async with client:
        with pytest.raises(anthropic.APIStatusError, match="cut short"):
            async with client.messages.stream(**ASK) as events:
                await events.get_final_message()
