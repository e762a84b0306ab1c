"""The one function that takes secrets out of text, for logs and error messages."""

import re
import traceback
from collections.abc import Iterable, Mapping

_MARK = "[redacted]"
# What carries a credential in headers, URLs and JSON, whoever's it is.
_PATTERNS = (
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{4,}"),
    re.compile(r"(?i)(\b(?:api[_-]?key|key|access[_-]?token|token|sig)=)[^&\s\"']+"),
    re.compile(r"(?i)(\"(?:api[_-]?key|access[_-]?token|secret)\"\s*:\s*\")[^\"]+"),
    re.compile(r"()\b(?:sk|sgp|sgd|slk|hf|cp|fw)[-_][\w-]{12,}"),
    re.compile(r"()\bAIza[\w-]{20,}"),
)
_SECRET_HEADERS = frozenset(
    (
        "authorization",
        "proxy-authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "cookie",
        "set-cookie",
    )
)
_SHORTEST_SECRET = 6
BUG = "exchange %s: this is a bug\n%s"  # the second is a trace


class Redactor:
    """Args: secrets: the configured credentials; shorter ones than six characters
    would blank out ordinary words and are left to the patterns.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted(
            {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET},
            key=len,
            reverse=True,
        )
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(_MARK, text)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\1{_MARK}", text)
        return text

    def trace(self) -> str:
        """Return the traceback of the exception at hand, for the log: it may have
        stumbled over a credential.
        """
        return self(traceback.format_exc())

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {
            name: _MARK if name.lower() in _SECRET_HEADERS else self(value)
            for name, value in headers.items()
        }
