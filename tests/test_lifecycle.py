"""Starting, stopping, and new settings in between: the command line over real sockets."""

import asyncio
import contextlib
import io
import json
import os
import re
import select
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import yaml

from proxy import sockets
from proxy.log import ExchangeLog
from proxy.outcome import Outcome
from proxy.redact import Redactor
from proxy.watch import Watch
from proxy.workers import LONGEST_BACKOFF_S, _put_off, _Worker
from tests.support.client import build_request, connect, request, stream
from tests.support.cody import read_chat
from tests.support.fixtures import (
    QUESTION,
    load,
    model_configuration,
    running,
)
from tests.support.process import Running, serve, spawn, until
from tests.support.upstream import (
    Hang,
    Pause,
    ScriptedUpstream,
    Wait,
    chunk,
    event,
    json_reply,
    last_chunk,
    openai_chunks,
    sse,
    sse_head,
)

CHAT = "/.api/completions/stream?api-version=2"
TEXTS = ["a", "b"]
OPENAI = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
ANTHROPIC = OPENAI | {"model": "large", "max_tokens": 9}


@pytest.fixture
def file(tmp_path, upstream: ScriptedUpstream) -> Path:
    path = tmp_path / "proxy.yaml"
    write(path, upstream)
    return path


def write(path: Path, upstream: ScriptedUpstream, **own) -> None:
    block = model_configuration(upstream.url)
    path.write_text(yaml.safe_dump({"modelConfiguration": block} | own))


def begin(upstream: ScriptedUpstream) -> asyncio.Event:
    """Let streams start now and go on when the event is set."""
    gate = asyncio.Event()
    first, *rest = openai_chunks(TEXTS)
    upstream.script(
        [sse_head(), chunk(first), Wait(gate), *map(chunk, rest), last_chunk()]
    )
    return gate


async def text_of(url: str) -> str:
    raw = await request(url, path=CHAT, body=QUESTION, within_s=10)
    return read_chat(raw, 2).text


async def health(url: str) -> int:
    return (await request(url, "GET", "/healthz")).status


async def refused(url: str) -> bool:
    with contextlib.suppress(ConnectionError):
        async with connect(url):
            return False
    return True


# ------------------------------------------------------------------------------- stopping


async def test_sigterm_lets_streams_finish(file, upstream):
    gate = begin(upstream)
    async with serve("--config", str(file)) as proxy:
        asking = asyncio.create_task(text_of(proxy.url))
        await upstream.received()
        async with connect(proxy.url) as kept, connect(proxy.url) as other:
            check = build_request(proxy.url, "GET", "/healthz", (), None, False)
            for each in (kept, other):  # so that both are accepted
                await each.send(check)
                assert (await each.reply()).status == 200
            proxy.signal(signal.SIGTERM)
            await proxy.says("open replies have 10 s")
            await kept.send(check)
            raw = await kept.reply()
            assert (raw.status, raw.header("connection")) == (503, "close")
            assert await kept.at_end()
            asked = build_request(proxy.url, "POST", CHAT, (), QUESTION, False)
            await other.send(asked)
            raw = await other.reply()
            assert (raw.status, raw.header("connection")) == (503, "close")
            assert raw.text == "the proxy is shutting down\n"
        assert await refused(proxy.url)
        gate.set()
        assert await asking == "ab"
        status, out = await proxy.end()
    assert status == 0
    kinds = [yaml.safe_load(line)["kind"] for line in out.splitlines()]
    assert sorted(kinds) == ["ok", "shutting_down"]


async def test_delay_keeps_the_door_open_while_health_checks_fail(file, upstream):
    write(file, upstream, shutdown={"delay": 1.2, "grace": 3})
    upstream.script(sse(*openai_chunks(TEXTS)))
    async with serve("--config", str(file)) as proxy:
        proxy.signal(signal.SIGTERM)
        await proxy.says("health checks fail for 1.2 s, then open replies have 3 s")
        assert await health(proxy.url) == 503
        raw = await request(proxy.url, path=CHAT, body=QUESTION)
        assert (raw.status, raw.header("connection")) == (200, "close")
        assert read_chat(raw, 2).text == "ab"
        status, _ = await proxy.end()
    assert status == 0


async def test_second_signal_ends_the_delay(file, upstream):
    write(file, upstream, shutdown={"delay": 60})
    async with serve("--config", str(file)) as proxy:
        proxy.signal(signal.SIGTERM)
        await proxy.says("once more to stop now")
        proxy.signal(signal.SIGINT)
        status, _ = await proxy.end(5)
    assert status == 0


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/chat/completions", OPENAI, b'"message":"the proxy is shutting down"'),
        ("/v1/messages", ANTHROPIC, b"event: error\ndata: "),
        (CHAT, QUESTION, b"event: done\ndata: {}\n\n"),
        ("/generate_stream", {"inputs": "p"}, b'data:{"error":'),
    ],
)
async def test_grace_over_ends_streams_in_their_dialect(upstream, path, body, end):
    upstream.script([sse_head(), *map(chunk, openai_chunks(TEXTS, None)), Hang()])
    async with contextlib.AsyncExitStack() as stack:
        async with running(settings_of(upstream), grace_s=0.1) as proxy:
            asking = stream(proxy.url, path=path, body=body)
            reply = await stack.enter_async_context(asking)
            await reply.read_until(b'b"')
        said = await reply.rest()
    assert end in said and said.count(b"shutting down") == 1
    assert reply.reply.complete
    assert proxy.outcomes[-1]["kind"] == "shutting_down"
    await upstream.closed()


def settings_of(upstream: ScriptedUpstream, **own):
    return load({"modelConfiguration": model_configuration(upstream.url)} | own)


@pytest.mark.parametrize("between", [True, False])
async def test_grace_over_ends_what_is_handed_on(upstream, between):
    first = event("response.created", {"type": "response.created"})
    upstream.script([sse_head(), chunk(first if between else first + b"da"), Hang()])
    async with contextlib.AsyncExitStack() as stack:
        async with running(settings_of(upstream), grace_s=0.2) as proxy:
            asking = stream(proxy.url, path="/v1/responses", body={"input": "hi"})
            reply = await stack.enter_async_context(asking)
            await reply.read_until(b"}\n\n" if between else b"da")
        said = await reply.rest()
    assert reply.reply.complete is between
    assert (b"event: error\ndata: " in said) is between
    assert proxy.outcomes[-1]["kind"] == "shutting_down"
    await upstream.closed()


async def test_grace_is_for_what_is_handed_on_too(upstream):
    first = event("response.created", {})
    last = event("response.completed", {})
    upstream.script([*sse(first, Pause(0.3), last)])
    async with contextlib.AsyncExitStack() as stack:
        async with running(settings_of(upstream), grace_s=5) as proxy:
            asking = stream(proxy.url, path="/v1/responses", body={"input": "hi"})
            reply = await stack.enter_async_context(asking)
            await reply.read_until(b"}\n\n")
        assert await reply.rest() == last
    assert proxy.outcomes[-1]["kind"] == "ok"


async def test_grace_over_before_an_upstream_has_answered(upstream):
    upstream.script([Hang()])
    async with running(settings_of(upstream), grace_s=0.1) as proxy:
        asking = asyncio.create_task(
            request(proxy.url, path="/v1/embeddings", body={"input": "hi"})
        )
        await upstream.received()
    raw = await asking
    assert raw.status == 503
    assert raw.json()["error"]["message"] == "the proxy is shutting down"
    await upstream.closed()


async def test_grace_over_while_a_body_is_on_its_way(upstream):
    async with contextlib.AsyncExitStack() as stack:
        async with running(settings_of(upstream), grace_s=0.1) as proxy:
            whole = build_request(proxy.url, "POST", CHAT, (), QUESTION, False)
            slow = await stack.enter_async_context(connect(proxy.url))
            await slow.send(whole[:-5])
            await asyncio.sleep(0.1)
        raw = await slow.reply()
    assert (raw.status, raw.text) == (503, "the proxy is shutting down\n")


# ------------------------------------------------------------------------------ reloading


async def test_reload_drops_no_stream(file, upstream):
    """New requests go by the new file at once, open ones end as they began."""
    gate = begin(upstream)
    async with ScriptedUpstream() as new, serve("--config", str(file)) as proxy:
        new.script(sse(*openai_chunks(["new"])))
        streams = [asyncio.create_task(text_of(proxy.url)) for _ in range(20)]
        await upstream.received(20)
        texts: list[str] = []
        loading = asyncio.create_task(_ask_on(proxy.url, texts))
        write(file, new)
        await proxy.says("The configuration was read again; new requests go by it.\n")
        assert await text_of(proxy.url) == "new"
        proxy.signal(signal.SIGHUP)
        await until(lambda: proxy.said.count("was read again") == 2)
        await until(lambda: texts.count("new") >= 10)
        loading.cancel()
        gate.set()
        assert await asyncio.gather(*streams) == ["ab"] * 20
        assert set(texts) == {"new"}
        await upstream.idle()  # nobody needs the old connections any more
        status, _ = await proxy.stop()
    assert status == 0


async def _ask_on(url: str, texts: list[str]) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):  # the old upstream waits for its gate
                texts.append(await text_of(url))


OF_ANN = {"tokens": [{"name": "ann", "token": "cp_ann"}]}
BEARING = {"Authorization": "Bearer cp_ann"}


async def counted(url: str) -> tuple[float, int]:
    """How many chats the metrics and the user's own page know of."""
    raw = await request(url, "GET", "/-/metrics", BEARING)
    counts = re.findall(r"_user_requests_total\{[^}]*\} ([0-9.]+)", raw.text)
    page = (await request(url, "GET", "/.api/usage", BEARING)).json()
    own = [day["features"]["chat_completions"]["requests"] for day in page["days"]]
    return sum(map(float, counts)), sum(own)


def _has_read_again(proxy: Running, times: int) -> bool:
    return proxy.said.count("was read again") == times


async def test_reload_forgets_no_count(file, upstream):
    upstream.script(sse(*openai_chunks(TEXTS)))
    write(file, upstream, auth=OF_ANN)
    async with serve("--config", str(file)) as proxy:
        for done in (1, 2):
            await request(proxy.url, "POST", CHAT, BEARING, QUESTION)
            assert await counted(proxy.url) == (done, done)
            proxy.signal(signal.SIGHUP)
            await until(partial(_has_read_again, proxy, done))
            assert await counted(proxy.url) == (done, done)


async def test_reload_of_a_wrong_file_changes_nothing(file, upstream):
    upstream.script(sse(*openai_chunks(TEXTS)))
    async with serve("--config", str(file)) as proxy:
        good = file.read_text()
        wrong = f"{good}\nlisen: x\ntimeouts: {{chat: -1}}\n"
        file.write_text(wrong)
        await proxy.says("cannot be used; the old one stays in force:")
        await proxy.says('  - lisen: unknown key; did you mean "listen"?\n')
        await proxy.says("  - timeouts.chat: ")
        assert await text_of(proxy.url) == "ab"
        file.write_text(good)
        await proxy.says("The configuration was read again")
        assert await text_of(proxy.url) == "ab"


async def test_reload_cannot_move_or_open_what_listens(file, upstream):
    upstream.script(sse(*openai_chunks(TEXTS)))
    port = free_port()
    write(file, upstream, listen=f"127.0.0.1:{port}", auth={"tokens": [ANN]})
    async with spawn("serve", "--config", str(file)) as proxy:
        await proxy.says("--data-raw")
        write(file, upstream, listen="127.0.0.1:1")
        await proxy.says("  - listen: cannot change while the proxy runs; restart it")
        raw = await request(f"http://127.0.0.1:{port}", path=CHAT, body=QUESTION)
        assert raw.status == 401


ANN = {"name": "ann", "token": "secret-1"}


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


async def test_reload_of_a_file_that_the_file_names(file, upstream):
    """As Kubernetes changes a mounted secret: a symbolic link is turned elsewhere."""
    upstream.script(sse(*openai_chunks(TEXTS)))
    mount = file.parent
    for name, token in (("v1", "secret-1"), ("v2", "secret-2")):
        (mount / name).mkdir()
        (mount / name / "token").write_text(token)
    (mount / "..data").symlink_to("v1")
    (mount / "token").symlink_to("..data/token")
    write(file, upstream, auth={"tokens": [{"name": "ann", "tokenFile": "token"}]})
    async with serve("--config", str(file)) as proxy:
        (mount / "..new").symlink_to("v2")
        (mount / "..new").rename(mount / "..data")
        await proxy.says("was read again")
        for token, status in (("secret-1", 401), ("secret-2", 200)):
            headers = {"Authorization": f"token {token}"}
            raw = await request(proxy.url, path=CHAT, body=QUESTION, headers=headers)
            assert raw.status == status


def test_watch_waits_until_nobody_writes(tmp_path):
    file = tmp_path / "file"
    file.write_text("a")
    watch = Watch([str(file)])
    assert not watch.has_changed()
    file.write_text("ab")
    assert not watch.has_changed()
    file.write_text("abc")
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]


def replace(file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_text(file.read_text())
    new.rename(file)


@pytest.mark.parametrize(
    "change",
    [
        replace,
        Path.unlink,
        lambda file: os.utime(file, ns=(1, 1)),
        lambda file: file.write_text("longer than before"),
    ],
)
def test_watch_sees(tmp_path, change):
    file = tmp_path / "file"
    file.write_text("a")
    watch = Watch([str(file)])
    change(file)
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]


def test_watch_sees_what_changes_while_it_is_read(tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("a")
    other.write_text("a")
    watch = Watch([str(file)])
    watch.look()
    file.write_text("ab")
    watch.follow([str(file), str(other)])
    assert [watch.has_changed() for _ in range(3)] == [False, True, False]


# -------------------------------------------------------------------------------- workers


async def test_workers_share_the_port_and_stop_together(file, upstream, tmp_path):
    upstream.script(sse(*openai_chunks(TEXTS)))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    arguments = ("--config", str(file), "--workers", "2")
    async with serve(*arguments, TMPDIR=str(temporary)) as proxy:
        children = proxy.children
        assert len(children) == 2
        (metrics,) = temporary.iterdir()  # which is for the workers' snapshots
        assert memory_kb(proxy.process.pid) < 0.6 * memory_kb(children[0])
        before = {child: sockets_of(child) for child in children}
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(32):
                each = await stack.enter_async_context(connect(proxy.url))
                await each.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await each.reply()).status == 200
            shares = [sockets_of(child) - before[child] for child in children]
        assert sum(shares) >= 32 and min(shares) >= 4, shares
        assert await text_of(proxy.url) == "ab"
        status, out = await proxy.stop()
    assert status == 0
    assert '"kind":"ok"' in out
    assert not metrics.exists()
    assert not any(map(is_alive, children))


async def test_a_worker_that_is_killed_takes_only_its_own_streams_along(file, upstream):
    gate = begin(upstream)
    async with serve("--config", str(file), "--workers", "2") as proxy:
        victim, other = proxy.children
        asked = [asyncio.create_task(outcome_of(proxy.url)) for _ in range(24)]
        await upstream.received(24)
        await asyncio.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        later = [asyncio.create_task(outcome_of(proxy.url)) for _ in range(24)]
        await proxy.says(f"worker 1 (pid {victim}) was killed by SIGKILL; another")
        await upstream.received(48, 5)
        gate.set()
        outcomes = await asyncio.gather(*asked)
        assert set(outcomes) == {"ab", "cut"}, outcomes
        assert await asyncio.gather(*later) == ["ab"] * 24
        assert victim not in proxy.children and other in proxy.children
        assert len(proxy.children) == 2
        status, out = await proxy.stop()
    assert status == 0
    assert out.count('"kind":"ok"') == 24 + outcomes.count("ab")


async def outcome_of(url: str) -> str:
    try:
        async with stream(url, path=CHAT, body=QUESTION, within_s=10) as reply:
            await reply.rest(10)
    except (ConnectionError, AssertionError):  # before the head or after it
        return "cut"
    return read_chat(reply.reply, 2).text if reply.reply.complete else "cut"


async def test_each_worker_answers_for_all(file, upstream):
    upstream.script(sse(*openai_chunks(TEXTS)))
    write(file, upstream, auth=OF_ANN)
    async with serve("--config", str(file), "--workers", "2") as proxy:
        for _ in range(12):
            await request(proxy.url, "POST", CHAT, BEARING, QUESTION)
        os.kill(proxy.children[0], signal.SIGTERM)  # its successor goes on
        async with asyncio.timeout(15):
            while await counted(proxy.url) != (12.0, 12):  # noqa: ASYNC110
                await asyncio.sleep(0.1)


async def test_no_worker_outlives_its_parent(file, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    arguments = ("--config", str(file), "--workers", "2")
    async with serve(*arguments, TMPDIR=str(temporary)) as proxy:
        children = proxy.children
        assert all(map(is_alive, children))
        proxy.signal(signal.SIGKILL)
        await until(lambda: not any(map(is_alive, children)))
    assert list(temporary.iterdir()) == []


async def test_workers_get_new_settings_and_so_do_their_successors(file, upstream):
    upstream.script(sse(*openai_chunks(["old"])))
    async with (
        ScriptedUpstream() as new,
        serve("--config", str(file), "--workers", "2") as proxy,
    ):
        new.script(sse(*openai_chunks(["new"])))
        assert await text_of(proxy.url) == "old"
        # More than a pipe takes at once.
        aliases = {f"{n:0>99}": "acme::v1::large" for n in range(1000)}
        write(file, new, aliases=aliases)
        await proxy.says("was read again")
        await asyncio.sleep(0.2)
        file.write_text("wrong")
        await proxy.says("the old one stays in force")
        for child in proxy.children:
            # One of them may be that which read the file, and on its way out.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        await until(lambda: proxy.said.count("another follows") == 2)
        texts = [await text_of(proxy.url) for _ in range(12)]
    assert set(texts) == {"new"}
    assert len(upstream.requests) == 1


async def test_workers_take_an_interrupt_from_the_terminal_once(file, upstream):
    """It goes to all processes; the parent's word alone counts."""
    gate = begin(upstream)
    async with serve("--config", str(file), "--workers", "2") as proxy:
        asking = asyncio.create_task(text_of(proxy.url))
        await upstream.received()
        for pid in (*proxy.children, proxy.process.pid):
            os.kill(pid, signal.SIGINT)
        await proxy.says("open replies have 10 s")
        await asyncio.sleep(0.2)
        gate.set()
        assert await asking == "ab"
        assert (await proxy.end())[0] == 0


async def test_start_is_refused_when_workers_have_the_port(file, upstream):
    upstream.script(sse(*openai_chunks(TEXTS)))
    arguments = ("--config", str(file), "--workers", "2", "--listen")
    async with serve("--config", str(file), "--workers", "2") as proxy:
        port = proxy.url.rpartition(":")[2]
        async with spawn("serve", *arguments, f"127.0.0.1:{port}") as second:
            status, _ = await second.end()
        assert await text_of(proxy.url) == "ab"
    taken = f"error: cannot listen on 127.0.0.1:{port}: address already in use\n"
    assert (status, second.said) == (1, taken)


async def test_start_is_refused_when_the_file_is_wrong(tmp_path):
    file = tmp_path / "proxy.yaml"
    file.write_text("lisen: x\nmodelConfiguration: 7\n")
    async with spawn("serve", "--config", str(file), "--workers", "2") as proxy:
        status, _ = await proxy.end()
    assert status == 2
    head, first, second = proxy.said.splitlines()
    assert head == "The configuration cannot be used:"
    assert "lisen" in first + second and "modelConfiguration" in first + second


async def test_workers_need_something_to_stand_in_front_of():
    async with spawn("serve", "--workers", "2") as proxy:
        status, _ = await proxy.end()
    assert status == 2
    assert "--workers: only with --config or --tgi-url" in proxy.said


async def test_workers_in_front_of_a_server(upstream):
    upstream.script(json_reply({"model_id": "acme/large"}), path="/info")
    upstream.script(sse(*openai_chunks(TEXTS)), path="/v1/chat/completions")
    async with serve("--tgi-url", upstream.url, "--workers", "2") as proxy:
        assert await text_of(proxy.url) == "ab"
        proxy.signal(signal.SIGHUP)  # there is no file to read again
        status, _ = await proxy.end()
    assert status == 0


def test_log_lines_of_several_processes_do_not_mix():
    """What a pipe takes as one is whole lines."""
    written: list[str] = []

    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    log = ExchangeLog(Pipe(), Redactor([]), later=lambda flush: None)
    for number in range(100):
        log.outcome(Outcome(id=f"{number}", route="/" + "x" * (number * 7)), 0.0)
        if number == 50:
            log.outcome(Outcome(id="long", route="x" * 9000), 0.0)
    log.flush()
    assert len(written) > 5
    assert all(text.endswith("\n") for text in written)
    assert all(len(text) <= select.PIPE_BUF or "long" in text for text in written)
    assert sum(len(text) > select.PIPE_BUF for text in written) == 1
    ids = [json.loads(line)["id"] for line in "".join(written).splitlines()]
    assert ids == [*map(str, range(51)), "long", *map(str, range(51, 100))]


def test_log_lines_are_in_order_and_say_when():
    stream = io.StringIO()
    log = ExchangeLog(stream, Redactor([]), later=lambda flush: None)
    for ms in (0, 1, 1, 999, 1000, 86_400_123, 5):  # a clock may be set back
        log.outcome(Outcome(id=str(ms), route="/"), ms / 1000 + 0.0005)
        log.upstream_data(str(ms), b"x")
    assert stream.getvalue() == ""
    log.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["exchange", "upstream_data"] * 7
    assert [line["time"] for line in lines[::2]] == [
        "1970-01-01T00:00:00.000Z",
        "1970-01-01T00:00:00.001Z",
        "1970-01-01T00:00:00.001Z",
        "1970-01-01T00:00:00.999Z",
        "1970-01-01T00:00:01.000Z",
        "1970-01-02T00:00:00.123Z",
        "1970-01-01T00:00:00.005Z",
    ]


def test_log_line_that_no_utf_8_can_say_costs_no_other():
    stream = io.StringIO()
    log = ExchangeLog(stream, Redactor([]), later=lambda flush: None)
    for route in ("/a", "/\ud83d", "/ü"):
        log.outcome(Outcome(id="x", route=route, tried=("a 500",)), 0.0)
    log.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.pop("route") for line in lines] == ["/a", "/\ud83d", "/ü"]
    assert lines[0] == lines[1] == lines[2]


def test_a_worker_that_dies_at_once_waits_longer_each_time():
    (listening,) = sockets.listen([("127.0.0.1", 0)], share=True)
    worker = _Worker(1, [listening])
    waits = []
    for _ in range(11):
        _put_off(worker)
        waits.append(worker.backoff_s)
        # Nobody is to wait for a worker that will not come soon.
        assert bool(worker.listening) is (worker.backoff_s <= 1)
    assert waits[:4] == [0.1, 0.2, 0.4, 0.8] and waits[-1] == LONGEST_BACKOFF_S
    assert listening.fileno() == -1


@pytest.mark.parametrize("share", [False, True])
async def test_sockets_send_small_writes_at_once(share):
    """asyncio sets TCP_NODELAY only where the socket names its protocol."""
    listening = sockets.listen([("localhost", 0)], share=share)
    if share:
        listening += sockets.beside(listening)
    loop = asyncio.new_event_loop()
    assert type(loop).__module__.startswith("asyncio")
    try:
        await asyncio.to_thread(loop.run_until_complete, _check_delay(listening))
    finally:
        loop.close()


async def _check_delay(listening: list[socket.socket]) -> None:
    options: asyncio.Queue[int] = asyncio.Queue()

    class Noting(asyncio.Protocol):
        def connection_made(self, transport):
            raw = transport.get_extra_info("socket")
            options.put_nowait(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    loop = asyncio.get_running_loop()
    address = listening[0].getsockname()[:2]
    servers = [await loop.create_server(Noting, sock=each) for each in listening]
    async with asyncio.timeout(5):
        for _ in range(8):
            _, writer = await asyncio.open_connection(*address)
            assert await options.get()
            writer.close()
            await writer.wait_closed()
    for server in servers:
        server.close()


def memory_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def sockets_of(pid: int) -> int:
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    return sum(link.startswith("socket:") for link in links)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
