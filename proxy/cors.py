"""Web pages of other origins that may read our replies: CORS, for Cody's web client.

A browser lets a page send requests elsewhere and read what comes back only where the
answer names the page's origin. No cookies are involved: a page needs a token, too.

Source: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from proxy.dialects.base import Reply

# What clients look at beyond what every page may read.
_EXPOSED = "Retry-After, X-RateLimit-Limit, X-RateLimit-Remaining, X-Request-Id"
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    # The star stands for all but this one.
    "Access-Control-Allow-Headers": "Authorization, *",
    "Access-Control-Max-Age": "86400",
}


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_foreign(origin: str, allowed: Sequence[str]) -> bool:
    """Whether a request comes from a web page that was not meant to ask.

    A browser lets any page send a POST to a local port, though it may not read the
    answer; where no token is asked for, that page would use the model. Pages served by
    this machine, and applications with schemes of their own, may ask.
    """
    if origin in allowed:
        return False
    url = urlsplit(origin)
    if url.scheme in ("http", "https"):
        return url.hostname not in _LOOPBACK
    return origin == "null"  # a page that hides where it is from


class Origins:
    """Args: origins: as browsers write them, "https://host:port"."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._headers = {
            origin: {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Expose-Headers": _EXPOSED,
                "Vary": "Origin",
            }
            for origin in origins
        }
        self._lines = {
            origin: "".join(f"{n}: {v}\r\n" for n, v in headers.items()).encode("ascii")
            for origin, headers in self._headers.items()
        }

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that let a page read the reply to its request."""
        return self._headers.get(headers.get("Origin", ""), {})

    def lines(self, headers: Mapping[str, str]) -> bytes:
        """Return ``headers`` as they are written."""
        return self._lines.get(headers.get("Origin", ""), b"")

    def preflight(self, method: str, headers: Mapping[str, str]) -> Reply | None:
        """Answer a browser that asks whether it may ask; None if this is no such."""
        if method != "OPTIONS" or "Access-Control-Request-Method" not in headers:
            return None
        return Reply(204, "text/plain", b"", dict(_PREFLIGHT))
