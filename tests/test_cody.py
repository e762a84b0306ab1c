"""The Cody dialect by itself: requests parsed, messages converted, replies worded."""

import json

import pytest
from hypothesis import given, strategies as st

from proxy.completion import (
    Finish,
    ImagePart,
    Message,
    Start,
    Text,
    TextPart,
    Thinking,
    ToolCall,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from proxy.dialects import cody
from proxy.dialects.base import Head
from proxy.errors import (
    DeadlineExceeded,
    InvalidPrompt,
    InvalidRequest,
    MethodNotAllowed,
    ProxyError,
    UnknownModel,
    UnsupportedVersion,
    UpstreamReported,
    UpstreamStatus,
    UpstreamUnreachable,
)
from tests.support.cody import frames_of

PREAMBLE = "You are Cody, an AI coding assistant from Sourcegraph."
REPLY = "I am Cody, an AI coding assistant from Sourcegraph."


def wire(*turns: tuple[str, str | None]) -> list[dict]:
    speakers = {"h": "human", "a": "assistant", "s": "system"}
    return [
        {"speaker": speakers.get(who, who)} | ({} if text is None else {"text": text})
        for who, text in turns
    ]


def parse(body: object, version: str | None = None, feature="chat"):
    query = {} if version is None else {"api-version": version}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = cody.Completions(feature)
    return incoming.parse(Head("POST", "/", query, {}), data)


def messages_of(turns, version=None) -> list[tuple[str, str]]:
    request, _ = parse({"messages": wire(*turns)}, version)
    return [(message.role, message.text) for message in request.messages]


# ----------------------------------------------------------------- legacy conversion

LEGACY = [
    (
        "holes",
        [("h", "Hola"), ("a", ""), ("h", "Servus!"), ("a", "")],
        [("user", "Servus!")],
    ),
    (
        "preamble with its reply",
        [("h", PREAMBLE), ("a", REPLY), ("h", "q"), ("a", "")],
        [("system", PREAMBLE), ("user", "q")],
    ),
    (
        "prefill",
        [("h", "Write a poem"), ("a", "Roses are red, \t\r\n")],
        [("user", "Write a poem"), ("assistant", "Roses are red,")],
    ),
    ("two humans", [("h", "a"), ("h", "b")], [("user", "a"), ("user", "b")]),
    (
        "missing text",
        [("h", "What is your name?"), ("a", None)],
        [("user", "What is your name?")],
    ),
    (
        "preamble, then an empty reply",
        [("h", PREAMBLE), ("a", ""), ("h", "q"), ("a", "r"), ("h", "q2")],
        [("system", PREAMBLE), ("user", "q"), ("assistant", "r"), ("user", "q2")],
    ),
    (
        "preamble and question in one",
        [("h", f"{PREAMBLE} Why?"), ("a", "")],
        [("user", f"{PREAMBLE} Why?")],
    ),
    (
        "hole before the last question",
        [("h", "one"), ("a", ""), ("h", "two")],
        [("user", "two")],
    ),
    (
        "blank last assistant",
        [("h", "one"), ("a", " \n")],
        [("user", "one")],
    ),
    (
        "preamble without reply",
        [("h", PREAMBLE), ("h", "question")],
        [("system", PREAMBLE), ("user", "question")],
    ),
    (
        "two empty answers at the end",
        [("h", "q"), ("a", ""), ("a", "")],
        [("user", "q")],
    ),
    ("nothing", [], []),
]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [case[1:] for case in LEGACY],
    ids=[case[0] for case in LEGACY],
)
@pytest.mark.parametrize("version", [None, "", "0"])
def test_legacy_messages_become_a_plain_chat(turns, expected, version):
    assert messages_of(turns, version) == expected


@pytest.mark.parametrize("version", ["1", "2", "8", "99"])
def test_versioned_messages_stay_but_for_an_empty_end(version):
    turns = [("s", "Be brief."), ("h", "Hola"), ("a", "b "), ("h", "c"), ("a", "")]
    assert messages_of(turns, version) == [
        ("system", "Be brief."),
        ("user", "Hola"),
        ("assistant", "b "),
        ("user", "c"),
    ]


turns = st.lists(
    st.tuples(st.sampled_from("has"), st.sampled_from(["", " ", "x", PREAMBLE])),
    max_size=6,
)


@given(turns)
def test_legacy_conversion_leaves_no_empty_assistant(turns):
    converted = messages_of(turns)
    assert ("assistant", "") not in converted
    if any(who == "h" and text == "x" for who, text in turns[-1:]):
        assert converted[-1] == ("user", "x")


def test_unknown_speaker_is_kept_for_the_error():
    assert messages_of([("robot", "x")], "1") == [("robot", "x")]


# -------------------------------------------------------------------------- the body


def test_parse_takes_what_chat_clients_send():
    request, _ = parse(
        {
            "temperature": 0.2,
            "topK": -1,
            "topP": -1,
            "model": " anthropic::2024-10-22::claude ",
            "maxTokensToSample": 4000,
            "messages": wire(("s", "Be Cody."), ("h", "Hi")),
            "timeoutMs": 7000,
            "rewriteSpeculation": True,
        },
        "5",
    )
    assert request.stream is True
    assert (request.top_k, request.top_p) == (None, None)
    assert (request.temperature, request.max_tokens) == (0.2, 4000)
    assert request.model == "anthropic::2024-10-22::claude"
    assert request.stop == []


def test_parse_takes_what_autocomplete_sends():
    request, _ = parse(
        {
            "messages": wire(("h", "<fim>")),
            "stopSequences": ["\n\n", "", "\n\r\n", "\n\n"],
            "topK": 0,
            "temperature": 0,
        },
        feature="code",
    )
    assert request.stream is False
    assert request.stop == ["\n\n", "\n\r\n"]
    assert request.temperature == 0


@pytest.mark.parametrize(
    ("feature", "stream", "expected"),
    [
        ("chat", None, True),
        ("code", None, False),
        ("chat", False, False),
        ("code", True, True),
    ],
)
def test_stream_defaults_by_endpoint(feature, stream, expected):
    request, _ = parse({"stream": stream, "messages": []}, feature=feature)
    assert request.stream is expected


@pytest.mark.parametrize("value", [-1, 0, 1, 1.5, -0.1])
def test_top_p_outside_its_range_is_unset(value):
    assert parse({"topP": value})[0].top_p is None


def test_prompt_of_old_clients_is_a_message():
    request, _ = parse({"prompt": "hello"})
    assert [m.text for m in request.messages] == ["hello"]


def test_fast_is_for_chat_only():
    assert parse({"fast": True})[0].fast is True
    assert parse({"fast": True}, feature="code")[0].fast is False


@pytest.mark.parametrize("body", [b"null", b"{}", b'{"messages":null}', b" {} \n"])
def test_empty_bodies_are_empty_requests(body):
    assert parse(body)[0].messages == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"prompt":"cut \\ud83d"}', "cut \ufffd"),
        (b'{"prompt":"bad \xff byte"}', "bad \ufffd byte"),
        (b'\xef\xbb\xbf{"prompt":"x"}', "x"),
        (b'{"prompt":"whole \\ud83d\\ude00"}', "whole \U0001f600"),
    ],
)
def test_bad_characters_cost_no_more_than_themselves(body, text):
    assert parse(body)[0].messages[0].text == text


def test_trailing_garbage_is_ignored():
    request, _ = parse(b'{"messages":[{"speaker":"human","text":"h\xc3\xa9"}]} x=1')
    assert request.messages[0].text == "hé"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "could not decode request body: Expecting value: line 1 column 1"),
        (b"{", "could not decode request body: Expecting property name"),
        (b"[" * 100_000, "could not decode request body: "),
        (b"\xff", "could not decode request body: Expecting value: line 1 column 1"),
        (b"messages=1", "could not decode request body: Expecting value: line 1 col"),
        (
            b'{"temperature":"hot"} x',
            "could not decode request body: Expected `float | null`, got `str` - at "
            "`$.temperature`",
        ),
        (
            b'{"messages":[{"speaker":"human","text":7}]}',
            "could not decode request body: Expected `str | null`, got `int` - at "
            "`$.messages[0].text`",
        ),
        (
            b'{"temperature":"hot"}',
            "could not decode request body: Expected `float | null`, got `str` - at "
            "`$.temperature`",
        ),
    ],
)
def test_bad_bodies_are_named(body, text):
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.message.startswith(text)
    assert caught.value.status == 400


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_random_bodies_raise_only_what_is_documented(body):
    try:
        parse(body)
    except InvalidRequest as error:
        assert error.message.startswith("could not decode request body: ")


def test_content_parts_of_every_kind():
    content = [
        {
            "speaker": "human",
            "cacheEnabled": True,
            "type": "text",
            "text": "look",
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "tool_call", "tool_call": {"id": "1", "name": "f", "arguments": "{}"}},
        {"type": "tool_result", "tool_result": {"id": "1", "content": "42"}},
        {"type": "context_file", "uri": "a.py", "content": "x = 1"},
        {"type": "file", "file": {"uri": "b.py", "language_id": "python"}},
        {"type": "context_repo", "repoId": "abc"},
        {"type": "image_url", "image_url": "http://host/a.png"},
        {
            "type": "tool_result",
            "tool_result": {"id": "2", "content": [{"type": "text", "text": "43"}]},
        },
        {"type": "text", "text": None},
        {"type": "hologram", "depth": [1, 2]},
    ]
    request, _ = parse({"messages": [{"speaker": "human", "content": content}]}, "8")
    assert request.messages == [
        Message(
            "user",
            [
                TextPart("look", cached=True),
                ImagePart("data:image/png;base64,AA=="),
                ToolCallPart("1", "f", "{}"),
                ToolResultPart("1", "42"),
                TextPart("a.py\n```\nx = 1\n```\n"),
                ImagePart("http://host/a.png"),
                ToolResultPart("2", "43"),
                TextPart(""),
                TextPart(""),
            ],
        )
    ]


@pytest.mark.parametrize(
    "content", ["from content", [{"type": "text", "text": "from content"}]]
)
def test_content_wins_over_text(content):
    body = {"messages": [{"speaker": "human", "text": "no", "content": content}]}
    assert parse(body, "7")[0].messages[0].text == "from content"


@pytest.mark.parametrize("content", ["", [], None])
def test_empty_content_leaves_text(content):
    body = {"messages": [{"speaker": "human", "text": "yes", "content": content}]}
    assert parse(body, "7")[0].messages[0].text == "yes"


# ---------------------------------------------------------------- version and client


@pytest.mark.parametrize(
    ("value", "version"),
    [
        ("", 0),
        ("0", 0),
        ("0" * 20, 0),
        (f"{'0' * 20}2", 2),
        (" 1 ", 1),
        ("8", 8),
        ("9", 8),
        ("99999999999999", 8),
    ],
)
def test_version_is_a_number_up_to_ours(value, version):
    assert cody.parse_version(value) == version


@pytest.mark.parametrize("value", ["-1", "1.0", "x", "²", "1 2"])
def test_version_that_is_no_number(value):
    with pytest.raises(UnsupportedVersion) as caught:
        cody.parse_version(value)
    assert caught.value.status == 406
    assert caught.value.message == "Unsupported API Version (Please update your client)"


PREFIX = "ClientCodyIgnoreCompatibilityError: "


@pytest.mark.parametrize(
    ("name", "version", "status", "text"),
    [
        ("vscode", "1.20.0", None, ""),
        ("vscode", "v2", None, ""),
        ("jetbrains", "6.0", None, ""),
        ("web", "", None, ""),
        ("neovim", "0.1.0-rc.1", None, ""),
        ("", "1.0.0", 406, '"client-name" query param is required.'),
        ("vscode", "", 406, '"client-version" query param is required.'),
        (
            "vscode",
            "new",
            400,
            'Cody for vscode version "new" doesn\'t follow semver spec.',
        ),
        (
            "vscode",
            "1.19.9",
            406,
            'Cody for vscode version "1.19.9" doesn\'t match version constraint '
            '">= 1.20.0". Please upgrade your client.',
        ),
        (
            "jetbrains",
            "6.0.0-alpha",
            406,
            'Cody for jetbrains version "6.0.0-alpha" doesn\'t match version '
            'constraint ">= 6.0.0". Please upgrade your client.',
        ),
    ],
)
def test_client_check(name, version, status, text):
    query = {"client-name": name, "client-version": version}
    head = Head("POST", "/", query, {})
    incoming = cody.Completions("chat", check_client=True)
    if status is None:
        incoming.check(head)
        return
    with pytest.raises(ProxyError) as caught:
        incoming.check(head)
    assert (caught.value.status, caught.value.message) == (status, PREFIX + text)


def test_client_is_not_checked_unless_configured():
    cody.Completions("chat").check(Head("POST", "/", {}, {}))


def test_method_other_than_post():
    error = MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
    reply = cody.Completions("chat").error_reply(error)
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    assert reply.body.strip() == b"Method Not Allowed"


# ------------------------------------------------------------------------- the reply

DELTAS = [
    Start("id", "large-1"),
    Text("Hello"),
    Text(" wörld"),
    Finish("end_turn"),
]


def stream(deltas, version):
    writer = parse({}, version)[1]
    return writer.frames(deltas) + writer.end()


def test_cumulative_frames_byte_for_byte():
    assert stream(DELTAS, "1") == (
        b'event: completion\ndata: {"completion":"Hello","stopReason":""}\n\n'
        b"event: completion\n"
        b'data: {"completion":"Hello w\\u00f6rld","stopReason":""}\n\n'
        b"event: completion\n"
        b'data: {"completion":"Hello w\\u00f6rld","stopReason":"end_turn"}\n\n'
        b"event: done\ndata: {}\n\n"
    )
    assert stream(DELTAS, None) == stream(DELTAS, "1")


def test_delta_frames_byte_for_byte():
    assert stream(DELTAS, "2") == (
        b'event: completion\ndata: {"deltaText":"Hello"}\n\n'
        b'event: completion\ndata: {"deltaText":" w\\u00f6rld"}\n\n'
        b'event: completion\ndata: {"stopReason":"end_turn"}\n\n'
        b"event: done\ndata: {}\n\n"
    )


EXTRAS = [
    Start("id", "large-1"),
    Thinking("hm"),
    ToolCall(0, "call_1", "get_time", '{"tz":'),
    ToolCall(0, "call_1", "get_time", '"UTC"}'),
    Finish("tool_use"),
    Usage(3, 5, 2),
]


def payloads(deltas, version) -> list[dict]:
    return [frame.payload for frame in frames_of(stream(deltas, version))][:-1]


def test_what_a_version_does_not_know_is_left_out():
    stop = {"stopReason": "tool_use"}
    usage = {
        "completion_tokens": 5,
        "prompt_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert payloads(EXTRAS, "1") == [{"completion": "", "stopReason": "tool_use"}]
    assert payloads(EXTRAS, "4") == [stop]
    model = {"model": "large-1"}
    assert payloads(EXTRAS, "5") == [stop | model, {"usage": usage} | model]
    function = {"name": "get_time", "arguments": '{"tz":'}
    assert payloads(EXTRAS, "8")[:2] == [
        {"delta_thinking": "hm"},
        {
            "delta_tool_calls": [
                {"type": "function", "id": "call_1", "function": function}
            ]
        },
    ]


def whole(deltas, version):
    return parse({"stream": False}, version)[1].body(deltas)


def test_body_byte_for_byte():
    expected = b'{"completion":"Hello w\\u00f6rld","stopReason":"end_turn"}\n'
    assert whole([*DELTAS, Usage(1, 2)], "4") == expected
    assert whole(DELTAS, None) == expected


def test_body_of_later_versions():
    assert json.loads(whole([*EXTRAS, Text("x")], "8")) == {
        "completion": "x",
        "stopReason": "tool_use",
        "model": "large-1",
        "usage": {
            "completion_tokens": 5,
            "prompt_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "delta_thinking": "hm",
        "delta_tool_calls": [
            {
                "type": "function",
                "id": "call_1",
                "function": {"name": "get_time", "arguments": '{"tz":"UTC"}'},
            }
        ],
    }


def test_body_without_text_still_has_both_strings():
    assert whole([Finish("")], "1") == b'{"completion":"","stopReason":""}\n'


@given(st.lists(st.text(max_size=8), max_size=8), st.sampled_from(["1", "2"]))
def test_any_text_survives_the_frames(pieces, version):
    shown = payloads([Text(piece) for piece in pieces], version)
    if version == "1":
        assert [p["completion"] for p in shown[-1:]] == ["".join(pieces)][: len(shown)]
    else:
        assert [p["deltaText"] for p in shown] == pieces


# ---------------------------------------------------------------------------- errors

STATUS_429 = UpstreamStatus("OpenAI", 429, "slow down", headers={"retry-after": "7"})
FAILURES = [
    # error, stream status, non-stream status
    (STATUS_429, 429, 429),
    (UpstreamReported("overloaded", status=429), 429, 429),
    (UpstreamStatus("OpenAI", 504, "late"), 200, 504),
    (UpstreamStatus("OpenAI", 401, "bad key"), 200, 503),
    (UpstreamStatus("OpenAI", 403, "bad key"), 200, 503),
    (UpstreamStatus("OpenAI", 400, "bad"), 200, 503),
    (UpstreamReported("bad", status=422), 200, 503),
    (UpstreamUnreachable("gone"), 200, 502),
    (DeadlineExceeded("late"), 200, 504),
    (InvalidPrompt("message content cannot be empty"), 200, 400),
    (UnknownModel("Unsupported chat model"), 400, 400),
    (ProxyError("bug"), 500, 500),
]


@pytest.mark.parametrize(("error", "streamed", "plain"), FAILURES)
def test_error_before_the_first_frame(error, streamed, plain):
    reply = parse({"stream": True})[1].error_reply(error)
    assert reply.status == streamed
    if streamed == 200:
        quoted = json.dumps(error.message).encode()
        assert reply.content_type == "text/event-stream"
        assert reply.body == (
            b'event: error\ndata: {"error":' + quoted + b"}\n\n"
            b"event: done\ndata: {}\n\n"
        )
    reply = parse({"stream": False})[1].error_reply(error)
    assert reply.status == plain
    assert reply.body == f"{error.message}\n".encode()
    assert reply.content_type == "text/plain; charset=utf-8"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_429_keeps_or_gets_its_retry_after():
    reply = parse({"stream": True})[1].error_reply(STATUS_429)
    assert reply.headers["retry-after"] == "7"
    error = UpstreamReported("Model is overloaded", status=429)
    reply = parse({"stream": True})[1].error_reply(error)
    assert reply.headers["retry-after"] == "5"


def test_error_after_frames_ends_the_stream():
    writer = parse({}, "2")[1]
    out = writer.frames([Text("a")]) + writer.error(UpstreamUnreachable("gone – é"))
    assert [frame.name for frame in frames_of(out)] == ["completion", "error", "done"]
