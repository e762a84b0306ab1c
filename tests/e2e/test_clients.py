"""Every official client, answered by a real model server through the proxy."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support import sdk
from tests.support.fixtures import RunningProxy, Starter, model_configuration
from tests.support.sdk import CLIENTS, Adapter, Answer

pytestmark = [
    pytest.mark.e2e,
    # text_generation calls what pydantic 2 has renamed.
    pytest.mark.filterwarnings(
        "ignore:The `dict` method is deprecated:pydantic.warnings.PydanticDeprecatedSince20"
    ),
]

# The tiny model never stops by itself, so each answer ends at its limit.
LENGTH_WORDS = {"length", "max_tokens"}
MANY_TOKENS = 900  # most of the context


@pytest.fixture(params=["openaicompatible", "anthropic"])
async def proxy(
    request: pytest.FixtureRequest, llama: str, start: Starter
) -> AsyncIterator[RunningProxy]:
    side: dict[str, Any] = {}
    if request.param == "anthropic":
        side["endpoint"] = f"{llama}/v1/messages"
    yield await start(model_configuration(llama, request.param, **side))


each_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)


def check(answer: Answer) -> None:
    assert answer.text
    assert answer.finish in LENGTH_WORDS
    assert answer.usage is not None
    prompt, completion = answer.usage
    assert completion == sdk.MAX_TOKENS
    assert prompt is None or 0 < prompt < 100


@each_client
async def test_plain(proxy: RunningProxy, client: Adapter):
    answer = await client.plain(proxy.url)
    check(answer)
    assert bool(answer.model) == client.shows_model
    assert [line["kind"] for line in proxy.outcomes] == ["ok"]


@each_client
async def test_streamed(proxy: RunningProxy, client: Adapter):
    """Whoever has to ask for usage does, the others get it anyway."""
    answer = await client.streamed(proxy.url, usage=client.asks_for_usage)
    check(answer)
    assert bool(answer.model) == client.shows_model
    assert [line["kind"] for line in proxy.outcomes] == ["ok"]


@each_client
async def test_stream_has_its_end(proxy: RunningProxy, client: Adapter):
    assert len(await client.events(proxy.url)) > 1
    assert [line["kind"] for line in proxy.outcomes] == ["ok"]


@each_client
async def test_client_leaves(
    proxy: RunningProxy, client: Adapter, monkeypatch: pytest.MonkeyPatch
):
    """It asked for far more than it reads."""
    monkeypatch.setattr(sdk, "MAX_TOKENS", MANY_TOKENS)
    assert await client.close_early(proxy.url)
    for _ in range(200):
        if proxy.outcomes:
            break
        await asyncio.sleep(0.01)
    assert [line["kind"] for line in proxy.outcomes] == ["client_gone"]


@pytest.mark.parametrize(
    "client",
    [client for client in CLIENTS if client.has_tools],
    ids=lambda client: client.name,
)
async def test_tools_are_offered(proxy: RunningProxy, client: Adapter):
    """The tiny model calls none, but the server has to take them."""
    for stream in (False, True):
        answer = await client.with_tools(proxy.url, stream=stream)
        assert answer.text or answer.tool_calls
    assert [line["kind"] for line in proxy.outcomes] == ["ok", "ok"]
