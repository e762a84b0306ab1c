"""Requests that are handed on whole: paths that the proxy does not know itself.

Method, path, query, headers and bodies pass, streamed both ways without being held; no
parser looks at them. The host is the configured one, whatever the client says.
"""

from collections.abc import AsyncIterator, Mapping

from aiohttp import web

from proxy.errors import UnknownPath, UpstreamTruncated
from proxy.hop import end_to_end
from proxy.upstream import Upstream

# The client's credentials are for the proxy; lengths and encodings are kept, since the
# body is; 100-continue is between the client and us.
_NOT_UP = (
    "host",
    "authorization",
    "x-api-key",
    "api-key",
    "cookie",
    "expect",
    "accept-encoding",
)
_NOT_DOWN = ("set-cookie", "server", "date")


async def forward(
    request: web.BaseRequest,
    upstream: Upstream,
    url: str,
    credentials: Mapping[str, str],
    endpoint: str,
    own_headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    is_optional: bool = False,
) -> web.StreamResponse:
    """Send the request to ``url`` and its reply back.

    Args:   body: instead of the request's own, when that was read already.
            endpoint: what error messages call the upstream.
            is_optional: not every server has this path; say so clearly.
    Raises: UnknownPath: this one has not.
            UpstreamUnreachable: before anything was said to the client.
            ConnectionError: the client is gone.
    """
    without = (*_NOT_UP, "content-length") if body is not None else _NOT_UP
    headers = dict(end_to_end(request.headers.items(), without=without))
    headers |= {"Accept-Encoding": "identity", **credentials}
    has_body = request.can_read_body if body is None else True
    content = body if body is not None else _chunks(request) if has_body else None
    async with upstream.open(
        url, headers, content, endpoint, method=request.method, unpack=False
    ) as reply:
        if is_optional and reply.status in (404, 405, 501):
            raise UnknownPath(
                f"upstream {endpoint} does not serve {request.path}: it answered "
                f"{reply.status}"
            )
        down = end_to_end(reply.pairs, without=_NOT_DOWN)
        response = web.StreamResponse(status=reply.status, headers=down)
        response.headers.update(own_headers)
        response.headers.popall("Content-Length", None)
        length = reply.header("content-length")
        if length.isdigit():
            response.content_length = int(length)
        elif request.version == (1, 1) and _may_have_body(request, reply.status):
            response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            while data := await reply.read():
                await response.write(data)
        except UpstreamTruncated:
            # The client must see that it is not whole; nothing else can be said.
            if request.transport is not None:
                request.transport.abort()
            raise
        await response.write_eof()
    return response


def _may_have_body(request: web.BaseRequest, status: int) -> bool:
    return request.method != "HEAD" and status not in (204, 304)


async def _chunks(request: web.BaseRequest) -> AsyncIterator[bytes]:
    async for data in request.content.iter_any():
        yield data
