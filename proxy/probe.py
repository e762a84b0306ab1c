"""What kind of server answers at a URL that the user gave without a configuration?"""

import asyncio

import msgspec

from proxy.errors import UpstreamFault
from proxy.upstream import Upstream

_TIMEOUT_S = 5.0


class Found(msgspec.Struct):
    """``url`` ends in ``/v1``; ``type`` and ``model`` are for the configuration."""

    url: str
    type: str
    model: str
    warning: str = ""


class _Info(msgspec.Struct):
    model_id: str


class _ModelList(msgspec.Struct):
    data: list[dict[str, object]]


async def probe(url: str) -> Found:
    """Ask the server what it is. Never fails: a sidecar may start before its server."""
    base = url.rstrip("/").removesuffix("/v1")
    upstream = Upstream(_TIMEOUT_S)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _ask(upstream, base)
    except TimeoutError:
        return _unknown(base)
    finally:
        await upstream.close()


async def _ask(upstream: Upstream, base: str) -> Found:
    try:
        body = await _get(upstream, f"{base}/info")
        info = msgspec.json.decode(body, type=_Info)
        return Found(f"{base}/v1", "huggingface-tgi", info.model_id)
    except msgspec.DecodeError:
        pass
    try:
        body = await _get(upstream, f"{base}/v1/models")
        names = msgspec.json.decode(body, type=_ModelList).data
        return Found(f"{base}/v1", "openaicompatible", str(names[0]["id"]))
    except (msgspec.DecodeError, LookupError):
        return _unknown(base)


def _unknown(base: str) -> Found:
    return Found(
        f"{base}/v1",
        "huggingface-tgi",
        "tgi",
        f"{base} does not say what it is (no /info, no /v1/models); taken for TGI",
    )


async def _get(upstream: Upstream, url: str) -> bytes:
    try:
        return await upstream.get(url, {}, url)
    except (UpstreamFault, KeyError, ValueError):  # or the URL is none
        return b""
