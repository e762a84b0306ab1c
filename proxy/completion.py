"""The neutral vocabulary: what a request asks for, and what a reply consists of.

Dialects meet only here: each one reads and writes these types and knows no other
dialect. A field belongs here when at least two dialects can say it.
"""

import math
import struct
from typing import Literal, TypeAlias

import msgspec

Feature: TypeAlias = Literal["chat", "code"]


def single(value: float) -> float:
    """Return a number as servers hold it that count with 32 bits: what is just below 1
    for us is 1 for them.
    """
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except (OverflowError, struct.error):  # the latter: an integer beyond any float
        return math.inf if value > 0 else -math.inf


class TextPart(msgspec.Struct, frozen=True, gc=False):
    """Text. ``cached`` marks the end of a prefix worth caching (prompt caching)."""

    text: str
    cached: bool = False


class ImagePart(msgspec.Struct, frozen=True, gc=False):
    """An image: a ``data:`` URL or one that the upstream fetches itself."""

    url: str
    detail: str | None = None


class ToolCallPart(msgspec.Struct, frozen=True, gc=False):
    """A call that the assistant made; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


class ToolResultPart(msgspec.Struct, frozen=True, gc=False):
    """What the call ``id`` returned."""

    id: str
    content: str


Part: TypeAlias = TextPart | ImagePart | ToolCallPart | ToolResultPart


ROLES = ("system", "user", "assistant")


class Message(msgspec.Struct):
    """One turn. A tool result is a part of a user's message.

    ``role`` is one of ``ROLES``, or whatever else the client wrote: then the request
    is refused once it is known how to say so.
    """

    role: str
    parts: list[Part]

    @property
    def text(self) -> str:
        if len(self.parts) == 1 and isinstance(self.parts[0], TextPart):
            return self.parts[0].text
        return "".join([part.text for part in self.parts if isinstance(part, TextPart)])

    @property
    def is_empty(self) -> bool:
        """True if there is nothing but (possibly no) empty text."""
        for part in self.parts:  # most end here with the first one
            if not isinstance(part, TextPart) or part.text:
                return False
        return True


class Tool(msgspec.Struct):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None


class CompletionRequest(msgspec.Struct):
    """What a client asks for, whatever dialect it speaks.

    ``None`` means that the client did not say. ``model`` is the client's word until
    the configuration resolves it. A prompt without roles is one user message.
    ``max_tokens`` > 0, ``top_p`` in (0, 1), ``top_k`` > 0 where given: parsers map
    what clients use for "unset" to ``None``. ``tool_choice`` is "auto", "none",
    "required" or the name of a tool. ``dropped`` names the fields that the client
    set and that cannot be said here. ``user`` is the name of the token that asks.
    """

    feature: Feature
    messages: list[Message]
    model: str = ""
    fast: bool = False
    stream: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: list[str] = []
    tools: list[Tool] = []
    tool_choice: str | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    reasoning_effort: str | None = None
    user: str = ""
    dropped: list[str] = []


class Start(msgspec.Struct, frozen=True, gc=False):
    """The upstream's own name for the reply and for the model that makes it."""

    id: str
    model: str


class Text(msgspec.Struct, frozen=True, gc=False):
    """More text of the answer, never what came before."""

    text: str


class Thinking(msgspec.Struct, frozen=True, gc=False):
    """More text of the model's reasoning."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call.

    ``index`` says which call; ``id`` and ``name`` are known from the first piece on
    and repeated on every later one; ``arguments`` is the next piece of JSON text.
    """

    index: int
    id: str
    name: str
    arguments: str


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts so far; a later one replaces an earlier one."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The answer is complete; ``reason`` is the upstream's own word."""

    reason: str


Delta: TypeAlias = Start | Text | Thinking | ToolCall | Usage | Finish
