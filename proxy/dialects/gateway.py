"""Cody Gateway's own API, around the dialects of the vendors that it stands for.

Bodies and streams are each vendor's; what is the gateway's own is the header that says
the feature, and how it words a failure before a reply has begun.
"""

import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from typing import cast

import msgspec

from proxy.completion import CompletionRequest, Delta, Feature
from proxy.dialects.base import (
    JSON,
    Chosen,
    Head,
    Incoming,
    Native,
    Reply,
    Writer,
    client_status,
    dump,
    error_headers,
)
from proxy.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitReached,
    ProxyError,
    RateLimited,
    UpstreamFault,
    UpstreamStatus,
    UpstreamUnreachable,
)

FEATURE_HEADER = "X-Sourcegraph-Feature"
# None: a feature of the gateway's that no completion has.
_FEATURES: dict[str, Feature | None] = {
    "chat_completions": "chat",
    "code_completions": "code",
    "embeddings": None,
}

# The gateway's clients count with a limit; this is for who has none.
NO_LIMIT = 2**31 - 1

# What of the client's body is for the gateway and nobody behind it.
_GATEWAY_FIELDS = frozenset(("languageId",))


class _Provider(msgspec.Struct, frozen=True):
    """``retry_after_s``: when to come back, if the upstream does not say."""

    title: str
    features: tuple[str, ...] = ("chat_completions", "code_completions")
    retry_after_s: int = 30


_PROVIDERS = {
    "anthropic": _Provider("Anthropic", retry_after_s=2),
    "openai": _Provider("OpenAI", features=("chat_completions",)),
    "fireworks": _Provider("Fireworks"),
    "google": _Provider("Google"),
}


class GatewayRoute:
    """``/v1/completions/<vendor>``.

    Args:
        provider: the vendor: anthropic, openai, fireworks or google.
        inner:    its dialect, or one for each feature as the header calls it.
    """

    def __init__(self, provider: str, inner: Incoming | Mapping[str, Incoming]) -> None:
        self._id = provider
        self._provider = _PROVIDERS[provider]
        if not isinstance(inner, Mapping):
            inner = dict.fromkeys(self._provider.features, inner)
        self._inner: Mapping[str, Incoming] = inner
        dialects = {each.dialect for each in inner.values()}
        # "" if it depends on the feature: then requests are translated, which is never
        # wrong.
        self.dialect = dialects.pop() if len(dialects) == 1 else ""

    def check(self, head: Head) -> None:
        self._choose(head)[1].check(head)

    def sketch(self, head: Head, chosen: Chosen) -> tuple[CompletionRequest, Writer]:
        feature, inner = self._choose(head)
        request, writer = cast(Native, inner).sketch(head, chosen)
        request.feature = feature
        return request, GatewayWriter(self._id, writer)

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        feature, inner = self._choose(head)
        try:
            request, writer = inner.parse(head, body)
        except InvalidRequest as error:
            ours, theirs = (
                "could not decode request body",
                "failed to parse request body",
            )
            raise InvalidRequest(error.message.replace(ours, theirs, 1)) from None
        request.feature = feature
        request.dropped = [n for n in request.dropped if n not in _GATEWAY_FIELDS]
        return request, GatewayWriter(self._id, writer)

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(self._id, error)

    def _choose(self, head: Head) -> tuple[Feature, Incoming]:
        name = head.headers.get(FEATURE_HEADER, "").strip()
        if not name:
            raise InvalidRequest(f"{FEATURE_HEADER} header is required")
        if name not in _FEATURES:
            raise InvalidRequest(f"invalid value for {FEATURE_HEADER}")
        feature, inner = _FEATURES[name], self._inner.get(name)
        if feature is None or inner is None:
            title = self._provider.title
            raise InvalidRequest(
                f'feature "{name}" is currently not supported for {title}'
            )
        return feature, inner


class GatewayWriter:
    """The vendor's own writer, but for what is said before a reply has begun."""

    def __init__(self, provider: str, inner: Writer) -> None:
        self._provider = provider
        self._inner = inner

    @property
    def stream_headers(self) -> Mapping[str, str]:
        return self._inner.stream_headers

    def frames(self, deltas: list[Delta]) -> bytes:
        return self._inner.frames(deltas)

    def end(self) -> bytes:
        return self._inner.end()

    def keep_alive(self) -> bytes:
        # The decoders of its clients know pings, but no comments.
        return self._inner.keep_alive() if self._provider == "anthropic" else b""

    def literals(self, texts: list[bytes]) -> bytes | None:
        return self._inner.literals(texts)

    def error(self, error: ProxyError) -> bytes:
        return self._inner.error(error)

    def body(self, deltas: list[Delta]) -> bytes:
        return self._inner.body(deltas)

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(self._provider, error)


# ----------------------------------------------------------------------------- errors

# What the gateway says of its own about the way to an upstream: status and text.
_WAY_ERRORS: tuple[tuple[type[ProxyError], int, str], ...] = (
    (DeadlineExceeded, 504, "request to upstream provider {} timed out"),
    (UpstreamUnreachable, 500, "failed to make request to upstream provider {}"),
)


def _error_reply(provider: str, error: ProxyError) -> Reply:
    for kind, status, text in _WAY_ERRORS:
        if isinstance(error, kind):
            return _reply(status, text.format(provider), error_headers(error))
    if isinstance(error, LimitReached):
        return _limit_reply(error)
    if not isinstance(error, UpstreamFault):
        return _reply(error.status, error.message, error_headers(error))
    if error.status in (429, 529):
        # Not 429, and none of its other headers: the limit is one of the key that all
        # clients share, and each of them would take it for its own.
        default = str(_PROVIDERS[provider].retry_after_s)
        headers = {"retry-after": error.headers.get("retry-after", default)}
        return _reply(503, _upstream_text(error), headers)
    return _reply(client_status(error), _upstream_text(error), error_headers(error))


def _limit_reply(error: LimitReached) -> Reply:
    """As the gateway says it: in plain text, with a date where others say seconds."""
    if isinstance(error, RateLimited):
        retry_after = error.retry_after
        text = (
            f"you have exceeded the rate limit of {error.amount} {error.unit}. "
            f"Retry after {retry_after}"
        )
    else:
        retry_after = formatdate(time.time() + error.retry_after_s, usegmt=True)
        text = error.message
        if error.status == 429:
            text = (
                f"you have exceeded the concurrency limit of {error.amount} requests "
                f'for "{error.feature}". Retry after {retry_after}'
            )
    headers = error_headers(error) | {"retry-after": retry_after}
    if error.status != 429:
        return _reply(error.status, text, headers)
    return Reply(429, "text/plain; charset=utf-8", f"{text}\n".encode(), headers)


def _upstream_text(error: UpstreamFault) -> str:
    # Out of the message: only that went through the redactor.
    if not isinstance(error, UpstreamStatus):
        return error.message
    start = f"{error.source}: unexpected status code {error.status}: "
    return error.message.removeprefix(start) or error.message


def _reply(status: int, text: str, headers: Mapping[str, str]) -> Reply:
    body = dump({"error": text}).encode("ascii")
    return Reply(status, JSON, body, dict(headers))


# ----------------------------------------------------------------------------- limits


class Window(msgspec.Struct, frozen=True):
    """A day's limit of requests: how many are used, and until when (Unix time)."""

    limit: int
    used: int
    ends_at_s: float


def limits_body(
    features: Mapping[str, Sequence[str]], windows: Mapping[str, Window]
) -> bytes:
    """Return the body of ``GET /v1/limits``.

    Args: features: the gateway's name of each feature, with the models allowed for it.
          windows: of those that have a limit.
    """
    limits = {
        feature: {**_window(windows.get(feature)), "allowedModels": list(models)}
        for feature, models in features.items()
    }
    return dump(limits).encode("ascii")


def _window(window: Window | None) -> dict[str, object]:
    if window is None:
        return {"limit": NO_LIMIT, "interval": "24h0m0s", "usage": 0}
    fields = {"limit": window.limit, "interval": "24h0m0s", "usage": window.used}
    if not window.used:
        return fields
    expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(window.ends_at_s))
    return fields | {"expiry": expiry}
