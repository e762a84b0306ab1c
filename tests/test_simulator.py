"""The simulator says what TGI says: bytes, refusals, ends."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from hypothesis import given, strategies as st

from proxy.simulator import Running, Settings, prose, start, tokens
from proxy.simulator.answers import Call, Situation, Stream, Whole, answer
from tests.support import client

FAST = Settings(tokens_per_s=0, first_token_s=0)
NOW = 1_700_000_000.0
JSON_TYPE = {"content-type": "application/json"}
DONE = b"data: [DONE]\n\n"

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "How are you?"}]


def ask(
    path: str,
    body: object = None,
    settings: Settings = FAST,
    *,
    method: str = "POST",
    free: int = 128,
    headers: Mapping[str, str] = JSON_TYPE,
) -> Whole | Stream:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = Call(method=method, path=path, headers=headers, body=content)
    return answer(call, Situation(settings, NOW, free))


def whole(path: str, body: object = None, *args: Any, **more: Any) -> Whole:
    reply = ask(path, body, *args, **more)
    assert isinstance(reply, Whole)
    return reply


def events(path: str, body: object, *args: Any, **more: Any) -> list[bytes]:
    reply = ask(path, body, *args, **more)
    assert isinstance(reply, Stream)
    return [event for _, event in reply.events]


def payloads(written: list[bytes]) -> list[Any]:
    return [
        json.loads(event.removeprefix(b"data: ")) for event in written if event != DONE
    ]


# --- tokens and texts ----------------------------------------------------------------


@given(st.text())
def test_split_loses_nothing(text: str):
    pieces = tokens.split(text)
    assert "".join(pieces) == text
    assert all(pieces)
    spans = [(token.start, token.stop) for token in tokens.tokenize(text)]
    assert [text[start:stop] for start, stop in spans] == pieces


@given(st.text())
def test_texts_exist_for_any_prompt_and_are_not_ascii(prompt: str):
    assert not prose.answer(prompt).isascii()
    assert not prose.code(prompt).isascii()


def test_answer_repeats_the_beginning_of_the_question():
    assert "“What is a monad?”" in prose.answer("What is a monad?")
    assert "“First line…”" in prose.answer("First line\nsecond line")
    assert f"“{'x' * 60}…”" in prose.answer("x" * 100)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("def total", "(value):\n    # naïve, but it works\n    return value\n"),
        ("  if x:", "\n      result = []  # naïve\n      return result\n"),
        (
            "function f() {",
            "\n    const result = []; // naïve\n    return result;\n}\n",
        ),
        ("def f():\n    ", "return value  # naïve, but it works\n"),
        ("total = ", " compute(value)  # → simulated\n"),
        (
            "<fim_prefix>x.<fim_suffix>\nend<fim_middle>",
            "append(value)  # ✓ simulated\n",
        ),
        ("<｜fim▁begin｜>a(<｜fim▁hole｜>)<｜fim▁end｜>", "value)  # → simulated\n"),
        ("<PRE> # note <SUF>x <MID>", "\nvalue = 42  # ¿why not?\n"),
        ("[SUFFIX]z[PREFIX]x = ", " compute(value)  # → simulated\n"),
        ("import os", '\nprint("héllo, wörld")  # simulated\n'),
    ],
)
def test_code_continues_the_prefix(prompt: str, expected: str):
    assert prose.code(prompt) == expected


def test_continuation_answers_questions():
    said = prose.continuation("<s>[INST] What is up [/INST]")
    assert "“What is up”" in said


# --- streams, byte by byte -----------------------------------------------------------


def test_chat_stream_bytes():
    body = {
        "messages": HI,
        "stream": True,
        "max_tokens": 2,
        "stream_options": {"include_usage": True},
    }
    start = (
        b'data: {"object":"chat.completion.chunk","id":"","created":1700000000,'
        b'"model":"simulated/tgi","system_fingerprint":"3.3.6-native","choices":['
    )
    assert events(CHAT, body) == [
        start + b'{"index":0,"delta":{"role":"assistant","content":"I"},'
        b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n',
        start + b'{"index":0,"delta":{"role":"assistant","content":" am"},'
        b'"logprobs":null,"finish_reason":"length"}],"usage":null}\n\n',
        start + b'],"usage":{"prompt_tokens":28,"completion_tokens":2,'
        b'"total_tokens":30}}\n\n',
        DONE,
    ]


def test_chat_stream_ends_with_an_empty_text_and_stop():
    chunks = payloads(events(CHAT, {"messages": HI, "stream": True}))
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == prose.answer("How are you?")
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)


def test_chat_stream_created_grows():
    body = {"messages": HI, "stream": True, "max_tokens": 21}
    chunks = payloads(events(CHAT, body, Settings(tokens_per_s=10)))
    ages = [chunk["created"] - int(NOW) for chunk in chunks]
    assert ages == [0] * 10 + [1] * 10 + [2]


def test_chat_logprobs():
    body = {"messages": HI, "stream": True, "max_tokens": 1, "logprobs": True}
    (chunk,) = payloads(events(CHAT, body))
    (entry,) = chunk["choices"][0]["logprobs"]["content"]
    assert entry == {"token": "I", "logprob": entry["logprob"], "top_logprobs": []}


def test_completions_stream_bytes():
    body = {"prompt": "x.", "stream": True, "max_tokens": 2}
    start = b'data: {"object":"text_completion","id":"","created":1700000000,'
    assert events(TEXT, body) == [
        start + b'"choices":[{"index":0,"text":"appen","logprobs":null,'
        b'"finish_reason":""}],"model":"simulated/tgi",'
        b'"system_fingerprint":"3.3.6-native"}\n\n',
        start + b'"model":"simulated/tgi","system_fingerprint":"3.3.6-native",'
        b'"choices":[{"index":0,"text":"d","logprobs":null,"finish_reason":"length"}],'
        b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n',
        DONE,
    ]


def test_completions_leak_the_end_token():
    chunks = payloads(events(TEXT, {"prompt": "x.", "stream": True}))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "append(value)  # ✓ simulated\n</s>"
    assert chunks[-1]["choices"][0]["finish_reason"] == "eos_token"
    body = json.loads(whole(TEXT, {"prompt": "x."}).body)
    choice = body["choices"][0]
    assert choice["text"] == "append(value)  # ✓ simulated\n"
    assert choice["finish_reason"] == "stop"


def test_completions_interleave_prompts():
    body = {"prompt": ["x.", "y = "], "stream": True, "max_tokens": 2}
    chunks = payloads(events(TEXT, body))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 0, 1]
    assert ["usage" in chunk for chunk in chunks] == [False, False, True, True]
    reply = ask(TEXT, body)
    assert isinstance(reply, Stream)
    assert [steps for steps, _ in reply.events] == [1, 0, 1, 0, 0]
    assert reply.jobs == 2


def test_completions_body_adds_the_usage_up():
    reply = whole(TEXT, {"prompt": ["x.", "y = "], "max_tokens": 2})
    body = json.loads(reply.body)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    usage = {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
    assert body["usage"] == usage
    assert reply.headers["x-prompt-tokens"] == "8"
    assert reply.headers["x-generated-tokens"] == "4"


def test_generate_stream_bytes():
    body = {"inputs": "x.", "parameters": {"max_new_tokens": 2, "details": True}}
    assert events("/generate_stream", body) == [
        b'data: {"index":1,"token":{"id":31904,"text":"appen","logprob":-0.53125,'
        b'"special":false},"generated_text":null,"details":null}\n\n',
        b'data: {"index":2,"token":{"id":15895,"text":"d","logprob":-0.375,'
        b'"special":false},"generated_text":"append","details":{"finish_reason":'
        b'"length","generated_tokens":2,"seed":null,"input_length":3}}\n\n',
    ]


def test_generate_stream_without_details_hides_the_reason():
    last = payloads(events("/generate_stream", {"inputs": "x."}))[-1]
    assert last["token"]["text"] == "</s>"
    assert last["token"]["special"] is True
    assert last["generated_text"] == "append(value)  # ✓ simulated\n"
    assert last["details"] is None


def test_generate_bodies():
    body = {"inputs": "x.", "parameters": {"return_full_text": True}}
    text = "x.append(value)  # ✓ simulated\n"
    assert json.loads(whole("/generate", body).body) == {"generated_text": text}
    assert json.loads(whole("/", body).body) == [{"generated_text": text}]
    body["parameters"] = {"details": True, "max_new_tokens": 1}
    details = json.loads(whole("/generate", body).body)["details"]
    assert details["finish_reason"] == "length"
    assert [token["text"] for token in details["tokens"]] == ["appen"]


def test_compat_route_streams_on_demand():
    streamed = events("/", {"inputs": "x.", "stream": True})
    assert streamed == events("/generate_stream", {"inputs": "x."})


@pytest.mark.parametrize("stop", ["simu", "a sim", "or", ","])
def test_stop_counts_where_a_token_ends_with_it_and_stays(stop: str):
    body = json.loads(whole(CHAT, {"messages": HI, "stop": [stop]}).body)
    choice = body["choices"][0]
    found = choice["message"]["content"].endswith(stop)
    assert found == (stop != "simu" and stop != "a sim")
    assert choice["finish_reason"] == ("stop_sequence" if found else "stop")


def test_max_tokens_beats_the_end_of_the_answer():
    full = json.loads(whole(TEXT, {"prompt": "x."}).body)
    count = full["usage"]["completion_tokens"] - 1  # without the end token
    body = {"prompt": "x.", "max_tokens": count}
    choice = json.loads(whole(TEXT, body).body)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == full["choices"][0]["text"]


def test_answer_tokens_gives_every_answer_a_length():
    long = Settings(answer_tokens=1000)
    chunks = payloads(events(CHAT, {"messages": HI, "stream": True}, long))
    assert len(chunks) == 1001


# --- tools and grammars --------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"enum": ["c", "f"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
ARGUMENTS = {"city": "simulé", "days": 42, "unit": "c"}


def with_tools(question: str, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "tools": TOOLS, **more}


def streamed_calls(body: object) -> list[dict[str, Any]]:
    chunks = payloads(events(CHAT, body))
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices] == [None] * len(choices)
    assert all(choice["delta"]["role"] == "assistant" for choice in choices)
    return [choice["delta"]["tool_calls"][0] for choice in choices]


@pytest.mark.parametrize(
    ("question", "name", "arguments"),
    [("get_weather in Rome", "get_weather", ARGUMENTS), ("the time now", "now", {})],
)
def test_tool_call_stream(question: str, name: str, arguments: dict[str, object]):
    calls = streamed_calls(with_tools(question, stream=True))
    assert [call["function"]["name"] for call in calls] == [name] + [None] * (
        len(calls) - 1
    )
    assert {(c["index"], c["id"], c["type"]) for c in calls} == {(0, "0", "function")}
    assert calls[0]["function"]["arguments"] == "{"
    assert json.loads("".join(c["function"]["arguments"] for c in calls)) == arguments


def test_tool_call_is_held_back_until_its_name_is_known():
    reply = ask(CHAT, with_tools("get_weather", stream=True))
    assert isinstance(reply, Stream)
    steps = [needed for needed, _ in reply.events]
    assert steps[0] > 5
    assert set(steps[1:-1]) == {1}


def test_tool_call_usage_counts_the_end_token():
    options = {"include_usage": True}
    body = with_tools("now", stream=True, stream_options=options)
    *_, usage = payloads(events(CHAT, body))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 10


def test_tool_call_body():
    choice = json.loads(whole(CHAT, with_tools("get_weather")).body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    (call,) = choice["message"]["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("0", "get_weather")
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert "content" not in choice["message"]


def test_tool_call_that_is_cut():
    body = with_tools("get_weather", max_tokens=3)
    reply = whole(CHAT, body)
    assert reply.status == 422
    assert json.loads(reply.body)["error_type"] == "tool_error"
    assert events(CHAT, {**body, "stream": True}) == [DONE]
    cut = payloads(events(CHAT, {**body, "stream": True, "max_tokens": 20}))
    assert cut[-1]["choices"][0]["finish_reason"] == "length"


def test_tool_call_ids_count_the_calls_of_the_chat():
    call = {"id": "0", "type": "function", "function": {"name": "now"}}
    messages = [
        {"role": "user", "content": "now"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": "0"},
        {"role": "user", "content": "and now?"},
    ]
    calls = streamed_calls({"messages": messages, "tools": TOOLS, "stream": True})
    assert calls[0]["id"] == "1"


@pytest.mark.parametrize(
    ("choice", "called"),
    [
        ("auto", None),
        (None, None),
        ("none", None),
        ("required", "get_weather"),
        ("now", "now"),
        ({"type": "function", "function": {"name": "now"}}, "now"),
    ],
)
def test_tool_choice(choice: object, called: str | None):
    body = with_tools("Hello", tool_choice=choice)
    message = json.loads(whole(CHAT, body).body)["choices"][0]["message"]
    if called is None:
        assert message["content"] == prose.answer("Hello")
    else:
        assert message["tool_calls"][0]["function"]["name"] == called


def test_response_format_is_followed():
    schema = {"type": "object", "properties": {"a": {"type": ["integer", "null"]}}}
    for value in (schema, json.dumps(schema), {"name": "n", "schema": schema}):
        grammar = {"type": "json", "value": value}
        body = {"messages": HI, "response_format": grammar}
        message = json.loads(whole(CHAT, body).body)["choices"][0]["message"]
        assert message["content"] == '{"a":42}'


# --- refusals ------------------------------------------------------------------------

VALIDATION = "Input validation error: "
UNREADABLE = "Failed to deserialize the JSON body into the target type: "


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"frequency_penalty": 3}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"max_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        (
            {"max_tokens": 32_768},
            "`inputs` tokens + `max_new_tokens` must be <= 32768. Given: {tokens}"
            " `inputs` tokens and 32768 `max_new_tokens`",
        ),
    ],
)
@pytest.mark.parametrize(
    ("path", "base", "length"),
    [(CHAT, {"messages": HI}, "28"), (TEXT, {"prompt": "x."}, "3")],
)
def test_validation_on_v1(
    path: str,
    base: dict[str, object],
    length: str,
    extra: dict[str, object],
    text: str,
):
    message = VALIDATION + text.replace("{tokens}", length)
    reply = whole(path, base | extra)
    assert (reply.status, reply.headers["content-type"]) == (422, "application/json")
    expected = {"error": message, "error_type": "validation"}
    assert json.loads(reply.body) == expected
    # In a stream the same refusal comes after a 200.
    first, second = events(path, base | extra | {"stream": True})
    error = {"message": message, "http_status_code": 422}
    assert payloads([first]) == [{"error": error}]
    assert second == DONE


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": 0, "top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        (
            {"top_n_tokens": 6},
            "`top_n_tokens` must be >= 0 and <= 5. Given: 6",
        ),
        (
            {"truncate": 0},
            "`truncate` must be strictly positive and less than 32767. Given: 0",
        ),
        (
            {"grammar": {"type": "json", "value": {"type": "object"}}},
            "grammar is not valid: Grammar must have a 'properties' field",
        ),
        (
            {"grammar": {"type": "json", "value": 5}},
            "grammar is not valid: Expected `object`, got `int`",
        ),
    ],
)
def test_validation_of_native_parameters(parameters: dict[str, object], text: str):
    body = {"inputs": "x", "parameters": parameters}
    expected = {"error": VALIDATION + text, "error_type": "validation"}
    for path in ("/generate", "/"):
        reply = whole(path, body)
        assert (reply.status, json.loads(reply.body)) == (422, expected)
    assert payloads(events("/generate_stream", body)) == [expected]


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        (
            {"best_of": 2, "do_sample": True, "seed": 1},
            "`seed` must not be set when `best_of` > 1",
        ),
    ],
)
def test_validation_of_best_of(parameters: dict[str, object], text: str):
    body = {"inputs": "x", "parameters": parameters}
    assert json.loads(whole("/generate", body).body)["error"] == VALIDATION + text
    (event,) = payloads(events("/generate_stream", body))
    assert event["error"] == (
        VALIDATION + "`best_of` != 1 is not supported when streaming tokens"
    )


def test_validation_of_prefill_details_in_a_stream():
    body = {"inputs": "x", "parameters": {"decoder_input_details": True}}
    assert whole("/generate", body).status == 200
    (event,) = payloads(events("/generate_stream", body))
    assert "`decoder_input_details` == true is not supported" in event["error"]


def test_validation_of_inputs():
    (event,) = payloads(events("/generate_stream", {"inputs": ""}))
    assert event["error"] == VALIDATION + "`inputs` cannot be empty"
    short = Settings(max_total_tokens=3)
    reply = whole("/generate", {"inputs": "a b c"}, short)
    assert json.loads(reply.body)["error"] == (
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 3."
        " Given: 4 `inputs` tokens and 0 `max_new_tokens`"
    )
    reply = whole("/generate", {"inputs": "a b"}, short)
    assert json.loads(reply.body)["error"] == (
        VALIDATION + "`inputs` must have less than 2 tokens. Given: 3"
    )


def test_greedy_on_v1_is_no_error():
    for path, base in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "x"})):
        assert whole(path, {**base, "temperature": 0}).status == 200


@pytest.mark.parametrize(
    ("penalty", "status"), [(0, 200), (-1.5, 200), (-2, 422), (2, 200)]
)
def test_presence_penalty_becomes_a_repetition_penalty(penalty: float, status: int):
    reply = whole(CHAT, {"messages": HI, "presence_penalty": penalty})
    assert reply.status == status
    assert (b"repetition_penalty" in reply.body) == (status == 422)


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (CHAT, {"messages": HI, "stop": "x"}, "stop: invalid type: string, expected a"),
        (CHAT, {"messages": HI, "stream": None}, "stream: invalid type: null"),
        (
            CHAT,
            {"messages": HI, "stream_options": None},
            "stream_options: invalid type",
        ),
        (
            CHAT,
            {"messages": HI, "logit_bias": {"1": 2}},
            "logit_bias: invalid type: map",
        ),
        (
            CHAT,
            {"messages": HI, "response_format": {"type": "json_object"}},
            "response_format: missing field `value`",
        ),
        (
            CHAT,
            {
                "messages": HI,
                "response_format": {"type": "json_schema", "json_schema": {}},
            },
            "response_format: missing field `value`",
        ),
        (
            CHAT,
            {"messages": HI, "response_format": {"type": "text"}},
            "response_format.type: unknown variant `text`",
        ),
        (
            CHAT,
            {"messages": HI, "max_tokens": -1},
            "max_tokens: invalid value: integer",
        ),
        (
            CHAT,
            {"messages": HI, "max_tokens": 1, "max_completion_tokens": 1},
            "duplicate field `max_tokens`",
        ),
        (CHAT, {"messages": HI, "tools": [{"type": "f"}]}, "tools[0]: missing field"),
        (
            CHAT,
            {"messages": HI, "tools": [{"type": "f", "function": {"name": "f"}}]},
            "tools[0].function: missing field `arguments`",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": None}]},
            "messages[0]: data did not match any variant of untagged enum",
        ),
        (CHAT, {}, "missing field `messages`"),
        (TEXT, {"prompt": "x", "stream": None}, "stream: invalid type: null"),
        (TEXT, {"prompt": 5}, "prompt: data did not match any variant"),
        (TEXT, {"prompt": []}, "prompt: Empty array detected."),
        ("/generate", {"inputs": ["x"]}, "inputs: invalid type: sequence, expected a"),
        (
            "/generate",
            {"inputs": "x", "parameters": {"max_new_tokens": "50"}},
            "parameters.max_new_tokens: invalid type: string, expected u32",
        ),
    ],
)
def test_unreadable_bodies(path: str, body: dict[str, object], text: str):
    for streamed in ({}, {"stream": True}):
        reply = whole(path, streamed | body)
        assert reply.status == 422
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        said = reply.body.decode()
        assert said.startswith(UNREADABLE + text)
        assert " at line 1 column " in said


@pytest.mark.parametrize(
    ("headers", "body", "status", "text"),
    [
        ({}, b"{}", 415, "Expected request with `Content-Type: application/json`"),
        ({"content-type": "text/plain"}, b"{}", 415, "Expected request with"),
        (JSON_TYPE, b'{"a":\n', 400, "Failed to parse the request body as JSON: "),
        (JSON_TYPE, b'{"inputs":"\xff"}', 400, "Failed to parse the request body"),
        ({"content-type": "application/json; charset=utf-8"}, b"{}", 422, UNREADABLE),
    ],
)
def test_no_json(headers: dict[str, str], body: bytes, status: int, text: str):
    reply = whole("/generate", body, headers=headers)
    assert reply.status == status
    assert reply.body.decode().startswith(text)


@pytest.mark.parametrize(
    ("path", "body", "error", "error_type"),
    [
        (
            TEXT,
            {"prompt": "x", "suffix": "y"},
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        ),
        (
            TEXT,
            {"prompt": ["x"] * 5},
            "Number of prompts exceeds the maximum allowed batch size of 4",
            "batch size exceeded",
        ),
        (
            CHAT,
            {
                "messages": HI,
                "tools": TOOLS,
                "response_format": {"type": "regex", "value": "x"},
            },
            "Tool error: Grammar and tools are mutually exclusive",
            "tool_error",
        ),
        (
            CHAT,
            {"messages": HI, "tools": TOOLS, "tool_choice": "other"},
            "Tool error: Tool with name other not found",
            "tool_error",
        ),
    ],
)
def test_refused_before_a_stream(
    path: str, body: dict[str, object], error: str, error_type: str
):
    for extra in ({}, {"stream": True}):
        reply = whole(path, body | extra)
        assert reply.status == 422
        expected = {"error": error, "error_type": error_type}
        assert json.loads(reply.body) == expected


def test_overload_comes_before_validation():
    body = {"messages": HI, "top_p": 5}
    reply = whole(CHAT, body, free=0)
    assert reply.status == 429
    expected = {"error": "Model is overloaded", "error_type": "overloaded"}
    assert json.loads(reply.body) == expected
    first, second = events(CHAT, {**body, "stream": True}, free=0)
    error = {"message": "Model is overloaded", "http_status_code": 422}
    assert payloads([first]) == [{"error": error}]
    assert second == DONE
    assert payloads(events("/generate_stream", {"inputs": "x"}, free=0)) == [expected]


def test_model_is_an_adapter():
    for name in ("tgi", FAST.model, None):
        assert whole(CHAT, {"messages": HI, "model": name}).status == 200
    reply = whole(CHAT, {"messages": HI, "model": "gpt-4"})
    assert reply.status == 424
    assert json.loads(reply.body)["error_type"] == "generation"
    native = {"inputs": "x", "parameters": {"adapter_id": "gpt-4"}}
    assert whole("/generate", native).status == 424
    lenient = Settings(unknown_adapter="base")
    reply = whole(CHAT, {"messages": HI, "model": "gpt-4"}, lenient)
    assert json.loads(reply.body)["model"] == "gpt-4"


ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        ("u", None),
        ("uau", None),
        ("ua", None),
        ("su", ALTERNATE),
        ("uu", ALTERNATE),
        ("au", ALTERNATE),
        ("us", "Only user and assistant roles are supported!"),
    ],
)
def test_strict_template(roles: str, text: str | None):
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": names[role], "content": "Hello"} for role in roles]
    strict = Settings(strict_template=True)
    for extra in ({}, {"stream": True}):
        reply = ask(CHAT, {"messages": messages, **extra}, strict)
        if text is None:
            assert isinstance(reply, Stream) or reply.status == 200
            continue
        assert isinstance(reply, Whole)
        assert reply.status == 422
        expected = f"Template error: syntax error: {text} (in <string>:1)"
        body = {"error": expected, "error_type": "template_error"}
        assert json.loads(reply.body) == body
    assert whole(CHAT, {"messages": messages}).status == 200


# --- the other routes ----------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health(path: str):
    reply = whole(path, method="GET")
    assert (reply.status, reply.body) == (200, b"")


def test_info_models_and_metrics():
    info = json.loads(whole("/info", method="GET").body)
    assert info["model_id"] == "simulated/tgi"
    assert info["max_total_tokens"] == 32_768
    models = json.loads(whole("/v1/models", method="GET").body)
    assert [model["id"] for model in models["data"]] == ["simulated/tgi"]
    metrics = whole("/metrics", method="GET", free=126).body
    assert b"\ntgi_batch_current_size 2\n" in metrics


def test_tokenize():
    found = json.loads(whole("/tokenize", {"inputs": "a é"}).body)
    assert [(t["text"], t["start"], t["stop"]) for t in found] == [
        ("a", 0, 1),
        (" é", 1, 3),
    ]
    body = json.loads(whole("/chat_tokenize", {"messages": HI}).body)
    assert body["templated_text"] == (
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(body["tokenize_response"]) == 28


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 422),
        ("/chat_tokenize", {}, 422),
        ("/chat_tokenize", {"messages": HI, "tools": TOOLS, "tool_choice": "x"}, 422),
        ("/generate_stream", {}, 422),
        ("/", {}, 422),
    ],
)
def test_other_routes_refuse_too(path: str, body: object, status: int):
    assert whole(path, body).status == status


def test_content_parts_are_joined():
    image = {"type": "image_url", "image_url": {"url": "http://x/i.png"}}
    parts = [{"type": "text", "text": "See "}, image]
    messages = [{"role": "user", "content": parts}]
    body = json.loads(whole("/chat_tokenize", {"messages": messages}).body)
    assert "See ![](http://x/i.png)" in body["templated_text"]


def test_a_last_answer_is_continued():
    messages = [*HI, {"role": "assistant", "content": "I am "}]
    body = json.loads(whole("/chat_tokenize", {"messages": messages}).body)
    assert body["templated_text"].endswith("<|im_start|>assistant\nI am")


def test_unknown_paths_and_methods():
    assert whole("/nope").status == 404
    reply = whole("/generate", method="GET")
    assert (reply.status, reply.headers["allow"], reply.body) == (405, "POST", b"")
    assert whole("/", method="HEAD").status == 200
    preflight = whole("/generate", method="OPTIONS")
    assert preflight.headers["access-control-allow-headers"] == "content-type"


KEYED = Settings(api_key="Secret")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer Secret", 200),
        ("bearer secret", 200),
        ("Bearer other", 401),
        ("Secret", 401),
        (None, 401),
    ],
)
def test_api_key(given: str | None, status: int):
    headers = JSON_TYPE | ({"authorization": given} if given else {})
    reply = whole("/generate", {"inputs": "x"}, KEYED, headers=headers)
    assert reply.status == status
    assert status == 200 or reply.body == b""


@pytest.mark.parametrize("path", ["/", "/info", "/health", "/v1/models", "/metrics"])
def test_api_key_is_not_needed_to_look(path: str):
    assert whole(path, settings=KEYED, method="GET").status == 200


# --- over sockets --------------------------------------------------------------------


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Running]:
    running = await start(settings)
    try:
        yield running
    finally:
        await running.stop()


@pytest.fixture
async def fast() -> AsyncIterator[Running]:
    async with serving(FAST) as running:
        yield running


async def until_busy(running: Running, count: int) -> None:
    for _ in range(2000):
        if running.busy == count:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"{running.busy} generations under way, not {count}")


async def test_stream_headers_and_writes(fast: Running):
    body = {"messages": HI, "stream": True}
    raw = await client.request(fast.url, path=CHAT, body=body)
    assert raw.status == 200
    assert raw.header("content-type") == "text/event-stream"
    assert raw.header("cache-control") == "no-cache"
    assert raw.header("x-accel-buffering") == "no"
    assert raw.header("x-compute-type") == "gpu+optimized"
    assert raw.header("x-compute-characters") == "62"
    assert raw.header("x-prompt-tokens") is None
    # One event, one chunk.
    assert all(data.count(b"\n\n") == 1 for _, data in raw.reads)
    assert raw.reads[-1][1] == DONE


async def test_body_headers(fast: Running):
    raw = await client.request(fast.url, path="/generate", body={"inputs": "x."})
    assert raw.header("content-type") == "application/json"
    assert raw.header("x-prompt-tokens") == "3"
    assert raw.header("x-generated-tokens") == "14"
    names = ["compute-time", "total-time", "validation-time", "queue-time"]
    names += ["inference-time", "time-per-token", "compute-type"]
    assert all(raw.header(f"x-{name}") for name in names)


async def test_empty_bodies_have_no_content_type(fast: Running):
    for path, status in (("/health", 200), ("/nope", 404), ("/generate", 405)):
        raw = await client.request(fast.url, "GET", path)
        assert (raw.status, raw.body) == (status, b"")
        assert raw.header("content-type") is None
        assert raw.header("content-length") == "0"


async def test_body_limit():
    async with serving(Settings(payload_limit_bytes=1000)) as running:
        raw = await client.request(
            running.url, path="/generate", body={"inputs": "x" * 999}
        )
        assert raw.status == 413
        assert raw.header("content-type") == "text/plain; charset=utf-8"


async def test_pace():
    async with serving(Settings(tokens_per_s=200, first_token_s=0.05)) as running:
        body = {"messages": HI, "stream": True, "max_tokens": 11}
        raw = await client.request(running.url, path=CHAT, body=body)
        times = [at for at, _ in raw.reads]
        assert times[0] >= 0.045
        assert times[10] >= 0.095
        started = time.monotonic()
        await client.request(
            running.url, path=CHAT, body={"messages": HI, "max_tokens": 11}
        )
        assert time.monotonic() - started >= 0.095


async def test_keep_alive_comments_fill_silence():
    settings = Settings(tokens_per_s=0, first_token_s=0.1, keep_alive_s=0.01)
    async with serving(settings) as running:
        body = {"messages": HI, "stream": True, "max_tokens": 1}
        raw = await client.request(running.url, path=CHAT, body=body)
        assert raw.reads[0][1] == b":\n\n"
        assert raw.reads[-1][1] == DONE


@pytest.mark.parametrize("stream", [True, False])
async def test_hang_up_ends_the_generation(stream: bool):
    async with serving(Settings(tokens_per_s=1, first_token_s=30)) as running:
        body = {"messages": HI, "stream": stream}
        async with client.connect(running.url) as connection:
            request = client.build_request(running.url, "POST", CHAT, (), body, False)
            await connection.send(request)
            await until_busy(running, 1)
            await connection.close()
            await until_busy(running, 0)


async def test_slow_client_slows_the_generation():
    # 20 MB in all; to a client that reads they take less than the time waited here.
    bulky = Settings(
        tokens_per_s=0, first_token_s=0, model="m" * 20_000, answer_tokens=1000
    )
    async with serving(bulky) as running:
        body = {"messages": HI, "stream": True}
        async with client.stream(
            running.url, path=CHAT, body=body, receive_buffer=4096
        ) as stream:
            await stream.read()
            await asyncio.sleep(0.2)
            assert running.busy == 1
            await stream.close()
            await until_busy(running, 0)


async def test_overload_over_sockets():
    busy = Settings(tokens_per_s=1, first_token_s=30, max_concurrent_requests=1)
    async with serving(busy) as running:
        body = {"messages": HI, "stream": True}
        async with client.stream(running.url, path=CHAT, body=body):
            raw = await client.request(running.url, path=CHAT, body=body)
            assert raw.status == 200
            assert b"Model is overloaded" in raw.body
            raw = await client.request(running.url, path=CHAT, body={"messages": HI})
            assert raw.status == 429
            metrics = await client.request(running.url, "GET", "/metrics")
            assert b"tgi_batch_current_size 1\n" in metrics.body


async def test_stop_ends_every_reply():
    async with serving(Settings(tokens_per_s=1, first_token_s=0)) as running:
        body = {"messages": HI, "stream": True}
        async with client.stream(running.url, path=CHAT, body=body) as stream:
            await stream.read()
            started = time.monotonic()
            await running.stop()
            assert time.monotonic() - started < 1
            await stream.rest()
            assert not stream.reply.complete
        with pytest.raises(ConnectionRefusedError):
            await client.request(running.url, "GET", "/health")


@pytest.fixture
async def sdk(fast: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{fast.url}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def test_openai_sdk_chat(sdk: openai.AsyncOpenAI):
    messages: Any = HI
    stream = await sdk.chat.completions.create(
        model="tgi",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == prose.answer("How are you?")
    assert chunks[-1].usage and chunks[-1].usage.prompt_tokens == 28
    body = await sdk.chat.completions.create(model="tgi", messages=messages)
    assert body.choices[0].message.content == text
    assert body.choices[0].finish_reason == "stop"


async def test_openai_sdk_completions_and_models(sdk: openai.AsyncOpenAI):
    stream = await sdk.completions.create(model="tgi", prompt="x.", stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == "append(value)  # ✓ simulated\n</s>"
    assert [model.id async for model in sdk.models.list()] == ["simulated/tgi"]


async def test_openai_sdk_errors(sdk: openai.AsyncOpenAI):
    messages: Any = HI
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await sdk.chat.completions.create(model="tgi", messages=messages, top_p=1)
    assert "`top_p` must be" in str(refused.value.body)
    stream = await sdk.chat.completions.create(
        model="tgi", messages=messages, top_p=1, stream=True
    )
    async with stream:
        with pytest.raises(openai.APIError, match="`top_p` must be"):
            async for _ in stream:
                pass
