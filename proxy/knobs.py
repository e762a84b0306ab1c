"""What Cody's clients leave to the server: the knobs of ``clientSideConfig``, the
instructions, the context window, the fake preamble.

Clients know the knobs and heed hardly any, and what they send instead is fixed in
their code, nobody's choice; so here a knob wins. Other dialects' clients say what they
want, and are left alone. What a model needs is decided at start.
"""

from collections.abc import Mapping, Sequence

import msgspec

from proxy.completion import CompletionRequest, Message, TextPart
from proxy.errors import InvalidPrompt
from proxy.modelconfig.resolved import Model, ModelConfiguration

# Edits come as chats. What every client of the last years asks of a model in one is to
# put the code between tags, and to stop at the closing one.
_EDIT_STOP = "</CODE5711>"
# A request that stops at the end of its line wants no more than one.
_LINE_STOP = "\n"

_PREAMBLE = "You are Cody, an AI"
_PREAMBLE_REPLY = "I am Cody, an AI"

# No tokenizer makes so few tokens of anything that people write: a prompt beyond it is
# too long for sure, and sooner told so than sent. In between the upstream decides.
MOST_CHARS_PER_TOKEN = 12


class _Sampling(msgspec.Struct, frozen=True):
    """None leaves a value as the client sent it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def apply(self, request: CompletionRequest) -> None:
        if self.temperature is not None:
            request.temperature = self.temperature
        if self.top_p is not None:
            request.top_p = self.top_p
        if self.top_k is not None:
            request.top_k = self.top_k


class Knobs:
    """Fits requests of Cody's clients to one model."""

    def __init__(self, model: Model, system_pre_instruction: str) -> None:
        read = _Reader(model.client_config or {})
        self._model = model
        self._most_chars = model.context_window.max_input_tokens * MOST_CHARS_PER_TOKEN
        self._chat, self._edit, self._code = (
            read.sampling(feature) for feature in ("chat", "edit", "autoComplete")
        )
        shared = model.client_window
        self._most_tokens = shared.max_output_tokens if shared else None
        self._chat_tokens = read.integer("chatMaxTokens")
        self._edit_tokens = read.integer("editMaxTokens")
        self._code_tokens = _PerLines(
            read.integer("autoCompleteSinglelineMaxTokens"),
            read.integer("autoCompleteMultilineMaxTokens"),
        )
        self._code_timeout_ms = _PerLines(
            read.integer("autocompleteSinglelineTimeout"),
            read.integer("autocompleteMultilineTimeout"),
        )
        instructions = (system_pre_instruction, read.text("chatPreInstruction"))
        self._chat_instruction = "\n\n".join(filter(None, instructions))
        self._edit_instruction = system_pre_instruction
        self._edit_end = read.text("editPostInstruction")

    def apply(self, request: CompletionRequest, body_bytes: int) -> None:
        """Change ``request`` as the configuration wants it.

        Args:   body_bytes: the size of the client's body, which its prompt is within.
        Raises: InvalidPrompt: the prompt exceeds the model's context window.
        """
        if body_bytes > self._most_chars:
            self._check_length(request.messages)
        if request.feature == "code":
            self._code.apply(request)
            # The client's own limit is a constant, so this may also raise it.
            request.max_tokens = (
                self._code_tokens.of(request.stop) or request.max_tokens
            )
        elif _EDIT_STOP in request.stop:
            self._apply_to_edit(request)
        else:
            self._apply_to_chat(request)
        if self._most_tokens is not None:
            request.max_tokens = _lower(request.max_tokens, self._most_tokens)

    def timeout_s(self, request: CompletionRequest, timeout_s: float) -> float:
        """Return how long the request may take, which is ``timeout_s`` at most."""
        if request.feature != "code":
            return timeout_s
        own_ms = self._code_timeout_ms.of(request.stop)
        return timeout_s if own_ms is None else min(timeout_s, own_ms / 1000)

    def _apply_to_chat(self, request: CompletionRequest) -> None:
        self._chat.apply(request)
        request.max_tokens = _lower(request.max_tokens, self._chat_tokens)
        self._instruct(request, self._chat_instruction)

    def _apply_to_edit(self, request: CompletionRequest) -> None:
        self._edit.apply(request)
        request.max_tokens = _lower(request.max_tokens, self._edit_tokens)
        self._instruct(request, self._edit_instruction)
        if self._edit_end:
            request.messages = _end_question(request.messages, self._edit_end)

    def _instruct(self, request: CompletionRequest, instruction: str) -> None:
        if self._model.lift_preamble:
            request.messages = lift_preamble(request.messages)
        if instruction:
            request.messages = _begin_system(request.messages, instruction)

    def _check_length(self, messages: Sequence[Message]) -> None:
        chars = sum(len(message.text) for message in messages)
        if chars > self._most_chars:
            # Clients show it as what it is if "token limit" is in the text.
            raise InvalidPrompt(
                f"the prompt of {chars:,} characters exceeds the token limit of "
                f'model "{self._model.ref}": its context window takes '
                f"{self._model.context_window.max_input_tokens:,} tokens"
            )


class _PerLines(msgspec.Struct, frozen=True):
    """A knob that autocomplete has twice: for one line, and for several."""

    single: int | None
    multiple: int | None

    def of(self, stop: Sequence[str]) -> int | None:
        return self.single if _LINE_STOP in stop else self.multiple


class _Reader:
    """Reads knobs; what no server could take is as good as not set."""

    def __init__(self, knobs: Mapping[str, object]) -> None:
        self._knobs = knobs

    def sampling(self, feature: str) -> _Sampling:
        temperature = self._number(f"{feature}Temperature")
        top_p = self._number(f"{feature}TopP")
        top_k = self.integer(f"{feature}TopK")
        return _Sampling(
            temperature if temperature is not None and temperature >= 0 else None,
            top_p if top_p is not None and 0 < top_p < 1 else None,
            top_k,
        )

    def integer(self, name: str) -> int | None:
        number = self._number(name)
        return int(number) if number is not None and number >= 1 else None

    def text(self, name: str) -> str:
        value = self._knobs.get(name)
        return value if isinstance(value, str) else ""

    def _number(self, name: str) -> float | None:
        value = self._knobs.get(name)
        return value if isinstance(value, int | float) else None


def knobs_of(models: ModelConfiguration) -> dict[str, Knobs]:
    """Return the knobs of every model, by its ref."""
    text = models.system_pre_instruction
    return {model.ref: Knobs(model, text) for model in models.models}


def lift_preamble(messages: list[Message]) -> list[Message]:
    """Return the messages with a system prompt in place of the fake preamble: a
    question that is none, and the answer to it.
    """
    if (
        len(messages) > 2
        and messages[0].role == "user"
        and messages[0].text.startswith(_PREAMBLE)
        and messages[1].role == "assistant"
        and messages[1].text.startswith(_PREAMBLE_REPLY)
    ):
        return [Message("system", messages[0].parts), *messages[2:]]
    return messages


def _begin_system(messages: list[Message], text: str) -> list[Message]:
    """Return the messages with ``text`` in front of the system prompt, or of the
    preamble that stands for one.
    """
    first = messages[0] if messages else None
    if first is not None and (
        first.role == "system"
        or (first.role == "user" and first.text.startswith(_PREAMBLE))
    ):
        parts = [TextPart(f"{text}\n\n"), *first.parts]
        return [Message(first.role, parts), *messages[1:]]
    return [Message("system", [TextPart(text)]), *messages]


def _end_question(messages: list[Message], text: str) -> list[Message]:
    """Return the messages with ``text`` at the end of the last question; what follows
    it is the beginning of the answer.
    """
    for at in range(len(messages) - 1, -1, -1):
        if messages[at].role == "user":
            parts = [*messages[at].parts, TextPart(f"\n\n{text}")]
            return [*messages[:at], Message("user", parts), *messages[at + 1 :]]
    return messages


def _lower(asked: int | None, limit: int | None) -> int | None:
    if asked is None or limit is None:
        return asked or limit
    return min(asked, limit)
