"""TGI's own API by itself: requests parsed, replies worded, its streams read."""

import json

import pytest
from hypothesis import given, strategies as st

from proxy.completion import (
    Delta,
    Finish,
    Message,
    Start,
    Text,
    TextPart,
    Thinking,
    ToolCall,
    Usage,
)
from proxy.dialects import tgi
from proxy.dialects.base import Head, Reader
from proxy.errors import (
    ClientFault,
    DeadlineExceeded,
    InvalidPrompt,
    InvalidRequest,
    MethodNotAllowed,
    PayloadTooLarge,
    ProxyError,
    Unauthorized,
    UnknownModel,
    UpstreamGarbled,
    UpstreamReported,
    UpstreamStatus,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.simulator.answers import Call, Situation, Stream, Whole, answer
from proxy.simulator.settings import Settings
from proxy.sse import Event, Parser

JSON_TYPE = {"content-type": "application/json"}


def parse(body: object, path="/"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return tgi.Generate(path).parse(Head("POST", path, {}, {}), data)


def ask(path="/", stream: bool | None = None, **parameters):
    return parse({"inputs": "Hi", "parameters": parameters, "stream": stream}, path)


def read(data: bytes, reader: Reader | None = None) -> list[Delta]:
    reader = reader or tgi.TGIReader()
    out: list[Delta] = []
    for event in Parser().feed(data):
        reader.read(event, out)
    return out


def text_of(deltas: list[Delta]) -> str:
    return "".join(d.text for d in deltas if isinstance(d, Text))


# --------------------------------------------------------------------------- requests

# What the two Python clients send when asked for nothing in particular.
NULLS: dict[str, object] = {
    "adapter_id": None,
    "best_of": None,
    "decoder_input_details": False,
    "details": False,
    "do_sample": False,
    "frequency_penalty": None,
    "grammar": None,
    "max_new_tokens": None,
    "repetition_penalty": None,
    "return_full_text": False,
    "seed": None,
    "stop": [],
    "temperature": None,
    "top_k": None,
    "top_n_tokens": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "watermark": False,
}


@pytest.mark.parametrize(
    "parameters", [NULLS, dict.fromkeys(NULLS), {}, None, {"unheard_of": [1]}]
)
def test_parameters_that_say_nothing(parameters):
    request, _ = parse({"inputs": "def f(", "parameters": parameters})
    assert request.feature == "code"
    assert request.messages == [Message("user", [TextPart("def f(")])]
    assert (request.model, request.stream, request.dropped) == ("", False, [])
    assert (request.max_tokens, request.temperature) == (100, None)
    assert (request.top_p, request.top_k, request.stop) == (None, None, [])
    assert (request.seed, request.frequency_penalty) == (None, None)


def test_parameters_that_say_all():
    request, _ = ask(
        max_new_tokens=20,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop=["\n\n", "", "\n\n"],
        do_sample=True,
        seed=2**64 - 1,
        frequency_penalty=-0.5,
        adapter_id="lora",
    )
    assert (request.max_tokens, request.temperature) == (20, 0.5)
    assert (request.top_p, request.top_k, request.stop) == (0.9, 40, ["\n\n"])
    assert (request.seed, request.frequency_penalty) == (2**64 - 1, -0.5)
    assert (request.model, request.dropped) == ("lora", [])


def test_sampling_without_a_temperature_is_at_one():
    assert ask(do_sample=True)[0].temperature == 1.0
    assert ask(do_sample=False)[0].temperature is None
    assert ask(do_sample=False, temperature=0.3)[0].temperature == 0.3


@pytest.mark.parametrize(
    ("parameters", "dropped"),
    [
        ({"repetition_penalty": 1.1}, ["repetition_penalty"]),
        ({"repetition_penalty": 1}, []),
        ({"typical_p": 0.5}, ["typical_p"]),
        ({"decoder_input_details": True}, ["decoder_input_details"]),
        ({"best_of": 2}, ["best_of"]),
        ({"best_of": 1}, []),
        ({"watermark": True}, ["watermark"]),
        ({"truncate": 10}, ["truncate"]),
        ({"top_n_tokens": 5}, ["top_n_tokens"]),
        ({"grammar": {"type": "regex", "value": "a"}}, ["grammar"]),
        ({"details": True, "return_full_text": True}, []),
    ],
)
def test_what_cannot_be_said_is_named(parameters, dropped):
    assert ask(**parameters)[0].dropped == dropped


@pytest.mark.parametrize(
    ("path", "stream", "expected"),
    [
        ("/", None, False),
        ("/", False, False),
        ("/", True, True),
        ("/invocations", True, True),
        ("/invocations", None, False),
        ("/generate", True, False),
        ("/generate_stream", False, True),
        ("/generate_stream", None, True),
    ],
)
def test_stream_by_path_or_body(path, stream, expected):
    assert ask(path, stream)[0].stream is expected


UNREADABLE = "Failed to deserialize the JSON body into the target type: "
NO_JSON = "Failed to parse the request body as JSON: "


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", NO_JSON),
        (b"inputs=1", NO_JSON),
        (b"\xff", NO_JSON),
        (b'{"inputs":"\xff"}', NO_JSON),
        (b"[" * 100_000, UNREADABLE),
        (b'{"inputs":"a","parameters":{"grammar":' + b"[" * 100_000, NO_JSON),
        (b"{}", UNREADABLE + "Object missing required field `inputs`"),
        ({"inputs": 7}, UNREADABLE + "Expected `str`, got `int` - at `$.inputs`"),
        ({"inputs": ["a"]}, UNREADABLE + "Expected `str`, got `array`"),
        ({"inputs": "a", "parameters": {"stop": "x"}}, UNREADABLE + "Expected `array"),
        ({"inputs": "a", "parameters": {"top_k": "1"}}, UNREADABLE + "Expected `int"),
        ({"inputs": "a", "stream": "yes"}, UNREADABLE + "Expected `bool | null`"),
    ],
)
def test_bad_bodies_are_named(body, text):
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.message.startswith(text)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 3}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"seed": -1}, "`seed` must be positive"),
        ({"seed": 2**64}, "`seed` must be positive"),
    ],
)
def test_values_are_refused_in_the_words_of_tgi(parameters, text):
    with pytest.raises(InvalidRequest) as caught:
        ask(**parameters)
    assert caught.value.message == f"Input validation error: {text}"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_what_streams_do_not_take(parameters, text):
    with pytest.raises(InvalidRequest) as caught:
        ask("/generate_stream", **parameters)
    assert caught.value.message == f"Input validation error: {text}"
    ask("/generate", True, **parameters)


def test_empty_inputs():
    with pytest.raises(InvalidRequest) as caught:
        parse({"inputs": ""})
    assert caught.value.message == "Input validation error: `inputs` cannot be empty"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "inputs": values,
        "stream": values,
        "parameters": values | st.dictionaries(st.sampled_from(list(NULLS)), values),
    },
).map(lambda body: json.dumps(body).encode())


@given(st.binary(max_size=60) | bodies, st.sampled_from(tgi.PATHS))
def test_random_bodies_raise_only_what_is_documented(body, path):
    try:
        request, _ = parse(body, path)
    except ClientFault as error:
        assert type(error) is InvalidRequest
    else:
        assert request.max_tokens is not None and request.max_tokens > 0
        json.dumps(request.dropped)


def test_method_other_than_post():
    incoming = tgi.Generate("/generate")
    incoming.check(Head("PUT", "/generate", {}, {}))
    error = MethodNotAllowed("Method Not Allowed", headers={"Allow": "POST"})
    reply = incoming.error_reply(error)
    assert (reply.status, reply.headers) == (405, {"Allow": "POST"})


# ---------------------------------------------------------------------------- replies

DELTAS = [
    Start("id", "large-1"),
    Thinking("hm"),
    Text("Hello"),
    ToolCall(0, "1", "f", "{}"),
    Text(' "wörld"'),
    Finish("length"),
]
FRAMES = (
    b'data:{"index":1,"token":{"id":0,"text":"Hello","logprob":0.0,"special":false},'
    b'"generated_text":null,"details":null}\n\n'
    b'data:{"index":2,"token":{"id":0,"text":" \\"w\\u00f6rld\\"","logprob":0.0,'
    b'"special":false},"generated_text":null,"details":null}\n\n'
)
LAST = (
    b'data:{"index":3,"token":{"id":0,"text":"","logprob":0.0,"special":true},'
    b'"generated_text":"Hello \\"w\\u00f6rld\\"","details":null}\n\n'
)


def test_frames_byte_for_byte():
    _, writer = ask("/generate_stream")
    assert writer.frames(DELTAS) == FRAMES
    assert writer.end() == LAST


def test_frames_do_not_depend_on_the_reads():
    _, writer = ask("/", True)
    assert b"".join(writer.frames([delta]) for delta in DELTAS) == FRAMES
    assert writer.end() == LAST


def last_event(writer):
    return json.loads(writer.end().removeprefix(b"data:"))


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("length", "length"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("stop_sequence", "stop_sequence"),
        ("stop", "eos_token"),
        ("eos_token", "eos_token"),
        ("end_turn", "eos_token"),
        ("", "eos_token"),
        ("tool_calls", "eos_token"),
    ],
)
def test_details_of_a_stream(reason, expected):
    _, writer = ask("/generate_stream", details=True)
    writer.frames([Text("a"), Finish(reason), Usage(7, 3)])
    assert last_event(writer)["details"] == {
        "finish_reason": expected,
        "generated_tokens": 3,
        "seed": None,
        "input_length": 7,
    }


def test_details_without_usage_count_pieces():
    _, writer = ask("/generate_stream", details=True)
    writer.frames([Text("a"), Text("b"), Finish("stop")])
    details = last_event(writer)["details"]
    assert (details["generated_tokens"], details["input_length"]) == (2, 0)


def test_whole_text_has_the_prompt_where_asked_for():
    _, writer = ask("/generate_stream", return_full_text=True)
    assert b"Hi" not in writer.frames([Text("!"), Finish("stop")])
    assert last_event(writer)["generated_text"] == "Hi!"
    _, writer = ask("/generate", return_full_text=True)
    assert writer.body([Text("!"), Finish("stop")]) == b'{"generated_text":"Hi!"}'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", b'[{"generated_text":"Hello \\"w\\u00f6rld\\""}]'),
        ("/generate", b'{"generated_text":"Hello \\"w\\u00f6rld\\""}'),
        ("/invocations", b'{"generated_text":"Hello \\"w\\u00f6rld\\""}'),
    ],
)
def test_body_byte_for_byte(path, body):
    assert ask(path)[1].body(DELTAS) == body


@pytest.mark.parametrize("asked", ["details", "decoder_input_details"])
def test_body_with_details(asked):
    body = ask("/generate", **{asked: True})[1].body([*DELTAS, Usage(7, 3)])
    assert json.loads(body)["details"] == {
        "finish_reason": "length",
        "generated_tokens": 3,
        "seed": None,
        "prefill": [],
        "tokens": [],
    }


def test_half_a_surrogate_pair_becomes_whole():
    _, writer = ask("/generate_stream")
    frames = writer.frames([Text("\ud83d"), Text("\ude00"), Finish("stop")])
    assert b'"text":"\\ud83d"' in frames
    assert last_event(writer)["generated_text"] == "\N{GRINNING FACE}"


def test_stream_headers_are_those_of_tgi():
    assert ask("/", True)[1].stream_headers == {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }


# ----------------------------------------------------------------------------- errors


def status(code: int, body: str, headers=None, clients: bool = False) -> UpstreamStatus:
    error = UpstreamStatus("TGI", code, body, headers=headers or {})
    error.is_clients_credential = clients
    return error


NATIVE = '{"error":"Request failed during generation","error_type":"generation"}'
RETRY = {"retry-after": "5"}


@pytest.mark.parametrize(
    ("error", "code", "kind", "text", "headers"),
    [
        (InvalidRequest("x"), 422, "validation", "x", {}),
        (InvalidPrompt("x"), 422, "validation", "x", {}),
        (UnknownModel("x"), 422, "validation", "x", {}),
        (Unauthorized("x"), 401, "unauthorized", "x", {}),
        (PayloadTooLarge("x"), 413, "payload_too_large", "x", {}),
        (ProxyError("x"), 500, "internal", "x", {}),
        (DeadlineExceeded("x"), 504, "timeout", "x", {}),
        (UpstreamUnreachable("x"), 424, "generation", "x", {}),
        (UpstreamTruncated("x"), 500, "incomplete_generation", "x", {}),
        (UpstreamGarbled("x"), 424, "generation", "x", {}),
        (
            UpstreamReported("overloaded: Busy", type="overloaded", status=429),
            429,
            "overloaded",
            "Busy",
            RETRY,
        ),
        (
            UpstreamReported("template_error: No", type="template_error", status=422),
            422,
            "template_error",
            "No",
            {},
        ),
        (
            UpstreamReported("slow down", type="rate_limit_error", status=429),
            429,
            "overloaded",
            "slow down",
            RETRY,
        ),
        (
            UpstreamReported("bad", type="invalid_request_error", status=400),
            422,
            "validation",
            "bad",
            {},
        ),
        (UpstreamReported("boom"), 424, "generation", "boom", {}),
        (status(401, "no"), 424, "generation", None, {}),
        (status(403, "no"), 424, "generation", None, {}),
        (status(401, "no", clients=True), 401, "upstream_status", None, {}),
        (status(404, "no"), 424, "generation", None, {}),
        (status(500, "no"), 424, "generation", None, {}),
        (status(503, "no"), 503, "healthcheck", None, {}),
        (status(504, "no"), 504, "timeout", None, {}),
        (status(529, "no"), 429, "overloaded", None, RETRY),
        (
            status(429, "no", {"retry-after": "9"}),
            429,
            "overloaded",
            None,
            {"retry-after": "9"},
        ),
        (
            status(424, NATIVE),
            424,
            "generation",
            "Request failed during generation",
            {},
        ),
    ],
)
@pytest.mark.parametrize("path", ["/", "/generate_stream"])
def test_error_reply(path, error, code, kind, text, headers):
    for reply in (
        ask(path, True)[1].error_reply(error),
        tgi.Generate(path).error_reply(error),
    ):
        assert (reply.status, reply.content_type) == (code, "application/json")
        assert json.loads(reply.body) == {
            "error": error.message if text is None else text,
            "error_type": kind,
        }
        assert reply.headers == headers


def test_error_in_a_stream_byte_for_byte():
    _, writer = ask("/generate_stream")
    writer.frames([Text("a")])
    error = UpstreamReported("overloaded: Model is overloaded", type="overloaded")
    assert writer.error(error) == (
        b'data:{"error":"Model is overloaded","error_type":"overloaded"}\n\n'
    )


def test_text_of_an_upstreams_body_has_been_redacted():
    error = status(424, NATIVE)
    error.message = error.message.replace("failed", "[redacted]")
    reply = tgi.Generate("/").error_reply(error)
    assert json.loads(reply.body)["error"] == "Request [redacted] during generation"


# --------------------------------------------------------------------------- upstream


def token(text: str | None, whole: str | None = None, special=False, details=None):
    return {
        "index": 1,
        "token": {"id": 1, "text": text, "logprob": -1.5, "special": special},
        "top_tokens": [],
        "generated_text": whole,
        "details": details,
    }


DETAILS = {"finish_reason": "length", "generated_tokens": 2, "seed": 1}
START = Start("", "")


@pytest.mark.parametrize(
    ("events", "deltas", "usage"),
    [
        ([token("a")], [START, Text("a")], None),
        ([token("")], [START], None),
        ([token(None)], [START], None),
        ([token("a"), token("b", "ab")], None, None),
        (
            [token("a"), token("</s>", "a", special=True)],
            [START, Text("a"), Finish("eos_token")],
            None,
        ),
        (
            [token("b", "ab", details=DETAILS | {"input_length": 5})],
            [START, Text("b"), Finish("length")],
            Usage(5, 2),
        ),
        (
            [token("b", "ab", details=DETAILS | {"prefill": [{}, {}, {}]})],
            [START, Text("b"), Finish("length")],
            Usage(3, 2),
        ),
        ([token("b", "", details=DETAILS)], None, Usage(0, 2)),
        ([{"generated_text": "a"}], [START, Finish("eos_token")], None),
        (["[DONE]"], [], None),
        ([{"hello": 1}], [], None),
    ],
)
def test_reader_reads_events(events, deltas, usage):
    reader = tgi.TGIReader()
    out: list[Delta] = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        reader.read(Event("message", data), out)
    if deltas is not None:
        assert out == deltas
    assert reader.usage == usage
    is_last = any(isinstance(d, Finish) for d in out)
    assert reader.finished == reader.ended == is_last


@pytest.mark.parametrize("event_type", ["message", "error"])
def test_reader_raises_what_the_server_reports(event_type):
    data = '{"error":"Model is overloaded","error_type":"overloaded"}'
    with pytest.raises(UpstreamReported) as caught:
        tgi.TGIReader().read(Event(event_type, data), [])
    error = caught.value
    assert (error.type, error.status) == ("overloaded", 429)
    assert error.message == "overloaded: Model is overloaded"


def test_reader_takes_an_event_named_error_for_one():
    with pytest.raises(UpstreamReported):
        tgi.TGIReader().read(Event("error", json.dumps(token("a"))), [])


def test_reader_stream_that_stops():
    reader = tgi.TGIReader()
    reader.read(Event("message", json.dumps(token("a"))), [])
    with pytest.raises(UpstreamTruncated) as caught:
        reader.eof()
    assert caught.value.message == (
        "upstream closed the stream before the end of the reply"
    )


@pytest.mark.parametrize(
    ("body", "deltas"),
    [
        ({"generated_text": "ab"}, [START, Text("ab"), Finish("eos_token")]),
        ([{"generated_text": "ab"}], [START, Text("ab"), Finish("eos_token")]),
        (
            {"generated_text": "", "details": DETAILS},
            [START, Finish("length")],
        ),
    ],
)
def test_reader_reads_bodies(body, deltas):
    reader = tgi.TGIReader()
    assert reader.read_body(json.dumps(body).encode()) == deltas
    assert reader.ended


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"{}", UpstreamGarbled, "upstream sent a reply without generated_text: {}"),
        (b"[]", UpstreamGarbled, "upstream sent a reply without generated_text: []"),
        (b"x", UpstreamGarbled, "upstream sent a reply without generated_text: x"),
        (
            b'{"error":"no","error_type":"validation"}',
            UpstreamReported,
            "validation: no",
        ),
        (b'[{"error":"no"}]', UpstreamReported, "no"),
    ],
)
def test_reader_refuses_bodies(body, kind, text):
    with pytest.raises(ProxyError) as caught:
        tgi.TGIReader().read_body(body)
    assert (type(caught.value), caught.value.message) == (kind, text)


def simulate(path: str, body: dict, free=1):
    call = Call(
        method="POST", path=path, headers=JSON_TYPE, body=json.dumps(body).encode()
    )
    return answer(call, Situation(Settings(), 0.0, free))


@pytest.mark.parametrize("details", [True, False])
def test_reader_understands_the_simulated_server(details):
    body = {"inputs": "Hi", "parameters": {"details": details, "max_new_tokens": 9}}
    whole = simulate("/", body)
    assert isinstance(whole, Whole)
    wanted = tgi.TGIReader().read_body(whole.body)
    stream = simulate("/generate_stream", body)
    assert isinstance(stream, Stream)
    reader = tgi.TGIReader()
    deltas = read(b"".join(event for _, event in stream.events), reader)
    assert text_of(deltas) == text_of(wanted) != ""
    assert deltas[-1] == (wanted[-1] if details else Finish("eos_token"))
    assert reader.ended
    assert (reader.usage is not None) is details


def test_reader_understands_the_simulated_servers_errors():
    stream = simulate("/generate_stream", {"inputs": "Hi"}, free=0)
    assert isinstance(stream, Stream)
    with pytest.raises(UpstreamReported) as caught:
        read(b"".join(event for _, event in stream.events))
    assert caught.value.type == "overloaded"


def test_events_have_the_keys_of_the_simulated_server():
    stream = simulate("/generate_stream", {"inputs": "Hi", "parameters": {"seed": 1}})
    assert isinstance(stream, Stream)
    theirs = json.loads(next(iter(stream.events))[1].removeprefix(b"data:"))
    ours = json.loads(FRAMES.split(b"\n\n")[0].removeprefix(b"data:"))
    assert list(ours) == list(theirs)
    assert list(ours["token"]) == list(theirs["token"])


# ------------------------------------------------------------------------- round trip

texts = st.lists(st.text(min_size=1, max_size=8), max_size=5)
reasons = st.sampled_from(["length", "eos_token", "stop_sequence"])
usages = st.builds(Usage, st.integers(0, 10**6), st.integers(0, 10**6))


@given(texts, reasons, usages)
def test_what_is_written_is_read(pieces, reason, usage):
    _, writer = ask("/generate_stream", details=True)
    data = writer.frames([START, *map(Text, pieces), Finish(reason)])
    data += writer.frames([usage]) + writer.end()
    reader = tgi.TGIReader()
    assert read(data, reader) == [START, *map(Text, pieces), Finish(reason)]
    assert reader.usage == usage
    assert last_text(data) == "".join(pieces)


def last_text(data: bytes):
    return json.loads(data.split(b"\n\n")[-2].removeprefix(b"data:"))["generated_text"]


@given(texts, reasons)
def test_body_that_is_written_is_read(pieces, reason):
    _, writer = ask("/", details=True)
    body = writer.body([*map(Text, pieces), Finish(reason)])
    deltas = tgi.TGIReader().read_body(body)
    assert text_of(deltas) == "".join(pieces)
    assert deltas[-1] == Finish(reason)


@given(st.binary(max_size=200))
def test_error_in_a_stream_is_read_as_one(message):
    text = message.decode(errors="replace")
    _, writer = ask("/generate_stream")
    with pytest.raises(UpstreamReported) as caught:
        read(writer.error(UpstreamReported(text or "x", type="generation")))
    assert caught.value.type == "generation"
