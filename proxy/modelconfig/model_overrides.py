"""``modelOverrides`` and the two lists of well-known models -> models.

A model is made of layers; a key that an upper one lacks comes from the next: the
override, the recommended settings, the provider's ``defaultModelConfig``, and at the
bottom what every new model gets.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from proxy.modelconfig import recommended, schema
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.provider_overrides import check_display_name
from proxy.modelconfig.refs import provider_of, ref_problem
from proxy.modelconfig.resolved import ContextWindow, Model

T = TypeVar("T", bound=schema.Keys)
D = TypeVar("D", bound=schema.DefaultModelConfig)

_NEW_MODEL = schema.DefaultModelConfig(
    capabilities=["chat", "autocomplete"],
    category="balanced",
    status="stable",
    context_window=schema.ContextWindow(max_input_tokens=4000, max_output_tokens=4000),
)

# What is configured by hand is never part of a hosted plan, whatever it says.
_TIER = "enterprise"


def resolve_models(
    block: schema.Block, path: str, findings: Findings
) -> tuple[Model, ...]:
    """Return the models in the order of the configuration, well-known ones first."""
    collection = _Collection(findings)
    collection.recommended(
        block.model_overrides_recommended_settings or [],
        f"{path}.modelOverridesRecommendedSettings",
    )
    collection.self_hosted(block.self_hosted_models or [], f"{path}.selfHostedModels")
    collection.overrides(block.model_overrides or [], f"{path}.modelOverrides")
    defaults = _provider_defaults(block, f"{path}.providerOverrides", findings)
    models = []
    for ref, given in collection.given.items():
        default = defaults.get(provider_of(ref))
        if default is None:
            text = f'model "{ref}" does not match a known provider'
            findings.problem(given.path, text)
        else:
            override = merge(merge(given.override, default), _NEW_MODEL)
            model = _model(override, given, findings)
            if model.status == "deprecated":
                text = f'model "{ref}" is deprecated: not offered'
                findings.warn(given.path, text)
            else:
                models.append(model)
    return tuple(models)


def merge(upper: T, lower: schema.Keys) -> T:
    """Return ``upper`` with every key it lacks taken from ``lower``.

    Blocks are merged key by key in turn, so that giving one of them changes only the
    keys it has.
    """
    found: dict[str, object] = {}
    for name in lower.__struct_fields__:
        mine, theirs = getattr(upper, name), getattr(lower, name)
        if mine is None:
            found[name] = theirs
        elif isinstance(mine, schema.Keys) and isinstance(theirs, schema.Keys):
            found[name] = merge(mine, theirs)
    return replace(upper, **found)


class _Given(msgspec.Struct):
    """What the configuration says of one model, and where."""

    override: schema.ModelOverride
    path: str
    strict_template: bool = False


class _Collection:
    """One entry per ref: what was given for it, over its recommended settings."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.given: dict[str, _Given] = {}

    def recommended(self, names: Sequence[str], path: str) -> None:
        for index, name in enumerate(names):
            at = f"{path}[{index}]"
            override = self.known(name, recommended.BY_REF, at)
            if override is not None:
                strict = name in recommended.STRICT_REFS
                self.add(_Given(override, at, strict))

    def self_hosted(self, models: Sequence[schema.SelfHostedModel], path: str) -> None:
        for index, model in enumerate(models):
            at = f"{path}[{index}]"
            known = self.known(model.model, recommended.SELF_HOSTED, f"{at}.model")
            if known is not None:
                override = _self_hosted_override(model, known, at, self.findings)
                strict = known.model_ref in recommended.STRICT_REFS
                self.add(_Given(override, at, strict))

    def overrides(self, models: Sequence[schema.ModelOverride], path: str) -> None:
        refs: set[str] = set()
        for index, model in enumerate(models):
            at = f"{path}[{index}]"
            override = _one_spelling(model, at, self.findings)
            given = self.given.get(model.model_ref)
            if given is None or model.model_ref in refs:
                self.add(_Given(override, at), f"{at}.modelRef")
            else:
                given.override = merge(override, given.override)
                given.path = at
            refs.add(model.model_ref)

    def known(
        self, name: str, settings: Mapping[str, schema.ModelOverride], path: str
    ) -> schema.ModelOverride | None:
        if name not in settings:
            names = ", ".join(settings)
            text = f'no recommended settings for "{name}"; known: {names}'
            self.findings.problem(path, text)
        return settings.get(name)

    def add(self, given: _Given, ref_path: str | None = None) -> None:
        ref = given.override.model_ref
        if (text := ref_problem(ref)) is not None:
            self.findings.problem(ref_path or given.path, text)
        elif ref in self.given:
            self.findings.problem(given.path, f'model "{ref}" specified twice')
        else:
            self.given[ref] = given


def _self_hosted_override(
    model: schema.SelfHostedModel,
    known: schema.ModelOverride,
    path: str,
    findings: Findings,
) -> schema.ModelOverride:
    name = known.model_ref.rpartition("::")[2]
    override = schema.ModelOverride(
        model_ref=f"{model.provider}::{model.api_version}::{name}"
    )
    if (given := model.override) is not None:
        override = replace(
            override,
            display_name=given.display_name,
            context_window=given.context_window,
            server_side_config=given.server_side_config,
        )
        if (client := given.client_side_config) is not None:
            at = f"{path}.override.clientSideConfig"
            bare = _bare_knobs(client)
            knobs = _knobs(client, at, findings)
            config = schema.ClientSideConfig(
                open_ai_compatible=merge(knobs, bare) if knobs else bare
            )
            override = replace(override, client_side_config=config)
    return merge(override, known)


def _provider_defaults(
    block: schema.Block, path: str, findings: Findings
) -> dict[str, schema.DefaultModelConfig]:
    defaults: dict[str, schema.DefaultModelConfig] = {}
    for index, override in enumerate(block.provider_overrides or []):
        config = override.default_model_config or schema.DefaultModelConfig()
        at = f"{path}[{index}].defaultModelConfig"
        defaults[override.id] = _one_spelling(config, at, findings)
    return defaults


def _one_spelling(layer: D, path: str, findings: Findings) -> D:
    """Return ``layer`` with its client knobs in the place where clients look."""
    if layer.client_side_config is None:
        return layer
    at = f"{path}.clientSideConfig"
    knobs = _knobs(layer.client_side_config, at, findings)
    config = schema.ClientSideConfig(open_ai_compatible=knobs)
    return replace(layer, client_side_config=config)


def _knobs(
    config: schema.ClientSideConfig | schema.SelfHostedClientSideConfig,
    path: str,
    findings: Findings,
) -> schema.OpenAICompatible | None:
    if config.open_ai_compatible and config.openaicompatible:
        text = "give openAICompatible or openaicompatible, not both"
        findings.problem(path, text)
    return config.open_ai_compatible or config.openaicompatible


def _bare_knobs(config: schema.SelfHostedClientSideConfig) -> schema.OpenAICompatible:
    names = schema.OpenAICompatible.__struct_fields__
    return schema.OpenAICompatible(**{name: getattr(config, name) for name in names})


def _model(override: schema.ModelOverride, given: _Given, findings: Findings) -> Model:
    """Return the model of a complete override."""
    path = given.path
    provider_id, api_version, id = override.model_ref.split("::")
    client = override.client_side_config or schema.ClientSideConfig()
    knobs = client.open_ai_compatible
    server = override.server_side_config or schema.ModelServerSideConfig()
    capabilities = tuple(override.capabilities or ())
    check_display_name(override.display_name or "", path, findings)
    if server.type != "openaicompatible":
        text = f'"{server.type}" settings are ignored'
        findings.warn(f"{path}.serverSideConfig", text)
    if override.reasoning_effort and "reasoning" not in capabilities:
        text = 'needs the capability "reasoning"'
        findings.problem(f"{path}.reasoningEffort", text)
    return Model(
        provider_id=provider_id,
        api_version=api_version,
        id=id,
        name=override.model_name or id,
        display_name=override.display_name or id,
        capabilities=capabilities,
        category=str(override.category),
        status=str(override.status),
        tier=_TIER,
        context_window=_context_window(override.context_window, path, findings),
        api_model=server.api_model,
        stop=tuple((knobs and knobs.stop_sequences) or ()),
        end_of_text=(knobs and knobs.end_of_text) or "",
        strict_template=given.strict_template,
        client_config=_client_config(knobs, capabilities),
        reasoning_effort=override.reasoning_effort,
        model_cost=_wire(override.model_cost),
    )


def _context_window(
    window: schema.ContextWindow | None, path: str, findings: Findings
) -> ContextWindow:
    assert window is not None
    found: dict[str, int] = {}
    for name in ("input", "output", "user_input"):
        tokens = getattr(window, f"max_{name}_tokens")
        if tokens is None:
            continue
        if tokens <= 0:
            text = f"invalid max {name.replace('_', ' ')} tokens: {tokens}"
            findings.problem(f"{path}.contextWindow", text)
        found[f"max_{name}_tokens"] = tokens
    return ContextWindow(**found)


def _client_config(
    knobs: schema.OpenAICompatible | None, capabilities: Sequence[str]
) -> dict[str, object] | None:
    """Return the object for clients.

    Its presence alone makes Cody use the one autocomplete provider that takes any
    model, so every model for autocomplete has it.
    """
    if knobs is None and "autocomplete" in capabilities:
        return {}
    return _wire(knobs)


def _wire(keys: schema.Keys | None) -> dict[str, object] | None:
    """Return what is set in ``keys``, under the names it has in JSON."""
    if keys is None:
        return None
    plain = msgspec.to_builtins(keys)
    return {name: value for name, value in plain.items() if value is not None}
