"""What the simulated server understands: its requests, and its refusals to read them.

The types are as strict as TGI's: what its JSON extractor refuses is refused here, with
the same status, content type and first words. The position at the end of such a text
("at line 1 column 27") is that of the end of the body.

Source: https://github.com/huggingface/text-generation-inference, router/src/lib.rs
"""

import re
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec

Unsigned: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Signed: TypeAlias = int


class Rejection(msgspec.Struct, frozen=True):
    """The framework could not make a request of the body; always plain text."""

    status: int
    text: str


class Refusal(msgspec.Struct, frozen=True):
    """TGI understood the request and says no, in JSON."""

    error: str
    error_type: str
    status: int = 422

    def native(self) -> bytes:
        return _encode({"error": self.error, "error_type": self.error_type})

    def openai(self) -> bytes:
        # The number is a constant there, whatever happened.
        return _encode({"error": {"message": self.error, "http_status_code": 422}})


def invalid(text: str) -> Refusal:
    return Refusal(f"Input validation error: {text}", "validation")


def tool_error(text: str) -> Refusal:
    return Refusal(f"Tool error: {text}", "tool_error")


OVERLOADED = Refusal("Model is overloaded", "overloaded", 429)


# --- native --------------------------------------------------------------------------


class Grammar(msgspec.Struct):
    """What the answer must look like; OpenAI's shapes have no ``value``."""

    type: Literal["json", "json_object", "regex", "json_schema"]
    value: msgspec.Raw


class Parameters(msgspec.Struct, kw_only=True):
    best_of: Unsigned | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Signed | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: Unsigned | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: Unsigned | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: Unsigned | None = None
    top_n_tokens: Unsigned | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


class GenerateRequest(msgspec.Struct, kw_only=True):
    inputs: str
    parameters: Parameters = msgspec.field(default_factory=Parameters)


class CompatGenerateRequest(GenerateRequest, kw_only=True):
    stream: bool = False


# --- OpenAI's ------------------------------------------------------------------------


class CompletionRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | list[str]
    max_tokens: Unsigned | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    seed: Unsigned | None = None
    suffix: str | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.prompt and isinstance(self.prompt, list):
            raise ValueError(
                "prompt: Empty array detected. Do not use an empty array for the prompt."
            )

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ImageUrl(msgspec.Struct):
    url: str


class ContentPart(msgspec.Struct):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None

    @property
    def rendered(self) -> str:
        return self.text if self.image_url is None else f"![]({self.image_url.url})"


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[msgspec.Raw] | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.tool_calls is None:
            raise ValueError("data did not match any variant of untagged enum")

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.rendered for part in self.content)
        return self.content if self.content is not None else _encode_text(self)


class Function(msgspec.Struct):
    """TGI calls the schema ``arguments`` and takes OpenAI's ``parameters`` for it."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.schema is msgspec.UNSET:
            raise ValueError("missing field `arguments`")

    @property
    def schema(self) -> msgspec.Raw | msgspec.UnsetType:
        return self.arguments or self.parameters


class Tool(msgspec.Struct):
    type: str
    function: Function


class FunctionName(msgspec.Struct):
    name: str


class TypedChoice(msgspec.Struct):
    type: Literal["function"]
    function: FunctionName


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatRequest(msgspec.Struct, kw_only=True):
    messages: list[Message]
    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: list[float] | None = None
    logprobs: bool | None = None
    top_logprobs: Unsigned | None = None
    max_tokens: Unsigned | None = None
    max_completion_tokens: Unsigned | None = None
    n: Unsigned | None = None
    presence_penalty: float | None = None
    stop: list[str] | None = None
    stream: bool = False
    seed: Unsigned | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Tool] | None = None
    tool_prompt: str | None = None
    tool_choice: str | TypedChoice | None = None
    response_format: Grammar | None = None
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)

    def __post_init__(self) -> None:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("duplicate field `max_tokens`")


# --- decoding ------------------------------------------------------------------------

Request = TypeVar("Request")

_JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json\s*(?:;|$)", re.IGNORECASE)
_UNREADABLE = "Failed to deserialize the JSON body into the target type: "


def decode(kind: type[Request], content_type: str, body: bytes) -> Request | Rejection:
    """Read the body of a request, as strictly as TGI's framework does."""
    if not _JSON_TYPE.match(content_type):
        text = "Expected request with `Content-Type: application/json`"
        return Rejection(415, text)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = f"{_UNREADABLE}{_in_their_words(str(error))}{_position(body)}"
        return Rejection(422, text)
    except msgspec.DecodeError as error:
        text = f"Failed to parse the request body as JSON: {error}{_position(body)}"
        return Rejection(400, text)
    except UnicodeDecodeError:
        text = "Failed to parse the request body as JSON: invalid unicode code point"
        return Rejection(400, text + _position(body))


def _position(body: bytes) -> str:
    column = len(body) - body.rfind(b"\n") - 1
    line = body.count(b"\n") + 1
    return f" at line {line} column {column}"


_AT = re.compile(r" - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_MISMATCH = re.compile(r"Expected `([^`]+)`(.*), got `(\w+)`")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_RANGE = re.compile(r"Expected `int` (.*)")
_VARIANT = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)

_GOT = {
    "array": "sequence",
    "bool": "boolean",
    "float": "floating point",
    "int": "integer",
    "null": "null",
    "object": "map",
    "str": "string",
}
_WANTED = {
    "array": "a sequence",
    "bool": "a boolean",
    "float": "f32",
    "int": "u32",
    "object": "struct",
    "str": "a string",
}
# More than one type is allowed there: serde only says that none of them fits.
_UNTAGGED = re.compile(r"prompt|tool_choice|messages\[\d+\]\.content")


def _in_their_words(text: str) -> str:
    """Say what msgspec found wrong as serde would: where, what, what instead."""
    at = _AT.search(text)
    path = at[1] if at else ""
    what = _AT.sub("", text)
    if _UNTAGGED.match(path):
        return f"{path}: data did not match any variant of untagged enum"
    for pattern, words in _WORDS:
        if found := pattern.match(what):
            what = words(found)
            break
    return f"{path}: {what}" if path else what


def _mismatch(found: re.Match[str]) -> str:
    wanted = found[1].split(" | ")[0]
    return f"invalid type: {_GOT.get(found[3], found[3])}, expected {_WANTED[wanted]}"


_WORDS = (
    (_MISMATCH, _mismatch),
    (_MISSING, lambda found: f"missing field `{found[1]}`"),
    (_RANGE, lambda found: "invalid value: integer, expected u32"),
    (_VARIANT, lambda found: f"unknown variant `{found[1]}`"),
)


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def _encode_text(message: Message) -> str:
    return _encode(message.tool_calls).decode()
