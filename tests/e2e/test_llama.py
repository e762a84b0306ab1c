"""Cody's requests answered by a real model server: ``make e2e``."""

import pytest

from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.fixtures import Starter, model_configuration

pytestmark = pytest.mark.e2e

VERSIONS = [None, "1", "8"]
PARAMETERS = {
    "maxTokensToSample": 12,
    "temperature": 0,
    "topK": -1,
    "topP": -1,
    # more than the server of some kinds takes, none of them likely
    "stopSequences": [f"<stop{n}>" for n in range(6)],
}


def question(text: str = "Say something.", **more) -> dict:
    human = {"speaker": "human", "text": text}
    return {"messages": [human], **PARAMETERS, **more}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["openaicompatible", "anthropic"])
async def test_chat(llama: str, start: Starter, version, kind):
    side = {"endpoint": f"{llama}/v1/messages"} if kind == "anthropic" else {}
    proxy = await start(model_configuration(llama, kind, **side))
    number = int(version or 0)
    raw = await proxy.chat(question(), version=version)
    assert_ends_once(raw)
    streamed = read_chat(raw, number)
    assert (streamed.ended, streamed.violations) == ("complete", [])
    assert streamed.text and streamed.stop_reason in ("length", "max_tokens")
    raw = await proxy.chat(question(stream=False), version=version)
    whole = raw.json()
    assert whole["completion"] and whole["stopReason"] in ("length", "max_tokens")
    if number >= 5:
        assert streamed.usage is not None
        assert streamed.usage["completion_tokens"] == 12
        assert whole["usage"]["completion_tokens"] == 12
    assert [line["completion_tokens"] for line in proxy.outcomes] == [12, 12]


@pytest.mark.parametrize("version", VERSIONS)
async def test_code(llama: str, start: Starter, version):
    proxy = await start(model_configuration(llama))
    raw = await proxy.code(question("def f(", stream=True), version=version)
    assert_ends_once(raw)
    streamed = read_autocomplete(raw, int(version or 0))
    assert streamed.text and streamed.stop_reason == "length"
    whole = (await proxy.code(question("def f("), version=version)).json()
    assert whole["completion"] and whole["stopReason"] == "length"


async def test_local_cut_at_a_stop_sequence(llama: str, start: Starter):
    proxy = await start(model_configuration(llama))
    first = read_chat(await proxy.chat(question(), version="2"), 2).text
    stop = first.split()[3]
    stops = [f"<{n}>" for n in range(5)] + [stop]
    raw = await proxy.chat(question(stopSequences=stops), version="2")
    assert_ends_once(raw)
    cut = read_chat(raw, 2)
    assert cut.text == first[: first.index(stop)]
    assert cut.stop_reason == "stop_sequence"


@pytest.mark.parametrize("stream", [True, False])
async def test_over_long_prompt(llama: str, start: Starter, stream):
    proxy = await start(model_configuration(llama))
    raw = await proxy.chat(question("word " * 3000, stream=stream))
    if stream:
        assert_ends_once(raw)
        (error,) = read_chat(raw, 2).errors
    else:
        assert raw.status == 503
        error = raw.text
    assert error.startswith("OpenAI: unexpected status code 400: ")
    assert "exceeds the available context size" in error


async def test_one_request_after_another(llama: str, start: Starter):
    """The server closes connections that it promised to keep."""
    proxy = await start(model_configuration(llama))
    for _ in range(3):
        raw = await proxy.chat(question())
        assert read_chat(raw, 2).ended == "complete"
