"""``defaultModels``, repaired where it names no model."""

from collections.abc import Sequence

import msgspec

from proxy.modelconfig import schema
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.resolved import DefaultModels, Model


class _Role(msgspec.Struct, frozen=True):
    key: str
    what: str
    name: str
    capability: str
    categories: tuple[str, ...]


_ROLES = {
    "chat": _Role("chat", "chat model", "Chat", "chat", ("accuracy", "balanced")),
    "fast_chat": _Role(
        "fastChat", "fast chat model", "FastChat", "chat", ("speed", "balanced")
    ),
    "code_completion": _Role(
        "codeCompletion",
        "code completion model",
        "CodeCompletion",
        "autocomplete",
        ("speed", "balanced"),
    ),
}

# Nothing chooses these here, so none stands in for one that is missing.
_FOR_CLIENTS = {"fallback_chat": "fallbackChat", "unlimited_chat": "unlimitedChat"}


def resolve_defaults(
    given: schema.DefaultModels | None,
    models: Sequence[Model],
    path: str,
    findings: Findings,
) -> DefaultModels:
    """Return the defaults; one that is missing or unknown becomes the first model, in
    the order of the configuration, that suits it.
    """
    refs = {
        name: _ref(getattr(given, name, None) or "", role, models, path, findings)
        for name, role in _ROLES.items()
    }
    for name, key in _FOR_CLIENTS.items():
        ref = getattr(given, name, None) or ""
        if ref and all(model.ref != ref for model in models):
            findings.warn(f"{path}.{key}", f'unknown chat model "{ref}"; ignored')
            ref = ""
        refs[name] = ref
    return DefaultModels(**refs)


def _ref(
    given: str, role: _Role, models: Sequence[Model], path: str, findings: Findings
) -> str:
    if any(model.ref == given for model in models):
        return given
    at = f"{path}.{role.key}"
    suitable = (
        model.ref
        for model in models
        if role.capability in model.capabilities and model.category in role.categories
    )
    found = next(suitable, "")
    wrong = f'unknown {role.what} "{given}"' if given else "not set"
    if found:
        findings.warn(at, f'{wrong}; using "{found}"')
    else:
        text = f"no suitable model found for {role.name} ({len(models)} candidates)"
        findings.problem(at, f"{wrong}, and {text}")
    return found
