"""Models whose settings are known, so that a name is all a configuration needs.

Two lists of names lead here: ``modelOverridesRecommendedSettings`` gives a whole ref,
``selfHostedModels`` the model's name with the version of the settings (not of the
model) after an @.
"""

from proxy.modelconfig.schema import (
    ClientSideConfig,
    ContextWindow,
    ModelOverride,
    OpenAICompatible,
)


def _starcoder2(name: str, display_name: str) -> ModelOverride:
    return ModelOverride(
        model_ref=f"bigcode::v1::{name}",
        display_name=display_name,
        capabilities=["autocomplete"],
        context_window=ContextWindow(max_input_tokens=8192, max_output_tokens=4096),
        client_side_config=ClientSideConfig(
            open_ai_compatible=OpenAICompatible(
                # In a repository-wide context the model goes on with the next file.
                stop_sequences=["<|endoftext|>", "<file_sep>"],
                end_of_text="<|endoftext|>",
            )
        ),
    )


def _mistral(name: str, display_name: str, max_output_tokens: int) -> ModelOverride:
    return ModelOverride(
        model_ref=f"mistral::v1::{name}",
        display_name=display_name,
        capabilities=["chat", "autocomplete"],
        context_window=ContextWindow(
            max_input_tokens=8192, max_output_tokens=max_output_tokens
        ),
    )


_KNOWN = (
    _starcoder2("starcoder2-7b", "Starcoder2 7B"),
    _starcoder2("starcoder2-15b", "Starcoder2 15B"),
    _mistral("mistral-7b-instruct", "Mistral 7B Instruct", 4096),
    _mistral("mixtral-8x7b-instruct", "Mixtral 8x7B Instruct", 4096),
    # One release gave this name the ref of the base model below; then a default that
    # named it fell to another model.
    _mistral("mixtral-8x22b-instruct", "Mixtral 8x22B Instruct", 4096),
)
_BASE = (
    _mistral("mistral-7b", "Mistral 7B", 4000),
    _mistral("mixtral-8x7b", "Mixtral 8x7B", 4000),
    _mistral("mixtral-8x22b", "Mixtral 8x22B", 4000),
)


def _name(override: ModelOverride) -> str:
    return override.model_ref.rpartition("::")[2]


BY_REF = {override.model_ref: override for override in _KNOWN + _BASE}
SELF_HOSTED = {f"{_name(override)}@v1": override for override in _KNOWN}

# The chat templates of these raise on a system message and on two turns of one role.
STRICT_REFS = frozenset(ref for ref in BY_REF if ref.endswith("-instruct"))
