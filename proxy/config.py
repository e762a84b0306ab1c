"""The configuration file: its text, its own settings, and what they come to.

The file is YAML; the ``modelConfiguration`` block in it may be JSON with comments, as
it stands in a site configuration. What the block means is decided in ``modelconfig``,
what is beside it here. Everything that is wrong is reported at once, and no value that
could be a secret is ever repeated.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import quote, unquote, urlsplit

import msgspec
import yaml
from msgspec import Meta, field
from msgspec.structs import asdict, replace
from yaml.reader import ReaderError

from proxy import modelconfig, tls, transport
from proxy.dialects.cody import MAX_VERSION
from proxy.errors import ConfigError
from proxy.modelconfig import jsonc
from proxy.modelconfig.check import hint, join, read as read_data
from proxy.modelconfig.completions_block import CompletionsBlock, converted
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.provider_overrides import ReadFile, read_secret
from proxy.modelconfig.refs import made_id
from proxy.modelconfig.resolved import (
    ContextWindow,
    Model,
    ModelConfiguration,
    Provider,
    Seconds,
    Timeouts,
)
from proxy.modelconfig.schema import Block, Keys
from proxy.tls import ServerTls

TOKENS_VARIABLE = "COMPLETIONS_PROXY_TOKENS"
# What a server that does not say is taken to know; it says itself what is too much.
UNKNOWN_TOKENS = 32_768
# Of a space that prompt and answer share, this much is for Cody's answers.
CLIENT_OUTPUT_TOKENS = 4096
DEFAULT_LISTEN = "127.0.0.1:8080"

Positive: TypeAlias = Annotated[int, Meta(gt=0)]
Patience: TypeAlias = Annotated[float, Meta(ge=0)]
Count: TypeAlias = Annotated[int, Meta(gt=-1)]


class Rates(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """How much one client may ask for of one feature; None: any amount."""

    requests_per_minute: Positive | None = None
    requests_per_day: Positive | None = None
    tokens_per_day: Positive | None = None


class TokenLimits(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True
):
    """What one client may do: one token, or one address where none are asked for."""

    in_flight: Positive | None = None
    chat: Rates = Rates()
    code: Rates = Rates()


class Limits(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What is too large: a request's body, one line of its head, one event of a
    stream; and what is too much: of connections, of requests at a time, of a client.

    ``waiting`` requests may wait for each place that is limited. ``redis`` counts rates
    for several processes; without it each counts for itself.
    """

    body_bytes: Positive = 32 * 1024 * 1024
    header_bytes: Positive = 16 * 1024
    event_bytes: Positive = 10 * 1024 * 1024
    connections: Positive = 8192
    in_flight: Positive | None = None
    waiting: Count = 100
    token: TokenLimits = TokenLimits()
    redis: str | None = None

    def __repr__(self) -> str:
        return "Limits(…)"  # the address of Redis may hold a password


class KeepAlive(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True
):
    """What a client of a stream hears while its upstream is silent.

    Every ``every`` seconds; 0 is never. ``before_first_token`` also while the answer
    has not begun, which means a status of 200 whatever comes of it.
    """

    every_s: Annotated[float, Meta(ge=0)] = field(name="every", default=15.0)
    before_first_token: bool = False


class RepoPattern(
    msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True
):
    """A regular expression (Go's RE2) that matches names of repositories."""

    repo_name_pattern: str


class ContextFilters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which repositories Cody's clients may take context from."""

    include: list[RepoPattern] | None = None
    exclude: list[RepoPattern] | None = None


class Instance(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """As what Sourcegraph instance the proxy poses to Cody's clients.

    ``api_version`` is the highest of the completions API that clients are told of;
    ``hand_token_back``: the sign-in page passes a token on to the editor that asks.
    """

    site_version: str = "6.2.0"
    api_version: Positive = 8
    context_filters: ContextFilters | None = None
    hand_token_back: bool = False


class Shutdown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long new connections, and then open replies, go on after a signal to stop."""

    delay_s: Patience = field(name="delay", default=0.0)
    grace_s: Patience = field(name="grace", default=10.0)


class AllTimeouts(Timeouts, frozen=True, forbid_unknown_fields=True):
    """Those of upstreams; for a place in flight; and for a client's connection: without
    a request, with the head of one begun, with its body begun.
    """

    waiting_s: Seconds = field(name="waiting", default=10.0)
    # Longer than clients keep theirs (Go 90 s, nginx 60 s): who closes first loses the
    # request that is on its way.
    idle_s: Seconds = field(name="idle", default=120.0)
    header_s: Seconds = field(name="header", default=20.0)
    body_s: Seconds = field(name="body", default=60.0)


class Token(msgspec.Struct, frozen=True):
    """Who may use the proxy. ``name`` is for logs, ``sha256`` of the token's text.

    ``limits`` is None for the default ones.
    """

    name: str
    sha256: bytes
    email: str = ""
    limits: TokenLimits | None = None

    def __repr__(self) -> str:
        return f"Token(name={self.name!r})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("name", self.name)]


class Settings(msgspec.Struct, frozen=True):
    """All that the proxy is told. ``open`` means that it asks nobody for a token.

    ``files`` are those that it was read from; ``tls`` is None for plain HTTP.
    """

    listen: tuple[tuple[str, int], ...]
    tokens: tuple[Token, ...]
    open: bool
    limits: Limits
    timeouts: AllTimeouts
    models: ModelConfiguration
    keep_alive: KeepAlive = KeepAlive()
    client_version_check: bool = False
    passthrough: bool = False
    list_upstream_models: bool = False
    auth_header: str = "Authorization"
    instance: Instance = Instance()
    origins: tuple[str, ...] = ()
    tls: ServerTls | None = None
    shutdown: Shutdown = Shutdown()
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


# --- the file's shape


class _Token(Keys):
    name: str
    sha256: str | None = None
    token: str | None = None
    token_file: str | None = None
    email: str = ""
    limits: TokenLimits | None = None


class _Auth(Keys):
    tokens: list[_Token]
    header: str = "Authorization"


class _Model(Keys):
    strict_template: bool | None = None
    fallback: str = ""
    lift_preamble: bool = False


class _Timeouts(Keys):
    connect: Seconds | None = None
    headers: Seconds | None = None
    first_token: Seconds | None = None
    between_tokens: Seconds | None = None
    chat: Seconds | None = None
    code: Seconds | None = None


class _Provider(Keys):
    profile: (
        Literal["tgi", "vllm", "llamacpp", "ollama", "openai", "anthropic"] | None
    ) = None
    adjust: bool = True
    credentials: Literal["configured", "client"] = "configured"
    balance: Literal["least-outstanding", "round-robin", "random"] = "least-outstanding"
    weights: list[Positive] = []
    timeouts: _Timeouts = field(default_factory=_Timeouts)
    tls: transport.UpstreamFiles | None = None
    use_environment_proxy: bool = False
    in_flight: Positive | None = None


class _File(Keys):
    model_configuration: Block | None = None
    completions: CompletionsBlock | None = None
    listen: str | list[str] = DEFAULT_LISTEN
    auth: Literal["none"] | _Auth | None = None
    limits: Limits = Limits()
    timeouts: AllTimeouts = AllTimeouts()
    keep_alive: KeepAlive = KeepAlive()
    shutdown: Shutdown = Shutdown()
    tls: transport.ServerFiles | None = None
    aliases: dict[str, str] = {}
    fallback: bool = False
    models: dict[str, _Model] = {}
    providers: dict[str, _Provider] = {}
    passthrough: bool = False
    list_upstream_models: bool = False
    client_version_check: bool = False
    instance: Instance = Instance()
    origins: list[str] = []
    # Belongs to an instance; allowed because it stands beside the block there.
    cody_enabled: bool = field(name="cody.enabled", default=True)


def load(
    text: str,
    *,
    environ: Mapping[str, str],
    directory: Path,
    listen: str | None = None,
) -> Settings:
    """Return the settings that a configuration file's ``text`` gives.

    Args:    directory: what the names of token files are relative to.
             listen: an address instead of those of the file.
    Raises:  ConfigError: lists everything that is wrong.
    """
    findings = Findings()
    # An editor's byte order mark; within a line it would be a character like others.
    data = _parse(text.removeprefix("\ufeff"), findings)
    is_ambiguous = bool(findings.problems)
    data = _expand(data, environ, "", findings)
    if is_ambiguous:  # a key given twice: say what is wrong with the shape, no more
        read_data(data, _File, "", findings.problems)
        raise ConfigError(findings.problems)
    return _settings(data, environ, directory, listen, findings)


def read(path: Path, environ: Mapping[str, str], listen: str | None = None) -> Settings:
    """Return the settings of the file at ``path``. Raises: ConfigError."""
    text = read_text(path)
    settings = load(text, environ=environ, directory=path.parent, listen=listen)
    return replace(settings, files=(str(path), *settings.files))


def read_text(path: Path) -> str:
    """Return the text of a configuration file. Raises: ConfigError."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None


_BARE_URL = re.compile(r"^([^:]+://[^/?#]+)/?$")


def for_upstream(
    url: str,
    *,
    type: str,
    model: str,
    environ: Mapping[str, str],
    listen: str | None = None,
    display_name: str = "",
    profile: str | None = None,
    max_input_tokens: int = UNKNOWN_TOKENS,
    max_output_tokens: int = UNKNOWN_TOKENS,
) -> Settings:
    """Return the settings for one upstream with one model, without any file.

    Whatever name a client asks for, there is only that model.

    Args:    url: where the server is; scheme and path may be left out for servers
                 with the OpenAI API.
             type: as in ``serverSideConfig``.
             model: what the upstream calls it; characters that no id may have
                 become "_" in its ref.
             max_output_tokens: of the prompt and the answer together.
    Raises:  ConfigError: lists everything that is wrong.
    """
    provider = "tgi" if type == "huggingface-tgi" else "upstream"
    url = url if "://" in url else f"http://{url}"
    if type in ("huggingface-tgi", "openaicompatible"):
        url = _BARE_URL.sub(r"\1/v1", url)
    ref = f"{provider}::v1::{made_id(model)}"
    window = {
        "maxInputTokens": max_input_tokens,
        "maxOutputTokens": max_output_tokens,
    }
    override = {
        "modelRef": ref,
        "modelName": model,
        "displayName": display_name,
        "contextWindow": window,
    }
    data: dict[str, object] = {
        "fallback": True,
        "providers": {provider: {"profile": profile}} if profile else {},
        "modelConfiguration": {
            "sourcegraph": None,
            "providerOverrides": [
                {"id": provider, "serverSideConfig": {"type": type, "url": url}}
            ],
            "modelOverrides": [override],
            "defaultModels": {"chat": ref, "fastChat": ref, "codeCompletion": ref},
        },
    }
    settings = _settings(data, environ, Path(), listen, Findings())
    shared = _client_window(max_input_tokens, max_output_tokens)
    [found] = settings.models.models
    models = replace(settings.models, models=(replace(found, client_window=shared),))
    return replace(settings, models=models)


def _client_window(max_input_tokens: int, max_tokens: int) -> ContextWindow:
    """Divide a space: what the server keeps for answers, or else a quarter of it."""
    kept = max(max_tokens - max_input_tokens, max_tokens // 4, 1)
    output = min(CLIENT_OUTPUT_TOKENS, kept)
    return ContextWindow(max(min(max_input_tokens, max_tokens - output), 1), output)


# --- text -> data


_JSON_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """The types of JSON and no others: ``apiVersion: 2024-06-01`` is no date."""

    yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _JSON_TYPES
    }

    def construct_text(self, node: yaml.ScalarNode) -> str:
        # JSON writes what is beyond U+FFFF as two escapes, YAML keeps them apart.
        text = str(self.construct_scalar(node))
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_implicit_resolver(
    # YAML 1.1 takes 1e3 for text, JSON for a number.
    "tag:yaml.org,2002:float",
    re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?[eE][+-]?\d+$"),
    list("-0123456789"),
)

_COMMENT_AS_TEXT = re.compile(r"(?:^|\s|^(?:true|false|null|-?\d[\d.eE+-]*))(?://|/\*)")
# What PyYAML quotes: <names> of its own, single characters, and words of the file.
_QUOTED = re.compile(r"'(<[^']*>|[^']{1,2})'|'[^']*'")


def parse(text: str) -> object:
    """Return the data of a text, as it stands there.

    Raises: ConfigError: it is neither YAML nor JSON with comments.
    """
    findings = Findings()
    data = _parse(text, findings)
    if findings.problems:
        raise ConfigError(findings.problems)
    return data


def _parse(text: str, findings: Findings) -> object:
    """Return the data of ``text``; keys that are given twice go to ``findings``.

    Raises: ConfigError: the text is neither YAML nor JSON with comments.
    """
    try:
        node = _compose(text)
        _check_keys(node, "", findings)
        return _Loader("").construct_document(node) if node else None
    except yaml.YAMLError as error:
        raise ConfigError([_yaml_problem(error, text)]) from None
    except (ValueError, LookupError):
        # Only a tag can do that, as in "!!int x": no text is read as a number unasked.
        raise ConfigError(["the file: a value does not fit its YAML tag"]) from None
    except RecursionError:
        raise ConfigError(["the file: nested too deeply"]) from None


def _compose(text: str) -> yaml.Node | None:
    """Return the tree of ``text``.

    What is YAML is taken as such, unless it has a text like ``// why`` in a JSON part:
    YAML reads ``[ // why`` and the string in the next line as one long word.
    """
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError:
        return yaml.compose(jsonc.to_yaml(text), _Loader)
    if not any(map(_has_comment_as_text, _nodes(node))):
        return node
    try:
        return yaml.compose(jsonc.to_yaml(text), _Loader)
    except yaml.YAMLError:
        return node


def _children(node: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    seen: set[int] = set()
    left = [root] if root else []
    while left:
        node = left.pop()
        # An alias in YAML is the very node of its anchor, and may lie within it.
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            left += _children(node)


def _has_comment_as_text(node: yaml.Node) -> bool:
    return bool(getattr(node, "flow_style", False)) and any(
        isinstance(each, yaml.ScalarNode)
        and each.style is None
        and _COMMENT_AS_TEXT.search(each.value) is not None
        for each in _children(node)
    )


def _check_keys(node: yaml.Node | None, path: str, findings: Findings) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, each in enumerate(node.value):
            _check_keys(each, f"{path}[{index}]", findings)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        at = join(path, name)
        if name in lines:
            text = f"given twice, in line {lines[name]} and in line {line}"
            findings.problem(at, text)
        lines.setdefault(name, line)
        _check_keys(value, at, findings)


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: {error.reason}"
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
    what = ", ".join(filter(None, (error.problem, error.context)))
    return f"{where}: " + _QUOTED.sub(lambda m: m[0] if m[1] else "'…'", what)


_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?", re.ASCII)


def _expand(
    data: object, environ: Mapping[str, str], path: str, findings: Findings
) -> object:
    """Return ``data`` with the variables in its strings replaced."""
    if isinstance(data, dict):
        return {
            key: _expand(value, environ, join(path, key), findings)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [
            _expand(value, environ, f"{path}[{index}]", findings)
            for index, value in enumerate(data)
        ]
    if not isinstance(data, str):
        return data

    def value_of(match: re.Match[str]) -> str:
        name, default = match.groups()
        if match[0] == "$${":
            return "${"
        if name is None:
            text = "expected ${NAME} or ${NAME:-default}; a literal ${ is written $${"
            findings.problem(path, text)
        elif environ.get(name) or (name in environ and default is None):
            return environ[name]
        elif default is None:
            findings.problem(path, f"environment variable {name} is not set")
        return default or ""

    return _VARIABLE.sub(value_of, data)


# --- data -> settings


def _settings(
    data: object,
    environ: Mapping[str, str],
    directory: Path,
    listen: str | None,
    findings: Findings,
) -> Settings:
    file = read_data(data, _File, "", findings.problems)
    if file is None:
        raise ConfigError(findings.problems)

    files: list[str] = []

    def read_file(name: str) -> str:
        files.append(str(directory / name))
        return (directory / name).read_text("utf-8")

    addresses = _addresses(listen or file.listen, findings)
    tokens = _tokens(file.auth, environ, read_file, findings)
    tokens = tuple(_with_defaults(token, file.limits.token) for token in tokens)
    _check_redis(file.limits.redis, findings)
    _check_access(addresses, tokens, file.auth, findings)
    if not file.cody_enabled:
        findings.warn("cody.enabled", "ignored")
    _check_instance(file.instance, findings)
    _check_origins(file.origins, findings)
    server_tls = transport.server(file.tls, directory, findings)
    models = _models(file, read_file, findings)
    if models is not None:
        models = _connected(models, file, directory, environ, findings)
        for provider in models.providers.values():
            files += tls.files(provider.tls)
    if models is None or findings.problems:
        raise ConfigError(_first_of_each(findings.problems))
    return Settings(
        listen=addresses,
        tokens=tokens,
        open=not tokens,
        limits=file.limits,
        timeouts=file.timeouts,
        keep_alive=file.keep_alive,
        models=models,
        client_version_check=file.client_version_check,
        passthrough=file.passthrough,
        list_upstream_models=file.list_upstream_models,
        auth_header=file.auth.header
        if isinstance(file.auth, _Auth)
        else "Authorization",
        instance=file.instance,
        origins=tuple(file.origins),
        tls=server_tls,
        shutdown=file.shutdown,
        files=tuple(dict.fromkeys((*files, *tls.files(server_tls)))),
        warnings=(*findings.warnings, *models.warnings),
    )


def _first_of_each(problems: Sequence[str]) -> list[str]:
    """Leave out what follows from a problem with the same value: a variable that is
    not set makes an odd address, too.
    """
    firsts: dict[str, str] = {}
    for problem in problems:
        firsts.setdefault(problem.partition(": ")[0], problem)
    return list(firsts.values())


_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


def _addresses(
    given: str | list[str], findings: Findings
) -> tuple[tuple[str, int], ...]:
    listed = isinstance(given, list)
    found: dict[tuple[str, int], None] = {}
    for index, text in enumerate(given if isinstance(given, list) else [given]):
        address = _address(text)
        if address is None:
            at = f"listen[{index}]" if listed else "listen"
            text = 'expected "host:port", as in "127.0.0.1:8080" or "[::1]:8080"'
            findings.problem(at, text)
        else:
            found[address] = None
    if not given:
        findings.problem("listen", "expected at least one address")
    return tuple(found)


def _address(text: str) -> tuple[str, int] | None:
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or int(match[3]) > 65535:
        return None
    if match[1] is None:
        return match[2], int(match[3])
    return (match[1], int(match[3])) if _ip(match[1]) else None


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    ip = _ip(host)
    return ip.is_loopback if ip else host == "localhost"


def _tokens(
    auth: _Auth | str | None,
    environ: Mapping[str, str],
    read_file: ReadFile,
    findings: Findings,
) -> tuple[Token, ...]:
    """Return the file's tokens, then those of the environment that are not in it."""
    found: dict[bytes, Token] = {}
    names: set[str] = set()
    listed = auth.tokens if isinstance(auth, _Auth) else []
    for index, given in enumerate(listed):
        at = f"auth.tokens[{index}]"
        digest = _digest(given, at, read_file, findings)
        if given.name in names:
            findings.problem(f"{at}.name", f'"{given.name}" given twice')
        if digest in found:
            findings.problem(at, f'the same token as "{found[digest].name}"')
        elif digest:
            found[digest] = Token(given.name, digest, given.email, given.limits)
        names.add(given.name)
    plain = re.split(r"[,\s]+", environ.get(TOKENS_VARIABLE, ""))
    for index, text in enumerate(filter(None, plain), 1):
        # The environment is bytes; those that are not UTF-8 are surrogates here.
        digest = _sha256(text)
        found.setdefault(digest, Token(f"env-{index}", digest))
    return tuple(found.values())


def _digest(given: _Token, path: str, read_file: ReadFile, findings: Findings) -> bytes:
    """Return the SHA-256 of a token, b"" if it has none that can be used."""
    ways = {"sha256": given.sha256, "token": given.token, "tokenFile": given.token_file}
    if sum(value is not None for value in ways.values()) != 1:
        findings.problem(path, f"expected one of {', '.join(ways)}")
        return b""
    if given.sha256 is not None:
        return _given_digest(given.sha256, f"{path}.sha256", findings)
    before = len(findings.problems)
    token = read_secret(
        given.token,
        given.token_file,
        ("token", "tokenFile"),
        path,
        read_file,
        findings,
    )
    if len(findings.problems) == before and len(token.split()) != 1:
        findings.problem(path, "expected a token without blanks in it")
    return _sha256(token)


def _given_digest(text: str, path: str, findings: Findings) -> bytes:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        findings.problem(path, "expected 64 hexadecimal digits")
        return b""
    digest = bytes.fromhex(text)
    # What `printf "$TOKEN" | sha256sum` says when TOKEN is not set.
    if digest == _sha256(""):
        findings.problem(path, "is the digest of an empty text")
    return digest


def _sha256(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _with_defaults(token: Token, default: TokenLimits) -> Token:
    """Give a token the default for every limit that it has none of its own for."""
    own = token.limits
    if own is None:
        return token
    limits = TokenLimits(
        in_flight=own.in_flight or default.in_flight,
        chat=_rates(own.chat, default.chat),
        code=_rates(own.code, default.code),
    )
    return replace(token, limits=limits)


def _rates(own: Rates, default: Rates) -> Rates:
    given = {name: value for name, value in asdict(own).items() if value is not None}
    return replace(default, **given)


def _check_redis(url: str | None, findings: Findings) -> None:
    if url is None:
        return
    if not _is_redis(url):
        text = 'expected a URL, as in "redis://127.0.0.1:6379/0"'
        findings.problem("limits.redis", text)
    elif find_spec("redis") is None:
        text = "Redis's client is not installed: pip install 'completions-proxy[redis]'"
        findings.problem("limits.redis", text)


def _is_redis(url: str) -> bool:
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return parts.path != ""
        return parts.scheme in ("redis", "rediss") and (
            parts.hostname is not None and parts.port != 0
        )
    except ValueError:  # a port or an IPv6 address that is none
        return False


_HOW_TO_CLOSE = f"set {TOKENS_VARIABLE} or auth.tokens to let in only who has a token"


def _check_access(
    addresses: tuple[tuple[str, int], ...],
    tokens: tuple[Token, ...],
    auth: _Auth | str | None,
    findings: Findings,
) -> None:
    """See to it that nobody leaves the upstreams open to a network by mistake."""
    if auth == "none" and tokens:
        text = f'"none" contradicts the tokens in {TOKENS_VARIABLE}'
        findings.problem("auth", text)
    if tokens:
        return
    public = [_host_port(*each) for each in addresses if not _is_loopback(each[0])]
    if not public:
        text = "no token is asked for: every program on this machine can use the models"
        findings.warn("auth", f"{text}; {_HOW_TO_CLOSE}")
    elif auth == "none":
        text = f"no token is asked for: all who reach {', '.join(public)} can use the models"
        findings.warn("auth", f"{text}; {_HOW_TO_CLOSE}")
    else:
        text = f"{', '.join(public)} can be reached from other machines"
        findings.problem("auth", f'{text}; {_HOW_TO_CLOSE}, or say "auth: none"')


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")


def _check_origins(given: list[str], findings: Findings) -> None:
    for index, origin in enumerate(given):
        if not _ORIGIN.fullmatch(origin):
            text = 'expected the origin of a web page, as in "https://cody.example.com"'
            findings.problem(f"origins[{index}]", text)


_SITE_VERSION = re.compile(r"\d+\.\d+\.\d+")
_MAX_SITE_VERSION = 12  # to clients what is longer is a build from the main branch


def _check_instance(instance: Instance, findings: Findings) -> None:
    version = instance.site_version
    if not _SITE_VERSION.fullmatch(version) or len(version) > _MAX_SITE_VERSION:
        text = 'expected a version like "6.2.0", of at most 12 characters'
        findings.problem("instance.siteVersion", text)
    if instance.api_version > MAX_VERSION:
        text = f"expected 1 to {MAX_VERSION}: clients use what they are told of"
        findings.problem("instance.apiVersion", text)


def _block(file: _File, findings: Findings) -> tuple[Block, str] | None:
    """Return the block that says which models there are, and what it is called."""
    if file.model_configuration is not None:
        if file.completions is not None:
            findings.warn("completions", "ignored: there is a modelConfiguration")
        return file.model_configuration, "modelConfiguration"
    if file.completions is not None:
        text = (
            "the old form, taken as the modelConfiguration that completions-proxy check"
            " --from-site-config FILE prints; use that instead"
        )
        findings.warn("completions", text)
        return converted(file.completions, "completions", findings), "completions"
    findings.problem("modelConfiguration", "missing; expected a mapping")
    return None


def _models(
    file: _File, read_file: ReadFile, findings: Findings
) -> ModelConfiguration | None:
    """Return the block's models, with what the file says about them beside it."""
    if (given := _block(file, findings)) is None:
        return None
    block, path = given
    try:
        found = modelconfig.resolve(block, path=path, read_file=read_file)
    except ConfigError as error:
        findings.problems += error.problems
        return None
    _check_names(file, found, findings)
    models = tuple(
        _with_own(model, file.models.get(model.ref)) for model in found.models
    )
    providers = {
        id: _provider_with_own(provider, file.providers.get(id), file.timeouts)
        for id, provider in found.providers.items()
    }
    return replace(
        found,
        models=models,
        providers=providers,
        aliases=file.aliases,
        fallback=file.fallback,
    )


def _check_names(file: _File, found: ModelConfiguration, findings: Findings) -> None:
    """What stands beside the block must speak of what is in it."""
    refs = [model.ref for model in found.models]
    for ref, own in file.models.items():
        if ref not in refs:
            findings.problem(join("models", ref), f"unknown model; {hint(ref, refs)}")
        at = f"{join('models', ref)}.fallback"
        if own.fallback and own.fallback not in refs:
            text = f'unknown model "{own.fallback}"; {hint(own.fallback, refs)}'
            findings.problem(at, text)
        elif own.fallback == ref:
            findings.problem(at, "names the model itself; name another one")
    for name, ref in file.aliases.items():
        if ref not in refs:
            text = f'unknown model "{ref}"; {hint(ref, refs)}'
            findings.problem(join("aliases", name), text)
    for name in file.providers:
        if name not in found.providers:
            text = f"unknown provider; {hint(name, list(found.providers))}"
            findings.problem(join("providers", name), text)
    for id, provider in found.providers.items():
        weights = file.providers[id].weights if id in file.providers else []
        if weights and len(weights) != len(provider.endpoints):
            findings.problem(
                f"{join('providers', id)}.weights",
                f"{len(weights)} for {len(provider.endpoints)} endpoints; give one for "
                "each, in their order",
            )


def _connected(
    models: ModelConfiguration,
    file: _File,
    directory: Path,
    environ: Mapping[str, str],
    findings: Findings,
) -> ModelConfiguration:
    providers = dict(models.providers)
    for id, own in file.providers.items():
        if id in providers:
            providers[id] = transport.upstream(
                providers[id],
                own.tls,
                own.use_environment_proxy,
                directory,
                environ,
                findings,
            )
    return replace(models, providers=providers)


def _provider_with_own(
    provider: Provider, own: _Provider | None, timeouts: Timeouts
) -> Provider:
    if own is None:
        return replace(provider, timeouts=timeouts)
    given = {
        f"{name}_s": value
        for name in own.timeouts.__struct_fields__
        if (value := getattr(own.timeouts, name)) is not None
    }
    return replace(
        provider,
        profile=own.profile or "",
        adjust=own.adjust,
        client_credentials=own.credentials == "client",
        balance=own.balance,
        weights=tuple(own.weights),
        timeouts=replace(timeouts, **given),
        in_flight=own.in_flight,
    )


def _with_own(model: Model, own: _Model | None) -> Model:
    if own is None:
        return model
    strict = own.strict_template
    return replace(
        model,
        strict_template=model.strict_template if strict is None else strict,
        fallback=own.fallback,
        lift_preamble=own.lift_preamble,
    )


# --- settings -> text


def secrets(settings: Settings) -> list[str]:
    """Return what must not be seen anywhere: the credentials for the upstreams and
    for Redis.
    """
    endpoints = [
        endpoint
        for provider in settings.models.providers.values()
        for endpoint in provider.endpoints
    ]
    plain = [secret for endpoint in endpoints for secret in endpoint.secrets if secret]
    for provider in settings.models.providers.values():
        plain += provider.egress.secrets if provider.egress else []
    plain += _redis_password(settings.limits.redis)
    # As they stand in the query of a URL, too.
    found = [
        form
        for secret in plain
        for form in (secret, quote(secret, safe=""), quote(secret))
    ]
    return list(dict.fromkeys(filter(None, found)))


def _redis_password(url: str | None) -> list[str]:
    password = urlsplit(url).password if url else None
    return [unquote(password)] if password else []


def describe(settings: Settings) -> str:
    """Return what the settings come to, for a person to read; no secret is in it."""
    models = settings.models
    sections: dict[str, Sequence[tuple[str, ...]]] = {
        "listening": [(_host_port(*each),) for each in settings.listen],
        "tls": [(settings.tls.certificate,)] if settings.tls else [],
        "access": [(_access(settings.tokens),)],
        "providers": _provider_rows(models),
        "models": [_model_row(model) for model in models.models],
        "defaults": [
            ("chat", models.default_models.chat),
            ("fast chat", models.default_models.fast_chat),
            ("code completion", models.default_models.code_completion),
        ],
        "aliases": list(models.aliases.items()),
        "fallback": [("unknown models become the default",)] * models.fallback,
        "timeouts": [(_timeouts(settings.timeouts),)],
        "limits": [(text,) for text in _limits(settings)],
        "shutdown": [(_shutdown(settings.shutdown),)],
        "warnings": [(text,) for text in settings.warnings],
    }
    return "\n".join(
        line for title, rows in sections.items() for line in _section(title, rows)
    )


def _section(title: str, rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = map(str.ljust, row, widths)
        yield f"{title:<11}{'  '.join(cells)}".rstrip()
        title = ""


def _access(tokens: tuple[Token, ...]) -> str:
    if not tokens:
        return "open: no token is asked for"
    names = ", ".join(token.name for token in tokens)
    return f"{len(tokens)} token{'s' * (len(tokens) > 1)}: {names}"


def _timeouts(timeouts: Timeouts) -> str:
    return (
        f"connect {timeouts.connect_s:g} s, chat {timeouts.chat_s:g} s,"
        f" code {timeouts.code_s:g} s"
    )


def _shutdown(shutdown: Shutdown) -> str:
    return f"delay {shutdown.delay_s:g} s, grace {shutdown.grace_s:g} s"


def _limits(settings: Settings) -> Iterator[str]:
    limits = settings.limits
    yield (
        f"body {limits.body_bytes:,} bytes, header {limits.header_bytes:,} bytes,"
        f" event {limits.event_bytes:,} bytes, {limits.connections:,} connections"
    )
    if limits.in_flight:
        yield f"{limits.in_flight} in flight"
    for provider in settings.models.providers.values():
        if provider.in_flight:
            yield f"{provider.in_flight} in flight for {provider.id}"
    each = "each token" if settings.tokens else "each address"
    yield from _client_limits(each, limits.token)
    for token in settings.tokens:
        if token.limits is not None:
            yield from _client_limits(token.name, token.limits)
    if limits.redis:
        yield "rates are counted in Redis"


def _client_limits(who: str, limits: TokenLimits) -> Iterator[str]:
    parts = [f"{limits.in_flight} in flight"] if limits.in_flight else []
    for feature, rates in (("chat", limits.chat), ("code", limits.code)):
        for name, amount in asdict(rates).items():
            if amount is not None:
                parts.append(f"{amount:,} {name.replace('_', ' ')} of {feature}")
    if parts:
        yield f"{who}: {', '.join(parts)}"


def _provider_rows(models: ModelConfiguration) -> list[tuple[str, ...]]:
    return [
        (provider.id, provider.type, endpoint.public_url or "(the type's own endpoint)")
        for provider in models.providers.values()
        for endpoint in provider.endpoints
    ]


def _model_row(model: Model) -> tuple[str, ...]:
    window = model.context_window
    return (
        model.ref,
        model.api_model or model.name,
        ", ".join(model.capabilities),
        f"{window.max_input_tokens} in, {window.max_output_tokens} out",
    )
