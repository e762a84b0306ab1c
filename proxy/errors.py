"""Every exception this program raises on purpose, and whose fault each one is.

ProxyError
    ClientFault            the request was wrong; sending it again will not help
        InvalidRequest     the body, a field or a parameter is not what it must be
        InvalidPrompt      a well-formed request whose messages no model accepts
        UnknownModel       no configured model has that name
        Unauthorized       no token, or an unknown one
        ForeignOrigin      a web page asks that nobody has allowed to
        UnknownPath        nothing is served at that path
        MethodNotAllowed   the path is served, but not for that method
        UnsupportedVersion an api-version that is not a number
        RequestTimeout     the body did not come in time
        PayloadTooLarge    the body exceeds its limit
    LimitReached           a limit of the proxy's own configuration
        RateLimited        the client asked too often, or for too many tokens
        QueueFull          no place in flight is free, nor one in the queue for it
        QueueTimeout       no place became free while the request waited in the queue
    UpstreamFault          the model server, or the way to it, failed
        UpstreamStatus     it answered with a status other than 2xx
        UpstreamReported   it said so itself, inside a reply of status 200
        UpstreamTruncated  its reply stopped before its end
        UpstreamGarbled    its reply is not what its content type or dialect promises
        EventTooLarge      one event of its stream exceeds the limit
        UpstreamUnreachable  no connection, or none that lasted until a reply
            ConnectTimeout   there was none in time
        DeadlineExceeded   it did not answer in the time the request had
            HeadersTimeout     its reply did not begin in time
            FirstTokenTimeout  its answer did not begin in time
            TokenGapTimeout    its answer did not go on in time
    ShuttingDown           the proxy ends before the reply does
    ConfigError            the configuration cannot be used; lists every problem

Anything else that escapes is a bug: the client gets a 500, the log a traceback.
"""

import math
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from typing import ClassVar


class ProxyError(Exception):
    """A failure that a client can be told about.

    ``message`` is for the client. ``kind`` is a short stable name, used as a metric
    label and in the log. ``status`` is the HTTP status that describes the failure
    best; a dialect may have to say it in another way. ``headers`` are safe to pass
    on to the client.
    """

    status: int = 500
    kind: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.headers: Mapping[str, str] = headers or {}
        if status is not None:
            self.status = status

    @property
    def log_text(self) -> str:
        """What may stand in the log: never text that a client or a model wrote."""
        return self.message


class ClientFault(ProxyError):
    status = 400
    kind = "bad_request"

    @property
    def log_text(self) -> str:
        # The message may quote the request.
        return self.kind


class InvalidRequest(ClientFault):
    pass


class InvalidPrompt(ClientFault):
    kind = "invalid_prompt"


class UnknownModel(ClientFault):
    kind = "unknown_model"


class Unauthorized(ClientFault):
    status = 401
    kind = "unauthorized"


class ForeignOrigin(ClientFault):
    status = 403
    kind = "foreign_origin"


class UnknownPath(ClientFault):
    status = 404
    kind = "unknown_path"


class MethodNotAllowed(ClientFault):
    status = 405
    kind = "method_not_allowed"


class RequestTimeout(ClientFault):
    status = 408
    kind = "request_timeout"


class UnsupportedVersion(ClientFault):
    status = 406
    kind = "unsupported_version"


class PayloadTooLarge(ClientFault):
    status = 413
    kind = "payload_too_large"


class LimitReached(ProxyError):
    """A limit of the configuration.

    ``limit`` names the limit as the configuration does, without whose it is; it is a
    metric label. ``amount`` is how much it allows. ``feature`` is the one that was
    asked for, as Sourcegraph calls it; ``retry_after_s`` says when to come back.
    """

    status = 429
    kind = "rate_limited"

    def __init__(
        self,
        message: str,
        *,
        limit: str,
        amount: int,
        feature: str,
        retry_after_s: int,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        headers = {"retry-after": str(retry_after_s), **(headers or {})}
        super().__init__(message, status=status, headers=headers)
        self.limit = limit
        self.amount = amount
        self.feature = feature
        self.retry_after_s = retry_after_s


class RateLimited(LimitReached):
    """``unit``: requests or tokens; ``retry_at_s``: when the window ends, Unix time."""

    def __init__(
        self,
        *,
        limit: str,
        amount: int,
        used: int,
        unit: str,
        per: str,
        feature: str,
        retry_at_s: float,
        now_s: float,
    ) -> None:
        self.unit = unit
        self.retry_at_s = retry_at_s
        self.retry_after = formatdate(retry_at_s, usegmt=True)
        super().__init__(
            # As Cody's clients know it.
            f"you exceeded the rate limit for {feature}, only {amount} {unit} are "
            f"allowed per {per} at the moment to ensure the service stays functional. "
            f"Current usage: {used}. Retry after {self.retry_after}",
            limit=limit,
            amount=amount,
            feature=feature,
            retry_after_s=max(1, math.ceil(retry_at_s - now_s)),
            headers={"x-ratelimit-limit": str(amount), "x-ratelimit-remaining": "0"},
        )


class QueueFull(LimitReached):
    kind = "queue_full"


class QueueTimeout(LimitReached):
    kind = "queue_timeout"


class UpstreamFault(ProxyError):
    """``retryable``: as long as nothing was said to the client, another endpoint may be
    asked the same. ``is_sick``: it tells something about how the endpoint does, not
    only about this request.
    """

    status = 502
    kind = "upstream_error"
    retryable = False
    is_sick = True


# Overloaded, or on the way somewhere: another endpoint may do better. Of all other
# statuses 500 may be the request's fault, and 4xx is.
_RETRYABLE = frozenset((408, 425, 429, 502, 503, 504, 529))


class UpstreamStatus(UpstreamFault):
    """The upstream answered with a status other than 2xx.

    ``source`` names the upstream as Cody clients know it, ``body`` is the start of
    what it said. ``is_clients_credential``: it was asked with the client's own
    credential, so a 401 is for the client.
    """

    kind = "upstream_status"
    is_clients_credential = False

    def __init__(
        self,
        source: str,
        status: int,
        body: str,
        *,
        detail: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            f"{source}: unexpected status code {status}: {body}",
            status=status,
            headers=headers,
        )
        self.source = source
        self.body = body
        self.detail = detail if detail is not None else body
        self.retryable = status in _RETRYABLE
        self.is_sick = status >= 500

    @property
    def log_text(self) -> str:
        return f"upstream status {self.status}"


class UpstreamReported(UpstreamFault):
    """The upstream reported an error inside a reply that began as a success.

    ``status`` is what it would have been as an HTTP status: 429 for an overload,
    503 for a server out of service, 400 for a request it refused, else 502.
    """

    kind = "upstream_reported"

    def __init__(
        self, message: str, *, type: str = "", status: int = 502, detail: str = ""
    ) -> None:
        super().__init__(message, status=status)
        self.type = type
        self.detail = detail or message
        self.retryable = status in _RETRYABLE
        self.is_sick = status >= 500

    @property
    def log_text(self) -> str:
        return f"upstream reported {self.type or 'an error'} ({self.status})"


class UpstreamTruncated(UpstreamFault):
    kind = "upstream_truncated"
    retryable = True


class UpstreamGarbled(UpstreamFault):
    kind = "upstream_garbled"
    retryable = True

    @property
    def log_text(self) -> str:
        # The message may quote the reply.
        return self.kind


class EventTooLarge(UpstreamFault):
    kind = "event_too_large"


class UpstreamUnreachable(UpstreamFault):
    kind = "upstream_unreachable"
    retryable = True


class ConnectTimeout(UpstreamUnreachable):
    status = 504
    kind = "connect_timeout"


class DeadlineExceeded(UpstreamFault):
    status = 504
    kind = "deadline_exceeded"
    is_sick = False  # it may be the client who has little time, or takes it


class HeadersTimeout(DeadlineExceeded):
    kind = "headers_timeout"
    retryable = True
    is_sick = True


class FirstTokenTimeout(DeadlineExceeded):
    kind = "first_token_timeout"
    retryable = True
    is_sick = True


class TokenGapTimeout(DeadlineExceeded):
    kind = "token_gap_timeout"
    is_sick = True


class ShuttingDown(ProxyError):
    """The proxy is about to end, and the request had the time that it allows."""

    status = 503
    kind = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the proxy is shutting down")


class ConfigError(ProxyError):
    """The configuration cannot be used.

    ``problems`` lists all that is wrong, one line each, with the path to the key.
    """

    kind = "config"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def drop_traceback(error: BaseException) -> None:
    """Forget where an error came from, when everybody knows of it.

    Its traceback leads to all that was in use there, and some of that back to the error:
    it would stay until the garbage collector comes, which is seldom.
    """
    each: BaseException | None = error
    while each is not None:
        following = each.__cause__ or each.__context__
        each.__traceback__ = each.__cause__ = each.__context__ = None
        each = following
