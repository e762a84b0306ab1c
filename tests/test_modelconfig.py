"""``modelConfiguration``: reading the block, what it comes to, choosing a model."""

import json
import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, strategies as st

from proxy.errors import ConfigError, UnknownModel
from proxy.modelconfig import resolve
from proxy.modelconfig.check import hint, join, read
from proxy.modelconfig.jsonc import to_yaml
from proxy.modelconfig.refs import is_id, made_id, ref_problem
from proxy.modelconfig.resolved import (
    ContextWindow,
    DefaultModels,
    Endpoint,
    Model,
    ModelConfiguration,
    Provider,
)
from proxy.modelconfig.schema import Block

BLESSED = (Path(__file__).parent / "data/blessed.jsonc").read_text()

TGI = {"type": "huggingface-tgi", "endpoints": [{"url": "http://tgi:8080/v1"}]}
CHAT = "p::v1::chat"
CODE = "p::v1::code"


def provider(config=TGI, **more):
    return {"id": "p", "serverSideConfig": config, **more}


def block(**keys):
    """A block that is in order, with ``keys`` changed."""
    return {
        "sourcegraph": None,
        "providerOverrides": [provider()],
        "modelOverrides": [
            {"modelRef": CHAT, "capabilities": ["chat"]},
            {"modelRef": CODE, "capabilities": ["autocomplete"]},
        ],
        "defaultModels": {"chat": CHAT, "fastChat": CHAT, "codeCompletion": CODE},
        **keys,
    }


def shaped(data):
    problems: list[str] = []
    found = read(data, Block, "modelConfiguration", problems)
    assert problems == []
    return found


def resolved(data, **more):
    return resolve(shaped(data), **more)


def problems_of(data, **more):
    """The problems of ``data``, without the path they all begin with."""
    with pytest.raises(ConfigError) as caught:
        resolve(shaped(data), **more)
    prefix = "modelConfiguration."
    return [each.removeprefix(prefix) for each in caught.value.problems]


def warnings_of(data, **more):
    prefix = "modelConfiguration."
    return [each.removeprefix(prefix) for each in resolved(data, **more).warnings]


# ----------------------------------------------------------------- shapes and problems

# Every key of the block, with a value.
KNOBS = {
    "stopSequences": ["<stop>"],
    "endOfText": "<end>",
    "contextSizeHintTotalCharacters": 4096,
    "contextSizeHintPrefixCharacters": 2048,
    "contextSizeHintSuffixCharacters": 1024,
    "chatPreInstruction": "Be brief.",
    "editPostInstruction": "Only code.",
    "autocompleteSinglelineTimeout": 1000,
    "autocompleteMultilineTimeout": 3000,
    "chatTopK": 40,
    "chatTopP": 0.9,
    "chatTemperature": 0.2,
    "chatMaxTokens": 4000,
    "autoCompleteTopK": 40,
    "autoCompleteTopP": 0.9,
    "autoCompleteTemperature": 0,
    "autoCompleteSinglelineMaxTokens": 50,
    "autoCompleteMultilineMaxTokens": 200,
    "editTopK": 40,
    "editTopP": 0.9,
    "editTemperature": 0.1,
    "editMaxTokens": 4000,
}
WINDOW = {"maxInputTokens": 8000, "maxOutputTokens": 2000, "maxUserInputTokens": 6000}
DEFAULT_MODEL = {
    "capabilities": ["autocomplete", "chat", "edit", "vision", "reasoning", "tools"],
    "category": "accuracy",
    "status": "stable",
    "tier": "enterprise",
    "contextWindow": WINDOW,
    "clientSideConfig": {"openaicompatible": KNOBS},
    "serverSideConfig": {"type": "openaicompatible", "apiModel": "tgi"},
}
COMMON = {
    "accessToken": "secret",
    "headers": {"X-Key": "secret"},
    "enableVerboseLogs": True,
}
POOL = {
    **COMMON,
    "endpoints": [
        {
            "url": "http://one/v1",
            "accessToken": "secret",
            "accessTokenFile": "secret",
            "accessTokenQuery": "key",
            "headers": {"X-Key": "secret"},
        },
        {"url": "http://two/v1"},
    ],
    "accessTokenFile": "secret",
    "accessTokenQuery": "key",
    "useLegacyCompletions": False,
    "url": "http://three/v1",
}
SINGLE = {**COMMON, "endpoint": "https://host/path", "url": "https://host/path"}
FULL = {
    "sourcegraph": {
        "endpoint": "https://cody-gateway.sourcegraph.com",
        "accessToken": "secret",
        "modelFilters": {"statusFilter": ["stable"], "allow": ["*"], "deny": ["a*"]},
    },
    "providerOverrides": [
        {"id": "a", "displayName": "A", "serverSideConfig": {"type": kind, **config}}
        for kind, config in {
            "huggingface-tgi": POOL,
            "openaicompatible": POOL,
            "anthropic": SINGLE,
            "openai": SINGLE,
            "fireworks": SINGLE,
            "sourcegraph": SINGLE,
            "google": {
                **SINGLE,
                "googleWorkloadIdentityConfig": {
                    "credentialsFile": "secret",
                    "credentialsJSON": "secret",
                },
            },
            "azureOpenAI": {
                **SINGLE,
                "user": "me",
                "useDeprecatedCompletionsAPI": True,
                "apiVersion": "2024-06-01",
            },
            "awsBedrock": {**SINGLE, "region": "us-west-2"},
        }.items()
    ]
    + [{"id": "b", "clientSideConfig": {}, "defaultModelConfig": DEFAULT_MODEL}],
    "modelOverrides": [
        {
            **DEFAULT_MODEL,
            "modelRef": "a::v1::m",
            "displayName": "M",
            "modelName": "m",
            "reasoningEffort": "low",
            "modelCost": {
                "unit": "mtok",
                "inputTokenPennies": 1,
                "outputTokenPennies": 2.5,
            },
        },
        {
            "modelRef": "a::v1::n",
            "serverSideConfig": {
                "type": "awsBedrockProvisionedThroughput",
                "arn": "arn:x",
            },
        },
        {
            "modelRef": "a::v1::o",
            "serverSideConfig": {
                "type": "awsBedrock",
                "latencyOptimization": "optimized",
            },
        },
    ],
    "modelOverridesRecommendedSettings": ["bigcode::v1::starcoder2-7b"],
    "selfHostedModels": [
        {
            "provider": "a",
            "model": "starcoder2-15b@v1",
            "apiVersion": "v2",
            "override": {
                "displayName": "Mine",
                "contextWindow": {"maxInputTokens": 16000},
                "clientSideConfig": {"openAICompatible": KNOBS, **KNOBS},
                "serverSideConfig": {"apiModel": "tgi"},
            },
        }
    ],
    "defaultModels": {
        "chat": "a::v1::m",
        "fastChat": "a::v1::m",
        "codeCompletion": "a::v1::m",
        "fallbackChat": "a::v1::m",
        "unlimitedChat": "a::v1::m",
    },
    "systemPreInstruction": "You are a pirate.",
}


def test_read_knows_every_key():
    assert isinstance(shaped(FULL), Block)


@pytest.mark.parametrize("spelling", ["openaicompatible", "openAICompatible"])
def test_read_knows_both_spellings_of_the_knobs(spelling):
    config = {"clientSideConfig": {spelling: {"endOfText": "<end>"}}}
    overrides = [{"modelRef": CHAT, **config}]
    model = resolved(block(modelOverrides=overrides, defaultModels={})).models[0]
    assert model.end_of_text == "<end>"


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (
            {"providerOverrides": [{"id": "p", "serverSideConfig": TGI, "nmae": 1}]},
            [
                "providerOverrides[0].nmae: unknown key; known: id, displayName,"
                " clientSideConfig, serverSideConfig, defaultModelConfig"
            ],
        ),
        (
            {
                "providerOverrides": [
                    provider({"type": "huggingface-tgi", "endpoints": [{"urll": "x"}]})
                ]
            },
            [
                "providerOverrides[0].serverSideConfig.endpoints[0].urll:"
                ' unknown key; did you mean "url"?',
                "providerOverrides[0].serverSideConfig.endpoints[0].url:"
                " missing; expected a string",
            ],
        ),
        (
            {"providerOverrides": [provider({"type": "hugingface-tgi"})]},
            [
                "providerOverrides[0].serverSideConfig.type: expected one of"
                ' "huggingface-tgi", "openaicompatible", "anthropic", "openai",'
                ' "fireworks", "google", "azureOpenAI", "awsBedrock", "sourcegraph";'
                ' did you mean "huggingface-tgi"?'
            ],
        ),
        (
            {"providerOverrides": [provider({"endpoints": []})]},
            [
                "providerOverrides[0].serverSideConfig.type: missing; expected one of"
                ' "huggingface-tgi", "openaicompatible", "anthropic", "openai",'
                ' "fireworks", "google", "azureOpenAI", "awsBedrock", "sourcegraph"'
            ],
        ),
        (
            {"providerOverrides": [provider({"type": 5})]},
            [
                "providerOverrides[0].serverSideConfig.type: expected one of"
                ' "huggingface-tgi", "openaicompatible", "anthropic", "openai",'
                ' "fireworks", "google", "azureOpenAI", "awsBedrock", "sourcegraph",'
                " got an integer"
            ],
        ),
        (
            {"providerOverrides": {"id": "p"}},
            ["providerOverrides: expected a list, got a mapping"],
        ),
        (
            {"providerOverrides": ["p", None]},
            [
                "providerOverrides[0]: expected a mapping, got a string",
                "providerOverrides[1]: expected a mapping, got nothing",
            ],
        ),
        (
            {"modelOverrides": [{"modelRef": 5, "capabilities": ["chatt", True]}]},
            [
                "modelOverrides[0].modelRef: expected a string, got an integer;"
                " put it in quotes",
                'modelOverrides[0].capabilities[0]: expected one of "autocomplete",'
                ' "chat", "edit", "reasoning", "tools", "vision"; did you mean "chat"?',
                'modelOverrides[0].capabilities[1]: expected one of "autocomplete",'
                ' "chat", "edit", "reasoning", "tools", "vision", got true or false',
            ],
        ),
        (
            {
                "modelOverrides": [
                    {
                        "modelRef": CHAT,
                        "contextWindow": {
                            "maxInputTokens": 1.5,
                            "maxOutputTokens": "2",
                            "maxUserInputTokens": 1e300,
                        },
                    }
                ]
            },
            [
                "modelOverrides[0].contextWindow.maxInputTokens:"
                " expected an integer, got a number",
                "modelOverrides[0].contextWindow.maxOutputTokens:"
                " expected an integer, got a string",
                "modelOverrides[0].contextWindow.maxUserInputTokens:"
                " expected an integer, got one that is too large",
            ],
        ),
        (
            {
                "providerOverrides": [
                    provider({"type": "openai", "headers": {5: "x", "y": 5}})
                ]
            },
            [
                'providerOverrides[0].serverSideConfig.headers.5: expected a string as'
                " key, got an integer",
                "providerOverrides[0].serverSideConfig.headers.y:"
                " expected a string, got an integer; put it in quotes",
            ],
        ),
        (
            # Keys that are likely to hold a value, for want of a colon or a blank.
            {"defaultModels": {"secret": None, "chat:secret": None, "chat secret": 1}},
            [
                'defaultModels["…"]: unknown key; known: chat, fastChat,'
                " codeCompletion, fallbackChat, unlimitedChat",
                'defaultModels["…"]: unknown key; known: chat, fastChat,'
                " codeCompletion, fallbackChat, unlimitedChat",
                'defaultModels["…"]: unknown key; known: chat, fastChat,'
                " codeCompletion, fallbackChat, unlimitedChat",
            ],
        ),
        ({"defaultModels": {"CHAT": None}}, [
            'defaultModels["…"]: unknown key; did you mean "chat"?'
        ]),
        (
            {"systemPreInstruction": "\ud83d"},
            ["systemPreInstruction: contains half of a surrogate pair"],
        ),
    ],
)  # fmt: skip
def test_read_says_everything(data, problems):
    found: list[str] = []
    assert read(data, Block, "modelConfiguration", found) is None
    assert found == [f"modelConfiguration.{problem}" for problem in problems]


def test_read_takes_null_as_not_given():
    data = {"providerOverrides": None, "defaultModels": {"chat": None}}
    assert shaped(data).default_models.chat is None


def test_read_of_null_for_a_required_key():
    problems: list[str] = []
    read({"modelOverrides": [{"modelRef": None}]}, Block, "m", problems)
    assert problems == ["m.modelOverrides[0].modelRef: missing; expected a string"]


def test_read_takes_a_whole_number_with_a_point_for_an_integer():
    data = {
        "modelOverrides": [{"modelRef": CHAT, "contextWindow": {"maxInputTokens": 8e3}}]
    }
    window = shaped(data).model_overrides[0].context_window
    assert repr(window.max_input_tokens) == "8000"


def _places(data, path=()):
    """Every mapping with fixed keys and every leaf, with the path to each."""
    if isinstance(data, dict):
        if path[-1:] != ("headers",):
            yield "mapping", path
        for key, value in data.items():
            yield from _places(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _places(value, (*path, index))
    elif path[-1] != "type":
        yield "leaf", path


# As text, since a copy would keep what stands in several places one object.
FULL_TEXT = json.dumps(FULL)
PLACES = list(_places(FULL))


def _spoil(data, sort, path):
    """Put one mistake at ``path``; return what its problem begins with."""
    at = data
    for step in path[:-1]:
        at = at[step]
    text = "modelConfiguration"
    for step in path:
        text = f"{text}[{step}]" if isinstance(step, int) else join(text, step)
    if sort == "mapping":
        (at[path[-1]] if path else at)["qqq"] = 1
        return f"{text}.qqq: unknown key; "
    at[path[-1]] = [[]] if not isinstance(at[path[-1]], list) else {}
    return f"{text}: expected "


@given(st.lists(st.sampled_from(PLACES), unique=True, max_size=8))
def test_read_finds_every_mistake_at_once(places):
    data = json.loads(FULL_TEXT)
    expected = sorted(_spoil(data, *place) for place in places)
    problems: list[str] = []
    read(data, Block, "modelConfiguration", problems)
    assert len(problems) == len(expected)
    for problem, start in zip(sorted(problems), expected, strict=True):
        assert problem.startswith(start)


KEYS = st.sampled_from(
    [
        *("providerOverrides", "modelOverrides", "id", "serverSideConfig", "type"),
        *("endpoints", "url", "headers", "modelRef", "contextWindow", "capabilities"),
        *("maxInputTokens", "chatTopP", "clientSideConfig", "openaicompatible", "x"),
    ]
)
DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["p", "huggingface-tgi", "google", "chat", "\udc80"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)


@given(DATA)
def test_read_either_says_a_problem_or_returns_a_block(data):
    problems: list[str] = []
    found = read(data, Block, "", problems)
    assert isinstance(found, Block) == (not problems)


@pytest.mark.parametrize(
    ("path", "key", "joined"),
    [
        ("", "listen", "listen"),
        ("a", "b", "a.b"),
        ("a", "X-Key", "a.X-Key"),
        ("models", CHAT, f'models["{CHAT}"]'),
        ("a", "b c", 'a["…"]'),
        ("", "token\tsecret", '["…"]'),
    ],
)
def test_join(path, key, joined):
    assert join(path, key) == joined


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("urll", ["url", "headers"], 'did you mean "url"?'),
        ("ACCESSTOKEN", ["accessToken"], 'did you mean "accessToken"?'),
        ("zzz", ["url", "headers"], "known: url, headers"),
        ("zzz", [], "known: none"),
    ],
)
def test_hint(word, known, said):
    assert hint(word, known) == said


# ------------------------------------------------------------------- JSON with comments


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ('{"a": 1} // end', {"a": 1}),
        ('// start\n{"a": 1}', {"a": 1}),
        ('/* start */ {"a": /* b */ 1 /* c\n d */}', {"a": 1}),
        ('{"a":1,}', {"a": 1}),
        ('{"a": [1, 2,],}', {"a": [1, 2]}),
        ('{"a":// why\n1,"b":/**/2}', {"a": 1, "b": 2}),
        ('{"a": 1// why\n, "b": true/* c */}', {"a": 1, "b": True}),
        ('{"a": "//b", "c": "/*d*/"}', {"a": "//b", "c": "/*d*/"}),
        ('{"a": "\\"// b"} // c', {"a": '"// b'}),
        ('{"a": [ // b\n "c" // d\n ]}', {"a": ["c"]}),
        ('{"a": [\n "b", // c\n "d"\n]}', {"a": ["b", "d"]}),
        ('{"a": null // "b": 1\n}', {"a": None}),
        ('{\t"a":\t1\n\t}', {"a": 1}),
        ("{a: http://x/y, b: [//c\n d]}", {"a": "http://x/y", "b": ["d"]}),
        ("{a: don't, /* it's */ b: 'it''s // c'}", {"a": "don't", "b": "it's // c"}),
        ("{a: b#c, # d { // e\n f: 1}", {"a": "b#c", "f": 1}),
        ("a: http://x # // b\nc: {d: 1, // e\n f: 2}", {"a": "http://x", "c": {"d": 1, "f": 2}}),
        ('  // a\n  "b": {\n  },\n', {"b": {}}),
        ('"a": true, // b\n"c":{"d":1},\n"e":"f",', {"a": True, "c": {"d": 1}, "e": "f"}),
        ("a: |\n  { // b\n\n  c\nd: [1, // e\n 2]", {"a": "{ // b\n\nc\n", "d": [1, 2]}),
        ("a:\n  - |\n    // b\n  - c: >\n      // d\n    e: {f: 1, // g\n h: 2}",
         {"a": ["// b\n", {"c": "// d\n", "e": {"f": 1, "h": 2}}]}),
        ('a: don\'t {\n// b\nc: "// d"', {"a": "don't {", "c": "// d"}),
        ("- {a: 1, // b\n c: 2}", [{"a": 1, "c": 2}]),
    ],
)  # fmt: skip
def test_to_yaml_leaves_only_yaml(text, data):
    assert yaml.safe_load(to_yaml(text)) == data


@pytest.mark.parametrize(
    "text",
    [
        "{/* a",
        '{"a',
        "{'a",
        "]]{",
        "a: |",
        "|\n",
        "- >\n",
        ": ",
        "{//",
        "}",
        '"a":',
        "\t",
        "a: [//\n]",
    ],
)
def test_to_yaml_gets_to_the_end_of_what_is_no_language(text):
    assert len(to_yaml(text)) == len(text)


@given(st.text(alphabet="{}[]\",:/*#\\\n\t -?|>'atrue1", max_size=40))
def test_to_yaml_keeps_every_line(text):
    assert to_yaml(text).count("\n") == text.count("\n")


# Less what YAML has only as escapes, or takes for the end of a line, and less the two
# words that to_yaml moves to the left.
TEXT = st.text(
    st.characters(
        exclude_categories=("Cc", "Cs"), exclude_characters="\u2028\u2029\ufffe\uffff"
    )
).filter(lambda text: text not in ("modelConfiguration", "cody.enabled"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s"{}\[\]:,]+|[{}\[\]:,]')
COMMENTS = st.sampled_from(
    [" ", "", "\n", "\t", "// a\n", '//"b\n', "/* c */", "/*\n'[{*/", "  // d, e: f\n"]
)


@given(st.dictionaries(TEXT, JSON, min_size=1), st.data())
def test_to_yaml_of_json_with_comments_keeps_the_meaning(value, data):
    # Comments at every place where JSON allows blanks; YAML wants a key and its colon
    # in one line.
    text = json.dumps(value, ensure_ascii=False)
    tokens = [match[0] for match in TOKEN.finditer(text)]
    pieces = []
    for token, following in pairwise([*tokens, ""]):
        comment = data.draw(COMMENTS)
        pieces += [token, " " if following == ":" and "\n" in comment else comment]
    assert yaml.safe_load(to_yaml("".join(pieces))) == value


@given(st.dictionaries(TEXT, JSON, min_size=1), st.booleans())
def test_to_yaml_of_quoted_yaml_changes_nothing(value, flow):
    text = yaml.safe_dump(
        value, default_flow_style=flow, default_style='"', width=10**6
    )
    assert to_yaml(text) == text


# --------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("ref", "problem"),
    [
        (CHAT, None),
        ("a/b::2024-06::c@v1", None),
        ("-._~::/?#[]@!$&'()*::+,;=%", None),
        ("", "modelRef is blank"),
        (" ", "modelRef is blank"),
        (
            "p/m",
            'modelRef syntax error: "p/m"; expected provider::apiVersion::model',
        ),
        (
            "a::b::c::d",
            'modelRef syntax error: "a::b::c::d"; expected provider::apiVersion::model',
        ),
        ("a b::v1::c", 'invalid ProviderID: "a b"'),
        ("a::::c", 'invalid APIVersionID: ""'),
        ("a::v1::c:d", 'invalid ModelID: "c:d"'),
        ("a::v1::ü", 'invalid ModelID: "ü"'),
    ],
)
def test_ref_problem(ref, problem):
    assert ref_problem(ref) == problem


@given(st.text())
def test_made_id_is_one(text):
    assert is_id(made_id(text))
    assert not is_id(text) or made_id(text) == text


# ----------------------------------------------------------------------------- providers


def endpoints_of(config, **more):
    found = resolved(block(providerOverrides=[provider(config)]), **more)
    return found.providers["p"].endpoints


@pytest.mark.parametrize(
    ("config", "endpoints"),
    [
        (TGI, [Endpoint("http://tgi:8080/v1")]),
        ({"type": "huggingface-tgi", "url": "http://a/v1"}, [Endpoint("http://a/v1")]),
        (
            {
                "type": "openaicompatible",
                "accessToken": " common\n",
                "accessTokenQuery": "key",
                "endpoints": [
                    {"url": "https://a/v1"},
                    {"url": "https://b/v1?c=d", "accessToken": "own"},
                    {"url": "https://e/v1", "headers": {"X-Key": "own"}},
                    {"url": "https://f/v1", "accessTokenQuery": "token"},
                ],
            },
            [
                Endpoint("https://a/v1", "common", {}, "key"),
                Endpoint("https://b/v1?c=d", "own"),
                Endpoint("https://e/v1", "", {"X-Key": "own"}),
                Endpoint("https://f/v1", "common", {}, "token"),
            ],
        ),
        ({"type": "anthropic"}, [Endpoint("https://api.anthropic.com/v1/messages")]),
        (
            {"type": "anthropic", "endpoint": "https://a/v1/messages?b=c#d"},
            [Endpoint("https://a/v1/messages?b=c#d")],
        ),
        (
            {"type": "anthropic", "url": "https://a/x/v1/complete/?b"},
            [Endpoint("https://a/x/v1/messages?b")],
        ),
        ({"type": "openai"}, [Endpoint("")]),
        ({"type": "openai", "endpoint": "https://a"}, [Endpoint("https://a")]),
        ({"type": "fireworks", "accessToken": "t"}, [Endpoint("", "t")]),
        ({"type": "google"}, [Endpoint("")]),
        (
            {
                "type": "google",
                "endpoint": "https://generativelanguage.googleapis.com/v1/models",
            },
            [Endpoint("https://generativelanguage.googleapis.com/v1/models")],
        ),
        (
            {"type": "azureOpenAI", "endpoint": "https://a", "headers": {"b": "c"}},
            [Endpoint("https://a", "", {"b": "c"})],
        ),
    ],
)
def test_resolve_gives_the_endpoints(config, endpoints):
    assert endpoints_of(config) == tuple(endpoints)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {**TGI, "enableVerboseLogs": True, "useLegacyCompletions": False},
            {"verbose_logs": True, "use_legacy_completions": False},
        ),
        (TGI, {"verbose_logs": False, "use_legacy_completions": True}),
        ({"type": "anthropic", "enableVerboseLogs": True}, {"verbose_logs": True}),
        (
            {
                "type": "azureOpenAI",
                "endpoint": "https://a",
                "user": "me",
                "useDeprecatedCompletionsAPI": True,
                "apiVersion": "2025-01-01",
            },
            {
                "user": "me",
                "use_deprecated_completions_api": True,
                "api_version": "2025-01-01",
            },
        ),
        (
            {"type": "azureOpenAI", "endpoint": "https://a"},
            {
                "user": "",
                "use_deprecated_completions_api": False,
                "api_version": "2024-06-01",
            },
        ),
    ],
)
def test_resolve_gives_what_is_special_of_a_type(config, found):
    given = resolved(block(providerOverrides=[provider(config)])).providers["p"]
    assert given.type == config["type"]
    assert {name: getattr(given, name) for name in found} == found


@pytest.mark.parametrize(
    "id", ["anthropic", "openai", "fireworks", "mistral", "google"]
)
def test_resolve_takes_the_gateway(id):
    gateway = {"id": id, "serverSideConfig": {"type": "sourcegraph"}}
    found = resolved(block(providerOverrides=[provider(), gateway])).providers[id]
    assert found.endpoints == (Endpoint("https://cody-gateway.sourcegraph.com"),)


def test_resolve_refuses_a_provider_that_the_gateway_does_not_know():
    assert problems_of(
        block(providerOverrides=[provider({"type": "sourcegraph"})])
    ) == [
        'providerOverrides[0].id: to use Cody Gateway, the provider ID ("p") must match'
        " one of anthropic, openai, fireworks, mistral, google"
    ]


def test_resolve_names_a_provider():
    assert resolved(block()).providers["p"].display_name == 'Provider "p"'
    named = block(providerOverrides=[provider(displayName="Mine")])
    assert resolved(named).providers["p"].display_name == "Mine"


INVALID_URL = "invalid endpoint URL; expected http:// or https:// and a host"
NOT_SERVED = "is not served by this version yet"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"type": "huggingface-tgi"},
            "serverSideConfig.endpoints: expected at least one endpoint",
        ),
        (
            {"type": "openaicompatible", "endpoints": []},
            "serverSideConfig.endpoints: expected at least one endpoint",
        ),
        (
            {**TGI, "url": "http://a/v1"},
            "serverSideConfig: give endpoints or url, not both",
        ),
        (
            {"type": "openai", "url": "http://a", "endpoint": "http://a"},
            "serverSideConfig: give endpoint or url, not both",
        ),
        *(
            (
                {"type": "huggingface-tgi", "endpoints": [{"url": url}]},
                f"serverSideConfig.endpoints[0].url: {INVALID_URL}",
            )
            for url in (
                *("", "tgi:8080/v1", "ftp://a/v1", "http:///v1", "http://[::1/v1"),
                *("http://a:b/v1", "http://a:0/v1", "http://a b/v1", "http://a/\nv1"),
            )
        ),
        (
            {"type": "anthropic", "endpoint": "sk-ant-in-the-wrong-place"},
            f"serverSideConfig.endpoint: {INVALID_URL}",
        ),
        (
            {"type": "huggingface-tgi", "url": "mistral"},
            f"serverSideConfig.url: {INVALID_URL}",
        ),
        (
            {"type": "azureOpenAI"},
            "serverSideConfig.endpoint: missing; expected the URL of the resource",
        ),
        (
            {"type": "awsBedrock", "region": "us-west-2"},
            f'serverSideConfig.type: "awsBedrock" {NOT_SERVED}',
        ),
        (
            {
                "type": "google",
                "endpoint": "https://us-east5-aiplatform.googleapis.com",
            },
            f"serverSideConfig.endpoint: Vertex AI {NOT_SERVED}; expected an endpoint"
            " under https://generativelanguage.googleapis.com",
        ),
        (
            {"type": "openai", "accessToken": "secr\net"},
            "serverSideConfig.accessToken: contains line breaks or control characters",
        ),
        (
            {"type": "openai", "accessToken": "secret", "accessTokenFile": "file"},
            "serverSideConfig: give accessToken or accessTokenFile, not both",
        ),
        (
            {"type": "openai", "headers": {"a:b": "secret"}},
            'serverSideConfig.headers["a:b"]: invalid header name',
        ),
        (
            {"type": "openai", "headers": {"X-Key": "secret\r\n"}},
            "serverSideConfig.headers.X-Key: invalid header value",
        ),
    ],
)
def test_resolve_says_what_is_wrong_with_an_endpoint(config, problem):
    found = problems_of(
        block(providerOverrides=[provider(config)]), read_file=lambda name: "text"
    )
    assert found == [f"providerOverrides[0].{problem}"]


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        (
            {"type": "anthropic", "endpoint": "https://a/v1/complete"},
            "endpoint: /v1/complete is no more; using /v1/messages",
        ),
        (
            {"type": "huggingface-tgi", "endpoints": [{"url": "http://a:80/"}]},
            "endpoints[0].url: has no path; model servers usually want /v1 at the end",
        ),
    ],
)
def test_resolve_warns_of_an_endpoint(config, warning):
    found = warnings_of(block(providerOverrides=[provider(config)]))
    assert found == [f"providerOverrides[0].serverSideConfig.{warning}"]


def test_resolve_reads_the_file_of_a_token():
    files = {"a": " secret\n", "b": "other"}
    config = {
        "type": "openaicompatible",
        "accessTokenFile": "a",
        "endpoints": [
            {"url": "http://a/v1"},
            {"url": "http://b/v1", "accessTokenFile": "b"},
        ],
    }
    found = endpoints_of(config, read_file=files.__getitem__)
    assert [each.access_token for each in found] == ["secret", "other"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the file: No such file or directory"),
        (b"\xff", "cannot read the file: not a text file"),
        (b" \n", "the file is empty"),
        (b"a\nb", "contains line breaks or control characters"),
    ],
)
def test_resolve_says_what_is_wrong_with_the_file_of_a_token(
    tmp_path, content, problem
):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    config = {"type": "openai", "accessTokenFile": str(path)}
    assert problems_of(block(providerOverrides=[provider(config)])) == [
        f"providerOverrides[0].serverSideConfig.accessTokenFile: {problem}"
    ]


@pytest.mark.parametrize(
    ("providers", "problems"),
    [
        (
            [provider(), {**provider(), "id": "a b"}],
            ['providerOverrides[1].id: invalid provider ID: "a b"'],
        ),
        (
            [provider(), {**provider(), "id": ""}],
            ['providerOverrides[1].id: invalid provider ID: ""'],
        ),
        (
            [provider(), provider()],
            ['providerOverrides[1].id: provider "p" specified twice'],
        ),
        (
            [provider(None)],
            [
                "providerOverrides[0].serverSideConfig:"
                ' no server-side config available for provider "p"'
            ],
        ),
        (
            [provider(displayName="x" * 129)],
            ["providerOverrides[0].displayName: display name length: 129; at most 128"],
        ),
    ],
)
def test_resolve_says_what_is_wrong_with_a_provider(providers, problems):
    assert problems_of(block(providerOverrides=providers)) == problems


def test_resolve_says_all_problems_at_once():
    data = block(
        providerOverrides=[provider({"type": "awsBedrock"}), provider(None)],
        modelOverrides=[{"modelRef": "x"}, {"modelRef": "q::v1::m"}],
        modelOverridesRecommendedSettings=["?"],
    )
    assert [each.partition(":")[0] for each in problems_of(data)] == [
        "providerOverrides[0].serverSideConfig.type",
        "providerOverrides[1].id",
        "modelOverridesRecommendedSettings[0]",
        "modelOverrides[0].modelRef",
        "modelOverrides[1]",
    ]


def test_resolve_warns_that_hosted_models_are_not_discovered():
    assert warnings_of(block(sourcegraph={"accessToken": "secret"})) == [
        "sourcegraph: hosted models cannot be discovered here; ignored"
    ]


# -------------------------------------------------------------------------------- models


def models_of(**keys):
    return {model.ref: model for model in resolved(block(**keys)).models}


def test_resolve_completes_a_new_model():
    model = models_of(modelOverrides=[{"modelRef": CHAT}])[CHAT]
    assert model == Model(
        provider_id="p",
        api_version="v1",
        id="chat",
        name="chat",
        display_name="chat",
        capabilities=("chat", "autocomplete"),
        category="balanced",
        status="stable",
        tier="enterprise",
        context_window=ContextWindow(4000, 4000),
        client_config={},
    )


def test_resolve_takes_what_a_model_says():
    override = {
        "modelRef": CHAT,
        "displayName": "Chat!",
        "modelName": "org/chat:latest",
        "capabilities": ["chat", "reasoning"],
        "category": "accuracy",
        "status": "beta",
        "tier": "free",
        "contextWindow": WINDOW,
        "clientSideConfig": {
            "openAICompatible": {"stopSequences": ["a"], "endOfText": "b"}
        },
        "serverSideConfig": {"type": "openaicompatible", "apiModel": "tgi"},
        "reasoningEffort": "high",
        "modelCost": {"inputTokenPennies": 3},
    }
    assert models_of(modelOverrides=[override], defaultModels=all_defaults(CHAT))[
        CHAT
    ] == Model(
        provider_id="p",
        api_version="v1",
        id="chat",
        name="org/chat:latest",
        display_name="Chat!",
        capabilities=("chat", "reasoning"),
        category="accuracy",
        status="beta",
        tier="enterprise",
        context_window=ContextWindow(8000, 2000, 6000),
        api_model="tgi",
        stop=("a",),
        end_of_text="b",
        client_config={"stopSequences": ["a"], "endOfText": "b"},
        reasoning_effort="high",
        model_cost={
            "unit": "mtok",
            "inputTokenPennies": 3.0,
            "outputTokenPennies": 0,
        },
    )


def test_resolve_keeps_every_knob_under_its_name_on_the_wire():
    override = {"modelRef": CHAT, "clientSideConfig": {"openaicompatible": KNOBS}}
    assert models_of(modelOverrides=[override])[CHAT].client_config == KNOBS


def test_resolve_gives_client_config_only_for_autocomplete():
    models = models_of()
    assert models[CHAT].client_config is None
    assert models[CODE].client_config == {}


def test_resolve_puts_the_provider_defaults_under_each_model():
    defaults = {
        **DEFAULT_MODEL,
        "capabilities": ["chat", "autocomplete"],
        "clientSideConfig": {"openAICompatible": {"chatTopP": 0.5, "endOfText": "a"}},
    }
    override = {
        "modelRef": CODE,
        "category": "speed",
        "contextWindow": {"maxOutputTokens": 100},
        "clientSideConfig": {"openaicompatible": {"endOfText": "b"}},
    }
    plain, own = models_of(
        providerOverrides=[provider(defaultModelConfig=defaults)],
        modelOverrides=[{"modelRef": CHAT}, override],
    ).values()
    assert (plain.category, own.category) == ("accuracy", "speed")
    assert plain.context_window == ContextWindow(8000, 2000, 6000)
    assert own.context_window == ContextWindow(8000, 100, 6000)
    assert plain.client_config == {"chatTopP": 0.5, "endOfText": "a"}
    assert own.client_config == {"chatTopP": 0.5, "endOfText": "b"}
    assert plain.api_model == own.api_model == "tgi"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ({"modelRef": ""}, "modelOverrides[0].modelRef: modelRef is blank"),
        (
            {"modelRef": "p::v1::a b"},
            'modelOverrides[0].modelRef: invalid ModelID: "a b"',
        ),
        (
            {"modelRef": "q::v1::m"},
            'modelOverrides[0]: model "q::v1::m" does not match a known provider',
        ),
        (
            {"modelRef": CHAT, "contextWindow": {"maxInputTokens": 0}},
            "modelOverrides[0].contextWindow: invalid max input tokens: 0",
        ),
        (
            {"modelRef": CHAT, "contextWindow": {"maxOutputTokens": -1}},
            "modelOverrides[0].contextWindow: invalid max output tokens: -1",
        ),
        (
            {"modelRef": CHAT, "contextWindow": {"maxUserInputTokens": 0}},
            "modelOverrides[0].contextWindow: invalid max user input tokens: 0",
        ),
        (
            {"modelRef": CHAT, "displayName": "x" * 200},
            "modelOverrides[0].displayName: display name length: 200; at most 128",
        ),
        (
            {"modelRef": CHAT, "reasoningEffort": "low"},
            'modelOverrides[0].reasoningEffort: needs the capability "reasoning"',
        ),
        (
            {
                "modelRef": CHAT,
                "clientSideConfig": {"openAICompatible": {}, "openaicompatible": {}},
            },
            "modelOverrides[0].clientSideConfig:"
            " give openAICompatible or openaicompatible, not both",
        ),
    ],
)
def test_resolve_says_what_is_wrong_with_a_model(override, problem):
    assert problems_of(block(modelOverrides=[override])) == [problem]


def test_resolve_refuses_a_model_twice():
    overrides = [{"modelRef": CHAT}, {"modelRef": CODE}, {"modelRef": CHAT}]
    assert problems_of(block(modelOverrides=overrides)) == [
        f'modelOverrides[2]: model "{CHAT}" specified twice'
    ]


def test_resolve_does_not_blame_models_for_their_provider():
    data = block(providerOverrides=[provider({"type": "awsBedrock"})])
    assert len(problems_of(data)) == 1


def test_resolve_leaves_deprecated_models_out():
    overrides = [{"modelRef": CHAT}, {"modelRef": CODE, "status": "deprecated"}]
    found = resolved(block(modelOverrides=overrides))
    assert [model.ref for model in found.models] == [CHAT]
    assert found.warnings == (
        f'modelConfiguration.modelOverrides[1]: model "{CODE}" is deprecated:'
        " not offered",
        "modelConfiguration.defaultModels.codeCompletion:"
        f' unknown code completion model "{CODE}"; using "{CHAT}"',
    )


def test_resolve_warns_of_settings_for_bedrock():
    config = {"type": "awsBedrock", "latencyOptimization": "standard"}
    overrides = [{"modelRef": CHAT, "serverSideConfig": config}]
    assert warnings_of(block(modelOverrides=overrides, defaultModels=dict.fromkeys(
        ("chat", "fastChat", "codeCompletion"), CHAT))) == [
        'modelOverrides[0].serverSideConfig: "awsBedrock" settings are ignored'
    ]  # fmt: skip


# ------------------------------------------------------------------- well-known models

STARCODER = {
    "stop": ("<|endoftext|>", "<file_sep>"),
    "end_of_text": "<|endoftext|>",
    "capabilities": ("autocomplete",),
    "context_window": ContextWindow(8192, 4096),
    "client_config": {
        "stopSequences": ["<|endoftext|>", "<file_sep>"],
        "endOfText": "<|endoftext|>",
    },
    "strict_template": False,
}
INSTRUCT = {
    "stop": (),
    "end_of_text": "",
    "capabilities": ("chat", "autocomplete"),
    "context_window": ContextWindow(8192, 4096),
    "client_config": {},
    "strict_template": True,
}
BASE = {
    **INSTRUCT,
    "context_window": ContextWindow(8192, 4000),
    "strict_template": False,
}
RECOMMENDED = {
    "bigcode::v1::starcoder2-7b": ("Starcoder2 7B", STARCODER),
    "bigcode::v1::starcoder2-15b": ("Starcoder2 15B", STARCODER),
    "mistral::v1::mistral-7b-instruct": ("Mistral 7B Instruct", INSTRUCT),
    "mistral::v1::mixtral-8x7b-instruct": ("Mixtral 8x7B Instruct", INSTRUCT),
    "mistral::v1::mixtral-8x22b-instruct": ("Mixtral 8x22B Instruct", INSTRUCT),
    "mistral::v1::mistral-7b": ("Mistral 7B", BASE),
    "mistral::v1::mixtral-8x7b": ("Mixtral 8x7B", BASE),
    "mistral::v1::mixtral-8x22b": ("Mixtral 8x22B", BASE),
}


def well_known(**keys):
    providers = [{"id": id, "serverSideConfig": TGI} for id in ("mistral", "bigcode")]
    return block(providerOverrides=providers, modelOverrides=[], **keys)


def all_defaults(ref):
    return dict.fromkeys(("chat", "fastChat", "codeCompletion"), ref)


@pytest.mark.parametrize("ref", RECOMMENDED)
def test_resolve_knows_recommended_settings(ref):
    data = well_known(
        modelOverridesRecommendedSettings=[ref], defaultModels=all_defaults(ref)
    )
    found = resolved(data)
    (model,) = found.models
    name, facts = RECOMMENDED[ref]
    assert (model.ref, model.display_name, model.name) == (ref, name, model.id)
    assert {key: getattr(model, key) for key in facts} == facts
    assert (model.category, model.status) == ("balanced", "stable")
    assert found.warnings == ()


@pytest.mark.parametrize(
    "ref", [ref for ref in RECOMMENDED if RECOMMENDED[ref][1] is not BASE]
)
def test_resolve_knows_self_hosted_models(ref):
    name = ref.rpartition("::")[2]
    own = f"p::v1::{name}"
    data = block(
        modelOverrides=[],
        selfHostedModels=[{"provider": "p", "model": f"{name}@v1"}],
        defaultModels=all_defaults(own),
    )
    (model,) = resolved(data).models
    assert model.ref == own
    facts = RECOMMENDED[ref][1]
    assert {key: getattr(model, key) for key in facts} == facts


@pytest.mark.parametrize("wrapped", [True, False])
def test_resolve_puts_a_self_hosted_override_over_the_settings(wrapped):
    knobs = {"autoCompleteTemperature": 0.5, "stopSequences": ["<end>"]}
    override = {
        "displayName": "Mine",
        "contextWindow": {"maxInputTokens": 16384},
        "clientSideConfig": {"openaicompatible": knobs} if wrapped else knobs,
        "serverSideConfig": {"apiModel": "tgi"},
    }
    own = {
        "provider": "p",
        "model": "starcoder2-7b@v1",
        "apiVersion": "v2",
        "override": override,
    }
    ref = "p::v2::starcoder2-7b"
    (model,) = resolved(
        block(
            modelOverrides=[],
            selfHostedModels=[own],
            defaultModels=all_defaults(ref),
        )
    ).models
    assert model.ref == ref
    assert model.display_name == "Mine"
    assert model.context_window == ContextWindow(16384, 4096)
    assert model.api_model == "tgi"
    assert model.stop == ("<end>",)
    assert model.end_of_text == "<|endoftext|>"
    assert model.client_config == {**knobs, "endOfText": "<|endoftext|>"}


def test_resolve_takes_a_self_hosted_override_without_knobs():
    ref = "p::v1::starcoder2-7b"
    own = {"provider": "p", "model": "starcoder2-7b@v1", "override": {}}
    data = block(
        modelOverrides=[], selfHostedModels=[own], defaultModels=all_defaults(ref)
    )
    (model,) = resolved(data).models
    assert {key: getattr(model, key) for key in STARCODER} == STARCODER


def test_resolve_changes_only_given_fields_of_a_known_model():
    ref = "bigcode::v1::starcoder2-7b"
    data = well_known(
        modelOverridesRecommendedSettings=[ref], defaultModels=all_defaults(ref)
    )
    data["modelOverrides"] = [{"modelRef": ref, "modelName": "bigcode/starcoder2"}]
    (model,) = resolved(data).models
    assert model.name == "bigcode/starcoder2"
    assert model.display_name == "Starcoder2 7B"
    assert {key: getattr(model, key) for key in STARCODER} == STARCODER


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"modelOverridesRecommendedSettings": ["bigcode::v1::starcoder2-3b"]},
            "modelOverridesRecommendedSettings[0]:"
            ' no recommended settings for "bigcode::v1::starcoder2-3b"; known: '
            + ", ".join(RECOMMENDED),
        ),
        (
            {"selfHostedModels": [{"provider": "mistral", "model": "mistral-7b"}]},
            'selfHostedModels[0].model: no recommended settings for "mistral-7b"; known:'
            " starcoder2-7b@v1, starcoder2-15b@v1, mistral-7b-instruct@v1,"
            " mixtral-8x7b-instruct@v1, mixtral-8x22b-instruct@v1",
        ),
        (
            {"modelOverridesRecommendedSettings": ["bigcode::v1::starcoder2-7b"] * 2},
            "modelOverridesRecommendedSettings[1]:"
            ' model "bigcode::v1::starcoder2-7b" specified twice',
        ),
        (
            {
                "modelOverridesRecommendedSettings": ["bigcode::v1::starcoder2-7b"],
                "selfHostedModels": [
                    {"provider": "bigcode", "model": "starcoder2-7b@v1"}
                ],
            },
            'selfHostedModels[0]: model "bigcode::v1::starcoder2-7b" specified twice',
        ),
        (
            {"selfHostedModels": [{"provider": "x", "model": "starcoder2-7b@v1"}]},
            'selfHostedModels[0]: model "x::v1::starcoder2-7b" does not match a known'
            " provider",
        ),
        (
            {"selfHostedModels": [{"provider": "x y", "model": "starcoder2-7b@v1"}]},
            'selfHostedModels[0]: invalid ProviderID: "x y"',
        ),
        (
            {
                "selfHostedModels": [
                    {
                        "provider": "mistral",
                        "model": "starcoder2-7b@v1",
                        "override": {
                            "clientSideConfig": {
                                "openaicompatible": {},
                                "openAICompatible": {},
                            }
                        },
                    }
                ]
            },
            "selfHostedModels[0].override.clientSideConfig:"
            " give openAICompatible or openaicompatible, not both",
        ),
    ],
)
def test_resolve_says_what_is_wrong_with_well_known_models(keys, problem):
    assert problems_of(well_known(**keys)) == [problem]


# ------------------------------------------------------------------------------ defaults


def candidates(*models):
    return [
        {"modelRef": f"p::v1::{id}", "capabilities": [capability], "category": category}
        for id, capability, category in models
    ]


@pytest.mark.parametrize(
    ("models", "chat", "fast_chat", "code"),
    [
        (
            [("a", "chat", "balanced"), ("b", "autocomplete", "balanced")],
            *("a", "a", "b"),
        ),
        (
            [
                ("a", "autocomplete", "accuracy"),
                ("b", "chat", "speed"),
                ("c", "chat", "accuracy"),
                ("d", "chat", "balanced"),
                ("e", "autocomplete", "balanced"),
                ("f", "autocomplete", "speed"),
            ],
            *("c", "b", "e"),
        ),
    ],
)
def test_resolve_repairs_defaults_in_the_order_of_the_configuration(
    models, chat, fast_chat, code
):
    found = resolved(block(modelOverrides=candidates(*models), defaultModels=None))
    chat, fast_chat, code = (f"p::v1::{id}" for id in (chat, fast_chat, code))
    assert found.default_models == DefaultModels(chat, fast_chat, code)
    assert found.warnings == (
        f'modelConfiguration.defaultModels.chat: not set; using "{chat}"',
        f'modelConfiguration.defaultModels.fastChat: not set; using "{fast_chat}"',
        f'modelConfiguration.defaultModels.codeCompletion: not set; using "{code}"',
    )


def test_resolve_warns_of_unknown_defaults():
    defaults = {"chat": "x::v1::y", "fastChat": "z", "codeCompletion": "p/code"}
    assert warnings_of(block(defaultModels=defaults)) == [
        f'defaultModels.chat: unknown chat model "x::v1::y"; using "{CHAT}"',
        f'defaultModels.fastChat: unknown fast chat model "z"; using "{CHAT}"',
        f'defaultModels.codeCompletion: unknown code completion model "p/code";'
        f' using "{CODE}"',
    ]


def test_resolve_takes_any_model_as_a_default_that_is_named():
    defaults = {"chat": CODE, "fastChat": CODE, "codeCompletion": CHAT}
    found = resolved(block(defaultModels=defaults))
    assert found.default_models == DefaultModels(CODE, CODE, CHAT)
    assert found.warnings == ()


def test_resolve_without_a_suitable_default():
    models = candidates(("a", "chat", "speed"), ("b", "autocomplete", "other"))
    assert problems_of(
        block(modelOverrides=models, defaultModels={"codeCompletion": "x"})
    ) == [
        "defaultModels.chat: not set,"
        " and no suitable model found for Chat (2 candidates)",
        'defaultModels.codeCompletion: unknown code completion model "x",'
        " and no suitable model found for CodeCompletion (2 candidates)",
    ]


def test_resolve_without_models():
    with pytest.raises(ConfigError) as caught:
        resolve(shaped({}))
    assert caught.value.problems == [
        "modelConfiguration: no models; name some in modelOverrides, selfHostedModels or modelOverridesRecommendedSettings"
    ]


def test_resolve_keeps_the_pre_instruction():
    found = resolved(block(systemPreInstruction="Speak like a pirate."))
    assert found.system_pre_instruction == "Speak like a pirate."
    assert resolved(block()).system_pre_instruction == ""


def test_resolve_takes_the_blessed_configuration():
    data = yaml.safe_load(to_yaml(BLESSED))["modelConfiguration"]
    found = resolved(data)
    assert found.providers == {
        "mistral": Provider(
            id="mistral",
            type="huggingface-tgi",
            endpoints=(Endpoint("https://mistral.example.com/v1"),),
            display_name="Mistral",
        ),
        "bigcode": Provider(
            id="bigcode",
            type="huggingface-tgi",
            endpoints=(Endpoint("http://starcoder.example.com/v1"),),
            display_name="Bigcode",
        ),
    }
    assert [model.ref for model in found.models] == [
        "mistral::v1::mixtral-8x7b-instruct",
        "bigcode::v1::starcoder2-7b",
    ]
    assert found.default_models == DefaultModels(
        chat="mistral::v1::mixtral-8x7b-instruct",
        fast_chat="mistral::v1::mixtral-8x7b-instruct",
        code_completion="bigcode::v1::starcoder2-7b",
    )
    assert found.warnings == ()


# ------------------------------------------------------------------------------- choose


def model(ref, **more):
    provider_id, api_version, id = ref.split("::")
    facts = {
        "name": id,
        "display_name": id,
        "capabilities": ("chat", "autocomplete"),
        "category": "balanced",
        "status": "stable",
        "tier": "enterprise",
        "context_window": ContextWindow(4000, 4000),
    }
    return Model(provider_id, api_version, id, **(facts | more))


CONFIGURATION = ModelConfiguration(
    providers={},
    models=(
        model("a::v1::big", name="org/Big-Upstream"),
        model("a::v1::small", api_model="tgi"),
        model("b::v1::big"),
        model("b::v2::Code", name="coder"),
        model("meta::v1::llama/3/chat"),
        model("c::v1::tgi"),
    ),
    default_models=DefaultModels("a::v1::big", "a::v1::small", "b::v2::Code"),
    aliases={"gpt-4": "a::v1::small", "b/big": "a::v1::big"},
)


@pytest.mark.parametrize("feature", ["chat", "code"])
@pytest.mark.parametrize(
    ("name", "ref"),
    [
        ("a::v1::small", "a::v1::small"),
        ("a/small", "a::v1::small"),
        ("small", "a::v1::small"),
        ("b/Code", "b::v2::Code"),
        ("big", "a::v1::big"),
        ("meta/llama/3/chat", "meta::v1::llama/3/chat"),
        ("llama/3/chat", "meta::v1::llama/3/chat"),
        ("  b::v1::big\n", "b::v1::big"),
        ("A::V1::SMALL", "a::v1::small"),
        ("b/CODE", "b::v2::Code"),
        ("code", "b::v2::Code"),
        ("gpt-4", "a::v1::small"),
        ("GPT-4", "a::v1::small"),
        ("b/big", "a::v1::big"),
        ("org/Big-Upstream", "a::v1::big"),
        ("ORG/big-upstream", "a::v1::big"),
        ("coder", "b::v2::Code"),
        ("tgi", "c::v1::tgi"),
    ],
)
def test_choose_by_name(feature, name, ref):
    assert CONFIGURATION.choose(feature, name, fast=False).ref == ref


def test_choose_by_upstream_name_takes_the_api_model_first():
    found = ModelConfiguration(
        providers={},
        models=(
            model("a::v1::x", name="tgi"),
            model("a::v1::y", name="org/Y", api_model="tgi"),
        ),
        default_models=DefaultModels(*["a::v1::x"] * 3),
    )
    assert found.choose("chat", "org/y", fast=False).ref == "a::v1::y"
    assert found.choose("chat", "TGI", fast=False).ref == "a::v1::x"


@pytest.mark.parametrize(
    ("feature", "name", "fast", "ref"),
    [
        ("chat", "", False, "a::v1::big"),
        ("chat", " ", False, "a::v1::big"),
        ("chat", "", True, "a::v1::small"),
        ("chat", "b::v1::big", True, "a::v1::small"),
        ("chat", "nobody", True, "a::v1::small"),
        ("code", "", False, "b::v2::Code"),
        ("code", "", True, "b::v2::Code"),
        ("code", "b::v1::big", True, "b::v1::big"),
    ],
)
def test_choose_the_default(feature, name, fast, ref):
    assert CONFIGURATION.choose(feature, name, fast).ref == ref


@pytest.mark.parametrize(
    ("feature", "name", "text"),
    [
        ("chat", "x", 'Unsupported chat model "x" (default "a::v1::big")'),
        ("chat", " a/x ", 'Unsupported chat model "a/x" (default "a::v1::big")'),
        (
            "chat",
            "a::v2::big",
            'Unsupported chat model "a::v2::big" (default "a::v1::big")',
        ),
        (
            "code",
            "x",
            'Unsupported code completion model "x" (default "b::v2::Code")',
        ),
    ],
)
def test_choose_unknown(feature, name, text):
    with pytest.raises(UnknownModel) as caught:
        CONFIGURATION.choose(feature, name, fast=False)
    assert caught.value.message == text
    assert caught.value.status == 400


def test_choose_falls_back():
    found = msgspec.structs.replace(CONFIGURATION, fallback=True)
    assert found.choose("chat", "x", fast=False).ref == "a::v1::big"
    assert found.choose("code", "x", fast=False).ref == "b::v2::Code"
    assert found.choose("code", "small", fast=False).ref == "a::v1::small"


def test_choose_after_replace_knows_the_new_models():
    CONFIGURATION.choose("chat", "", fast=False)
    found = msgspec.structs.replace(CONFIGURATION, aliases={"new": "a::v1::big"})
    assert found.choose("chat", "new", fast=False).ref == "a::v1::big"
    with pytest.raises(UnknownModel):
        found.choose("chat", "gpt-4", fast=False)


@given(st.text())
def test_choose_finds_or_refuses_any_name(name):
    try:
        found = CONFIGURATION.choose("chat", name, fast=False)
    except UnknownModel as error:
        assert error.message.startswith("Unsupported chat model")
    else:
        assert found in CONFIGURATION.models


# ------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("url", "name", "public_url"),
    [
        ("https://host/v1", "host", "https://host/v1"),
        ("http://host:8080", "host:8080", "http://host:8080"),
        ("http://[::1]:80/v1", "[::1]:80", "http://[::1]:80/v1"),
        ("https://me:secret@host/v1?key=secret", "host", "https://host/v1"),
        ("https://me:se@cret@host:1?key=secret#x", "host:1", "https://host:1"),
        ("https://host/a@b", "host", "https://host/a@b"),
        ("", "", ""),
    ],
)
def test_endpoint_names_hold_no_secret(url, name, public_url):
    endpoint = Endpoint(url)
    assert (endpoint.name, endpoint.public_url) == (name, public_url)


def test_endpoint_shows_no_secret():
    endpoint = Endpoint("http://u:secret@a/v1?k=secret", "secret", {"X": "secret"}, "k")
    shown = "Endpoint(url='http://a/v1', access_token='…', headers={'X': '…'}, access_token_query='k')"
    assert repr(endpoint) == shown
    assert "secret" not in repr(endpoint.__rich_repr__())
    assert endpoint.secrets == ["secret"] * 4 + ["secret"]


def test_blocks_show_no_secret():
    found = shaped(FULL)
    assert repr(found) == "Block(…)"
    assert found.__rich_repr__() == []
    assert "secret" not in repr(found.provider_overrides)
