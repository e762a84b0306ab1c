"""The configuration file: its text, its own settings, and what they come to."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from proxy.config import (
    AllTimeouts,
    Limits,
    Rates,
    Settings,
    TokenLimits,
    describe,
    for_upstream,
    load,
    read,
    secrets,
)
from proxy.errors import ConfigError

BLESSED = (Path(__file__).parent / "data/blessed.jsonc").read_text()

MIXTRAL = "mistral::v1::mixtral-8x7b-instruct"
STARCODER = "bigcode::v1::starcoder2-7b"
REF = "p::v1::m"
BLOCK = {
    "providerOverrides": [
        {
            "id": "p",
            "serverSideConfig": {"type": "openaicompatible", "url": "http://a/v1"},
        }
    ],
    "modelOverrides": [{"modelRef": REF}],
    "defaultModels": {"chat": REF, "fastChat": REF, "codeCompletion": REF},
}

HOW_TO_CLOSE = (
    "set COMPLETIONS_PROXY_TOKENS or auth.tokens to let in only who has a token"
)
LOCALLY_OPEN = (
    "auth: no token is asked for: every program on this machine can use the models; "
    + HOW_TO_CLOSE
)


def file(**keys):
    """The text of a file that is in order, with ``keys`` added."""
    return yaml.safe_dump({"modelConfiguration": BLOCK, **keys}, sort_keys=False)


def loaded(text=None, *, environ=None, directory=Path(), listen=None, **keys):
    text = file(**keys) if text is None else text
    return load(text, environ=environ or {}, directory=directory, listen=listen)


def problems_of(text=None, **more):
    with pytest.raises(ConfigError) as caught:
        loaded(text, **more)
    return caught.value.problems


def digest(text):
    return hashlib.sha256(text.encode()).digest()


# ------------------------------------------------------------------- forms of the file

OWN = "listen: 127.0.0.1:9\nfallback: true\n"


@pytest.mark.parametrize(
    "text",
    [
        BLESSED,
        BLESSED.rstrip() + ",\n",
        BLESSED.replace("  ", "\t"),
        BLESSED.replace("\n", "\r\n"),
        "\ufeff" + BLESSED,
        "{\n" + BLESSED + "}\n",
        '{\n  "cody.enabled": true,\n' + BLESSED + "}\n",
        '  "cody.enabled": true, // and more\n' + BLESSED,
        "/* the whole file */\n{\n" + BLESSED + ",\n}",
        OWN + BLESSED,
        OWN + BLESSED.rstrip() + ",\n",
        OWN + BLESSED.replace("  ", "\t"),
        OWN + '  "cody.enabled": true,\n' + BLESSED,
        "# a comment's quote, and {\n" + OWN + "# more //\n" + BLESSED + "\n# end",
        BLESSED + OWN,
        BLESSED.rstrip() + "," + "\n" + OWN,
        "models:\n  " + MIXTRAL + ":\n    strictTemplate: true\n" + BLESSED,
        "aliases:\n  'a {': " + MIXTRAL + '\n  "b": "' + MIXTRAL + '"\n' + BLESSED,
        re.sub(r"(?m)^\s*//[^\n]*\n", "", BLESSED),
        re.sub(r"(?m)^\s*//", "#", BLESSED),
        re.sub(r"(?m)^(\s*)//([^\n]*)", r"\1/*\2 */", BLESSED),
        BLESSED.replace('"modelConfiguration": {', '"modelConfiguration":{'),
    ],
)
def test_load_takes_the_blessed_configuration_in_any_form(text):
    models = loaded(text).models
    assert models.choose("chat", "", fast=False).ref == MIXTRAL
    assert models.choose("code", "", fast=False).ref == STARCODER
    provider = models.providers["bigcode"]
    assert provider.endpoints[0].url == "http://starcoder.example.com/v1"
    assert models.warnings == ()


def test_load_reads_own_settings_beside_the_pasted_block():
    settings = loaded(OWN + BLESSED)
    assert settings.listen == (("127.0.0.1", 9),)
    assert settings.models.fallback


def test_load_takes_the_block_as_yaml():
    block = yaml.safe_dump(BLOCK, default_flow_style=False)
    text = "modelConfiguration:\n" + "".join(
        f"  {line}\n" for line in block.splitlines()
    )
    assert loaded(text).models.choose("chat", "m", fast=False).ref == REF


@pytest.mark.parametrize(
    "refs",
    [
        f'[ // the first\n "{MIXTRAL}", // the second\n "{STARCODER}" ]',
        f'[ /* one */ "{MIXTRAL}",\n /* two */ "{STARCODER}" ]',
        f'["{MIXTRAL}",// two\n"{STARCODER}"]',
    ],
)
def test_load_takes_a_comment_for_one_where_yaml_would_not(refs):
    # YAML reads a comment at the start of a list and the string after it as one word.
    data = yaml.safe_load(re.sub(r"(?m)^\s*//[^\n]*\n", "", BLESSED))
    data["modelConfiguration"]["modelOverridesRecommendedSettings"] = "REFS"
    text = json.dumps(data).replace('"REFS"', refs)
    assert yaml.safe_load(text)
    models = loaded(text).models
    assert [model.ref for model in models.models] == [MIXTRAL, STARCODER]


def test_load_takes_a_comment_after_a_value_for_one():
    text = json.dumps({"modelConfiguration": BLOCK, "fallback": "VALUE"})
    for value in ("true // why\n", "true// why\n", "true /* why */"):
        assert loaded(text.replace('"VALUE"', value)).models.fallback


def test_load_takes_slashes_for_text_where_a_comment_would_break_the_file():
    text = file() + "aliases: {a: //host/share}\n"
    assert problems_of(text) == [
        f'aliases.a: unknown model "//host/share"; known: {REF}'
    ]


def test_load_leaves_yaml_alone_that_has_two_slashes():
    text = file() + "aliases: {a//b: p::v1::m, 'c // d': p::v1::m}\n"
    assert set(loaded(text).models.aliases) == {"a//b", "c // d"}
    text = file() + f"aliases:\n  a: {REF}\n  b // c: {REF}\n"
    assert set(loaded(text).models.aliases) == {"a", "b // c"}


@pytest.mark.parametrize(
    ("written", "value"),
    [("2024-06-01", "2024-06-01"), ('"\\ud83d\\ude00"', "😀"), ('"a\\/b"', "a/b")],
)
def test_load_reads_text_as_json_means_it(written, value):
    text = yaml.safe_dump({"modelConfiguration": {**BLOCK, "systemPreInstruction": 0}})
    text = text.replace("systemPreInstruction: 0", f"systemPreInstruction: {written}")
    assert loaded(text).models.system_pre_instruction == value


def test_load_reads_numbers_as_json_means_them():
    text = file() + "timeouts: {connect: 1e1, chat: 1E+2, code: 5}\n"
    assert loaded(text).timeouts == AllTimeouts(10.0, 100.0, 5.0)


def test_load_follows_anchors():
    text = """
modelConfiguration:
  providerOverrides:
  - {id: a, serverSideConfig: &same {type: openaicompatible, url: "http://a/v1"}}
  - {id: b, serverSideConfig: *same}
  modelOverrides: [modelRef: "a::v1::m"]
"""
    providers = loaded(text).models.providers
    assert providers["a"].endpoints == providers["b"].endpoints


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file: expected a mapping, got nothing"),
        ("# nothing\n", "the file: expected a mapping, got nothing"),
        ("[]", "the file: expected a mapping, got a list"),
        ("{}", "modelConfiguration: missing; expected a mapping"),
        (
            "a: b: c",
            "line 1, column 5: mapping values are not allowed here",
        ),
        (
            'a: 1\n"b": {\n  "c": [1, 2\n  "d": 3 // why\n}',
            "line 4, column 6: expected ',' or ']', but got ':',"
            " while parsing a flow sequence",
        ),
        (
            "a: 'b",
            "line 1, column 6: found unexpected end of stream,"
            " while scanning a quoted scalar",
        ),
        ("a: *secret", "line 1, column 4: found undefined alias '…'"),
        (
            "a: !secret b",
            "line 1, column 4: could not determine a constructor for the tag '…'",
        ),
        (
            "a: !!binary b",
            "line 1, column 4: could not determine a constructor for the tag '…'",
        ),
        ("a: !!int secret", "the file: a value does not fit its YAML tag"),
        ("a: !!bool secret", "the file: a value does not fit its YAML tag"),
        ("a: b\n\x00", "line 2: special characters are not allowed"),
        ("a: b\n---\nc: d", "line 2, column 1: but found another document, expected a single document in the stream"),
        ("{[1]: 2}", None),
        ("[" * 500, "the file: nested too deeply"),
        ("a: &a [*a]", "the file: nested too deeply"),
        (
            "? [a]\n: b",
            "line 1, column 3: found unhashable key, while constructing a mapping",
        ),
    ],
)  # fmt: skip
def test_load_of_what_is_no_configuration(text, problem):
    problems = problems_of(text)
    assert problem is None or problems == [problem]


def test_load_refuses_keys_given_twice():
    text = (
        "fallback: true\n"
        'modelConfiguration: {"sourcegraph": null, // why\n'
        ' "providerOverrides": [\n  {"id": "a",\n   "id": "b"}],\n'
        ' "sourcegraph": null}\n'
        "fallback: false\n"
    )
    assert problems_of(text) == [
        "modelConfiguration.providerOverrides[0].id:"
        " given twice, in line 4 and in line 5",
        "modelConfiguration.sourcegraph: given twice, in line 2 and in line 6",
        "fallback: given twice, in line 1 and in line 7",
    ]


def test_load_says_every_problem_of_shape_at_once():
    text = file(
        limit={},
        limits={"bodyBytes": 0, "eventByte": 1},
        timeouts={"chat": -1, "code": "60s", "connect": float("inf")},
        shutdown={"delay": -1, "grace": 0},
        listen=8080,
        auth="nobody",
        aliases={"a": None},
        models={REF: {"strict": True}},
        fallback="yes",
        clientVersionCheck=1,
    ).replace("modelRef: p::v1::m", "modelref: ${UNSET}")
    assert problems_of(text) == [
        "modelConfiguration.modelOverrides[0].modelref:"
        " environment variable UNSET is not set",
        "modelConfiguration.modelOverrides[0].modelref: unknown key;"
        ' did you mean "modelRef"?',
        "modelConfiguration.modelOverrides[0].modelRef: missing; expected a string",
        'limit: unknown key; did you mean "limits"?',
        "limits.bodyBytes: expected an integer above 0",
        'limits.eventByte: unknown key; did you mean "eventBytes"?',
        "timeouts.chat: expected a number above 0",
        "timeouts.code: expected a number above 0, got a string",
        "timeouts.connect: expected a number above 0, got one that is too large",
        "shutdown.delay: expected a number of at least 0",
        "listen: expected a string or a list, got an integer; put it in quotes",
        'auth: expected "none"',
        'aliases["…"]: expected a string, got nothing',
        f'models["{REF}"].strict: unknown key; known: strictTemplate, fallback,'
        " liftPreamble",
        "fallback: expected true or false, got a string",
        "clientVersionCheck: expected true or false, got an integer",
    ]


def test_load_says_every_problem_of_meaning_at_once():
    data = json.loads(json.dumps(BLOCK))
    data["providerOverrides"][0]["serverSideConfig"]["url"] = "nowhere"
    data["modelOverrides"].append({"modelRef": "q"})
    text = yaml.safe_dump(
        {
            "modelConfiguration": data,
            "listen": ["nowhere", "127.0.0.1:1"],
            "auth": {"tokens": [{"name": "a"}]},
        }
    )
    assert [problem.partition(":")[0] for problem in problems_of(text)] == [
        "listen[0]",
        "auth.tokens[0]",
        "modelConfiguration.providerOverrides[0].serverSideConfig.url",
        "modelConfiguration.modelOverrides[1].modelRef",
    ]


@given(st.text(alphabet="{}[]\"',:/*#\\\n -?|>&!%@`a1~<\t\x00\ud800", max_size=30))
def test_load_of_any_text_raises_only_config_errors(text):
    with pytest.raises(ConfigError):
        loaded(text)


# Less what YAML 1.1 alone takes for text: 1e3 is a number to JSON and to YAML 1.2.
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda name: not re.fullmatch(r"-?\d[\d.]*[eE][+-]?\d+", name, re.ASCII)
)


@given(
    st.dictionaries(NAMES, st.just(REF)),
    st.sampled_from([None, True, False]),
    st.booleans(),
)
def test_load_never_changes_what_yaml_means(aliases, flow, unicode):
    text = yaml.safe_dump(
        {"aliases": aliases, "modelConfiguration": BLOCK},
        default_flow_style=flow,
        allow_unicode=unicode,
    )
    # In a JSON part a word of its own that begins like a comment is one.
    if flow is False or not re.search(
        r"(?:\s|\{|, )(?://|/\*)|[0-9el](?://|/\*)", text
    ):
        assert loaded(text).models.aliases == aliases


# ----------------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${HOST}", "host"),
        ("a ${HOST} b ${HOST}", "a host b host"),
        ("${HOST:-other}", "host"),
        ("${UNSET:-other}", "other"),
        ("${UNSET:-}", ""),
        ("${EMPTY}", ""),
        ("${EMPTY:-other}", "other"),
        ("$${HOST}", "${HOST}"),
        ("$$${HOST}", "$${HOST}"),
        ("$HOST $$ $", "$HOST $$ $"),
        ("${NESTED}", "${HOST}"),
    ],
)
def test_load_expands_variables(text, value):
    environ = {"HOST": "host", "EMPTY": "", "NESTED": "${HOST}"}
    data = {**BLOCK, "systemPreInstruction": text}
    settings = loaded(yaml.safe_dump({"modelConfiguration": data}), environ=environ)
    assert settings.models.system_pre_instruction == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${UNSET}", "environment variable UNSET is not set"),
        *(
            (
                text,
                "expected ${NAME} or ${NAME:-default}; a literal ${ is written $${",
            )
            for text in ("${", "${}", "${1X}", "${A", "${A-b}", "${A B}", "${Ä}")
        ),
    ],
)
def test_load_refuses_variables_it_cannot_expand(text, problem):
    found = problems_of(file(listen=["127.0.0.1:1", text]))
    assert found == [f"listen[1]: {problem}"]


def test_load_expands_no_keys():
    assert "${X}" in loaded(aliases={"${X}": REF}).models.aliases


# ------------------------------------------------------------------------------- listen


@pytest.mark.parametrize(
    ("listen", "addresses"),
    [
        ("127.0.0.1:8081", [("127.0.0.1", 8081)]),
        ("localhost:0", [("localhost", 0)]),
        ("[::1]:65535", [("::1", 65535)]),
        (" 127.0.0.1:1 ", [("127.0.0.1", 1)]),
        (["127.0.0.1:1", "[::1]:1"], [("127.0.0.1", 1), ("::1", 1)]),
        (["127.0.0.1:1", "127.0.0.1:1"], [("127.0.0.1", 1)]),
    ],
)
def test_load_listen(listen, addresses):
    assert loaded().listen == (("127.0.0.1", 8080),)
    text = file(listen=listen)
    assert load(text, environ={}, directory=Path()).listen == tuple(addresses)


ADDRESS = 'expected "host:port", as in "127.0.0.1:8080" or "[::1]:8080"'


@pytest.mark.parametrize(
    ("listen", "problem"),
    [
        *(
            (text, f"listen: {ADDRESS}")
            for text in (
                *("8080", ":8080", "localhost", "localhost:", "::1:80", "a b:1"),
                *("[::1]", "[x]:1", "[1.2.3]:1", "http://a:1", "a:65536", "a:123456"),
            )
        ),
        ([], "listen: expected at least one address"),
        (["127.0.0.1:1", "x"], f"listen[1]: {ADDRESS}"),
    ],
)
def test_load_listen_refused(listen, problem):
    text = file(listen=listen)
    assert problems_of(text) == [problem]


def test_load_listen_overridden():
    text = file(listen="0.0.0.0:80")
    assert loaded(text, listen="127.0.0.1:1").listen == (("127.0.0.1", 1),)
    assert problems_of(text, listen="x") == [f"listen: {ADDRESS}"]


# ------------------------------------------------------------------------------- access


def test_load_tokens(tmp_path):
    (tmp_path / "token").write_text("from a file\n".replace(" ", "-"))
    tokens = [
        {"name": "a", "token": "plain"},
        {"name": "b", "sha256": digest("hashed").hex().upper(), "email": "b@c"},
        {"name": "c", "tokenFile": "token"},
    ]
    environ = {"COMPLETIONS_PROXY_TOKENS": " one, plain\n,two two "}
    text = file(auth={"tokens": tokens}, listen="0.0.0.0:80")
    settings = loaded(text, environ=environ, directory=tmp_path)
    assert [(each.name, each.sha256) for each in settings.tokens] == [
        ("a", digest("plain")),
        ("b", digest("hashed")),
        ("c", digest("from-a-file")),
        ("env-1", digest("one")),
        ("env-3", digest("two")),
    ]
    assert [each.email for each in settings.tokens] == ["", "b@c", "", "", ""]
    assert not settings.open
    assert settings.warnings == ()


def test_load_takes_a_variable_that_is_no_text():
    environ = {"COMPLETIONS_PROXY_TOKENS": os.fsdecode(b"cp_\xff")}
    (token,) = loaded(environ=environ).tokens
    assert token.sha256 == hashlib.sha256(b"cp_\xff").digest()


@pytest.mark.parametrize(
    ("tokens", "problems"),
    [
        ([{"name": "a"}], ["auth.tokens[0]: expected one of sha256, token, tokenFile"]),
        (
            [{"name": "a", "token": "secret", "sha256": "00"}],
            ["auth.tokens[0]: expected one of sha256, token, tokenFile"],
        ),
        (
            [{"name": "a", "sha256": "secret"}],
            ["auth.tokens[0].sha256: expected 64 hexadecimal digits"],
        ),
        (
            [{"name": "a", "sha256": digest("").hex()}],
            ["auth.tokens[0].sha256: is the digest of an empty text"],
        ),
        (
            [{"name": "a", "token": ""}, {"name": "b", "token": "sec ret"}],
            [
                "auth.tokens[0]: expected a token without blanks in it",
                "auth.tokens[1]: expected a token without blanks in it",
            ],
        ),
        (
            [{"name": "a", "token": "sec\nret"}],
            ["auth.tokens[0].token: contains line breaks or control characters"],
        ),
        (
            [{"name": "a", "tokenFile": "missing"}],
            [
                "auth.tokens[0].tokenFile:"
                " cannot read the file: No such file or directory"
            ],
        ),
        (
            [{"name": "a", "token": "x"}, {"name": "a", "token": "y"}],
            ['auth.tokens[1].name: "a" given twice'],
        ),
        (
            [
                {"name": "a", "token": "secret"},
                {"name": "b", "sha256": digest("secret").hex()},
            ],
            ['auth.tokens[1]: the same token as "a"'],
        ),
        (
            [{"token": 12345}],
            [
                "auth.tokens[0].token: expected a string, got an integer;"
                " put it in quotes",
                "auth.tokens[0].name: missing; expected a string",
            ],
        ),
    ],
)
def test_load_tokens_refused(tokens, problems):
    assert problems_of(auth={"tokens": tokens}) == problems


@pytest.mark.parametrize("listen", ["127.0.0.2:1", "[::1]:1", "localhost:1"])
@pytest.mark.parametrize("auth", [{}, {"auth": "none"}, {"auth": {"tokens": []}}])
def test_load_without_tokens_is_open_to_the_machine(listen, auth):
    settings = loaded(file(listen=listen, **auth))
    assert settings.open
    assert settings.warnings == (LOCALLY_OPEN,)


def test_load_without_tokens_is_not_open_to_a_network():
    text = file(listen=["127.0.0.1:1", "0.0.0.0:2", "[::]:3", "proxy.local:4"])
    assert problems_of(text) == [
        "auth: 0.0.0.0:2, [::]:3, proxy.local:4 can be reached from other machines; "
        f'{HOW_TO_CLOSE}, or say "auth: none"'
    ]


def test_load_is_open_to_a_network_if_told_so():
    settings = loaded(file(listen="0.0.0.0:80", auth="none"))
    assert settings.open
    assert settings.warnings == (
        "auth: no token is asked for: all who reach 0.0.0.0:80 can use the models; "
        + HOW_TO_CLOSE,
    )


def test_load_refuses_tokens_and_none():
    environ = {"COMPLETIONS_PROXY_TOKENS": "secret"}
    assert problems_of(auth="none", environ=environ) == [
        'auth: "none" contradicts the tokens in COMPLETIONS_PROXY_TOKENS'
    ]


# ------------------------------------------------------------------- the other settings


def test_load_defaults():
    settings = loaded()
    assert settings.limits == Limits(body_bytes=33554432, event_bytes=10485760)
    assert settings.timeouts == AllTimeouts(connect_s=10, chat_s=480, code_s=60)
    assert not settings.client_version_check
    assert not settings.models.fallback
    assert settings.models.aliases == {}


def test_load_own_settings():
    settings = loaded(
        limits={"bodyBytes": 1, "eventBytes": 2},
        timeouts={"connect": 0.5, "chat": 3, "code": 4},
        aliases={"gpt-4": REF},
        fallback=True,
        models={REF: {"strictTemplate": True}},
        clientVersionCheck=True,
    )
    assert settings.limits == Limits(body_bytes=1, event_bytes=2)
    assert settings.timeouts == AllTimeouts(0.5, 3.0, 4.0)
    assert settings.models.choose("chat", "gpt-4", fast=False).ref == REF
    assert settings.models.choose("chat", "nobody", fast=False).ref == REF
    assert settings.models.models[0].strict_template
    assert settings.client_version_check


LIMITS = {
    "inFlight": 8,
    "token": {"inFlight": 4, "chat": {"requestsPerMinute": 20, "tokensPerDay": 10000}},
    "redis": "redis://:s3%20cret@127.0.0.1/0",
}
OWN_LIMITS = {"inFlight": 2, "chat": {"requestsPerMinute": 60}, "code": {}}


def test_load_limits_of_tokens():
    tokens = [
        {"name": "ann", "token": "a", "limits": OWN_LIMITS},
        {"name": "ben", "token": "b"},
    ]
    settings = loaded(
        limits=LIMITS, auth={"tokens": tokens}, providers={"p": {"inFlight": 3}}
    )
    assert settings.tokens[0].limits == TokenLimits(
        in_flight=2,
        chat=Rates(requests_per_minute=60, tokens_per_day=10000),
        code=Rates(),
    )
    assert settings.tokens[1].limits is None
    assert settings.models.providers["p"].in_flight == 3
    text = describe(settings)
    for line in (
        "8 in flight",
        "3 in flight for p",
        "each token: 4 in flight, 20 requests per minute of chat, 10,000 tokens per day of chat",
        "ann: 2 in flight, 60 requests per minute of chat, 10,000 tokens per day of chat",
    ):
        assert f" {line}\n" in text
    assert "s3" not in text and "s3" not in repr(settings)
    assert secrets(settings) == ["s3 cret", "s3%20cret"]


def test_load_names_every_limit_that_is_wrong():
    assert problems_of(
        limits={"inFlight": 0, "waiting": -1, "token": {"chat": {"perDay": 5}}},
        timeouts={"waiting": 0},
    ) == [
        "limits.inFlight: expected an integer above 0",
        "limits.waiting: expected an integer above -1",
        "limits.token.chat.perDay: unknown key; known: requestsPerMinute, requestsPerDay, tokensPerDay",
        "timeouts.waiting: expected a number above 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "redis://",
        "redis://a:b",
        "redis://[",
        "unix://",
        "http://a",
    ],
)
def test_load_wants_the_address_of_redis_whole(url):
    assert problems_of(limits={"redis": url}) == [
        'limits.redis: expected a URL, as in "redis://127.0.0.1:6379/0"'
    ]


def test_load_says_how_to_get_the_client_of_redis(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    assert problems_of(limits={"redis": "redis://a"}) == [
        "limits.redis: Redis's client is not installed: pip install"
        " 'completions-proxy[redis]'"
    ]


@pytest.mark.parametrize(
    ("own", "strict"),
    [({}, True), ({"strictTemplate": None}, True), ({"strictTemplate": False}, False)],
)
def test_load_changes_strict_template_only_when_told(own, strict):
    text = yaml.safe_dump({"models": {MIXTRAL: own}}) + BLESSED
    model = loaded(text).models.choose("chat", MIXTRAL, fast=False)
    assert model.strict_template is strict


def test_load_checks_aliases_and_models():
    assert problems_of(aliases={"a/b": "p::v1::n"}, models={"x": {}, REF: {}}) == [
        f'models.x: unknown model; known: {REF}',
        f'aliases["a/b"]: unknown model "p::v1::n"; did you mean "{REF}"?',
    ]  # fmt: skip


def test_load_says_what_it_ignores():
    assert loaded(**{"cody.enabled": False}).warnings == (
        LOCALLY_OPEN,
        "cody.enabled: ignored",
    )


def test_load_passes_the_warnings_of_the_block_on():
    text = file().replace("url: http://a/v1", "url: http://a")
    assert loaded(text).warnings[1:] == (
        "modelConfiguration.providerOverrides[0].serverSideConfig.url:"
        " has no path; model servers usually want /v1 at the end",
    )


# --------------------------------------------------------------------------------- files


def test_read(tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/token").write_text("secret\n")
    path = tmp_path / "proxy.yaml"
    block = json.loads(json.dumps(BLOCK))
    config = block["providerOverrides"][0]["serverSideConfig"]
    config["accessTokenFile"] = "secrets/token"
    path.write_text(yaml.safe_dump({"modelConfiguration": block}))
    settings = read(path, {}, listen="127.0.0.1:1")
    assert isinstance(settings, Settings)
    assert settings.listen == (("127.0.0.1", 1),)
    assert settings.models.providers["p"].endpoints[0].access_token == "secret"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read {}: No such file or directory"),
        (b"a: \xff", "{}: not UTF-8 at byte 3"),
    ],
)
def test_read_of_what_is_no_file(tmp_path, content, problem):
    path = tmp_path / "proxy.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path, {})
    assert caught.value.problems == [problem.format(path)]


# ---------------------------------------------------------------------------- one upstream


@pytest.mark.parametrize(
    ("url", "kind", "model", "endpoint", "ref"),
    [
        ("http://a:80", "huggingface-tgi", "tgi", "http://a:80/v1", "tgi::v1::tgi"),
        ("http://a/", "openaicompatible", "m", "http://a/v1", "upstream::v1::m"),
        ("http://a/x", "openaicompatible", "m", "http://a/x", "upstream::v1::m"),
        ("localhost:80", "huggingface-tgi", "m", "http://localhost:80/v1", "tgi::v1::m"),
        ("https://a", "anthropic", "m", "https://a", "upstream::v1::m"),
        (
            "http://a/${b}",
            "openaicompatible",
            "org/model:7b x",
            "http://a/${b}",
            "upstream::v1::org/model_7b_x",
        ),
        ("http://a", "huggingface-tgi", "", "http://a/v1", "tgi::v1::_"),
    ],
)  # fmt: skip
def test_for_upstream(url, kind, model, endpoint, ref):
    settings = for_upstream(url, type=kind, model=model, environ={})
    (provider,) = settings.models.providers.values()
    (found,) = settings.models.models
    assert provider.type == kind
    assert provider.endpoints[0].url == endpoint
    assert (found.ref, found.name) == (ref, model or found.id)
    assert found.capabilities == ("chat", "autocomplete")
    choose = settings.models.choose
    assert choose("chat", "", fast=False) is found
    assert choose("chat", "", fast=True) is found
    assert choose("code", "", fast=False) is found
    assert settings.listen == (("127.0.0.1", 8080),)
    assert settings.warnings == (LOCALLY_OPEN,)


@pytest.mark.parametrize(
    ("most_input", "most", "told"),
    [
        (32_768, 32_768, (28_672, 4096)),  # nobody knows how it is divided
        (1024, 2048, (1024, 1024)),
        (511, 512, (384, 128)),
        (100_000, 131_072, (100_000, 4096)),
        (1, 1, (1, 1)),
    ],
)
def test_for_upstream_divides_the_space_for_clients(most_input, most, told):
    [found] = for_upstream(
        "http://tgi",
        type="huggingface-tgi",
        model="m",
        environ={},
        max_input_tokens=most_input,
        max_output_tokens=most,
    ).models.models
    window = found.client_window
    assert window is not None
    assert (window.max_input_tokens, window.max_output_tokens) == told
    assert found.context_window.max_output_tokens == most  # of other clients


def test_for_upstream_takes_tokens_and_an_address():
    settings = for_upstream(
        "http://a",
        type="huggingface-tgi",
        model="m",
        environ={"COMPLETIONS_PROXY_TOKENS": "secret"},
        listen="0.0.0.0:80",
        display_name="My model",
    )
    assert settings.listen == (("0.0.0.0", 80),)
    assert [token.name for token in settings.tokens] == ["env-1"]
    assert settings.models.models[0].display_name == "My model"


def test_for_upstream_says_what_is_wrong():
    with pytest.raises(ConfigError) as caught:
        for_upstream("ftp://a", type="huggingface-tgi", model="m", environ={})
    assert caught.value.problems == [
        "modelConfiguration.providerOverrides[0].serverSideConfig.url:"
        " invalid endpoint URL; expected http:// or https:// and a host"
    ]


# ------------------------------------------------------------------ what is shown of it

SECRETIVE = """
listen: ["0.0.0.0:8080", "[::1]:8080"]
auth:
  tokens:
  - {name: alice, token: secret-1, email: a@b}
  - {name: bob, tokenFile: token}
limits: {bodyBytes: 1000}
aliases: {gpt-4: a::v1::m, small: openai::v1::n}
fallback: true
modelConfiguration:
  providerOverrides:
  - id: a
    serverSideConfig:
      type: openaicompatible
      endpoints:
      - {url: "https://me:secret-3@one/v1?key=secret-4", accessToken: secret-5}
      - {url: "http://two:8000/v1", headers: {X-Key: secret-6}}
  - id: b
    serverSideConfig: {type: openai, accessTokenFile: token}
  - id: openai
    serverSideConfig: {type: sourcegraph, accessToken: "${TOKEN}"}
  modelOverrides:
  - {modelRef: a::v1::m, modelName: org/m, capabilities: [chat, vision]}
  - modelRef: openai::v1::n
    contextWindow: {maxInputTokens: 100000}
    serverSideConfig: {apiModel: tgi}
  defaultModels: {chat: a::v1::m, codeCompletion: openai::v1::n}
"""


@pytest.fixture
def secretive(tmp_path):
    (tmp_path / "token").write_text("secret-2")
    environ = {"TOKEN": "secret-7", "COMPLETIONS_PROXY_TOKENS": "secret-8"}
    return loaded(SECRETIVE, environ=environ, directory=tmp_path)


def test_describe(secretive):
    assert (
        describe(secretive)
        == """\
listening  0.0.0.0:8080
           [::1]:8080
access     3 tokens: alice, bob, env-1
providers  a       openaicompatible  https://one/v1
           a       openaicompatible  http://two:8000/v1
           b       openai            (the type's own endpoint)
           openai  sourcegraph       https://cody-gateway.sourcegraph.com
models     a::v1::m       org/m  chat, vision        4000 in, 4000 out
           openai::v1::n  tgi    chat, autocomplete  100000 in, 4000 out
defaults   chat             a::v1::m
           fast chat        a::v1::m
           code completion  openai::v1::n
aliases    gpt-4  a::v1::m
           small  openai::v1::n
fallback   unknown models become the default
timeouts   connect 10 s, chat 480 s, code 60 s
limits     body 1,000 bytes, header 16,384 bytes, event 10,485,760 bytes, 8,192 connections
shutdown   delay 0 s, grace 10 s
warnings   modelConfiguration.defaultModels.fastChat: not set; using "a::v1::m\""""
    )


def test_describe_open():
    assert describe(loaded()).splitlines()[:3] == [
        "listening  127.0.0.1:8080",
        "access     open: no token is asked for",
        "providers  p  openaicompatible  http://a/v1",
    ]


def test_nothing_shows_a_secret(secretive):
    for shown in (describe(secretive), repr(secretive), str(secretive.warnings)):
        assert "secret-" not in shown
    assert "secret" not in repr([token.__rich_repr__() for token in secretive.tokens])


def test_secrets(secretive):
    assert sorted(secrets(secretive)) == [
        *("secret-2", "secret-3", "secret-4", "secret-5", "secret-6", "secret-7")
    ]


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SECRETIVE) - 1),
            st.sampled_from(
                ["", " ", "\n", ":", "{", "}", "[", '"', "'", "&", "*", "!"]
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_no_problem_shows_a_secret(changes):
    # Wherever a file is broken, and whatever its parts are then taken for.
    text = SECRETIVE.replace("tokenFile: token", "tokenFile: secret-2")
    for at, instead in changes:
        text = text[:at] + instead + text[at + 1 :]
    environ = {"TOKEN": "secret-7", "COMPLETIONS_PROXY_TOKENS": "secret-8"}
    try:
        shown = describe(loaded(text, environ=environ))
    except ConfigError as error:
        shown = str(error)
    assert not re.search(r"secret-\d", shown)


def readme_files() -> list[str]:
    text = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("text", readme_files())
def test_load_takes_the_readme_s_examples(text):
    environ = {"ANN_SHA256": "ab" * 32, "BEN_TOKEN": "cp_b", "ACME_KEY": "k"}
    environ["REDIS_URL"] = "redis://redis"
    if "modelConfiguration" not in text:  # it shows what stands beside that
        text += BLESSED
    assert load(text, environ=environ, directory=Path()).models.models
