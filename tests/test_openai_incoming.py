"""OpenAI's dialect as clients speak it: requests parsed, replies and errors worded."""

import json
import time

import msgspec
import pytest
from hypothesis import example, given, strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from proxy.completion import (
    CompletionRequest,
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
from proxy.dialects.base import Head
from proxy.dialects.openai import OpenAIReader, Profile, build_chat
from proxy.dialects.openai_incoming import ChatCompletions, Completions
from proxy.errors import (
    DeadlineExceeded,
    InvalidPrompt,
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    ProxyError,
    Unauthorized,
    UnknownModel,
    UnknownPath,
    UpstreamGarbled,
    UpstreamReported,
    UpstreamStatus,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.sse import Parser

HEAD = Head("POST", "/v1/chat/completions", {}, {})
ROUTES: list[ChatCompletions | Completions] = [ChatCompletions(), Completions()]


def encode(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def chat(body: object = None, **fields) -> CompletionRequest:
    wire = {"messages": []} | fields if body is None else body
    return ChatCompletions().parse(HEAD, encode(wire))[0]


def complete(body: object = None, **fields) -> CompletionRequest:
    wire = {"prompt": ""} | fields if body is None else body
    return Completions().parse(HEAD, encode(wire))[0]


def messages_of(*messages: dict) -> list[Message]:
    return chat(messages=list(messages)).messages


def refusal_of(parse, body) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value.message


# -------------------------------------------------------------------------- the body


def test_parse_takes_what_chat_clients_send():
    body = {
        "model": " large ",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "stop": "END",
        "seed": -1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "reasoning_effort": "low",
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "from_the_future": [1],
    }
    assert chat(body) == CompletionRequest(
        feature="chat",
        messages=[Message("user", [TextPart("Hi")])],
        model="large",
        stream=True,
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=40,
        stop=["END"],
        seed=-1,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        reasoning_effort="low",
    )


def test_parse_takes_what_completion_clients_send():
    body = {"model": "m", "prompt": ["def f"], "stop": ["\n", "", "\n"], "seed": 3}
    assert complete(body) == CompletionRequest(
        feature="code",
        messages=[Message("user", [TextPart("def f")])],
        model="m",
        max_tokens=16,
        stop=["\n"],
        seed=3,
    )


def test_null_is_the_same_as_nothing():
    fields = set(CompletionRequest.__struct_fields__) - {"messages", "feature"}
    nulls = dict.fromkeys(fields | {"n", "stream_options", "logprobs", "tools"})
    assert chat({"messages": []} | nulls) == chat({"messages": []})
    assert complete({"prompt": "x"} | nulls) == complete({"prompt": "x"})
    assert chat().model == ""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_tokens": 3.0}, 3),
        ({"max_tokens": 0}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 3, "max_completion_tokens": None}, 3),
        ({"max_tokens": 3, "max_completion_tokens": 9}, 9),
        ({"max_tokens": 10**12}, None),
    ],
)
def test_chat_max_tokens(fields, expected):
    assert chat(**fields).max_tokens == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, 16), (0, 16), (1, 1), (200, 200), (-1, None)]
)
def test_completion_max_tokens(value, expected):
    assert complete(max_tokens=value).max_tokens == expected


@pytest.mark.parametrize("value", [0, 1, 1.0, 1.5, -1])
def test_top_p_outside_its_range_is_unset(value):
    assert chat(top_p=value).top_p is None


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(None, []), ("", []), ("a", ["a"]), ([], []), (["a", "b", "a"], ["a", "b"])],
)
def test_stop(stop, expected):
    assert chat(stop=stop).stop == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": False, "top_logprobs": 0, "logit_bias": {}}, []),
        ({"logprobs": True, "top_logprobs": 2}, ["logprobs", "top_logprobs"]),
        ({"logit_bias": {"1": -100}}, ["logit_bias"]),
        ({"response_format": {"type": "text"}}, []),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"parallel_tool_calls": True}, []),
        ({"parallel_tool_calls": False}, ["parallel_tool_calls"]),
        ({"functions": [], "function_call": "auto"}, []),
        ({"functions": [{"name": "f"}]}, ["functions"]),
        ({"modalities": ["text"], "verbosity": "medium"}, []),
        ({"modalities": ["audio"], "audio": {}}, ["modalities", "audio"]),
        ({"verbosity": "low", "service_tier": "flex"}, ["verbosity", "service_tier"]),
        ({"service_tier": "auto", "web_search_options": None}, []),
        ({"user": "u", "metadata": {"a": "b"}, "store": True, "x": 1}, []),
    ],
)
def test_chat_names_what_it_drops(fields, expected):
    assert chat(**fields).dropped == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": 0}, ["logprobs"]),
        ({"echo": False, "suffix": "", "best_of": 1, "logprobs": None}, []),
        ({"echo": True, "suffix": "}", "best_of": 2}, ["suffix", "echo", "best_of"]),
        ({"logit_bias": {"50256": -100}}, ["logit_bias"]),
    ],
)
def test_completion_names_what_it_drops(fields, expected):
    assert complete(**fields).dropped == expected


BAD_BODIES = [
    (b"", "could not decode request body: Input data was truncated"),
    (b"messages=1", "could not decode request body: JSON is malformed: "),
    (b"\xff", "could not decode request body: JSON is malformed: "),
    (b"{} x", "could not decode request body: "),
    (b"[]", "could not decode request body: Expected `object`, got `array`"),
    (b"null", "could not decode request body: Expected `object`, got `null`"),
    (
        b'{"messages":' + b"[" * 100_000,
        "could not decode request body: ",
    ),
    (
        b'{"messages":[],"prompt":"","logit_bias":' + b"[" * 100_000,
        "could not decode request body: nested too deeply",
    ),
    (
        {"messages": [], "temperature": "hot"},
        "could not decode request body: Expected `float | null`, got `str` - at "
        "`$.temperature`",
    ),
    (
        {"messages": [], "stop": [1]},
        "could not decode request body: Expected `str`, got `int` - at `$.stop[0]`",
    ),
    (
        {"messages": [], "seed": 2**63},
        "could not decode request body: Expected `int` <= 9223372036854775807 - at "
        "`$.seed`",
    ),
    (
        {"messages": [], "stream_options": {"include_usage": "yes"}},
        "could not decode request body: Expected `bool | null`, got `str` - at "
        "`$.stream_options.include_usage`",
    ),
]


@pytest.mark.parametrize(("body", "text"), BAD_BODIES)
@pytest.mark.parametrize("parse", [chat, complete])
def test_bad_bodies_are_named(parse, body, text):
    assert refusal_of(parse, body).startswith(text)


MANY = (
    "this model is not served by an OpenAI-compatible server, and others give one "
    "answer to a request"
)


@pytest.mark.parametrize("n", [0, 2, 128])
def test_n_other_than_one(n):
    text = f"n must be 1, not {n}: {MANY}"
    assert refusal_of(chat, {"messages": [], "n": n}) == text
    assert refusal_of(complete, {"prompt": "", "n": n}) == text
    assert chat(n=1) == chat(n=None)


TOKENS = (
    "prompt: must be text, not tokens: this model is not served by an "
    "OpenAI-compatible server, and others do not take them"
)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "prompt: missing"),
        ({"prompt": None}, "prompt: missing"),
        ({"prompt": []}, "prompt: missing"),
        ({"prompt": [1, 2]}, TOKENS),
        ({"prompt": [[1, 2]]}, TOKENS),
        ({"prompt": ["a", "b"]}, f"prompt: must be one text, not 2: {MANY}"),
        (
            {"prompt": 7},
            "could not decode request body: Expected `str | array | null`, got `int` "
            "- at `$.prompt`",
        ),
        (
            {"prompt": [True]},
            "could not decode request body: Expected `int | str | array`, got `bool` "
            "- at `$.prompt[0]`",
        ),
    ],
)
def test_prompts_that_are_not_one_text(body, text):
    assert refusal_of(complete, body) == text


# --------------------------------------------------------------------------- messages

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ({"role": "system", "content": "s"}, Message("system", [TextPart("s")])),
        ({"role": "developer", "content": "s"}, Message("system", [TextPart("s")])),
        ({"role": "user", "content": "u"}, Message("user", [TextPart("u")])),
        ({"role": "user"}, Message("user", [TextPart("")])),
        ({"role": "user", "content": []}, Message("user", [TextPart("")])),
        (
            {"role": "user", "content": "u", "name": "bob"},
            Message("user", [TextPart("u")]),
        ),
        (
            {"role": "assistant", "content": "a", "refusal": None},
            Message("assistant", [TextPart("a")]),
        ),
        (
            {"role": "assistant", "content": None, "refusal": "no"},
            Message("assistant", [TextPart("no")]),
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", [ToolCallPart("c1", "f", "{}")]),
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            Message("assistant", [ToolCallPart("c1", "f", "{}")]),
        ),
        (
            {"role": "assistant", "content": "hm", "tool_calls": [CALL]},
            Message("assistant", [TextPart("hm"), ToolCallPart("c1", "f", "{}")]),
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": []},
            Message("assistant", [TextPart("")]),
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            Message("assistant", [ToolCallPart("f", "f", "{}")]),
        ),
        (
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            Message("user", [ToolResultPart("c1", "42")]),
        ),
        (
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": [{"type": "text", "text": part} for part in "42"],
            },
            Message("user", [ToolResultPart("c1", "42")]),
        ),
        (
            {"role": "function", "name": "f", "content": None},
            Message("user", [ToolResultPart("f", "")]),
        ),
    ],
)
def test_message(wire, expected):
    assert messages_of(wire) == [expected]


def test_content_parts_of_every_kind():
    content = [
        {"type": "text", "text": "look", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "and", "unknown": 1},
        {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
        {"type": "image_url", "image_url": "http://b"},
        {"type": "input_image", "image_url": "http://c", "detail": "high"},
        {"type": "output_text", "text": "said"},
        {"type": "refusal", "refusal": "no"},
    ]
    assert messages_of({"role": "user", "content": content})[0].parts == [
        TextPart("look", cached=True),
        TextPart("and"),
        ImagePart("data:a", "low"),
        ImagePart("http://b"),
        ImagePart("http://c", "high"),
        TextPart("said"),
        TextPart("no"),
    ]


def test_neighbouring_results_are_one_message():
    results = [
        {"role": "tool", "tool_call_id": str(i), "content": f"r{i}"} for i in range(3)
    ]
    user = {"role": "user", "content": "go on"}
    assert messages_of(results[0], results[1], user, results[2]) == [
        Message("user", [ToolResultPart("0", "r0"), ToolResultPart("1", "r1")]),
        Message("user", [TextPart("go on")]),
        Message("user", [ToolResultPart("2", "r2")]),
    ]


def test_neighbouring_system_messages_are_one():
    system = {"role": "system", "content": "Be brief."}
    developer = {"role": "developer", "content": "Be kind."}
    user = {"role": "user", "content": "Hi"}
    messages = messages_of(system, developer, user, user, system)
    assert [(message.role, message.text) for message in messages] == [
        ("system", "Be brief.\n\nBe kind."),
        ("user", "Hi"),
        ("user", "Hi"),
        ("system", "Be brief."),
    ]


SUPPORTED = (
    "is not supported here; supported are text, input_text, output_text, refusal"
)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            {"role": "robot", "content": "x"},
            'messages[0].role: "robot" is none of system, developer, user, assistant, '
            "tool, function",
        ),
        (
            {"content": "x"},
            "could not decode request body: Object missing required field `role` - at "
            "`$.messages[0]`",
        ),
        (
            {"role": "user", "content": 7},
            "could not decode request body: Expected `str | array | null`, got `int` - "
            "at `$.messages[0].content`",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
            f'messages[0].content[0]: a part of type "input_audio" {SUPPORTED}, '
            "image_url, input_image",
        ),
        (
            {"role": "system", "content": [{"type": "image_url", "image_url": "x"}]},
            f'messages[0].content[0]: a part of type "image_url" {SUPPORTED}',
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            'messages[0].content[0].text: missing in a part of type "text"',
        ),
        (
            {"role": "user", "content": [{"type": "input_image", "file_id": "f"}]},
            'messages[0].content[0].image_url: missing in a part of type "input_image"',
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "text": "f"}]},
            'messages[0].content[0].refusal: missing in a part of type "refusal"',
        ),
        (
            {"role": "user", "content": [{"type": "x" * 999}]},
            f'messages[0].content[0]: a part of type "{"x" * 40}" {SUPPORTED}, '
            "image_url, input_image",
        ),
        (
            {"role": "tool", "content": "42"},
            'messages[0].tool_call_id: missing in a message of role "tool"',
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]},
            'messages[0].tool_calls[0].function: missing in a call of type "custom"; '
            "only functions are supported here",
        ),
    ],
)
def test_bad_messages_are_named(message, text):
    assert refusal_of(chat, {"messages": [message]}) == text


def test_messages_are_required():
    assert refusal_of(chat, {}) == (
        "could not decode request body: Object missing required field `messages`"
    )


# ------------------------------------------------------------------------------ tools

SCHEMA: dict[str, object] = {"type": "object", "properties": {"tz": {"type": "string"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
TOOLS = [
    {"type": "function", "function": FUNCTION},
    {"type": "function", "function": {"name": "g"}},
]


def test_tools():
    request = chat(tools=TOOLS)
    assert request.tools == [Tool("f", "d", SCHEMA), Tool("g")]
    assert request.tool_choice is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ("g", "g"),
        ({"type": "function", "function": {"name": "f"}}, "f"),
        ({"function": {"name": "f"}}, "f"),
        (None, None),
    ],
)
def test_tool_choice(choice, expected):
    assert chat(tools=TOOLS, tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
            'tools[0].type: tools of type "custom" are not supported here, only '
            "functions",
        ),
        ({"tools": [TOOLS[0], {}]}, "tools[1].function: missing"),
        (
            {"tools": [{"function": {}}]},
            "could not decode request body: Object missing required field `name` - at "
            "`$.tools[0].function`",
        ),
        ({"tools": TOOLS, "tool_choice": "h"}, 'tool_choice: "h" is none of the tools'),
        (
            {"tool_choice": {"function": {"name": "f"}}},
            'tool_choice: "f" is none of the tools',
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}},
            'tool_choice: type "allowed_tools" is not supported here; name a function, '
            "or say one of auto, none, required",
        ),
    ],
)
def test_bad_tools_are_named(fields, text):
    assert refusal_of(chat, {"messages": []} | fields) == text


# ------------------------------------------------------------------------- properties

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "function", "name", "id", "image_url"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def mostly(good):
    return good | json_values


parts = st.fixed_dictionaries(
    {"type": mostly(st.sampled_from(["text", "image_url", "refusal", "file"]))},
    optional={"text": mostly(st.text()), "image_url": mostly(st.text())},
)
wire_messages = st.fixed_dictionaries(
    {"role": mostly(st.sampled_from(["system", "user", "assistant", "tool"]))},
    optional={
        "content": mostly(st.text() | st.lists(parts, max_size=3)),
        "tool_calls": mostly(st.just([CALL])),
        "tool_call_id": mostly(st.text()),
    },
)
bodies = st.fixed_dictionaries(
    {"messages": mostly(st.lists(wire_messages, max_size=3)), "prompt": json_values},
    optional=dict.fromkeys(
        ["model", "n", "stop", "seed", "max_tokens", "top_k", "tools", "tool_choice"],
        json_values,
    )
    | dict.fromkeys(["logprobs", "response_format", "best_of", "echo"], json_values),
)


@given(bodies | json_values)
def test_random_bodies_raise_only_what_is_documented(body):
    for route in ROUTES:
        try:
            request, _ = route.parse(HEAD, encode(body))
        except InvalidRequest:
            continue
        assert all(message.parts for message in request.messages)
        assert msgspec.json.encode(request)


@given(st.binary(max_size=60) | st.binary(max_size=20).map(b'{"\\ud800":'.__add__))
def test_random_bytes_raise_only_what_is_documented(body):
    for route in ROUTES:
        with pytest.raises(InvalidRequest):
            route.parse(HEAD, body)


def test_what_we_ask_of_others_is_understood_by_ourselves():
    request = CompletionRequest(
        feature="chat",
        messages=[
            Message("system", [TextPart("s")]),
            Message("user", [TextPart("u"), ImagePart("data:x", "low")]),
            Message("assistant", [ToolCallPart("1", "f", "{}")]),
            Message("user", [ToolResultPart("1", "r"), ToolResultPart("2", "q")]),
            Message("assistant", [TextPart("done")]),
        ],
        model="m",
        stream=True,
        max_tokens=5,
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        stop=["a"],
        tools=[Tool("f", "d", SCHEMA)],
        tool_choice="f",
        seed=1,
        frequency_penalty=0.5,
        presence_penalty=0.5,
    )
    assert chat(build_chat(request, Profile(top_k=True))) == request


# ------------------------------------------------------------------------- the reply


def writer_of(route, *, usage: bool = False, model: str = "m"):
    body: dict = {"messages": [], "prompt": "", "model": model}
    if usage:
        body["stream_options"] = {"include_usage": True}
    return route.parse(HEAD, encode(body))[1]


def stream(deltas, *, usage: bool = False, route=ROUTES[0]) -> bytes:
    writer = writer_of(route, usage=usage)
    return writer.frames(deltas) + writer.end()


def payloads(out: bytes) -> list[dict]:
    events = list(Parser(10**6).feed(out))
    assert all(event.type == "message" for event in events)
    assert events.pop().data == "[DONE]"
    return [json.loads(event.data) for event in events]


def frames(choices: list[str], *, kind: str, created: int, usage: str = "") -> bytes:
    head = f'data: {{"id":"id-1","object":"{kind}","created":{created},"model":"large"'
    out = [f'{head},"choices":[{choice}]{usage}}}\n\n' for choice in choices]
    return "".join([*out, "data: [DONE]\n\n"]).encode("ascii")


START = Start("id-1", "large")
HELLO = [START, Text("Hello"), Text(' w"örld\n'), Finish("end_turn"), Usage(3, 5, 2)]
ROLE = '{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
CHAT_HELLO = [
    ROLE,
    '{"index":0,"delta":{"content":"Hello"},"finish_reason":null}',
    r'{"index":0,"delta":{"content":" w\"\u00f6rld\n"},"finish_reason":null}',
    '{"index":0,"delta":{},"finish_reason":"stop"}',
]


def test_chat_frames_byte_for_byte():
    out = stream(HELLO)
    created = payloads(out)[0]["created"]
    assert out == frames(CHAT_HELLO, kind="chat.completion.chunk", created=created)
    assert abs(created - time.time()) < 60


def test_usage_frame_only_if_asked_for():
    out = stream(HELLO, usage=True)
    *chunks, last = payloads(out)
    assert all(chunk["usage"] is None for chunk in chunks)
    created = last["created"]
    usage = (
        '"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8,'
        '"prompt_tokens_details":{"cached_tokens":2}}'
    )
    expected = frames(
        CHAT_HELLO,
        kind="chat.completion.chunk",
        created=created,
        usage=',"usage":null',
    ).removesuffix(b"data: [DONE]\n\n")
    expected += (
        f'data: {{"id":"id-1","object":"chat.completion.chunk","created":{created},'
        f'"model":"large","choices":[],{usage}}}\n\ndata: [DONE]\n\n'
    ).encode()
    assert out == expected


def test_usage_that_nobody_knows_is_not_invented():
    assert all(chunk["choices"] for chunk in payloads(stream(HELLO[:-1], usage=True)))


def test_completion_frames_byte_for_byte():
    out = stream([*HELLO[:2], Thinking("x"), *HELLO[2:]], route=ROUTES[1])
    after = '"logprobs":null,"finish_reason"'
    choices = [
        f'{{"index":0,"text":"Hello",{after}:null}}',
        rf'{{"index":0,"text":" w\"\u00f6rld\n",{after}:null}}',
        f'{{"index":0,"text":"",{after}:"stop"}}',
    ]
    created = payloads(out)[0]["created"]
    assert out == frames(choices, kind="text_completion", created=created)


CALLS = [
    START,
    Thinking("hm ü"),
    ToolCall(1, "call_1", "get_time", ""),
    ToolCall(1, "call_1", "get_time", '{"tz":'),
    ToolCall(4, "call_2", "g", "{}"),
    ToolCall(1, "call_1", "get_time", '"UTC"}'),
    Finish("STOP"),
]


def test_reasoning_and_tool_calls():
    out = stream(CALLS)
    deltas = [
        '{"reasoning_content":"hm \\u00fc"}',
        '{"tool_calls":[{"index":0,"id":"call_1","type":"function",'
        '"function":{"name":"get_time","arguments":""}}]}',
        r'{"tool_calls":[{"index":0,"function":{"arguments":"{\"tz\":"}}]}',
        '{"tool_calls":[{"index":1,"id":"call_2","type":"function",'
        '"function":{"name":"g","arguments":"{}"}}]}',
        r'{"tool_calls":[{"index":0,"function":{"arguments":"\"UTC\"}"}}]}',
    ]
    choices = [
        ROLE,
        *(f'{{"index":0,"delta":{delta},"finish_reason":null}}' for delta in deltas),
        '{"index":0,"delta":{},"finish_reason":"tool_calls"}',
    ]
    created = payloads(out)[0]["created"]
    assert out == frames(choices, kind="chat.completion.chunk", created=created)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *((word, "stop") for word in ("stop", "end_turn", "stop_sequence")),
        *(
            (word, "stop")
            for word in ("eos_token", "STOP", "", "COMPLETE", "who knows")
        ),
        *((word, "length") for word in ("length", "max_tokens", "MAX_TOKENS")),
        *((word, "tool_calls") for word in ("tool_calls", "tool_use", "function_call")),
        *((word, "content_filter") for word in ("content_filter", "refusal", "SAFETY")),
        *((word, "content_filter") for word in ("RECITATION", "PROHIBITED_CONTENT")),
    ],
)
def test_finish_reasons(word, expected):
    deltas = [START, Text("x"), Finish(word)]
    assert payloads(stream(deltas))[-1]["choices"][0]["finish_reason"] == expected
    assert whole(deltas)["choices"][0]["finish_reason"] == expected
    # A completion has no calls, so its client does not know the word.
    expected = "stop" if expected == "tool_calls" else expected
    (choice,) = whole(deltas, ROUTES[1])["choices"]
    assert choice["finish_reason"] == expected
    (choice,) = payloads(stream(deltas, route=ROUTES[1]))[-1]["choices"]
    assert choice["finish_reason"] == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stop", "tool_calls"),
        ("end_turn", "tool_calls"),
        ("", "tool_calls"),
        ("max_tokens", "length"),
        ("SAFETY", "content_filter"),
    ],
)
def test_finish_reasons_after_calls(word, expected):
    deltas = [START, ToolCall(0, "c", "f", "{}"), Finish(word)]
    assert payloads(stream(deltas))[-1]["choices"][0]["finish_reason"] == expected
    assert whole(deltas)["choices"][0]["finish_reason"] == expected


def test_end_without_finish_says_one():
    def last(deltas):
        return payloads(stream(deltas))[-1]["choices"][0]

    stop = {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert last([START, Text("x")]) == stop
    assert last([START]) == last([]) == stop
    assert last(CALLS[:-1])["finish_reason"] == "tool_calls"
    assert len(payloads(stream([]))) == 2  # the role and the finish


def test_only_the_first_finish_is_said():
    out = payloads(stream([Finish("length"), Finish("stop")]))
    assert [p["choices"][0]["finish_reason"] for p in out] == [None, "length"]


def test_nothing_is_said_before_the_answer_begins():
    for route in ROUTES:
        assert writer_of(route).frames([START, Usage(1, 0)]) == b""
    assert writer_of(ROUTES[1]).frames([START, Thinking("hm")]) == b""


@pytest.mark.parametrize(
    ("route", "prefix"), [(ROUTES[0], "chatcmpl-"), (ROUTES[1], "cmpl-")]
)
def test_id_and_model_that_the_upstream_does_not_say(route, prefix):
    replies = payloads(stream([Start("", ""), Text("x")], route=route))
    replies.append(whole([Text("x")], route))
    for reply in replies:
        assert reply["model"] == "m"
        assert reply["id"].startswith(prefix)
        assert len(reply["id"]) == len(prefix) + 24
    assert len({reply["id"] for reply in replies}) == 2  # one per reply


def test_call_without_id_gets_one():
    chunk = payloads(stream([ToolCall(0, "", "f", "{}")]))[1]
    (call,) = chunk["choices"][0]["delta"]["tool_calls"]
    assert call["id"].startswith("call_")


def test_stream_headers():
    assert writer_of(ROUTES[0]).stream_headers == {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }


def whole(deltas, route=ROUTES[0]) -> dict:
    body = writer_of(route).body(deltas)
    assert body.isascii()
    assert body.endswith(b"}\n")
    return json.loads(body)


def test_whole_chat():
    reply = whole(HELLO)
    assert abs(reply.pop("created") - time.time()) < 60
    assert reply == {
        "id": "id-1",
        "object": "chat.completion",
        "model": "large",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": 'Hello w"örld\n',
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_whole_chat_with_calls():
    assert whole(CALLS)["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "hm ü",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_time", "arguments": '{"tz":"UTC"}'},
            },
            {
                "id": "call_2",
                "type": "function",
                "function": {"name": "g", "arguments": "{}"},
            },
        ],
    }
    assert whole([*CALLS, Text("x")])["choices"][0]["message"]["content"] == "x"


def test_whole_chat_without_anything():
    reply = whole([])
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["usage"] == {
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
    }


def test_whole_completion():
    reply = whole([*HELLO, *CALLS], ROUTES[1])
    assert reply["object"] == "text_completion"
    assert reply["usage"]["total_tokens"] == 8
    assert reply["choices"] == [
        {
            "index": 0,
            "text": 'Hello w"örld\n',
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


# ------------------------------------------------------- what other parsers understand


@pytest.mark.parametrize("deltas", [HELLO, CALLS, []])
def test_official_types_take_the_replies(deltas):
    chunks = [
        ChatCompletionChunk.model_validate(payload)
        for payload in payloads(stream(deltas, usage=True))
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    ChatCompletion.model_validate(whole(deltas), strict=True)
    Completion.model_validate(whole(deltas, ROUTES[1]), strict=True)
    *_, last = payloads(stream(deltas, route=ROUTES[1]))
    Completion.model_validate(last, strict=True)


any_text = st.text(st.characters(exclude_categories=()), max_size=8)
texts = any_text.filter(bool)


def paired(text: str) -> str:
    """JSON knows no difference between a character and its two surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@st.composite
def answers(draw):
    names = draw(st.lists(texts, max_size=3))
    pieces = st.one_of(
        texts.map(Text),
        texts.map(Thinking),
        *(
            st.builds(ToolCall, st.just(i), st.just(f"c{i}"), st.just(name), any_text)
            for i, name in enumerate(names)
        ),
    )
    opened = [ToolCall(i, f"c{i}", name, "") for i, name in enumerate(names)]
    rest = draw(st.lists(pieces, max_size=6))
    reasons = ["length", "content_filter", "tool_calls" if names else "stop"]
    finish = Finish(draw(st.sampled_from(reasons)))
    return [Start(draw(texts), draw(texts)), *opened, *rest, finish]


def normal(delta):
    fields = {
        name: paired(value) if isinstance(value := getattr(delta, name), str) else value
        for name in delta.__struct_fields__
    }
    return type(delta)(**fields)


counts = st.integers(min_value=1, max_value=10**9)
usages = st.builds(Usage, counts, counts, st.none() | counts)


@given(answers(), usages)
@example(
    [START, Text("\ud83d"), Text("\ude00 \x00\u2028"), Finish("stop")], Usage(1, 1)
)
def test_neutral_to_wire_to_neutral(deltas, usage):
    wanted = [normal(delta) for delta in deltas]
    reader = OpenAIReader()
    out: list = []
    for event in Parser(10**6).feed(stream([*deltas, usage], usage=True)):
        reader.read(event, out)
    assert [normal(delta) for delta in out] == wanted
    assert (reader.ended, reader.usage) == (True, usage)


@given(answers(), usages)
def test_neutral_to_body_to_neutral(deltas, usage):
    out = OpenAIReader().read_body(writer_of(ROUTES[0]).body([*deltas, usage]))

    def said(deltas, kind):
        return paired("".join(d.text for d in deltas if isinstance(d, kind)))

    for kind in (Text, Thinking):
        assert said(out, kind) == said(deltas, kind)
    assert normal(out[-1]) == normal(deltas[-1])
    assert [c.id for c in out if isinstance(c, ToolCall)] == sorted(
        {c.id for c in deltas if isinstance(c, ToolCall)}
    )


@given(st.lists(any_text, max_size=8), st.sampled_from(ROUTES), any_text)
def test_any_text_survives(pieces, route, model):
    deltas = [Start(model, model), *map(Text, pieces)]
    out = stream(deltas, route=route)
    assert out.isascii()
    choices = [payload["choices"][0] for payload in payloads(out)]
    shown = [
        c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices
    ]
    assert paired("".join(shown)) == paired("".join(pieces))
    writer_of(route, model="x").body(deltas)
    assert writer_of(route).error(ProxyError("".join(pieces))).isascii()


# ---------------------------------------------------------------------------- errors


def upstream(status: int, body: str, **kwargs) -> UpstreamStatus:
    return UpstreamStatus("OpenAI", status, body, **kwargs)


TOO_LONG = '{"error":{"message":"prompt is too long","type":"invalid_request_error"}}'
FAILURES = [
    # error, status, type, code
    (InvalidRequest("bad"), 400, "invalid_request_error", "bad_request"),
    (InvalidPrompt("bad"), 400, "invalid_request_error", "invalid_prompt"),
    (Unauthorized("who?"), 401, "authentication_error", "unauthorized"),
    (UnknownModel("no x"), 404, "invalid_request_error", "model_not_found"),
    (UnknownPath("no x"), 404, "invalid_request_error", "unknown_path"),
    (MethodNotAllowed("no"), 405, "invalid_request_error", "method_not_allowed"),
    (PayloadTooLarge("big"), 413, "invalid_request_error", "payload_too_large"),
    *(
        (upstream(status, "x"), status, "invalid_request_error", "upstream_status")
        for status in (400, 404, 408, 409, 413, 422)
    ),
    (upstream(429, "slow"), 429, "rate_limit_error", "upstream_status"),
    *(
        (upstream(status, "x"), status, "server_error", "upstream_status")
        for status in (500, 502, 503, 529, 599)
    ),
    *(
        (upstream(status, "x"), 502, "server_error", "upstream_status")
        for status in (301, 401, 402, 403, 418, 424, 600)
    ),
    (
        UpstreamReported("full", status=429),
        429,
        "rate_limit_error",
        "upstream_reported",
    ),
    (
        UpstreamReported("bad", status=422),
        422,
        "invalid_request_error",
        "upstream_reported",
    ),
    (UpstreamReported("key", status=401), 502, "server_error", "upstream_reported"),
    (UpstreamGarbled("html"), 502, "server_error", "upstream_garbled"),
    (UpstreamTruncated("cut"), 502, "server_error", "upstream_truncated"),
    (UpstreamUnreachable("gone"), 502, "server_error", "upstream_unreachable"),
    (DeadlineExceeded("late"), 504, "server_error", "deadline_exceeded"),
    (ProxyError("bug"), 500, "server_error", "internal"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES)
@pytest.mark.parametrize("route", ROUTES)
def test_errors(route, error, status, kind, code):
    fields = {"message": error.message, "type": kind, "param": None, "code": code}
    reply = route.error_reply(error)
    assert reply.status == status
    assert reply.content_type == "application/json"
    assert json.loads(reply.body) == {"error": fields}
    writer = writer_of(route)
    assert writer.error_reply(error) == reply
    frame = json.dumps({"error": fields}, separators=(",", ":"))
    assert writer.error(error) == f"data: {frame}\n\n".encode()


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "authentication_error"), (403, "permission_error")]
)
def test_verdict_on_the_clients_own_credential(status, kind):
    error = upstream(status, "x")
    error.is_clients_credential = True
    reply = ROUTES[0].error_reply(error)
    assert reply.status == status
    assert json.loads(reply.body)["error"]["type"] == kind


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (TOO_LONG, "prompt is too long"),
        (
            '{"error":"Model is overloaded","error_type":"overloaded"}',
            "Model is overloaded",
        ),
        ('{"type":"error","error":{"type":"x","message":"too long"}}', "too long"),
        ('[{"error":{"code":400,"message":"bad key"}}]', "bad key"),
        ('{"detail":"Not Found"}', "Not Found"),
        ("<html>", "OpenAI: unexpected status code 400: <html>"),
        ("{}", "OpenAI: unexpected status code 400: {}"),
        (TOO_LONG[:-5], f"OpenAI: unexpected status code 400: {TOO_LONG[:-5]}"),
        ("", "OpenAI: unexpected status code 400: "),
    ],
)
def test_message_is_the_upstreams_own(body, message):
    reply = ROUTES[0].error_reply(upstream(400, body))
    assert json.loads(reply.body)["error"]["message"] == message


def test_message_keeps_secrets_out():
    error = upstream(400, '{"error":{"message":"not with my-secret-key"}}')
    # As the server does with every error before it is worded.
    error.message = error.message.replace("my-secret-key", "[redacted]")
    body = ROUTES[0].error_reply(error).body
    assert json.loads(body)["error"]["message"] == "not with [redacted]"


def test_429_keeps_or_gets_its_retry_after():
    reply = ROUTES[0].error_reply(upstream(429, "x", headers={"retry-after": "7"}))
    assert reply.headers == {"retry-after": "7"}
    reply = ROUTES[0].error_reply(UpstreamReported("x", status=429))
    assert reply.headers == {"retry-after": "5"}


@pytest.mark.parametrize("route", ROUTES)
def test_method_other_than_post(route):
    route.check(HEAD)
    error = MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
    reply = route.error_reply(error)
    assert (reply.status, reply.headers) == (405, {"Allow": "POST"})


def test_dialects_have_names():
    assert [route.dialect for route in ROUTES] == ["openai-chat", "openai-completions"]
