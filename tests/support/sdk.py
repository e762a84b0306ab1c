"""Official clients, all with the same face: what a user of each would see.

Every adapter is one generator of pieces of an answer; a reply in one piece is one
piece. None retries, none looks at the environment, and what they open they close.
"""

import abc
import asyncio
import codecs
import contextlib
import dataclasses
import json
import ssl
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import aiohttp
import anthropic
import huggingface_hub
import openai
import text_generation
from aiohttp_sse_client.client import EventSource
from huggingface_hub.errors import TextGenerationError
from text_generation import errors as text_generation_errors

from tests.support import client
from tests.support.cody import ChatParser, assert_ends_once, read_chat

MODEL = "large"
TEXT = "What is the weather in Oslo?"
PROMPT = "def fibonacci(n):"
MAX_TOKENS = 12
TOOL = "get_weather"
WITHIN_S = 10.0
EVENTS_WITHIN_S = 3.0

_PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
_FUNCTION = {"name": TOOL, "description": "The weather.", "parameters": _PARAMETERS}
_TOOLS: Any = [{"type": "function", "function": _FUNCTION}]
_MESSAGES: Any = [{"role": "user", "content": TEXT}]
_TLS = ssl.create_default_context()  # each client would read the certificates again


@dataclasses.dataclass
class Call:
    """A tool call; in a piece, ``arguments`` is only what is new."""

    name: str
    arguments: str


@dataclasses.dataclass
class Answer:
    """An answer, or a piece of one. ``finish`` is in the client's own words.

    ``usage`` is (prompt, completion); None in it is what the client does not show.
    """

    text: str = ""
    finish: str | None = None
    tool_calls: dict[int, Call] = dataclasses.field(default_factory=dict)
    usage: tuple[int | None, int] | None = None
    model: str | None = None

    def add(self, piece: "Answer") -> None:
        self.text += piece.text
        self.finish = piece.finish or self.finish
        self.usage = piece.usage or self.usage
        self.model = piece.model or self.model
        for index, call in piece.tool_calls.items():
            known = self.tool_calls.setdefault(index, Call("", ""))
            known.name += call.name
            known.arguments += call.arguments


@dataclasses.dataclass
class Raised:
    """What a client raised: ``type`` is "package.Class".

    ``status`` and ``retry_after`` are None where the client does not show them;
    ``text`` is what it gave before.
    """

    type: str
    status: int | None
    message: str
    retry_after: str | None = None
    text: str = ""


class Adapter(abc.ABC):
    """One client.

    Attributes:
        path:           where it posts to.
        has_tools:      it knows of tools.
        asks_for_usage: a stream has usage only if the client asks for it.
        shows_model:    it shows the model's name.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    has_tools: ClassVar[bool] = False
    asks_for_usage: ClassVar[bool] = False
    shows_model: ClassVar[bool] = True
    errors: ClassVar[tuple[type[Exception], ...]]

    @abc.abstractmethod
    def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        """Ask the server at ``url``; give what comes."""

    @abc.abstractmethod
    def raised(self, error: Any) -> Raised: ...

    @abc.abstractmethod
    def body(self) -> dict[str, Any]:
        """A request for a stream, as plain JSON for ``events``."""

    @abc.abstractmethod
    def is_end(self, kind: str | None, data: str) -> bool:
        """Whether a raw event is the one that ends a complete stream."""

    async def plain(self, url: str) -> Answer:
        return await self._whole(url, stream=False)

    async def streamed(self, url: str, *, usage: bool = False) -> Answer:
        return await self._whole(url, stream=True, usage=usage)

    async def with_tools(self, url: str, *, stream: bool) -> Answer:
        return await self._whole(url, stream=stream, tools=True)

    async def close_early(self, url: str) -> str:
        """Read one piece of text and leave."""
        async with contextlib.aclosing(self.pieces(url, stream=True)) as pieces:
            async for piece in pieces:
                if piece.text:
                    return piece.text
        raise AssertionError("a stream without text")

    async def error(self, url: str, *, stream: bool) -> Raised:
        answer = Answer()
        try:
            await self._read(url, answer, stream=stream)
        except self.errors as error:
            return dataclasses.replace(self.raised(error), text=answer.text)
        raise AssertionError(f"no error, but {answer}")

    async def events(self, url: str) -> list[tuple[str | None, str]]:
        """The raw events of a stream up to the one that ends it, read by yet another
        client: several SDKs do not care whether a stream has its end.

        Where the end is missing it waits, to ask once more, and that is noticed.
        """
        seen: list[tuple[str | None, str]] = []
        option = {"method": "POST"}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EVENTS_WITHIN_S), aiohttp.ClientSession() as own:
                source = EventSource(
                    url + self.path, option=option, session=own, json=self.body()
                )
                async with source:
                    async for event in source:
                        seen.append((event.type, event.data))
                        if self.is_end(event.type, event.data):
                            return seen
        raise AssertionError(f"a stream without its end: {seen}")

    async def _whole(self, url: str, **options: bool) -> Answer:
        answer = Answer()
        await self._read(url, answer, **options)
        return answer

    async def _read(self, url: str, answer: Answer, **options: Any) -> None:
        async with contextlib.aclosing(self.pieces(url, **options)) as pieces:
            async for piece in pieces:
                answer.add(piece)


def _type_of(error: Exception) -> str:
    return f"{type(error).__module__.partition('.')[0]}.{type(error).__name__}"


def _counts(usage: Any) -> tuple[int | None, int] | None:
    """Usage in OpenAI's words."""
    if usage is None:
        return None
    return usage.prompt_tokens, usage.completion_tokens


def _calls(calls: Any) -> dict[int, Call]:
    """Tool calls in OpenAI's words, whole or in pieces."""
    found = {}
    for position, call in enumerate(calls or ()):
        index = getattr(call, "index", None)
        function = call.function
        found[position if index is None else index] = Call(
            function.name or "", function.arguments
        )
    return found


# ----------------------------------------------------------------------------- OpenAI


class _OpenAI(Adapter):
    asks_for_usage = True
    errors = (openai.OpenAIError,)

    @staticmethod
    def client(url: str) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(trust_env=False, verify=_TLS)
        return openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=WITHIN_S,
            http_client=http,
        )

    def raised(self, error: Any) -> Raised:
        response = getattr(error, "response", None)
        return Raised(
            _type_of(error),
            getattr(error, "status_code", None),
            str(error),
            response.headers.get("retry-after") if response is not None else None,
        )

    def is_end(self, kind: str | None, data: str) -> bool:
        return data == "[DONE]"


def _asked(*, stream: bool, tools: bool, usage: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"stream": stream}
    if tools:
        asked["tools"] = _TOOLS
    if usage:
        asked["stream_options"] = {"include_usage": True}
    return asked


class OpenAIChat(_OpenAI):
    name = "openai chat"
    path = "/v1/chat/completions"
    has_tools = True

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        asked = _asked(stream=stream, tools=tools, usage=usage)
        async with self.client(url) as sdk:
            reply: Any = await sdk.chat.completions.create(
                model=MODEL, messages=_MESSAGES, max_tokens=MAX_TOKENS, **asked
            )
            if not stream:
                yield _chat_piece(reply, "message")
                return
            async with reply:
                async for chunk in reply:
                    yield _chat_piece(chunk, "delta")

    def body(self) -> dict[str, Any]:
        return {"model": MODEL, "messages": _MESSAGES, "stream": True}


def _chat_piece(reply: Any, part: str) -> Answer:
    piece = Answer(usage=_counts(reply.usage), model=reply.model)
    for choice in reply.choices[:1]:
        said = getattr(choice, part)
        piece.text = said.content or ""
        piece.finish = choice.finish_reason
        piece.tool_calls = _calls(said.tool_calls)
    return piece


class OpenAICompletions(_OpenAI):
    name = "openai completions"
    path = "/v1/completions"

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        asked = _asked(stream=stream, tools=False, usage=usage)
        async with self.client(url) as sdk:
            reply: Any = await sdk.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=MAX_TOKENS, **asked
            )
            if not stream:
                yield self._piece(reply)
                return
            async with reply:
                async for chunk in reply:
                    yield self._piece(chunk)

    @staticmethod
    def _piece(reply: Any) -> Answer:
        piece = Answer(usage=_counts(reply.usage), model=reply.model)
        for choice in reply.choices[:1]:
            piece.text, piece.finish = choice.text, choice.finish_reason
        return piece

    def body(self) -> dict[str, Any]:
        return {"model": MODEL, "prompt": PROMPT, "stream": True}


# -------------------------------------------------------------------------- Anthropic


class AnthropicMessages(Adapter):
    name = "anthropic"
    path = "/v1/messages"
    has_tools = True
    errors = (anthropic.AnthropicError,)

    _TOOLS: ClassVar[Any] = [{"name": TOOL, "input_schema": _PARAMETERS}]

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        asked: Any = {"model": MODEL, "messages": _MESSAGES, "max_tokens": MAX_TOKENS}
        if tools:
            asked["tools"] = self._TOOLS
        http = anthropic.DefaultAsyncHttpxClient(trust_env=False, verify=_TLS)
        async with anthropic.AsyncAnthropic(
            base_url=url,
            api_key="none",
            max_retries=0,
            timeout=WITHIN_S,
            http_client=http,
        ) as sdk:
            if not stream:
                message = await sdk.messages.create(**asked)
                yield _message_piece(message, with_text=True)
                return
            async with sdk.messages.stream(**asked) as events:
                async for event in events:
                    if event.type == "text":
                        yield Answer(event.text)
                message = await events.get_final_message()
                yield _message_piece(message, with_text=False)

    def raised(self, error: Any) -> Raised:
        return Raised(
            _type_of(error),
            getattr(error, "status_code", None),
            str(error),
            error.response.headers.get("retry-after"),
        )

    def body(self) -> dict[str, Any]:
        asked = {"model": MODEL, "messages": _MESSAGES, "max_tokens": MAX_TOKENS}
        return {**asked, "stream": True}

    def is_end(self, kind: str | None, data: str) -> bool:
        return kind == "message_stop"


def _message_piece(message: Any, *, with_text: bool) -> Answer:
    calls = [block for block in message.content if block.type == "tool_use"]
    texts = [block.text for block in message.content if block.type == "text"]
    return Answer(
        "".join(texts) if with_text else "",
        message.stop_reason,
        {i: Call(c.name, json.dumps(c.input)) for i, c in enumerate(calls)},
        (message.usage.input_tokens, message.usage.output_tokens),
        message.model,
    )


# ------------------------------------------------------------------------ Hugging Face


class _Hub(Adapter):
    errors = (aiohttp.ClientResponseError, TextGenerationError)

    @staticmethod
    def client(url: str) -> huggingface_hub.AsyncInferenceClient:
        # A token of its own keeps it from looking for one in the home directory.
        return huggingface_hub.AsyncInferenceClient(
            base_url=url, api_key="none", timeout=WITHIN_S, trust_env=False
        )

    def raised(self, error: Any) -> Raised:
        reply: Any = error
        if not isinstance(error, aiohttp.ClientResponseError):
            reply = error.__cause__
        payload = getattr(error, "response_error_payload", None)
        return Raised(
            _type_of(error),
            getattr(reply, "status", None),
            str(error) if payload is None else json.dumps(payload),
            reply.headers.get("retry-after") if reply is not None else None,
        )


class HubChat(_Hub):
    """It reads errors of the status only as aiohttp does; the body hangs on them."""

    name = "huggingface_hub chat_completion"
    path = "/v1/chat/completions"
    has_tools = True
    asks_for_usage = True

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        asked = _asked(stream=stream, tools=tools, usage=usage)
        async with self.client(url) as sdk:
            reply: Any = await sdk.chat_completion(
                _MESSAGES, model=MODEL, max_tokens=MAX_TOKENS, **asked
            )
            if not stream:
                yield _chat_piece(reply, "message")
                return
            async with contextlib.aclosing(reply):
                async for chunk in reply:
                    yield _chat_piece(chunk, "delta")

    def body(self) -> dict[str, Any]:
        return {"model": MODEL, "messages": _MESSAGES, "stream": True}

    def is_end(self, kind: str | None, data: str) -> bool:
        return data == "[DONE]"


class _Generation(Adapter):
    """Clients of TGI's own API; they post to ``/``, whether streamed or not."""

    path = "/"
    shows_model = False

    def body(self) -> dict[str, Any]:
        parameters = {"max_new_tokens": MAX_TOKENS, "details": True}
        return {"inputs": PROMPT, "parameters": parameters, "stream": True}

    def is_end(self, kind: str | None, data: str) -> bool:
        return json.loads(data)["generated_text"] is not None


def _token_piece(output: Any, before: str) -> Answer:
    """Args: before: the text of the earlier tokens."""
    text = "" if output.token.special else output.token.text
    if output.generated_text is None:
        return Answer(text)
    assert output.generated_text == before + text
    piece = Answer(text)
    if (details := output.details) is not None:
        piece.finish = _word(details.finish_reason)
        prompt = getattr(details, "input_length", None)
        piece.usage = prompt, details.generated_tokens
    return piece


def _generated(output: Any) -> Answer:
    details = output.details
    return Answer(
        output.generated_text,
        _word(details.finish_reason),
        usage=(None, details.generated_tokens),
    )


def _word(reason: Any) -> str:
    return str(getattr(reason, "value", reason))


class HubTextGeneration(_Generation, _Hub):
    name = "huggingface_hub text_generation"

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        async with self.client(url) as sdk:
            asked: Any = {"max_new_tokens": MAX_TOKENS, "stream": stream}
            reply: Any = await sdk.text_generation(PROMPT, details=True, **asked)
            if not stream:
                yield _generated(reply)
                return
            text = ""
            async with contextlib.aclosing(reply):
                async for output in reply:
                    piece = _token_piece(output, text)
                    text += piece.text
                    yield piece


class TextGeneration(_Generation):
    """It shows neither the status nor the headers of an error."""

    name = "text_generation"
    errors = tuple(
        kind
        for kind in vars(text_generation_errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    )

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        sdk = text_generation.AsyncClient(url, timeout=int(WITHIN_S))
        if not stream:
            yield _generated(await sdk.generate(PROMPT, max_new_tokens=MAX_TOKENS))
            return
        text = ""
        reply: Any = sdk.generate_stream(PROMPT, max_new_tokens=MAX_TOKENS)
        async with contextlib.aclosing(reply):
            async for output in reply:
                piece = _token_piece(output, text)
                text += piece.text
                yield piece

    def raised(self, error: Any) -> Raised:
        return Raised(_type_of(error), None, str(error))


# ------------------------------------------------------------------------------- Cody


class CodyError(Exception):
    """``kind``: "stream", or what the client makes of the status."""

    def __init__(self, kind: str, message: str, raw: client.RawReply) -> None:
        super().__init__(message)
        self.kind = kind
        self.raw = raw


class CodyChat(Adapter):
    """Cody has no SDK; the reader of ``cody.py`` is as its own."""

    name = "cody"
    path = "/.api/completions/stream?api-version=8"
    has_tools = True
    errors = (CodyError,)

    async def pieces(
        self, url: str, *, stream: bool, tools: bool = False, usage: bool = False
    ) -> AsyncGenerator[Answer, None]:
        body = {**self.body(), "stream": stream}
        if tools:
            body["tools"] = _TOOLS
        asked: Any = {"path": self.path, "body": body, "within_s": WITHIN_S}
        if not stream:
            yield self._whole_piece(await client.request(url, **asked))
            return
        parser, decoder = ChatParser(), codecs.getincrementaldecoder("utf-8")()
        async with client.stream(url, **asked) as incoming:
            while data := await incoming.read(WITHIN_S):
                before = len(parser.text)
                if incoming.status == 200:
                    parser.feed(decoder.decode(data))
                yield Answer(parser.text[before:])
            yield self._end_piece(incoming.reply)

    @staticmethod
    def _end_piece(raw: client.RawReply) -> Answer:
        if raw.status == 200:
            assert_ends_once(raw)
        outcome = read_chat(raw)
        if outcome.errors:
            kind = outcome.kind or "stream"
            raise CodyError(kind, "\n".join(outcome.errors), raw)
        assert (outcome.ended, outcome.violations) == ("complete", [])
        calls = [Call(call.name, call.arguments) for call in outcome.tool_calls]
        return Answer(
            finish=outcome.stop_reason,
            tool_calls=dict(enumerate(calls)),
            usage=_cody_counts(outcome.usage),
            model=outcome.model,
        )

    @staticmethod
    def _whole_piece(raw: client.RawReply) -> Answer:
        if raw.status != 200:
            outcome = read_chat(raw)
            raise CodyError(outcome.kind or "", raw.text, raw)
        reply = raw.json()
        calls = [call["function"] for call in reply.get("delta_tool_calls", ())]
        return Answer(
            reply["completion"],
            reply["stopReason"],
            {i: Call(c["name"], c["arguments"]) for i, c in enumerate(calls)},
            _cody_counts(reply.get("usage")),
            reply.get("model"),
        )

    def raised(self, error: Any) -> Raised:
        raw = error.raw
        kind = f"cody.{error.kind}"
        return Raised(kind, raw.status, str(error), raw.header("retry-after"))

    def body(self) -> dict[str, Any]:
        messages = [{"speaker": "human", "text": TEXT}]
        return {
            "model": MODEL,
            "messages": messages,
            "maxTokensToSample": MAX_TOKENS,
            "stream": True,
        }

    def is_end(self, kind: str | None, data: str) -> bool:
        return kind == "done"


def _cody_counts(usage: dict[str, Any] | None) -> tuple[int | None, int] | None:
    if usage is None:
        return None
    return usage["prompt_tokens"], usage["completion_tokens"]


CLIENTS: tuple[Adapter, ...] = (
    OpenAIChat(),
    OpenAICompletions(),
    AnthropicMessages(),
    HubTextGeneration(),
    HubChat(),
    TextGeneration(),
    CodyChat(),
)
