"""Errors as upstreams word them inside a reply of status 200, whatever the dialect.

Gateways and forks mix these shapes freely (an OpenAI route answers in TGI's words,
an Anthropic one in llama.cpp's), so every reader asks here about anything that is
not plainly an answer.
"""

import json
from collections.abc import Mapping

from proxy.errors import InvalidPrompt, UpstreamReported

# What the words for an overload and for a refused request look like, in the fields
# "type", "code", "status" and "error_type", lower case.
_STATUS_BY_WORD = {
    "overloaded": 429,
    "overloaded_error": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "resource_exhausted": 429,
    "throttlingexception": 429,
    "toomanyrequests": 429,
    "validation": 422,
    "template_error": 422,
    "missing_template_variable": 422,
    "tool_error": 422,
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "bad request": 400,
    "invalid_argument": 400,
    "context_length_exceeded": 400,
    "exceed_context_size_error": 400,
    "not_found_error": 404,
    "generation": 424,
    "incomplete_generation": 500,
    "api_error": 500,
    "unavailable": 503,
    "unavailable_error": 503,
    "timeout_error": 504,
}
# TGI's OpenAI routes report every failure as 422; only the text tells them apart
# (router/src/infer/mod.rs, into_openai_event).
_STATUS_BY_TEXT = (
    ("Model is overloaded", 429),
    ("Input validation error", 422),
    ("Template error", 422),
    ("Request failed during generation", 424),
)
_ANSWER_KEYS = (
    "choices",
    "candidates",
    "content",
    "content_block",
    "delta",
    "completion",
    "generated_text",
)


def decode_lenient(data: str | bytes) -> object:
    """Decode JSON that a typed decoder refused; None if it is not JSON at all."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def replace_surrogates(value: object) -> object:
    """Return a decoded JSON value whose text can be written as UTF-8 again.

    JavaScript cuts strings between the halves of an emoji and sends what is left.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {
            replace_surrogates(key): replace_surrogates(item)
            for key, item in value.items()
        }
    return value


def decode_arguments(text: str) -> object:
    """Return the arguments of a client's tool call, an empty object for what is none.

    Raises: InvalidPrompt: they are nested too deeply.
    """
    try:
        value = json.loads(text)
        return replace_surrogates(value) if isinstance(value, dict) else {}
    except ValueError:
        return {}
    except RecursionError:
        raise InvalidPrompt("tool call arguments are nested too deeply") from None


def fault_in(value: object, *, named: bool = False) -> UpstreamReported | None:
    """Return the error that a decoded JSON value stands for, or None.

    Args: named: the event's own type was ``error``, so anything in it is one.
    """
    if isinstance(value, list):  # Google wraps its error object in an array
        value = value[0] if value else None
    if not isinstance(value, dict):
        return _build(str(value), {}, {}) if named and value is not None else None
    error = value.get("error")
    if isinstance(error, dict):
        return _build(_text_of(error), error, value)
    if isinstance(error, str) and error:
        return _build(error, {"type": value.get("error_type")}, value)
    if named or value.get("object") == "error" or value.get("type") == "error":
        return _build(_text_of(value), value, {})
    if any(key in value for key in _ANSWER_KEYS):
        return None
    for key in ("detail", "message"):
        if value.get(key):
            return _build(_text_of(value[key]), value, {})
    return None


def is_answer(value: object) -> bool:
    """Whether a decoded JSON value is meant to be a part of an answer."""
    return isinstance(value, dict) and any(key in value for key in _ANSWER_KEYS)


def fault_in_text(data: str) -> UpstreamReported | None:
    """The same for data that is not JSON: some proxies send ``error: …`` as text."""
    text = data.strip()
    if not text.lower().startswith("error"):
        return None
    value = decode_lenient(text.partition(":")[2])
    return fault_in(value, named=True) or _build(text, {}, {})


def _text_of(value: object) -> str:
    if isinstance(value, Mapping):
        for key in ("message", "error", "detail"):
            if value.get(key):
                return _text_of(value[key])
    return value if isinstance(value, str) else json.dumps(value)


def _build(
    text: str, error: Mapping[str, object], envelope: Mapping[str, object]
) -> UpstreamReported:
    kind = error.get("type") or error.get("status") or error.get("code") or ""
    kind = kind if isinstance(kind, str) else ""
    # Anthropic's envelope and TGI's native shape: the type is half of the message.
    typed = envelope.get("type") == "error" or "error_type" in envelope
    message = f"{kind}: {text}" if typed and kind else text
    return UpstreamReported(
        message, type=kind, status=_status_of(text, error), detail=text
    )


def _status_of(text: str, error: Mapping[str, object]) -> int:
    for words, status in _STATUS_BY_TEXT:
        if words in text:
            return status
    for key in ("code", "type", "status"):
        value = error.get(key)
        if isinstance(value, str):
            value = _STATUS_BY_WORD.get(value.lower()) or _as_status(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    return 502


def _as_status(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) == 3 else None
