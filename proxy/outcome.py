"""How an exchange ended: what the log, the metrics and the pool are told of it."""

import msgspec


class Outcome(msgspec.Struct, omit_defaults=True):
    """One per request, filled in on its way.

    ``kind`` is ``ok``, ``client_gone``, or the ``kind`` of the error that ended it;
    ``status`` is what the client got. ``first_token_s`` and ``duration_s`` count from
    the arrival of the request. No field ever holds text of a prompt or an answer.
    """

    id: str
    route: str
    kind: str = "ok"
    status: int = 0
    api_version: str = ""
    client: str = ""
    user: str = ""
    feature: str = ""
    stream: bool = False
    model: str = ""
    provider: str = ""
    endpoint: str = ""
    upstream_status: int = 0
    first_token_s: float | None = None
    duration_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    adjusted: list[str] = []
    error: str = ""
