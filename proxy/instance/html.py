"""The frame of the pages that people see: plain, and with nothing loaded from elsewhere.

What goes into a page goes through ``escape`` first.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape as _escape

from proxy.dialects.base import Reply

_STYLE = """
body{font:1rem/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}
code,input{font-family:ui-monospace,monospace;font-size:.9em}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8884}
.note{border-left:.25rem solid #888;padding-left:.8rem}
input{width:100%;padding:.4rem;box-sizing:border-box;margin:.4rem 0}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}a{color:#8bf}}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    # No scripts, no images, no frames, nobody else's anything.
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def escape(text: str) -> str:
    """Return ``text`` for an element or a quoted attribute."""
    return _escape(text, quote=True)


def page(
    title: str,
    body: Iterable[str],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a page of pieces of HTML; ``title`` is text."""
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(body)}</body></html>\n"
    )
    return Reply(
        status,
        "text/html; charset=utf-8",
        text.encode(errors="replace"),
        {**_HEADERS, **(headers or {})},
    )
