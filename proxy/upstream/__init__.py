"""Connections to upstreams: ours, since most of a request's cost is here.

``connection`` is one connection: bytes in and out over a C parser, one reply at a time.
``client`` opens them, keeps them between calls, and maps what fails to our errors.
"""

from proxy.upstream.client import (
    Prepared as Prepared,
    Upstream as Upstream,
    UpstreamCall as UpstreamCall,
    UpstreamReply as UpstreamReply,
    prepare as prepare,
)
