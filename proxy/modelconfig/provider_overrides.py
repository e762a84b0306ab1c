"""``providerOverrides`` -> providers with their endpoints.

What a type needs is in the tables at the end; how its URLs are built from the
endpoints and which headers it wants is the business of the provider's own code.
"""

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit, urlunsplit

from msgspec.structs import replace

from proxy.modelconfig import schema
from proxy.modelconfig.check import join
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.refs import is_id
from proxy.modelconfig.resolved import Endpoint, Provider

ReadFile: TypeAlias = Callable[[str], str]

MAX_DISPLAY_NAME = 128

_COMPLETE = "/v1/complete"
_MESSAGES = "/v1/messages"
_GEMINI = "https://generativelanguage.googleapis.com"
_NOT_SERVED = "is not served by this version yet"

# The gateway has a path for each.
_ROUTED = ("anthropic", "openai", "fireworks", "mistral", "google")

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")
_UNPRINTABLE_OR_BLANK = re.compile(r"[\x00-\x20\x7f]")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def resolve_providers(
    overrides: list[schema.ProviderOverride],
    path: str,
    read_file: ReadFile,
    findings: Findings,
) -> dict[str, Provider]:
    """Return the providers by id, in the order of the configuration."""
    providers: dict[str, Provider] = {}
    for index, override in enumerate(overrides):
        at = f"{path}[{index}]"
        if not is_id(override.id):
            findings.problem(f"{at}.id", f'invalid provider ID: "{override.id}"')
        elif override.id in providers:
            findings.problem(f"{at}.id", f'provider "{override.id}" specified twice')
        else:
            provider = _Reader(read_file, findings).provider(override, at)
            providers[override.id] = provider
    return providers


def check_display_name(name: str, path: str, findings: Findings) -> None:
    if len(name) > MAX_DISPLAY_NAME:
        text = f"display name length: {len(name)}; at most {MAX_DISPLAY_NAME}"
        findings.problem(f"{path}.displayName", text)


def parse_url(url: str) -> SplitResult | None:
    """Return the parts of an HTTP URL that has a host, or None."""
    try:
        parts = urlsplit(url)
        # Only asking for the port tells whether it is a number.
        usable = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        return None
    # urlsplit drops line ends and tabs silently.
    blank = _UNPRINTABLE_OR_BLANK.search(url)
    return parts if usable and parts.hostname and not blank else None


class _Reader:
    def __init__(self, read_file: ReadFile, findings: Findings) -> None:
        self.read_file = read_file
        self.findings = findings

    def provider(self, override: schema.ProviderOverride, path: str) -> Provider:
        check_display_name(override.display_name or "", path, self.findings)
        config = override.server_side_config
        provider = Provider(
            id=override.id,
            type=str(config.__struct_config__.tag) if config else "",
            endpoints=(),
            display_name=override.display_name or f'Provider "{override.id}"',
        )
        at = f"{path}.serverSideConfig"
        if config is None:
            text = f'no server-side config available for provider "{override.id}"'
            self.findings.problem(at, text)
            return provider
        if isinstance(config, schema.Sourcegraph) and override.id not in _ROUTED:
            text = f'to use Cody Gateway, the provider ID ("{override.id}") must match'
            known = ", ".join(_ROUTED)
            self.findings.problem(f"{path}.id", f"{text} one of {known}")
        return replace(
            provider,
            endpoints=self.endpoints(config, at),
            verbose_logs=config.enable_verbose_logs,
            **_special_fields(config),
        )

    def endpoints(
        self, config: schema.AnyServerSideConfig, path: str
    ) -> tuple[Endpoint, ...]:
        if isinstance(config, schema.Pooled):
            return self.pooled(config, path)
        if isinstance(config, schema.AwsBedrock):
            self.findings.problem(f"{path}.type", f'"awsBedrock" {_NOT_SERVED}')
            return ()
        return self.single(config, path)

    def pooled(self, config: schema.Pooled, path: str) -> tuple[Endpoint, ...]:
        given = list(config.endpoints or ())
        paths = [f"{path}.endpoints[{index}]" for index in range(len(given))]
        if config.url is not None:
            if given:
                self.findings.problem(path, "give endpoints or url, not both")
            given.append(schema.Endpoint(url=config.url))
            paths.append(path)
        if not given:
            self.findings.problem(f"{path}.endpoints", "expected at least one endpoint")
        common = self.credentials(config, path, config.access_token_query)
        found = zip(given, paths, strict=True)
        return tuple(self.pool_endpoint(each, at, common) for each, at in found)

    def pool_endpoint(
        self, given: schema.Endpoint, path: str, common: Endpoint
    ) -> Endpoint:
        own = self.credentials(given, path, given.access_token_query)
        parts = self.parts(given.url, f"{path}.url")
        if parts and parts.path in ("", "/"):
            text = "has no path; model servers usually want /v1 at the end"
            self.findings.warn(f"{path}.url", text)
        if own.access_token or own.headers:
            return replace(own, url=given.url)
        query = own.access_token_query or common.access_token_query
        return replace(common, url=given.url, access_token_query=query)

    def single(self, config: schema.Single, path: str) -> tuple[Endpoint, ...]:
        key = "url" if config.endpoint is None and config.url else "endpoint"
        at = f"{path}.{key}"
        url = config.endpoint or config.url or _DEFAULT_URLS.get(type(config), "")
        if config.endpoint and config.url:
            self.findings.problem(path, "give endpoint or url, not both")
        if not url and isinstance(config, schema.AzureOpenAI):
            self.findings.problem(at, "missing; expected the URL of the resource")
        elif url:
            url = self.single_url(config, url, at)
        return (replace(self.credentials(config, path), url=url),)

    def single_url(self, config: schema.Single, url: str, path: str) -> str:
        parts = self.parts(url, path)
        if parts is None:
            return url
        if isinstance(config, schema.Google) and not url.startswith(_GEMINI):
            text = f"Vertex AI {_NOT_SERVED}; expected an endpoint under {_GEMINI}"
            self.findings.problem(path, text)
        old_path = parts.path.rstrip("/")
        if isinstance(config, schema.Anthropic) and old_path.endswith(_COMPLETE):
            # Only messages bodies are sent; the old API refuses every one of them.
            self.findings.warn(path, f"{_COMPLETE} is no more; using {_MESSAGES}")
            new_path = old_path.removesuffix(_COMPLETE) + _MESSAGES
            return urlunsplit(parts._replace(path=new_path))
        return url

    def parts(self, url: str, path: str) -> SplitResult | None:
        parts = parse_url(url)
        if parts is None:
            # Not shown: what is no URL may be a token in the wrong place.
            text = "invalid endpoint URL; expected http:// or https:// and a host"
            self.findings.problem(path, text)
        return parts

    def credentials(
        self, config: schema.Credentials, path: str, query: str | None = None
    ) -> Endpoint:
        """Return an endpoint that has no URL yet."""
        token = read_secret(
            config.access_token,
            config.access_token_file,
            ("accessToken", "accessTokenFile"),
            path,
            self.read_file,
            self.findings,
        )
        headers = config.headers or {}
        self.check_headers(headers, f"{path}.headers")
        return Endpoint("", token, headers, query or "")

    def check_headers(self, headers: Mapping[str, str], path: str) -> None:
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name):
                self.findings.problem(join(path, name), "invalid header name")
            elif _UNPRINTABLE.search(value):
                self.findings.problem(join(path, name), "invalid header value")


def read_secret(
    value: str | None,
    file: str | None,
    keys: tuple[str, str],
    path: str,
    read_file: ReadFile,
    findings: Findings,
) -> str:
    """Return a secret given as a value or as the name of a file, without blanks
    around it; "" if there is none or it cannot be used.
    """
    value_key, file_key = keys
    if value and file:
        findings.problem(path, f"give {value_key} or {file_key}, not both")
    at = f"{path}.{file_key if file else value_key}"
    try:
        secret = (read_file(file) if file else value or "").strip()
    except (OSError, ValueError) as error:
        # The name is not shown: it may be the secret itself, put in the wrong place.
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        findings.problem(at, f"cannot read the file: {reason}")
        return ""
    if file and not secret:
        findings.problem(at, "the file is empty")
    if _UNPRINTABLE.search(secret):
        findings.problem(at, "contains line breaks or control characters")
    return secret


def _special_fields(config: schema.AnyServerSideConfig) -> dict[str, object]:
    names = _SPECIAL_FIELDS.get(type(config), ())
    return {name: getattr(config, name) for name in names}


_DEFAULT_URLS: Mapping[type, str] = {
    schema.Anthropic: "https://api.anthropic.com/v1/messages",
    schema.Sourcegraph: "https://cody-gateway.sourcegraph.com",
}

_SPECIAL_FIELDS: Mapping[type, tuple[str, ...]] = {
    schema.HuggingfaceTgi: ("use_legacy_completions",),
    schema.Openaicompatible: ("use_legacy_completions",),
    schema.AzureOpenAI: ("user", "use_deprecated_completions_api", "api_version"),
}
