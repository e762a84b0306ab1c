"""Anthropic's API; the endpoint is the whole URL, ``/v1/messages`` included."""

from proxy.completion import CompletionRequest
from proxy.dialects.anthropic import (
    PINNED_MODELS,
    MessagesReader,
    build_messages,
)
from proxy.modelconfig.resolved import Endpoint, Model, Provider as Settings
from proxy.providers.base import (
    Asked,
    Call,
    Native,
    above,
    headers_for,
    own_credentials,
    prepare,
)

API_HEADERS = {"anthropic-version": "2023-06-01"}


class AnthropicProvider:
    source = "Anthropic"

    def __init__(self, settings: Settings) -> None:
        pass

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        request = for_anthropic(request, model)
        credentials = {"X-API-Key": endpoint.access_token}
        return Call(
            endpoint.url,
            headers_for(request, endpoint, credentials, API_HEADERS),
            build_messages(request),
            MessagesReader(),
            stops=request.stop,
        )

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        if asked.dialect != "anthropic":
            return None
        credentials = {"X-API-Key": endpoint.access_token}
        headers = headers_for(request, endpoint, credentials, API_HEADERS)
        name = model.api_model or model.name
        name = PINNED_MODELS.get(name, name)
        return Native(endpoint.url, headers, MessagesReader, name)

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        key = {"X-API-Key": endpoint.access_token}
        return API_HEADERS | own_credentials(endpoint, key)

    def root(self, endpoint: Endpoint) -> str:
        return above(endpoint.url, "/v1/messages")


def for_anthropic(request: CompletionRequest, model: Model) -> CompletionRequest:
    """Prepare, and see to what this API insists on."""
    request = prepare(request, model)
    # The API insists on a number.
    request.max_tokens = request.max_tokens or model.context_window.max_output_tokens
    return request
