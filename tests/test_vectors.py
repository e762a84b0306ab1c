"""What real upstreams send, each over real sockets to both of Cody's parsers: what the
user of a chat sees, and what an editor gets.
"""

import json

import pytest

from tests.support.cody import assert_ends_once, read_autocomplete, read_chat
from tests.support.fixtures import QUESTION, Starter, model_configuration
from tests.support.upstream import (
    Close,
    Pause,
    anthropic_events,
    chunk,
    data,
    event,
    json_reply,
    openai_chunk,
    openai_chunks,
    reply,
    sse,
    sse_head,
    tgi_chat_chunks,
    tgi_completion_chunks,
)

CHAT = openai_chunks(["One ", "wörd"])
MESSAGES = anthropic_events(["One ", "wörd"])
CUT = "upstream closed the stream before the end of the reply"
OVERLOADED = {"type": "overloaded_error", "message": "Overloaded"}


def split(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


def gemini(text: str, finish: str | None = None) -> dict:
    candidate: dict = {"content": {"parts": [{"text": text}], "role": "model"}}
    if finish:
        candidate["finishReason"] = finish
    return {"candidates": [candidate], "modelVersion": "g"}


VECTORS = {
    # name: (type of provider, path, script, text, stop reason, error)
    "TGI chat with comments": (
        "huggingface-tgi",
        "chat",
        sse(b":\n\n", *tgi_chat_chunks(["One ", "wörd"]), b":\n\n"),
        ("One wörd", "stop", None),
    ),
    "TGI completions, end-of-text in the last chunk": (
        "huggingface-tgi",
        "code",
        sse(*tgi_completion_chunks(["One ", "wörd", "</s>"])),
        ("One wörd", "eos_token", None),
    ),
    "TGI error after text, then [DONE]": (
        "huggingface-tgi",
        "chat",
        sse(
            *tgi_chat_chunks(["One "], finish=None),
            data(
                {
                    "error": {
                        "message": "Request failed during generation: CUDA",
                        "http_status_code": 422,
                    }
                }
            ),
            b"data: [DONE]\n\n",
        ),
        ("One ", None, "Request failed during generation: CUDA"),
    ),
    "TGI native error after text": (
        "huggingface-tgi",
        "code",
        sse(
            openai_chunk({"content": "One "}),
            data({"error": "out of blocks", "error_type": "generation"}),
        ),
        ("One ", None, "generation: out of blocks"),
    ),
    "OpenAI with a usage chunk": (
        "openaicompatible",
        "chat",
        sse(*openai_chunks(["One ", "wörd"], usage=(3, 4))),
        ("One wörd", "stop", None),
    ),
    "Azure preamble": (
        "azureOpenAI",
        "chat",
        sse(
            data({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}), *CHAT
        ),
        ("One wörd", "stop", None),
    ),
    "vLLM error object": (
        "openaicompatible",
        "chat",
        sse(data({"object": "error", "message": "too long", "code": 400})),
        ("", None, "too long"),
    ),
    "llama.cpp: data null first": (
        "openaicompatible",
        "chat",
        sse(data(None), *CHAT),
        ("One wörd", "stop", None),
    ),
    "llama.cpp: error in a field": (
        "openaicompatible",
        "chat",
        sse(CHAT[1], b'error: {"code":500,"message":"Compute error."}\n\n'),
        ("One ", None, "Compute error."),
    ),
    "Anthropic with pings": (
        "anthropic",
        "chat",
        sse(MESSAGES[0], event("ping", {"type": "ping"}), *MESSAGES[1:]),
        ("One wörd", "end_turn", None),
    ),
    "Anthropic overloaded in mid-stream": (
        "anthropic",
        "chat",
        sse(*MESSAGES[:4], event("error", {"type": "error", "error": OVERLOADED})),
        ("One ", None, "Anthropic: overloaded_error: Overloaded"),
    ),
    "Anthropic without message_stop": (
        "anthropic",
        "chat",
        sse(*MESSAGES[:-1]),
        ("One wörd", "end_turn", CUT),
    ),
    "Gemini array": (
        "google",
        "chat",
        json_reply([gemini("One "), gemini("wörd", "STOP")]),
        ("One wörd", "STOP", None),
    ),
    "Gemini stream without an end marker": (
        "google",
        "chat",
        sse(data(gemini("One ")), data(gemini("wörd", "STOP"))),
        ("One wörd", "STOP", None),
    ),
    "truncated stream": (
        "openaicompatible",
        "chat",
        sse(*CHAT[:3]),
        ("One wörd", None, CUT),
    ),
    "cut connection": (
        "openaicompatible",
        "chat",
        [sse_head(), chunk(CHAT[1]), Pause(0.02), Close()],
        ("One ", None, "upstream connection broke before the end of the reply"),
    ),
    "HTML with status 502": (
        "openaicompatible",
        "chat",
        reply(502, {"Content-Type": "text/html"}, b"<h1>Bad Gateway</h1>"),
        ("", None, "OpenAI: unexpected status code 502: <h1>Bad Gateway</h1>"),
    ),
    "JSON reply to a stream request": (
        "openaicompatible",
        "chat",
        json_reply(
            {"choices": [{"message": {"content": "One wörd"}, "finish_reason": "stop"}]}
        ),
        ("One wörd", "stop", None),
    ),
    "CRLF": (
        "openaicompatible",
        "chat",
        sse(*[piece.replace(b"\n", b"\r\n") for piece in CHAT]),
        ("One wörd", "stop", None),
    ),
    "CR only, BOM first": (
        "openaicompatible",
        "chat",
        sse(b"\xef\xbb\xbf", *[piece.replace(b"\n", b"\r") for piece in CHAT]),
        ("One wörd", "stop", None),
    ),
    "no blank after the colon": (
        "openaicompatible",
        "chat",
        sse(*[piece.replace(b"data: ", b"data:") for piece in CHAT]),
        ("One wörd", "stop", None),
    ),
    "seven bytes a read, characters cut in two": (
        "openaicompatible",
        "chat",
        sse(*split(b"".join(CHAT).replace(b"\\u00f6", "ö".encode()), 7)),
        ("One wörd", "stop", None),
    ),
    "pretty JSON over several data lines": (
        "openaicompatible",
        "chat",
        sse(
            b"".join(
                b"data: %s\n" % line
                for line in json.dumps(
                    {"choices": [{"delta": {"content": "One wörd"}}]}, indent=1
                )
                .encode()
                .split(b"\n")
            )
            + b"\n",
            *CHAT[3:],
        ),
        ("One wörd", "stop", None),
    ),
    "no [DONE]": (
        "openaicompatible",
        "chat",
        sse(*CHAT[:-1]),
        ("One wörd", "stop", None),
    ),
}


def block(kind: str, url: str) -> dict:
    sides = {
        "anthropic": {"endpoint": f"{url}/v1/messages"},
        "azureOpenAI": {"endpoint": url},
    }
    configured = model_configuration(url, kind, **sides.get(kind, {}))
    if kind == "google":
        # Only the public host is configurable; the dialect is the gateway's too.
        provider = configured["providerOverrides"][0]
        provider["id"] = "google"
        provider["serverSideConfig"] = {"type": "sourcegraph", "endpoint": url}
        text = json.dumps(configured).replace("acme::", "google::")
        return json.loads(text)
    return configured


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", VECTORS)
async def test_vector(start: Starter, upstream, name, version):
    kind, endpoint, script, (text, stop_reason, error) = VECTORS[name]
    upstream.script(script)
    proxy = await start(block(kind, upstream.url))
    ask = proxy.chat if endpoint == "chat" else proxy.code
    raw = await ask(QUESTION | {"stream": True}, version=version)
    assert_ends_once(raw)
    seen = read_chat(raw, int(version))
    assert (seen.text, seen.stop_reason or None) == (text, stop_reason)
    assert seen.errors == ([] if error is None else [error])
    assert (seen.stalled, seen.violations) == (None, [])
    assert seen.ended == ("complete" if error is None else "error")
    editor = read_autocomplete(raw, int(version))
    if error is None:
        assert (editor.text, editor.error) == (text, None)
    else:
        assert editor.error is not None and error in json.loads(editor.error)["error"]
    assert editor.violations == []


async def test_an_empty_answer_is_still_a_completion(start: Starter, upstream):
    upstream.script(sse(*openai_chunks([])))
    proxy = await start(model_configuration(upstream.url))
    raw = await proxy.code(QUESTION | {"stream": True}, version="1")
    assert_ends_once(raw)
    assert read_autocomplete(raw, 1).text == ""
    assert read_chat(raw, 1).stop_reason == "stop"


async def test_tgi_tool_call_without_a_finish_reason(start: Starter, upstream):
    function = {"name": "get_time", "arguments": ""}
    first = {"index": 0, "id": "0", "type": "function", "function": function}
    rest = {"index": 0, "id": "0", "function": {"name": None, "arguments": "{}"}}
    chunks = [openai_chunk({"tool_calls": [piece]}) for piece in (first, rest)]
    upstream.script(sse(*chunks, b"data: [DONE]\n\n"))
    proxy = await start(model_configuration(upstream.url, "huggingface-tgi"))
    seen = read_chat(await proxy.chat(version="8"))
    assert seen.ended == "complete"
    assert [(c.name, c.arguments) for c in seen.tool_calls] == [("get_time", "{}")]
