"""What is fuzzed: one function per target that takes any bytes, and bytes to begin with.

A target raises nothing, whatever it is given; what escapes it is a bug.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from proxy import config
from proxy.completion import CompletionRequest
from proxy.dialects.adjust import ADJUSTED, REQUEST_FIXES, mend
from proxy.dialects.base import (
    Chosen,
    Head,
    Incoming,
    Native as NativeDialect,
    Writer,
    choose,
)
from proxy.errors import (
    ClientFault,
    ConfigError,
    EventTooLarge,
    UpstreamFault,
    UpstreamStatus,
)
from proxy.providers import PROVIDERS
from proxy.providers.base import Asked, Call
from proxy.routes import INVOCATIONS, incoming, narrow
from proxy.sse import Event, Parser, frame
from proxy.translation import Translation
from tests.support import recording

DATA = Path(__file__).parent.parent / "data"
LIMITS_BYTES = (64, 300, 4096)


class Target(NamedTuple):
    run: Callable[[bytes], None]
    seeds: list[bytes]


# --- the event stream parser ---------------------------------------------------------


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut data, differently for different data but always the same for the same."""
    state = zlib.crc32(data)
    while data:
        state = state * 1_103_515_245 + 12_345 & 0x7FFFFFFF
        size = 1 + (state >> 16) % (1, 2, 7, 300)[state >> 8 & 3]
        yield data[:size]
        data = data[size:]


def _read(parser: Parser, *reads: bytes) -> tuple[list[Event], bool]:
    """Return the events, and whether one exceeded the limit."""
    events: list[Event] = []
    try:
        for each in reads:
            events += parser.feed(each)
        return events + parser.end(), False
    except EventTooLarge:
        return events, True


def sse(data: bytes) -> None:
    limit = LIMITS_BYTES[zlib.crc32(data) % len(LIMITS_BYTES)]
    whole, cut, single = (Parser(limit) for _ in range(3))
    events, too_large = _read(whole, data)
    by_cuts, cut_too_large = _read(cut, *_pieces(data))
    by_bytes, single_too_large = _read(single, *(bytes([byte]) for byte in data))
    assert too_large == cut_too_large == single_too_large
    if too_large:
        # A read that ends so takes with it what it had completed before.
        assert by_bytes[: len(events)] == events
        assert by_bytes[: len(by_cuts)] == by_cuts
    else:
        assert events == by_cuts == by_bytes
        ends = [(p.last_event_id, p.retry_ms, p.ignored) for p in (whole, cut, single)]
        assert ends[0] == ends[1] == ends[2]
    assert all(len(event.data) <= limit for event in by_bytes)
    assert sum(len(event.data) for event in by_bytes) <= len(data)
    written = b"".join(frame(event.type, event.data) for event in by_bytes)
    again = [(event.type, event.data) for event in Parser(len(written)).feed(written)]
    assert again == [(event.type, event.data) for event in by_bytes]


# --- requests ------------------------------------------------------------------------

TYPES = ("openaicompatible", "huggingface-tgi", "anthropic", "google", "sourcegraph")


URLS = (
    *("http://127.0.0.1:1/", "https://api.anthropic.com/"),
    *("https://generativelanguage.googleapis.com/", "https://cody-gateway."),
)


def _settings() -> config.Settings:
    """One model at each kind of server; the first is what all unknown names mean."""
    providers: list[Any] = []
    models = []
    for type in TYPES:
        name = "openai" if type == "sourcegraph" else f"at-{type}"
        providers.append({"id": name, "serverSideConfig": {"type": type}})
        models.append(
            {
                "modelRef": f"{name}::v1::model",
                "capabilities": ["chat", "autocomplete", "vision", "tools"],
                "contextWindow": {"maxInputTokens": 9000, "maxOutputTokens": 4000},
            }
        )
    for index in (0, 1):
        providers[index]["serverSideConfig"]["endpoints"] = [{"url": URLS[0]}]
    block = {"providerOverrides": providers, "modelOverrides": models}
    text = json.dumps({"fallback": True, "modelConfiguration": block})
    return config.load(text, environ={}, directory=Path("/nonexistent"))


SETTINGS = _settings()
PATHS = incoming(SETTINGS)
AT_PROVIDERS = {
    model.provider_id: (model, PROVIDERS[settings.type](settings), settings)
    for model in SETTINGS.models.models
    for settings in [SETTINGS.models.providers[model.provider_id]]
}


def request(path: str, *heads: Head) -> Callable[[bytes], None]:
    """Return the target of a path: parse, then write the call of some upstream."""
    ways = list(itertools.product(heads or (Head("POST", path, {}, {}),), AT_PROVIDERS))

    def run(data: bytes) -> None:
        # One of them each, or there is time for little.
        head, provider = ways[zlib.crc32(data) % len(ways)]
        _request(path, head, data, provider)

    return run


def _request(path: str, head: Head, data: bytes, provider: str) -> None:
    answering = _at(path, data)
    try:
        for body in (data, mend(data)):
            if body is not None:
                _call(path, head, body, provider)
    except ClientFault as error:
        reply = answering.error_reply(error)
        assert 400 <= reply.status < 500 or reply.status == 200
        assert len(reply.body) <= 2 * len(data) + 10_000


def _at(path: str, body: bytes) -> Incoming:
    return narrow(PATHS[path], body) if path == INVOCATIONS else PATHS[path]


def _call(path: str, head: Head, body: bytes, provider: str) -> None:
    """Do with a request what the server does, without its sockets."""
    answering = _at(path, body)
    answering.check(head)
    chosen = choose(body) if answering.dialect in ADJUSTED else None
    if chosen is not None:
        sketch = cast(NativeDialect, answering).sketch
        completion, writer = sketch(head, chosen)
        _say(Asked(answering.dialect, path), completion, writer, body, provider, chosen)
    completion, writer = answering.parse(head, body)
    _say(Asked(answering.dialect, path), completion, writer, body, provider, None)


def _say(
    asked: Asked,
    completion: CompletionRequest,
    writer: Writer,
    body: bytes,
    provider: str,
    chosen: Chosen | None,
) -> None:
    """Hand the body on if it is ``chosen`` for that and can be, else translate it."""
    SETTINGS.models.choose(completion.feature, completion.model, completion.fast)
    model, speaker, settings = AT_PROVIDERS[provider]
    endpoint = settings.endpoints[0]
    if chosen is None:
        call = speaker.call(completion, model, endpoint)
    else:
        native = speaker.native(asked, completion, model, endpoint)
        if native is None:
            return  # what was chosen is not enough for a translation
        call = native.pass_on(
            asked.dialect,
            chosen,
            model,
            body,
            fixes=REQUEST_FIXES[settings.server_profile],
            adjust=True,
        )
    _check_call(call, is_ours=chosen is None)
    reply = writer.error_reply(UpstreamStatus("OpenAI", 503, "x"))
    assert reply.status >= 400 or b"error" in reply.body


def _check_call(call: Call, *, is_ours: bool) -> None:
    assert "\n" not in call.url
    assert f"{call.url}/".startswith(URLS)
    assert not any(set("\r\n\0") & set(value) for value in call.headers.values())
    if is_ours:
        assert isinstance(json.loads(call.body), dict)


def _seeds(*bodies: dict[str, Any]) -> list[bytes]:
    return [json.dumps(body, ensure_ascii=False).encode() for body in bodies]


_PNG = "data:image/png;base64,iVBORw0KGgo="
_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
_CODY = _seeds(
    {
        "messages": [
            {"speaker": "human", "text": "You are Cody, an AI"},
            {"speaker": "assistant", "text": "I am Cody"},
            {"speaker": "human", "text": "naïve “quotes” 🤖"},
            {"speaker": "assistant"},
        ],
        "maxTokensToSample": 30,
        "temperature": 0,
        "topK": -1,
        "topP": 0.5,
        "stopSequences": ["\n\n"],
        "timeoutMs": 5000,
        "stream": True,
        "fast": False,
        "model": "at-anthropic::v1::model",
    },
    {
        "messages": [
            {"speaker": "system", "text": "Be short."},
            {
                "speaker": "human",
                "content": [
                    {"type": "text", "text": "See"},
                    {"type": "image_url", "image_url": {"url": _PNG}},
                    {"type": "file", "file": {"uri": "file:///a", "content": "x"}},
                    {"type": "context_file", "uri": "file:///a", "content": "x"},
                ],
            },
            {
                "speaker": "assistant",
                "content": [
                    {
                        "type": "tool_call",
                        "tool_call": {"id": "1", "name": "f", "arguments": "{}"},
                    }
                ],
            },
            {
                "speaker": "human",
                "content": [
                    {"type": "tool_result", "tool_result": {"id": "1", "content": "y"}}
                ],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {"prompt": "def f():", "stream": False},
)
_OPENAI = _seeds(
    {
        "model": "openai/model",
        "messages": [
            {"role": "system", "content": "Be short."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See 🤖"},
                    {"type": "image_url", "image_url": {"url": _PNG}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"city":"x"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 1,
        "n": 1,
        "stop": ["a", "b"],
        "logprobs": False,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "low",
        "logit_bias": {"1": 1},
        "user": "x",
        "seed": 1,
    },
    {"model": "x", "messages": [{"role": "user", "content": "hi"}], "stop": "x"},
)
_COMPLETIONS = _seeds(
    {
        "model": "x",
        "prompt": "def f():",
        "suffix": "return",
        "max_tokens": 5,
        "stream": True,
        "echo": False,
        "stop": ["\n"],
        "best_of": 1,
        "logprobs": None,
    },
    {"prompt": ["a"], "stop": "x"},
    {"prompt": [1, 2, 3]},
)
_MESSAGES = _seeds(
    {
        "model": "x",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be short."}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See 🤖"},
                    {
                        "type": "image",
                        "source": {
                            "type": "base64",
                            "media_type": "image/png",
                            "data": "iVBORw0KGgo=",
                        },
                    },
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "content": [{"type": "text", "text": "rain"}],
                        "is_error": False,
                    }
                ],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["x"],
        "stream": True,
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.9,
        "metadata": {"user_id": "x"},
    },
    {"model": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]},
)
_COMPLETE = _seeds(
    {
        "model": "x",
        "prompt": "\n\nHuman: Hi\n\nAssistant:",
        "max_tokens_to_sample": 5,
        "stop_sequences": ["\n\nHuman:"],
        "stream": True,
        "temperature": 0.1,
        "top_k": -1,
        "top_p": -1,
    }
)
_TGI = _seeds(
    {
        "inputs": "def f():",
        "parameters": {
            "max_new_tokens": 5,
            "stop": ["x"],
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 3,
            "do_sample": True,
            "seed": 1,
            "details": True,
            "return_full_text": False,
            "repetition_penalty": 1.1,
            "truncate": 5,
            "best_of": 1,
            "grammar": {"type": "json", "value": _SCHEMA},
            "decoder_input_details": True,
            "watermark": False,
            "typical_p": 0.5,
            "top_n_tokens": 2,
            "frequency_penalty": 0.1,
            "adapter_id": None,
        },
        "stream": True,
    },
    {"inputs": "x"},
)
_GEMINI = _seeds(
    {
        "model": "gemini",
        "stream": True,
        "system_instruction": {"parts": [{"text": "Be short."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "See 🤖"}]},
            {
                "role": "model",
                "parts": [{"functionCall": {"name": "f", "args": {"a": 1}}}],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "f", "response": {"b": 2}}},
                    {"inlineData": {"mimeType": "image/png", "data": "iVBO"}},
                ],
            },
        ],
        "generationConfig": {
            "temperature": 0.5,
            "maxOutputTokens": 5,
            "stopSequences": ["x"],
            "topP": 0.5,
            "topK": 2,
        },
        "tools": [
            {"functionDeclarations": [{"name": "f", "parameters": _SCHEMA}]},
        ],
    }
)


def _cody_heads(path: str) -> list[Head]:
    versions: tuple[dict[str, str], ...] = (
        {},
        {"api-version": "1"},
        {"api-version": "8"},
    )
    return [Head("POST", path, query, {}) for query in versions]


def _gateway_heads(path: str) -> list[Head]:
    features = ("chat_completions", "code_completions")
    return [
        Head("POST", path, {}, {"X-Sourcegraph-Feature": feature})
        for feature in features
    ]


_CHAT, _CODE = "/.api/completions/stream", "/.api/completions/code"
_GATEWAY = "/v1/completions"


def _requests() -> Iterator[tuple[str, Target]]:
    for name, path, seeds in (
        ("cody-chat", _CHAT, _CODY),
        ("cody-code", _CODE, _CODY),
    ):
        yield name, Target(request(path, *_cody_heads(path)), seeds)
    for name, path, seeds in (
        ("openai-chat", "/v1/chat/completions", _OPENAI),
        ("openai-completions", "/v1/completions", _COMPLETIONS),
        ("anthropic-messages", "/v1/messages", _MESSAGES),
        ("anthropic-complete", "/v1/complete", _COMPLETE),
        ("tgi-generate", "/generate", _TGI),
        ("tgi-compat", "/", _TGI),
        ("tgi-invocations", "/invocations", [*_TGI, *_OPENAI, *_COMPLETIONS]),
    ):
        yield name, Target(request(path), seeds)
    for vendor, seeds in (
        ("anthropic", _COMPLETE),
        ("anthropic-messages", _MESSAGES),
        ("openai", _OPENAI),
        ("fireworks", [*_OPENAI, *_COMPLETIONS]),
        ("google", _GEMINI),
    ):
        path = f"{_GATEWAY}/{vendor}"
        yield (
            f"gateway-{vendor}",
            Target(request(path, *_gateway_heads(path)), seeds),
        )


# --- replies -------------------------------------------------------------------------


def replies(data: bytes) -> None:
    """Any reply of any kind of server, to a client that can be told of errors."""
    _reply(data, *WAYS[zlib.crc32(data) % len(WAYS)])


WAYS = list(
    itertools.product(
        AT_PROVIDERS, (True, False), ("text/event-stream", "application/json")
    )
)


def _reply(data: bytes, provider: str, stream: bool, kind: str) -> None:
    cut = _told(_pieces(data), provider, stream, kind)
    whole = _told([data], provider, stream, kind)
    # A status, or the text before an error, depends on the reads; all else does not.
    if b"event: error" not in cut + whole and b"" not in (cut, whole):
        assert cut == whole
    if stream and cut:
        assert cut.count(b"event: done\n") == 1
        assert cut.endswith(b"event: done\ndata: {}\n\n")
    assert len(cut) <= 100 * len(data) + 1000


def _told(reads: Iterable[bytes], provider: str, stream: bool, kind: str) -> bytes:
    """Return what the client gets of a reply; nothing if it is an error's status."""
    path = _CHAT
    head = Head("POST", path, {"api-version": "8"}, {})
    body = json.dumps(
        {"messages": [{"speaker": "human", "text": "x"}], "stream": stream}
    )
    completion, writer = PATHS[path].parse(head, body.encode())
    model, speaker, settings = AT_PROVIDERS[provider]
    call = speaker.call(completion, model, settings.endpoints[0])
    exchange = Translation(
        call.reader,
        writer,
        stream=stream,
        content_type=kind,
        limit_bytes=LIMITS_BYTES[-1],
    )
    out = b""
    try:
        for piece in reads:
            out += exchange.receive_data(piece)
            if exchange.is_ended:
                break
        else:
            out += exchange.receive_eof()
    except UpstreamFault as error:
        assert out == b""
        assert writer.error_reply(error).body
        return b""
    assert exchange.is_ended
    return out


# --- the configuration ---------------------------------------------------------------


def configuration(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    environ = {"A": "x", "B": ""}
    try:
        # Where no file can be read.
        settings = config.load(text, environ=environ, directory=Path("/nonexistent"))
    except ConfigError as error:
        assert error.problems
        assert all(isinstance(each, str) and each for each in error.problems)
        assert len(str(error)) <= 1000 * len(data) + 10_000
        return
    assert config.describe(settings)
    config.secrets(settings)


_YAML = b"""\
listen: [127.0.0.1:8080, '[::1]:9']
auth:
  tokens: [{name: ann, sha256: "%s"}, {name: ben, token: "${A:-x}", email: b@c}]
  header: X-Token
limits: {bodyBytes: 100, eventBytes: 1_000}
timeouts: {connect: 1, chat: 1e3, code: 0.5}
aliases: {fast: acme::v1::qwen}
fallback: yes
models: {acme::v1::qwen: {strictTemplate: true}}
providers: {acme: {profile: vllm, adjust: off, credentials: client}}
modelConfiguration: &m
  providerOverrides:
    - id: acme
      serverSideConfig:
        type: openaicompatible
        endpoints: [{url: "http://127.0.0.1:8000/v1", accessToken: "${A}"}]
  modelOverrides:
    - modelRef: acme::v1::qwen
      modelName: Qwen/Qwen
      capabilities: [chat, autocomplete] # both
      contextWindow: {maxInputTokens: 30000, maxOutputTokens: 4000}
""" % (b"0" * 64)


def _stream_seeds() -> list[bytes]:
    names = sorted(path for path in DATA.glob("*/*.raw") if "stream" in path.name)
    return [
        # Whole recordings would be too long to do much with.
        recording.load(f"{path.parent.name}/{path.stem}").body[:1000]
        for path in names
    ]


STREAMS = [
    *_stream_seeds(),
    b"\xef\xbb\xbf: hi\r\nevent: x\rid: 1\ndata: a\ndata: \xc3\xa9\n\nretry: 5\n\n",
    b'error: {"message":"in a field"}\n\n',
    b"data: [DONE]\n\n",
    b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n',
    b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
    b'data: {"candidates":[{"content":{"parts":[{"text":"a"}]},"finishReason":"STOP"}]}\n\n',
]

TARGETS: dict[str, Target] = {
    "sse": Target(sse, STREAMS),
    "replies": Target(replies, STREAMS),
    "configuration": Target(
        configuration,
        [
            _YAML,
            (DATA / "blessed.jsonc").read_bytes(),
            b"{" + (DATA / "blessed.jsonc").read_bytes() + b"}",
        ],
    ),
    **dict(_requests()),
}
