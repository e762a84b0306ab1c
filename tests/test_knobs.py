"""What the proxy does because clients leave it to the server, seen at the upstream."""

import time

import pytest

from proxy.completion import CompletionRequest, Message, TextPart
from proxy.errors import InvalidPrompt
from proxy.knobs import MOST_CHARS_PER_TOKEN, Knobs, lift_preamble
from proxy.modelconfig.resolved import ContextWindow
from tests.support.client import request
from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.fixtures import Block, Starter, model_configuration
from tests.support.instance import COMPLETION, PREAMBLE, PREAMBLE_REPLY
from tests.support.upstream import (
    Hang,
    ScriptedUpstream,
    json_reply,
    openai_chunks,
    sse,
    sse_head,
)
from tests.test_providers import model

ANSWER = sse(*openai_chunks(["Hello"]))
REF = "acme::v1::large"
EDIT_STOP = "</CODE5711>"
# As every client sends it.
ASKED: Block = {
    "temperature": 0.2,
    "topK": -1,
    "topP": -1,
    "maxTokensToSample": 4000,
    "messages": [{"speaker": "human", "text": "hi"}],
}
KNOBS: Block = {
    "stopSequences": ["<stop>"],
    "endOfText": "<eot>",
    "chatPreInstruction": "Be brief.",
    "editPostInstruction": "Only code.",
    "chatTemperature": 0.9,
    "chatTopP": 0.8,
    "chatTopK": 40,
    "chatMaxTokens": 1000,
    "editTemperature": 0,
    "editTopP": 0.7,
    "editTopK": 30,
    "editMaxTokens": 2000,
    "autoCompleteTemperature": 0.1,
    "autoCompleteTopP": 0.6,
    "autoCompleteTopK": 20,
    "autoCompleteSinglelineMaxTokens": 50,
    "autoCompleteMultilineMaxTokens": 500,
}


def block(upstream: ScriptedUpstream, knobs: Block | None = None, **more) -> Block:
    found = model_configuration(upstream.url)
    if knobs is not None:
        config = {"openaicompatible": knobs}
        found["modelOverrides"][0]["clientSideConfig"] = config
    return found | more


def sampling(upstream: ScriptedUpstream) -> Block:
    body = upstream.last.json()
    names = ("temperature", "top_p", "top_k", "max_tokens", "stop")
    return {name: body[name] for name in names if name in body}


async def test_knobs_replace_what_chats_send(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(block(upstream, KNOBS))
    await proxy.chat(ASKED)
    assert sampling(upstream) == {
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 40,
        "max_tokens": 1000,
        "stop": ["<stop>"],
    }
    assert upstream.last.json()["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    await proxy.chat(ASKED | {"maxTokensToSample": 10})  # a limit, no wish
    assert upstream.last.json()["max_tokens"] == 10


async def test_knobs_of_edits_are_for_edits(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(block(upstream, KNOBS, systemPreInstruction="In Latin."))
    messages = [
        {"speaker": "system", "text": "You edit."},
        {"speaker": "human", "text": "Rename x."},
        {"speaker": "assistant", "text": "<CODE5711>"},
    ]
    await proxy.chat(ASKED | {"messages": messages, "stopSequences": [EDIT_STOP]})
    assert sampling(upstream) == {
        "temperature": 0,
        "top_p": 0.7,
        "top_k": 30,
        "max_tokens": 2000,
        "stop": [EDIT_STOP, "<stop>"],
    }
    assert upstream.last.json()["messages"] == [
        {"role": "system", "content": "In Latin.\n\nYou edit."},
        {"role": "user", "content": "Rename x.\n\nOnly code."},
        {"role": "assistant", "content": "<CODE5711>"},
    ]


@pytest.mark.parametrize(
    ("stops", "max_tokens"), [(["\n"], 50), (["\n\n", "\n\r\n"], 500)]
)
async def test_knobs_of_autocomplete_know_lines(
    start: Starter, upstream, stops, max_tokens
):
    upstream.script(json_reply({"choices": [{"text": "x<eot>", "finish_reason": "s"}]}))
    proxy = await start(block(upstream, KNOBS, systemPreInstruction="In Latin."))
    raw = await proxy.code(COMPLETION | {"stopSequences": stops})
    assert sampling(upstream) == {
        "temperature": 0.1,
        "top_p": 0.6,
        "top_k": 20,
        "max_tokens": max_tokens,
        "stop": [*stops, "<stop>"],
    }
    # A prompt for a base model: no instruction goes into it.
    assert upstream.last.json()["prompt"] == COMPLETION["messages"][0]["text"]
    assert read_autocomplete(raw, 2).text == "x"


async def test_without_knobs_a_request_stays_what_it_is(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(block(upstream))
    await proxy.chat(ASKED | {"stopSequences": [EDIT_STOP]})
    assert sampling(upstream) == {
        "temperature": 0.2,
        "max_tokens": 4000,
        "stop": [EDIT_STOP],
    }
    await proxy.code(COMPLETION)
    assert sampling(upstream) == {
        "temperature": 0.2,
        "max_tokens": 256,
        "stop": ["\n\n", "\n\r\n"],
    }


async def test_knobs_that_no_server_could_take_are_none(start: Starter, upstream):
    upstream.script(ANSWER)
    odd = {"chatTemperature": -1, "chatTopP": 1, "chatTopK": -1, "chatMaxTokens": 0}
    proxy = await start(block(upstream, odd))
    await proxy.chat(ASKED)
    assert sampling(upstream) == {"temperature": 0.2, "max_tokens": 4000}


async def test_other_dialects_say_themselves_what_they_want(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(block(upstream, KNOBS, systemPreInstruction="In Latin."))
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "large", "temperature": 0.3, "max_tokens": 9, "messages": messages}
    path = "/v1/chat/completions"
    await request(proxy.url, path=path, body=body | {"stream": True})
    sent = upstream.last.json()
    assert (sent["temperature"], sent["max_tokens"]) == (0.3, 9)
    assert sent["messages"] == messages


# ---------------------------------------------------------------------- instructions


async def test_instructions_stand_in_front_of_the_system_prompt(
    start: Starter, upstream
):
    upstream.script(ANSWER)
    proxy = await start(block(upstream, KNOBS, systemPreInstruction="In Latin."))
    both = "In Latin.\n\nBe brief."
    system = {"speaker": "system", "text": "You are Cody."}
    await proxy.chat(ASKED | {"messages": [system, *ASKED["messages"]]})
    sent = upstream.last.json()["messages"]
    assert sent[0] == {"role": "system", "content": f"{both}\n\nYou are Cody."}
    # The fake preamble stands for a system prompt, which it may have to stay.
    await proxy.chat(ASKED | {"messages": with_preamble()})
    sent = upstream.last.json()["messages"]
    assert sent == [
        {"role": "user", "content": f"{both}\n\n{PREAMBLE}"},
        {"role": "assistant", "content": PREAMBLE_REPLY},
        {"role": "user", "content": "hi"},
    ]


async def test_instructions_and_a_lifted_preamble(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(
        block(upstream, systemPreInstruction="In Latin."),
        models={REF: {"liftPreamble": True}},
    )
    for version in ("1", "8", None):
        await proxy.chat(ASKED | {"messages": with_preamble()}, version)
        assert upstream.last.json()["messages"] == [
            {"role": "system", "content": f"In Latin.\n\n{PREAMBLE}"},
            {"role": "user", "content": "hi"},
        ]


def with_preamble() -> list[Block]:
    return [
        {"speaker": "human", "text": PREAMBLE},
        {"speaker": "assistant", "text": PREAMBLE_REPLY},
        *ASKED["messages"],
    ]


def turn(role: str, text: str) -> Message:
    return Message(role, [TextPart(text)])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [turn("user", PREAMBLE)],
        [turn("user", PREAMBLE), turn("assistant", PREAMBLE_REPLY)],
        [turn("user", PREAMBLE), turn("user", PREAMBLE_REPLY), turn("user", "a")],
        [turn("user", PREAMBLE), turn("assistant", "Hello!"), turn("user", "a")],
        [turn("system", PREAMBLE), turn("assistant", PREAMBLE_REPLY), turn("user", "")],
    ],
)
def test_only_the_whole_preamble_is_lifted(messages):
    assert lift_preamble(messages) is messages


# ----------------------------------------------------------------------------- limits


async def test_a_prompt_that_is_too_long_for_sure_is_not_sent(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(block(upstream))
    question = "x" * (8000 * MOST_CHARS_PER_TOKEN)
    asked = ASKED | {"messages": [{"speaker": "human", "text": question}]}
    assert read_chat(await proxy.chat(asked), 2).text == "Hello"
    asked["messages"] = [{"speaker": "human", "text": f"{question}x"}]
    raw = await proxy.chat(asked)
    assert_ends_once(raw)
    assert read_chat(raw, 2).errors == [
        'the prompt of 96,001 characters exceeds the token limit of model "'
        f'{REF}": its context window takes 8,000 tokens'
    ]
    raw = await proxy.chat(asked | {"stream": False})
    assert raw.status == 400 and "token limit" in raw.text
    assert len(upstream.requests) == 1
    assert proxy.outcomes[-1]["kind"] == "invalid_prompt"


def test_of_a_shared_space_an_answer_gets_its_part():
    knobs = Knobs(model(client_window=ContextWindow(6000, 1000)), "")
    for feature in ("chat", "code"):
        asked = CompletionRequest(feature, [turn("user", "hi")], max_tokens=4000)
        knobs.apply(asked, 10)
        assert asked.max_tokens == 1000
        asked.max_tokens = 30
        knobs.apply(asked, 10)
        assert asked.max_tokens == 30


def test_only_text_counts_as_prompt():
    # A body may be large for other reasons: escapes, images.
    knobs = Knobs(model(), "")
    asked = CompletionRequest("chat", [turn("user", "hi")])
    knobs.apply(asked, 10**9)
    asked.messages = [turn("user", "x" * 200_000)]
    knobs.apply(asked, 10)
    with pytest.raises(InvalidPrompt, match="token limit"):
        knobs.apply(asked, 200_010)


@pytest.mark.parametrize(
    "text",
    [
        "This model's maximum context length is 512 tokens. However, your prompt",
        "request (12022 tokens) exceeds the available context size (512 tokens)",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. "
        "Given: 5000 `inputs` tokens and 100 `max_new_tokens`",
        "Input validation error: `inputs` must have less than 4095 tokens. Given: 5000",
        "prompt is too long: 200001 tokens > 200000 maximum",
        "The input token count (9) exceeds the maximum number of tokens allowed (8)",
    ],
)
async def test_an_upstream_that_says_so_is_said_in_the_clients_words(
    start: Starter, upstream, text
):
    upstream.script(json_reply({"error": {"message": text}}, 400))
    proxy = await start(block(upstream))
    raw = await proxy.chat(ASKED)
    assert_ends_once(raw)
    [error] = read_chat(raw, 2).errors
    assert error.endswith(" (the prompt exceeds the model's token limit)")
    assert text in error
    raw = await proxy.chat(ASKED | {"stream": False})
    assert raw.status == 503 and "token limit" in raw.text


async def test_other_errors_keep_their_words(start: Starter, upstream):
    upstream.script(json_reply({"error": {"message": "maximum fun"}}, 400))
    proxy = await start(block(upstream))
    [error] = read_chat(await proxy.chat(ASKED), 2).errors
    assert "token limit" not in error


async def test_autocomplete_gives_up_in_its_own_time(start: Starter, upstream):
    upstream.script([sse_head(), Hang()])
    timeouts = {
        "autocompleteSinglelineTimeout": 5000,
        "autocompleteMultilineTimeout": 100,
    }
    proxy = await start(block(upstream, timeouts))
    started_s = time.monotonic()
    raw = await proxy.code(COMPLETION, headers={"X-Timeout-Ms": "4000"})
    assert time.monotonic() - started_s < 2
    error = read_autocomplete(raw, 2).error
    assert error is not None and "within 100 ms" in error
    # A shorter one of the client's own counts, and chats know nothing of it.
    raw = await proxy.code(COMPLETION, headers={"X-Timeout-Ms": "50"})
    assert "within 50 ms" in (read_autocomplete(raw, 2).error or "")
    raw = await proxy.chat(ASKED, headers={"X-Timeout-Ms": "300"})
    assert "within 300 ms" in read_chat(raw, 2).errors[0]


async def test_a_fallback_has_knobs_of_its_own(start: Starter, upstream):
    upstream.script(ANSWER)
    found = block(upstream, {"chatTemperature": 0.1}, systemPreInstruction="In Latin.")
    gone = {"type": "openaicompatible", "url": "http://127.0.0.1:1/v1"}
    found["providerOverrides"].append({"id": "gone", "serverSideConfig": gone})
    knobs = {"chatTemperature": 0.9, "chatTopP": 0.5, "chatPreInstruction": "Be brief."}
    found["modelOverrides"].append(
        {"modelRef": "gone::v1::m", "clientSideConfig": {"openaicompatible": knobs}}
    )
    fallback = {"gone::v1::m": {"fallback": REF}}
    proxy = await start(found, models=fallback)
    raw = await proxy.chat(ASKED | {"model": "gone::v1::m"})
    assert read_chat(raw, 2).text == "Hello"
    assert sampling(upstream) == {"temperature": 0.1, "max_tokens": 4000}
    assert upstream.last.json()["messages"] == [
        {"role": "system", "content": "In Latin."},
        {"role": "user", "content": "hi"},
    ]
