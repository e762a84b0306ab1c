"""Google's Gemini, as upstream: requests to build, replies to read.

Source: https://ai.google.dev/api/generate-content.
"""

import msgspec

from proxy.completion import (
    CompletionRequest,
    Delta,
    Finish,
    ImagePart,
    Message,
    Part,
    Start,
    Text,
    TextPart,
    Thinking,
    ToolCall,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from proxy.dialects.base import Reader, decode_typed, dump
from proxy.dialects.fault import decode_arguments
from proxy.errors import InvalidPrompt, UpstreamReported
from proxy.sse import Event

MAX_STOPS = 5

# --------------------------------------------------------------------------- requests


class _Content(msgspec.Struct, omit_defaults=True):
    parts: list[dict[str, object]]
    role: str = ""


class _Generation(msgspec.Struct, kw_only=True, omit_defaults=True):
    temperature: float | None = None
    topP: float | None = None
    topK: int | None = None
    maxOutputTokens: int | None = None
    stopSequences: list[str] | None = None


class _Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    contents: list[_Content]
    generationConfig: _Generation
    systemInstruction: _Content | None = None
    tools: list[dict[str, object]] | None = None
    # Only Cody Gateway wants these in the body; elsewhere the URL says them.
    model: str | None = None
    stream: bool | None = None


_encode = msgspec.json.Encoder().encode


def build_generate(request: CompletionRequest, *, via_gateway: bool = False) -> bytes:
    """Return the body of a call of ``:generateContent`` or ``:streamGenerateContent``.

    Raises: InvalidPrompt: messages that the API would refuse.
    """
    system, messages = _split_system(request.messages)
    body = _Body(
        contents=_merge(messages),
        generationConfig=_Generation(
            temperature=request.temperature,
            topP=request.top_p,
            topK=request.top_k,
            maxOutputTokens=request.max_tokens,
            stopSequences=request.stop[:MAX_STOPS] or None,
        ),
        systemInstruction=_Content([{"text": system.text}]) if system else None,
        tools=_tools(request),
    )
    if via_gateway:
        body.model, body.stream = request.model, request.stream
    return _encode(body)


def _split_system(messages: list[Message]) -> tuple[Message | None, list[Message]]:
    system = messages[0] if messages and messages[0].role == "system" else None
    rest = messages[1:] if system else messages
    if any(message.role == "system" for message in rest):
        raise InvalidPrompt("system role can only be used in the first message")
    if not rest:
        raise InvalidPrompt("found zero messages in prompt")
    if any(message.is_empty for message in messages):
        raise InvalidPrompt("message content cannot be empty")
    return system, rest


def _merge(messages: list[Message]) -> list[_Content]:
    names = {
        part.id: part.name
        for message in messages
        for part in message.parts
        if isinstance(part, ToolCallPart)
    }
    contents: list[_Content] = []
    for message in messages:
        role = "model" if message.role == "assistant" else "user"
        parts = [_part(part, names) for part in message.parts]
        if contents and contents[-1].role == role:
            contents[-1].parts.extend(parts)
        else:
            contents.append(_Content(parts, role))
    return contents


def _part(part: Part, names: dict[str, str]) -> dict[str, object]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    if isinstance(part, ImagePart):
        return _image(part.url)
    if isinstance(part, ToolResultPart):
        name = names.get(part.id, part.id)
        response = {"content": part.content}
        return {"functionResponse": {"name": name, "response": response}}
    args = decode_arguments(part.arguments)
    return {"functionCall": {"name": part.name, "args": args}}


def _image(url: str) -> dict[str, object]:
    if not url.startswith("data:"):
        return {"fileData": {"fileUri": url}}
    head, _, data = url[len("data:") :].partition(",")
    return {"inlineData": {"mimeType": head.partition(";")[0], "data": data}}


def _tools(request: CompletionRequest) -> list[dict[str, object]] | None:
    declarations = []
    for tool in request.tools:
        declaration: dict[str, object] = {"name": tool.name}
        if tool.description is not None:
            declaration["description"] = tool.description
        if tool.parameters is not None:
            declaration["parameters"] = tool.parameters
        declarations.append(declaration)
    return [{"functionDeclarations": declarations}] if declarations else None


# ---------------------------------------------------------------------------- replies


class _FunctionCall(msgspec.Struct):
    name: str = ""
    args: dict[str, object] = {}


class _Part(msgspec.Struct):
    text: str = ""
    thought: bool = False
    functionCall: _FunctionCall | None = None


class _Parts(msgspec.Struct):
    parts: list[_Part] = []


class _Candidate(msgspec.Struct):
    index: int = 0
    content: _Parts | None = None
    finishReason: str | None = None


class _UsageMetadata(msgspec.Struct):
    promptTokenCount: int = 0
    candidatesTokenCount: int = 0
    thoughtsTokenCount: int = 0
    cachedContentTokenCount: int | None = None


class _Feedback(msgspec.Struct):
    blockReason: str | None = None


class _Chunk(msgspec.Struct):
    candidates: list[_Candidate] = []
    usageMetadata: _UsageMetadata | None = None
    promptFeedback: _Feedback | None = None
    modelVersion: str = ""
    responseId: str = ""
    error: object = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_chunks = msgspec.json.Decoder(list[_Chunk]).decode


class GeminiReader(Reader):
    """Reads ``alt=sse`` streams and whole replies; a whole reply may be an array.

    The stream has no end marker: it is complete when a finish reason was seen.
    """

    def __init__(self) -> None:
        self._calls = 0

    def read(self, event: Event, out: list[Delta]) -> None:
        chunk = decode_typed(event.data, _Chunk, _decode_chunk)
        if chunk is None:
            self.read_odd(event)
            return
        known = chunk.candidates or chunk.usageMetadata or chunk.promptFeedback
        if event.type == "error" or chunk.error or not known:
            self.read_odd(event)
        else:
            self._read_chunk(chunk, out)

    def read_body(self, body: bytes) -> list[Delta]:
        out: list[Delta] = []
        if body.lstrip().startswith(b"["):
            chunks = decode_typed(body, list[_Chunk], _decode_chunks) or []
        else:
            chunk = decode_typed(body, _Chunk, _decode_chunk)
            chunks = [chunk] if chunk is not None else []
        for chunk in chunks:
            if chunk.error:
                raise self.odd_body(body, "candidates")
            self._read_chunk(chunk, out)
        if not self.understood:
            raise self.odd_body(body, "candidates")
        if not self.finished:
            out.append(Finish(""))
        self.finished = self.ended = True
        return out

    def _read_chunk(self, chunk: _Chunk, out: list[Delta]) -> None:
        feedback = chunk.promptFeedback
        if feedback is not None and feedback.blockReason and not chunk.candidates:
            raise UpstreamReported(
                f"Google: the prompt was blocked: {feedback.blockReason}",
                type=feedback.blockReason,
                status=400,
            )
        if (chunk.candidates or chunk.usageMetadata) and not self.understood:
            self.understood = True
            self.model = chunk.modelVersion
            out.append(Start(chunk.responseId, chunk.modelVersion))
        if chunk.usageMetadata is not None:
            self._read_usage(chunk.usageMetadata)
        for candidate in chunk.candidates:
            if candidate.index == 0 and not self.finished:
                self._read_candidate(candidate, out)

    def _read_candidate(self, candidate: _Candidate, out: list[Delta]) -> None:
        for part in candidate.content.parts if candidate.content else ():
            if part.functionCall is not None:
                out.append(self._tool_call(part.functionCall))
            elif part.text:
                out.append(Thinking(part.text) if part.thought else Text(part.text))
        if candidate.finishReason:
            self.finished = True
            out.append(Finish(candidate.finishReason))

    def _tool_call(self, call: _FunctionCall) -> ToolCall:
        number = self._calls
        self._calls += 1
        arguments = dump(call.args)
        return ToolCall(number, f"call_{number}", call.name, arguments)

    def _read_usage(self, usage: _UsageMetadata) -> None:
        self.usage = Usage(
            usage.promptTokenCount,
            usage.candidatesTokenCount + usage.thoughtsTokenCount,
            usage.cachedContentTokenCount,
        )
