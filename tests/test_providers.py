"""What each kind of upstream is sent: URL, headers, body."""

import json

import msgspec
import pytest
from hypothesis import given, strategies as st

from proxy.completion import (
    CompletionRequest,
    ImagePart,
    Message,
    TextPart,
    Tool,
    ToolCallPart,
    ToolResultPart,
)
from proxy.errors import InvalidPrompt, InvalidRequest
from proxy.modelconfig.resolved import ContextWindow, Endpoint, Model, Provider
from proxy.providers import PROVIDERS
from proxy.providers.base import Call, fold
from proxy.stops import END_OF_TEXT

URL = "http://host/base/v1"


def model(**fields) -> Model:
    given: dict = {
        "provider_id": "acme",
        "api_version": "v1",
        "id": "large",
        "name": "large-1",
        "display_name": "Large",
        "capabilities": ("chat", "autocomplete", "vision"),
        "category": "balanced",
        "status": "stable",
        "tier": "enterprise",
        "context_window": ContextWindow(8000, 5000),
    }
    return Model(**(given | fields))


def message(role: str, *parts) -> Message:
    return Message(role, [TextPart(p) if isinstance(p, str) else p for p in parts])


def ask(*messages: Message, feature="chat", **fields) -> CompletionRequest:
    asked = list(messages) or [message("user", "hi")]
    return CompletionRequest(feature, asked, **fields)


def call(type: str, request=None, *, endpoint=None, of=None, **settings) -> Call:
    endpoint = endpoint or Endpoint(URL, access_token="key")
    provider = Provider(settings.pop("id", "acme"), type, (endpoint,), **settings)
    return PROVIDERS[type](provider).call(request or ask(), of or model(), endpoint)


def body(*arguments, **keywords):
    return json.loads(call(*arguments, **keywords).body)


# ------------------------------------------------------------------------ URL and key

BEARER = ("Authorization", "Bearer key")


@pytest.mark.parametrize(
    ("type", "feature", "url", "expected", "credential"),
    [
        ("openaicompatible", "chat", URL, f"{URL}/chat/completions", BEARER),
        ("huggingface-tgi", "code", f"{URL}/", f"{URL}/completions", BEARER),
        (
            "openaicompatible",
            "code",
            f"{URL}?a=b&c",
            f"{URL}/completions?a=b&c",
            BEARER,
        ),
        ("openai", "chat", "", "https://api.openai.com/v1/chat/completions", BEARER),
        ("openai", "code", "", "https://api.openai.com/v1/completions", BEARER),
        ("openai", "chat", "http://h", "http://h/v1/chat/completions", BEARER),
        ("openai", "chat", URL, f"{URL}/chat/completions", BEARER),
        (
            "fireworks",
            "chat",
            "",
            "https://api.fireworks.ai/inference/v1/chat/completions",
            BEARER,
        ),
        (
            "fireworks",
            "code",
            "",
            "https://api.fireworks.ai/inference/v1/completions",
            BEARER,
        ),
        (
            "azureOpenAI",
            "chat",
            "https://x.azure.com/p",
            "https://x.azure.com/p/openai/deployments/large-1/chat/completions"
            "?api-version=2024-06-01",
            ("api-key", "key"),
        ),
        (
            "anthropic",
            "chat",
            f"{URL}/messages",
            f"{URL}/messages",
            ("X-API-Key", "key"),
        ),
        (
            "google",
            "chat",
            "",
            "https://generativelanguage.googleapis.com/v1beta/models/"
            "large-1:generateContent",
            ("x-goog-api-key", "key"),
        ),
    ],
)
def test_url_and_credential(type, feature, url, expected, credential):
    endpoint = Endpoint(url, access_token="key")
    made = call(type, ask(feature=feature), endpoint=endpoint)
    assert made.url == expected
    name, value = credential
    assert made.headers[name] == value
    assert made.headers["Accept-Encoding"] == "identity"


def test_google_streams_as_events():
    made = call("google", ask(stream=True), endpoint=Endpoint("", access_token="k"))
    assert made.url.endswith("/models/large-1:streamGenerateContent?alt=sse")
    assert "k" not in made.url.partition("?")[2].replace("alt=sse", "")


@pytest.mark.parametrize("kind", sorted(PROVIDERS))
def test_configured_headers_replace_the_credential(kind):
    endpoint = Endpoint(URL, access_token="key", headers={"X-Team": "a"})
    made = call(kind, endpoint=endpoint, id="openai")
    assert made.headers["X-Team"] == "a"
    assert "key" not in " ".join(made.headers.values())


# ------------------------------------------------------------------------- parameters


def test_defaults_are_explicit():
    assert body("openaicompatible", ask(stream=True)) == {
        "model": "large-1",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert body("openaicompatible", ask(feature="code")) == {
        "model": "large-1",
        "prompt": "hi",
        "stream": False,
    }


@pytest.mark.parametrize("kind", sorted(set(PROVIDERS) - {"google"}))
def test_temperature_zero_is_sent(kind):
    sent = body(kind, ask(temperature=0.0), id="openai")
    assert sent["temperature"] == 0


def test_anthropic_wants_max_tokens():
    assert body("anthropic")["max_tokens"] == 5000


@pytest.mark.parametrize(("asked", "sent"), [(30, 30), (10**6, 5000)])
def test_max_tokens_up_to_the_model_s(asked, sent):
    assert body("openaicompatible", ask(max_tokens=asked))["max_tokens"] == sent


@pytest.mark.parametrize(
    ("kind", "api_model", "sent"),
    [
        ("huggingface-tgi", None, "tgi"),
        ("huggingface-tgi", "my-lora", "my-lora"),
        ("openaicompatible", None, "large-1"),
        ("openaicompatible", "other", "other"),
    ],
)
def test_model_name(kind, api_model, sent):
    assert body(kind, of=model(api_model=api_model))["model"] == sent


def test_top_k_goes_only_where_it_is_known_and_never_into_n():
    for kind in ("huggingface-tgi", "openai", "azureOpenAI"):
        assert not {"top_k", "n"} & body(kind, ask(top_k=5)).keys()
    assert body("openaicompatible", ask(top_k=5))["top_k"] == 5


@pytest.mark.parametrize(
    ("kind", "key", "most"),
    [
        ("huggingface-tgi", "stop", 4),
        ("openaicompatible", "stop", 4),
        ("openai", "stop", 4),
        ("azureOpenAI", "stop", 4),
        ("anthropic", "stop_sequences", 6),
    ],
)
def test_stop_sequences_are_capped_and_all_cut_at(kind, key, most):
    stops = [f"<{n}>" for n in range(5)]
    made = call(kind, ask(stop=stops), of=model(stop=("<0>", "<own>")))
    assert json.loads(made.body)[key] == [*stops, "<own>"][:most]
    assert made.stops == [*stops, "<own>"]


def test_blank_stop_sequences_never_reach_anthropic():
    made = call("anthropic", ask(stop=["\n\n", "x", " "]))
    assert json.loads(made.body)["stop_sequences"] == ["x"]
    assert made.stops == ["\n\n", "x", " "]  # it is we who cut at the others


def test_end_of_text_is_stripped_from_completions_and_where_configured():
    assert set(END_OF_TEXT) <= set(call("huggingface-tgi", ask(feature="code")).ends)
    assert call("huggingface-tgi").ends == []
    assert call("openai", of=model(end_of_text="<end>")).ends == ["<end>"]


@pytest.mark.parametrize("name", ["o1", "o3-mini", "gpt-5.1"])
def test_openai_reasoning_models(name):
    asked = ask(temperature=0.2, top_p=0.5, stop=["x"], max_tokens=9)
    sent = body("openai", asked, of=model(name=name))
    assert sent["max_completion_tokens"] == 9
    assert not {"max_tokens", "temperature", "top_p", "stop"} & sent.keys()
    # elsewhere the name means nothing
    assert body("openaicompatible", asked, of=model(name=name))["max_tokens"] == 9


def test_anthropic_parameters():
    sent = body("anthropic", ask(temperature=1.5, top_p=0.9, top_k=3))
    assert (sent["temperature"], sent["top_k"]) == (1, 3)
    assert "top_p" not in sent
    assert body("anthropic", ask(top_p=0.9))["top_p"] == 0.9


@pytest.mark.parametrize(
    ("name", "pinned"),
    [
        ("claude-instant-1", "claude-instant-1.2"),
        ("claude-instant-v1", "claude-instant-1.2"),
        ("claude-2", "claude-2.0"),
        ("claude-2.1", "claude-2.1"),
    ],
)
def test_anthropic_pinned_models(name, pinned):
    assert body("anthropic", of=model(name=name))["model"] == pinned


@pytest.mark.parametrize(("effort", "budget"), [("low", 1024), ("high", 2500)])
def test_anthropic_thinking(effort, budget):
    asked = ask(temperature=0.2, top_k=3, max_tokens=5000)
    sent = body("anthropic", asked, of=model(reasoning_effort=effort))
    assert sent["thinking"] == {"budget_tokens": budget, "type": "enabled"}
    assert sent["temperature"] == 1
    assert "top_k" not in sent


# --------------------------------------------------------------------------- messages

TURNS = [
    message("system", "Be brief."),
    message("user", "look", ImagePart("data:image/png;base64,AA==", "low")),
    message("assistant", "calling", ToolCallPart("t1", "f", '{"x":1}')),
    message("user", ToolResultPart("t1", "42"), TextPart("and?")),
]
TOOLS = [Tool("f", "does f", {"type": "object"})]


def test_openai_messages():
    sent = body("openaicompatible", ask(*TURNS, tools=TOOLS))
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {
                    "type": "image_url",
                    "image_url": {
                        "url": "data:image/png;base64,AA==",
                        "detail": "low",
                    },
                },
            ],
        },
        {
            "role": "assistant",
            "content": "calling",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"x":1}'},
                }
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
        {"role": "user", "content": "and?"},
    ]
    assert sent["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "does f",
                "parameters": {"type": "object"},
            },
        }
    ]


def test_openai_call_without_text_has_null_content():
    turn = message("assistant", ToolCallPart("t", "f", "{}"))
    assert body("openaicompatible", ask(turn))["messages"][0]["content"] is None


def test_anthropic_messages():
    sent = body("anthropic", ask(*TURNS, tools=TOOLS))
    assert sent["system"] == "Be brief."
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    call_block = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "42"}
    assert sent["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image", "source": source},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "calling"}, call_block],
        },
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    assert sent["tools"] == [
        {"name": "f", "input_schema": {"type": "object"}, "description": "does f"}
    ]


def test_anthropic_merges_neighbours_and_trims_the_prefill():
    turns = [message("user", "a"), message("user", "b"), message("assistant", "c \n")]
    sent = body("anthropic", ask(*turns))["messages"]
    assert [(m["role"], [b["text"] for b in m["content"]]) for m in sent] == [
        ("user", ["a", "b"]),
        ("assistant", ["c"]),
    ]


def test_anthropic_prompt_caching():
    cached = Message("system", [TextPart("long", cached=True)])
    assert body("anthropic", ask(cached, message("user", "q")))["system"] == [
        {"type": "text", "text": "long", "cache_control": {"type": "ephemeral"}}
    ]


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "7"])
def test_anthropic_unparsable_arguments_are_empty(arguments):
    turn = message("assistant", ToolCallPart("t", "f", arguments))
    sent = body("anthropic", ask(message("user", "q"), turn, message("user", "r")))
    assert sent["messages"][1]["content"][0]["input"] == {}


def test_gemini_messages():
    sent = body("google", ask(*TURNS, tools=TOOLS, stop=list("abcdefg"), top_k=4))
    assert sent["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert [content["role"] for content in sent["contents"]] == [
        "user",
        "model",
        "user",
    ]
    assert sent["contents"][0]["parts"][1] == {
        "inlineData": {"mimeType": "image/png", "data": "AA=="}
    }
    assert sent["contents"][1]["parts"][1] == {
        "functionCall": {"name": "f", "args": {"x": 1}}
    }
    assert sent["contents"][2]["parts"][0] == {
        "functionResponse": {"name": "f", "response": {"content": "42"}}
    }
    assert sent["generationConfig"] == {
        "topK": 4,
        "stopSequences": list("abcde"),
    }
    assert sent["tools"][0]["functionDeclarations"][0]["name"] == "f"


@pytest.mark.parametrize("kind", ["anthropic", "google"])
@pytest.mark.parametrize(
    ("turns", "text"),
    [
        (
            [message("user", "a"), message("system", "b")],
            "system role can only be used in the first message",
        ),
        (
            [message("user", "a"), message("assistant", ""), message("user", "b")],
            "message content cannot be empty",
        ),
    ],
)
def test_messages_that_are_refused(kind, turns, text):
    with pytest.raises(InvalidPrompt) as caught:
        call(kind, ask(*turns))
    assert caught.value.message == text


@pytest.mark.parametrize("kind", sorted(PROVIDERS))
def test_unknown_roles_are_refused_by_all(kind):
    with pytest.raises(InvalidPrompt) as caught:
        call(kind, ask(message("robot", "x")), id="openai")
    assert caught.value.message == "unexpected role: robot"


# ---------------------------------------------------------------------------- gateway


@pytest.mark.parametrize(
    ("id", "feature", "path", "key"),
    [
        ("anthropic", "chat", "anthropic-messages", "messages"),
        ("openai", "chat", "openai", "messages"),
        ("fireworks", "code", "fireworks", "prompt"),
        ("mistral", "chat", "fireworks", "messages"),
        ("google", "chat", "google", "contents"),
    ],
)
def test_gateway_paths(id, feature, path, key):
    asked = ask(feature=feature, stream=True, user="ann")
    made = call("sourcegraph", asked, id=id, of=model(name=f"{id}/m"))
    assert made.url == f"http://host/v1/completions/{path}"
    assert made.headers["Authorization"] == "Bearer key"
    assert made.headers["X-Sourcegraph-Feature"] == f"{feature}_completions"
    assert made.headers["X-Sourcegraph-Actor-UID"] == "ann"
    sent = json.loads(made.body)
    assert sent["model"] == "m" and key in sent
    assert sent["stream"] is True


def test_gateway_of_an_unknown_provider():
    with pytest.raises(InvalidRequest) as caught:
        call("sourcegraph", id="acme")
    assert caught.value.message == (
        'to use Cody Gateway, the provider ID ("acme") must match one of '
        "['anthropic', 'openai', 'fireworks', 'mistral', 'google']"
    )


# ---------------------------------------------------------------------------- folding

turns = st.lists(
    st.builds(
        message,
        st.sampled_from(["system", "user", "assistant"]),
        st.sampled_from(["", "a", "b"]),
    ),
    min_size=1,
    max_size=8,
)


@given(turns)
def test_folded_messages_alternate_from_the_user_on(messages):
    folded = fold(messages)
    roles = [m.role for m in folded]
    if folded is not messages:
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (
            len(roles) % 2
        )
    kept = "".join(m.text for m in folded if m.role == "user")
    for m in messages:
        if m.role != "assistant":
            assert m.text in kept


def test_every_request_is_left_as_it_came():
    asked = ask(*TURNS, stop=["x"], temperature=0.5)
    before = msgspec.json.encode(asked)
    for kind in PROVIDERS:
        call(kind, asked, id="openai", of=model(strict_template=True, stop=("y",)))
    assert msgspec.json.encode(asked) == before


@pytest.mark.parametrize("kind", ["openaicompatible", "huggingface-tgi"])
def test_tool_without_parameters(kind):
    sent = body(kind, ask(tools=[Tool("f")]))
    assert sent["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {},
    }


@pytest.mark.parametrize("feature", ["chat", "code"])
def test_nothing_but_empty_text(feature):
    with pytest.raises(InvalidPrompt) as caught:
        body("openaicompatible", ask(message("user", ""), feature=feature))
    assert caught.value.message == "message content cannot be empty"


def test_anthropic_blank_end_is_dropped():
    turns = [message("user", "q"), message("assistant", " \n")]
    sent = body("anthropic", ask(*turns))["messages"]
    assert [m["role"] for m in sent] == ["user"]


def test_answer_without_a_question_is_asked_in_a_strict_template():
    (turn,) = fold([message("assistant", "x")])
    assert (turn.role, turn.text) == ("user", "x")


def test_no_endpoint_is_asked_as_another_one_that_is_gone():
    endpoint = Endpoint(URL, access_token="old")
    provider = PROVIDERS["openaicompatible"](
        Provider("acme", "openaicompatible", (endpoint,))
    )
    made = provider.call(ask(), model(), endpoint)
    assert made.headers["Authorization"] == "Bearer old"
    del endpoint
    for number in range(100):  # one of them would be where that was in memory
        other = Endpoint("http://other/v1", access_token=f"new-{number}")
        made = provider.call(ask(), model(), other)
        assert made.url.startswith("http://other/")
        assert made.headers["Authorization"] == f"Bearer new-{number}"
