"""Hugging Face TGI's own API: ``/generate``, ``/generate_stream``, ``/``, ``/invocations``.

The client's side, and a reader for servers that speak it. TGI's OpenAI routes are not
here: what they say is OpenAI's dialect.

Sources: https://github.com/huggingface/text-generation-inference, router/src/lib.rs,
validation.rs and server.rs; what clients make of errors is in its
clients/python/text_generation/errors.py.
"""

from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii as _quote
from typing import Annotated

import msgspec

from proxy.completion import (
    CompletionRequest,
    Delta,
    Finish,
    Message,
    Start,
    Text,
    TextPart,
    Usage,
)
from proxy.dialects.base import (
    COMMENT,
    EVENT_STREAM,
    JSON,
    RETRY_AFTER_S,
    Chosen,
    Head,
    Reader,
    Reply,
    Writer,
    dump,
    error_headers,
)
from proxy.dialects.fault import decode_lenient, fault_in
from proxy.errors import (
    InvalidRequest,
    ProxyError,
    UpstreamFault,
    UpstreamReported,
    UpstreamStatus,
)
from proxy.sse import Event

# The router's own default (router/src/lib.rs, default_max_new_tokens) until it learned
# to fill the context: its clients count on short answers. huggingface_hub documents it.
DEFAULT_MAX_NEW_TOKENS = 100

# ----------------------------------------------------------------------- request body

_U32 = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_I32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]


class _Parameters(msgspec.Struct):
    """``object`` is what only gets its name noted. The text-generation client sends
    every key, null where nothing was said."""

    max_new_tokens: _U32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: _I32 | None = None
    stop: list[str] | None = None
    do_sample: bool | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    typical_p: float | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_full_text: bool | None = None
    best_of: _U32 | None = None
    watermark: bool | None = None
    truncate: _U32 | None = None
    top_n_tokens: _U32 | None = None
    grammar: object = None
    adapter_id: str | None = None


class _Body(msgspec.Struct):
    inputs: str
    parameters: _Parameters | None = None
    stream: bool | None = None


_decode_body = msgspec.json.Decoder(_Body).decode

_UNREADABLE = "Failed to deserialize the JSON body into the target type: "
_NO_JSON = "Failed to parse the request body as JSON: "
_INVALID = "Input validation error: "


def _decode(body: bytes) -> _Body:
    try:
        return _decode_body(body)
    except RecursionError:
        raise InvalidRequest(f"{_NO_JSON}recursion limit exceeded") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{_UNREADABLE}{error}") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequest(f"{_NO_JSON}{error}") from None


# What TGI refuses whatever the model, in its order and its words. Other upstreams may
# take such values, but a client of TGI's has learned what they mean here: nothing.
_RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda x: x > 0, "`temperature` must be strictly positive"),
    (
        "repetition_penalty",
        lambda x: x > 0,
        "`repetition_penalty` must be strictly positive",
    ),
    (
        "frequency_penalty",
        lambda x: -2 <= x <= 2,
        "`frequency_penalty` must be >= -2.0 and <= 2.0",
    ),
    ("top_p", lambda x: 0 < x < 1, "`top_p` must be > 0.0 and < 1.0"),
    ("typical_p", lambda x: 0 < x < 1, "`typical_p` must be > 0.0 and < 1.0"),
    ("top_k", lambda x: x > 0, "`top_k` must be strictly positive"),
    ("max_new_tokens", lambda x: x > 0, "`max_new_tokens` must be strictly positive"),
    ("seed", lambda x: 0 <= x < 2**64, "`seed` must be positive"),
)


def _check(body: _Body, parameters: _Parameters, stream: bool) -> None:
    for name, is_valid, text in _RULES:
        value = getattr(parameters, name)
        if value is not None and not is_valid(value):
            raise InvalidRequest(_INVALID + text)
    if not body.inputs:
        raise InvalidRequest(f"{_INVALID}`inputs` cannot be empty")
    if stream and (parameters.best_of or 1) != 1:
        raise InvalidRequest(
            f"{_INVALID}`best_of` != 1 is not supported when streaming tokens"
        )
    if stream and parameters.decoder_input_details:
        raise InvalidRequest(
            f"{_INVALID}`decoder_input_details` == true is not supported when "
            "streaming tokens"
        )


# Parameters without a neutral word, each with the values that change nothing.
_UNSAID: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("repetition_penalty", (None, 1.0)),
    ("typical_p", (None,)),
    ("decoder_input_details", (None, False)),
    ("best_of", (None, 0, 1)),
    ("watermark", (None, False)),
    ("truncate", (None,)),
    ("top_n_tokens", (None, 0)),
    ("grammar", (None,)),
)


def _request(body: _Body, parameters: _Parameters, stream: bool) -> CompletionRequest:
    temperature = parameters.temperature
    if temperature is None and parameters.do_sample:
        temperature = 1.0  # TGI's default, once it samples
    return CompletionRequest(
        # The prompt is text to go on with: nobody put it into a chat template.
        feature="code",
        messages=[Message("user", [TextPart(body.inputs)])],
        model=parameters.adapter_id or "",
        stream=stream,
        max_tokens=parameters.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        temperature=temperature,
        top_p=parameters.top_p,
        top_k=parameters.top_k,
        stop=list(dict.fromkeys(stop for stop in parameters.stop or () if stop)),
        seed=parameters.seed,
        frequency_penalty=parameters.frequency_penalty,
        dropped=[
            name for name, idle in _UNSAID if getattr(parameters, name) not in idle
        ],
    )


class _Route(msgspec.Struct, frozen=True):
    """``stream``: what the path decides, None if the body does. ``listed``: a whole
    reply is a list of one."""

    stream: bool | None = None
    listed: bool = False


_ROUTES = {
    "/generate": _Route(stream=False),
    "/generate_stream": _Route(stream=True),
    # What all Python clients use, for both.
    "/": _Route(listed=True),
    "/invocations": _Route(),
}
PATHS = tuple(_ROUTES)


class Generate:
    """Args: path: one of ``PATHS``."""

    dialect = "tgi"

    def __init__(self, path: str) -> None:
        self._route = _ROUTES[path]

    def check(self, head: Head) -> None:
        pass

    def sketch(self, head: Head, chosen: Chosen) -> tuple[CompletionRequest, Writer]:
        stream = self._route.stream
        if stream is None:
            stream = bool(chosen.stream)
        request = CompletionRequest("code", [], (chosen.model or "").strip())
        request.stream = stream
        return request, GenerateWriter(
            prompt="", details=False, listed=self._route.listed
        )

    def parse(self, head: Head, body: bytes) -> tuple[CompletionRequest, Writer]:
        wire = _decode(body)
        parameters = wire.parameters or _Parameters()
        stream = self._route.stream
        if stream is None:
            stream = bool(wire.stream)
        _check(wire, parameters, stream)
        writer = GenerateWriter(
            # Only the whole text gets the prompt, the tokens are the answer's.
            prompt=wire.inputs if parameters.return_full_text else "",
            details=bool(parameters.details or parameters.decoder_input_details),
            listed=self._route.listed,
        )
        return _request(wire, parameters, stream), writer

    def error_reply(self, error: ProxyError) -> Reply:
        return _error_reply(error)


# ---------------------------------------------------------------------------- replies

_STREAM_HEADERS = {
    "Content-Type": EVENT_STREAM,
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
# No blank, like the TGI that its clients were written for (axum 0.6, up to TGI 2.0):
# they all take both.
_DATA = "data:"

# Clients parse the word into an enumeration of just these three.
_FINISH_WORDS = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "MAX_TOKENS": "length",
    "stop_sequence": "stop_sequence",
}


_MOST_PIECES = 2048


class GenerateWriter:
    """Says text only: TGI's own API has no word for thoughts and none for tool calls,
    and to print them into the text would put them into somebody's file.

    Args:
        prompt:  what to put in front of the whole text.
        details: the client asked for them.
        listed:  a whole reply is a list of one.
    """

    stream_headers: Mapping[str, str] = _STREAM_HEADERS

    def __init__(self, *, prompt: str, details: bool, listed: bool) -> None:
        self._prompt = prompt
        self._details = details
        self._listed = listed
        self._texts: list[str] = []
        self._pieces = 0
        self._finish = ""
        self._usage: Usage | None = None

    def frames(self, deltas: list[Delta]) -> bytes:
        out = []
        for delta in deltas:
            if type(delta) is Text:
                self._add(delta.text)
                out.append(self._token(delta.text))
            else:
                self._note(delta)
        return "".join(out).encode("ascii")

    def _add(self, text: str) -> None:
        self._texts.append(text)
        self._pieces += 1
        if len(self._texts) > _MOST_PIECES:  # each takes ten times its own space
            self._texts = ["".join(self._texts)]

    def _token(self, text: str) -> str:
        # The tokens' numbers and probabilities are nowhere told outside of TGI.
        return (
            f'{_DATA}{{"index":{self._pieces},"token":{{"id":0,"text":{_quote(text)},'
            '"logprob":0.0,"special":false},"generated_text":null,"details":null}\n\n'
        )

    def _note(self, delta: Delta) -> None:
        if isinstance(delta, Finish):
            self._finish = delta.reason
        elif isinstance(delta, Usage):
            self._usage = delta

    def keep_alive(self) -> bytes:
        return COMMENT  # TGI sends empty ones itself

    def literals(self, texts: list[bytes]) -> bytes | None:
        return None

    def end(self) -> bytes:
        """The whole text goes with a last token, and here nobody knew which piece of
        the answer would be the last: so one of no text follows."""
        token = {"id": 0, "text": "", "logprob": 0.0, "special": True}
        event = {
            "index": self._pieces + 1,
            "token": token,
            "generated_text": self._prompt + "".join(self._texts),
            "details": self._stream_details() if self._details else None,
        }
        return f"{_DATA}{dump(event)}\n\n".encode("ascii")

    def error(self, error: ProxyError) -> bytes:
        return f"{_DATA}{dump(_error(error))}\n\n".encode("ascii")

    def body(self, deltas: list[Delta]) -> bytes:
        for delta in deltas:
            if isinstance(delta, Text):
                self._add(delta.text)
            else:
                self._note(delta)
        reply: dict[str, object] = {
            "generated_text": self._prompt + "".join(self._texts)
        }
        if self._details:
            reply["details"] = {**self._common_details(), "prefill": [], "tokens": []}
        return dump([reply] if self._listed else reply).encode("ascii")

    def error_reply(self, error: ProxyError) -> Reply:
        """A real status, even for a stream: TGI would say 200 and then an event, but
        its clients understand both, and load balancers only this."""
        return _error_reply(error)

    def _common_details(self) -> dict[str, object]:
        # The next best count, where the upstream does not give it, is that of pieces.
        count = self._usage.completion_tokens if self._usage else self._pieces
        return {
            "finish_reason": _FINISH_WORDS.get(self._finish, "eos_token"),
            "generated_tokens": count,
            "seed": None,
        }

    def _stream_details(self) -> dict[str, object]:
        length = self._usage.prompt_tokens if self._usage else 0
        return {**self._common_details(), "input_length": length}


# ----------------------------------------------------------------------------- errors

# error_type -> status. The clients' exceptions go by the word: GenerationError,
# IncompleteGenerationError, OverloadedError, ValidationError. TGI has no word for a
# timeout, and only without one does text-generation look at the 504.
_STATUS_BY_TYPE = {
    "generation": 424,
    "incomplete_generation": 500,
    "incomplete_generation_stream": 500,
    "stream_serialization_error": 500,
    "validation": 422,
    "template_error": 422,
    "missing_template_variable": 422,
    "tool_error": 422,
    "overloaded": 429,
    "healthcheck": 503,
    "timeout": 504,
}
# By our own name of the error, then by the status that describes it. An upstream's
# 401, 403 or 404 is no verdict on the client: like all the rest it is "generation".
_TYPE_BY_KIND = {
    "bad_request": "validation",
    "invalid_prompt": "validation",
    "unknown_model": "validation",
    "upstream_truncated": "incomplete_generation",
    "deadline_exceeded": "timeout",
    # TGI says the same, with 429, when too many ask at a time.
    **dict.fromkeys(("rate_limited", "queue_full", "queue_timeout"), "overloaded"),
}
_TYPE_BY_STATUS = {
    400: "validation",
    413: "validation",
    422: "validation",
    429: "overloaded",
    503: "healthcheck",
    504: "timeout",
    529: "overloaded",
}


def _error(error: ProxyError) -> dict[str, str]:
    text, kind = _reported(error)
    return {"error": text, "error_type": kind or _type_of(error)}


def _reported(error: ProxyError) -> tuple[str, str]:
    """The text, and the upstream's own word for it if that is one of TGI's.

    The text is taken out of the message: only that went through the redactor.
    """
    text = error.message
    if isinstance(error, UpstreamStatus):
        said = text.removeprefix(f"{error.source}: unexpected status code ")
        _, _, body = said.partition(": ")
        fault = fault_in(decode_lenient(body))
    else:
        fault = error if isinstance(error, UpstreamReported) else None
    if fault is None or fault.type not in _STATUS_BY_TYPE:
        return text, ""
    return fault.message.removeprefix(f"{fault.type}: "), fault.type


def _type_of(error: ProxyError) -> str:
    if error.kind in _TYPE_BY_KIND:
        return _TYPE_BY_KIND[error.kind]
    if isinstance(error, UpstreamStatus) and error.is_clients_credential:
        return _TYPE_BY_STATUS.get(error.status, error.kind)
    if isinstance(error, UpstreamFault):
        return _TYPE_BY_STATUS.get(error.status, "generation")
    return error.kind


def _error_reply(error: ProxyError) -> Reply:
    # TGI says what it could not decode in plain text, which its clients cannot.
    said = _error(error)
    status = _STATUS_BY_TYPE.get(said["error_type"], error.status)
    headers = error_headers(error)
    if status == 429:  # Anthropic's 529, too
        headers.setdefault("retry-after", str(RETRY_AFTER_S))
    return Reply(status, JSON, dump(said).encode("ascii"), headers)


# --------------------------------------------------------------------- upstream's side


class _Token(msgspec.Struct, gc=False):
    text: str | None = None
    special: bool | None = None


class _Details(msgspec.Struct, gc=False):
    finish_reason: str | None = None
    generated_tokens: int | None = None
    input_length: int | None = None
    prefill: list[msgspec.Raw] | None = None


class _Chunk(msgspec.Struct, gc=False):
    """An event of a stream, or a whole reply."""

    token: _Token | None = None
    generated_text: str | None = None
    details: _Details | None = None
    error: object = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_whole = msgspec.json.Decoder(_Chunk | list[_Chunk]).decode


class TGIReader(Reader):
    """Reads ``/generate_stream`` and the whole replies of all routes.

    The stream has no end marker: it is complete when the whole text was said.
    """

    def read(self, event: Event, out: list[Delta]) -> None:
        try:
            chunk = _decode_chunk(event.data)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            self.read_odd(event)
            return
        known = chunk.token is not None or chunk.generated_text is not None
        if event.type == "error" or chunk.error or not known:
            self.read_odd(event)
            return
        self._start(out)
        token = chunk.token
        if token is not None and token.text and not token.special:
            out.append(Text(token.text))
        if chunk.generated_text is not None:
            self._end(chunk.details, out)

    def read_body(self, body: bytes) -> list[Delta]:
        try:
            whole = _decode_whole(body)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise self.odd_body(body, "generated_text") from None
        chunks = whole if isinstance(whole, list) else [whole]
        if not chunks or chunks[0].error or chunks[0].generated_text is None:
            raise self.odd_body(body, "generated_text")
        out: list[Delta] = []
        self._start(out)
        if chunks[0].generated_text:
            out.append(Text(chunks[0].generated_text))
        self._end(chunks[0].details, out)
        return out

    def _start(self, out: list[Delta]) -> None:
        if not self.understood:
            self.understood = True
            out.append(Start("", ""))  # TGI names neither

    def _end(self, details: _Details | None, out: list[Delta]) -> None:
        details = details or _Details()
        if details.generated_tokens is not None:
            length = details.input_length
            if length is None:
                length = len(details.prefill or ())
            self.usage = Usage(length, details.generated_tokens)
        out.append(Finish(details.finish_reason or "eos_token"))
        self.finished = self.ended = True
