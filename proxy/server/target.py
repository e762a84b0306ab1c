"""What the head of a request comes to."""

from collections.abc import Mapping
from typing import cast

import msgspec

from proxy.dialects.adjust import ADJUSTED
from proxy.dialects.base import Head, Incoming, Native as NativeDialect, Reply


class Target(msgspec.Struct, frozen=True):
    """What the first line of a request comes to. ``passing`` is ``incoming`` if it is of a
    dialect whose bodies can pass; ``reply`` needs no look at the rest.
    """

    path: str
    incoming: Incoming
    passing: NativeDialect | None
    is_exchange: bool
    query: Mapping[str, str]
    api_version: str
    client: str
    reply: Reply | None


class Known(msgspec.Struct, frozen=True):
    """What a head comes to that was checked. ``more`` are header lines of the reply,
    ``limit_s`` how long the client says that it may take.
    """

    target: Target
    head: Head
    user: str
    more: bytes
    limit_s: float | None


def passing(incoming: Incoming) -> NativeDialect | None:
    """Return it if bodies of its dialect can pass."""
    return cast(NativeDialect, incoming) if incoming.dialect in ADJUSTED else None


def limit_of(head: Head) -> float | None:
    """How long the request may take, if its client says so."""
    text = head.headers.get("X-Timeout-Ms", "").strip()
    if text.isascii() and text.isdigit() and int(text[:9]) > 0:
        return int(text[:9]) / 1000
    return None
