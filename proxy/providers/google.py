"""Google's public Gemini API; the endpoint ends in ``/models``."""

from urllib.parse import quote

from proxy.completion import CompletionRequest
from proxy.dialects.gemini import GeminiReader, build_generate
from proxy.modelconfig.resolved import Endpoint, Model, Provider as Settings
from proxy.providers.base import (
    Asked,
    Call,
    Native,
    above,
    headers_for,
    join_url,
    own_credentials,
    prepare,
)

DEFAULT_URL = "https://generativelanguage.googleapis.com/v1beta/models"


class GoogleProvider:
    source = "Google"

    def __init__(self, settings: Settings) -> None:
        pass

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        request = prepare(request, model)
        return Call(
            self._url(request, request.model, endpoint),
            self._headers(request, endpoint),
            build_generate(request),
            GeminiReader(),
            stops=request.stop,
        )

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        # A client's body names the model and the stream, which the API refuses.
        return None

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        return own_credentials(endpoint, {"x-goog-api-key": endpoint.access_token})

    def root(self, endpoint: Endpoint) -> str:
        return above(endpoint.url or DEFAULT_URL, "/v1beta/models")

    @staticmethod
    def _url(request: CompletionRequest, model: str, endpoint: Endpoint) -> str:
        method = "streamGenerateContent" if request.stream else "generateContent"
        query = "alt=sse" if request.stream else ""
        path = f"{quote(model, safe='')}:{method}"
        return join_url(endpoint.url or DEFAULT_URL, path, query)

    @staticmethod
    def _headers(request: CompletionRequest, endpoint: Endpoint) -> dict[str, str]:
        # The API takes the key in the query as well, where it would end up in logs.
        credentials = {"x-goog-api-key": endpoint.access_token}
        return headers_for(request, endpoint, credentials)
