"""Cody Gateway's own API: which feature, whose dialect, what errors look like."""

import json

import pytest
from hypothesis import given, strategies as st
from multidict import CIMultiDict

from proxy.completion import (
    CompletionRequest,
    Delta,
    Feature,
    Finish,
    Message,
    Text,
    TextPart,
)
from proxy.dialects.base import Head, Reply, Writer
from proxy.dialects.cody import plain_error
from proxy.dialects.gateway import (
    FEATURE_HEADER,
    NO_LIMIT,
    GatewayRoute,
    GatewayWriter,
    limits_body,
)
from proxy.dialects.gemini import GeminiReader
from proxy.dialects.gemini_incoming import GenerateContent
from proxy.errors import (
    ClientFault,
    DeadlineExceeded,
    InvalidPrompt,
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    ProxyError,
    Unauthorized,
    UnknownModel,
    UpstreamFault,
    UpstreamReported,
    UpstreamStatus,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.sse import Parser

PROVIDERS = ["anthropic", "openai", "fireworks", "google"]


class Vendor:
    """A dialect that shows who was asked."""

    def __init__(self, dialect: str, feature: Feature = "chat") -> None:
        self.dialect = dialect
        self._feature: Feature = feature

    def check_method(self, head: Head) -> None:
        raise AssertionError("the gateway's own")

    def check(self, head: Head) -> None:
        if "refuse" in head.query:
            raise InvalidRequest(f"{self.dialect} refuses")

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        if not body:
            raise InvalidRequest(f"{self.dialect} parses")
        message = Message("user", [TextPart(body.decode())])
        dropped = ["languageId", "logprobs"]
        request = CompletionRequest(self._feature, [message], dropped=dropped)
        return request, VendorWriter(self.dialect)

    def error_reply(self, error: ProxyError) -> Reply:
        raise AssertionError("the gateway's own")


class VendorWriter:
    def __init__(self, dialect: str) -> None:
        self._dialect = dialect
        self.stream_headers = {"x": dialect}

    def frames(self, deltas: list[Delta]) -> bytes:
        return f"{self._dialect} {len(deltas)}".encode()

    def keep_alive(self):
        return b": vendor\n\n"

    def literals(self, texts: list[bytes]) -> bytes | None:
        return None

    def end(self) -> bytes:
        return b"end"

    def error(self, error: ProxyError) -> bytes:
        return error.message.encode()

    def body(self, deltas: list[Delta]) -> bytes:
        return f"body {len(deltas)}".encode()

    def error_reply(self, error: ProxyError) -> Reply:
        return plain_error(418, "the vendor's own", {})


def head(feature: str | None = "chat_completions", method="POST", **query) -> Head:
    headers = {} if feature is None else {FEATURE_HEADER.lower(): feature}
    return Head(method, "/", query, CIMultiDict(headers))


def route(provider="anthropic") -> GatewayRoute:
    return GatewayRoute(provider, Vendor(provider))


FIREWORKS = GatewayRoute(
    "fireworks",
    {
        "chat_completions": Vendor("talk", "chat"),
        "code_completions": Vendor("fill", "chat"),
    },
)

# ---------------------------------------------------------------------------- feature


@pytest.mark.parametrize(
    ("provider", "feature", "text"),
    [
        ("anthropic", None, "X-Sourcegraph-Feature header is required"),
        ("anthropic", " ", "X-Sourcegraph-Feature header is required"),
        ("anthropic", "chat", "invalid value for X-Sourcegraph-Feature"),
        ("google", "CODE_COMPLETIONS", "invalid value for X-Sourcegraph-Feature"),
        (
            "openai",
            "code_completions",
            'feature "code_completions" is currently not supported for OpenAI',
        ),
        (
            "anthropic",
            "embeddings",
            'feature "embeddings" is currently not supported for Anthropic',
        ),
    ],
)
def test_feature_is_refused(provider, feature, text):
    gateway = route(provider)
    for ask in (
        gateway.check,
        lambda head: gateway.parse(head, b"{}"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            ask(head(feature))
        assert (caught.value.status, caught.value.message) == (400, text)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("feature", "expected"),
    [("chat_completions", "chat"), ("code_completions", "code")],
)
def test_feature_comes_from_the_header(provider, feature, expected):
    if (provider, feature) == ("openai", "code_completions"):
        return
    gateway = route(provider)
    gateway.check(head(feature))
    request, writer = gateway.parse(head(feature), b"Hi")
    assert (request.feature, request.messages[0].text) == (expected, "Hi")
    assert gateway.dialect == provider
    assert isinstance(writer, GatewayWriter)


@pytest.mark.parametrize(
    ("feature", "dialect", "expected"),
    [("chat_completions", "talk", "chat"), ("code_completions", "fill", "code")],
)
def test_each_feature_may_have_its_dialect(feature, dialect, expected):
    request, writer = FIREWORKS.parse(head(feature), b"Hi")
    assert request.feature == expected
    assert writer.frames([Text("a")]) == f"{dialect} 1".encode()
    assert FIREWORKS.dialect == ""


def test_dialect_that_all_features_share():
    inner = {"chat_completions": Vendor("v"), "code_completions": Vendor("v")}
    assert GatewayRoute("fireworks", inner).dialect == "v"


def test_fields_for_the_gateway_are_not_missed():
    request, _ = FIREWORKS.parse(head(), b"Hi")
    assert request.dropped == ["logprobs"]


def test_the_vendors_own_checks_are_made():
    with pytest.raises(InvalidRequest) as caught:
        route().check(head(refuse="1"))
    assert caught.value.message == "anthropic refuses"
    with pytest.raises(InvalidRequest) as caught:
        route().parse(head(), b"")
    assert caught.value.message == "anthropic parses"


def test_method_other_than_post():
    gateway = route()
    error = MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
    reply = gateway.error_reply(error)
    assert (reply.status, reply.headers) == (405, {"Allow": "POST"})
    assert reply.body == b'{"error":"Method Not Allowed"}'


# ---------------------------------------------------------------------------- replies


def test_replies_are_the_vendors():
    _, writer = route().parse(head(), b"Hi")
    assert writer.stream_headers == {"x": "anthropic"}
    assert writer.frames([Text("a"), Text("b")]) == b"anthropic 2"
    assert writer.end() == b"end"
    assert writer.body([Text("a")]) == b"body 1"
    assert writer.error(UpstreamFault("x")) == b"x"


def status(code: int, body="no", headers=None, clients: bool = False) -> UpstreamStatus:
    error = UpstreamStatus("Vendor", code, body, headers=headers or {})
    error.is_clients_credential = clients
    return error


SHOWN = {"retry-after": "9", "x-ratelimit-limit": "5"}


@pytest.mark.parametrize(
    ("error", "code", "text", "headers"),
    [
        (InvalidRequest("x"), 400, "x", {}),
        (InvalidPrompt("x"), 400, "x", {}),
        (UnknownModel("x"), 400, "x", {}),
        (Unauthorized("x"), 401, "x", {}),
        (PayloadTooLarge("x"), 413, "x", {}),
        (ClientFault("x", status=429), 429, "x", {"retry-after": "5"}),
        (ProxyError("x"), 500, "x", {}),
        (DeadlineExceeded("x"), 504, "request to upstream provider {p} timed out", {}),
        (
            UpstreamUnreachable("x"),
            500,
            "failed to make request to upstream provider {p}",
            {},
        ),
        (UpstreamTruncated("x"), 502, "x", {}),
        (UpstreamReported("x"), 502, "x", {}),
        (UpstreamReported("x", status=401), 502, "x", {}),
        (UpstreamReported("x", status=400), 400, "x", {}),
        (UpstreamReported("x", status=429), 503, "x", None),
        (status(429), 503, "no", None),
        (status(529), 503, "no", None),
        (status(429, "no", SHOWN), 503, "no", {"retry-after": "9"}),
        (status(400, '{"error":"a"}', SHOWN), 400, '{"error":"a"}', SHOWN),
        (status(401), 502, "no", {}),
        (status(403), 502, "no", {}),
        (status(401, clients=True), 401, "no", {}),
        (status(302), 502, "no", {}),
        (status(404), 404, "no", {}),
        (status(503), 503, "no", {}),
        (status(500, ""), 500, "Vendor: unexpected status code 500: ", {}),
    ],
)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_error_reply(provider, error, code, text, headers):
    if headers is None:
        headers = {"retry-after": "2" if provider == "anthropic" else "30"}
    gateway = route(provider)
    for reply in (
        gateway.error_reply(error),
        gateway.parse(head(), b"Hi")[1].error_reply(error),
    ):
        assert (reply.status, reply.content_type) == (code, "application/json")
        assert json.loads(reply.body) == {"error": text.replace("{p}", provider)}
        assert reply.headers == headers


def test_error_reply_byte_for_byte():
    assert route().error_reply(InvalidRequest('"ö"')).body == (
        b'{"error":"\\"\\u00f6\\""}'
    )


def test_text_of_an_upstream_has_been_redacted():
    error = status(400, "key sk-1")
    error.message = error.message.replace("sk-1", "[redacted]")
    assert route().error_reply(error).body == b'{"error":"key [redacted]"}'


# ----------------------------------------------------------------- a dialect for real


@given(st.binary(max_size=40), st.sampled_from(["chat_completions", "x", "embeddings"]))
def test_random_requests_raise_only_client_faults(body, feature):
    gateway = GatewayRoute("google", GenerateContent())
    try:
        gateway.check(head(feature))
        gateway.parse(head(feature), body)
    except ClientFault as error:
        assert type(error) is InvalidRequest
        assert "error" in json.loads(gateway.error_reply(error).body)


def test_google_through_the_gateway():
    gateway = GatewayRoute("google", GenerateContent())
    body = {"model": "m", "contents": [{"parts": [{"text": "Hi"}]}], "stream": True}
    request, writer = gateway.parse(head("code_completions"), json.dumps(body).encode())
    assert (request.feature, request.model, request.stream) == ("code", "m", True)
    reader = GeminiReader()
    out: list[Delta] = []
    for event in Parser().feed(
        writer.frames([Text("a"), Finish("length")]) + writer.end()
    ):
        reader.read(event, out)
    assert out[1:] == [Text("a"), Finish("MAX_TOKENS")]
    with pytest.raises(UpstreamReported):
        for event in Parser().feed(writer.error(UpstreamFault("x"))):
            reader.read(event, out)


# ----------------------------------------------------------------------------- limits


def test_limits_byte_for_byte():
    models = {"chat_completions": ["a/b", "c"], "embeddings": ()}
    assert limits_body(models, {}) == (
        b'{"chat_completions":{"limit":2147483647,"interval":"24h0m0s","usage":0,'
        b'"allowedModels":["a/b","c"]},"embeddings":{"limit":2147483647,'
        b'"interval":"24h0m0s","usage":0,"allowedModels":[]}}'
    )
    assert NO_LIMIT == 2147483647
