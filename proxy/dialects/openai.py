"""OpenAI's chat completions and completions, as upstream.

Also what TGI, vLLM, llama.cpp, Ollama, Fireworks and Azure make of them: the reader
takes all their deviations at once, the ``Profile`` says which request fields a
server accepts.

Sources: https://platform.openai.com/docs/api-reference/chat and TGI's router
(router/src/lib.rs); the deviations were seen in recorded replies (tests/data).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

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
from proxy.dialects.base import Reader, decode_typed, dump
from proxy.errors import InvalidPrompt, UpstreamReported
from proxy.sse import Event

# Models that refuse temperature and stop and want max_completion_tokens.
_REASONING_MODEL = re.compile(r"^(o\d|gpt-5)")


class Profile(msgspec.Struct, frozen=True):
    """What one kind of OpenAI-like server accepts in a request.

    ``max_stops``: most stop sequences it takes (None: any number); the proxy cuts at
    the others itself. ``top_k``, ``presence_penalty``: it knows the field.
    ``reasoning_names``: names like o3 or gpt-5 mean OpenAI's own models.
    ``leaks_end``: its completions end with the raw end-of-text token.
    """

    max_stops: int | None = None
    top_k: bool = False
    presence_penalty: bool = True
    reasoning_names: bool = False
    leaks_end: bool = False


# --------------------------------------------------------------------------- requests


class _Function(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    id: str
    function: _Function
    type: str = "function"


class _Message(msgspec.Struct, omit_defaults=True):
    role: str
    content: str | list[dict[str, object]] | None
    tool_calls: list[_ToolCall] = []
    tool_call_id: str = ""


class _StreamOptions(msgspec.Struct):
    include_usage: bool = True


class _Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    model: str
    messages: list[_Message] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    reasoning_effort: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Sequence[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None


NO_PARAMETERS: dict[str, object] = {"type": "object", "properties": {}}

_encode = msgspec.json.Encoder().encode


def build_chat(request: CompletionRequest, profile: Profile) -> bytes:
    """Return the body of a call of ``…/chat/completions``.

    Raises: InvalidPrompt: there is nothing to answer.
    """
    if not request.messages:
        raise InvalidPrompt("found zero messages in prompt")
    messages: list[_Message] = []
    is_empty = True
    for message in request.messages:
        is_empty = is_empty and message.is_empty
        messages += _messages(message)
    if is_empty:
        raise InvalidPrompt("message content cannot be empty")
    body = _sampling(request, profile)
    body.messages = messages
    if request.tools:
        body.tools = [_tool(tool) for tool in request.tools]
    if request.tools and request.tool_choice is not None:
        body.tool_choice = _tool_choice(request.tool_choice)
    return _encode(body)


def build_completion(request: CompletionRequest, profile: Profile) -> bytes:
    """Return the body of a call of ``…/completions``.

    Raises: InvalidPrompt: there is no text to complete.
    """
    if not request.messages:
        raise InvalidPrompt("found zero messages in prompt")
    body = _sampling(request, profile)
    # A base model knows no roles: what several messages say is one text to it.
    body.prompt = "\n\n".join(message.text for message in request.messages)
    if not body.prompt:
        raise InvalidPrompt("message content cannot be empty")
    return _encode(body)


def _sampling(request: CompletionRequest, profile: Profile) -> _Body:
    if request.top_k is not None and not profile.top_k:
        request.dropped.append("top_k")
    if request.presence_penalty and not profile.presence_penalty:
        request.dropped.append("presence_penalty")
    body = _Body(
        model=request.model,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k if profile.top_k else None,
        stop=request.stop[: profile.max_stops] or None,
        seed=request.seed,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty if profile.presence_penalty else None,
        stream=request.stream,
        stream_options=_StreamOptions() if request.stream else None,
    )
    if profile.reasoning_names and _REASONING_MODEL.match(request.model):
        body.max_completion_tokens = request.max_tokens
        body.reasoning_effort = request.reasoning_effort
        body.temperature = body.top_p = body.stop = None
    else:
        body.max_tokens = request.max_tokens
        if request.reasoning_effort is not None:
            request.dropped.append("reasoning_effort")
    return body


def _messages(message: Message) -> list[_Message]:
    """One neutral message; each tool result is a message of its own here."""
    if len(message.parts) == 1 and isinstance(message.parts[0], TextPart):
        return [_Message(message.role, message.parts[0].text)]  # the usual case
    results = [
        _Message("tool", part.content, tool_call_id=part.id)
        for part in message.parts
        if isinstance(part, ToolResultPart)
    ]
    calls = [
        _ToolCall(part.id, _Function(part.name, part.arguments))
        for part in message.parts
        if isinstance(part, ToolCallPart)
    ]
    content = _content(message.parts)
    if calls:
        return [_Message(message.role, content or None, tool_calls=calls)]
    if results and not content:
        return results
    return [*results, _Message(message.role, content)]


def _content(parts: list[Part]) -> str | list[dict[str, object]]:
    # Many servers' templates take only a string, so parts are used only for images.
    if not any(isinstance(part, ImagePart) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, TextPart))
    content: list[dict[str, object]] = []
    for part in parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, ImagePart):
            image = {"url": part.url}
            if part.detail:
                image["detail"] = part.detail
            content.append({"type": "image_url", "image_url": image})
    return content


def _tool_choice(choice: str) -> str | dict[str, object]:
    if choice in ("auto", "none", "required"):
        return choice
    return {"type": "function", "function": {"name": choice}}


def _tool(tool: Tool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    # Optional for OpenAI, but not for TGI.
    function["parameters"] = tool.parameters or NO_PARAMETERS
    return {"type": "function", "function": function}


# ---------------------------------------------------------------------------- replies
# Only what is used is declared: msgspec skips the rest without building it.


class _FunctionPiece(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, object] | None = None


class _ToolCallPiece(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _FunctionPiece | None = None


class _ContentPart(msgspec.Struct):
    text: str | None = None


class _Content(msgspec.Struct, gc=False):
    """``delta`` of a chunk, ``message`` of a whole reply."""

    content: str | list[_ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    # TGI sends one object where OpenAI sends a list.
    tool_calls: list[_ToolCallPiece] | _ToolCallPiece | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int | None = 0
    delta: _Content | None = None
    message: _Content | None = None
    text: str | None = None
    finish_reason: str | None = None


# Some servers count in floats. NaN and what no counter holds are no counts.
_Count: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=2**63)]


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    """What is beside the choices may be of any type: it must not cost the answer."""

    id: object = None
    model: object = None
    choices: list[_Choice] | None = None
    usage: object = None
    error: object = None


class _TextMessage(msgspec.Struct, gc=False):
    content: str
    refusal: None = None
    reasoning_content: None = None
    reasoning: None = None
    tool_calls: Annotated[list[object], msgspec.Meta(max_length=0)] | None = None


class _TextChoice(msgspec.Struct, gc=False):
    """Of a chat, or of a completion."""

    finish_reason: Literal["stop", "length"]
    message: _TextMessage | None = None
    text: str | None = None
    index: Literal[0] = 0
    delta: None = None


class _TextReply(msgspec.Struct, gc=False):
    """Most whole replies: text and nothing else, just as it should be. Any other is
    looked at more closely.
    """

    id: Annotated[str, msgspec.Meta(min_length=1)]
    model: str
    choices: Annotated[list[_TextChoice], msgspec.Meta(min_length=1, max_length=1)]
    usage: _Usage | None = None
    error: None = None


class _WholeChoice(msgspec.Struct, gc=False):
    finish_reason: Literal["stop", "length", "tool_calls"]


class _Whole(msgspec.Struct, gc=False):
    """A reply that is at least complete."""

    choices: list[_WholeChoice]
    usage: _Usage | None = None
    error: object = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_text_reply = msgspec.json.Decoder(_TextReply).decode


def _as_text_reply(body: bytes) -> _TextReply | None:
    try:
        reply = _decode_text_reply(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    choice = reply.choices[0]
    is_one = (choice.message is None) != (choice.text is None)
    return reply if is_one else None


class OpenAIReader(Reader):
    """Reads chunks of either route, and whole replies of either."""

    # Most replies have no calls: of both nothing is changed in place.
    _calls: Mapping[int, tuple[str, str]] = {}  # ids and names
    _unnamed: Mapping[int, str] = {}  # arguments
    _last_call = 0

    def read(self, event: Event, out: list[Delta]) -> None:
        data = event.data
        if data.startswith("{") and event.type != "error":
            chunk = decode_typed(data, _Chunk, _decode_chunk)
            if chunk is None:
                self.read_odd(event)
            elif chunk.error or not chunk.choices:
                self._read_without_choices(chunk, event, out)
            else:
                self._read_chunk(chunk, chunk.choices, out)
        elif data.strip() == "[DONE]":
            self.ended = True
        else:
            self.read_odd(event)

    def read_body(self, body: bytes) -> list[Delta]:
        if (reply := _as_text_reply(body)) is not None:
            return self._read_text_reply(reply)
        out: list[Delta] = []
        chunk = decode_typed(body, _Chunk, _decode_chunk)
        if chunk is None or chunk.error or not chunk.choices:
            raise self.odd_body(body, "choices")
        self._read_chunk(chunk, chunk.choices, out)
        if not self.finished:
            out.append(Finish(""))
        self.finished = self.ended = True
        return out

    def _read_text_reply(self, reply: _TextReply) -> list[Delta]:
        self.understood = self.finished = self.ended = True
        self.model = reply.model
        if reply.usage is not None:
            self._keep_usage(reply.usage)
        (choice,) = reply.choices
        out: list[Delta] = [Start(reply.id, reply.model)]
        message = choice.message
        if content := choice.text if message is None else message.content:
            out.append(Text(content))
        out.append(Finish(choice.finish_reason))
        return out

    def check_body(self, body: bytes) -> bool:
        if (reply := _as_text_reply(body)) is not None:
            if reply.usage is not None:
                self._keep_usage(reply.usage)
            return True
        self._check_other_body(body)
        return False

    def _check_other_body(self, body: bytes) -> None:
        try:
            reply = _decode_whole(body)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            self.read_body(body)
            return
        if reply.error or not reply.choices:
            self.read_body(body)
        elif reply.usage is not None:
            self._keep_usage(reply.usage)

    def _read_chunk(
        self, chunk: _Chunk, choices: list[_Choice], out: list[Delta]
    ) -> None:
        if not self.understood:
            self._read_start(chunk, out)
        if chunk.usage is not None:
            self._read_usage(chunk.usage)
        if self.finished:
            return
        for choice in choices:
            if not choice.index:
                self._read_choice(choice, out)

    def _read_start(self, chunk: _Chunk, out: list[Delta]) -> None:
        self.understood = True
        self.model = chunk.model if isinstance(chunk.model, str) else ""
        out.append(Start(chunk.id if isinstance(chunk.id, str) else "", self.model))

    def _read_choice(self, choice: _Choice, out: list[Delta]) -> None:
        content = choice.delta or choice.message
        if content is not None:
            self._read_content(content, out)
        elif choice.text:
            out.append(Text(choice.text))
        reason = choice.finish_reason
        if reason:  # TGI: "" until the last chunk
            if reason in ("abort", "error"):
                raise UpstreamReported(
                    f"upstream gave up on the reply (finish_reason {reason})",
                    type=reason,
                )
            self.finished = True
            out.append(Finish(reason))

    def _read_content(self, content: _Content, out: list[Delta]) -> None:
        thinking = content.reasoning_content or content.reasoning
        if thinking:
            out.append(Thinking(thinking))
        text = content.content
        if isinstance(text, list):  # Mistral
            text = "".join(part.text or "" for part in text)
        if text:
            out.append(Text(text))
        if content.refusal:
            out.append(Text(content.refusal))
        if content.tool_calls:
            self._read_tool_calls(content.tool_calls, out)

    def _read_tool_calls(
        self, calls: list[_ToolCallPiece] | _ToolCallPiece, out: list[Delta]
    ) -> None:
        pieces = calls if isinstance(calls, list) else [calls]
        for position, piece in enumerate(pieces):
            function = piece.function or _FunctionPiece()
            index = piece.index
            if index is None:  # whole replies have no index; odd streams neither
                index = position if len(pieces) > 1 else self._index_of(piece)
            call_id, name = self._calls.get(index, ("", ""))
            call_id = call_id or piece.id or f"call_{index}"
            if index not in self._calls and self._is_taken(call_id):
                call_id = f"call_{index}"  # TGI calls every call "0"
            # NIM repeats the name in every piece: the first one counts.
            name = name or function.name or ""
            self._calls = {**self._calls, index: (call_id, name)}
            self._last_call = index
            arguments = function.arguments or ""
            if isinstance(arguments, dict):  # TGI's whole replies
                arguments = dump(arguments)
            arguments = self._unnamed.get(index, "") + arguments
            self._unnamed = {**self._unnamed, index: "" if name else arguments}
            if name:
                out.append(ToolCall(index, call_id, name, arguments))
            # else it waits: clients lose a call that begins without its name

    def _is_taken(self, call_id: str) -> bool:
        return any(call_id == taken for taken, _ in self._calls.values())

    def _index_of(self, piece: _ToolCallPiece) -> int:
        for index, (call_id, _) in self._calls.items():
            if piece.id == call_id:
                return index
        return len(self._calls) if piece.id else self._last_call

    def _read_usage(self, value: object) -> None:
        try:
            usage = msgspec.convert(value, _Usage, strict=False)
        except (msgspec.ValidationError, UnicodeError):
            return
        self._keep_usage(usage)

    def _keep_usage(self, usage: _Usage) -> None:
        # LocalAI puts zeros into every chunk.
        if usage.prompt_tokens or usage.completion_tokens:
            details = usage.prompt_tokens_details
            self.usage = Usage(
                int(usage.prompt_tokens or 0),
                int(usage.completion_tokens or 0),
                details.cached_tokens if details else None,
            )

    def _read_without_choices(
        self, chunk: _Chunk, event: Event, out: list[Delta]
    ) -> None:
        """An error, a usage chunk, Azure's preamble, or nothing we know."""
        if chunk.error or (chunk.choices is None and chunk.usage is None):
            self.read_odd(event)
            return
        if not self.understood:
            self._read_start(chunk, out)
        if chunk.usage is not None:
            self._read_usage(chunk.usage)
