"""Everything that speaks OpenAI's API, more or less."""

from urllib.parse import quote

from proxy.completion import CompletionRequest
from proxy.dialects.openai import (
    OpenAIReader,
    Profile,
    build_chat,
    build_completion,
)
from proxy.dialects.tgi import TGIReader
from proxy.modelconfig.resolved import Endpoint, Model, Provider as Settings
from proxy.providers.base import (
    Asked,
    Call,
    Native,
    above,
    bearer,
    headers_for,
    join_url,
    own_credentials,
    prepare,
    replace_path,
    token_query,
)
from proxy.stops import END_OF_TEXT

# TGI's launcher takes four stop sequences unless --max-stop-sequences says otherwise;
# any model name but "tgi" means a LoRA adapter to it.
TGI = Profile(max_stops=4, presence_penalty=False, leaks_end=True)
TGI_MODEL = "tgi"
PATHS = {"openai-chat": "chat/completions", "openai-completions": "completions"}
# vLLM 0.32 refuses a fifth stop sequence as well; the rest is cut at by the proxy.
COMPATIBLE = Profile(max_stops=4, top_k=True, leaks_end=True)
OPENAI = Profile(max_stops=4, reasoning_names=True)
FIREWORKS = Profile(max_stops=4, top_k=True)


def _call(
    request: CompletionRequest,
    model: Model,
    profile: Profile,
    *,
    chat: bool,
    url: str,
    headers: dict[str, str],
) -> Call:
    build = build_chat if chat else build_completion
    ends = [model.end_of_text] if model.end_of_text else []
    if profile.leaks_end and not chat:
        ends.extend(END_OF_TEXT)
    body = build(request, profile)
    return Call(url, headers, body, OpenAIReader(), stops=request.stop, ends=ends)


class OpenAICompatibleProvider:
    """``openaicompatible`` and ``huggingface-tgi``: endpoints that end in ``/v1``."""

    source = "OpenAI"

    def __init__(self, settings: Settings) -> None:
        self._is_tgi = settings.type == "huggingface-tgi"
        self._profile = TGI if self._is_tgi else COMPATIBLE
        self._legacy_completions = settings.use_legacy_completions
        # Kept, so that each has an identity of its own as long as its way is known. (One
        # with a client's credential is made for a request, and is not among them.)
        self._endpoints = {id(endpoint): endpoint for endpoint in settings.endpoints}
        self._ways: dict[tuple[int, str, bool], tuple[str, dict[str, str]]] = {}

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        request = prepare(request, model)
        if self._is_tgi and model.api_model is None:
            request.model = TGI_MODEL
        chat = request.feature == "chat" or not self._legacy_completions
        path = "chat/completions" if chat else "completions"
        url, headers = self._way(request, endpoint, path)
        return _call(request, model, self._profile, chat=chat, url=url, headers=headers)

    def _way(
        self, request: CompletionRequest, endpoint: Endpoint, path: str
    ) -> tuple[str, dict[str, str]]:
        """Return URL and headers, which are the same for all requests of a kind."""
        key = (id(endpoint), path, request.stream)
        if (way := self._ways.get(key)) is None:
            url = join_url(endpoint.url, path, token_query(endpoint))
            way = url, headers_for(request, endpoint, bearer(endpoint))
            if key[0] in self._endpoints:
                self._ways[key] = way
        return way

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        headers = headers_for(request, endpoint, bearer(endpoint))
        if asked.dialect in PATHS:
            url = join_url(endpoint.url, PATHS[asked.dialect], token_query(endpoint))
            name = model.api_model or (TGI_MODEL if self._is_tgi else model.name)
            return Native(url, headers, OpenAIReader, name)
        if asked.dialect == "tgi" and self._is_tgi:
            path = asked.path.lstrip("/")
            url = join_url(self.root(endpoint), path, token_query(endpoint))
            return Native(url, headers, TGIReader)
        return None

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        return own_credentials(endpoint, bearer(endpoint))

    def root(self, endpoint: Endpoint) -> str:
        return above(endpoint.url, "/v1")


class OpenAIProvider:
    """OpenAI itself; a base path of the endpoint is kept."""

    source = "OpenAI"
    default_url = "https://api.openai.com/v1"
    profile = OPENAI

    def __init__(self, settings: Settings) -> None:
        pass

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        request = prepare(request, model)
        chat = request.feature == "chat"
        return _call(
            request,
            model,
            self.profile,
            chat=chat,
            url=self.url(endpoint.url or self.default_url, chat),
            headers=headers_for(request, endpoint, bearer(endpoint)),
        )

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        if asked.dialect not in PATHS:
            return None
        url = self.url(endpoint.url or self.default_url, asked.dialect == "openai-chat")
        headers = headers_for(request, endpoint, bearer(endpoint))
        return Native(url, headers, OpenAIReader, model.api_model or model.name)

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        return own_credentials(endpoint, bearer(endpoint))

    def root(self, endpoint: Endpoint) -> str:
        url = self.url(endpoint.url or self.default_url, False)
        return above(url, "/v1/completions")

    def url(self, url: str, chat: bool) -> str:
        path = "chat/completions" if chat else "completions"
        if url.rstrip("/").count("/") == 2:  # a bare host, as the original wanted
            return replace_path(url, f"/v1/{path}")
        return join_url(url, path)


class FireworksProvider(OpenAIProvider):
    """The endpoint is the whole URL of completions; chat stands beside it."""

    source = "Fireworks"
    default_url = "https://api.fireworks.ai/inference/v1/completions"
    profile = FIREWORKS

    def url(self, url: str, chat: bool) -> str:
        completions = "/inference/v1/completions"
        return (
            url.replace(completions, "/inference/v1/chat/completions") if chat else url
        )


class AzureProvider:
    """Azure OpenAI: the deployment stands in the URL, the version in its query."""

    source = "AzureOpenAI"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        request = prepare(request, model)
        deprecated = self._settings.use_deprecated_completions_api
        chat = request.feature == "chat" or not deprecated
        path = "chat/completions" if chat else "completions"
        return _call(
            request,
            model,
            OPENAI,
            chat=chat,
            url=self._url(endpoint, request.model, path),
            headers=headers_for(request, endpoint, self._credentials(endpoint)),
        )

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        if asked.dialect not in PATHS:
            return None
        name = model.api_model or model.name
        url = self._url(endpoint, name, PATHS[asked.dialect])
        headers = headers_for(request, endpoint, self._credentials(endpoint))
        return Native(url, headers, OpenAIReader)

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        return own_credentials(endpoint, self._credentials(endpoint))

    def root(self, endpoint: Endpoint) -> str:
        return join_url(endpoint.url, "openai")

    def _url(self, endpoint: Endpoint, deployment: str, path: str) -> str:
        return join_url(
            endpoint.url,
            f"openai/deployments/{quote(deployment, safe='')}/{path}",
            f"api-version={quote(self._settings.api_version)}",
        )

    def _credentials(self, endpoint: Endpoint) -> dict[str, str]:
        return {"api-key": endpoint.access_token} if endpoint.access_token else {}
