"""Older ``completions`` blocks, and whole site configurations, made the proxy's own."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from proxy import config
from proxy.__main__ import main
from proxy.errors import ConfigError
from proxy.siteconfig import convert
from tests.support.fixtures import QUESTION, Block, load, model_configuration, running
from tests.support.upstream import ScriptedUpstream, json_reply, openai_chunks, sse

BLESSED = (Path(__file__).parent / "data/blessed.jsonc").read_text()


def settings(**completions) -> config.Settings:
    return load({"completions": completions})


def problems(**completions) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settings(**completions)
    return caught.value.problems


# --------------------------------------------------------------------- the old block


@pytest.mark.parametrize(
    ("completions", "type", "refs"),
    [
        (
            {"provider": "anthropic", "chatModel": "claude-3-opus"},
            "anthropic",
            [
                "anthropic::unknown::claude-3-opus",
                "anthropic::unknown::claude-3-haiku-20240307",
                "anthropic::unknown::claude-3-haiku-20240307",
            ],
        ),
        (
            {"provider": "openai"},
            "openai",
            [
                "openai::unknown::gpt-4",
                "openai::unknown::gpt-3.5-turbo",
                "openai::unknown::gpt-3.5-turbo-instruct",
            ],
        ),
        (
            {
                "provider": "azure-openai",
                "endpoint": "https://acme.openai.azure.com",
                "chatModel": "my chat",
                "completionModel": "code",
            },
            "azureOpenAI",
            [
                "openai::unknown::my_chat",
                "openai::unknown::my_chat",
                "openai::unknown::code",
            ],
        ),
        (
            {
                "provider": "fireworks",
                "model": "accounts/fireworks/models/a",
                "completionModel": "accounts/fireworks/models/b",
            },
            "fireworks",
            [
                "fireworks::unknown::accounts/fireworks/models/a",
                "fireworks::unknown::accounts/fireworks/models/a",
                "fireworks::unknown::accounts/fireworks/models/b",
            ],
        ),
    ],
)
def test_an_old_block_becomes_one_provider_and_its_models(completions, type, refs):
    models = settings(**completions, accessToken="sk-1").models
    [provider] = models.providers.values()
    assert provider.type == type
    assert provider.endpoints[0].access_token == "sk-1"
    defaults = models.default_models
    assert [defaults.chat, defaults.fast_chat, defaults.code_completion] == refs
    assert {model.ref for model in models.models} == set(refs)
    by_ref = {model.ref: model for model in models.models}
    assert "chat" in by_ref[refs[0]].capabilities
    assert "autocomplete" in by_ref[refs[2]].capabilities


def test_the_gateways_models_name_their_providers():
    models = settings(
        provider="sourcegraph", accessToken="slk_1", completionModel="fireworks/x"
    ).models
    assert list(models.providers) == ["anthropic", "fireworks"]
    assert {each.type for each in models.providers.values()} == {"sourcegraph"}
    assert models.default_models.code_completion == "fireworks::unknown::x"
    assert problems(chatModel="claude")[0] == (
        'completions.chatModel: expected "provider/model", as in'
        ' "anthropic/claude-3-haiku"'
    )


def test_one_model_with_several_limits_becomes_several():
    models = settings(
        provider="openai",
        chatModel="a",
        fastChatModel="a",
        completionModel="a",
        chatModelMaxTokens=9000,
        completionModelMaxTokens=2000,
    ).models
    assert [
        (model.id, model.name, model.context_window.max_input_tokens)
        for model in models.models
    ] == [
        ("a_chat", "a", 9000),
        ("a_fast-chat", "a", 9000),
        ("a_completion", "a", 2000),
    ]


def test_what_an_old_block_comes_to_is_said():
    warnings = settings(
        provider="openai",
        chatModel="a",
        fastChatModel="b",
        perUserDailyLimit=10,
        smartContextWindow="disabled",
    ).warnings
    assert [text for text in warnings if text.startswith("completions")] == [
        "completions: the old form, taken as the modelConfiguration that"
        " completions-proxy check --from-site-config FILE prints; use that instead",
        "completions.perUserDailyLimit: ignored: set limits.token.chat.requestsPerDay",
        "completions.smartContextWindow: ignored: clients are told that it is on",
        'completions.completionModel: not set; using "gpt-3.5-turbo-instruct"',
    ]


@pytest.mark.parametrize(
    ("completions", "problem"),
    [
        ({"provider": "azure-openai"}, "completions.chatModel: missing; expected a"),
        ({"provider": "opnai"}, "completions.provider: expected one of"),
        ({"chatModle": "a"}, 'completions.chatModle: unknown key; did you mean "chat'),
        (
            {"provider": "aws-bedrock", "chatModel": "a", "completionModel": "b"},
            "completions.providerOverrides[0].serverSideConfig.type:"
            ' "awsBedrock" is not served',
        ),
        (
            {"provider": "openai", "chatModelMaxTokens": -1},
            "completions.modelOverrides[0].contextWindow: invalid max input tokens: -1",
        ),
    ],
)
def test_what_is_wrong_with_an_old_block(completions, problem):
    assert any(each.startswith(problem) for each in problems(**completions))


def test_a_model_configuration_wins_over_an_old_block():
    block = model_configuration("http://up")
    found = load({"modelConfiguration": block, "completions": {"provider": "openai"}})
    assert [model.ref for model in found.models.models] == ["acme::v1::large"]
    assert "completions: ignored: there is a modelConfiguration" in found.warnings


def test_neither_block():
    with pytest.raises(ConfigError, match="modelConfiguration: missing; expected a"):
        load({})


async def test_an_old_block_serves(upstream: ScriptedUpstream):
    upstream.script(sse(*openai_chunks(["Hello"])))
    upstream.script(json_reply({"choices": [{"text": "x", "finish_reason": "stop"}]}))
    found = settings(provider="openai", endpoint=upstream.url, accessToken="sk-1")
    async with running(found) as proxy:
        raw = await proxy.chat(QUESTION | {"model": "openai/gpt-4"})
        assert b'"Hello"' in raw.body
        assert upstream.last.json()["model"] == "gpt-4"
        assert upstream.last.header("authorization") == "Bearer sk-1"
        await proxy.code(QUESTION)
        assert upstream.last.json()["model"] == "gpt-3.5-turbo-instruct"


# ------------------------------------------------------------------ site configuration

NEW: Block = {
    "modelConfiguration": {
        "sourcegraph": None,
        "providerOverrides": [
            {
                "id": "p",
                "serverSideConfig": {
                    "type": "openaicompatible",
                    "endpoints": [
                        {"url": "http://a/v1", "accessToken": "sk-secret-1"},
                        {"url": "http://b/v1", "accessToken": "sk-secret-2"},
                        {"url": "http://u:sk-secret-3@c/v1"},
                        {"url": "http://d/v1", "headers": {"X-Key": "sk-secret-4"}},
                    ],
                },
            }
        ],
        "modelOverrides": [{"modelRef": "p::v1::m", "displayName": "costs ${5}"}],
        "defaultModels": {
            "chat": "p::v1::m",
            "fastChat": "p::v1::m",
            "codeCompletion": "p::v1::m",
        },
        "systemPreInstruction": "Say ${name}, 100 % of the time: # always",
    },
    "cody.contextFilters": {"exclude": [{"repoNamePattern": "^private/"}]},
    "cody.enabled": True,
    "licenseKey": "sk-secret-5",
    "auth.providers": [{"type": "builtin", "clientSecret": "sk-secret-6"}],
}


def test_a_site_configuration_becomes_a_file_without_its_secrets():
    converted = convert("// of the instance\n" + json.dumps(NEW)[:-1] + ",}")
    assert "sk-secret" not in converted.text
    assert "licenseKey" not in converted.text
    assert converted.variables == [
        "P_ACCESS_TOKEN",
        "P_ACCESS_TOKEN_2",
        "P_URL",
        "P_X_KEY",
    ]
    for name in converted.variables:
        assert f"#   {name}\n" in converted.text and f"${{{name}}}" in converted.text
    values = dict(
        zip(converted.variables, ["1", "2", "http://u:3@c/v1", "4"], strict=True)
    )
    found = config.load(converted.text, environ=values, directory=Path())
    endpoints = found.models.providers["p"].endpoints
    assert [(each.url, each.access_token) for each in endpoints[:3]] == [
        ("http://a/v1", "1"),
        ("http://b/v1", "2"),
        ("http://u:3@c/v1", ""),
    ]
    assert endpoints[3].headers == {"X-Key": "4"}
    # What only looks like a variable is still what it was.
    assert found.models.models[0].display_name == "costs ${5}"
    text = NEW["modelConfiguration"]["systemPreInstruction"]
    assert found.models.system_pre_instruction == text
    filters = found.instance.context_filters
    assert filters is not None and filters.exclude is not None
    assert filters.exclude[0].repo_name_pattern == "^private/"


def test_daily_limits_are_taken_over():
    site = {
        "completions": {
            "provider": "anthropic",
            "accessToken": "sk-x",
            "perUserDailyLimit": 100,
            "perUserCodeCompletionsDailyLimit": 2000,
        }
    }
    found = convert(json.dumps(site))
    assert yaml.safe_load(found.text)["limits"] == {
        "token": {"chat": {"requestsPerDay": 100}, "code": {"requestsPerDay": 2000}}
    }
    assert not [text for text in found.warnings if "Daily" in text]
    loaded = config.load(
        found.text, environ=dict.fromkeys(found.variables, "x"), directory=Path()
    )
    assert loaded.limits.token.code.requests_per_day == 2000


def test_the_published_example_is_taken_over_whole():
    found = convert("{" + BLESSED + "}")
    assert found.variables == []
    made = config.load(found.text, environ={}, directory=Path()).models
    assert made == config.load(BLESSED, environ={}, directory=Path()).models


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "the file: expected a site configuration, a JSON object"),
        ("{}", 'the file: neither "modelConfiguration" nor "completions" is in it'),
        ('{"completions": {"provider": 1}}', "completions.provider: expected"),
        ('{"completions": 1}', "completions: expected a mapping"),
        (
            '{"modelConfiguration": {"providerOverrides": [{"id": "p", "acessToken":'
            ' "sk-secret"}]}}',
            "modelConfiguration.providerOverrides[0].acessToken: unknown key",
        ),
        (
            '{"completions": {}, "cody.contextFilters": {"include": "a"}}',
            "cody.contextFilters.include: expected a list",
        ),
        ('{"a": ', "line 1"),
    ],
)
def test_what_is_no_site_configuration(text, problem):
    with pytest.raises(ConfigError) as caught:
        convert(text)
    assert any(each.startswith(problem) for each in caught.value.problems)
    assert "sk-secret" not in str(caught.value)


def test_check_from_site_config(tmp_path, capsys):
    path = tmp_path / "site.jsonc"
    path.write_text(
        json.dumps({"completions": {"provider": "openai", "accessToken": "sk-secret"}})
    )
    assert main(["check", "--from-site-config", str(path)]) == 0
    out, err = capsys.readouterr()
    file = yaml.safe_load(out)
    server = file["modelConfiguration"]["providerOverrides"][0]["serverSideConfig"]
    assert server == {"type": "openai", "accessToken": "${OPENAI_ACCESS_TOKEN}"}
    assert 'warning: completions.chatModel: not set; using "gpt-4"' in err
    assert "sk-secret" not in out + err
    assert not re.search(r"old form", err)  # that is what is being seen to
    path.write_text("{}")
    assert main(["check", "--from-site-config", str(path)]) == 2
    assert main(["check", "--from-site-config", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_check_prints_what_can_be_used_and_says_what_cannot(tmp_path, capsys):
    path = tmp_path / "site.jsonc"
    old = {"provider": "aws-bedrock", "chatModel": "a", "completionModel": "b"}
    path.write_text(json.dumps({"completions": old}))
    assert main(["check", "--from-site-config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert "awsBedrock" in out
    assert '"awsBedrock" is not served' in err


async def test_the_converted_file_serves(upstream: ScriptedUpstream):
    upstream.script(sse(*openai_chunks(["Hello"])))
    site = {
        "completions": {
            "provider": "openai",
            "endpoint": upstream.url,
            "accessToken": "sk-1",
        }
    }
    text = convert(json.dumps(site)).text.replace(":8080", ":0")
    environ = {"OPENAI_ACCESS_TOKEN": "sk-2", config.TOKENS_VARIABLE: "cp_1"}
    made = config.load(text, environ=environ, directory=Path())
    assert made.tokens[0].sha256 == hashlib.sha256(b"cp_1").digest()
    async with running(made) as proxy:
        await proxy.chat(QUESTION, headers={"Authorization": "token cp_1"})
        assert upstream.last.header("authorization") == "Bearer sk-2"
