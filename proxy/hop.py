"""The one function that decides which headers pass through the proxy, both ways."""

from collections.abc import Iterable

# RFC 9110, section 7.6.1, and what it calls for in proxies.
_HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)


def end_to_end(
    headers: Iterable[tuple[str, str]], *, without: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """Return the headers that concern the other end.

    Left out are hop-by-hop headers, those that ``Connection`` names, and ``without``
    (lower case). An underscore counts as a hyphen: servers
    that hand headers to programs as variables (CGI, WSGI) take one for the other, so a
    ``Transfer_Encoding`` would come back to life there.
    """
    pairs = list(headers)
    named = {
        token.strip().lower()
        for name, value in pairs
        if name.lower() == "connection"
        for token in value.split(",")
    }
    gone = _HOP_BY_HOP | named | set(without)
    return [
        (name, value)
        for name, value in pairs
        if name.lower().replace("_", "-") not in gone
    ]
