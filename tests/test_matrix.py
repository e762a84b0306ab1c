"""Every client in front of every kind of upstream, in every situation.

``python -m tests.test_matrix`` runs it and prints the table of what passed.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pytest

from tests.support.fixtures import (
    Block,
    RunningProxy,
    load,
    model_configuration,
    running,
)
from tests.support.sdk import CLIENTS, TOOL, Adapter, Answer, CodyChat, Raised
from tests.support.table import main
from tests.support.upstream import (
    CREATED,
    DONE,
    Close,
    Hang,
    ScriptedUpstream,
    Step,
    anthropic_events,
    data,
    event,
    json_reply,
    openai_chunk,
    openai_chunks,
    reply,
    sse,
    tgi_chat_chunks,
    tgi_completion_chunks,
    tgi_generate_events,
    usage_of,
)

pytestmark = [
    # text_generation calls what pydantic 2 has renamed.
    pytest.mark.filterwarnings(
        "ignore:The `dict` method is deprecated:pydantic.warnings.PydanticDeprecatedSince20"
    ),
]

TEXTS = ["Hello", " wörld", " 🌍"]
TEXT = "".join(TEXTS)
COUNTS = (5, 3)
ARGUMENTS = {"city": "Oslo"}
SAID = '{"city": "Oslo"}'
PIECES = ['{"ci', 'ty": "Oslo"}']
RETRY_AFTER = "7"

# What the upstreams say when they fail; the clients have to show it.
REASON = {
    400: "the prompt is too long",
    401: "the key is wrong",
    404: "there is no such model",
    429: "Model is overloaded",
    500: "the tensor has no shape",
    503: "still loading",
}
FAILURE = "Request failed during generation: CUDA out of memory"


# ------------------------------------------------------- wire formats of the upstreams


@dataclass(frozen=True)
class Wire:
    """A wire format of an upstream, as bytes.

    Attributes:
        model:    the name that it reports.
        words:    its own words for "stop", "length" and "tools".
        plain:    finish -> a reply in one piece.
        streamed: texts, finish (None: cut), usage wanted -> events.
        tools:    a tool call in one piece, and one as events.
        errors:   status -> reply.
        overload, failure: events of errors inside a stream.
        ends:     the last events that only say that there is no more; None if the
                  stream has no mark of its own for that.
    """

    model: str
    words: Mapping[str, str]
    plain: Callable[[str], object]
    streamed: Callable[[list[str], str | None, bool], list[bytes]]
    errors: Callable[[int], bytes]
    overload: bytes
    failure: bytes
    tools: tuple[object, list[bytes]] | None = None
    ends: int | None = 1


def _openai_body(kind: str, model: str, choice: Block) -> Block:
    return {
        "id": "chatcmpl-1",
        "object": kind,
        "created": CREATED,
        "model": model,
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "logprobs": None, **choice}],
        "usage": usage_of(COUNTS),
    }


def _openai_chat(model: str) -> Callable[[str], object]:
    def plain(finish: str) -> Block:
        message = {"role": "assistant", "content": TEXT}
        choice = {"message": message, "finish_reason": finish}
        return _openai_body("chat.completion", model, choice)

    return plain


def _openai_completion(model: str) -> Callable[[str], object]:
    def plain(finish: str) -> Block:
        choice = {"text": TEXT, "finish_reason": finish}
        return _openai_body("text_completion", model, choice)

    return plain


def _openai_error(status: int) -> bytes:
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    error = {
        "message": REASON[status],
        "type": kind.get(status, "invalid_request_error"),
        "param": None,
        "code": status,
    }
    return json_reply({"error": error}, status, _headers(status))


def _headers(status: int) -> dict[str, str]:
    # TGI never says when to come back; what stands in front of it does.
    return {"Retry-After": RETRY_AFTER} if status == 429 else {}


def _openai_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    return openai_chunks(texts, finish, COUNTS if with_usage else None)


def _completion_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    """vLLM's: the finish comes with the last text, the usage in a chunk of its own."""

    def chunk(choices: list[Block], **more: Any) -> bytes:
        body = {"id": "cmpl-1", "object": "text_completion", "created": CREATED}
        return data({**body, "model": "gpt-test", "choices": choices, **more})

    def choice(text: str, reason: str | None = None) -> Block:
        return {"index": 0, "text": text, "finish_reason": reason}

    *first, last = texts or [""]
    events = [chunk([choice(text)]) for text in first]
    events.append(chunk([choice(last, finish)]))
    if finish is None:
        return events
    usage = [chunk([], usage=usage_of(COUNTS))] if with_usage else []
    return [*events, *usage, DONE]


def _openai_tools(arguments: str) -> Block:
    function = {"name": TOOL, "arguments": arguments}
    call = {"id": "call_1", "type": "function", "function": function}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"message": message, "finish_reason": "tool_calls"}
    return _openai_body("chat.completion", "gpt-test", choice)


def _openai_tool_events() -> list[bytes]:
    first, *rest = PIECES
    head = {"index": 0, "id": "call_1", "type": "function"}
    function = {"name": TOOL, "arguments": first}
    role = {"role": "assistant", "content": None}
    return [
        openai_chunk({**role, "tool_calls": [{**head, "function": function}]}),
        *(
            openai_chunk({"tool_calls": [{"index": 0, "function": {"arguments": p}}]})
            for p in rest
        ),
        openai_chunk({}, "tool_calls"),
        openai_chunk(None, usage=usage_of(COUNTS)),
        DONE,
    ]


def _openai_fault(text: str, kind: str, code: int) -> bytes:
    return data({"error": {"message": text, "type": kind, "param": None, "code": code}})


OPENAI_WORDS = {"stop": "stop", "length": "length", "tools": "tool_calls"}
OPENAI_CHAT = Wire(
    model="gpt-test",
    words=OPENAI_WORDS,
    plain=_openai_chat("gpt-test"),
    streamed=_openai_events,
    tools=(_openai_tools(SAID), _openai_tool_events()),
    errors=_openai_error,
    overload=_openai_fault(REASON[429], "rate_limit_error", 429),
    # vLLM sends the mark of the end after an error, too.
    failure=_openai_fault(FAILURE, "InternalServerError", 500) + DONE,
)
OPENAI_COMPLETIONS = replace(
    OPENAI_CHAT,
    plain=_openai_completion("gpt-test"),
    streamed=_completion_events,
    tools=None,
)


# TGI: its OpenAI routes in its own ways, and its native ones.


def _tgi_error(status: int) -> bytes:
    """A body that it cannot read, no key and no route get no JSON from it."""
    text = f"Failed to parse the request body as JSON: {REASON[400]}"
    if status == 400:
        return reply(400, {"Content-Type": "text/plain; charset=utf-8"}, text)
    kinds = {429: "overloaded", 500: "incomplete_generation", 503: "healthcheck"}
    if status not in kinds:
        return reply(status)
    error = {"error": REASON[status], "error_type": kinds[status]}
    return json_reply(error, status, _headers(status))


def _tgi_fault(text: str) -> bytes:
    # 422 is a constant there.
    return data({"error": {"message": text, "http_status_code": 422}}) + DONE


def _tgi_tools() -> Block:
    """The id is a number as text, the reason that of any other answer."""
    function = {"description": None, "name": TOOL, "arguments": SAID}
    call = {"id": "0", "type": "function", "function": function}
    message = {"role": "assistant", "tool_calls": [call]}
    choice = {"message": message, "finish_reason": "stop"}
    return _openai_body("chat.completion", "tgi-test", choice)


def _tgi_tool_events() -> list[bytes]:
    """Each piece has the id; nothing but ``[DONE]`` ends a call, and usage is rare."""
    events = []
    for index, piece in enumerate(PIECES):
        function = {"name": None if index else TOOL, "arguments": piece}
        call = {"index": 0, "id": "0", "type": "function", "function": function}
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "tool_calls": [call]},
            "logprobs": None,
            "finish_reason": None,
        }
        body = {"object": "chat.completion.chunk", "id": "", "created": CREATED}
        more = {"model": "tgi-test", "system_fingerprint": "3", "usage": None}
        events.append(data({**body, **more, "choices": [choice]}))
    return [*events, DONE]


def _tgi_chat_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    texts = texts or [""]  # the end token
    return tgi_chat_chunks(texts, finish, COUNTS if with_usage else None)


def _tgi_completion_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    return tgi_completion_chunks(texts or [""], finish, COUNTS)


def _tgi_native(finish: str) -> list[Block]:
    details = {
        "finish_reason": finish,
        "generated_tokens": COUNTS[1],
        "seed": None,
        "prefill": [],
        "tokens": [],
    }
    return [{"generated_text": TEXT, "details": details}]


def _tgi_native_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    return tgi_generate_events(texts or [""], finish)


TGI_CHAT = Wire(
    model="tgi-test",
    words={"stop": "stop", "length": "length", "tools": "stop"},
    plain=_openai_chat("tgi-test"),
    streamed=_tgi_chat_events,
    tools=(_tgi_tools(), _tgi_tool_events()),
    errors=_tgi_error,
    overload=_tgi_fault(REASON[429]),
    failure=_tgi_fault(FAILURE),
)
TGI_COMPLETIONS = replace(
    TGI_CHAT,
    words={"stop": "eos_token", "length": "length"},
    plain=_openai_completion("tgi-test"),
    streamed=_tgi_completion_events,
    tools=None,
)
TGI_NATIVE = replace(
    TGI_CHAT,
    words={"stop": "eos_token", "length": "length"},
    plain=_tgi_native,
    streamed=_tgi_native_events,
    overload=data({"error": REASON[429], "error_type": "overloaded"}),
    failure=data({"error": FAILURE, "error_type": "generation"}),
    tools=None,
    ends=None,
)


# Anthropic


def _anthropic_body(content: list[Block], reason: str) -> Block:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-test",
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": COUNTS[0], "output_tokens": COUNTS[1]},
    }


def _anthropic_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    return anthropic_events(texts, finish, COUNTS)


def _anthropic_tool_events() -> list[bytes]:
    start, *_, end, stop = anthropic_events([], "tool_use", COUNTS)
    block = {"type": "tool_use", "id": "toolu_1", "name": TOOL, "input": {}}
    begun = {"type": "content_block_start", "index": 0, "content_block": block}
    pieces = [
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "input_json_delta", "partial_json": piece},
        }
        for piece in PIECES
    ]
    events = [begun, *pieces, {"type": "content_block_stop", "index": 0}]
    return [start, *(event(str(e["type"]), e) for e in events), end, stop]


def _anthropic_envelope(kind: str, text: str) -> Block:
    return {"type": "error", "error": {"type": kind, "message": text}}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def _anthropic_error(status: int) -> bytes:
    error = _anthropic_envelope(_ANTHROPIC_TYPES[status], REASON[status])
    return json_reply({**error, "request_id": "req_1"}, status, _headers(status))


ANTHROPIC = Wire(
    model="claude-test",
    words={"stop": "end_turn", "length": "max_tokens", "tools": "tool_use"},
    plain=lambda reason: _anthropic_body([{"type": "text", "text": TEXT}], reason),
    streamed=_anthropic_events,
    tools=(
        _anthropic_body(
            [{"type": "tool_use", "id": "toolu_1", "name": TOOL, "input": ARGUMENTS}],
            "tool_use",
        ),
        _anthropic_tool_events(),
    ),
    errors=_anthropic_error,
    overload=event("error", _anthropic_envelope("overloaded_error", REASON[429])),
    failure=event("error", _anthropic_envelope("api_error", FAILURE)),
)


# Gemini, through the gateway


def _gemini(parts: list[Block], finish: str | None = None) -> Block:
    candidate: Block = {"content": {"role": "model", "parts": parts}}
    chunk: Block = {"candidates": [candidate], "modelVersion": "gemini-test"}
    if finish is not None:
        candidate["finishReason"] = finish
        chunk["usageMetadata"] = {
            "promptTokenCount": COUNTS[0],
            "candidatesTokenCount": COUNTS[1],
            "totalTokenCount": sum(COUNTS),
        }
    return chunk


def _gemini_events(
    texts: list[str], finish: str | None, with_usage: bool
) -> list[bytes]:
    chunks = [_gemini([{"text": text}]) for text in texts]
    if finish is not None:
        chunks.append(_gemini([{"text": ""}], finish))
    return [data(chunk) for chunk in chunks]


_GEMINI_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


def _gemini_fault(code: int, text: str) -> Block:
    error = {"code": code, "message": text, "status": _GEMINI_STATUSES[code]}
    return {"error": error}


_GEMINI_CALL: Block = {"functionCall": {"name": TOOL, "args": ARGUMENTS}}
GEMINI = Wire(
    model="gemini-test",
    words={"stop": "STOP", "length": "MAX_TOKENS", "tools": "STOP"},
    plain=lambda finish: _gemini([{"text": TEXT}], finish),
    streamed=_gemini_events,
    tools=(_gemini([_GEMINI_CALL], "STOP"), [data(_gemini([_GEMINI_CALL], "STOP"))]),
    errors=lambda status: json_reply(
        _gemini_fault(status, REASON[status]), status, _headers(status)
    ),
    overload=data(_gemini_fault(429, REASON[429])),
    failure=data(_gemini_fault(500, FAILURE)),
    ends=None,
)


# --------------------------------------------------------------------- the upstreams


@dataclass(frozen=True)
class Kind:
    """A kind of upstream: how it is configured, and what is asked for there.

    ``wires``: path of the client -> (path at the upstream, wire format there), with
    None for all other clients.
    """

    name: str
    configure: Callable[[str], Block]
    wires: Mapping[str | None, tuple[str, Wire]]


def _openai_like(url: str) -> Block:
    return model_configuration(url)


def _tgi(url: str) -> Block:
    return model_configuration(url, "huggingface-tgi")


def _anthropic(url: str) -> Block:
    return model_configuration(
        url, "anthropic", endpoint=f"{url}/v1/messages", accessToken="sk-up"
    )


def _gateway(url: str) -> Block:
    """The gateway knows its providers by their ids."""
    block = model_configuration(
        url, "sourcegraph", endpoint=url, accessToken="sgd_0123"
    )
    return json.loads(json.dumps(block).replace("acme", "google"))


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KINDS = (
    Kind(
        "huggingface-tgi",
        _tgi,
        {
            None: (CHAT, TGI_CHAT),
            COMPLETIONS: (COMPLETIONS, TGI_COMPLETIONS),
            "/": ("/", TGI_NATIVE),
        },
    ),
    Kind(
        "openaicompatible",
        _openai_like,
        {
            None: (CHAT, OPENAI_CHAT),
            COMPLETIONS: (COMPLETIONS, OPENAI_COMPLETIONS),
            "/": (COMPLETIONS, OPENAI_COMPLETIONS),
        },
    ),
    Kind("anthropic", _anthropic, {None: ("/v1/messages", ANTHROPIC)}),
    Kind("gemini", _gateway, {None: ("/v1/completions/google", GEMINI)}),
)


# ------------------------------------------------------------- what the clients show

# The client's own words; Cody has none and shows the upstream's.
WORDS: dict[str, dict[str, str]] = {
    "openai": OPENAI_WORDS,
    "anthropic": dict(ANTHROPIC.words),
    "tgi": {"stop": "eos_token", "length": "length"},
}
# status of the upstream -> the client's exception and the status that it shows.
# A 401 is the proxy's own affair, never the client's.
Shown: TypeAlias = dict[int, tuple[str, int | None]]
OPENAI_SHOWN: Shown = {
    400: ("openai.BadRequestError", 400),
    401: ("openai.InternalServerError", 502),
    404: ("openai.NotFoundError", 404),
    429: ("openai.RateLimitError", 429),
    500: ("openai.InternalServerError", 500),
    502: ("openai.InternalServerError", 502),
    503: ("openai.InternalServerError", 503),
}
ANTHROPIC_SHOWN: Shown = {
    400: ("anthropic.BadRequestError", 400),
    401: ("anthropic.InternalServerError", 502),
    404: ("anthropic.NotFoundError", 404),
    429: ("anthropic.RateLimitError", 429),
    500: ("anthropic.InternalServerError", 500),
    502: ("anthropic.InternalServerError", 502),
    503: ("anthropic.ServiceUnavailableError", 503),
}
AIOHTTP_SHOWN: Shown = {
    status: ("aiohttp.ClientResponseError", 502 if status == 401 else status)
    for status in (400, 401, 404, 429, 500, 502, 503)
}
HUB_SHOWN: Shown = {
    400: ("huggingface_hub.ValidationError", 422),
    401: ("huggingface_hub.GenerationError", 424),
    404: ("huggingface_hub.GenerationError", 424),
    429: ("huggingface_hub.OverloadedError", 429),
    500: ("huggingface_hub.GenerationError", 424),
    502: ("huggingface_hub.GenerationError", 424),
    503: ("huggingface_hub.UnknownError", 503),
}
TEXT_GENERATION_SHOWN: Shown = {
    status: (kind.replace("huggingface_hub", "text_generation"), None)
    for status, (kind, _) in HUB_SHOWN.items()
}
CODY_STREAMED: Shown = dict.fromkeys(
    (400, 401, 404, 500, 502, 503), ("cody.stream", 200)
)
CODY_STREAMED[429] = ("cody.rate_limit", 429)
CODY_PLAIN: Shown = dict.fromkeys((400, 401, 404, 500, 503), ("cody.http", 503))
CODY_PLAIN |= {429: ("cody.rate_limit", 429), 502: ("cody.http", 502)}


@dataclass(frozen=True)
class Manner:
    """How a client shows things.

    Attributes:
        words:     which of ``WORDS``; "" for the upstream's own.
        shown:     errors of a whole reply.
        streamed:  errors before a stream, where that makes a difference.
        in_stream: an error after the first text.
        cut:       a stream that stops, where it is another one than that.
        prompt_counts: (in one piece, streamed): it shows the prompt's tokens.
    """

    words: str
    shown: Shown
    in_stream: tuple[str, int | None]
    cut: tuple[str, int | None] | None = None
    streamed: Shown | None = None
    prompt_counts: tuple[bool, bool] = (True, True)
    shows_headers: bool = True


def _incomplete(package: str) -> tuple[str, None]:
    return f"{package}.IncompleteGenerationError", None


MANNERS: dict[str, Manner] = {
    "openai chat": Manner("openai", OPENAI_SHOWN, ("openai.APIError", None)),
    "openai completions": Manner("openai", OPENAI_SHOWN, ("openai.APIError", None)),
    # The status is that of the reply, which had begun well.
    "anthropic": Manner(
        "anthropic", ANTHROPIC_SHOWN, ("anthropic.APIStatusError", 200)
    ),
    "huggingface_hub chat_completion": Manner(
        "openai", AIOHTTP_SHOWN, ("huggingface_hub.UnknownError", None)
    ),
    "huggingface_hub text_generation": Manner(
        "tgi",
        HUB_SHOWN,
        ("huggingface_hub.GenerationError", None),
        cut=_incomplete("huggingface_hub"),
        prompt_counts=(False, True),
    ),
    "text_generation": Manner(
        "tgi",
        TEXT_GENERATION_SHOWN,
        ("text_generation.GenerationError", None),
        cut=_incomplete("text_generation"),
        prompt_counts=(False, False),
        shows_headers=False,
    ),
    "cody": Manner("", CODY_PLAIN, ("cody.stream", 200), streamed=CODY_STREAMED),
}


# ------------------------------------------------------------------------ situations


@dataclass
class Cell:
    """One client in front of one upstream."""

    client: Adapter
    kind: Kind
    upstream: ScriptedUpstream
    proxy: RunningProxy
    manner: Manner = field(init=False)
    wire: Wire = field(init=False)
    path: str = field(init=False)

    def __post_init__(self) -> None:
        self.manner = MANNERS[self.client.name]
        self.path, self.wire = wire_of(self.client, self.kind)

    @property
    def url(self) -> str:
        return self.proxy.url

    def finish(self, meaning: str) -> str:
        words = WORDS[self.manner.words] if self.manner.words else self.wire.words
        return words[meaning]

    def answers(self, text: str, meaning: str, *, stream: bool) -> Answer:
        """What the client shows of a good answer."""
        shows_prompt = self.manner.prompt_counts[stream]
        prompt = COUNTS[0] if shows_prompt else None
        model = self.wire.model if self.client.shows_model else None
        if self.wire is TGI_NATIVE:
            model = None
        finish = self.finish(meaning)
        return Answer(text, finish, usage=(prompt, COUNTS[1]), model=model)

    def events(self, finish: str | None = "stop", usage: bool = True) -> list[bytes]:
        word = None if finish is None else self.wire.words[finish]
        return self.wire.streamed(TEXTS, word, usage)

    def check_raised(
        self, raised: Raised, expected: tuple[str, int | None], message: str
    ) -> None:
        assert (raised.type, raised.status) == expected, raised
        assert message in raised.message, raised

    def shown(self, status: int, *, stream: bool) -> tuple[str, int | None]:
        table = self.manner.streamed if stream else None
        return (table or self.manner.shown)[status]


def wire_of(client: Adapter, kind: Kind) -> tuple[str, Wire]:
    return kind.wires.get(client.path) or kind.wires[None]


Play: TypeAlias = Callable[[Cell], Awaitable[str]]


async def plain(cell: Cell) -> str:
    cell.upstream.script(json_reply(cell.wire.plain(cell.wire.words["length"])))
    answer = await cell.client.plain(cell.url)
    assert answer == cell.answers(TEXT, "length", stream=False)
    return "ok"


async def streamed(cell: Cell) -> str:
    asks = cell.client.asks_for_usage
    cell.upstream.script(sse(*cell.events(usage=not asks)))
    answer = await cell.client.streamed(cell.url)
    expected = cell.answers(TEXT, "stop", stream=True)
    if asks:  # it was not asked for; some servers say it all the same
        expected.usage = answer.usage
    assert answer == expected
    return "ok"


async def blank(cell: Cell) -> str:
    """The model has nothing to say: that is an answer, too."""
    events = cell.wire.streamed([], cell.wire.words["stop"], True)
    cell.upstream.script(sse(*events))
    answer = await cell.client.streamed(cell.url)
    assert (answer.text, answer.finish) == ("", cell.finish("stop"))
    return "ok"


async def own_end(cell: Cell) -> str:
    cell.upstream.script(sse(*cell.events()))
    events = await cell.client.events(cell.url)
    assert len(events) >= len(TEXTS)
    return "ok"


async def usage_streamed(cell: Cell) -> str:
    cell.upstream.script(sse(*cell.events("length")))
    answer = await cell.client.streamed(cell.url, usage=True)
    assert answer == cell.answers(TEXT, "length", stream=True)
    return "ok"


def _calls(answer: Answer) -> list[tuple[str, Any]]:
    return [
        (call.name, json.loads(call.arguments)) for call in answer.tool_calls.values()
    ]


async def tools_plain(cell: Cell) -> str:
    assert cell.wire.tools is not None
    cell.upstream.script(json_reply(cell.wire.tools[0]))
    answer = await cell.client.with_tools(cell.url, stream=False)
    assert _calls(answer) == [(TOOL, ARGUMENTS)]
    assert (answer.text, answer.finish) == ("", cell.finish("tools"))
    assert TOOL in cell.upstream.last.body.decode()
    return "ok"


async def tools_streamed(cell: Cell) -> str:
    assert cell.wire.tools is not None
    cell.upstream.script(sse(*cell.wire.tools[1]))
    answer = await cell.client.with_tools(cell.url, stream=True)
    assert _calls(answer) == [(TOOL, ARGUMENTS)]
    finish: str | None = cell.finish("tools")
    if cell.wire is TGI_CHAT and isinstance(cell.client, CodyChat):
        finish = None  # TGI gives no reason, and Cody shows what the upstream gives
    assert (answer.text, answer.finish) == ("", finish)
    return "ok"


async def leaves_stream(cell: Cell) -> str:
    cell.upstream.script(sse(*cell.events(None), Hang()))
    text = await cell.client.close_early(cell.url)
    assert TEXT.startswith(text)
    await cell.upstream.closed()
    return "client_gone"


async def leaves_waiting(cell: Cell) -> str:
    cell.upstream.script(Hang())
    waiting = asyncio.create_task(cell.client.plain(cell.url))
    await cell.upstream.received()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await cell.upstream.closed()
    return "client_gone"


def status(code: int, *, stream: bool) -> Play:
    async def play(cell: Cell) -> str:
        cell.upstream.script(cell.wire.errors(code))
        raised = await cell.client.error(cell.url, stream=stream)
        # TGI says nothing with a 401 and a 404.
        silent = cell.wire.errors is _tgi_error and code in (401, 404)
        message = f"status code {code}" if silent else REASON[code]
        expected = cell.shown(code, stream=stream)
        if cell.wire.errors is _tgi_error and code == 500 and cell.manner.cut:
            # TGI's own word for it is kept for its own clients.
            expected = cell.manner.cut[0], expected[1] and 500
        cell.check_raised(raised, expected, message)
        assert raised.status not in (401, 403)
        if code == 429 and cell.manner.shows_headers:
            assert raised.retry_after == RETRY_AFTER
        return "upstream_status"

    return play


async def error_first(cell: Cell) -> str:
    cell.upstream.script(sse(cell.wire.overload))
    raised = await cell.client.error(cell.url, stream=True)
    cell.check_raised(raised, cell.shown(429, stream=True), REASON[429])
    return "upstream_reported"


async def error_later(cell: Cell) -> str:
    cell.upstream.script(sse(*cell.events(None), cell.wire.failure))
    raised = await cell.client.error(cell.url, stream=True)
    cell.check_raised(raised, cell.manner.in_stream, FAILURE)
    assert raised.text == TEXT
    return "upstream_reported"


def cut(*end: Step) -> Play:
    async def play(cell: Cell) -> str:
        cell.upstream.script(sse(*cell.events(None), *end))
        raised = await cell.client.error(cell.url, stream=True)
        expected = cell.manner.cut or cell.manner.in_stream
        cell.check_raised(raised, expected, "before the end of the reply")
        assert raised.text == TEXT
        return "upstream_truncated"

    return play


async def no_end(cell: Cell) -> str:
    """After the finish reason nothing but the mark of the end is missing."""
    assert cell.wire.ends is not None
    events = cell.events()[: -cell.wire.ends]
    cell.upstream.script(sse(*events))
    if cell.wire is ANTHROPIC:
        # There every reply ends with message_stop, so something cut it.
        raised = await cell.client.error(cell.url, stream=True)
        expected = cell.manner.cut or cell.manner.in_stream
        cell.check_raised(raised, expected, "before the end of the reply")
        return "upstream_truncated"
    answer = await cell.client.streamed(cell.url)
    assert (answer.text, answer.finish) == (TEXT, cell.finish("stop"))
    return "ok"


async def only_end(cell: Cell) -> str:
    """What TGI sends if a tool call never parses, others if they give up early."""
    assert cell.wire.ends is not None
    events = cell.events()[-cell.wire.ends :]
    cell.upstream.script(sse(*events))
    raised = await cell.client.error(cell.url, stream=True)
    expected = cell.shown(502, stream=True)
    cell.check_raised(raised, expected, "upstream ended the stream without an answer")
    return "upstream_reported"


def empty(*, stream: bool) -> Play:
    nothing = sse() if stream else [reply(200, {"Content-Type": "application/json"})]

    async def play(cell: Cell) -> str:
        cell.upstream.script(nothing)
        raised = await cell.client.error(cell.url, stream=stream)
        expected = cell.shown(502, stream=stream)
        if stream and cell.manner.cut:
            expected = cell.manner.cut[0], expected[1] and 500
        message = "stream closed with no events" if stream else "upstream sent"
        cell.check_raised(raised, expected, message)
        return "upstream_truncated" if stream else "upstream_garbled"

    return play


STATUSES = (400, 401, 404, 429, 500, 503)
SITUATIONS: dict[str, Play] = {
    "plain": plain,
    "streamed": streamed,
    "streamed, no text": blank,
    "streamed, end seen by another reader": own_end,
    "usage streamed": usage_streamed,
    "tools plain": tools_plain,
    "tools streamed": tools_streamed,
    "client leaves a stream": leaves_stream,
    "client leaves before the reply": leaves_waiting,
    **{f"{code} plain": status(code, stream=False) for code in STATUSES},
    **{f"{code} streamed": status(code, stream=True) for code in STATUSES},
    "error as first event": error_first,
    "error after text": error_later,
    "stream cut by its connection": cut(Close()),
    "stream cut in good order": cut(),
    "stream without its end mark": no_end,
    "nothing but the end mark": only_end,
    "empty reply plain": empty(stream=False),
    "empty reply streamed": empty(stream=True),
}


def not_applicable(client: Adapter, kind: Kind, situation: str) -> str:
    """Why there is nothing to see, or ""."""
    _, wire = wire_of(client, kind)
    if situation.startswith("tools") and not client.has_tools:
        return "this API has no tools"
    if situation == "usage streamed" and not client.asks_for_usage:
        return 'it cannot ask: usage is always there, see "streamed"'
    if situation.endswith("end mark") and wire.ends is None:
        return "the last piece of the answer is the end: there is no mark after it"
    return ""


# ------------------------------------------------------------------------ the matrix

Case: TypeAlias = tuple[Adapter, Kind, str]
ALL: list[Case] = [
    (client, kind, situation)
    for client in CLIENTS
    for kind in KINDS
    for situation in SITUATIONS
]
CASES = [case for case in ALL if not not_applicable(*case)]


def case_id(client: Adapter, kind: Kind, situation: str) -> str:
    return f"{client.name} | {kind.name} | {situation}"


@contextlib.asynccontextmanager
async def cell_of(client: Adapter, kind: Kind) -> AsyncIterator[Cell]:
    async with ScriptedUpstream() as upstream:
        settings = load({"modelConfiguration": kind.configure(upstream.url)})
        async with running(settings) as proxy:
            yield Cell(client, kind, upstream, proxy)
        await upstream.idle()
    # SDKs leave it to the loop to close the generators that they gave up.
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _over(proxy: RunningProxy) -> None:
    """Wait until the request is over for the proxy, too."""
    for _ in range(200):
        if proxy.outcomes:
            return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("client", "kind", "situation"), CASES, ids=[case_id(*case) for case in CASES]
)
async def test_matrix(client: Adapter, kind: Kind, situation: str):
    async with cell_of(client, kind) as cell:
        expected = await SITUATIONS[situation](cell)
        await _over(cell.proxy)
    (outcome,) = cell.proxy.outcomes
    assert outcome["kind"] == expected, outcome
    (request,) = cell.upstream.requests
    assert request.path == cell.path


def table(failed: Collection[str] = ()) -> str:
    """Return the matrix in Markdown: situations passed, of how many, and n/a.

    Args: failed: ids of the cases that did not pass.
    """
    head = ["client", *(kind.name for kind in KINDS)]
    rows = [head, ["---"] * len(head)]
    rows += [
        [client.name, *(_count(client, kind, failed) for kind in KINDS)]
        for client in CLIENTS
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _count(client: Adapter, kind: Kind, failed: Collection[str]) -> str:
    ids = [case_id(*case) for case in CASES if case[:2] == (client, kind)]
    absent = len(SITUATIONS) - len(ids)
    passed = sum(id not in failed for id in ids)
    return f"{passed}/{len(ids)}" + (f" ({absent} n/a)" if absent else "")


if __name__ == "__main__":
    sys.exit(main(__file__, table))
