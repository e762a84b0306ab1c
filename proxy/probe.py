"""What kind of server answers at a URL that the user gave without a configuration?"""

import asyncio
import contextlib
from urllib.parse import urlsplit

import msgspec

from proxy.errors import ConfigError, UpstreamFault
from proxy.upstream import Upstream

_TIMEOUT_S = 5.0


class Found(msgspec.Struct):
    """``url`` ends in ``/v1``; the rest is for the configuration."""

    url: str
    type: str = "huggingface-tgi"
    model: str = "tgi"
    profile: str | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    warning: str = ""


class _Info(msgspec.Struct):
    """TGI's ``/info``."""

    model_id: str
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None


class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_ctx_train: int | None = None


class _Listed(msgspec.Struct):
    """One of ``/v1/models``: vLLM says ``max_model_len``, llama.cpp ``meta``."""

    id: str
    owned_by: str = ""
    max_model_len: int | None = None
    meta: _Meta | None = None


class _ModelList(msgspec.Struct):
    data: list[_Listed]


# owned_by -> whose ways requests are to be fitted to
_PROFILES = {"llamacpp": "llamacpp", "vllm": "vllm", "library": "ollama"}
_PATHS = ("/chat/completions", "/completions", "/v1")


async def probe(url: str) -> Found:
    """Ask the server what it is. A sidecar may start before its server: then it is
    taken for TGI, with a warning.

    Raises: ConfigError: that is no URL of a server.
    """
    base = _base(url)
    upstream = Upstream()
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await _ask(upstream, base)
    except TimeoutError:
        return _unknown(base, "does not answer")
    except UpstreamFault as fault:
        return _unknown(base, f"cannot be asked ({fault.message})")
    finally:
        await upstream.close()


def _base(url: str) -> str:
    base = url.rstrip("/")
    base = base if "://" in base else f"http://{base}"
    for path in _PATHS:
        base = base.removesuffix(path)
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            ['--tgi-url: expected the URL of a server, as in "http://127.0.0.1:3000"']
        )
    return base


async def _ask(upstream: Upstream, base: str) -> Found:
    body = await upstream.get(f"{base}/info", {}, base)
    with contextlib.suppress(msgspec.DecodeError):
        info = msgspec.json.decode(body, type=_Info)
        return Found(
            f"{base}/v1",
            model=info.model_id,
            max_input_tokens=info.max_input_tokens,
            max_output_tokens=info.max_total_tokens,
        )
    body = await upstream.get(f"{base}/v1/models", {}, base)
    with contextlib.suppress(msgspec.DecodeError, IndexError):
        listed = msgspec.json.decode(body, type=_ModelList).data[0]
        meta = listed.meta or _Meta()
        window = listed.max_model_len or meta.n_ctx or meta.n_ctx_train
        return Found(
            f"{base}/v1",
            "openaicompatible",
            listed.id,
            _PROFILES.get(listed.owned_by),
            window,
            window,
        )
    return _unknown(base, "does not say what it is (no /info, no /v1/models)")


def _unknown(base: str, why: str) -> Found:
    return Found(f"{base}/v1", warning=f"{base} {why}; taken for TGI")
