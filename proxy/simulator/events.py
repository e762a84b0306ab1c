"""The bytes of TGI's replies: one function per route, for streams and for bodies.

The keys of every object stand in the order in which TGI writes them.

Source: https://github.com/huggingface/text-generation-inference, router/src/server.rs,
router/src/chat.rs and router/src/lib.rs
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TypeAlias

import msgspec

from proxy.simulator.generation import Finish, Generation, Result
from proxy.simulator.requests import Refusal, tool_error
from proxy.simulator.tokens import Token

VERSION = "3.3.6"
FINGERPRINT = f"{VERSION}-native"

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"

# How many tokens have to be generated before the event can be sent, and the event.
Step: TypeAlias = tuple[int, bytes]

_encode = msgspec.json.encode


def frame(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def _usage(results: Sequence[Generation]) -> Usage:
    prompt = sum(result.input_length for result in results)
    completion = sum(len(result.tokens) for result in results)
    return Usage(prompt, completion, prompt + completion)


def _reason(finish: Finish) -> str:
    return "stop" if finish == "eos_token" else finish


# --- /generate, /generate_stream -----------------------------------------------------


class StreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(msgspec.Struct):
    index: int
    token: Token
    generated_text: str | None
    details: StreamDetails | None


class Details(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[Token]
    tokens: list[Token]


class GenerateResponse(msgspec.Struct, omit_defaults=True):
    generated_text: str
    details: Details | None = None


def generate_events(result: Result, prompt: str, details: bool) -> Iterator[Step]:
    """TGI's own stream: no end mark, the whole text in the last event.

    Args: prompt: what to put before that text, if it was asked for.
    """
    if isinstance(result, Refusal):
        yield 0, frame(result.native())
        return
    count = len(result.tokens)
    for index, token in enumerate(result.tokens, 1):
        event = StreamResponse(index, token, None, None)
        if index == count:
            event.generated_text = prompt + result.text
            if details:
                event.details = StreamDetails(
                    result.finish, count, result.seed, result.input_length
                )
        yield 1, frame(_encode(event))


def generate_body(result: Generation, prompt: str, details: bool) -> GenerateResponse:
    body = GenerateResponse(prompt + result.text)
    if details:
        body.details = Details(
            result.finish, len(result.tokens), result.seed, [], result.tokens
        )
    return body


# --- /v1/completions -----------------------------------------------------------------


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: None
    finish_reason: str


class CompletionChunk(msgspec.Struct, tag_field="object", tag="text_completion"):
    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str


class CompletionFinal(msgspec.Struct, tag_field="object", tag="text_completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


def completion_events(
    results: Sequence[Result], model: str, created: int
) -> Iterator[Step]:
    """The streams of all prompts, interleaved; one end mark for all of them."""
    streams = [
        _completion_payloads(index, result, model, created)
        for index, result in enumerate(results)
    ]
    for row in zip_longest(*streams):
        step = 1
        for payload in row:
            if payload is not None:
                yield step, frame(payload)
                step = 0  # the others were generated in the same step
    yield 0, DONE


def _completion_payloads(
    index: int, result: Result, model: str, created: int
) -> Iterator[bytes]:
    if isinstance(result, Refusal):
        yield result.openai()
        return
    *first, last = result.tokens
    for token in first:
        choices = [CompletionChoice(index, token.text, None, "")]
        yield _encode(CompletionChunk("", created, choices, model, FINGERPRINT))
    # The text of the end token goes out like any other: `</s>` leaks.
    choices = [CompletionChoice(index, last.text, None, result.finish)]
    usage = _usage([result])
    yield _encode(CompletionFinal("", created, model, FINGERPRINT, choices, usage))


def completion_body(
    results: Sequence[Generation], model: str, created: int
) -> CompletionFinal:
    choices = [
        CompletionChoice(index, result.text, None, _reason(result.finish))
        for index, result in enumerate(results)
    ]
    return CompletionFinal("", created, model, FINGERPRINT, choices, _usage(results))


# --- /v1/chat/completions ------------------------------------------------------------


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float


class Logprob(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct):
    content: list[Logprob]


class TextMessage(msgspec.Struct):
    role: str
    content: str


class FunctionDelta(msgspec.Struct):
    name: str | None
    arguments: str


class ToolCallDelta(msgspec.Struct):
    index: int
    id: str
    type: str
    function: FunctionDelta


class ToolDelta(msgspec.Struct):
    role: str
    tool_calls: list[ToolCallDelta]


class ChunkChoice(msgspec.Struct):
    index: int
    delta: TextMessage | ToolDelta
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatChunk(msgspec.Struct, tag_field="object", tag="chat.completion.chunk"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None


class CalledFunction(msgspec.Struct):
    description: None
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    type: str
    function: CalledFunction


class ToolMessage(msgspec.Struct):
    role: str
    tool_calls: list[ToolCall]


class BodyChoice(msgspec.Struct):
    index: int
    message: TextMessage | ToolMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatBody(msgspec.Struct, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[BodyChoice]
    usage: Usage


class PlannedCall(msgspec.Struct):
    """The tool call that the tokens of a generation spell.

    TGI holds back the first ``head`` tokens, until it knows the name. The token at
    ``close`` ends the call; it closes the object around it, too.
    """

    id: str
    name: str
    arguments: str
    head: int
    close: int

    def piece(self, index: int, token: Token) -> str | None:
        """What becomes of a token: a piece of the arguments, or nothing."""
        if index < self.head - 1 or token.special:
            return None
        return {self.head - 1: "{", self.close: "}"}.get(index, token.text)


class ChatShape(msgspec.Struct):
    """What all chunks of one reply have in common, and what was asked for."""

    model: str
    created: int
    tokens_per_s: float
    logprobs: bool = False
    usage: bool = False
    call: PlannedCall | None = None


def chat_events(result: Result, shape: ChatShape) -> Iterator[Step]:
    if isinstance(result, Refusal):
        yield 0, frame(result.openai())
    else:
        yield from _token_events(result, shape)
        if shape.usage:
            chunk = _chunk(shape, len(result.tokens), [])
            chunk.usage = _usage([result])
            yield 0, frame(_encode(chunk))
    yield 0, DONE


def _token_events(result: Generation, shape: ChatShape) -> Iterator[Step]:
    waited, last = 0, len(result.tokens) - 1
    for index, token in enumerate(result.tokens):
        waited += 1
        delta = _delta(index, token, shape.call)
        if delta is None:
            continue
        finish = _reason(result.finish) if index == last else None
        logprobs = _logprobs([token]) if shape.logprobs else None
        choice = ChunkChoice(0, delta, logprobs, finish)
        yield waited, frame(_encode(_chunk(shape, index, [choice])))
        waited = 0


def _delta(
    index: int, token: Token, call: PlannedCall | None
) -> TextMessage | ToolDelta | None:
    """What a chunk says; the role is in every one of them.

    A finished call has no chunk with a finish reason: TGI's parser of calls swallows
    the end token, and ``[DONE]`` is all that tells the end.
    """
    if call is None:
        return TextMessage("assistant", "" if token.special else token.text)
    piece = call.piece(index, token)
    if piece is None:
        return None
    name = call.name if index == call.head - 1 else None
    function = FunctionDelta(name, piece)
    return ToolDelta("assistant", [ToolCallDelta(0, call.id, "function", function)])


def _chunk(shape: ChatShape, index: int, choices: list[ChunkChoice]) -> ChatChunk:
    # TGI reads the clock for every chunk, so `created` grows while it speaks.
    age = index / shape.tokens_per_s if shape.tokens_per_s else 0
    created = shape.created + int(age)
    return ChatChunk("", created, shape.model, FINGERPRINT, choices, None)


def _logprobs(produced: Sequence[Token]) -> Logprobs:
    return Logprobs([Logprob(token.text, token.logprob, []) for token in produced])


def chat_body(result: Generation, shape: ChatShape) -> ChatBody | Refusal:
    message: TextMessage | ToolMessage = TextMessage("assistant", result.text)
    if shape.call is not None:
        if result.finish != "eos_token":
            text = f"Failed to parse generated text: EOF while parsing {result.text!r}"
            return tool_error(text)
        function = CalledFunction(None, shape.call.name, shape.call.arguments)
        message = ToolMessage("assistant", [ToolCall("0", "function", function)])
    logprobs = _logprobs(result.tokens) if shape.logprobs else None
    choice = BodyChoice(0, message, logprobs, _reason(result.finish))
    usage = _usage([result])
    return ChatBody("", shape.created, shape.model, FINGERPRINT, [choice], usage)
