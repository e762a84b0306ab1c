"""How an exchange ended: what the log, the metrics and the pool are told of it."""

import os
import random

import msgspec

# For how many exchanges ids are made at a time.
_BATCH = 256
_ids: list[str] = []
os.register_at_fork(after_in_child=_ids.clear)


def new_id() -> str:
    """Return 16 hexadecimal digits, at random."""
    if not _ids:
        _ids.extend(random.randbytes(8 * _BATCH).hex(" ", 8).split())
    return _ids.pop()


def rounded(seconds: float) -> float:
    """Return a duration in steps of 0.1 ms. (``round`` takes four times as long.)"""
    return int(seconds * 1e4 + 0.5) / 1e4


class Outcome(
    msgspec.Struct,
    kw_only=True,
    omit_defaults=True,
    tag_field="event",
    tag="exchange",
    gc=False,  # it can be in no cycle, and there is one per request
):
    """One per request, filled in on its way.

    ``kind`` is ``ok`` (said at the end, if nothing else was), ``client_gone``, or the
    ``kind`` of the error that ended it; ``status`` is what the client got.
    ``tried`` names the endpoints and models that were asked in vain before, and why.
    ``first_token_s`` and ``duration_s`` count from the arrival of the request, and
    ``waited_s`` of them was spent in the queue. ``limit`` names the limit that was
    reached. No field ever holds text of a prompt or an answer.
    """

    time: str = ""
    id: str
    route: str
    kind: str = ""
    status: int = 0
    api_version: str = ""
    client: str = ""
    user: str = ""
    feature: str = ""
    stream: bool | None = None
    model: str = ""
    provider: str = ""
    endpoint: str = ""
    upstream_status: int = 0
    waited_s: float | None = None
    first_token_s: float | None = None
    duration_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tried: tuple[str, ...] = ()
    adjusted: tuple[str, ...] = ()
    limit: str = ""
    error: str = ""
