"""Sourcegraph Cody's completions: legacy (no api-version) and api-version 1 to 8.

Clients' parsers are stricter than any SSE parser (they stall on a comment, an
unknown event name, a missing blank after a colon), and some decode each socket read
by itself: so frames are exactly two lines and a blank one, and pure ASCII.
"""

import json
import re
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as _quote

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
    single,
)
from proxy.dialects.base import (
    EVENT_STREAM,
    Head,
    Reply,
    Writer,
    at_least_zero,
    dump,
    error_headers,
    frame_each,
    positive,
    quote_each,
    texts_of,
)
from proxy.dialects.fault import replace_surrogates
from proxy.errors import (
    InvalidPrompt,
    InvalidRequest,
    ProxyError,
    UnsupportedVersion,
    UpstreamFault,
    UpstreamReported,
    UpstreamStatus,
)

MAX_VERSION = 8
DELTA_VERSION = 2  # from here on frames carry only the new text
USAGE_VERSION = 5
TOOLS_VERSION = 8  # and thinking

# What a client gets that does not say how much it wants.
DEFAULT_MAX_TOKENS = {"chat": 4000, "code": 256}

_PREAMBLE = "You are Cody, an AI"

# ----------------------------------------------------------------------- request body


class _Url(msgspec.Struct):
    url: str = ""
    detail: str | None = None


class _ToolCallWire(msgspec.Struct):
    id: str = ""
    name: str = ""
    arguments: object = ""


class _ToolResultWire(msgspec.Struct):
    id: str = ""
    content: object = ""


class _File(msgspec.Struct):
    uri: str | None = ""
    language_id: str | None = None
    content: str | None = None


class _PartWire(msgspec.Struct):
    """Every kind of part at once: unknown kinds and keys must not be an error."""

    type: str = ""
    text: str | None = None
    cache_control: object = None
    image_url: _Url | str | None = None
    tool_call: _ToolCallWire | None = None
    tool_result: _ToolResultWire | None = None
    file: _File | None = None
    uri: object = None
    content: object = None


class _MessageWire(msgspec.Struct):
    speaker: str | None = ""
    text: str | None = None
    content: str | list[_PartWire] | None = None


class _FunctionWire(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None


class _ToolWire(msgspec.Struct):
    function: _FunctionWire


class _BodyWire(msgspec.Struct, rename="camel"):
    messages: list[_MessageWire] | None = None
    prompt: str | None = None
    max_tokens_to_sample: float | None = None
    temperature: float | None = None
    top_k: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    model: str | None = None
    stream: bool | None = None
    fast: bool | None = None
    tools: list[_ToolWire] | None = None


_decode_body = msgspec.json.Decoder(_BodyWire | None).decode


def _decode(body: bytes) -> _BodyWire:
    try:
        return _decode_body(body) or _BodyWire()
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"could not decode request body: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _decode_tolerantly(body)


def _decode_tolerantly(body: bytes) -> _BodyWire:
    """Decode what Go's decoder takes and msgspec does not.

    Trailing garbage is not looked at; a byte order mark, bytes that are not UTF-8 and
    halves of an emoji cost no more than themselves.
    """
    try:
        text = body.decode("utf-8-sig", "replace").lstrip()
        value, _ = json.JSONDecoder().raw_decode(text)
        return (
            msgspec.convert(replace_surrogates(value), _BodyWire | None) or _BodyWire()
        )
    except RecursionError:
        reason = "nested too deeply"
    except (msgspec.ValidationError, ValueError) as error:
        reason = str(error)
    raise InvalidRequest(f"could not decode request body: {reason}")


# --------------------------------------------------------------------------- messages

# Others stay as they are: whoever checks the messages quotes them.
_ROLES = {"human": "user"}


def _message(wire: _MessageWire) -> Message:
    if isinstance(wire.content, str) and wire.content:
        parts: list[Part] = [TextPart(wire.content)]
    elif isinstance(wire.content, list) and wire.content:
        parts = [part for item in wire.content if (part := _part(item)) is not None]
    else:
        parts = [TextPart(wire.text or "")]
    speaker = wire.speaker or ""
    return Message(_ROLES.get(speaker, speaker), parts)


def _part(wire: _PartWire) -> Part | None:
    """One content part; None for what only a Sourcegraph instance could expand."""
    if wire.image_url is not None:
        image = wire.image_url
        if isinstance(image, str):
            return ImagePart(image)
        return ImagePart(image.url, image.detail)
    if wire.tool_call is not None:
        call = wire.tool_call
        return ToolCallPart(call.id, call.name, _as_text(call.arguments))
    if wire.tool_result is not None:
        return _tool_result(wire.tool_result)
    if wire.type in ("file", "context_file"):
        return _file(wire)
    if wire.type in ("repo", "context_repo"):
        return None
    return TextPart(wire.text or "", cached=wire.cache_control is not None)


def _tool_result(wire: _ToolResultWire) -> ToolResultPart:
    content = wire.content
    if isinstance(content, list):
        texts = (str(p.get("text", "")) for p in content if isinstance(p, dict))
        content = "".join(texts)
    return ToolResultPart(wire.id, _as_text(content))


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _file(wire: _PartWire) -> TextPart | None:
    uri, language, content = str(wire.uri or ""), "", wire.content
    if wire.file is not None:
        uri, content = wire.file.uri or "", wire.file.content
        language = wire.file.language_id or ""
    if not isinstance(content, str):
        return None
    return TextPart(f"{uri}\n```{language}\n{content}\n```\n")


def convert_legacy(messages: list[Message]) -> list[Message]:
    """Turn the messages of a client that sends no api-version into a plain chat.

    Such clients put the system prompt into the first human message, leave "holes" (a
    question without its answer, or an empty answer), and end with an empty assistant
    message, or with one that the model is to continue.
    """
    rest = list(messages)
    system: list[Message] = []
    if rest and rest[0].text.startswith(_PREAMBLE):
        system = [Message("system", rest.pop(0).parts)]
        if rest and rest[0].role == "assistant":
            rest.pop(0)  # "I am Cody, an AI coding assistant"
    rest = _drop_holes(_drop_empty_end(rest))
    if rest and rest[-1].role == "assistant":
        rest[-1] = _rstrip(rest[-1])
        rest = _drop_empty_end(rest)
    if system and not rest:
        # The question stands in the same message as the preamble.
        return [Message("user", system[0].parts)]
    return system + rest


def _drop_holes(messages: list[Message]) -> list[Message]:
    kept = []
    for i, message in enumerate(messages):
        following = messages[i + 1] if i + 1 < len(messages) else None
        unanswered = _is_hole(following) and message.role == "user"
        if not _is_hole(message) and not unanswered:
            kept.append(message)
    return kept


def _is_hole(message: Message | None) -> bool:
    return message is not None and message.role == "assistant" and message.is_empty


def _drop_empty_end(messages: list[Message]) -> list[Message]:
    kept = list(messages)
    while kept and _is_hole(kept[-1]):
        kept.pop()
    return kept


def _rstrip(message: Message) -> Message:
    *before, last = message.parts
    if not isinstance(last, TextPart):
        return message
    return Message(message.role, [*before, TextPart(last.text.rstrip(" \t\n\r"))])


# ---------------------------------------------------------------------------- request


_VERSIONS = {"": 0, **{str(version): version for version in range(MAX_VERSION + 1)}}


def parse_version(value: str) -> int:
    """Return the api-version, 0 for a legacy client, at most the highest we speak.

    Raises: UnsupportedVersion: not a number.
    """
    if (version := _VERSIONS.get(value)) is not None:  # what clients send
        return version
    text = value.strip()
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()):
        raise UnsupportedVersion("Unsupported API Version (Please update your client)")
    return min(int(text.lstrip("0")[:9] or "0"), MAX_VERSION)


# Clients that know context filters. "web" is served by the instance itself, so it is
# never too old; others have no minimum, but need a version.
_CLIENT_MINIMUMS = {"vscode": (1, 20, 0), "jetbrains": (6, 0, 0)}
_SEMVER = re.compile(
    r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?(-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?"
)


def check_client(query: Mapping[str, str]) -> None:
    """Check ``client-name`` and ``client-version`` as the original does.

    Raises: UnsupportedVersion: one is missing, or the client is too old.
            InvalidRequest: the version is none.
    """
    name, version = query.get("client-name", ""), query.get("client-version", "")
    if not name:
        raise _incompatible('"client-name" query param is required.')
    if name == "web":
        return
    if not version:
        raise _incompatible('"client-version" query param is required.')
    match = _SEMVER.fullmatch(version)
    if match is None:
        raise InvalidRequest(
            f'{_INCOMPATIBLE}Cody for {name} version "{version}" doesn\'t follow '
            "semver spec."
        )
    minimum = _CLIENT_MINIMUMS.get(name)
    numbers = tuple(int(number or 0) for number in match.group(1, 2, 3))
    # A pre-release satisfies no constraint that names none itself.
    if minimum is not None and (numbers < minimum or match[4]):
        raise _incompatible(
            f'Cody for {name} version "{version}" doesn\'t match version constraint '
            f'">= {".".join(map(str, minimum))}". Please upgrade your client.'
        )


_INCOMPATIBLE = "ClientCodyIgnoreCompatibilityError: "


def _incompatible(text: str) -> UnsupportedVersion:
    return UnsupportedVersion(_INCOMPATIBLE + text)


def _request(feature: Feature, version: int, wire: _BodyWire) -> CompletionRequest:
    messages = wire.messages or []
    if not messages and wire.prompt:  # clients of early 2023
        messages = [_MessageWire("human", wire.prompt)]
    stops = wire.stop_sequences or []
    return CompletionRequest(
        feature=feature,
        messages=_convert(version, [_message(message) for message in messages]),
        model=(wire.model or "").strip(),
        fast=bool(wire.fast) and feature == "chat",
        stream=feature == "chat" if wire.stream is None else wire.stream,
        max_tokens=positive(wire.max_tokens_to_sample) or DEFAULT_MAX_TOKENS[feature],
        temperature=at_least_zero(wire.temperature),
        top_p=_below_one(wire.top_p),
        top_k=positive(wire.top_k),
        stop=[*dict.fromkeys([stop for stop in stops if stop])] if stops else [],
        # An older client could not read the calls.
        tools=[_tool(t.function) for t in wire.tools or () if version >= TOOLS_VERSION],
    )


def _convert(version: int, messages: list[Message]) -> list[Message]:
    return _drop_empty_end(messages) if version else convert_legacy(messages)


def _tool(wire: _FunctionWire) -> Tool:
    return Tool(wire.name, wire.description, wire.parameters)


def _below_one(value: float | None) -> float | None:
    return value if value is not None and 0 < single(value) < 1 else None


class Completions:
    """``/.api/completions/stream`` (feature chat) and ``/code`` (feature code).

    Args: check_client: refuse clients that are too old to know context filters.
    """

    dialect = "cody"

    def __init__(self, feature: Feature, *, check_client: bool = False) -> None:
        self._feature: Feature = feature
        self._check_client = check_client

    def check(self, head: Head) -> None:
        parse_version(head.query.get("api-version", ""))
        if self._check_client:
            check_client(head.query)

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        version = parse_version(head.query.get("api-version", ""))
        request = _request(self._feature, version, _decode(body))
        writer: Writer = (
            DeltaWriter(version, request.stream)
            if version >= DELTA_VERSION
            else CumulativeWriter(version, request.stream)
        )
        return request, writer

    def error_reply(self, error: ProxyError) -> Reply:
        return plain_error(error.status, error.message, error.headers)


# ---------------------------------------------------------------------------- replies

_STREAM_HEADERS = {
    # Byte for byte: clients compare it, and a charset makes them parse JSON.
    "Content-Type": EVENT_STREAM,
    "Cache-Control": "no-cache",
    "Connection": "keep-alive",
    "X-Accel-Buffering": "no",
}
_DONE = b"event: done\ndata: {}\n\n"

# How servers word that a prompt is longer than their context: vLLM and OpenAI, llama.cpp,
# TGI, Anthropic, Gemini.
_TOO_LONG = re.compile(
    r"maximum context length|context_length_exceeded|available context size"
    r"|`inputs` tokens|`inputs` must have less than|prompt is too long"
    r"|input token count"
)
_TOKEN_LIMIT = "token limit"


def _worded(message: str) -> str:
    """Return an error's text with the words by which clients know what it is about."""
    if _TOKEN_LIMIT in message or not _TOO_LONG.search(message):
        return message
    return f"{message} (the prompt exceeds the model's {_TOKEN_LIMIT})"


def plain_error(status: int, text: str, headers: Mapping[str, str]) -> Reply:
    """What Go's ``http.Error`` writes: clients print the text as it is."""
    return Reply(
        status,
        "text/plain; charset=utf-8",
        text.encode(errors="replace") + b"\n",
        {**headers, "X-Content-Type-Options": "nosniff"},
    )


class _CodyWriter:
    """What all versions have in common."""

    stream_headers = _STREAM_HEADERS

    def __init__(self, version: int, stream: bool) -> None:
        self._version = version
        self._stream = stream
        self._model = ""

    def end(self) -> bytes:
        return _DONE

    def error(self, error: ProxyError) -> bytes:
        # The client hangs without "done", even after an error.
        data = _quote(_worded(error.message))
        return f'event: error\ndata: {{"error":{data}}}\n\n'.encode("ascii") + _DONE

    def error_reply(self, error: ProxyError) -> Reply:
        """Nothing was sent yet: a real status where clients act on it.

        Never 401 or 403 of an upstream: the client would take it as a verdict on its
        own token and log its user out.
        """
        if self._stream and error.status != 429 and _is_in_stream(error):
            return Reply(200, EVENT_STREAM, self.error(error), dict(_STREAM_HEADERS))
        message = _worded(error.message)
        return plain_error(_plain_status(error), message, error_headers(error))

    def body(self, deltas: list[Delta]) -> bytes:
        # Put together, since an encoder for this form costs more than all the rest.
        texts: list[str] = []
        reason: str | None = None
        model, usage = "", ""
        is_more = False
        for delta in deltas:
            if type(delta) is Text:
                texts.append(delta.text)
            elif type(delta) is Finish:
                reason = delta.reason if reason is None else reason
            elif type(delta) is Start:
                model = f',"model":{_quote(delta.model)}' if delta.model else model
            elif type(delta) is Usage:
                usage = f',"usage":{_usage(delta)}'
            else:
                is_more = True
        text, ending = _quote("".join(texts)), _quote(reason or "")
        reply = f'{{"completion":{text},"stopReason":{ending}'
        if self._version >= USAGE_VERSION:
            reply += model + usage
        if (
            is_more
            and self._version >= TOOLS_VERSION
            and (fields := _thoughts_and_calls(deltas))
        ):
            more = dump(fields)
            reply += f",{more[1:-1]}"
        return f"{reply}}}\n".encode("ascii")


_MOST_REPEATED_CHARS = 64 * 1024


class CumulativeWriter(_CodyWriter):
    """Legacy and api-version 1: each frame has the whole text so far."""

    def __init__(self, version: int, stream: bool) -> None:
        super().__init__(version, stream)
        self._quoted = ""  # the text so far as it stands inside the JSON string

    def frames(self, deltas: list[Delta]) -> bytes:
        out = []
        if len(deltas) > 1:
            deltas = self._joined(deltas)
        for delta in deltas:
            if type(delta) is Text:
                self._quoted += _quote(delta.text)[1:-1]
                out.append(self._frame('""'))
            elif type(delta) is Finish:
                out.append(self._frame(_quote(delta.reason)))
        return "".join(out).encode("ascii")

    def _joined(self, deltas: list[Delta]) -> list[Delta]:
        """Say together what came together, before it becomes too many copies of the
        text so far: clients look at the last one of a read only.
        """
        texts = [delta.text for delta in deltas if type(delta) is Text]
        text = "".join(texts)
        if not self._is_too_much(len(texts), len(text)):
            return deltas
        return [Text(text), *(delta for delta in deltas if type(delta) is not Text)]

    def _is_too_much(self, frames: int, new_chars: int) -> bool:
        return frames * (len(self._quoted) + new_chars) > _MOST_REPEATED_CHARS

    def literals(self, texts: list[bytes]) -> bytes | None:
        new = [text.decode("ascii") for text in texts]
        if len(new) > 1 and "\\" in "".join(new):
            return None  # what is too much counts the text, not what it is written as
        if len(new) > 1 and self._is_too_much(len(new), sum(map(len, new))):
            new = ["".join(new)]
        out = []
        for text in new:
            self._quoted += text
            out.append(self._frame('""'))
        return "".join(out).encode("ascii")

    def keep_alive(self) -> bytes:
        return self._frame('""').encode("ascii")

    def _frame(self, reason: str) -> str:
        return (
            f'event: completion\ndata: {{"completion":"{self._quoted}",'
            f'"stopReason":{reason}}}\n\n'
        )


_DELTA = 'event: completion\ndata: {"deltaText":'
_DELTA_LITERAL = f'{_DELTA}"'.encode("ascii")


class DeltaWriter(_CodyWriter):
    """From api-version 2 on: each frame has only what is new."""

    def frames(self, deltas: list[Delta]) -> bytes:
        if (texts := texts_of(deltas)) is not None:
            return quote_each(texts, _DELTA, "}\n\n").encode("ascii")
        out = []
        for delta in deltas:
            if type(delta) is Text:
                fields = f'"deltaText":{_quote(delta.text)}'
            else:
                fields = self._fields(delta)
            if fields:
                out.append(f"event: completion\ndata: {{{fields}}}\n\n")
        return "".join(out).encode("ascii")

    def keep_alive(self) -> bytes:
        # Its clients' parser stops at a comment for good.
        return f'{_DELTA}""}}\n\n'.encode("ascii")

    def literals(self, texts: list[bytes]) -> bytes | None:
        return frame_each(texts, _DELTA_LITERAL, b'"}\n\n')

    def _fields(self, delta: Delta) -> str:
        """Everything but text; "" for what the client's version does not know."""
        if isinstance(delta, Finish):
            return f'"stopReason":{_quote(delta.reason)}{self._model_field()}'
        if isinstance(delta, Start):
            self._model = delta.model
        elif isinstance(delta, Usage) and self._version >= USAGE_VERSION:
            return f'"usage":{_usage(delta)}{self._model_field()}'
        elif isinstance(delta, Thinking) and self._version >= TOOLS_VERSION:
            return f'"delta_thinking":{_quote(delta.text)}'
        elif isinstance(delta, ToolCall) and self._version >= TOOLS_VERSION:
            call = dump(_call(delta))
            return f'"delta_tool_calls":[{call}]'
        return ""

    def _model_field(self) -> str:
        known = self._model and self._version >= USAGE_VERSION
        return f',"model":{_quote(self._model)}' if known else ""


def _is_in_stream(error: ProxyError) -> bool:
    return isinstance(error, UpstreamFault | InvalidPrompt)


def _plain_status(error: ProxyError) -> int:
    if isinstance(error, UpstreamStatus | UpstreamReported):
        return error.status if error.status in (429, 504) else 503
    return error.status


def _usage(usage: Usage) -> str:
    """As JSON."""
    asked, answered = usage.prompt_tokens, usage.completion_tokens
    text = (
        f'{{"completion_tokens":{answered},"prompt_tokens":{asked},'
        f'"total_tokens":{asked + answered}'
    )
    if usage.cached_tokens is not None:
        text += f',"prompt_tokens_details":{{"cached_tokens":{usage.cached_tokens}}}'
    return text + "}"


def _call(call: ToolCall) -> dict[str, object]:
    # Every piece repeats id and name: clients append the arguments by id.
    function = {"name": call.name, "arguments": call.arguments}
    return {"type": "function", "id": call.id, "function": function}


def _thoughts_and_calls(deltas: list[Delta]) -> dict[str, object]:
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        if isinstance(delta, ToolCall):
            before = calls[delta.index].arguments if delta.index in calls else ""
            calls[delta.index] = ToolCall(
                delta.index, delta.id, delta.name, before + delta.arguments
            )
    fields: dict[str, object] = {}
    if thinking := "".join(d.text for d in deltas if isinstance(d, Thinking)):
        fields["delta_thinking"] = thinking
    if calls:
        fields["delta_tool_calls"] = [_call(call) for call in calls.values()]
    return fields
