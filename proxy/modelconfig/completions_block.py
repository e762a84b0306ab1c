"""The ``completions`` block of older site configurations -> a ``modelConfiguration``.

One provider, and up to three models by name. What an instance made of it when it had
no ``modelConfiguration`` yet is made here, too: the same refs, so that what clients
remember stays valid.
"""

from typing import Literal, TypeAlias

import msgspec
from msgspec import field

from proxy.modelconfig import schema
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.refs import made_id

_ProviderName: TypeAlias = Literal[
    "sourcegraph",
    "openai",
    "anthropic",
    "azure-openai",
    "fireworks",
    "aws-bedrock",
    "google",
]


class CompletionsBlock(schema.Keys):
    """The value of ``completions``, key by key."""

    enabled: bool = True
    provider: _ProviderName = "sourcegraph"
    endpoint: str | None = None
    access_token: str | None = None
    model: str | None = None  # what chatModel was called in 2023
    chat_model: str | None = None
    chat_model_max_tokens: int | None = None
    fast_chat_model: str | None = None
    fast_chat_model_max_tokens: int | None = None
    completion_model: str | None = None
    completion_model_max_tokens: int | None = None
    per_user_daily_limit: int | None = None
    per_user_code_completions_daily_limit: int | None = None
    smart_context_window: Literal["enabled", "disabled"] | None = None
    user: str | None = None
    azure_chat_model: str | None = None
    azure_completion_model: str | None = None
    azure_use_deprecated: bool | None = field(
        name="azureUseDeprecatedCompletionsAPIForOldModels", default=None
    )


class _Kind(msgspec.Struct, frozen=True):
    """``id`` is "" where each model's name begins with its provider; ``models`` are
    for chat, fast chat and code, "" where there is no sensible default.
    """

    id: str
    models: tuple[str, str, str] = ("", "", "")


_KINDS = {
    "sourcegraph": _Kind(
        "",
        (
            "anthropic/claude-3-sonnet-20240229",
            "anthropic/claude-3-haiku-20240307",
            "fireworks/starcoder",
        ),
    ),
    "openai": _Kind("openai", ("gpt-4", "gpt-3.5-turbo", "gpt-3.5-turbo-instruct")),
    "anthropic": _Kind(
        "anthropic",
        (
            "claude-3-sonnet-20240229",
            "claude-3-haiku-20240307",
            "claude-3-haiku-20240307",
        ),
    ),
    "azure-openai": _Kind("openai"),
    "fireworks": _Kind("fireworks"),
    "aws-bedrock": _Kind("anthropic"),
    "google": _Kind("google"),
}
# What nobody said: the least that every model of these providers takes.
_INPUT_TOKENS = 4000
_OUTPUT_TOKENS = 4000

_IGNORED = {
    "enabled": "ignored",
    "azure_chat_model": "ignored: chatModel names the deployment",
    "azure_completion_model": "ignored: completionModel names the deployment",
    "smart_context_window": "ignored: clients are told that it is on",
    "per_user_daily_limit": "ignored: set limits.token.chat.requestsPerDay",
    "per_user_code_completions_daily_limit": (
        "ignored: set limits.token.code.requestsPerDay"
    ),
}


class _Role(msgspec.Struct, frozen=True):
    """A feature: its key, what is added to its ref, what a model must be able to."""

    key: str
    suffix: str
    capability: schema.Capability


_ROLES = {
    "chat": _Role("chatModel", "_chat", "chat"),
    "fast_chat": _Role("fastChatModel", "_fast-chat", "chat"),
    "completion": _Role("completionModel", "_completion", "autocomplete"),
}


def converted(block: CompletionsBlock, path: str, findings: Findings) -> schema.Block:
    """Return the ``modelConfiguration`` that says the same.

    Args: path: what findings call the place of the block.
    """
    names = block.__struct_encode_fields__
    for name, encoded in zip(block.__struct_fields__, names, strict=True):
        if name in _IGNORED and getattr(block, name) not in (None, True):
            findings.warn(f"{path}.{encoded}", _IGNORED[name])
    models = _models(block, path, findings)
    refs = {feature: model.ref for feature, model in models.items()}
    return schema.Block(
        provider_overrides=_providers(block, models),
        model_overrides=_overrides(models),
        default_models=schema.DefaultModels(
            chat=refs.get("chat"),
            fast_chat=refs.get("fast_chat"),
            code_completion=refs.get("completion"),
        ),
    )


class _Model(msgspec.Struct):
    provider_id: str
    name: str
    input_tokens: int
    suffix: str = ""

    @property
    def ref(self) -> str:
        return f"{self.provider_id}::unknown::{made_id(self.name)}{self.suffix}"


def _models(
    block: CompletionsBlock, path: str, findings: Findings
) -> dict[str, _Model]:
    """Return the model of each feature."""
    kind = _KINDS[block.provider]
    defaults = dict(zip(_ROLES, kind.models, strict=True))
    # Deployments have any names, and one often serves for both.
    chat = block.chat_model or block.model or ""
    given = {
        "chat": chat,
        "fast_chat": block.fast_chat_model or ("" if defaults["chat"] else chat),
        "completion": block.completion_model or "",
    }
    found: dict[str, _Model] = {}
    for feature, role in _ROLES.items():
        at = f"{path}.{role.key}"
        name = given[feature] or defaults[feature]
        if not name:
            findings.problem(at, "missing; expected a model's name")
            continue
        if not given[feature]:
            findings.warn(at, f'not set; using "{name}"')
        tokens = getattr(block, f"{feature}_model_max_tokens")
        if tokens is None and feature == "fast_chat" and name == given["chat"]:
            tokens = block.chat_model_max_tokens
        provider, slash, rest = name.partition("/")
        if kind.id:
            found[feature] = _Model(kind.id, name, tokens or _INPUT_TOKENS)
        elif slash and rest:
            found[feature] = _Model(provider.lower(), rest, tokens or _INPUT_TOKENS)
        else:
            text = 'expected "provider/model", as in "anthropic/claude-3-haiku"'
            findings.problem(at, text)
    return {
        feature: _named_apart(feature, model, found) for feature, model in found.items()
    }


def _named_apart(feature: str, model: _Model, found: dict[str, _Model]) -> _Model:
    """One ref has one window: where another feature has the model with another one,
    each gets a ref of its own.
    """
    if all(
        other.ref != model.ref or other.input_tokens == model.input_tokens
        for other in found.values()
    ):
        return model
    return msgspec.structs.replace(model, suffix=_ROLES[feature].suffix)


def _overrides(models: dict[str, _Model]) -> list[schema.ModelOverride]:
    overrides: dict[str, schema.ModelOverride] = {}
    for feature, model in models.items():
        capability = _ROLES[feature].capability
        override = overrides.setdefault(
            model.ref,
            schema.ModelOverride(
                model_ref=model.ref,
                display_name=model.name,
                model_name=model.name,
                capabilities=[],
                context_window=schema.ContextWindow(
                    max_input_tokens=model.input_tokens,
                    max_output_tokens=_OUTPUT_TOKENS,
                ),
            ),
        )
        known = override.capabilities or []
        override.capabilities = list(dict.fromkeys([*known, capability]))
    return list(overrides.values())


def _providers(
    block: CompletionsBlock, models: dict[str, _Model]
) -> list[schema.ProviderOverride]:
    ids = dict.fromkeys(model.provider_id for model in models.values())
    if kind_id := _KINDS[block.provider].id:
        ids = {kind_id: None}
    return [
        schema.ProviderOverride(id=id, server_side_config=_server_side(block))
        for id in ids
    ]


def _server_side(block: CompletionsBlock) -> schema.AnyServerSideConfig:
    endpoint, token = block.endpoint, block.access_token
    if block.provider == "azure-openai":
        return schema.AzureOpenAI(
            endpoint=endpoint,
            access_token=token,
            user=block.user or "",
            use_deprecated_completions_api=block.azure_use_deprecated or False,
        )
    return _TYPES[block.provider](endpoint=endpoint, access_token=token)


_TYPES: dict[
    str,
    type[
        schema.Sourcegraph
        | schema.Openai
        | schema.Anthropic
        | schema.Fireworks
        | schema.AwsBedrock
        | schema.Google
    ],
] = {
    "sourcegraph": schema.Sourcegraph,
    "openai": schema.Openai,
    "anthropic": schema.Anthropic,
    "fireworks": schema.Fireworks,
    "aws-bedrock": schema.AwsBedrock,
    "google": schema.Google,
}
