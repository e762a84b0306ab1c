"""The simulated server without its sockets: a call in, a reply out.

A reply is a whole body or an iterator of events, each with the number of tokens that
had to be generated for it. Who serves it decides when to send what.

Source: https://github.com/huggingface/text-generation-inference, router/src/server.rs
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec

from proxy.simulator import chat, events, prose, tokens
from proxy.simulator.chat import adapter_of, spoken
from proxy.simulator.events import Step
from proxy.simulator.generation import Generation, Job, Result, generate
from proxy.simulator.requests import (
    ChatRequest,
    CompatGenerateRequest,
    CompletionRequest,
    GenerateRequest,
    Parameters,
    Refusal,
    Rejection,
    decode,
    invalid,
)
from proxy.simulator.settings import Settings

Headers: TypeAlias = dict[str, str]

JSON = "application/json"
PLAIN = "text/plain; charset=utf-8"

_CORS = {
    "access-control-allow-origin": "*",
    "vary": "origin, access-control-request-method, access-control-request-headers",
}
_PREFLIGHT = {
    "access-control-allow-methods": "GET,POST",
    "access-control-allow-headers": "content-type",
}
_encode = msgspec.json.encode


class Call(msgspec.Struct, kw_only=True):
    """One request, as far as it matters here."""

    method: str
    path: str
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Situation(msgspec.Struct):
    """What a reply depends on besides the call."""

    settings: Settings
    now: float
    free: int  # how many more generations the server takes


class Whole(msgspec.Struct):
    """A reply with one body, sent when ``steps`` tokens have been generated."""

    status: int = 200
    headers: Headers = {}
    body: bytes = b""
    steps: int = 0
    jobs: int = 0


class Stream(msgspec.Struct):
    """An event stream. ``jobs`` says how many generations run for it."""

    headers: Headers
    events: Iterator[Step]
    jobs: int


Reply: TypeAlias = Whole | Stream


def answer(call: Call, situation: Situation) -> Reply:
    """Return what the server says to a call."""
    if call.method == "OPTIONS":
        return Whole(headers=_CORS | _PREFLIGHT)
    methods = _ROUTES.get(call.path)
    if methods is None:
        return Whole(404, dict(_CORS))
    handler = methods.get("GET" if call.method == "HEAD" else call.method)
    if handler is None:
        return Whole(405, {"allow": ",".join(methods), **_CORS})
    if handler in _GUARDED and not _authorized(call, situation.settings):
        return Whole(401, dict(_CORS))
    return handler(call, situation)


def generates(call: Call) -> bool:
    """Whether a call asks for text."""
    return call.method == "POST" and call.path in _GENERATING


def _authorized(call: Call, settings: Settings) -> bool:
    if settings.api_key is None:
        return True
    # TGI compares the whole header, and without regard to case.
    given = call.headers.get("authorization", "")
    return given.lower() == f"Bearer {settings.api_key}".lower()


def _json(value: object, status: int = 200) -> Whole:
    return Whole(status, {"content-type": JSON, **_CORS}, _encode(value))


def _plain(text: str, status: int = 200) -> Whole:
    return Whole(status, {"content-type": PLAIN, **_CORS}, text.encode())


def refuse(refusal: Refusal | Rejection) -> Whole:
    if isinstance(refusal, Rejection):
        return _plain(refusal.text, refusal.status)
    headers = {"content-type": JSON, **_CORS}
    return Whole(refusal.status, headers, refusal.native())


TOO_LARGE = Rejection(413, "Failed to buffer the request body: length limit exceeded")


# --- routes that generate ------------------------------------------------------------


def _generate(call: Call, situation: Situation) -> Reply:
    return _native(decode(GenerateRequest, _type(call), call.body), situation)


def _generate_stream(call: Call, situation: Situation) -> Reply:
    request = decode(GenerateRequest, _type(call), call.body)
    return _native(request, situation, stream=True)


def _compat(call: Call, situation: Situation) -> Reply:
    """``POST /``: what the Python clients of TGI use; its body is a list of one."""
    request = decode(CompatGenerateRequest, _type(call), call.body)
    if isinstance(request, Rejection):
        return refuse(request)
    return _native(request, situation, stream=request.stream, wrap=lambda body: [body])


def _native(
    request: GenerateRequest | Rejection,
    situation: Situation,
    *,
    stream: bool = False,
    wrap: Callable[[events.GenerateResponse], object] = lambda body: body,
) -> Reply:
    if isinstance(request, Rejection):
        return refuse(request)
    parameters = request.parameters
    prompt = request.inputs if parameters.return_full_text else ""
    job = _native_job(request, situation.settings)
    if stream:
        result = _stream_refusal(parameters) or _run([job], situation)[0]
        written = events.generate_events(result, prompt, parameters.details)
        return _stream([job], [result], written)
    details = parameters.details or parameters.decoder_input_details
    return _whole(
        [job],
        situation,
        lambda results: wrap(events.generate_body(results[0], prompt, details)),
    )


def _stream_refusal(parameters: Parameters) -> Refusal | None:
    if (parameters.best_of or 1) != 1:
        return invalid("`best_of` != 1 is not supported when streaming tokens")
    if parameters.decoder_input_details:
        return invalid(
            "`decoder_input_details` == true is not supported when streaming tokens"
        )
    return None


def _native_job(request: GenerateRequest, settings: Settings) -> Job:
    if request.parameters.grammar is not None:
        pieces = chat.json_pieces(request.parameters.grammar)
    else:
        pieces = spoken(prose.continuation(request.inputs), settings)
    return Job(
        inputs=request.inputs,
        parameters=request.parameters,
        pieces=pieces,
        adapter=adapter_of(request.parameters.adapter_id, settings),
    )


def _completions(call: Call, situation: Situation) -> Reply:
    request = decode(CompletionRequest, _type(call), call.body)
    if isinstance(request, Rejection):
        return refuse(request)
    settings = situation.settings
    if refusal := _completion_refusal(request, settings):
        return refuse(refusal)
    jobs = [_completion_job(request, prompt, settings) for prompt in request.prompts]
    model, created = settings.model, int(situation.now)
    if not request.stream:
        return _whole(
            jobs,
            situation,
            lambda results: events.completion_body(results, model, created),
        )
    results = _run(jobs, situation)
    return _stream(jobs, results, events.completion_events(results, model, created))


def _completion_refusal(
    request: CompletionRequest, settings: Settings
) -> Refusal | None:
    if request.suffix is not None:
        return Refusal(
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            "suffix not supported",
        )
    most = settings.max_client_batch_size
    if len(request.prompts) > most:
        text = f"Number of prompts exceeds the maximum allowed batch size of {most}"
        return Refusal(text, "batch size exceeded")
    return None


def _completion_job(request: CompletionRequest, prompt: str, settings: Settings) -> Job:
    greedy = request.temperature == 0
    parameters = Parameters(
        temperature=None if greedy else request.temperature,
        do_sample=not greedy,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        top_p=request.top_p,
        max_new_tokens=request.max_tokens,
        stop=request.stop or [],
        seed=request.seed,
        details=True,
    )
    return Job(
        inputs=prompt,
        parameters=parameters,
        pieces=spoken(prose.continuation(prompt), settings),
        adapter=adapter_of(request.model, settings),
    )


def _chat(call: Call, situation: Situation) -> Reply:
    request = decode(ChatRequest, _type(call), call.body)
    if isinstance(request, Rejection):
        return refuse(request)
    settings = situation.settings
    prepared = chat.prepare(request, settings)
    if isinstance(prepared, Refusal):
        return refuse(prepared)
    shape = events.ChatShape(
        # Any other name is that of an adapter, and TGI repeats it.
        model=adapter_of(request.model, settings) or settings.model,
        created=int(situation.now),
        tokens_per_s=settings.tokens_per_s,
        logprobs=bool(request.logprobs),
        usage=request.stream_options.include_usage,
        call=prepared.call,
    )
    jobs = [prepared.job]
    if not request.stream:
        return _whole(
            jobs, situation, lambda results: events.chat_body(results[0], shape)
        )
    results = _run(jobs, situation)
    return _stream(jobs, results, events.chat_events(results[0], shape))


def _type(call: Call) -> str:
    return call.headers.get("content-type", "")


def _run(jobs: Sequence[Job], situation: Situation) -> list[Result]:
    return [
        generate(job, situation.settings, free=index < situation.free)
        for index, job in enumerate(jobs)
    ]


def _running(results: Sequence[Result]) -> list[Generation]:
    return [result for result in results if isinstance(result, Generation)]


def _whole(
    jobs: Sequence[Job],
    situation: Situation,
    render: Callable[[Sequence[Generation]], object],
) -> Whole:
    results = _run(jobs, situation)
    for result in results:
        if isinstance(result, Refusal):
            return refuse(result)
    done = _running(results)
    body = render(done)
    if isinstance(body, Refusal):
        return refuse(body)
    headers = {"content-type": JSON, **_timings(jobs, done, situation), **_CORS}
    steps = max(len(result.tokens) for result in done)
    return Whole(200, headers, _encode(body), steps, len(done))


def _timings(
    jobs: Sequence[Job], results: Sequence[Generation], situation: Situation
) -> Headers:
    settings = situation.settings
    produced = sum(len(result.tokens) for result in results)
    per_token = 1 / settings.tokens_per_s if settings.tokens_per_s else 0.0
    inference = settings.first_token_s + per_token * produced
    return {
        "x-compute-type": "gpu+optimized",
        "x-compute-time": str(inference),
        "x-compute-characters": _characters(jobs),
        "x-total-time": str(int(inference * 1000)),
        "x-validation-time": "0",
        "x-queue-time": "0",
        "x-inference-time": str(int(inference * 1000)),
        "x-time-per-token": str(int(per_token * 1000)),
        "x-prompt-tokens": str(sum(result.input_length for result in results)),
        "x-generated-tokens": str(produced),
    }


def _characters(jobs: Sequence[Job]) -> str:
    return str(sum(len(job.inputs) for job in jobs))


def _stream(
    jobs: Sequence[Job], results: Sequence[Result], written: Iterator[Step]
) -> Stream:
    headers = {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-compute-type": "gpu+optimized",
        "x-compute-characters": _characters(jobs),
        "x-accel-buffering": "no",
        **_CORS,
    }
    return Stream(headers, written, len(_running(results)))


# --- the others ----------------------------------------------------------------------


def _health(call: Call, situation: Situation) -> Whole:
    return Whole(headers=dict(_CORS))


class Info(msgspec.Struct, kw_only=True):
    model_id: str
    model_sha: str | None = None
    model_pipeline_tag: str = "text-generation"
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int = 2
    max_client_batch_size: int
    router: str = "text-generation-router"
    version: str = events.VERSION
    sha: str | None = None
    docker_label: str | None = None


def _info(call: Call, situation: Situation) -> Whole:
    settings = situation.settings
    info = Info(
        model_id=settings.model,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_input_tokens=settings.max_input_tokens,
        max_total_tokens=settings.max_total_tokens,
        max_client_batch_size=settings.max_client_batch_size,
    )
    return _json(info)


def _models(call: Call, situation: Situation) -> Whole:
    name = situation.settings.model
    model = {"id": name, "object": "model", "created": 0, "owned_by": name}
    return _json({"object": "list", "data": [model]})


def _metrics(call: Call, situation: Situation) -> Whole:
    busy = situation.settings.max_concurrent_requests - situation.free
    return _plain(
        "# TYPE tgi_batch_current_size gauge\n"
        f"tgi_batch_current_size {busy}\n\n"
        "# TYPE tgi_queue_size gauge\n"
        "tgi_queue_size 0\n\n"
    )


def _tokenize(call: Call, situation: Situation) -> Whole:
    request = decode(GenerateRequest, _type(call), call.body)
    if isinstance(request, Rejection):
        return refuse(request)
    return _json(tokens.tokenize(request.inputs))


def _chat_tokenize(call: Call, situation: Situation) -> Whole:
    request = decode(ChatRequest, _type(call), call.body)
    if isinstance(request, Rejection):
        return refuse(request)
    prepared = chat.prepare(request, situation.settings)
    if isinstance(prepared, Refusal):
        return refuse(prepared)
    text = prepared.job.inputs
    return _json({"tokenize_response": tokens.tokenize(text), "templated_text": text})


Handler: TypeAlias = Callable[[Call, Situation], Reply]

_GUARDED: frozenset[Handler] = frozenset(
    (_generate, _generate_stream, _compat, _completions, _chat, _tokenize)
)
_GENERATING = frozenset(
    (
        *("/", "/generate", "/generate_stream", "/invocations"),
        *("/v1/chat/completions", "/v1/completions"),
    )
)
_ROUTES: dict[str, dict[str, Handler]] = {
    "/": {"GET": _health, "POST": _compat},
    "/generate": {"POST": _generate},
    "/invocations": {"POST": _generate},
    "/generate_stream": {"POST": _generate_stream},
    "/v1/chat/completions": {"POST": _chat},
    "/v1/completions": {"POST": _completions},
    "/tokenize": {"POST": _tokenize},
    "/chat_tokenize": {"POST": _chat_tokenize},
    "/info": {"GET": _info},
    "/health": {"GET": _health},
    "/ping": {"GET": _health},
    "/metrics": {"GET": _metrics},
    "/v1/models": {"GET": _models},
}
