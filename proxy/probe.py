"""What kind of server answers at a URL that the user gave without a configuration?"""

import aiohttp
import msgspec

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
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        if (body := await _get(session, f"{base}/info")) is not None:
            try:
                info = msgspec.json.decode(body, type=_Info)
                return Found(f"{base}/v1", "huggingface-tgi", info.model_id)
            except msgspec.DecodeError:
                pass
        if (body := await _get(session, f"{base}/v1/models")) is not None:
            try:
                names = msgspec.json.decode(body, type=_ModelList).data
                return Found(f"{base}/v1", "openaicompatible", str(names[0]["id"]))
            except (msgspec.DecodeError, LookupError):
                pass
    return Found(
        f"{base}/v1",
        "huggingface-tgi",
        "tgi",
        f"{base} does not say what it is (no /info, no /v1/models); taken for TGI",
    )


async def _get(session: aiohttp.ClientSession, url: str) -> bytes | None:
    try:
        async with session.get(url) as response:
            return await response.read() if response.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None
