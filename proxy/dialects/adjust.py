"""Fix-ups where a server deviates from the dialect that it claims to speak.

For traffic that is passed through, client and upstream speaking the same dialect: a
request loses what this kind of server refuses, a reply gets what clients rely on. Each
fix-up has a name, which the client is told (``x-proxy-adjusted``) and the log keeps.
What needs no fix-up keeps its bytes.
"""

import json
import random
import re
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from proxy.completion import single
from proxy.dialects.fault import replace_surrogates
from proxy.errors import InvalidRequest

Fields: TypeAlias = dict[str, msgspec.Raw]

_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

# --------------------------------------------------------------------------- requests


def decode_fields(body: bytes) -> Fields:
    """Return the fields of a JSON object, each value as the bytes it came in.

    Raises: InvalidRequest: it is none.
    """
    try:
        return _decode_fields(body)
    except RecursionError:
        reason = "nested too deeply"
    except (msgspec.DecodeError, UnicodeError) as error:
        reason = str(error)
    raise InvalidRequest(f"could not decode request body: {reason}")


def encode_fields(fields: Fields) -> bytes:
    return _encode(fields)


def raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))


def mend(body: bytes) -> bytes | None:
    """Return a body without halves of an emoji and bytes that are not UTF-8.

    None if that is not what is wrong with it. JavaScript cuts strings between the two
    halves, and no strict decoder takes what is left.
    """
    try:
        value = json.loads(body.decode("utf-8-sig", "replace"))
        mended = _encode(replace_surrogates(value))
        return mended if _decode_any(mended) and not _is_sound(body) else None
    except (ValueError, RecursionError):
        return None


def _is_sound(body: bytes) -> bool:
    try:
        _decode_any(body)
    except (msgspec.DecodeError, UnicodeError):
        return False
    return True


def _value(fields: Fields, key: str) -> object:
    """None also for what is too odd to decode: then it stays as it is."""
    try:
        return msgspec.json.decode(fields[key]) if key in fields else None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _drop_top_p(fields: Fields) -> bool:
    """TGI wants 0 < top_p < 1; 1 and 0 mean "off" to everybody else."""
    value = _value(fields, "top_p")
    if not isinstance(value, int | float) or 0 < single(value) < 1:
        return False
    del fields["top_p"]
    return True


def _drop_zero(key: str) -> Callable[[Fields], bool]:
    def fix(fields: Fields) -> bool:
        if key in fields and _value(fields, key) in (0, None):
            del fields[key]
            return True
        return False

    return fix


def _drop_null(key: str) -> Callable[[Fields], bool]:
    def fix(fields: Fields) -> bool:
        if key in fields and bytes(fields[key]) == b"null":
            del fields[key]
            return True
        return False

    return fix


def _drop(key: str) -> Callable[[Fields], bool]:
    def fix(fields: Fields) -> bool:
        return fields.pop(key, None) is not None

    return fix


def _list_stop(fields: Fields) -> bool:
    value = _value(fields, "stop")
    if not isinstance(value, str):
        return False
    fields["stop"] = raw([value])
    return True


def _rename_max_tokens(fields: Fields) -> bool:
    """The newer name is unknown to TGI before December 2024."""
    if "max_completion_tokens" not in fields:
        return False
    limit = fields.pop("max_completion_tokens")
    if bytes(limit) != b"null":
        fields["max_tokens"] = limit
    return True


def _response_format(fields: Fields) -> bool:
    """TGI: ``{"type": "json", "value": schema}``, and the schema needs properties."""
    value = _value(fields, "response_format")
    if not isinstance(value, dict):
        return False
    kind = value.get("type")
    if kind == "json_object":
        schema: object = {"type": "object", "properties": {}}
    elif kind == "json_schema" and isinstance(value.get("json_schema"), dict):
        schema = value["json_schema"].get("schema")
    elif kind == "text":
        del fields["response_format"]
        return True
    else:
        return False
    fields["response_format"] = raw({"type": "json", "value": schema})
    return True


def _null_content(fields: Fields) -> bool:
    """TGI takes null content only beside tool calls."""
    messages = _value(fields, "messages")
    if not isinstance(messages, list):
        return False
    changed = False
    for message in messages:
        if not isinstance(message, dict) or message.get("tool_calls"):
            continue
        if message.get("content", "") is None:
            message["content"] = ""
            changed = True
    if changed:
        fields["messages"] = raw(messages)
    return changed


def _system_message(fields: Fields) -> bool:
    """Cody Gateway's clients leave the system prompt among the messages."""
    messages = _value(fields, "messages")
    if not isinstance(messages, list) or "system" in fields or len(messages) < 2:
        return False
    first = messages[0]
    if not isinstance(first, dict) or first.get("role") != "system":
        return False
    fields["system"] = raw(first.get("content", ""))
    fields["messages"] = raw(messages[1:])
    return True


def _tool_parameters(fields: Fields) -> bool:
    """TGI wants the parameters that OpenAI lets one leave out."""
    tools = _value(fields, "tools")
    changed = False
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(function, dict) and not function.get("parameters"):
            function["parameters"] = {"type": "object", "properties": {}}
            changed = True
    if changed:
        fields["tools"] = raw(tools)
    return changed


Fix: TypeAlias = tuple[str, Callable[[Fields], bool]]

_TGI: tuple[Fix, ...] = (
    ("top_p", _drop_top_p),
    # TGI adds 2 and takes the sum for a repetition penalty: garbage, or an error.
    ("presence_penalty", _drop("presence_penalty")),
    ("stop", _list_stop),
    ("stream_options", _drop_null("stream_options")),
    ("stream", _drop_null("stream")),
    ("logit_bias", _drop("logit_bias")),
    ("max_tokens", _rename_max_tokens),
    ("max_tokens", _drop_zero("max_tokens")),
    ("response_format", _response_format),
    ("messages", _null_content),
    ("tools", _tool_parameters),
)
_NULLS: tuple[Fix, ...] = tuple(
    (key, _drop_null(key))
    for key in ("stop", "stream", "stream_options", "tools", "max_tokens")
)
# Profile -> what its servers refuse in a request. The kinds that are not named take
# what their API's own clients send.
REQUEST_FIXES: dict[str, tuple[Fix, ...]] = {
    "tgi": _TGI,
    "vllm": (),
    "llamacpp": _NULLS,
    "ollama": _NULLS,
    "openai": (),
    "anthropic": (("system", _system_message),),
}
PROFILES = tuple(REQUEST_FIXES)


def fix_request(fixes: tuple[Fix, ...], fields: Fields) -> list[str]:
    """Change ``fields`` to what the server takes; return the names of the changed."""
    return [f"request.{name}" for name, fix in fixes if fix(fields)]


# ---------------------------------------------------------------------------- replies

# Dialects in which replies can pass through.
ADJUSTED = ("openai-chat", "openai-completions", "anthropic", "tgi")
# What a clean stream ends with, for servers that leave it out.
END = {
    "openai-chat": b"data: [DONE]\n\n",
    "openai-completions": b"data: [DONE]\n\n",
}
# A chunk that contains none of these needs no fix-up and is not decoded for one.
_OPENAI_SIGNS = (
    '"finish_reason":""',
    '"finish_reason": ""',
    '"stop_sequence"',
    '"eos_token"',
    '"id":""',
    '"id": ""',
    '"tool_calls":{',
    '"arguments":{',
)
# The same in bytes, and what makes the rest of a reply one with calls: with one search.
_SIGNS = re.compile(
    rb'"(?:finish_reason": ?""|stop_sequence"|eos_token"|id": ?""|tool_calls":'
    rb'|arguments":\{)'
)
_OPENAI_REASONS = {
    "stop": "stop",
    "stop_sequence": "stop",
    "eos_token": "stop",
    "": None,
}
_HAS_CALLS = '"function"'


class ReplyFixer:
    """Fixes the events, or the body, of one reply. ``names`` says what it did."""

    names: tuple[str, ...] = ()
    _has_calls = False
    _made_id = ""

    def __init__(self, dialect: str) -> None:
        self._is_openai = dialect in END

    @property
    def _id(self) -> str:
        self._made_id = self._made_id or f"chatcmpl-{random.getrandbits(96):024x}"
        return self._made_id

    def is_clean(self, events: bytes) -> bool:
        """Whether ``fix`` would surely leave whole events as they are, and remember
        nothing of them.
        """
        return not self._is_openai or not (
            self._has_calls or _SIGNS.search(events) or b"null\n" in events
        )

    def fix(self, data: str) -> str | None:
        """Return the data of an event as clients expect it, None to leave it out."""
        if not self._is_openai:
            return data
        if data == "null":  # llama.cpp, first event of a list of prompts
            self._note("data")
            return None
        if not self._has_calls:
            self._has_calls = '"tool_calls":' in data and _HAS_CALLS in data
        if self._has_calls and '"stop"' in data:
            return self._fix_openai(data)
        for sign in _OPENAI_SIGNS:
            if sign in data:
                return self._fix_openai(data)
        return data

    def _fix_openai(self, data: str) -> str:
        try:
            value = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return data
        if not isinstance(value, dict) or not self._fix_value(value):
            return data
        return _encode(value).decode()

    def _fix_value(self, value: dict[str, object]) -> bool:
        changed = False
        if value.get("id") == "":
            value["id"] = self._id
            self._note("id")
            changed = True
        choices = value.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                changed = self._fix_calls(choice) or changed
                changed = self._fix_reason(choice) or changed
        return changed

    def _fix_calls(self, choice: dict[str, object]) -> bool:
        """TGI: an object for a list of calls, and an object for their JSON text."""
        content = choice.get("delta") or choice.get("message")
        calls = content.get("tool_calls") if isinstance(content, dict) else None
        if not calls or not isinstance(content, dict):
            return False
        changed = isinstance(calls, dict)
        if changed:
            content["tool_calls"] = calls = [calls]
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(
                function.get("arguments"), dict
            ):
                text = json.dumps(function["arguments"], separators=(",", ":"))
                function["arguments"] = text
                changed = True
        if changed:
            self._note("tool_calls")
        return changed

    def _fix_reason(self, choice: dict[str, object]) -> bool:
        reason = choice.get("finish_reason")
        if not isinstance(reason, str) or reason not in _OPENAI_REASONS:
            return False
        mended = _OPENAI_REASONS[reason]
        if mended == "stop" and self._has_calls:
            mended = "tool_calls"
        if mended == reason:
            return False
        choice["finish_reason"] = mended
        self._note("finish_reason")
        return True

    def missing_finish(self, model: str) -> str | None:
        """Return the chunk that TGI leaves out after a tool call, None if there was
        none.
        """
        if not self._has_calls:
            return None
        self._note("finish_reason")
        choice = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
        chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
        }
        return _encode(chunk).decode()

    def add_end(self, dialect: str) -> bytes:
        """What is missing at the end of a stream that is otherwise complete."""
        if dialect not in END:
            return b""
        self._note("done")
        return END[dialect]

    def _note(self, name: str) -> None:
        if f"reply.{name}" not in self.names:
            self.names += (f"reply.{name}",)
