"""Google's Gemini, as clients of Cody Gateway speak it: its ``/v1/completions/google``.

The body says ``model`` and ``stream``, which are in the URL elsewhere.

Source: https://ai.google.dev/api/generate-content.
"""

from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii as _quote

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
    Tool,
    ToolCall,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from proxy.dialects.base import (
    EVENT_STREAM,
    JSON,
    RETRY_AFTER_S,
    Head,
    Reply,
    Writer,
    at_least_zero,
    client_status,
    dump,
    error_headers,
    positive,
)
from proxy.dialects.fault import decode_lenient
from proxy.errors import (
    InvalidRequest,
    ProxyError,
)

# ----------------------------------------------------------------------- request body


class _Blob(msgspec.Struct):
    mimeType: str = ""
    data: str = ""


class _FileData(msgspec.Struct):
    mimeType: str = ""
    fileUri: str = ""


class _FunctionCall(msgspec.Struct):
    name: str = ""
    args: dict[str, object] | None = None
    id: str | None = None


class _FunctionResponse(msgspec.Struct):
    name: str = ""
    response: object = None
    id: str | None = None


class _Part(msgspec.Struct):
    """Every kind of part at once: unknown kinds must not be an error."""

    text: str | None = None
    thought: bool | None = None
    inlineData: _Blob | None = None
    fileData: _FileData | None = None
    functionCall: _FunctionCall | None = None
    functionResponse: _FunctionResponse | None = None


class _Content(msgspec.Struct):
    role: str | None = None
    parts: list[_Part] | None = None


class _GenerationConfig(msgspec.Struct):
    """``object`` is what only gets its name noted."""

    temperature: float | None = None
    topP: float | None = None
    topK: float | None = None
    maxOutputTokens: float | None = None
    stopSequences: list[str] | None = None
    seed: int | None = None
    presencePenalty: float | None = None
    frequencyPenalty: float | None = None
    candidateCount: int | None = None
    responseMimeType: str | None = None
    responseSchema: object = None
    responseJsonSchema: object = None
    responseModalities: object = None
    responseLogprobs: bool | None = None
    thinkingConfig: object = None


class _Declaration(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None


class _Tool(msgspec.Struct):
    functionDeclarations: list[_Declaration] | None = None


class _CallingConfig(msgspec.Struct):
    mode: str | None = None
    allowedFunctionNames: list[str] | None = None


class _ToolConfig(msgspec.Struct):
    functionCallingConfig: _CallingConfig | None = None


class _Body(msgspec.Struct):
    contents: list[_Content] | None = None
    systemInstruction: _Content | None = None
    generationConfig: _GenerationConfig | None = None
    tools: list[_Tool] | None = None
    toolConfig: _ToolConfig | None = None
    cachedContent: object = None
    model: str | None = None
    stream: bool | None = None


_decode_body = msgspec.json.Decoder(_Body).decode


def _decode(body: bytes) -> _Body:
    try:
        return _decode_body(body)
    except RecursionError:
        raise InvalidRequest(
            "failed to parse request body: nested too deeply"
        ) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"failed to parse request body: {error}") from None


# --------------------------------------------------------------------------- messages

# Others stay as they are: whoever checks the messages quotes them.
_ROLES = {None: "user", "": "user", "function": "user", "model": "assistant"}
# Where functions' results usually are; Google's documentation names "output".
_RESULT_KEYS = ("output", "result", "content")


class _Parts:
    """Turns the parts of one request into ours, in order.

    Gemini matches a result with its call by the name of the function; everybody else
    by an id, so each call gets one here.
    """

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self._calls = 0
        self._open: dict[str, list[str]] = {}  # name -> ids without a result

    def convert(self, wires: Iterable[_Part]) -> list[Part]:
        parts = (self._part(wire) for wire in wires)
        return [part for part in parts if part is not None]

    def _part(self, wire: _Part) -> Part | None:
        if wire.functionCall is not None:
            return self._call(wire.functionCall)
        if wire.functionResponse is not None:
            return self._result(wire.functionResponse)
        if wire.inlineData is not None:
            blob = wire.inlineData
            url = f"data:{blob.mimeType};base64,{blob.data}"
            return self._image("inlineData", blob.mimeType, url)
        if wire.fileData is not None:
            file = wire.fileData
            return self._image("fileData", file.mimeType, file.fileUri)
        if wire.text is None or wire.thought:  # thoughts are of no use to others
            return None
        return TextPart(wire.text)

    def _image(self, field: str, mime_type: str, url: str) -> Part | None:
        if not mime_type or mime_type.startswith("image/"):
            return ImagePart(url)
        self.dropped.append(field)  # sound, films, documents
        return None

    def _call(self, wire: _FunctionCall) -> Part:
        call_id = wire.id or f"call_{self._calls}"
        self._calls += 1
        self._open.setdefault(wire.name, []).append(call_id)
        return ToolCallPart(call_id, wire.name, _encode_text(wire.args or {}))

    def _result(self, wire: _FunctionResponse) -> Part:
        waiting = self._open.get(wire.name) or [wire.id or wire.name]
        call_id = wire.id if wire.id in waiting else waiting[0]
        waiting.remove(call_id)
        return ToolResultPart(call_id, _result_text(wire.response))


def _result_text(response: object) -> str:
    if isinstance(response, dict) and len(response) == 1:
        for key in _RESULT_KEYS:
            if isinstance(text := response.get(key), str):
                return text
    return _encode_text(response)


def _encode_text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _messages(wire: _Body, parts: _Parts) -> list[Message]:
    messages = []
    if wire.systemInstruction is not None:
        system = parts.convert(wire.systemInstruction.parts or ())
        messages.append(Message("system", system))
    for content in wire.contents or ():
        role = _ROLES.get(content.role, content.role or "")
        messages.append(Message(role, parts.convert(content.parts or ())))
    return messages


# ---------------------------------------------------------------------------- request

# Settings without a neutral word, each with the values that change nothing.
_UNSAID: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("candidateCount", (None, 1)),
    ("responseMimeType", (None, "", "text/plain")),
    ("responseSchema", (None,)),
    ("responseJsonSchema", (None,)),
    ("responseModalities", (None, [], ["TEXT"])),
    ("responseLogprobs", (None, False)),
    ("thinkingConfig", (None,)),
)
_TOOL_CHOICES = {"AUTO": "auto", "NONE": "none", "ANY": "required"}


def _request(wire: _Body) -> CompletionRequest:
    config = wire.generationConfig or _GenerationConfig()
    parts = _Parts()
    top_p = config.topP
    return CompletionRequest(
        feature="chat",
        messages=_messages(wire, parts),
        model=(wire.model or "").strip().removeprefix("models/"),
        stream=bool(wire.stream),
        max_tokens=positive(config.maxOutputTokens),
        temperature=at_least_zero(config.temperature),
        top_p=top_p if top_p is not None and 0 < top_p < 1 else None,
        top_k=positive(config.topK),
        stop=list(dict.fromkeys(stop for stop in config.stopSequences or () if stop)),
        tools=[
            Tool(declared.name, declared.description, declared.parameters)
            for tool in wire.tools or ()
            for declared in tool.functionDeclarations or ()
        ],
        tool_choice=_tool_choice(wire.toolConfig),
        seed=config.seed,
        presence_penalty=config.presencePenalty,
        frequency_penalty=config.frequencyPenalty,
        dropped=list(dict.fromkeys([*_dropped(wire, config), *parts.dropped])),
    )


def _dropped(wire: _Body, config: _GenerationConfig) -> list[str]:
    dropped = [name for name, idle in _UNSAID if getattr(config, name) not in idle]
    if wire.cachedContent is not None:
        dropped.append("cachedContent")
    if any(tool.functionDeclarations is None for tool in wire.tools or ()):
        dropped.append("tools")  # Google's own: its search, its interpreter
    return dropped


def _tool_choice(wire: _ToolConfig | None) -> str | None:
    calling = wire.functionCallingConfig if wire is not None else None
    if calling is None:
        return None
    names = calling.allowedFunctionNames or ()
    if calling.mode == "ANY" and len(names) == 1:
        return names[0]
    return _TOOL_CHOICES.get(calling.mode or "")


class GenerateContent:
    """``/v1/completions/google``."""

    dialect = "gemini"

    def check(self, head: Head) -> None:
        pass

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        request = _request(_decode(body))
        return request, ContentWriter(request.model)

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)


# ---------------------------------------------------------------------------- replies

_STREAM_HEADERS = {"Content-Type": EVENT_STREAM, "Cache-Control": "no-cache"}

# Other vendors' words; Google's own go through. Whatever else an upstream says, the
# answer is complete.
_FINISH_WORDS = {
    "length": "MAX_TOKENS",
    "max_tokens": "MAX_TOKENS",
    "model_length": "MAX_TOKENS",
    "model_context_window_exceeded": "MAX_TOKENS",
    "content_filter": "SAFETY",
    "refusal": "SAFETY",
} | {
    word: word
    for word in (
        "MAX_TOKENS",
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "MALFORMED_FUNCTION_CALL",
        "OTHER",
    )
}


def _frame(value: object) -> str:
    return f"data: {dump(value)}\n\n"


class ContentWriter:
    """Args: model: what to call it until the upstream names it."""

    stream_headers: Mapping[str, str] = _STREAM_HEADERS

    def __init__(self, model: str) -> None:
        self._start = Start("", model)
        self._finish = ""
        self._usage: Usage | None = None
        self._calls: dict[int, ToolCall] = {}
        self._tail = self._new_tail()

    def frames(self, deltas: list[Delta]) -> bytes:
        out = []
        for delta in deltas:
            if type(delta) is Text:
                out.append(self._chunk(f'{{"text":{_quote(delta.text)}}}'))
            elif type(delta) is Thinking:
                text = _quote(delta.text)
                out.append(self._chunk(f'{{"text":{text},"thought":true}}'))
            else:
                self._note(delta)
        return "".join(out).encode("ascii")

    def _chunk(self, part: str) -> str:
        return (
            'data: {"candidates":[{"content":{"role":"model","parts":['
            f"{part}{self._tail}"
        )

    def _new_tail(self) -> str:
        return f']}},"index":0}}],{dump(self._names())[1:]}\n\n'

    def _names(self) -> dict[str, object]:
        return {"modelVersion": self._start.model, "responseId": self._start.id}

    def _note(self, delta: Delta) -> None:
        if isinstance(delta, Start):
            self._start = Start(delta.id, delta.model or self._start.model)
            self._tail = self._new_tail()
        elif isinstance(delta, Finish):
            self._finish = delta.reason
        elif isinstance(delta, Usage):
            self._usage = delta
        elif isinstance(delta, ToolCall):
            # Gemini knows no pieces of a call.
            before = self._calls.get(delta.index)
            arguments = (before.arguments if before else "") + delta.arguments
            self._calls[delta.index] = ToolCall(
                delta.index, delta.id, delta.name, arguments
            )

    def keep_alive(self) -> bytes:
        return b""  # its clients take every event for a part of the answer

    def literals(self, texts: list[bytes]) -> bytes | None:
        return None

    def end(self) -> bytes:
        # Clients look for the text of the first part without asking if there is one.
        parts = self._call_parts() or [{"text": ""}]
        return _frame(self._reply(parts)).encode("ascii")

    def error(self, error: ProxyError) -> bytes:
        return _frame(_error(error)).encode("ascii")

    def body(self, deltas: list[Delta]) -> bytes:
        for delta in deltas:
            self._note(delta)
        parts = [*_text_parts(deltas), *self._call_parts()]
        return dump(self._reply(parts or [{"text": ""}])).encode("ascii")

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)

    def _reply(self, parts: list[dict[str, object]]) -> dict[str, object]:
        candidate = {
            "content": {"role": "model", "parts": parts},
            "finishReason": _FINISH_WORDS.get(self._finish, "STOP"),
            "index": 0,
        }
        usage = {"usageMetadata": _usage(self._usage)} if self._usage else {}
        return {"candidates": [candidate], **usage, **self._names()}

    def _call_parts(self) -> list[dict[str, object]]:
        return [
            {"functionCall": {"name": call.name, "args": _args(call.arguments)}}
            for call in self._calls.values()
        ]


def _args(arguments: str) -> dict[str, object]:
    value = decode_lenient(arguments)
    return value if isinstance(value, dict) else {}


def _text_parts(deltas: list[Delta]) -> list[dict[str, object]]:
    """One part for each run of text, and of thoughts."""
    runs: list[tuple[type, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, Text | Thinking):
            if not runs or runs[-1][0] is not type(delta):
                runs.append((type(delta), []))
            runs[-1][1].append(delta.text)
    return [
        {"text": "".join(texts)} | ({"thought": True} if kind is Thinking else {})
        for kind, texts in runs
    ]


def _usage(usage: Usage) -> dict[str, int]:
    wire = {
        "promptTokenCount": usage.prompt_tokens,
        "candidatesTokenCount": usage.completion_tokens,
        "totalTokenCount": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        wire["cachedContentTokenCount"] = usage.cached_tokens
    return wire


# ----------------------------------------------------------------------------- errors

# https://cloud.google.com/apis/design/errors, by the status of the reply.
_STATUS_WORDS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    504: "DEADLINE_EXCEEDED",
}


def _error(error: ProxyError) -> dict[str, dict[str, object]]:
    code = _code(error)
    default = "FAILED_PRECONDITION" if code < 500 else "UNAVAILABLE"
    status = _STATUS_WORDS.get(code, default)
    return {"error": {"code": code, "message": error.message, "status": status}}


def _code(error: ProxyError) -> int:
    status = client_status(error)
    return 429 if status == 529 else status


def _error_reply(error: ProxyError) -> Reply:
    code, headers = _code(error), error_headers(error)
    if code == 429:  # Anthropic's 529, too
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    return Reply(code, JSON, dump(_error(error)).encode("ascii"), headers)
