"""How an exchange ended: what the log, the metrics and the pool are told of it."""

import msgspec


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
