"""Google's public Gemini API; the endpoint ends in ``/models``."""

from urllib.parse import quote

from proxy.completion import CompletionRequest
from proxy.dialects.gemini import GeminiReader, build_generate
from proxy.modelconfig.resolved import Endpoint, Model, Provider as Settings
from proxy.providers.base import Call, headers_for, join_url, prepare

DEFAULT_URL = "https://generativelanguage.googleapis.com/v1beta/models"


class GoogleProvider:
    source = "Google"

    def __init__(self, settings: Settings) -> None:
        pass

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        request = prepare(request, model)
        name = quote(request.model, safe="")
        method = "streamGenerateContent" if request.stream else "generateContent"
        query = "alt=sse" if request.stream else ""
        # The API takes the key in the query as well, where it would end up in logs.
        credentials = {"x-goog-api-key": endpoint.access_token}
        return Call(
            join_url(endpoint.url or DEFAULT_URL, f"{name}:{method}", query),
            headers_for(request, endpoint, credentials),
            build_generate(request),
            GeminiReader(),
            stops=request.stop,
        )
