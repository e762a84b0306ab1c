"""``GET /.api/modelconfig/supported-models.json``: the models as clients list them.

A client without this list has no models at all, and one in which a model lacks its
capabilities or its context window hangs.
"""

import msgspec

from proxy.dialects.base import JSON, Reply
from proxy.modelconfig.resolved import DefaultModels, Model, ModelConfiguration


def supported_models(models: ModelConfiguration) -> Reply:
    # The word came late: without it, newer clients hide a model from edits. Where
    # nobody uses it, it goes without saying.
    says_edit = any("edit" in model.capabilities for model in models.models)
    listed = {
        "schemaVersion": "1.0",
        "revision": "-",
        "providers": [
            {"id": provider.id, "displayName": provider.display_name}
            for provider in models.providers.values()
        ],
        "models": [_model(model, adds_edit=not says_edit) for model in models.models],
        "defaultModels": _defaults(models.default_models),
    }
    return Reply(200, JSON, msgspec.json.encode(listed))


def _model(model: Model, *, adds_edit: bool) -> dict[str, object]:
    capabilities = list(model.capabilities)
    if adds_edit and "chat" in capabilities:
        capabilities.append("edit")
    wire: dict[str, object] = {
        "modelRef": model.ref,
        "displayName": model.display_name,
        "modelName": model.name,
        "capabilities": capabilities,
        "category": model.category,
        "status": model.status,
        "tier": model.tier,
        "contextWindow": _context_window(model),
    }
    if model.client_config is not None:
        knobs = {name: _plain(knob) for name, knob in model.client_config.items()}
        wire["clientSideConfig"] = {"openAICompatible": knobs}
    if model.reasoning_effort is not None:
        wire["reasoningEffort"] = model.reasoning_effort
    if model.model_cost is not None:
        wire["modelCost"] = model.model_cost
    return wire


def _context_window(model: Model) -> dict[str, int]:
    window = model.client_window or model.context_window
    wire = {
        "maxInputTokens": window.max_input_tokens,
        "maxOutputTokens": window.max_output_tokens,
    }
    if window.max_user_input_tokens is not None:
        wire["maxUserInputTokens"] = window.max_user_input_tokens
    return wire


def _plain(knob: object) -> object:
    """Some clients take 5 for a whole number and 5.0 for a mistake."""
    return int(knob) if isinstance(knob, float) and knob.is_integer() else knob


def _defaults(defaults: DefaultModels) -> dict[str, str]:
    wire = {
        "chat": defaults.chat,
        "fastChat": defaults.fast_chat,
        "codeCompletion": defaults.code_completion,
        "fallbackChat": defaults.fallback_chat,
        "unlimitedChat": defaults.unlimited_chat,
    }
    return {role: ref for role, ref in wire.items() if ref}
