"""Gemini's dialect as clients speak it: requests parsed, replies worded."""

import json

import msgspec
import pytest
from hypothesis import given, strategies as st

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
from proxy.dialects import gemini_incoming as gemini
from proxy.dialects.base import Head
from proxy.dialects.gemini import GeminiReader, build_generate
from proxy.errors import (
    ClientFault,
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
)
from proxy.sse import Parser

HEAD = Head("POST", "/", {}, {})


def parse(body: object):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return gemini.GenerateContent().parse(HEAD, data)


def messages_of(*contents: dict, **more):
    return parse({"contents": contents} | more)[0].messages


def content(role: str | None, *parts: dict) -> dict:
    return {"parts": parts} | ({} if role is None else {"role": role})


# --------------------------------------------------------------------------- requests


def test_parse_takes_what_a_cody_instance_sends():
    request, _ = parse(
        {
            "model": "gemini-1.5-pro",
            "contents": [
                content("user", {"text": "Hi"}),
                content("model", {"text": "Hello"}),
                content("user", {"text": "Why?"}),
            ],
            "systemInstruction": content(None, {"text": "Be brief."}),
            "generationConfig": {
                "temperature": 0.2,
                "topP": -1,
                "topK": -1,
                "maxOutputTokens": 1000,
                "stopSequences": ["\n\n", "", "\n\n"],
            },
            "safetySettings": [{"category": "X", "threshold": "BLOCK_NONE"}],
            "stream": True,
        }
    )
    assert request.messages == [
        Message("system", [TextPart("Be brief.")]),
        Message("user", [TextPart("Hi")]),
        Message("assistant", [TextPart("Hello")]),
        Message("user", [TextPart("Why?")]),
    ]
    assert (request.feature, request.model) == ("chat", "gemini-1.5-pro")
    assert (request.stream, request.max_tokens) == (True, 1000)
    assert (request.temperature, request.top_p, request.top_k) == (0.2, None, None)
    assert (request.stop, request.dropped) == (["\n\n"], [])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"contents": None, "generationConfig": None, "tools": None},
        {"contents": [], "generationConfig": {}, "tools": [], "toolConfig": {}},
    ],
)
def test_empty_bodies_are_empty_requests(body):
    request, _ = parse(body)
    assert (request.messages, request.model, request.stream) == ([], "", False)
    assert (request.max_tokens, request.temperature) == (None, None)
    assert (request.tools, request.tool_choice, request.dropped) == ([], None, [])


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": -1}, "temperature", None),
        ({"topP": 0.9}, "top_p", 0.9),
        ({"topP": 1}, "top_p", None),
        ({"topK": 40}, "top_k", 40),
        ({"topK": 40.0}, "top_k", 40),
        ({"topK": 0}, "top_k", None),
        ({"maxOutputTokens": 0}, "max_tokens", None),
        ({"seed": 7}, "seed", 7),
        ({"presencePenalty": 0.5}, "presence_penalty", 0.5),
        ({"frequencyPenalty": -0.5}, "frequency_penalty", -0.5),
        ({"candidateCount": 1}, "dropped", []),
        ({"candidateCount": 2}, "dropped", ["candidateCount"]),
        ({"responseMimeType": "text/plain"}, "dropped", []),
        (
            {"responseMimeType": "application/json", "responseSchema": {}},
            "dropped",
            ["responseMimeType", "responseSchema"],
        ),
        ({"thinkingConfig": {"thinkingBudget": 9}}, "dropped", ["thinkingConfig"]),
    ],
)
def test_generation_config(config, field, value):
    request, _ = parse({"generationConfig": config})
    assert getattr(request, field) == value


@pytest.mark.parametrize("name", ["gemini-pro", " models/gemini-pro "])
def test_model(name):
    assert parse({"model": name})[0].model == "gemini-pro"


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("user", "user"),
        ("model", "assistant"),
        ("function", "user"),
        ("", "user"),
        (None, "user"),
        ("system", "system"),
        ("robot", "robot"),
    ],
)
def test_roles(role, expected):
    assert messages_of(content(role, {"text": "x"})) == [
        Message(expected, [TextPart("x")])
    ]


@pytest.mark.parametrize(
    ("part", "expected", "dropped"),
    [
        ({"text": "a"}, [TextPart("a")], []),
        ({"text": ""}, [TextPart("")], []),
        ({"text": "hm", "thought": True}, [], []),
        (
            {"inlineData": {"mimeType": "image/png", "data": "AA=="}},
            [ImagePart("data:image/png;base64,AA==")],
            [],
        ),
        (
            {"inlineData": {"mimeType": "audio/wav", "data": "AA=="}},
            [],
            ["inlineData"],
        ),
        (
            {"fileData": {"mimeType": "image/png", "fileUri": "https://x/y"}},
            [ImagePart("https://x/y")],
            [],
        ),
        ({"fileData": {"fileUri": "https://x/y"}}, [ImagePart("https://x/y")], []),
        (
            {"fileData": {"mimeType": "video/mp4", "fileUri": "https://x/y"}},
            [],
            ["fileData"],
        ),
        ({"executableCode": {"language": "PYTHON", "code": "1"}}, [], []),
    ],
)
def test_parts(part, expected, dropped):
    request, _ = parse({"contents": [content("user", part, part)]})
    assert request.messages == [Message("user", expected * 2)]
    assert request.dropped == dropped


def call(name: str, args: dict | None = None, **more) -> dict:
    return {"functionCall": {"name": name, "args": args} | more}


def result(name: str, response: object, **more) -> dict:
    return {"functionResponse": {"name": name, "response": response} | more}


def test_results_find_their_calls():
    messages = messages_of(
        content("model", call("f", {"x": 1}), call("g"), call("f", {"x": 2})),
        content("function", result("f", {"output": "1"}), result("g", {"a": 1})),
        content("user", result("f", None), result("h", {"result": "?"})),
    )
    assert messages == [
        Message(
            "assistant",
            [
                ToolCallPart("call_0", "f", '{"x":1}'),
                ToolCallPart("call_1", "g", "{}"),
                ToolCallPart("call_2", "f", '{"x":2}'),
            ],
        ),
        Message(
            "user", [ToolResultPart("call_0", "1"), ToolResultPart("call_1", '{"a":1}')]
        ),
        Message("user", [ToolResultPart("call_2", "null"), ToolResultPart("h", "?")]),
    ]


def test_results_find_their_calls_by_id():
    messages = messages_of(
        content("model", call("f", id="a"), call("f", id="b")),
        content("user", result("f", {"output": "B"}, id="b")),
        content("user", result("f", {"output": "A"}, id="a")),
        content("user", result("f", {"output": "C"}, id="c")),
    )
    assert [message.parts for message in messages[1:]] == [
        [ToolResultPart("b", "B")],
        [ToolResultPart("a", "A")],
        [ToolResultPart("c", "C")],
    ]


@pytest.mark.parametrize(
    ("config", "choice"),
    [
        ({"mode": "AUTO"}, "auto"),
        ({"mode": "NONE"}, "none"),
        ({"mode": "ANY"}, "required"),
        ({"mode": "ANY", "allowedFunctionNames": ["f"]}, "f"),
        ({"mode": "ANY", "allowedFunctionNames": ["f", "g"]}, "required"),
        ({"mode": "MODE_UNSPECIFIED"}, None),
        ({}, None),
    ],
)
def test_tool_choice(config, choice):
    request, _ = parse({"toolConfig": {"functionCallingConfig": config}})
    assert request.tool_choice == choice


def test_tools():
    schema: dict[str, object] = {"type": "object", "properties": {}}
    declared = [{"name": "f", "description": "d", "parameters": schema}, {"name": "g"}]
    request, _ = parse(
        {"tools": [{"functionDeclarations": declared}, {"googleSearch": {}}]}
    )
    assert request.tools == [Tool("f", "d", schema), Tool("g")]
    assert request.dropped == ["tools"]


def test_cached_content_is_named():
    assert parse({"cachedContent": "cachedContents/1"})[0].dropped == ["cachedContent"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "failed to parse request body: Input data was truncated"),
        (b"null", "failed to parse request body: Expected `object`, got `null`"),
        (b"\xff", "failed to parse request body: "),
        (b'{"cachedContent":' + b"[" * 100_000, "failed to parse request body: nested"),
        (
            b'{"contents":[{"parts":[{"text":7}]}]}',
            "failed to parse request body: Expected `str | null`, got `int` - at "
            "`$.contents[0].parts[0].text`",
        ),
    ],
)
def test_bad_bodies_are_named(body, text):
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.message.startswith(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "parts",
                    "text",
                    "functionCall",
                    "functionResponse",
                    "response",
                    "name",
                    "args",
                    "mimeType",
                    "inlineData",
                    "topK",
                    "candidateCount",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
bodies = st.dictionaries(
    st.sampled_from(["contents", "systemInstruction", "generationConfig", "tools"]),
    values,
).map(lambda body: json.dumps(body).encode())


@given(st.binary(max_size=60) | bodies)
def test_random_bodies_raise_only_what_is_documented(body):
    try:
        parse(body)
    except ClientFault as error:
        assert type(error) is InvalidRequest


parts = st.one_of(
    st.builds(TextPart, st.text(min_size=1, max_size=5)),
    st.builds(ImagePart, st.just("data:image/png;base64,AA==")),
    st.builds(
        lambda name, n: ToolCallPart("", name, msgspec.json.encode({"n": n}).decode()),
        st.sampled_from("fg"),
        st.integers(0, 9),
    ),
)
turns = st.lists(st.lists(parts, min_size=1, max_size=3), min_size=1, max_size=4)


@given(turns)
def test_what_our_own_upstream_side_builds_is_understood(turns):
    numbers = iter(range(100))
    messages = [
        Message(
            ("user", "assistant")[i % 2],
            [
                msgspec.structs.replace(part, id=f"call_{next(numbers)}")
                if isinstance(part, ToolCallPart)
                else part
                for part in turn
            ],
        )
        for i, turn in enumerate(turns)
    ]
    request, _ = parse({"contents": []})
    request.messages, request.model, request.stream = messages, "m", True
    again, _ = parse(build_generate(request, via_gateway=True))
    assert again == request


def test_method_other_than_post():
    incoming = gemini.GenerateContent()
    incoming.check(HEAD)
    error = MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
    reply = incoming.error_reply(error)
    assert (reply.status, reply.headers) == (405, {"Allow": "POST"})
    assert json.loads(reply.body)["error"]["status"] == "FAILED_PRECONDITION"


# ---------------------------------------------------------------------------- replies

DELTAS = [
    Start("r1", "gemini-x"),
    Thinking("hm"),
    Text("Hello"),
    ToolCall(0, "1", "f", '{"a":'),
    ToolCall(1, "2", "g", "oops"),
    ToolCall(0, "1", "f", "1}"),
    Text(' "wörld"'),
    Finish("stop"),
    Usage(7, 3, 2),
]
NAMES = b'"modelVersion":"gemini-x","responseId":"r1"}'
FRAMES = (
    b'data: {"candidates":[{"content":{"role":"model","parts":'
    b'[{"text":"hm","thought":true}]},"index":0}],' + NAMES + b"\n\n"
    b'data: {"candidates":[{"content":{"role":"model","parts":'
    b'[{"text":"Hello"}]},"index":0}],' + NAMES + b"\n\n"
    b'data: {"candidates":[{"content":{"role":"model","parts":'
    b'[{"text":" \\"w\\u00f6rld\\""}]},"index":0}],' + NAMES + b"\n\n"
)
CALLS = (
    b'{"functionCall":{"name":"f","args":{"a":1}}},'
    b'{"functionCall":{"name":"g","args":{}}}'
)
USAGE = (
    b'"usageMetadata":{"promptTokenCount":7,"candidatesTokenCount":3,'
    b'"totalTokenCount":10,"cachedContentTokenCount":2},'
)


def test_frames_byte_for_byte():
    writer = parse({})[1]
    assert writer.frames(DELTAS) == FRAMES
    assert writer.end() == (
        b'data: {"candidates":[{"content":{"role":"model","parts":['
        + CALLS
        + b']},"finishReason":"STOP","index":0}],'
        + USAGE
        + NAMES
        + b"\n\n"
    )


def test_frames_do_not_depend_on_the_reads():
    writer = parse({})[1]
    assert b"".join(writer.frames([delta]) for delta in DELTAS) == FRAMES


def test_body_byte_for_byte():
    assert parse({})[1].body(DELTAS) == (
        b'{"candidates":[{"content":{"role":"model","parts":['
        b'{"text":"hm","thought":true},{"text":"Hello \\"w\\u00f6rld\\""},'
        + CALLS
        + b']},"finishReason":"STOP","index":0}],'
        + USAGE
        + NAMES
    )


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("stop", "STOP"),
        ("STOP", "STOP"),
        ("end_turn", "STOP"),
        ("tool_calls", "STOP"),
        ("", "STOP"),
        ("length", "MAX_TOKENS"),
        ("max_tokens", "MAX_TOKENS"),
        ("MAX_TOKENS", "MAX_TOKENS"),
        ("content_filter", "SAFETY"),
        ("refusal", "SAFETY"),
        ("RECITATION", "RECITATION"),
    ],
)
def test_an_end_without_text_has_a_part(reason, expected):
    writer = parse({"model": "asked"})[1]
    assert writer.frames([Start("", ""), Finish(reason)]) == b""
    assert json.loads(writer.end().removeprefix(b"data: ")) == {
        "candidates": [
            {
                "content": {"role": "model", "parts": [{"text": ""}]},
                "finishReason": expected,
                "index": 0,
            }
        ],
        "modelVersion": "asked",
        "responseId": "",
    }


def test_stream_headers():
    assert parse({})[1].stream_headers == {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
    }


# ----------------------------------------------------------------------------- errors


def status(code: int, *, clients: bool = False) -> UpstreamStatus:
    error = UpstreamStatus("Google", code, "no", headers={"request-id": "1"})
    error.is_clients_credential = clients
    return error


ID = {"request-id": "1"}


@pytest.mark.parametrize(
    ("error", "code", "word", "headers"),
    [
        (InvalidRequest("x"), 400, "INVALID_ARGUMENT", {}),
        (InvalidPrompt("x"), 400, "INVALID_ARGUMENT", {}),
        (UnknownModel("x"), 400, "INVALID_ARGUMENT", {}),
        (Unauthorized("x"), 401, "UNAUTHENTICATED", {}),
        (PayloadTooLarge("x"), 413, "INVALID_ARGUMENT", {}),
        (ProxyError("x"), 500, "INTERNAL", {}),
        (DeadlineExceeded("x"), 504, "DEADLINE_EXCEEDED", {}),
        (UpstreamReported("x"), 502, "UNAVAILABLE", {}),
        (
            UpstreamReported("x", status=429),
            429,
            "RESOURCE_EXHAUSTED",
            {"retry-after": "5"},
        ),
        (status(302), 502, "UNAVAILABLE", ID),
        (status(401), 502, "UNAVAILABLE", ID),
        (status(403), 502, "UNAVAILABLE", ID),
        (status(403, clients=True), 403, "PERMISSION_DENIED", ID),
        (status(404), 404, "NOT_FOUND", ID),
        (status(503), 503, "UNAVAILABLE", ID),
        (status(529), 429, "RESOURCE_EXHAUSTED", ID | {"retry-after": "5"}),
    ],
)
def test_error_reply(error, code, word, headers):
    for reply in (
        parse({})[1].error_reply(error),
        gemini.GenerateContent().error_reply(error),
    ):
        assert (reply.status, reply.content_type) == (code, "application/json")
        assert json.loads(reply.body) == {
            "error": {"code": code, "message": error.message, "status": word}
        }
        assert reply.headers == headers


def test_error_in_a_stream_byte_for_byte():
    assert parse({})[1].error(UpstreamReported('"ö"', status=429)) == (
        b'data: {"error":{"code":429,"message":"\\"\\u00f6\\"",'
        b'"status":"RESOURCE_EXHAUSTED"}}\n\n'
    )


# ------------------------------------------------------------------------- round trip


def read(data: bytes, reader: GeminiReader) -> list[Delta]:
    out: list[Delta] = []
    for event in Parser().feed(data):
        reader.read(event, out)
    return out


says = st.lists(
    st.builds(Text, st.text(min_size=1, max_size=8))
    | st.builds(Thinking, st.text(min_size=1, max_size=8)),
    max_size=6,
)
calls = st.lists(st.sampled_from(["{}", '{"a":[1,"x"]}']), max_size=3)
reasons = st.sampled_from(["STOP", "MAX_TOKENS", "SAFETY", "RECITATION"])
usages = st.builds(
    Usage,
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 10**6),
)


def made(arguments: list[str]) -> list[Delta]:
    return [ToolCall(i, f"call_{i}", "f", text) for i, text in enumerate(arguments)]


@given(says, calls, reasons, usages)
def test_what_is_written_is_read(says, arguments, reason, usage):
    deltas = [Start("r", "m"), *says, *made(arguments), Finish(reason)]
    writer = parse({})[1]
    data = writer.frames([*deltas, usage]) + writer.end()
    reader = GeminiReader()
    assert read(data, reader) == deltas
    assert reader.usage == usage


@given(says, calls, reasons, usages)
def test_body_that_is_written_is_read(says, arguments, reason, usage):
    deltas = [Start("r", "m"), *says, *made(arguments), Finish(reason)]
    reader = GeminiReader()
    again = reader.read_body(parse({})[1].body([*deltas, usage]))
    assert joined(again, Text) == joined(says, Text)
    assert joined(again, Thinking) == joined(says, Thinking)
    assert [d for d in again if not isinstance(d, Text | Thinking)] == [
        d for d in deltas if not isinstance(d, Text | Thinking)
    ]
    assert reader.usage == usage


def joined(deltas: list[Delta], kind: type[Text] | type[Thinking]) -> str:
    return "".join(d.text for d in deltas if isinstance(d, kind))


@given(st.text(min_size=1, max_size=20), st.sampled_from([400, 429, 502, 503, 504]))
def test_error_in_a_stream_is_read_as_one(message, code):
    with pytest.raises(UpstreamReported) as caught:
        read(parse({})[1].error(UpstreamReported(message, status=code)), GeminiReader())
    assert caught.value.message == message
