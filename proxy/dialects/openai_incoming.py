"""OpenAI's chat completions and completions, as clients ask for them.

For requests that have to be translated: their model is served in another dialect.
What that dialect cannot say is refused where the answer would be a different one
(several answers, sounds, files), and named in ``dropped`` where it would be poorer.

Clients are the official SDKs above all. They take an error inside a stream only as an
object under the key "error", and choose the exception by the HTTP status.

Source: https://platform.openai.com/docs/api-reference/chat and …/completions
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quote
from typing import Annotated, ClassVar, TypeAlias, TypeVar

import msgspec

from proxy.completion import (
    CompletionRequest,
    Delta,
    Feature,
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
    COMMENT,
    JSON,
    Chosen,
    Head,
    Reply,
    Writer,
    client_status,
    dump,
    error_headers,
    frame_each,
    positive,
    quote_each,
    texts_of,
    upstream_words,
)
from proxy.errors import (
    InvalidRequest,
    ProxyError,
    RateLimited,
    UpstreamReported,
    UpstreamStatus,
)

# What OpenAI's completions give a client that does not say how much it wants.
DEFAULT_MAX_TOKENS = 16

_SHOWN_CHARS = 40

# ----------------------------------------------------------------------- request body
# "object" is the type of what is only looked at, so that no shape of it is an error.

_Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Url(msgspec.Struct):
    url: str
    detail: str | None = None


class _ContentPart(msgspec.Struct):
    """Every kind of part at once: what is unknown is refused in better words."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: _Url | str | None = None
    detail: str | None = None
    cache_control: object = None


class _FunctionCall(msgspec.Struct):
    name: str
    arguments: str = ""


class _ToolCallWire(msgspec.Struct):
    id: str = ""
    type: str = "function"
    function: _FunctionCall | None = None


class _MessageWire(msgspec.Struct):
    role: str
    content: str | list[_ContentPart] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[_ToolCallWire] | None = None
    tool_call_id: str | None = None
    function_call: _FunctionCall | None = None


class _Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None


class _ToolWire(msgspec.Struct):
    type: str = "function"
    function: _Function | None = None


class _FunctionName(msgspec.Struct):
    name: str


class _ToolChoice(msgspec.Struct):
    type: str = "function"
    function: _FunctionName | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both routes take. ``top_k`` is an extension of most servers."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None
    stop: str | list[str] | None = None
    seed: _Int64 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: object = None
    logit_bias: object = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_MessageWire]
    max_completion_tokens: float | None = None
    reasoning_effort: str | None = None
    tools: list[_ToolWire] | None = None
    tool_choice: str | _ToolChoice | None = None
    parallel_tool_calls: object = None
    functions: object = None
    function_call: object = None
    top_logprobs: object = None
    response_format: object = None
    modalities: object = None
    audio: object = None
    verbosity: object = None
    web_search_options: object = None
    service_tier: object = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    suffix: object = None
    echo: object = None
    best_of: object = None


# Fields that nothing neutral can carry, each with the values that ask for nothing.
_CHAT_UNSAID: Mapping[str, Sequence[object]] = {
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "parallel_tool_calls": [True],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "audio": [],
    "verbosity": ["medium"],
    "web_search_options": [],
    "service_tier": ["auto", "default"],
}
_COMPLETION_UNSAID: Mapping[str, Sequence[object]] = {
    "logprobs": [],  # 0 asks for those of the chosen tokens
    "logit_bias": [{}],
    "suffix": [""],
    "echo": [False],
    "best_of": [1],
}

_decode_chat = msgspec.json.Decoder(_ChatBody).decode
_decode_completion = msgspec.json.Decoder(_CompletionBody).decode

_B = TypeVar("_B", bound=_Body)


def _decode(decode: Callable[[bytes], _B], body: bytes) -> _B:
    try:
        return decode(body)
    except RecursionError:
        reason = "nested too deeply"
    except (msgspec.DecodeError, UnicodeError) as error:
        reason = str(error)  # of a wrong type: with the path to the field
    raise InvalidRequest(f"could not decode request body: {reason}")


def _shown(text: str) -> str:
    """A word of the client's, for a message to it."""
    return f'"{text[:_SHOWN_CHARS]}"'


# --------------------------------------------------------------------------- messages

_PartReader: TypeAlias = Callable[[_ContentPart], Part | None]


def _text(wire: _ContentPart) -> Part | None:
    # cache_control is Anthropic's; gateways take it in OpenAI's messages, too.
    cached = wire.cache_control is not None
    return None if wire.text is None else TextPart(wire.text, cached)


def _refusal(wire: _ContentPart) -> Part | None:
    return None if wire.refusal is None else TextPart(wire.refusal)


def _image(wire: _ContentPart) -> Part | None:
    image = wire.image_url
    if isinstance(image, str):  # as in OpenAI's Responses
        return ImagePart(image, wire.detail)
    return None if image is None else ImagePart(image.url, image.detail)


# By type: the field that a part of it must have, and what makes a neutral one of it.
_TEXTS: Mapping[str, tuple[str, _PartReader]] = {
    "text": ("text", _text),
    "input_text": ("text", _text),
    "output_text": ("text", _text),
    "refusal": ("refusal", _refusal),
}
_PARTS: Mapping[str, tuple[str, _PartReader]] = {
    **_TEXTS,
    "image_url": ("image_url", _image),
    "input_image": ("image_url", _image),
}


def _part(
    wire: _ContentPart, path: str, known: Mapping[str, tuple[str, _PartReader]]
) -> Part:
    if wire.type not in known:
        raise InvalidRequest(
            f"{path}: a part of type {_shown(wire.type)} is not supported here; "
            f"supported are {', '.join(known)}"
        )
    field, read = known[wire.type]
    part = read(wire)
    if part is None:
        raise InvalidRequest(
            f"{path}.{field}: missing in a part of type {_shown(wire.type)}"
        )
    return part


def _content(
    wire: _MessageWire, path: str, known: Mapping[str, tuple[str, _PartReader]]
) -> list[Part]:
    if isinstance(wire.content, list):
        return [
            _part(part, f"{path}.content[{i}]", known)
            for i, part in enumerate(wire.content)
        ]
    return [] if wire.content is None else [TextPart(wire.content)]


def _read_system(wire: _MessageWire, path: str) -> list[Part]:
    return _content(wire, path, _TEXTS)


def _read_user(wire: _MessageWire, path: str) -> list[Part]:
    return _content(wire, path, _PARTS)


def _read_assistant(wire: _MessageWire, path: str) -> list[Part]:
    said = _content(wire, path, _PARTS)
    if not said and wire.refusal:
        said = [TextPart(wire.refusal)]
    calls = _calls(wire, path)
    # Many clients write content "" beside their tool calls.
    return [*(part for part in said if part != TextPart("")), *calls]


def _calls(wire: _MessageWire, path: str) -> list[Part]:
    calls: list[Part] = []
    for i, call in enumerate(wire.tool_calls or ()):
        if call.function is None:
            raise InvalidRequest(
                f"{path}.tool_calls[{i}].function: missing in a call of type "
                f"{_shown(call.type)}; only functions are supported here"
            )
        calls.append(ToolCallPart(call.id, call.function.name, call.function.arguments))
    if not calls and wire.function_call is not None:
        # Before there were tools: its result, of role "function", has only a name.
        function = wire.function_call
        calls.append(ToolCallPart(function.name, function.name, function.arguments))
    return calls


def _read_result(wire: _MessageWire, path: str) -> list[Part]:
    call_id = wire.tool_call_id or wire.name
    if not call_id:
        raise InvalidRequest(
            f"{path}.tool_call_id: missing in a message of role {_shown(wire.role)}"
        )
    content = Message(wire.role, _content(wire, path, _TEXTS))
    return [ToolResultPart(call_id, content.text)]


# By role: the neutral one, and what reads the message.
_ROLES: Mapping[str, tuple[str, Callable[[_MessageWire, str], list[Part]]]] = {
    "system": ("system", _read_system),
    "developer": ("system", _read_system),
    "user": ("user", _read_user),
    "assistant": ("assistant", _read_assistant),
    "tool": ("user", _read_result),
    "function": ("user", _read_result),
}
# Neighbours that other dialects say in one message, and what stands between them.
_JOINED: Mapping[object, list[Part]] = {
    _read_system: [TextPart("\n\n")],
    _read_result: [],
}


def _messages(wires: list[_MessageWire]) -> list[Message]:
    messages: list[Message] = []
    before: object = None
    for i, wire in enumerate(wires):
        if wire.role not in _ROLES:
            raise InvalidRequest(
                f"messages[{i}].role: {_shown(wire.role)} is none of {', '.join(_ROLES)}"
            )
        role, read = _ROLES[wire.role]
        parts = read(wire, f"messages[{i}]") or [TextPart("")]
        if read is before and read in _JOINED:
            messages[-1].parts += [*_JOINED[read], *parts]
        else:
            messages.append(Message(role, parts))
        before = read
    return messages


# ------------------------------------------------------------------------------ tools

_CHOICES = ("auto", "none", "required")


def _tools(wires: list[_ToolWire]) -> list[Tool]:
    return [_tool(wire, f"tools[{i}]") for i, wire in enumerate(wires)]


def _tool(wire: _ToolWire, path: str) -> Tool:
    function = wire.function
    if wire.type != "function":
        raise InvalidRequest(
            f"{path}.type: tools of type {_shown(wire.type)} are not supported here, "
            "only functions"
        )
    if function is None:
        raise InvalidRequest(f"{path}.function: missing")
    return Tool(function.name, function.description, function.parameters)


def _tool_choice(wire: str | _ToolChoice | None, tools: list[Tool]) -> str | None:
    if isinstance(wire, _ToolChoice):
        if wire.type != "function" or wire.function is None:
            raise InvalidRequest(
                f"tool_choice: type {_shown(wire.type)} is not supported here; name a "
                f"function, or say one of {', '.join(_CHOICES)}"
            )
        wire = wire.function.name
    elif wire is None or wire in _CHOICES:
        return wire
    # TGI takes the name as a string, so its clients write that.
    if all(tool.name != wire for tool in tools):
        raise InvalidRequest(f"tool_choice: {_shown(wire)} is none of the tools")
    return wire


# ---------------------------------------------------------------------------- request


def _request(
    feature: Feature,
    wire: _Body,
    messages: list[Message],
    max_tokens: int | None,
    unsaid: Mapping[str, Sequence[object]],
) -> CompletionRequest:
    if wire.n not in (None, 1):
        raise InvalidRequest(
            f"n must be 1, not {wire.n}: this model is not served by an "
            "OpenAI-compatible server, and others give one answer to a request"
        )
    top_p = wire.top_p
    return CompletionRequest(
        feature=feature,
        messages=messages,
        model=(wire.model or "").strip(),
        stream=bool(wire.stream),
        max_tokens=max_tokens,
        temperature=wire.temperature,
        # 1 and 0 mean "off" to OpenAI's clients and are errors to some servers.
        top_p=top_p if top_p is not None and 0 < top_p < 1 else None,
        top_k=positive(wire.top_k),
        stop=_stops(wire.stop),
        seed=wire.seed,
        frequency_penalty=wire.frequency_penalty,
        presence_penalty=wire.presence_penalty,
        dropped=[name for name in unsaid if _is_meant(wire, name, unsaid[name])],
    )


def _is_meant(wire: _Body, name: str, empty: Sequence[object]) -> bool:
    value = getattr(wire, name)
    return value is not None and value not in empty


def _stops(wire: str | list[str] | None) -> list[str]:
    stops = [wire] if isinstance(wire, str) else wire or []
    return list(dict.fromkeys(stop for stop in stops if stop))


def _prompt(wire: str | list[str | int | list[int]] | None) -> str:
    prompts = wire if isinstance(wire, list) else [wire]
    if len(prompts) == 1 and isinstance(prompts[0], str):
        return prompts[0]
    if not prompts or prompts == [None]:
        raise InvalidRequest("prompt: missing")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest(
            "prompt: must be text, not tokens: this model is not served by an "
            "OpenAI-compatible server, and others do not take them"
        )
    raise InvalidRequest(
        f"prompt: must be one text, not {len(prompts)}: this model is not served by an "
        "OpenAI-compatible server, and others give one answer to a request"
    )


class _Route:
    """What both routes have in common."""

    def check(self, head: Head) -> None:
        pass

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)


class ChatCompletions(_Route):
    """``/v1/chat/completions``."""

    dialect = "openai-chat"

    def sketch(self, head: Head, chosen: Chosen) -> tuple[CompletionRequest, Writer]:
        request = _sketch("chat", chosen)
        return request, ChatWriter(request.model, include_usage=_wants_usage(chosen))

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        wire = _decode(_decode_chat, body)
        limit = positive(wire.max_completion_tokens) or positive(wire.max_tokens)
        messages = _messages(wire.messages)
        request = _request("chat", wire, messages, limit, _CHAT_UNSAID)
        request.tools = _tools(wire.tools or [])
        request.tool_choice = _tool_choice(wire.tool_choice, request.tools)
        request.reasoning_effort = wire.reasoning_effort
        return request, ChatWriter(request.model, include_usage=_wants_usage(wire))


class Completions(_Route):
    """``/v1/completions``."""

    dialect = "openai-completions"

    def sketch(self, head: Head, chosen: Chosen) -> tuple[CompletionRequest, Writer]:
        request = _sketch("code", chosen)
        include_usage = _wants_usage(chosen)
        return request, CompletionWriter(request.model, include_usage=include_usage)

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        wire = _decode(_decode_completion, body)
        messages = [Message("user", [TextPart(_prompt(wire.prompt))])]
        # -1 is what llama.cpp's clients write for "no limit".
        limit = positive(wire.max_tokens) if wire.max_tokens else DEFAULT_MAX_TOKENS
        request = _request("code", wire, messages, limit, _COMPLETION_UNSAID)
        writer = CompletionWriter(request.model, include_usage=_wants_usage(wire))
        return request, writer


def _wants_usage(wire: _Body | Chosen) -> bool:
    return wire.stream_options is not None and bool(wire.stream_options.include_usage)


def _sketch(feature: Feature, chosen: Chosen) -> CompletionRequest:
    model = (chosen.model or "").strip()
    return CompletionRequest(feature, [], model, stream=bool(chosen.stream))


# ----------------------------------------------------------------------------- errors

# Of an upstream: what tells the client something about its own request, or when to
# try again. Any 5xx is passed on, too.
_PASSED_ON = frozenset((400, 401, 403, 404, 408, 409, 413, 422, 429))
_STATUSES = {"unknown_model": 404}
_CODES = {"unknown_model": "model_not_found", "rate_limited": "rate_limit_exceeded"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


def _status(error: ProxyError) -> int:
    status = client_status(error)
    if not isinstance(error, UpstreamStatus | UpstreamReported):
        return _STATUSES.get(error.kind, status)
    return status if status in _PASSED_ON or status >= 500 else 502


def _type(status: int) -> str:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _TYPES.get(status, kind)


def _error(error: ProxyError) -> str:
    fields = {
        "message": upstream_words(error),
        "type": _type(_status(error)),
        "param": None,
        "code": _CODES.get(error.kind, error.kind),
    }
    return dump({"error": fields})


def _error_reply(error: ProxyError) -> Reply:
    body = _error(error).encode("ascii") + b"\n"
    headers = error_headers(error)
    if isinstance(error, RateLimited):
        headers[f"x-ratelimit-limit-{error.unit}"] = str(error.amount)
        headers[f"x-ratelimit-remaining-{error.unit}"] = "0"
        headers[f"x-ratelimit-reset-{error.unit}"] = f"{error.retry_after_s}s"
    return Reply(_status(error), JSON, body, headers)


# ---------------------------------------------------------------------------- replies

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_DONE = "data: [DONE]\n\n"

# Every upstream's words, lower case; any other word means that the model was done.
_REASONS = {
    **dict.fromkeys(
        (
            "length",
            "max_tokens",
            "max_output_tokens",
            "model_length",
            "model_context_window_exceeded",
        ),
        "length",
    ),
    **dict.fromkeys(("tool_calls", "tool_use", "function_call"), "tool_calls"),
    **dict.fromkeys(
        (
            "content_filter",
            "content_filtered",
            "guardrail_intervened",
            "refusal",
            "safety",
            "image_safety",
            "recitation",
            "blocklist",
            "prohibited_content",
            "spii",
        ),
        "content_filter",
    ),
}


class _OpenAIWriter:
    """What the replies of both routes have in common.

    A class says what its frames look like around a text; everything in them but the
    text is the same for a whole reply, so it is put together once.
    """

    stream_headers = _STREAM_HEADERS
    _ID_PREFIX: ClassVar[str]
    _OBJECT: ClassVar[str]
    _CHUNK_OBJECT: ClassVar[str]
    _TEXT_CHOICE: ClassVar[tuple[str, str]]

    _id = ""
    _usage: Usage | None = None
    _is_finished = False
    _head = ""  # of every frame, up to its choice; "" until the first one
    _tail = ""
    _text_head = ""
    _text_tail = ""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        self._model = model
        self._include_usage = include_usage

    def frames(self, deltas: list[Delta]) -> bytes:
        if self._head and (texts := texts_of(deltas)) is not None:
            return quote_each(texts, self._text_head, self._text_tail).encode("ascii")
        out: list[str] = []
        for delta in deltas:
            if type(delta) is Text:
                if not self._head:
                    self._begin(out)
                out.append(self._text_head + _quote(delta.text) + self._text_tail)
            else:
                self._say(delta, out)
        return "".join(out).encode("ascii")

    def keep_alive(self) -> bytes:
        return COMMENT

    def literals(self, texts: list[bytes]) -> bytes | None:
        if not self._head:
            return None
        before = f'{self._text_head}"'.encode("ascii")
        return frame_each(texts, before, f'"{self._text_tail}'.encode("ascii"))

    def end(self) -> bytes:
        out: list[str] = []
        self._finish("", out)
        if self._include_usage and self._usage is not None:
            usage = dump(_usage(self._usage))
            out.append(f'{self._head}],"usage":{usage}}}\n\n')
        out.append(_DONE)
        return "".join(out).encode("ascii")

    def error(self, error: ProxyError) -> bytes:
        # No [DONE]: whoever overlooks the error should not find a complete answer.
        return f"data: {_error(error)}\n\n".encode("ascii")

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)

    def body(self, deltas: list[Delta]) -> bytes:
        reason = ""
        for delta in deltas:
            if isinstance(delta, Finish):
                reason = reason or delta.reason
            else:
                self._note(delta)
        reply = {
            "id": self._id or _new_id(self._ID_PREFIX),
            "object": self._OBJECT,
            "created": int(time.time()),
            "model": self._model,
            "choices": [self._choice(deltas, reason)],
            # Clients add it up without a look whether it is there.
            "usage": _usage(self._usage or Usage(0, 0)),
        }
        return dump(reply).encode("ascii") + b"\n"

    def _note(self, delta: Delta) -> None:
        """Keep what is said about the reply as a whole."""
        if isinstance(delta, Start):
            self._id = delta.id or self._id
            self._model = delta.model or self._model
        elif isinstance(delta, Usage):
            self._usage = delta

    def _say(self, delta: Delta, out: list[str]) -> None:
        """Everything but text."""
        if isinstance(delta, Start | Usage):
            # Nothing is said yet, so an error that follows can still be a status.
            self._note(delta)
        elif isinstance(delta, Finish):
            self._finish(delta.reason, out)
        elif not isinstance(delta, Text) and (choice := self._choice_piece(delta)):
            if not self._head:
                self._begin(out)
            out.append(self._head + choice + self._tail)

    def _begin(self, out: list[str]) -> None:
        reply_id = _quote(self._id or _new_id(self._ID_PREFIX))
        self._head = (
            f'data: {{"id":{reply_id},"object":"{self._CHUNK_OBJECT}",'
            f'"created":{int(time.time())},"model":{_quote(self._model)},"choices":['
        )
        usage = ',"usage":null' if self._include_usage else ""
        self._tail = f"]{usage}}}\n\n"
        before, after = self._TEXT_CHOICE
        self._text_head = self._head + before
        self._text_tail = after + self._tail
        if first := self._first_choice():
            out.append(self._head + first + self._tail)

    def _first_choice(self) -> str:
        """What is said before anything else; "" if nothing is."""
        return ""

    def _finish(self, reason: str, out: list[str]) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        if not self._head:
            self._begin(out)
        out.append(self._head + self._finish_choice(reason) + self._tail)

    def _choice(self, deltas: list[Delta], reason: str) -> dict[str, object]:
        """The one choice of a whole reply."""
        raise NotImplementedError

    def _choice_piece(self, delta: Thinking | ToolCall) -> str:
        """A choice of a frame; "" for what this route cannot say."""
        raise NotImplementedError

    def _finish_choice(self, reason: str) -> str:
        raise NotImplementedError


class ChatWriter(_OpenAIWriter):
    _ID_PREFIX = "chatcmpl-"
    _OBJECT = "chat.completion"
    _CHUNK_OBJECT = "chat.completion.chunk"
    _TEXT_CHOICE = ('{"index":0,"delta":{"content":', '},"finish_reason":null}')

    # Clients keep calls in a list, so theirs are numbered without gaps. It is not changed
    # in place: most replies have none.
    _calls: Mapping[int, int] = {}

    def _first_choice(self) -> str:
        return _chat_choice('{"role":"assistant","content":""}', "null")

    def _choice_piece(self, delta: Thinking | ToolCall) -> str:
        if isinstance(delta, Thinking):
            piece = f'{{"reasoning_content":{_quote(delta.text)}}}'
            return _chat_choice(piece, "null")
        return _chat_choice(self._call_piece(delta), "null")

    def _call_piece(self, call: ToolCall) -> str:
        arguments = f'"arguments":{_quote(call.arguments)}}}}}]}}'
        number = self._calls.get(call.index)
        if number is not None:
            return f'{{"tool_calls":[{{"index":{number},"function":{{{arguments}'
        number = len(self._calls)
        self._calls = {**self._calls, call.index: number}
        # Once only: clients append the names of later pieces to the first.
        return (
            f'{{"tool_calls":[{{"index":{number},"id":{_quote(_call_id(call))},'
            f'"type":"function","function":{{"name":{_quote(call.name)},{arguments}'
        )

    def _finish_choice(self, reason: str) -> str:
        return _chat_choice("{}", f'"{_chat_reason(reason, bool(self._calls))}"')

    def _choice(self, deltas: list[Delta], reason: str) -> dict[str, object]:
        text = _joined(deltas, Text)
        calls = _whole_calls(deltas)
        message: dict[str, object] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if thinking := _joined(deltas, Thinking):
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _chat_reason(reason, bool(calls)),
        }


class CompletionWriter(_OpenAIWriter):
    """Says text only: a completion has neither reasoning nor tool calls."""

    _ID_PREFIX = "cmpl-"
    _OBJECT = "text_completion"
    _CHUNK_OBJECT = "text_completion"
    _TEXT_CHOICE = (
        '{"index":0,"text":',
        ',"logprobs":null,"finish_reason":null}',
    )

    def _choice_piece(self, delta: Thinking | ToolCall) -> str:
        return ""

    def _finish_choice(self, reason: str) -> str:
        word = _completion_reason(reason)
        return f'{{"index":0,"text":"","logprobs":null,"finish_reason":"{word}"}}'

    def _choice(self, deltas: list[Delta], reason: str) -> dict[str, object]:
        return {
            "index": 0,
            "text": _joined(deltas, Text),
            "logprobs": None,
            "finish_reason": _completion_reason(reason),
        }


def _chat_choice(delta: str, reason: str) -> str:
    return f'{{"index":0,"delta":{delta},"finish_reason":{reason}}}'


def _chat_reason(word: str, has_calls: bool) -> str:
    reason = _REASONS.get(word.lower(), "stop")
    # Gemini and TGI say "stop" after calls; clients run them only if told to.
    return "tool_calls" if has_calls and reason == "stop" else reason


def _completion_reason(word: str) -> str:
    reason = _REASONS.get(word.lower(), "stop")
    return "stop" if reason == "tool_calls" else reason


def _joined(deltas: list[Delta], kind: type[Text] | type[Thinking]) -> str:
    return "".join(d.text for d in deltas if isinstance(d, kind))


def _whole_calls(deltas: list[Delta]) -> list[dict[str, object]]:
    calls: dict[int, list[ToolCall]] = {}
    for delta in deltas:
        if isinstance(delta, ToolCall):
            calls.setdefault(delta.index, []).append(delta)
    return [_whole_call(pieces) for pieces in calls.values()]


def _whole_call(pieces: list[ToolCall]) -> dict[str, object]:
    arguments = "".join(piece.arguments for piece in pieces)
    function = {"name": pieces[0].name, "arguments": arguments}
    return {"id": _call_id(pieces[0]), "type": "function", "function": function}


def _call_id(call: ToolCall) -> str:
    return call.id or _new_id("call_")


def _new_id(prefix: str) -> str:
    return f"{prefix}{random.getrandbits(96):024x}"


def _usage(usage: Usage) -> dict[str, object]:
    wire: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        wire["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return wire
