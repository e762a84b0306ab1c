"""The way out through an HTTP proxy that the environment names.

``HTTPS_PROXY`` and ``HTTP_PROXY`` are for the schemes of upstreams, ``ALL_PROXY`` for
both, ``NO_PROXY`` lists what is asked directly; small letters go first, as for curl.
"""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from urllib.parse import unquote, urlsplit

import msgspec


class Egress(msgspec.Struct, frozen=True):
    """The URLs of the proxies for http and https upstreams; "" where there is none."""

    http: str = ""
    https: str = ""
    direct: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "Egress(…)"  # the URLs may hold passwords

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []

    def proxy_for(self, scheme: str, host: str, port: int) -> str:
        """Return the URL of the proxy to go through, "" to go directly."""
        url = self.https if scheme == "https" else self.http
        if not url or any(_covers(rule, host, port) for rule in self.direct):
            return ""
        return url

    @property
    def secrets(self) -> list[str]:
        passwords = [urlsplit(url).password or "" for url in (self.http, self.https)]
        return [form for text in passwords for form in (text, unquote(text)) if form]


def from_environment(environ: Mapping[str, str]) -> tuple[Egress, list[str]]:
    """Return what the environment says, and what is wrong with it."""
    problems: list[str] = []
    urls = {}
    for scheme in ("http", "https"):
        names = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
        name = next((name for name in names if environ.get(name)), "")
        urls[scheme] = url = _url(environ.get(name, ""))
        if url and not _is_usable(url):
            # Not shown: it may hold a password.
            text = f'{name} in the environment: expected "http://host:port"'
            problems += [text] if text not in problems else []
    rules = environ.get("no_proxy") or environ.get("NO_PROXY", "")
    direct = tuple(filter(None, rules.replace(",", " ").lower().split()))
    return Egress(urls["http"], urls["https"], direct), problems


def _url(text: str) -> str:
    return text if "://" in text or not text else f"http://{text}"


def _is_usable(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _covers(rule: str, host: str, port: int) -> bool:
    """Whether a rule of NO_PROXY (``*``, ``example.com``, ``.example.com``,
    ``host:port``, ``10.0.0.0/8``) holds for a host.
    """
    if rule == "*":
        return True
    host = host.lower().rstrip(".")
    try:
        return ip_address(host) in ip_network(rule.strip("[]"), strict=False)
    except ValueError:
        pass  # one of them is a name
    name, colon, number = rule.rpartition(":")
    if colon and number.isdigit():
        if int(number) != port:
            return False
        rule = name.strip("[]")
    rule = rule.removeprefix("*").strip(".")
    return bool(rule) and (host == rule or host.endswith(f".{rule}"))
