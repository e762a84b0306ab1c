"""The ``modelConfiguration`` block as it is written, key by key.

Only shapes live here: what a key is called and what its value may be. Rules that
need more than one key (ids, refs, defaults, endpoints) are in ``resolver``. Keys of
every release that had the block are known, so a block can be pasted unchanged;
what is our own addition says so.
"""

from typing import Literal, TypeAlias

from msgspec import Struct, field

Capability: TypeAlias = Literal[
    "autocomplete", "chat", "edit", "vision", "reasoning", "tools"
]
Category: TypeAlias = Literal["accuracy", "balanced", "speed", "other", "deprecated"]
Status: TypeAlias = Literal[
    "experimental", "beta", "stable", "deprecated", "waitlist", "internal"
]
Tier: TypeAlias = Literal["free", "pro", "enterprise"]


class Keys(Struct, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What all blocks have in common: camelCase keys, and no others."""

    # Access tokens lie somewhere below most blocks; none may reach a log.

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []


class OpenAICompatible(Keys):
    """Knobs for clients; some of them the proxy applies itself."""

    stop_sequences: list[str] | None = None
    end_of_text: str | None = None
    context_size_hint_total_characters: int | None = None
    context_size_hint_prefix_characters: int | None = None
    context_size_hint_suffix_characters: int | None = None
    chat_pre_instruction: str | None = None
    edit_post_instruction: str | None = None
    autocomplete_singleline_timeout: int | None = None
    autocomplete_multiline_timeout: int | None = None
    chat_top_k: float | None = None
    chat_top_p: float | None = None
    chat_temperature: float | None = None
    chat_max_tokens: int | None = None
    auto_complete_top_k: float | None = None
    auto_complete_top_p: float | None = None
    auto_complete_temperature: float | None = None
    auto_complete_singleline_max_tokens: int | None = None
    auto_complete_multiline_max_tokens: int | None = None
    edit_top_k: float | None = None
    edit_top_p: float | None = None
    edit_temperature: float | None = None
    edit_max_tokens: int | None = None


class ClientSideConfig(Keys):
    """Clients read ``openAICompatible``, the site configuration has it in lower case."""

    open_ai_compatible: OpenAICompatible | None = field(
        name="openAICompatible", default=None
    )
    openaicompatible: OpenAICompatible | None = None


class SelfHostedClientSideConfig(OpenAICompatible):
    """In ``selfHostedModels`` the knobs may also stand without the object around."""

    open_ai_compatible: OpenAICompatible | None = field(
        name="openAICompatible", default=None
    )
    openaicompatible: OpenAICompatible | None = None


class ModelServerSideConfig(Keys):
    type: Literal[
        "openaicompatible", "awsBedrockProvisionedThroughput", "awsBedrock"
    ] = "openaicompatible"
    api_model: str | None = None
    arn: str | None = None
    latency_optimization: Literal["standard", "optimized"] | None = None


class ContextWindow(Keys):
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_user_input_tokens: int | None = None


class ModelCost(Keys):
    unit: Literal["mtok"] = "mtok"
    input_token_pennies: float = 0
    output_token_pennies: float = 0


class DefaultModelConfig(Keys):
    """What the models of one provider have in common unless they say otherwise."""

    capabilities: list[Capability] | None = None
    category: Category | None = None
    status: Status | None = None
    tier: Tier | None = None
    context_window: ContextWindow | None = None
    client_side_config: ClientSideConfig | None = None
    server_side_config: ModelServerSideConfig | None = None


class ModelOverride(DefaultModelConfig, kw_only=True):
    model_ref: str
    display_name: str | None = None
    model_name: str | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    model_cost: ModelCost | None = None


class SelfHostedOverride(Keys):
    display_name: str | None = None
    context_window: ContextWindow | None = None
    client_side_config: SelfHostedClientSideConfig | None = None
    server_side_config: ModelServerSideConfig | None = None


class SelfHostedModel(Keys):
    provider: str
    model: str
    api_version: str = "v1"
    override: SelfHostedOverride | None = None


class Credentials(Keys):
    """How to be let in. ``accessTokenFile`` is our own, and ``headers`` on all types."""

    access_token: str | None = None
    access_token_file: str | None = None
    headers: dict[str, str] | None = None


class Endpoint(Credentials, kw_only=True):
    url: str
    access_token_query: str | None = None


class ServerSideConfig(Credentials, tag_field="type"):
    """What every type has. Our own: ``url``, and ``enableVerboseLogs`` on all types."""

    url: str | None = None
    enable_verbose_logs: bool = False


class Pooled(ServerSideConfig):
    """Several endpoints; credentials beside them are for those that have none."""

    endpoints: list[Endpoint] | None = None
    access_token_query: str | None = None
    use_legacy_completions: bool = True


class HuggingfaceTgi(Pooled, tag="huggingface-tgi"):
    pass


class Openaicompatible(Pooled, tag="openaicompatible"):
    pass


class Single(ServerSideConfig):
    """One endpoint; ``url`` is another word for it."""

    endpoint: str | None = None


class Anthropic(Single, tag="anthropic"):
    pass


class Openai(Single, tag="openai"):
    pass


class Fireworks(Single, tag="fireworks"):
    pass


class Sourcegraph(Single, tag="sourcegraph"):
    pass


class GoogleWorkloadIdentityConfig(Keys):
    credentials_file: str | None = None
    credentials_json: str | None = field(name="credentialsJSON", default=None)


class Google(Single, tag="google"):
    google_workload_identity_config: GoogleWorkloadIdentityConfig | None = None


class AzureOpenAI(Single, tag="azureOpenAI"):
    """``apiVersion`` is our own; the original sent one fixed version."""

    user: str = ""
    use_deprecated_completions_api: bool = field(
        name="useDeprecatedCompletionsAPI", default=False
    )
    api_version: str = "2024-06-01"


class AwsBedrock(Single, tag="awsBedrock"):
    region: str | None = None


AnyServerSideConfig: TypeAlias = (
    HuggingfaceTgi
    | Openaicompatible
    | Anthropic
    | Openai
    | Fireworks
    | Google
    | AzureOpenAI
    | AwsBedrock
    | Sourcegraph
)


class ClientSideProviderConfig(Keys):
    """No release defined anything here."""


class ProviderOverride(Keys):
    id: str
    display_name: str | None = None
    client_side_config: ClientSideProviderConfig | None = None
    server_side_config: AnyServerSideConfig | None = None
    default_model_config: DefaultModelConfig | None = None


class ModelFilters(Keys):
    status_filter: list[str] | None = None
    allow: list[str] | None = None
    deny: list[str] | None = None


class SourcegraphModels(Keys):
    """Where an instance would discover hosted models."""

    endpoint: str | None = None
    access_token: str | None = None
    model_filters: ModelFilters | None = None


class DefaultModels(Keys):
    chat: str | None = None
    fast_chat: str | None = None
    code_completion: str | None = None
    fallback_chat: str | None = None
    unlimited_chat: str | None = None


class Block(Keys):
    """The value of ``modelConfiguration``."""

    sourcegraph: SourcegraphModels | None = None
    provider_overrides: list[ProviderOverride] | None = None
    model_overrides: list[ModelOverride] | None = None
    model_overrides_recommended_settings: list[str] | None = None
    self_hosted_models: list[SelfHostedModel] | None = None
    default_models: DefaultModels | None = None
    system_pre_instruction: str | None = None
