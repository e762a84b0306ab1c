"""A whole Sourcegraph site configuration -> the proxy's configuration file.

What concerns completions is taken over, everything else stays where it is. No secret
is repeated: each becomes the name of an environment variable that has to hold it.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec
import yaml

from proxy.config import ContextFilters, parse
from proxy.errors import ConfigError
from proxy.modelconfig.check import read as read_data
from proxy.modelconfig.completions_block import CompletionsBlock, converted
from proxy.modelconfig.findings import Findings
from proxy.modelconfig.schema import Block

_HEADER = """\
# Made of a Sourcegraph site configuration by completions-proxy check --from-site-config.
# Check it with: completions-proxy check FILE
"""
_TOKENS = """\
# Who may use the proxy; without tokens only this machine may.
# auth:
#   tokens:
#     - {name: ann, token: "${ANN_TOKEN}"}
"""
_SECRET_KEYS = {"accessToken", "credentialsJSON"}
_DAILY_LIMITS = {
    "perUserDailyLimit": "chat",
    "perUserCodeCompletionsDailyLimit": "code",
}
_FILTERS = "cody.contextFilters"


class Converted(msgspec.Struct):
    """``text`` is the file; ``variables`` have to be set wherever it is read."""

    text: str
    variables: list[str]
    warnings: list[str]


def convert(text: str) -> Converted:
    """Return what the site configuration ``text`` (JSON with comments) comes to.

    Raises: ConfigError: it is no such text, or has nothing of the kind in it.
    """
    site = parse(text.removeprefix("\ufeff"))
    if not isinstance(site, dict):
        raise ConfigError(["the file: expected a site configuration, a JSON object"])
    findings = Findings()
    block = _models(site, findings)
    secrets = _Secrets()
    file: dict[str, object] = {"modelConfiguration": secrets.replaced(block, [])}
    filters = site.get(_FILTERS)
    if filters is not None:
        read_data(filters, ContextFilters, _FILTERS, findings.problems)
        file["instance"] = {"contextFilters": secrets.replaced(filters, [])}
    if limits := _daily_limits(site):
        file["limits"] = {"token": limits}
        taken = [f"completions.{key}" for key in _DAILY_LIMITS]
        findings.warnings = [
            text for text in findings.warnings if not text.startswith(tuple(taken))
        ]
    if findings.problems:
        raise ConfigError(findings.problems)
    needs = "".join(f"#   {name}\n" for name in secrets.names)
    return Converted(
        _HEADER
        + (f"# Set in the environment:\n{needs}" if needs else "")
        + "\nlisten: 127.0.0.1:8080\n"
        + _TOKENS
        + yaml.safe_dump(file, sort_keys=False, allow_unicode=True, width=88),
        list(secrets.names),
        findings.warnings,
    )


def _daily_limits(site: Mapping[str, object]) -> dict[str, object]:
    """Return each user's limits, which stand in the older block whatever the models."""
    block = site.get("completions")
    given = block if isinstance(block, dict) else {}
    return {
        feature: {"requestsPerDay": amount}
        for key, feature in _DAILY_LIMITS.items()
        if isinstance(amount := given.get(key), int) and amount > 0
    }


def _models(site: Mapping[str, object], findings: Findings) -> object:
    """Return the ``modelConfiguration``: as it stands there, or of the older form."""
    if (block := site.get("modelConfiguration")) is not None:
        # Under a key that nobody knows a secret would not be recognised as one.
        read_data(block, Block, "modelConfiguration", findings.problems)
        return block
    if site.get("completions") is None:
        text = 'neither "modelConfiguration" nor "completions" is in it'
        raise ConfigError([f"the file: {text}"])
    old = read_data(
        site["completions"], CompletionsBlock, "completions", findings.problems
    )
    if old is None:
        raise ConfigError(findings.problems)
    return _without_nothing(
        msgspec.to_builtins(converted(old, "completions", findings))
    )


def _without_nothing(data: object) -> object:
    """Return data without the keys that have no value, which say nothing."""
    if isinstance(data, dict):
        return {
            key: _without_nothing(value)
            for key, value in data.items()
            if value not in (None, "", False)
        }
    if isinstance(data, list):
        return [_without_nothing(value) for value in data]
    return data


class _Secrets:
    """Replaces secrets by the names of variables. ``names`` are those it gave."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def replaced(self, data: object, path: list[str]) -> object:
        """Return ``data`` without secrets; ``path`` is what its variables are called
        after: ids of providers, and keys.
        """
        if isinstance(data, dict):
            owner = data.get("id")
            base = [*path, owner] if isinstance(owner, str) else path
            return {
                key: self._value(str(key), value, base) for key, value in data.items()
            }
        if isinstance(data, list):
            return [self.replaced(each, path) for each in data]
        if isinstance(data, str):
            return data.replace("${", "$${")
        return data

    def _value(self, key: str, value: object, path: list[str]) -> object:
        if key == "headers" and isinstance(value, dict):
            return {name: self._variable([*path, str(name)]) for name in value}
        if isinstance(value, str) and value:
            if key in _SECRET_KEYS:
                return self._variable([*path, key])
            if key in ("url", "endpoint") and _may_tell(value):
                return self._variable([*path, key])
        return self.replaced(value, path)

    def _variable(self, path: list[str]) -> str:
        words = re.sub(r"([a-z])([A-Z])", r"\1_\2", "_".join(path))
        name = re.sub(r"[^A-Z0-9]+", "_", words.upper()).strip("_")
        name = f"_{name}" if name[:1].isdigit() else name
        unique, number = name, 1
        while unique in self.names:
            number += 1
            unique = f"{name}_{number}"
        self.names[unique] = None
        return f"${{{unique}}}"


def _may_tell(url: str) -> bool:
    """Whether a URL has parts in which secrets stand."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return True
    return bool(parts.username or parts.password or parts.query)
