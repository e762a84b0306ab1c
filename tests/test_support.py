"""The judges must be strict, and the scripted upstream must do what it says."""

import asyncio
import contextlib

import pytest

from tests.support import client
from tests.support.client import RawReply, Truncated
from tests.support.cody import (
    EVENT_STREAM,
    FINISHED,
    NO_COMPLETION,
    NO_EVENTS,
    AutocompleteParser,
    Call,
    ChatParser,
    assert_ends_once,
    autocomplete_outcome,
    chat_outcome,
    frames_of,
    read_autocomplete,
    read_chat,
)
from tests.support.upstream import (
    Close,
    Hang,
    Pause,
    Reset,
    ScriptedUpstream,
    Step,
    Wait,
    anthropic_events,
    chunk,
    data,
    head,
    json_reply,
    openai_chunks,
    reply,
    sse,
    sse_head,
    tgi_chat_chunks,
    tgi_completion_chunks,
    tgi_generate_events,
)

HELLO = b'event: completion\ndata: {"deltaText":"Hello"}\n\n'
WORLD = b'event: completion\ndata: {"deltaText":" world"}\n\n'
STOP = b'event: completion\ndata: {"stopReason":"stop"}\n\n'
ERROR = b'event: error\ndata: {"error":"broken"}\n\n'
DONE = b"event: done\ndata: {}\n\n"
GOOD = [HELLO, WORLD, STOP, DONE]

OLD_HELLO = b'event: completion\ndata: {"completion":"Hello","stopReason":""}\n\n'
OLD_WORLD = b'event: completion\ndata: {"completion":"Hello w","stopReason":"end"}\n\n'


def raw(
    *reads: bytes,
    status: int = 200,
    reason: str = "OK",
    content_type: str = EVENT_STREAM,
    complete: bool = True,
    headers: list[tuple[str, str]] | None = None,
) -> RawReply:
    pairs = [("Content-Type", content_type), *(headers or [])]
    timed = [(0.0, read) for read in reads]
    url = "http://proxy/stream"
    return RawReply(status, reason, pairs, "chunked", timed, complete, url)


# --- the chat reader -----------------------------------------------------------------


def test_chat_reads_a_good_stream_in_any_cut():
    body = b"".join(GOOD)
    for cut in range(len(body)):
        outcome = chat_outcome([body[:cut], body[cut:]])
        assert outcome.ended == "complete"
        assert outcome.text == "Hello world"
        assert outcome.stop_reason == "stop"
        assert outcome.done_count == 1
        assert not outcome.poisoned
        assert outcome.stalled is None


@pytest.mark.parametrize(
    "hazard",
    [
        pytest.param(b": keep-alive\n\n", id="comment"),
        pytest.param(b":\n\n", id="empty-comment"),
        pytest.param(b": ping\n" + HELLO, id="comment-before-event-line"),
        pytest.param(b"id: 1\n" + HELLO, id="id-first"),
        pytest.param(b"retry: 3000\n\n", id="retry"),
        pytest.param(
            b'data: {"deltaText":"x"}\nevent: completion\n\n', id="data-first"
        ),
        pytest.param(b'data: {"deltaText":"x"}\n\n', id="data-only"),
        pytest.param("\ufeff".encode() + HELLO, id="bom"),
        pytest.param(HELLO.replace(b"\n", b"\r\n") + HELLO, id="crlf"),
        pytest.param(b"\n" + HELLO, id="extra-blank-line"),
        pytest.param(b"event: ping\ndata: {}\n\n", id="unknown-event"),
        pytest.param(
            b'event: attribution-error\ndata: {"error":"x"}\n\n', id="attribution"
        ),
        pytest.param(b"event:completion\ndata: {}\n\n", id="no-blank-after-event"),
        pytest.param(b"event: completion\ndata:{}\n\n", id="no-blank-after-data"),
        pytest.param(b'event: completion\ndata: {"del\n\n', id="invalid-json"),
        pytest.param(b"event: completion\ndata: NaN\n\n", id="python-json"),
        pytest.param(b"event: completion\ndata: null\n\n", id="null"),
        pytest.param(b"event: completion\ndata: [DONE]\n\n", id="openai-done"),
        pytest.param(
            b'event: completion\ndata: {"deltaText":\ndata: "x"}\n\n',
            id="json-on-lines",
        ),
        pytest.param(
            b'event: error\ndata: {"message":"x"}\n\n', id="error-without-key"
        ),
        pytest.param(b"event: error\ndata: oops\n\n", id="error-is-text"),
        pytest.param(b"event: done\n\n", id="done-without-data"),
    ],
)
def test_chat_stalls_for_good(hazard: bytes):
    parser = ChatParser()
    assert len(parser.feed(HELLO.decode())) == 1
    assert parser.feed(hazard.decode()) == []
    assert parser.stalled
    for later in GOOD:
        assert parser.feed(later.decode()) == []
    assert parser.text == "Hello"
    assert not parser.done

    outcome = read_chat(raw(HELLO, hazard, *GOOD))
    assert outcome.ended == "hang"
    assert outcome.text == "Hello"
    assert outcome.stalled
    with pytest.raises(AssertionError):
        assert_ends_once(raw(HELLO, hazard, *GOOD))


def test_chat_stall_loses_good_events_of_the_same_read():
    parser = ChatParser()
    assert parser.feed((HELLO + b": ping\n\n").decode()) == []
    outcome = read_chat(raw(HELLO + b": ping\n\n" + DONE))
    assert outcome.ended == "no_events"
    assert outcome.errors == [NO_EVENTS]
    assert "byte by byte" in outcome.violations[0]


def test_chat_reads_only_the_first_data_line():
    block = b'event: completion\ndata: {"deltaText":"a"}\ndata: {"deltaText":"b"}\n\n'
    assert read_chat(raw(block, DONE)).text == "a"
    with pytest.raises(AssertionError, match="no frame"):
        assert_ends_once(raw(block, DONE))


def test_chat_hangs_without_done():
    outcome = read_chat(raw(HELLO, STOP))
    assert outcome.ended == "hang"
    assert outcome.stalled is None
    with pytest.raises(AssertionError):
        assert_ends_once(raw(HELLO, STOP))


def test_chat_error_without_done_poisons_the_next_request():
    outcome = read_chat(raw(HELLO, ERROR))
    assert outcome.ended == "error"
    assert outcome.errors == ["broken"]
    assert outcome.poisoned
    assert not read_chat(raw(HELLO, ERROR, DONE)).poisoned
    with pytest.raises(AssertionError):
        assert_ends_once(raw(HELLO, ERROR))


def test_chat_ends_at_the_first_error():
    outcome = read_chat(raw(HELLO, ERROR, WORLD, DONE))
    assert outcome.ended == "error"
    assert outcome.text == "Hello"
    with pytest.raises(AssertionError):
        assert_ends_once(raw(HELLO, ERROR, WORLD, DONE))


@pytest.mark.parametrize("reads", [(), (b": ping\n\n",), (b"event: completion\n",)])
def test_chat_without_events(reads: tuple[bytes, ...]):
    outcome = read_chat(raw(*reads))
    assert outcome.ended == "no_events"
    assert outcome.errors == [NO_EVENTS]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "http"),
        (401, "auth"),
        (403, "auth"),
        (429, "rate_limit"),
        (500, "http"),
        (503, "http"),
    ],
)
def test_chat_http_errors(status: int, kind: str):
    headers = [("Retry-After", "7"), ("X-RateLimit-Limit", "10")]
    answer = raw(b"too bad", status=status, reason="Bad", headers=headers)
    outcome = read_chat(answer)
    assert outcome.kind == kind
    assert outcome.http_error == (
        f"Request to http://proxy/stream failed with {status} Bad: too bad"
    )
    assert (outcome.retry_after, outcome.limit) == ("7", "10")


def test_chat_does_not_follow_redirects():
    assert read_chat(raw(*GOOD, status=302)).ended == "no_events"


def test_chat_legacy_text_is_cumulative():
    outcome = read_chat(raw(OLD_HELLO, OLD_WORLD, DONE), api_version=0)
    assert outcome.text == "Hello w"
    assert outcome.stop_reason == "end"


def test_chat_versions_do_not_read_each_other():
    assert read_chat(raw(OLD_HELLO, DONE), api_version=2).text == ""
    assert read_chat(raw(HELLO, DONE), api_version=1).text == ""
    wiped = read_chat(raw(OLD_HELLO, STOP, DONE), api_version=1)
    assert wiped.text == ""


def test_chat_split_characters_are_fine():
    block = 'event: completion\ndata: {"deltaText":"é🤖"}\n\n'.encode()
    outcome = read_chat(raw(block, DONE))
    assert outcome.text == "é🤖"
    assert outcome.violations == []


def test_chat_gathers_thinking_usage_and_model():
    block = data(
        {
            "delta_thinking": "Hm",
            "usage": {"prompt_tokens": 1},
            "model": "m",
        }
    ).replace(b"data: ", b"event: completion\ndata: ")
    outcome = read_chat(raw(block, block, DONE))
    assert outcome.thinking == "HmHm"
    assert outcome.usage == {"prompt_tokens": 1}
    assert outcome.model == "m"
    assert outcome.violations == []


def tool_piece(arguments: str, **more: str) -> bytes:
    piece = {key: more[key] for key in more if key != "name"}
    piece_function = {"name": more.get("name", ""), "arguments": arguments}
    payload = {"type": "function", "function": piece_function, **piece}
    block = data({"delta_tool_calls": [payload]})
    return block.replace(b"data: ", b"event: completion\ndata: ", 1)


def test_chat_appends_tool_calls_by_id_and_to_the_latest():
    outcome = read_chat(
        raw(
            tool_piece('{"a"', id="1", name="one"),
            tool_piece("{", id="2", name="two"),
            tool_piece(":1}", id="1", name="one"),
            tool_piece("}"),
            DONE,
        )
    )
    assert outcome.tool_calls == [Call("1", "one", '{"a":1}'), Call("2", "two", "{}")]
    assert outcome.violations == []


@pytest.mark.parametrize(
    "lost", [tool_piece("{}", id="1"), tool_piece("{}"), tool_piece("{}", name="one")]
)
def test_chat_loses_tool_calls_without_a_name_or_an_id(lost: bytes):
    outcome = read_chat(raw(lost, DONE))
    assert outcome.tool_calls == []
    assert "loses" in outcome.violations[0]


@pytest.mark.parametrize(
    "payload", ['{"deltaText":5}', '{"deltaText":null}', '{"stopReason":null}']
)
def test_chat_wrong_types_are_violations(payload: str):
    block = f"event: completion\ndata: {payload}\n\n".encode()
    assert read_chat(raw(block, DONE)).violations
    with pytest.raises(AssertionError):
        assert_ends_once(raw(block, DONE))


# --- the autocomplete reader ---------------------------------------------------------


def test_autocomplete_reads_both_kinds_of_stream():
    new = read_autocomplete(raw(*GOOD), api_version=2)
    assert (new.text, new.stop_reason, new.error) == ("Hello world", "stop", None)
    assert new.violations == []
    old = read_autocomplete(raw(OLD_HELLO, OLD_WORLD, DONE))
    assert (old.text, old.stop_reason, old.error) == ("Hello w", "end", None)
    assert old.violations == []


@pytest.mark.parametrize(
    "content_type",
    ["text/event-stream; charset=utf-8", "Text/Event-Stream", "text/plain"],
)
def test_autocomplete_content_type_is_compared_exactly(content_type: str):
    outcome = read_autocomplete(raw(*GOOD, content_type=content_type))
    assert outcome.error is not None
    assert "invalid JSON" in outcome.error
    with pytest.raises(AssertionError):
        assert_ends_once(raw(*GOOD, content_type=content_type))


def test_autocomplete_decodes_each_read_alone():
    block = 'event: completion\ndata: {"deltaText":"é"}\n\n'.encode()
    at = block.index("é".encode()) + 1
    assert autocomplete_outcome([block], 2).text == "é"
    assert autocomplete_outcome([block[:at], block[at:]], 2).text == "\ufffd\ufffd"
    assert read_autocomplete(raw(block, DONE), 2).violations
    with pytest.raises(UnicodeDecodeError):
        assert_ends_once(raw(block, DONE))


def test_autocomplete_legacy_uses_the_last_completion_of_a_read():
    parser = AutocompleteParser(api_version=1)
    events = parser.feed(OLD_HELLO + OLD_WORLD + DONE)
    assert [event.name for event in events] == ["completion", "done"]
    assert "Hello w" in events[0].payload
    assert len(AutocompleteParser(2).feed(HELLO + WORLD)) == 2


def test_autocomplete_error_event_throws_the_raw_data():
    outcome = read_autocomplete(raw(HELLO, ERROR, DONE), 2)
    assert outcome.error == '{"error":"broken"}'
    assert outcome.kind == "stream"


@pytest.mark.parametrize("reads", [(), (DONE,), (b": ping\n\n", DONE)])
def test_autocomplete_without_completion(reads: tuple[bytes, ...]):
    assert read_autocomplete(raw(*reads)).error == NO_COMPLETION


def test_autocomplete_fills_in_a_stop_reason():
    assert read_autocomplete(raw(HELLO, DONE), 2).stop_reason == FINISHED


def test_autocomplete_skips_unknown_lines_and_takes_the_last_data_line():
    block = b'id: 1\n: x\nevent: completion\ndata: {}\ndata: {"deltaText":"b"}\n\n'
    outcome = autocomplete_outcome([block], 2)
    assert outcome.text == "b"
    assert outcome.unknown_lines == ["id: 1", ": x"]


def test_autocomplete_does_not_understand_a_missing_blank():
    outcome = autocomplete_outcome([b"event:completion\ndata:{}\n\n"], 2)
    assert outcome.error == NO_COMPLETION
    assert len(outcome.unknown_lines) == 2


def test_autocomplete_invalid_json_throws():
    outcome = autocomplete_outcome([b"event: completion\ndata: {\n\n"], 2)
    assert outcome.error == "invalid JSON: '{'"


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit"), (500, "http")])
def test_autocomplete_http_errors(status: int, kind: str):
    outcome = read_autocomplete(raw(b"no", status=status))
    assert (outcome.kind, outcome.error) == (kind, "no")


@pytest.mark.parametrize(
    ("body", "text", "error"),
    [
        (b'{"completion":"a","stopReason":""}', "a", None),
        (b'{"completion":"a"}', None, 'no completion: {"completion":"a"}'),
        (b'{"stopReason":"a"}', None, 'no completion: {"stopReason":"a"}'),
        (b"[]", None, "payload is no object: '[]'"),
    ],
)
def test_autocomplete_whole_replies(body: bytes, text: str | None, error: str | None):
    outcome = read_autocomplete(raw(body, content_type="application/json"))
    assert (outcome.text, outcome.error) == (text, error)


# --- what a correct server sends -----------------------------------------------------


def test_ends_once_accepts_what_is_right():
    assert [frame.name for frame in assert_ends_once(raw(*GOOD))][-1] == "done"
    assert_ends_once(raw(b"".join(GOOD)))
    assert_ends_once(raw(HELLO, ERROR, DONE))
    assert_ends_once(raw(ERROR, DONE))


@pytest.mark.parametrize(
    "reads",
    [
        pytest.param((), id="nothing"),
        pytest.param((DONE,), id="no-completion"),
        pytest.param((HELLO, DONE, DONE), id="two-dones"),
        pytest.param((DONE, HELLO), id="done-first"),
        pytest.param((ERROR, HELLO, DONE), id="error-too-early"),
        pytest.param((ERROR, ERROR, DONE), id="two-errors"),
        pytest.param((HELLO, b"event: done\ndata: {\n", b"}\n\n"), id="split-frame"),
        pytest.param((HELLO, b'event: done\ndata: {"a":1}\n\n'), id="done-payload"),
        pytest.param(
            (b'event: error\ndata: {"error":{"message":"x"}}\n\n', DONE), id="object"
        ),
    ],
)
def test_ends_once_refuses(reads: tuple[bytes, ...]):
    with pytest.raises(AssertionError):
        assert_ends_once(raw(*reads))


def test_ends_once_refuses_a_cut_body_and_another_status():
    with pytest.raises(AssertionError, match="cut"):
        assert_ends_once(raw(*GOOD, complete=False))
    with pytest.raises(AssertionError):
        assert_ends_once(raw(*GOOD, status=201))


def test_frames_of_names_the_place():
    with pytest.raises(AssertionError, match="no frame at 47"):
        frames_of(HELLO + b": x\n\n")


# --- the scripted upstream -----------------------------------------------------------


@pytest.fixture
async def upstream():
    async with ScriptedUpstream() as server:
        yield server


async def test_upstream_records_requests_as_received(upstream: ScriptedUpstream):
    upstream.script(reply(200, {"X-Two": "b"}, "hi"))
    headers = [("X-One", "a"), ("x-one", "b")]
    url = f"{upstream.url}/v1/x?q=1&r=%20"
    answer = await client.request(url, headers=headers, body={"a": 1})
    assert (answer.status, answer.reason, answer.body) == (200, "OK", b"hi")
    assert (answer.header("x-two"), answer.framing) == ("b", "length")
    got = upstream.last
    assert (got.method, got.path) == ("POST", "/v1/x?q=1&r=%20")
    assert [pair for pair in got.headers if pair[0].lower() == "x-one"] == headers
    assert got.header("CONTENT-TYPE") == "application/json"
    assert got.json() == {"a": 1}
    assert got.replied and not got.chunked


async def test_upstream_reads_chunked_bodies(upstream: ScriptedUpstream):
    upstream.script(reply(204))
    body = b"x" * 3000
    answer = await client.request(upstream.url, path="/p", body=body, chunked=True)
    assert (answer.status, answer.complete) == (204, True)
    assert (upstream.last.body, upstream.last.chunked) == (body, True)


async def test_upstream_scripts_queue_and_the_last_repeats(upstream: ScriptedUpstream):
    upstream.script(reply(body="1")).script(reply(body="2"))
    upstream.script(reply(body="special"), path="/s")
    paths = ["/", "/s?x=1", "/", "/", "/s"]
    bodies = [(await client.request(upstream.url, path=p)).text for p in paths]
    assert bodies == ["1", "special", "2", "2", "special"]


async def test_upstream_without_a_script_says_so(upstream: ScriptedUpstream):
    answer = await client.request(upstream.url, path="/x")
    assert (answer.status, answer.text) == (500, "no script for /x")


async def test_upstream_keeps_the_connection(upstream: ScriptedUpstream):
    upstream.script(reply(body="1"))
    async with client.connect(upstream.url) as connection:
        for _ in range(2):
            await connection.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await connection.reply()).body == b"1"
        assert (upstream.opened, upstream.open) == (1, 1)
        await connection.send(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert (await connection.reply()).body == b"1"
        assert await connection.at_end()
    await upstream.idle()
    assert len(upstream.requests) == 3
    assert not upstream.last.peer_closed


async def test_upstream_each_write_is_a_read(upstream: ScriptedUpstream):
    chunks = openai_chunks(["Hel", "lo"], usage=(3, 2))
    upstream.script(sse(*chunks))
    answer = await client.request(upstream.url)
    assert answer.header("content-type") == "text/event-stream"
    assert [read for _, read in answer.reads] == chunks
    assert (answer.framing, answer.complete) == ("chunked", True)


async def test_upstream_stream_without_chunks_ends_with_the_connection(
    upstream: ScriptedUpstream,
):
    upstream.script(sse(HELLO, DONE, chunked=False))
    answer = await client.request(upstream.url)
    assert (answer.framing, answer.complete) == ("close", True)
    assert answer.body == HELLO + DONE


async def test_upstream_pauses_and_waits(upstream: ScriptedUpstream):
    go = asyncio.Event()
    upstream.script(sse(b"a", Pause(0.05), b"b", Wait(go), b"c"))
    async with client.stream(upstream.url) as stream:
        assert await stream.read() == b"a"
        assert await stream.read() == b"b"
        assert stream.reply.reads[1][0] >= 0.045
        with pytest.raises(TimeoutError):
            await stream.read(0.02)
        assert not upstream.last.replied
        go.set()
        assert await stream.rest() == b"c"
    assert stream.reply.complete
    assert upstream.last.replied


@pytest.mark.parametrize("end", [Reset(), Close()])
async def test_upstream_ends_in_the_middle(upstream: ScriptedUpstream, end: Step):
    upstream.script(sse(b"a", end, b"never"))
    with pytest.raises(Truncated) as cut:
        await client.request(upstream.url)
    assert cut.value.reply.body == b"a"
    answer = await client.request(upstream.url, allow_truncated=True)
    assert (answer.body, answer.complete) == (b"a", False)
    await upstream.idle()
    assert not upstream.last.peer_closed


async def test_client_keeps_half_a_chunk(upstream: ScriptedUpstream):
    upstream.script(sse_head(), b"a\r\nabc", Close())
    answer = await client.request(upstream.url, allow_truncated=True)
    assert (answer.body, answer.complete) == (b"abc", False)


async def test_upstream_reset_is_no_fin(upstream: ScriptedUpstream):
    upstream.script(Reset())
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()


async def test_upstream_close_without_a_reply(upstream: ScriptedUpstream):
    upstream.script(Close())
    with pytest.raises(AssertionError, match="closed before a reply"):
        await client.request(upstream.url)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("silent", [Hang(), Pause(30)])
async def test_upstream_sees_the_peer_hang_up(
    upstream: ScriptedUpstream, how: str, silent: Step
):
    upstream.script(sse(b"a", silent))
    async with client.stream(upstream.url) as stream:
        await stream.read()
        await (stream.close() if how == "close" else stream.reset())
        request = await upstream.closed(within_s=1.0)
    assert request.peer_closed and not request.replied
    await upstream.idle()


async def test_upstream_closed_times_out(upstream: ScriptedUpstream):
    upstream.script(sse(Hang()))
    async with client.stream(upstream.url):
        await upstream.received()
        with pytest.raises(AssertionError, match=r"waited 0\.02 s for the peer"):
            await upstream.closed(within_s=0.02)


async def test_upstream_stops_in_the_middle():
    async with ScriptedUpstream() as upstream:
        upstream.script(sse(b"a", Hang()))
        stream = client.stream(upstream.url)
        incoming = await stream.__aenter__()
        await incoming.read()
    assert upstream.open == 0
    assert await incoming.rest() == b""
    assert not incoming.reply.complete
    await stream.__aexit__(None, None, None)


async def test_upstream_can_come_back_on_the_same_port():
    upstream = await ScriptedUpstream().start()
    upstream.script(reply(body="1"))
    port = upstream.port
    await upstream.stop()
    with pytest.raises(ConnectionRefusedError):
        await client.request(upstream.url)
    await upstream.start(port)
    assert (await client.request(upstream.url)).text == "1"
    await upstream.stop()


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header : x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
async def test_upstream_refuses_what_is_no_http(sent: bytes):
    upstream = await ScriptedUpstream().start()
    async with client.connect(upstream.url) as connection:
        await connection.send(sent)
        assert await connection.at_end()
    await upstream.stop()
    assert len(upstream.malformed) == 1


async def test_upstream_fails_the_test_when_it_got_no_http():
    upstream = ScriptedUpstream()
    with pytest.raises(AssertionError, match="request line"):
        async with upstream, client.connect(upstream.url) as connection:
            await connection.send(b"nonsense\r\n\r\n")
            await connection.at_end()


async def test_upstream_is_slowed_by_a_slow_client(upstream: ScriptedUpstream):
    upstream.script(sse(*[b"x" * 65536] * 400))
    async with client.stream(upstream.url, receive_buffer=4096) as stream:
        await stream.read()
        await asyncio.sleep(0.05)
        assert upstream.sent_bytes < 20 * 2**20
        assert not upstream.last.replied
        await stream.close()
        await upstream.closed()


async def test_client_skips_interim_replies_and_reads_head(upstream: ScriptedUpstream):
    upstream.script(head(102), reply(200, {"Content-Length": "5"}))
    answer = await client.request(upstream.url, "HEAD")
    assert (answer.status, answer.body, answer.complete) == (200, b"", True)


async def test_client_refuses_two_framings(upstream: ScriptedUpstream):
    both = {"Transfer-Encoding": "chunked", "Content-Length": "5"}
    upstream.script(reply(200, both))
    with pytest.raises(AssertionError, match="two framings"):
        await client.request(upstream.url)


async def test_client_reads_until_a_mark(upstream: ScriptedUpstream):
    upstream.script(sse_head(), chunk(b"abc"), chunk(b"def"), Hang())
    async with client.stream(upstream.url) as stream:
        assert await stream.read_until(b"cd") == b"abcdef"


def test_event_builders_say_what_the_servers_say():
    chat = tgi_chat_chunks(["a", "b"], usage=(1, 2))
    assert b'"delta":{"role":"assistant","content":"b"}' in chat[1]
    assert b'"finish_reason":"stop"' in chat[1]
    assert b'"choices":[]' in chat[2]
    code = tgi_completion_chunks(["a", "b</s>"])
    assert b'"finish_reason":""' in code[0]
    assert b'"finish_reason":"eos_token"' in code[1]
    assert b'"total_tokens":8' in code[1]
    assert code[2] == b"data: [DONE]\n\n"
    native = tgi_generate_events(["a", "b"])
    assert b'"generated_text":null,"details":null' in native[0]
    assert b'"generated_text":"ab"' in native[1]
    claude = anthropic_events(["a"])
    assert claude[0].startswith(b"event: message_start\ndata: {")
    assert claude[-1] == b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    assert b"input_tokens" in json_reply({"input_tokens": 1})


@pytest.mark.parametrize(
    "build",
    [
        openai_chunks,
        tgi_chat_chunks,
        tgi_completion_chunks,
        tgi_generate_events,
    ],
)
def test_event_builders_can_leave_out_the_end(build):
    cut = b"".join(build(["a", "b"], finish=None))
    assert b"[DONE]" not in cut
    assert b"eos_token" not in cut and b'"stop"' not in cut
