"""What Cody's clients send never makes TGI refuse a request."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from proxy import simulator
from tests.support.client import request
from tests.support.cody import read_chat
from tests.support.fixtures import load, model_configuration, running

numbers = st.sampled_from([-1, 0, 0.2, 0.5, 0.95, 0.99999999, 1, 1.5, 2, 40, 1e9])
texts = st.sampled_from(["", " ", "hi", "You are Cody, an AI", "é日本"])
turns = st.lists(
    st.fixed_dictionaries(
        {"speaker": st.sampled_from(["human", "assistant", "system"]), "text": texts}
    ),
    max_size=4,
)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "temperature": numbers,
        "topK": numbers,
        "topP": numbers,
        "maxTokensToSample": st.sampled_from([-1, 0, 1, 30, 4000, 10**7]),
        "stopSequences": st.lists(st.text("ab\n<", max_size=3), max_size=9),
        "model": st.sampled_from(["", "acme/large", "large-1"]),
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]),
        "stream": st.booleans(),
        "fast": st.booleans(),
        "logprobs": st.just(3),
    },
)
OURS = (
    "message content cannot be empty",
    "found zero messages in prompt",
    "found no message besides the system prompt",
)


@pytest.mark.parametrize("strict", [True, False])
@settings(suppress_health_check=list(HealthCheck))
@given(
    messages=turns,
    sent=parameters,
    endpoint=st.sampled_from(["stream", "code"]),
    version=st.sampled_from(["", "1", "8"]),
)
async def test_no_request_of_a_cody_client_is_refused(
    tgi: dict[bool, str], messages, sent, strict, endpoint, version
):
    url = f"{tgi[strict]}/.api/completions/{endpoint}?api-version={version}"
    raw = await request(url, body={"messages": messages, **sent})
    if raw.status == 200 and (raw.header("content-type") or "").startswith(
        "text/event"
    ):
        errors = read_chat(raw, int(version or 0)).errors
    else:
        errors = [] if raw.status == 200 else [raw.text.strip()]
    assert all(error in OURS for error in errors), (errors, json.dumps(messages), sent)


@pytest.fixture
async def tgi() -> AsyncIterator[dict[bool, str]]:
    """A proxy in front of TGI, by whether the model's template is strict."""
    fast: dict[str, Any] = {"tokens_per_s": 0, "first_token_s": 0, "answer_tokens": 3}
    urls: dict[bool, str] = {}
    plain = await simulator.start(simulator.Settings(**fast))
    strict = await simulator.start(simulator.Settings(**fast, strict_template=True))
    own = {"models": {"acme::v1::large": {"strictTemplate": True}}}
    blocks = [
        model_configuration(each.url, "huggingface-tgi") for each in (plain, strict)
    ]
    async with (
        running(load({"modelConfiguration": blocks[0]})) as first,
        running(load({"modelConfiguration": blocks[1], **own})) as second,
    ):
        urls[False], urls[True] = first.url, second.url
        yield urls
    await plain.stop()
    await strict.stop()
