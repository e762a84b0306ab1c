"""What the configuration comes to: providers, models and defaults, ready to use.

Built once at start by ``modelconfig.resolve`` and never changed afterwards.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Literal, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from msgspec import field

from proxy.completion import Feature
from proxy.egress import Egress
from proxy.errors import UnknownModel
from proxy.tls import UpstreamTls

# User information ends at the last @ before the path: a password may hold an @ too.
_URL = re.compile(
    r"^([a-z][a-z0-9+.-]*://)(?:[^/?#]*@)?([^/?#]*)([^?#]*)", re.IGNORECASE
)


@lru_cache(maxsize=1024)
def _host_of(url: str) -> str:
    match = _URL.match(url)
    return match[2] if match else url


class Endpoint(msgspec.Struct, frozen=True):
    """One URL of a provider, with what it takes to be let in.

    ``headers`` replace the access token where given. ``access_token_query`` is the
    name of a query parameter that carries the token instead of a header.
    """

    url: str
    access_token: str = ""
    headers: dict[str, str] = {}
    access_token_query: str = ""

    @property
    def name(self) -> str:
        """Host and port: what logs and metrics call the endpoint."""
        return _host_of(self.url)

    @property
    def public_url(self) -> str:
        """The URL without user information and query, where secrets may stand."""
        match = _URL.match(self.url)
        return "".join(match.groups()) if match else self.url

    @property
    def secrets(self) -> list[str]:
        """The token, the headers' values, and what the URL may have of both."""
        parts = urlsplit(self.url)
        query = [value for _, value in parse_qsl(parts.query)]
        url = [parts.password or "", unquote(parts.password or ""), *query]
        return [self.access_token, *self.headers.values(), *url]

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"Endpoint({', '.join(shown)})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        headers = dict.fromkeys(self.headers, "…")
        return [
            ("url", self.public_url),
            ("access_token", self.access_token and "…"),
            ("headers", headers),
            ("access_token_query", self.access_token_query),
        ]


Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]


class Timeouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long an upstream may take, in seconds.

    ``headers`` and ``firstToken`` count from the beginning of a request and are for
    streams only, ``betweenTokens`` from each piece of the answer to the next. ``chat``
    and ``code`` are for all of a request, whatever is tried within it.
    """

    connect_s: Seconds = field(name="connect", default=10.0)
    chat_s: Seconds = field(name="chat", default=480.0)
    code_s: Seconds = field(name="code", default=60.0)
    headers_s: Seconds | None = field(name="headers", default=None)
    first_token_s: Seconds | None = field(name="firstToken", default=None)
    between_tokens_s: Seconds = field(name="betweenTokens", default=120.0)


class Provider(msgspec.Struct, frozen=True):
    """One entry of ``providerOverrides``; ``type`` is its ``serverSideConfig.type``.

    What stands after ``api_version`` are own settings, see the README; ``tls`` and
    ``egress`` say how its servers are connected to.
    The three fields before them are for ``azureOpenAI``. The URL of an endpoint is as
    configured; it is "" where the type has a default that its provider code knows.
    """

    id: str
    type: str
    endpoints: tuple[Endpoint, ...]
    display_name: str = ""
    verbose_logs: bool = False
    use_legacy_completions: bool = True
    user: str = ""
    use_deprecated_completions_api: bool = False
    api_version: str = "2024-06-01"
    profile: str = ""
    adjust: bool = True
    client_credentials: bool = False
    balance: Literal["least-outstanding", "round-robin", "random"] = "least-outstanding"
    weights: tuple[int, ...] = ()
    timeouts: Timeouts = Timeouts()
    tls: UpstreamTls | None = None
    egress: Egress | None = None
    in_flight: int | None = None

    @property
    def server_profile(self) -> str:
        """Which server's ways its requests are fitted to: a key of ``PROFILES``."""
        return self.profile or _PROFILE_OF_TYPE.get(self.type, "openai")


_PROFILE_OF_TYPE = {
    "huggingface-tgi": "tgi",
    "openaicompatible": "vllm",
    "anthropic": "anthropic",
}


class ContextWindow(msgspec.Struct, frozen=True):
    max_input_tokens: int
    max_output_tokens: int
    max_user_input_tokens: int | None = None


class Model(msgspec.Struct, frozen=True, dict=True):
    """One model that clients may ask for.

    ``name`` is what the upstream calls it unless ``api_model`` (from
    ``serverSideConfig.apiModel``) says otherwise. ``stop`` and ``end_of_text`` come
    from ``clientSideConfig``; ``client_config`` is its ``openAICompatible`` object
    under the names clients know, or None. ``model_cost`` is for clients too.
    ``strict_template``, ``lift_preamble`` and ``fallback``, the ref of another model,
    are described in the README. ``client_window`` is what Cody's clients are told and
    held to instead of the ``context_window`` whose two numbers share one space: they
    ask for all of the output.
    """

    provider_id: str
    api_version: str
    id: str
    name: str
    display_name: str
    capabilities: tuple[str, ...]
    category: str
    status: str
    tier: str
    context_window: ContextWindow
    api_model: str | None = None
    stop: tuple[str, ...] = ()
    end_of_text: str = ""
    strict_template: bool = False
    lift_preamble: bool = False
    client_window: ContextWindow | None = None
    client_config: dict[str, object] | None = None
    reasoning_effort: str | None = None
    model_cost: dict[str, object] | None = None
    fallback: str = ""

    @cached_property
    def ref(self) -> str:
        return f"{self.provider_id}::{self.api_version}::{self.id}"


class DefaultModels(msgspec.Struct, frozen=True):
    """Model refs; each names a model of the configuration.

    The last two are for clients alone; "" where nothing is configured.
    """

    chat: str
    fast_chat: str
    code_completion: str
    fallback_chat: str = ""
    unlimited_chat: str = ""


_UNSUPPORTED = {
    # On these words, capital U included, Cody's autocomplete stops naming the model
    # for the rest of its session and so gets the default.
    "chat": 'Unsupported chat model "{}" (default "{}")',
    "code": 'Unsupported code completion model "{}" (default "{}")',
}


def _first(pairs: Iterable[tuple[str, Model]]) -> dict[str, Model]:
    """Return a dict in which the first of several equal names counts."""
    found: dict[str, Model] = {}
    for name, model in pairs:
        found.setdefault(name, model)
    return found


def _folded(pairs: Iterable[tuple[str, Model]]) -> list[tuple[str, Model]]:
    return [(name.casefold(), model) for name, model in pairs]


class _Index:
    """Every name of every model. Clients ask per request, so nothing is scanned."""

    def __init__(self, models: Sequence[Model], aliases: Mapping[str, str]) -> None:
        self.refs = {model.ref: model for model in models}
        names = [(alias.strip(), self.refs[ref]) for alias, ref in aliases.items()]
        names += [(model.ref, model) for model in models]
        # Clients before modelConfiguration knew no API version.
        names += [(f"{model.provider_id}/{model.id}", model) for model in models]
        names += [(model.id, model) for model in models]
        # OpenAI-style clients tend to ask for what the upstream calls the model.
        upstream = [(model.api_model or model.name, model) for model in models]
        upstream += [(model.name, model) for model in models]
        # Cody Gateway's clients put the provider in front of it.
        upstream += [(f"{model.provider_id}/{model.name}", model) for model in models]
        self._exact = _first(names)
        self._folded = _first(_folded(names))
        self._upstream = _first([*upstream, *_folded(upstream)])

    def find(self, name: str) -> Model | None:
        if (model := self._exact.get(name)) is not None:
            return model
        folded = name.casefold()
        return (
            self._folded.get(folded)
            or self._upstream.get(name)
            or self._upstream.get(folded)
        )


class ModelConfiguration(msgspec.Struct, frozen=True, dict=True):
    """All of it. ``warnings`` are for whoever starts the proxy.

    ``aliases`` are further names: what a client says -> ref of a model here.
    ``system_pre_instruction`` is text for the front of every chat's system prompt.
    """

    providers: dict[str, Provider]
    models: tuple[Model, ...]
    default_models: DefaultModels
    aliases: dict[str, str] = {}
    fallback: bool = False
    warnings: tuple[str, ...] = ()
    system_pre_instruction: str = ""

    def choose(self, feature: Feature, name: str, fast: bool) -> Model:
        """Return the model for a request.

        A name is an alias, a ref, ``provider/id`` or an id, then the same in another
        case, then the upstream's name. Capabilities are not looked at: a client may
        ask any model for anything.

        Raises: UnknownModel: no model has that name and there is no fallback.
        """
        default = self._default_ref(feature, fast)
        name = name.strip()
        if not name or (fast and feature == "chat"):
            return self._index.refs[default]
        if (model := self._index.find(name)) is not None:
            return model
        if self.fallback:
            return self._index.refs[default]
        raise UnknownModel(_UNSUPPORTED[feature].format(name, default))

    def _default_ref(self, feature: Feature, fast: bool) -> str:
        if feature == "code":
            return self.default_models.code_completion
        return self.default_models.fast_chat if fast else self.default_models.chat

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.models, self.aliases)
