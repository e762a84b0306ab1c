"""Anthropic's messages and its older completions, as clients speak them.

The other half of ``anthropic.py``: requests to read, replies to write. What the API
itself would refuse is refused here in its words where that needs no knowledge of the
model; the rest is left to whoever serves it.

Sources: https://docs.anthropic.com/en/api/messages, …/messages-streaming, …/complete,
…/errors and …/versioning.
"""

import json
import re
import time
from collections.abc import Callable
from json.encoder import encode_basestring_ascii as _quote
from typing import Annotated, Literal, TypeAlias, TypeVar
from uuid import uuid4

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
    Chosen,
    Head,
    Reply,
    Writer,
    client_status,
    error_headers,
    frame_each,
    quote_each,
    texts_of,
    upstream_words,
)
from proxy.dialects.fault import decode_lenient
from proxy.errors import (
    InvalidRequest,
    ProxyError,
    RateLimited,
    UnknownModel,
    UpstreamReported,
    UpstreamStatus,
)

# Up to here a budget is the least the API takes; more than that is "think hard".
_LOW_EFFORT_TOKENS = 1024
# In this version of the API each event repeats the whole text so far.
_CUMULATIVE_VERSION = "2023-01-01"

# ---------------------------------------------------------------------- request bodies

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class _TextBlock(msgspec.Struct, tag="text"):
    text: str
    cache_control: object = None

    def part(self) -> Part | None:
        return TextPart(self.text, cached=self.cache_control is not None)


class _Base64Source(msgspec.Struct, tag="base64"):
    media_type: str
    data: str

    def address(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class _UrlSource(msgspec.Struct, tag="url"):
    url: str

    def address(self) -> str:
        return self.url


class _ImageBlock(msgspec.Struct, tag="image"):
    source: _Base64Source | _UrlSource

    def part(self) -> Part | None:
        return ImagePart(self.source.address())


class _ToolUseBlock(msgspec.Struct, tag="tool_use"):
    id: str
    name: str
    input: dict[str, object]

    def part(self) -> Part | None:
        arguments = msgspec.json.encode(self.input).decode()
        return ToolCallPart(self.id, self.name, arguments)


class _ToolResultBlock(msgspec.Struct, tag="tool_result"):
    tool_use_id: str
    content: str | list[_TextBlock] | None = None
    is_error: bool | None = None

    def part(self) -> Part | None:
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(block.text for block in content)
        # No other dialect has the flag; a model understands the word.
        return ToolResultPart(
            self.tool_use_id, f"Error: {content}" if self.is_error else content
        )


class _ThinkingBlock(msgspec.Struct, tag="thinking"):
    """Of an earlier turn. Its signature is worth nothing to another server."""

    def part(self) -> Part | None:
        return None


class _RedactedThinkingBlock(msgspec.Struct, tag="redacted_thinking"):
    def part(self) -> Part | None:
        return None


_Block: TypeAlias = (
    _TextBlock
    | _ImageBlock
    | _ToolUseBlock
    | _ToolResultBlock
    | _ThinkingBlock
    | _RedactedThinkingBlock
)


class _MessageWire(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]


class _ToolWire(msgspec.Struct):
    """One that the client runs, or (any other ``type``) one of the API's own."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, object] | None = None


class _ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _ThinkingWire(msgspec.Struct):
    type: str
    budget_tokens: int | None = None


class _Sampling(msgspec.Struct, kw_only=True):
    """What both kinds of request have in common."""

    model: str = ""
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None


class _MessagesBody(_Sampling, kw_only=True):
    messages: list[_MessageWire]
    max_tokens: _Count
    system: str | list[_TextBlock] | None = None
    tools: list[_ToolWire] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: _ThinkingWire | None = None
    container: object = None
    context_management: object = None
    inference_geo: object = None
    mcp_servers: object = None
    output_config: object = None
    output_format: object = None


class _CompleteBody(_Sampling, kw_only=True):
    prompt: str
    max_tokens_to_sample: _Count


# They change what is answered, or where; others (metadata, service_tier) do not.
_UNSAYABLE = (
    "container",
    "context_management",
    "inference_geo",
    "mcp_servers",
    "output_config",
    "output_format",
)

_Body = TypeVar("_Body")


def _read(
    body: bytes,
    decode: Callable[[bytes], _Body],
    build: Callable[[_Body], CompletionRequest],
) -> CompletionRequest:
    try:
        return build(decode(body))
    except RecursionError:
        raise InvalidRequest("request body: nested too deeply") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(_explain(str(error))) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"request body: not valid JSON: {error}") from None


_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN_VALUE = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)


def _explain(problem: str) -> str:
    """Put what msgspec found into the API's form, ``messages.0.content: …``."""
    what, _, where = problem.partition(" - at `$")
    where = where.removesuffix("`").replace("[...]", ".*")
    path = where.replace("[", ".").replace("]", "").removeprefix(".")
    if match := _MISSING.fullmatch(what):
        return f"{path}.{match[1]}: Field required".removeprefix(".")
    if match := _UNKNOWN_VALUE.fullmatch(what):
        what = f"{match[1]} is not supported"
    return f"{path or 'request body'}: {what}"


# ---------------------------------------------------------------------------- requests


def _new_request(
    wire: _Sampling, messages: list[Message], max_tokens: int
) -> CompletionRequest:
    top_p, top_k = wire.top_p, wire.top_k
    temperature = wire.temperature
    return CompletionRequest(
        feature="chat",
        messages=_drop_blank_end(messages),
        model=wire.model.strip(),
        stream=bool(wire.stream),
        max_tokens=max_tokens,
        # -1 is how clients of the older API say "not set".
        temperature=temperature if temperature is None or temperature >= 0 else None,
        top_p=top_p if top_p is not None and 0 < top_p < 1 else None,
        top_k=top_k if top_k is not None and 0 < top_k < 2**31 else None,
        stop=list(dict.fromkeys(stop for stop in wire.stop_sequences or () if stop)),
    )


def _drop_blank_end(messages: list[Message]) -> list[Message]:
    """Drop the one empty message that the API allows: an answer not yet begun."""
    if messages and messages[-1].role == "assistant" and _is_blank(messages[-1]):
        return messages[:-1]
    return messages


def _is_blank(message: Message) -> bool:
    return not message.text.strip() and all(
        isinstance(part, TextPart) for part in message.parts
    )


def _messages_request(wire: _MessagesBody) -> CompletionRequest:
    request = _new_request(wire, _messages(wire), wire.max_tokens)
    request.dropped = [name for name in _UNSAYABLE if getattr(wire, name)]
    _read_tools(wire.tools or [], request)
    if wire.tool_choice is not None:
        _read_tool_choice(wire.tool_choice, request)
    if wire.thinking is not None:
        _read_thinking(wire.thinking, request)
    return request


def _messages(wire: _MessagesBody) -> list[Message]:
    system = _parts(wire.system or [])
    messages = []
    for i, item in enumerate(wire.messages):
        parts = _parts(item.content)
        if item.role == "system":
            # Not in the API, but Cody Gateway takes it, so its clients send it.
            if i:
                raise InvalidRequest(
                    f"messages.{i}.role: 'system' is only for the first message"
                )
            system += parts
        elif parts or not item.content:  # more in it than thinking
            messages.append(Message(item.role, parts))
    prompt = Message("system", system)
    return messages if prompt.is_empty else [prompt, *messages]


def _parts(content: str | list[_TextBlock] | list[_Block]) -> list[Part]:
    if isinstance(content, str):
        return [TextPart(content)]
    parts = (block.part() for block in content)
    return [part for part in parts if part is not None]


def _read_tools(tools: list[_ToolWire], request: CompletionRequest) -> None:
    for i, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            request.dropped.append(f"tools.{tool.type}")
        elif not tool.name:
            raise InvalidRequest(f"tools.{i}.name: Field required")
        else:
            request.tools.append(Tool(tool.name, tool.description, tool.input_schema))


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _read_tool_choice(choice: _ToolChoice, request: CompletionRequest) -> None:
    if choice.disable_parallel_tool_use:
        request.dropped.append("tool_choice.disable_parallel_tool_use")
    if choice.type in _CHOICES:
        request.tool_choice = _CHOICES[choice.type]
    elif not choice.name:
        raise InvalidRequest("tool_choice.name: Field required")
    elif any(tool.name == choice.name for tool in request.tools):
        request.tool_choice = choice.name
    else:  # one of the API's own tools
        request.dropped.append("tool_choice")


def _read_thinking(thinking: _ThinkingWire, request: CompletionRequest) -> None:
    """Others know efforts where this API has a budget: two steps say enough of it."""
    if thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise InvalidRequest("thinking.budget_tokens: Field required")
        low = thinking.budget_tokens <= _LOW_EFFORT_TOKENS
        request.reasoning_effort = "low" if low else "high"
    elif thinking.type != "disabled":  # "adaptive": as the model pleases
        request.dropped.append("thinking")


# The first marker may lack its blank line.
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _complete_request(wire: _CompleteBody) -> CompletionRequest:
    messages = _split_prompt(wire.prompt)
    return _new_request(wire, messages, wire.max_tokens_to_sample)


def _split_prompt(prompt: str) -> list[Message]:
    """Return the turns that a prompt of the older API writes one below another."""
    system, *turns = _TURN.split(prompt)
    if not turns:
        return [Message("user", [TextPart(prompt)])]
    messages = [
        Message(_ROLES[speaker], [TextPart(text.removeprefix(" "))])
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    if system.strip():
        messages.insert(0, Message("system", [TextPart(system.strip())]))
    return messages


class _Incoming:
    """What both paths have in common."""

    def check(self, head: Head) -> None:
        """Nothing: any version is served, and none has to be named."""

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)


class Messages(_Incoming):
    """``/v1/messages``."""

    dialect = "anthropic"
    _decode = msgspec.json.Decoder(_MessagesBody).decode

    def sketch(self, head: Head, chosen: Chosen) -> tuple[CompletionRequest, Writer]:
        model = (chosen.model or "").strip()
        request = CompletionRequest("chat", [], model, stream=bool(chosen.stream))
        return request, MessagesWriter(model)

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        request = _read(body, self._decode, _messages_request)
        return request, MessagesWriter(request.model)


class Complete(_Incoming):
    """``/v1/complete``, the API before messages.

    Args: cumulative: each event has the whole text so far, whatever version the client
          names; else only for the version in which that was so.
    """

    dialect = "anthropic-complete"
    _decode = msgspec.json.Decoder(_CompleteBody).decode

    def __init__(self, *, cumulative: bool = False) -> None:
        self._cumulative = cumulative

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        request = _read(body, self._decode, _complete_request)
        version = head.headers.get("anthropic-version", "").strip()
        cumulative = self._cumulative or version == _CUMULATIVE_VERSION
        return request, CompleteWriter(request.model, cumulative=cumulative)


# ------------------------------------------------------------------------------ errors

# The official clients choose their exception by the status, programs by the type.
_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_KNOWN_TYPES = {*_TYPES.values(), "invalid_request_error", "api_error"}
# An upstream's verdict on the request, which the client can act on.
_PASSED_ON = {400, 401, 403, 404, 408, 413, 422, 429}


def _status_of(error: ProxyError) -> int:
    if isinstance(error, UnknownModel):
        return 404
    status = client_status(error)
    if not isinstance(error, UpstreamStatus | UpstreamReported):
        return status
    return status if status in _PASSED_ON or status >= 500 else 502


def _type_of(status: int) -> str:
    other = "api_error" if status >= 500 else "invalid_request_error"
    return _TYPES.get(status, other)


def _text_of(error: ProxyError) -> str:
    # The detail may hold what was taken out of the message.
    if isinstance(error, UpstreamReported) and error.detail in error.message:
        return error.detail
    return upstream_words(error)


def _envelope(type: str, text: str, more: str = "") -> str:
    error = f'{{"type":{_quote(type)},"message":{_quote(text)}}}'
    return f'{{"type":"error","error":{error}{more}}}'


def _error_reply(error: ProxyError) -> Reply:
    status, headers = _status_of(error), error_headers(error)
    if isinstance(error, RateLimited):
        prefix = f"anthropic-ratelimit-{error.unit}"
        reset = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(error.retry_at_s))
        headers[f"{prefix}-limit"] = str(error.amount)
        headers[f"{prefix}-remaining"] = "0"
        headers[f"{prefix}-reset"] = reset
    id = headers.get("request-id", "")
    more = f',"request_id":{_quote(id)}' if id else ""
    body = _envelope(_type_of(status), _text_of(error), more)
    return Reply(status, JSON, body.encode("ascii"), headers)


# ----------------------------------------------------------------------------- replies

_STREAM_HEADERS = {
    "Content-Type": f"{EVENT_STREAM}; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

# Upstreams' words, lower case. Whatever else they say is an end like any other.
_STOP_REASONS = {
    "length": "max_tokens",
    "max_tokens": "max_tokens",
    "model_length": "max_tokens",
    "model_context_window_exceeded": "model_context_window_exceeded",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
    "tool_use": "tool_use",
    "function_call": "tool_use",
    "pause_turn": "pause_turn",
    "refusal": "refusal",
    "content_filter": "refusal",
    "safety": "refusal",
    "recitation": "refusal",
    "blocklist": "refusal",
    "prohibited_content": "refusal",
    "spii": "refusal",
    "image_safety": "refusal",
}
_END = "end_turn"
_OUT_OF_TOKENS = ("max_tokens", "model_context_window_exceeded")


class _Writer:
    """What both kinds of reply have in common.

    Nothing is said before the first content, so that an error until then can become
    a status; and the end waits for ``end``, because usage comes after the finish.
    """

    stream_headers = _STREAM_HEADERS
    _id_prefix = ""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = ""
        self._reason = _END
        self._usage = Usage(0, 0)

    def keep_alive(self) -> bytes:
        return _event("ping", '{"type":"ping"}').encode("ascii")

    def literals(self, texts: list[bytes]) -> bytes | None:
        return None

    def error(self, error: ProxyError) -> bytes:
        type = _type_of(_status_of(error))
        if isinstance(error, UpstreamReported) and error.type in _KNOWN_TYPES:
            type = error.type  # no status contradicts it here
        return _event("error", _envelope(type, _text_of(error))).encode("ascii")

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)

    def _note(self, delta: Delta) -> None:
        """Remember what is said about the reply rather than in it."""
        if isinstance(delta, Start):
            self._id = delta.id or self._id
            self._model = delta.model or self._model
        elif isinstance(delta, Finish):
            self._reason = _STOP_REASONS.get(delta.reason.lower(), _END)
        elif isinstance(delta, Usage):
            self._usage = delta

    def _names(self) -> tuple[str, str]:
        """Return the id and the model, quoted."""
        if not self._id:
            self._id = f"{self._id_prefix}_{uuid4().hex}"
        return _quote(self._id), _quote(self._model)


def _event(type: str, data: str) -> str:
    return f"event: {type}\ndata: {data}\n\n"


# Kind of block: what it has when it starts, the type of its deltas, their field.
_BLOCKS = {
    "text": ('"text":""', "text_delta", "text"),
    "thinking": ('"thinking":"","signature":""', "thinking_delta", "thinking"),
    "tool_use": ('"input":{}', "input_json_delta", "partial_json"),
}
_DELTA_TAIL = "}}\n\n"


def _delta_head(index: int, kind: str) -> str:
    """Return a delta's event up to its quoted text; ``_DELTA_TAIL`` comes after it."""
    _, type, field = _BLOCKS[kind]
    return (
        'event: content_block_delta\ndata: {"type":"content_block_delta",'
        f'"index":{index},"delta":{{"type":"{type}","{field}":'
    )


class MessagesWriter(_Writer):
    """Says a reply as a message of content blocks, one open at a time."""

    _id_prefix = "msg"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._index = -1  # of the latest block
        self._kind = ""  # of that block
        self._head = ""  # of its deltas
        self._calls: dict[int, int] = {}  # number of a call -> index of its block

    def frames(self, deltas: list[Delta]) -> bytes:
        if self._kind == "text" and (texts := texts_of(deltas)) is not None:
            return quote_each(texts, self._head, _DELTA_TAIL).encode("ascii")
        out: list[str] = []
        for delta in deltas:
            if type(delta) is Text and self._kind == "text":
                out.append(self._head + _quote(delta.text) + _DELTA_TAIL)
            elif isinstance(delta, Text):
                self._say("text", delta.text, out)
            elif isinstance(delta, Thinking):
                self._say("thinking", delta.text, out)
            elif isinstance(delta, ToolCall):
                self._say_call(delta, out)
            else:
                self._note(delta)
        return "".join(out).encode("ascii")

    def literals(self, texts: list[bytes]) -> bytes | None:
        if self._kind != "text":
            return None
        before = f'{self._head}"'.encode("ascii")
        return frame_each(texts, before, f'"{_DELTA_TAIL}'.encode("ascii"))

    def end(self) -> bytes:
        out: list[str] = []
        self._leave_block(out)
        delta = f'{{"stop_reason":"{self._stop_reason()}","stop_sequence":null}}'
        fields = f'"delta":{delta},"usage":{self._usage_json()}'
        out.append(_event("message_delta", f'{{"type":"message_delta",{fields}}}'))
        out.append(_event("message_stop", '{"type":"message_stop"}'))
        return "".join(out).encode("ascii")

    def body(self, deltas: list[Delta]) -> bytes:
        blocks: list[_Whole] = []
        for delta in deltas:
            if isinstance(delta, Text):
                _grow("text", delta.text, blocks)
            elif isinstance(delta, Thinking):
                _grow("thinking", delta.text, blocks)
            elif isinstance(delta, ToolCall):
                if delta.index not in self._calls:
                    self._calls[delta.index] = len(blocks)
                    blocks.append(_Whole("tool_use", [], delta))
                blocks[self._calls[delta.index]].texts.append(delta.arguments)
            else:
                self._note(delta)
        content = ",".join(map(_block_json, blocks))
        return self._message(content, f'"{self._stop_reason()}"').encode("ascii")

    def _say(self, kind: str, text: str, out: list[str]) -> None:
        if not text:
            return
        if self._kind != kind:
            self._start_block(kind, "", out)
        out.append(self._head + _quote(text) + _DELTA_TAIL)

    def _say_call(self, call: ToolCall, out: list[str]) -> None:
        if call.index not in self._calls:
            names = f'"id":{_quote(call.id)},"name":{_quote(call.name)},'
            self._start_block("tool_use", names, out)
            self._calls[call.index] = self._index
        if call.arguments:
            # No server is known to come back to an earlier call. If one does, the
            # index still says whose arguments these are.
            head = _delta_head(self._calls[call.index], "tool_use")
            out.append(head + _quote(call.arguments) + _DELTA_TAIL)

    def _start_block(self, kind: str, names: str, out: list[str]) -> None:
        self._leave_block(out)
        self._index += 1
        self._kind, self._head = kind, _delta_head(self._index, kind)
        data = (
            f'{{"type":"content_block_start","index":{self._index},'
            f'"content_block":{{"type":"{kind}",{names}{_BLOCKS[kind][0]}}}}}'
        )
        out.append(_event("content_block_start", data))

    def _leave_block(self, out: list[str]) -> None:
        """End the latest block, or begin the message if there is none yet."""
        if self._index >= 0:
            data = f'{{"type":"content_block_stop","index":{self._index}}}'
            out.append(_event("content_block_stop", data))
        else:
            message = self._message("", "null")
            data = f'{{"type":"message_start","message":{message}}}'
            out.append(_event("message_start", data))

    def _message(self, content: str, reason: str) -> str:
        id, model = self._names()
        return (
            f'{{"id":{id},"type":"message","role":"assistant","model":{model},'
            f'"content":[{content}],"stop_reason":{reason},"stop_sequence":null,'
            f'"usage":{self._usage_json()}}}'
        )

    def _stop_reason(self) -> str:
        # TGI and others end a call like any answer. A client that does not see
        # tool_use runs no tool.
        return "tool_use" if self._calls and self._reason == _END else self._reason

    def _usage_json(self) -> str:
        usage = self._usage
        # Here what came from the cache is no part of the input.
        cached = usage.cached_tokens
        fresh = max(usage.prompt_tokens - (cached or 0), 0)
        read = "" if cached is None else f'"cache_read_input_tokens":{cached},'
        out = f'"output_tokens":{usage.completion_tokens}'
        return f'{{"input_tokens":{fresh},{read}{out}}}'


class _Whole(msgspec.Struct):
    """A content block of a reply in one piece, as it comes together."""

    kind: str
    texts: list[str]
    call: ToolCall | None = None


def _grow(kind: str, text: str, blocks: list[_Whole]) -> None:
    if blocks and blocks[-1].kind == kind:
        blocks[-1].texts.append(text)
    elif text:
        blocks.append(_Whole(kind, [text]))


def _block_json(block: _Whole) -> str:
    text = "".join(block.texts)
    if block.call is not None:
        names = f'"id":{_quote(block.call.id)},"name":{_quote(block.call.name)}'
        return f'{{"type":"tool_use",{names},"input":{_object_json(text)}}}'
    signature = ',"signature":""' if block.kind == "thinking" else ""
    return f'{{"type":"{block.kind}","{block.kind}":{_quote(text)}{signature}}}'


def _object_json(arguments: str) -> str:
    """Return a tool's arguments as the JSON object that they must be here."""
    value = decode_lenient(arguments)
    try:
        # Python reads NaN and 1e999, but no JSON can say them.
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        return "{}"
    return text if isinstance(value, dict) else "{}"


class CompleteWriter(_Writer):
    """Says a reply as the older API's completions: text and nothing else.

    Args: cumulative: each event has the whole text so far.
    """

    _id_prefix = "compl"

    def __init__(self, model: str, *, cumulative: bool) -> None:
        super().__init__(model)
        self._cumulative = cumulative
        self._quoted = ""  # the text so far as it stands inside the JSON string

    def frames(self, deltas: list[Delta]) -> bytes:
        out = []
        for delta in deltas:
            if not isinstance(delta, Text):
                self._note(delta)
            elif delta.text:
                out.append(self._completion(_quote(delta.text)[1:-1], "null"))
        return "".join(out).encode("ascii")

    def end(self) -> bytes:
        return self._completion("", f'"{self._stop_reason()}"').encode("ascii")

    def body(self, deltas: list[Delta]) -> bytes:
        for delta in deltas:
            self._note(delta)
        text = "".join(delta.text for delta in deltas if isinstance(delta, Text))
        id, model = self._names()
        return (
            f'{{"type":"completion","completion":{_quote(text)},'
            f'"stop_reason":"{self._stop_reason()}","model":{model},"id":{id}}}'
        ).encode("ascii")

    def _completion(self, new: str, reason: str) -> str:
        if self._cumulative:
            new = self._quoted = self._quoted + new
        id, model = self._names()
        data = (
            f'{{"type":"completion","id":{id},"completion":"{new}",'
            f'"stop_reason":{reason},"model":{model}}}'
        )
        return _event("completion", data)

    def _stop_reason(self) -> str:
        # It knows but two; the end of a turn was a stop sequence then.
        return "max_tokens" if self._reason in _OUT_OF_TOKENS else "stop_sequence"
