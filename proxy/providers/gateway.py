"""Cody Gateway: one host, a path per provider, each path with its own dialect."""

from collections.abc import Callable

import msgspec

from proxy.completion import CompletionRequest
from proxy.dialects.anthropic import MessagesReader, build_messages
from proxy.dialects.base import Reader
from proxy.dialects.gemini import GeminiReader, build_generate
from proxy.dialects.openai import OpenAIReader, build_chat, build_completion
from proxy.errors import InvalidRequest
from proxy.modelconfig.resolved import Endpoint, Model, Provider as Settings
from proxy.providers.anthropic import API_HEADERS, for_anthropic
from proxy.providers.base import (
    Asked,
    Call,
    Native,
    bearer,
    headers_for,
    own_credentials,
    prepare,
    replace_path,
)
from proxy.providers.openai import FIREWORKS, OPENAI


class _Route(msgspec.Struct, frozen=True):
    path: str
    prepare: Callable[[CompletionRequest, Model], CompletionRequest]
    build: Callable[[CompletionRequest], bytes]
    reader: Callable[[], Reader]
    headers: dict[str, str] = {}


def _fireworks(request: CompletionRequest) -> bytes:
    build = build_chat if request.feature == "chat" else build_completion
    return build(request, FIREWORKS)


_FIREWORKS = _Route("fireworks", prepare, _fireworks, OpenAIReader)
# Provider id -> how the gateway wants its requests. The id is the configuration's.
_ROUTES = {
    "anthropic": _Route(
        "anthropic-messages",
        for_anthropic,
        lambda request: build_messages(request, system_in_messages=True),
        MessagesReader,
        API_HEADERS,
    ),
    "openai": _Route(
        "openai", prepare, lambda request: build_chat(request, OPENAI), OpenAIReader
    ),
    "fireworks": _FIREWORKS,
    "mistral": _FIREWORKS,
    "google": _Route(
        "google",
        prepare,
        lambda request: build_generate(request, via_gateway=True),
        GeminiReader,
    ),
}
PROVIDER_IDS = tuple(_ROUTES)


class GatewayProvider:
    source = "Sourcegraph Cody Gateway"

    def __init__(self, settings: Settings) -> None:
        self._route = _ROUTES.get(settings.id)
        self._id = settings.id

    def call(
        self, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Call:
        route = self._route
        if route is None:
            raise InvalidRequest(
                f'to use Cody Gateway, the provider ID ("{self._id}") must match one '
                f"of {list(PROVIDER_IDS)}",
                status=500,
            )
        request = route.prepare(request, model)
        request.model = request.model.removeprefix(f"{self._id}/")
        feature = "chat" if request.feature == "chat" else "code"
        headers = {
            **headers_for(request, endpoint, bearer(endpoint), route.headers),
            "X-Sourcegraph-Feature": f"{feature}_completions",
            # The gateway wants somebody to count; who it is, only the proxy knows.
            "X-Sourcegraph-Actor-UID": request.user or "1",
        }
        return Call(
            replace_path(endpoint.url, f"/v1/completions/{route.path}"),
            headers,
            route.build(request),
            route.reader(),
            stops=request.stop,
        )

    def native(
        self, asked: Asked, request: CompletionRequest, model: Model, endpoint: Endpoint
    ) -> Native | None:
        # The gateway's bodies differ a little from each dialect's own.
        return None

    def credentials(self, endpoint: Endpoint) -> dict[str, str]:
        return own_credentials(endpoint, bearer(endpoint))

    def root(self, endpoint: Endpoint) -> str:
        return replace_path(endpoint.url, "")
