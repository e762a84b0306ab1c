"""Which dialect is spoken at which path."""

from collections.abc import Callable, Mapping

from proxy.config import Settings
from proxy.dialects import (
    anthropic_incoming as anthropic,
    cody,
    gateway,
    gemini_incoming as gemini,
    openai_incoming as openai,
    tgi,
)
from proxy.dialects.adjust import decode_fields
from proxy.dialects.base import Incoming
from proxy.errors import InvalidRequest
from proxy.modelconfig.resolved import Model

_GATEWAY = "/v1/completions"


def incoming(settings: Settings) -> dict[str, Incoming]:
    """Return what answers a completion request, by path."""
    check = settings.client_version_check
    chat, completions = openai.ChatCompletions(), openai.Completions()
    return {
        "/.api/completions/stream": cody.Completions("chat", check_client=check),
        "/.api/completions/code": cody.Completions("code", check_client=check),
        "/v1/chat/completions": chat,
        "/.api/llm/chat/completions": chat,
        "/v1/completions": completions,
        "/.api/llm/completions": completions,
        "/v1/messages": anthropic.Messages(),
        "/v1/complete": anthropic.Complete(),
        "/generate": tgi.Generate("/generate"),
        "/generate_stream": tgi.Generate("/generate_stream"),
        "/": tgi.Generate("/"),
        "/invocations": tgi.Generate("/invocations"),
        f"{_GATEWAY}/anthropic": gateway.GatewayRoute(
            "anthropic",
            # The gateway asks in the version of which this is so.
            anthropic.Complete(cumulative=True),
        ),
        f"{_GATEWAY}/anthropic-messages": gateway.GatewayRoute(
            "anthropic", anthropic.Messages()
        ),
        f"{_GATEWAY}/openai": gateway.GatewayRoute("openai", chat),
        f"{_GATEWAY}/fireworks": gateway.GatewayRoute(
            "fireworks",
            {"chat_completions": chat, "code_completions": completions},
        ),
        f"{_GATEWAY}/google": gateway.GatewayRoute("google", gemini.GenerateContent()),
    }


METRICS = "/-/metrics"
# Pages of the proxy's own, with what else is counted by its path.
_PAGES = (METRICS, "/v1/models", "/.api/llm/models", "/v1/limits", "/v1/limits/refresh")


def dialects(incoming: Mapping[str, Incoming]) -> dict[str, str]:
    """Return the dialect of each route that has a name, for the metrics."""
    pages = dict.fromkeys((*_PAGES, *FORWARDED), "")
    return pages | {
        path: "gateway" if path.startswith(f"{_GATEWAY}/") else each.dialect
        for path, each in incoming.items()
    }


# Paths that are handed on to the upstream whole: path here -> path there. The model in
# the body says which upstream; without one it is the default one.
FORWARDED = {
    "/v1/embeddings": "/v1/embeddings",
    "/.api/llm/embeddings": "/v1/embeddings",
    "/v1/responses": "/v1/responses",
    "/.api/llm/responses": "/v1/responses",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/tokenize": "/tokenize",
    "/chat_tokenize": "/chat_tokenize",
    "/info": "/info",
    "/health": "/health",
    "/upstream/metrics": "/metrics",
}


INVOCATIONS = "/invocations"


def narrow(incoming: Incoming, body: bytes) -> Incoming:
    """Return what answers a body at ``INVOCATIONS``, which takes chats and completions
    of OpenAI's as well.
    """
    try:
        fields = decode_fields(body)
    except InvalidRequest:
        return incoming
    for key, kind in (
        ("messages", openai.ChatCompletions),
        ("prompt", openai.Completions),
    ):
        if key in fields and "inputs" not in fields:
            return kind()
    return incoming


def reply_headers(path: str, model: Model) -> dict[str, str]:
    """What a successful reply at ``path`` carries besides."""
    name = f"{model.provider_id}/{model.name}"
    if not path.startswith(f"{_GATEWAY}/") or not name.isprintable():
        return {}
    return {"x-cody-resolved-model": name}


# How errors are said on paths without an exchange, by their beginning.
ERRORS: tuple[tuple[str, Callable[[], Incoming]], ...] = (
    ("/v1/messages", anthropic.Messages),
    ("/v1/limits", lambda: gateway.GatewayRoute("openai", openai.ChatCompletions())),
    ("/v1/", openai.ChatCompletions),
    ("/.api/llm/", openai.ChatCompletions),
    ("/.api/", lambda: cody.Completions("chat")),
    ("", lambda: tgi.Generate("/")),
)


def errors_at(path: str) -> Incoming:
    """Return the dialect in which an error at ``path`` is said."""
    path = path[max(path.find("/.api/"), 0) :]  # clients may keep a prefix
    return next(make() for start, make in ERRORS if path.startswith(start))
