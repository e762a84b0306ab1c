"""The proxy on a real socket, configured per test, and its upstream."""

import contextlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from proxy import config
from proxy.listener import Listener
from proxy.log import ExchangeLog
from proxy.metrics import Board
from proxy.redact import Redactor
from proxy.server import Proxy
from proxy.upstream import Upstream
from tests.support.client import RawReply, request
from tests.support.upstream import ScriptedUpstream

Block = dict[str, Any]
QUESTION: Block = {"messages": [{"speaker": "human", "text": "What is your name?"}]}


def model_configuration(
    url: str, type: str = "openaicompatible", **server_side: Any
) -> Block:
    """One provider of the given type, one model of it for everything."""
    lists_endpoints = type in ("openaicompatible", "huggingface-tgi")
    base = f"{url}/v1"
    endpoints = [{"url": base}] if lists_endpoints else None
    side = {"type": type, **({"endpoints": endpoints} if lists_endpoints else {})}
    ref = "acme::v1::large"
    return {
        "providerOverrides": [{"id": "acme", "serverSideConfig": side | server_side}],
        "modelOverrides": [
            {
                "modelRef": ref,
                "modelName": "large-1",
                "capabilities": ["chat", "autocomplete"],
                "category": "balanced",
                "status": "stable",
                "contextWindow": {"maxInputTokens": 8000, "maxOutputTokens": 5000},
            }
        ],
        "defaultModels": {"chat": ref, "fastChat": ref, "codeCompletion": ref},
    }


class RunningProxy:
    """The proxy of one test.

    ``url`` is where it listens; ``lines`` are the log lines so far; ``inside`` is for
    what has to be seen from within: what is still open.
    """

    def __init__(
        self, url: str, log: io.StringIO, inside: Proxy, listener: Listener
    ) -> None:
        self.url = url
        self.inside = inside
        self.listener = listener
        self._log = log

    @property
    def tasks(self) -> int:
        """How many requests have been answered by a task of aiohttp's."""
        return self.listener._connections.requests_count

    @property
    def lines(self) -> list[Block]:
        return [json.loads(line) for line in self._log.getvalue().splitlines()]

    @property
    def outcomes(self) -> list[Block]:
        return [line for line in self.lines if line["event"] == "exchange"]

    @property
    def log(self) -> str:
        return self._log.getvalue()

    async def chat(
        self, body: Any = QUESTION, version: str | None = "2", **options: Any
    ) -> RawReply:
        """POST to /.api/completions/stream."""
        query = "" if version is None else f"?api-version={version}"
        path = f"/.api/completions/stream{query}"
        return await request(self.url, path=path, body=body, **options)

    async def code(
        self, body: Any = QUESTION, version: str | None = "2", **options: Any
    ) -> RawReply:
        """POST to /.api/completions/code."""
        query = "" if version is None else f"?api-version={version}"
        path = f"/.api/completions/code{query}"
        return await request(self.url, path=path, body=body, **options)


@contextlib.asynccontextmanager
async def running(
    settings: config.Settings, grace_s: float = 0.0, board: Board | None = None
) -> AsyncIterator[RunningProxy]:
    """Run the proxy as ``serve`` does, minus the command line."""
    settings = replace(settings, shutdown=config.Shutdown(grace_s=grace_s))
    log = io.StringIO()
    redact = Redactor(config.secrets(settings))
    upstream = Upstream()
    proxy = Proxy(settings, upstream, ExchangeLog(log, redact), redact, board)
    listener = Listener(proxy)
    try:
        addresses = await listener.start()
        url = f"http://127.0.0.1:{addresses[0][1]}"
        yield RunningProxy(url, log, proxy, listener)
    finally:
        await listener.stop()
        await upstream.close()


def load(file: Block) -> config.Settings:
    # As JSON, which is YAML: that takes a tenth of a test less to write.
    text = json.dumps({"listen": "127.0.0.1:0", **file}, ensure_ascii=False)
    return config.load(text, environ={}, directory=Path())


Starter = Callable[..., Awaitable[RunningProxy]]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as scripted:
        yield scripted


@pytest.fixture
async def start() -> AsyncIterator[Starter]:
    """Start a proxy with a model configuration and own settings; any number."""
    async with contextlib.AsyncExitStack() as stack:

        async def starter(block: Block, **own: Any) -> RunningProxy:
            settings = load({"modelConfiguration": block, **own})
            return await stack.enter_async_context(running(settings))

        yield starter
