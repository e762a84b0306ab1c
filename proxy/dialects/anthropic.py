"""Anthropic's messages, as upstream: requests to build, replies to read.

Source: https://docs.anthropic.com/en/api/messages and …/messages-streaming.
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
    ToolResultPart,
    Usage,
)
from proxy.dialects.base import Reader, decode_typed, dump
from proxy.dialects.fault import decode_arguments
from proxy.errors import InvalidPrompt, UpstreamReported
from proxy.sse import Event

# Names that were aliases once and now need their exact version.
PINNED_MODELS = {
    "claude-instant-1": "claude-instant-1.2",
    "claude-instant-v1": "claude-instant-1.2",
    "claude-2": "claude-2.0",
}
_LOW_EFFORT_TOKENS = 1024

# --------------------------------------------------------------------------- requests


class _Thinking(msgspec.Struct):
    budget_tokens: int
    type: str = "enabled"


class _Tool(msgspec.Struct, omit_defaults=True):
    name: str
    input_schema: dict[str, object]
    description: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: list[dict[str, object]]


class _Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    messages: list[_Message]
    max_tokens: int | None
    stream: bool
    system: str | list[dict[str, object]] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: dict[str, str] | None = None
    thinking: _Thinking | None = None


_encode = msgspec.json.Encoder().encode


def build_messages(
    request: CompletionRequest, *, system_in_messages: bool = False
) -> bytes:
    """Return the body of a call of ``/v1/messages``.

    Args:   system_in_messages: leave the system prompt where Cody Gateway expects
            it, as the first message.
    Raises: InvalidPrompt: messages that the API would refuse.
    """
    system, messages = _split_system(request.messages)
    wire = _merge(messages)
    if not wire:
        raise InvalidPrompt("message content cannot be empty")
    body = _Body(
        model=PINNED_MODELS.get(request.model, request.model),
        messages=wire,
        max_tokens=request.max_tokens,
        stream=request.stream,
        temperature=_clamp(request.temperature),
        # Newer models refuse both; the temperature is what clients mean to set.
        top_p=request.top_p if request.temperature is None else None,
        top_k=request.top_k,
        # Blank ones are refused; the proxy cuts at them itself.
        stop_sequences=[stop for stop in request.stop if stop.strip()] or None,
        tools=[
            _Tool(t.name, t.parameters or {"type": "object"}, t.description)
            for t in request.tools
        ]
        or None,
    )
    if request.tools and request.tool_choice is not None:
        body.tool_choice = _tool_choice(request.tool_choice)
    if system is not None:
        _place_system(body, system, system_in_messages)
    if request.reasoning_effort and request.feature == "chat":
        _think(body, request.reasoning_effort)
    return _encode(body)


def _split_system(messages: list[Message]) -> tuple[Message | None, list[Message]]:
    if not messages:
        raise InvalidPrompt("found zero messages in prompt")
    system = messages[0] if messages[0].role == "system" else None
    rest = messages[1:] if system else messages
    if any(message.role == "system" for message in rest):
        raise InvalidPrompt("system role can only be used in the first message")
    if any(message.is_empty for message in messages):
        raise InvalidPrompt("message content cannot be empty")
    if not rest:
        raise InvalidPrompt("found no message besides the system prompt")
    return system, rest


def _merge(messages: list[Message]) -> list[_Message]:
    """Join neighbours of one role: the API wants them to alternate."""
    wire: list[_Message] = []
    for message in messages:
        content = _content(message.parts)
        if wire and wire[-1].role == message.role:
            wire[-1].content.extend(content)
        else:
            wire.append(_Message(message.role, content))
    last = wire[-1]
    if last.role == "assistant" and "text" in last.content[-1]:
        # "final assistant content cannot end with trailing whitespace"
        text = str(last.content[-1]["text"]).rstrip()
        last.content[-1]["text"] = text
        if not text:
            last.content.pop()
    return wire if last.content else wire[:-1]


def _tool_choice(choice: str) -> dict[str, str]:
    types = {"auto": "auto", "none": "none", "required": "any"}
    if choice in types:
        return {"type": types[choice]}
    return {"type": "tool", "name": choice}


def _place_system(body: _Body, system: Message, in_messages: bool) -> None:
    content = _content(system.parts)
    if in_messages:
        body.messages.insert(0, _Message("system", content))
    elif len(content) == 1 and "cache_control" not in content[0]:
        body.system = system.text
    else:
        body.system = content


def _think(body: _Body, effort: str) -> None:
    """Reserve part of the answer's tokens; the API wants 1,024 at least."""
    half = (body.max_tokens or 0) // 2
    if half < _LOW_EFFORT_TOKENS:
        return
    body.thinking = _Thinking(_LOW_EFFORT_TOKENS if effort == "low" else half)
    body.temperature, body.top_k, body.top_p = 1.0, None, None


def _clamp(temperature: float | None) -> float | None:
    return None if temperature is None else min(max(temperature, 0.0), 1.0)


def _content(parts: list[Part]) -> list[dict[str, object]]:
    # Empty text blocks are refused, even beside others.
    return [
        _block(part) for part in parts if not isinstance(part, TextPart) or part.text
    ]


def _block(part: Part) -> dict[str, object]:
    if isinstance(part, TextPart):
        block: dict[str, object] = {"type": "text", "text": part.text}
        if part.cached:
            block["cache_control"] = {"type": "ephemeral"}
        return block
    if isinstance(part, ImagePart):
        return {"type": "image", "source": _image_source(part.url)}
    if isinstance(part, ToolResultPart):
        return {"type": "tool_result", "tool_use_id": part.id, "content": part.content}
    return {
        "type": "tool_use",
        "id": part.id,
        "name": part.name,
        "input": decode_arguments(part.arguments),
    }


def _image_source(url: str) -> dict[str, str]:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    head, _, data = url[len("data:") :].partition(",")
    return {"type": "base64", "media_type": head.partition(";")[0], "data": data}


# ---------------------------------------------------------------------------- replies


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Block(msgspec.Struct, gc=False):
    """``content_block`` of a start event, or an item of a whole reply."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, object] | None = None


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Reply(msgspec.Struct, gc=False):
    """A whole reply, and ``message`` of ``message_start``."""

    id: str = ""
    model: str = ""
    content: list[_Block] | None = None
    stop_reason: str | None = None
    usage: _Usage | None = None


class _Event(msgspec.Struct, gc=False):
    type: str = ""
    index: int = 0
    message: _Reply | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_reply = msgspec.json.Decoder(_Reply).decode

_SILENT = {"ping", "content_block_stop"}


class MessagesReader(Reader):
    """Reads the events of a streamed message, and whole messages."""

    def __init__(self) -> None:
        # Content block index -> (number among the tool calls, id, name).
        self._calls: dict[int, tuple[int, str, str]] = {}
        self._input_tokens = 0
        self._cached_tokens: int | None = None

    def read(self, event: Event, out: list[Delta]) -> None:
        wire = decode_typed(event.data, _Event, _decode_event)
        if wire is None:
            self.read_odd(event)
        elif wire.type == "content_block_delta" and wire.delta is not None:
            self._read_delta(wire.index, wire.delta, out)
        elif wire.type == "content_block_start" and wire.content_block is not None:
            self._read_block(wire.index, wire.content_block, out)
        elif wire.type == "message_delta":
            self._read_message_delta(wire, out)
        elif wire.type == "message_start" and wire.message is not None:
            self._read_start(wire.message, out)
        elif wire.type == "message_stop":
            self.ended = True
        elif wire.type not in _SILENT:
            self.read_odd(event)

    def read_body(self, body: bytes) -> list[Delta]:
        out: list[Delta] = []
        reply = decode_typed(body, _Reply, _decode_reply)
        if reply is None or reply.content is None:
            raise self.odd_body(body, "content")
        self._read_start(reply, out)
        self.finished = self.ended = True
        for index, block in enumerate(reply.content):
            self._read_block(index, block, out)
        out.append(Finish(reply.stop_reason or ""))
        return out

    def eof(self) -> None:
        if self.finished and not self.ended:
            # The stop reason is in, but the API ends every reply with message_stop:
            # without it something between here and there cut the stream.
            self.finished = False
        super().eof()

    def _read_start(self, message: _Reply, out: list[Delta]) -> None:
        self.understood = True
        self.model = message.model
        self._read_usage(message.usage)
        out.append(Start(message.id, message.model))

    def _read_block(self, index: int, block: _Block, out: list[Delta]) -> None:
        if block.text:
            out.append(Text(block.text))
        if block.thinking:
            out.append(Thinking(block.thinking))
        if block.type == "tool_use":
            number = len(self._calls)
            self._calls[index] = number, block.id, block.name
            # A stream starts with {} and sends the arguments in pieces.
            whole = block.input is not None and (self.finished or bool(block.input))
            arguments = dump(block.input) if whole else ""
            out.append(ToolCall(number, block.id, block.name, arguments))

    def _read_delta(self, index: int, delta: _Delta, out: list[Delta]) -> None:
        self.understood = True
        if delta.text:
            out.append(Text(delta.text))
        elif delta.thinking:
            out.append(Thinking(delta.thinking))
        elif delta.partial_json and index in self._calls:
            out.append(ToolCall(*self._calls[index], delta.partial_json))

    def _read_message_delta(self, wire: _Event, out: list[Delta]) -> None:
        self._read_usage(wire.usage)
        if wire.delta is not None and wire.delta.stop_reason and not self.finished:
            self.finished = True
            out.append(Finish(wire.delta.stop_reason))

    def _read_usage(self, usage: _Usage | None) -> None:
        """The input comes first, the output at the end; the latest of each counts."""
        if usage is None:
            return
        read = usage.cache_read_input_tokens
        if usage.input_tokens is not None:
            created = usage.cache_creation_input_tokens or 0
            self._input_tokens = usage.input_tokens + (read or 0) + created
        if read is not None:
            self._cached_tokens = read
        self.usage = Usage(
            self._input_tokens, usage.output_tokens or 0, self._cached_tokens
        )

    def name_fault(self, fault: UpstreamReported) -> UpstreamReported:
        # llama.cpp sends the bare error object without the envelope of the API.
        typed = f"{fault.type}: " if fault.type else ""
        fault.message = f"Anthropic: {typed}{fault.detail}"
        return fault
