"""Requests that are handed on whole: paths that the proxy does not know itself.

Method, path, query, headers and bodies pass, streamed both ways without being held; no
parser looks at them. The host is the configured one, whatever the client says.
"""

import asyncio
from collections.abc import Iterable, Mapping

from aiohttp import web

from proxy.body import Body, too_slow
from proxy.dialects.base import EVENT_STREAM
from proxy.errors import (
    DeadlineExceeded,
    ShuttingDown,
    UnknownPath,
    UpstreamFault,
    UpstreamGarbled,
    UpstreamTruncated,
)
from proxy.hop import end_to_end
from proxy.interrupt import Work
from proxy.outcome import Outcome
from proxy.relay import LAST_WRITE_S
from proxy.upstream import Upstream, UpstreamReply

# The client's credentials are for the proxy; lengths and encodings are kept, since the
# body is; 100-continue is between the client and us.
_NOT_UP = (
    "host",
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "cookie",
    "expect",
    "accept-encoding",
)
# What the stream of a response ends with, one way or another.
_ENDS = (
    b"response.completed",
    b"response.failed",
    b"response.incomplete",
    b"event: error",
    b"[DONE]",
)
_LONGEST_END = max(map(len, _ENDS))
_BETWEEN_EVENTS = (b"\n\n", b"\r\n\r\n")
# An error as the Responses API says it.
_STOPPED = (
    b'event: error\ndata: {"type":"error","code":"server_error","message":"'
    b'the proxy is shutting down","param":null,"sequence_number":0}\n\n'
)
# What aiohttp undoes.
_UNPACKED = frozenset(("gzip", "deflate", "br", "zstd"))
# What says which software answers, and what browsers would take for the proxy's own will:
# who may read, and how this host is to be connected to.
_NOT_DOWN = (
    *("set-cookie", "server", "date", "via", "x-powered-by"),
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-private-network",
    "access-control-expose-headers",
    "access-control-max-age",
    *("alt-svc", "clear-site-data", "strict-transport-security"),
)


async def forward(
    request: web.BaseRequest,
    upstream: Upstream,
    url: str,
    credentials: Mapping[str, str],
    endpoint: str,
    own_headers: Mapping[str, str],
    outcome: Outcome,
    work: Work,
    *,
    body: bytes | None = None,
    without: Iterable[str] = (),
    limit_bytes: int,
    deadline_s: float,
    is_optional: bool = False,
    clients_credential: bool = False,
) -> web.StreamResponse:
    """Send the request to ``url`` and its reply back.

    Args:   body: instead of the request's own, when that was read already.
            endpoint: what error messages call the upstream.
            work: what shutting down interrupts; the caller has entered it.
            without: further headers of the client's that stay here (lower case).
            limit_bytes: how long the request's own body may be.
            deadline_s: when the head of the reply has to be there.
            is_optional: not every server has this path; say so clearly.
            clients_credential: a 401 is for the client.
    Raises: UnknownPath: this one has not.
            ClientFault: something is wrong with the request's body.
            UpstreamFault: before anything was said to the client.
            ConnectionError: the client is gone, or the reply broke off.
    """
    own = Body(request, limit_bytes)
    content = own.pieces() if body is None and request.can_read_body else body
    headers = _up(request, credentials, without, is_read=body is not None)
    try:
        async with asyncio.timeout_at(deadline_s) as clock:
            async with upstream.open(
                url, headers, content, endpoint, method=request.method, unpack=False
            ) as reply:
                clock.reschedule(None)
                outcome.upstream_status = reply.status
                if reply.status >= 400:
                    outcome.kind = "upstream_status"
                _check(reply, request.path, endpoint, is_optional, clients_credential)
                return await _pass_down(request, reply, own_headers, outcome, work)
    except UpstreamFault:
        if own.fault is not None:
            raise own.fault from None
        raise
    except TimeoutError:
        if own.is_awaited:
            raise too_slow() from None
        raise DeadlineExceeded(
            f"context deadline exceeded: upstream {endpoint} did not answer in time"
        ) from None


def _up(
    request: web.BaseRequest,
    credentials: Mapping[str, str],
    without: Iterable[str],
    *,
    is_read: bool,
) -> dict[str, str]:
    """The headers for the upstream; of several of one name, one with all values."""
    gone = {*_NOT_UP, *without, *(name.lower() for name in credentials)}
    if is_read or _is_unpacked(request):
        # The body is not the one that these were about.
        gone |= {"content-length", "content-encoding"}
    headers: dict[str, str] = {}
    for name, value in end_to_end(request.headers.items(), without=gone):
        name = name.title()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers | {"Accept-Encoding": "identity", **credentials}


def _is_unpacked(request: web.BaseRequest) -> bool:
    """Whether aiohttp's server has undone the body's encoding."""
    return request.headers.get("Content-Encoding", "").lower() in _UNPACKED


def _check(
    reply: UpstreamReply,
    path: str,
    endpoint: str,
    is_optional: bool,
    clients_credential: bool,
) -> None:
    if is_optional and reply.status in (404, 405, 501):
        raise UnknownPath(
            f"upstream {endpoint} does not serve {path}: it answered {reply.status}"
        )
    if reply.status in (401, 403) and not clients_credential:
        # Our credential was refused, not the client's.
        raise UpstreamGarbled(f"upstream {endpoint} refused the proxy's credential")


async def _pass_down(
    request: web.BaseRequest,
    reply: UpstreamReply,
    own_headers: Mapping[str, str],
    outcome: Outcome,
    work: Work,
) -> web.StreamResponse:
    down = end_to_end(reply.pairs, without=_NOT_DOWN)
    response = web.StreamResponse(status=reply.status, headers=down)
    response.headers.update(own_headers)
    response.headers.popall("Content-Length", None)
    length = reply.header("content-length")
    if length.isdigit():
        response.content_length = int(length)
    elif request.version != (1, 1):
        response.force_close()
    elif _may_have_body(request, reply.status):
        response.enable_chunked_encoding()
    await response.prepare(request)
    ends = _ENDS if reply.header("content-type").startswith(EVENT_STREAM) else ()
    is_watched = bool(ends) and request.path.endswith("/responses")
    is_ended = not is_watched
    seen = b"\n\n"
    try:
        while data := await reply.read():
            if is_watched:
                seen = seen[-_LONGEST_END:] + data
                is_ended = is_ended or any(end in seen for end in ends)
            await response.write(data)
        if not is_ended:
            raise UpstreamTruncated("upstream closed the stream before its end")
    except UpstreamFault as fault:
        # The client must see that it is not whole; nothing else can be said.
        outcome.kind, outcome.error = fault.kind, fault.log_text
        raise _aborted(request) from fault
    except asyncio.CancelledError:
        if not work.take_interrupt():
            raise
        stopped = ShuttingDown()
        outcome.kind, outcome.error = stopped.kind, stopped.log_text
        is_between = seen.endswith(_BETWEEN_EVENTS) and not response.content_length
        if not is_watched or not is_between:
            raise _aborted(request) from None
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                await response.write_eof(b"" if is_ended else _STOPPED)
        except TimeoutError:  # the client does not read
            raise _aborted(request) from None
        return response
    await response.write_eof()
    return response


def _aborted(request: web.BaseRequest) -> ConnectionResetError:
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError("aborted")


def _may_have_body(request: web.BaseRequest, status: int) -> bool:
    return request.method != "HEAD" and status not in (204, 304)
