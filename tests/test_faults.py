"""Every fault in every phase, in front of every dialect, streamed and in one piece.

Each case asserts what the client reads last, what is logged, what becomes of the
upstream's connection, and that nothing stays open. ``python -m tests.test_faults`` runs
it and prints the table of what passed.
"""

import asyncio
import contextlib
import gzip
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import pytest

from proxy import relay
from tests.support.client import RawReply, build_request, connect, request
from tests.support.dead import full, not_tls, refusing
from tests.support.dialects import DIALECTS, Dialect
from tests.support.fixtures import (
    RunningProxy,
    load,
    model_configuration,
    running,
)
from tests.support.table import main
from tests.support.upstream import (
    Close,
    Hang,
    Pause,
    Reset,
    Script,
    ScriptedUpstream,
    Step,
    chunk,
    data,
    json_reply,
    reply,
    sse,
    sse_head,
)
from tests.test_matrix import (
    FAILURE,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    REASON,
    TEXT,
    TEXTS,
    Wire,
)

CLOCK_S = 0.06
EVENT_BYTES = 20_000
Phase: TypeAlias = Literal[
    "connecting", "before the head", "before the answer", "in the answer", "after it"
]


@dataclass
class Cell:
    """One dialect that asks for a stream or not, in front of one faulty upstream."""

    dialect: Dialect
    streamed: bool
    upstream: ScriptedUpstream
    proxy: RunningProxy

    async def ask(self, milliseconds: int = 0) -> RawReply:
        headers = dict(self.dialect.headers)
        if milliseconds:
            headers["X-Timeout-Ms"] = str(milliseconds)
        return await request(
            self.proxy.url,
            path=self.dialect.path,
            headers=headers,
            body=self.dialect.body(stream=self.streamed),
            within_s=3,
        )


def wire_of(dialect: Dialect) -> Wire:
    return OPENAI_COMPLETIONS if dialect.wants_completions else OPENAI_CHAT


Play: TypeAlias = Callable[[Cell], Awaitable[RawReply | None]]


async def ask(cell: Cell) -> RawReply:
    return await cell.ask()


async def ask_in_time(cell: Cell) -> RawReply:
    """A reply in one piece has no clock but the last one."""
    return await cell.ask(0 if cell.streamed else int(CLOCK_S * 1000))


async def ask_for_long(cell: Cell) -> RawReply:
    return await cell.ask(150)


async def ask_twice(cell: Cell) -> RawReply:
    await cell.ask()
    return await cell.ask()


def leave(how: Literal["close", "reset"]) -> Play:
    async def play(cell: Cell) -> None:
        async with connect(cell.proxy.url) as connection:
            dialect = cell.dialect
            body = dialect.body(stream=cell.streamed)
            await connection.send(
                build_request(
                    cell.proxy.url, "POST", dialect.path, dialect.headers, body, False
                )
            )
            if cell.upstream.port:
                await cell.upstream.received()
            await asyncio.sleep(0.02)
            await getattr(connection, how)()

    return play


async def shut_down(cell: Cell) -> RawReply:
    asking = asyncio.create_task(cell.ask())
    await cell.upstream.received()
    await asyncio.sleep(0.02)
    for each in list(cell.proxy.inside.relays):
        each.interrupt()
    return await asking


Played: TypeAlias = Callable[[Wire], Script]


def always(*steps: Step) -> Played:
    return lambda wire: list(steps)


def status(code: int) -> Played:
    return lambda wire: [wire.errors(code) if code in REASON else reply(code)]


@dataclass(frozen=True)
class Fault:
    """Attributes:

    kind, message: what is logged, and told the client. "ok" is no fault for it.
    script:   what the upstream does instead.
    text:     of the answer, what the client has before.
    keeps:    the upstream's connection may carry another request.
    modes:    streamed, in one piece: where there is such a thing.
    where:    an address instead of the upstream's.
    """

    phase: Phase
    kind: str
    message: str = ""
    script: Played | None = None
    play: Play = ask
    text: str = ""
    keeps: bool = False
    modes: tuple[bool, ...] = (True, False)
    where: Callable[[], contextlib.AbstractContextManager[str]] | None = None
    scheme: str = "http"
    timeouts: tuple[str, ...] = ("connect", "headers", "firstToken", "betweenTokens")


UNREACHABLE, TRUNCATED = "upstream_unreachable", "upstream_truncated"
GARBLED, REPORTED = "upstream_garbled", "upstream_reported"
CLOSED, CUT = "connection closed before a reply", "before the end of the re"
BROKEN = "sent a body that is broken"
STREAM, WHOLE = (True,), (False,)


def head(kind: str, message: str, *steps: Step, play: Play = ask, **more) -> Fault:
    return Fault("before the head", kind, message, always(*steps), play, **more)


def _begun(wire: Wire) -> Script:
    """The head and a role: no answer yet."""
    return [sse_head(), *map(chunk, wire.streamed([], None, False)[:1])]


def before(kind: str, message: str, *steps: Step, play: Play = ask) -> Fault:
    def script(wire: Wire) -> Script:
        first = [] if wire is OPENAI_COMPLETIONS else _begun(wire)[1:]
        return [sse_head(), *first, *steps]

    return Fault("before the answer", kind, message, script, play, modes=STREAM)


def instead(kind: str, message: str, script: Played, **more) -> Fault:
    return Fault("before the answer", kind, message, script, **more)


def within(kind: str, message: str, *steps: Step, play: Play = ask) -> Fault:
    def script(wire: Wire) -> Script:
        return [
            sse_head(),
            *map(chunk, wire.streamed(TEXTS, None, False)),
            *steps,
        ]

    phase: Phase = "in the answer"
    return Fault(phase, kind, message, script, play, text=TEXT, modes=STREAM)


def in_body(kind: str, message: str, *steps: Step, play: Play = ask) -> Fault:
    def script(wire: Wire) -> Script:
        return [json_reply(wire.plain("stop"))[:-20], *steps]

    return Fault("in the answer", kind, message, script, play, modes=WHOLE)


def after(*steps: Step, play: Play = ask) -> Fault:
    """All is said but the mark of the end."""

    def script(wire: Wire) -> Script:
        events = wire.streamed(TEXTS, "stop", True)[:-1]
        return [sse_head(), *map(chunk, events), *steps]

    return Fault("after it", "ok", "", script, play, text=TEXT, modes=STREAM)


def _packed(wire: Wire, *, cut: int) -> Script:
    events = b"".join(wire.streamed(TEXTS, None, False))
    packed = gzip.compress(events)
    # So that what is cut off is the end of the encoding and nothing of the events.
    return [
        sse_head({"Content-Encoding": "gzip"}),
        chunk(packed[:-cut]),
        b"0\r\n\r\n",
    ]


def _nonsense(wire: Wire) -> Script:
    said: object = {"what": "is this"}
    is_chat = wire is OPENAI_CHAT
    choice = {"delta": {"content": said}} if is_chat else {"text": said}
    events = [*wire.streamed(TEXTS, None, False), data({"choices": [choice]})]
    return [sse_head(), *map(chunk, events), Hang()]


def _race(wire: Wire) -> Script:
    return sse(*wire.streamed(TEXTS, "stop", True))


SILENCE = "deadline exceeded"
COMMENTS: Script = [
    each for _ in range(40) for each in (chunk(b": x\n\n"), Pause(0.01))
]
TOO_LARGE = chunk(b"data: " + b"x" * (2 * EVENT_BYTES) + b"\n\n")
FAULTS: dict[str, Fault] = {
    "refused": Fault("connecting", UNREACHABLE, "connection refused", where=refusing),
    "never accepted": Fault(
        "connecting",
        "connect_timeout",
        "connect timed out",
        where=full,
        timeouts=("connect",),
    ),
    "no TLS": Fault(
        "connecting",
        UNREACHABLE,
        "TLS handshake failed",
        scheme="https",
        # The first one reads the certificates, which takes its time.
        timeouts=(),
    ),
    "client leaves while connecting": Fault(
        "connecting", "client_gone", where=full, play=leave("close"), timeouts=()
    ),
    # ---
    "closed": head(UNREACHABLE, CLOSED, Close()),
    "reset": head(UNREACHABLE, CLOSED, Reset()),
    "no HTTP": head(UNREACHABLE, "not HTTP", b"SSH-2.0-OpenSSH\r\n\r\n"),
    "half a head": head(UNREACHABLE, CLOSED, b"HTTP/1.1 200 OK\r\nConte", Close()),
    "endless head": head(
        UNREACHABLE, "not HTTP", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, Hang()
    ),
    "silence": head("headers_timeout", SILENCE, Hang(), play=ask_in_time),
    "odd encoding": head(
        GARBLED, "content encoding", reply(200, {"Content-Encoding": "br"}, "x")
    ),
    "redirect": head(
        "upstream_status",
        "status code 302",
        reply(302, {"Location": "/health"}),
        keeps=True,
    ),
    **{
        f"status {code}": Fault(
            "before the head", "upstream_status", REASON[code], status(code), keeps=True
        )
        for code in (400, 401, 404, 429, 500, 503)
    },
    **{
        f"status {code}": Fault(
            "before the head",
            "upstream_status",
            f"status code {code}",
            status(code),
            keeps=True,
        )
        for code in (422, 502, 504, 529)
    },
    "keep-alive that was a lie": Fault(
        "before the head",
        "ok",
        "",
        _race,
        ask_twice,
        text=TEXT,
        keeps=True,
        modes=STREAM,
    ),
    "client leaves": head("client_gone", "", Hang(), play=leave("close")),
    "shutdown": head("shutting_down", "shutting down", Hang(), play=shut_down),
    # ---
    "closed without an event": before(TRUNCATED, CUT, Close()),
    "reset without an event": before(TRUNCATED, CUT, Reset()),
    "silence after the head": before("first_token_timeout", SILENCE, Hang()),
    "only comments": before("first_token_timeout", SILENCE, *COMMENTS),
    "overload as first event": instead(
        REPORTED, REASON[429], lambda wire: sse(wire.overload), modes=STREAM
    ),
    "error as first event": instead(
        REPORTED, FAILURE, lambda wire: sse(wire.failure), modes=STREAM
    ),
    "HTML": instead(
        GARBLED,
        "Bad gateway",
        always(reply(200, {"Content-Type": "text/html"}, "<h1>Bad gateway</h1>")),
        keeps=True,
    ),
    "an empty body": instead(
        GARBLED,
        "",
        always(reply(200, {"Content-Type": "application/json"})),
        keeps=True,
    ),
    "JSON of something else": instead(
        GARBLED,
        "",
        always(json_reply({"status": "fine"})),
        keeps=True,
    ),
    "an error of status 200": instead(
        REPORTED,
        "no more tokens",
        always(json_reply({"error": "no more tokens"})),
        keeps=True,
    ),
    "no event": instead(
        TRUNCATED, "no events", lambda wire: sse(), modes=STREAM, keeps=True
    ),
    "nothing but the end": instead(
        REPORTED,
        "without an answer",
        lambda wire: sse(b"data: [DONE]\n\n"),
        modes=STREAM,
    ),
    "broken chunks": before(GARBLED, BROKEN, b"zz\r\n"),
    "too large an event": before("event_too_large", "", TOO_LARGE),
    "packed, but not so": instead(
        GARBLED,
        BROKEN,
        always(reply(200, {"Content-Encoding": "gzip"}, b"data: {}\n\n")),
        keeps=True,
    ),
    "client leaves before the answer": before(
        "client_gone", "", Hang(), play=leave("close")
    ),
    "shutdown before the answer": before(
        "shutting_down", "shutting down", Hang(), play=shut_down
    ),
    # ---
    "closed in the answer": within(TRUNCATED, CUT, Close()),
    "reset in the answer": within(TRUNCATED, CUT, Reset()),
    "ended in the answer": replace(within(TRUNCATED, CUT, b"0\r\n\r\n"), keeps=True),
    "silence in the answer": within("token_gap_timeout", SILENCE, Hang()),
    "only comments in the answer": within("token_gap_timeout", SILENCE, *COMMENTS),
    "overload in the answer": within(
        REPORTED, REASON[429], chunk(OPENAI_CHAT.overload), Hang()
    ),
    "error in the answer": replace(
        within(REPORTED, FAILURE, chunk(OPENAI_CHAT.failure), b"0\r\n\r\n"),
        keeps=True,
    ),
    "broken chunks in the answer": within(GARBLED, BROKEN, b"zz\r\n"),
    "nonsense in the answer": replace(
        within(GARBLED, "makes no sense"), script=lambda wire: _nonsense(wire)
    ),
    "too large an event in the answer": within("event_too_large", "", TOO_LARGE),
    "packed and cut": replace(
        within(TRUNCATED, CUT), script=lambda wire: _packed(wire, cut=8), keeps=True
    ),
    "deadline in the answer": replace(
        within("deadline_exceeded", SILENCE, Hang(), play=ask_for_long), timeouts=()
    ),
    "client leaves in the answer": within(
        "client_gone", "", Hang(), play=leave("close")
    ),
    "client resets in the answer": within(
        "client_gone", "", Hang(), play=leave("reset")
    ),
    "shutdown in the answer": within(
        "shutting_down", "shutting down", Hang(), play=shut_down
    ),
    "body cut": in_body(TRUNCATED, CUT, Close()),
    "body reset": in_body(TRUNCATED, CUT, Reset()),
    "silence in the body": in_body(
        "deadline_exceeded", SILENCE, Hang(), play=ask_in_time
    ),
    "too long a body": instead(
        GARBLED,
        "",
        always(json_reply("x" * 50_000)[:-1], Hang()),
        modes=WHOLE,
    ),
    "client leaves in the body": in_body(
        "client_gone", "", Hang(), play=leave("close")
    ),
    "shutdown in the body": in_body(
        "shutting_down", "shutting down", Hang(), play=shut_down
    ),
    # ---
    "closed before the end mark": after(Close()),
    "reset before the end mark": after(Reset()),
    "silence before the end mark": after(Hang()),
    "pings before the end mark": after(*COMMENTS),
    "ended without the end mark": replace(after(b"0\r\n\r\n"), keeps=True),
    "more after the end mark": after(
        chunk(b"data: [DONE]\n\n" + b"data: {}\n\n"), Hang()
    ),
}

# What is called otherwise where the reply comes in one piece.
NOT_STREAMED_KINDS = {"silence": "deadline_exceeded"}
Case: TypeAlias = tuple[str, Dialect, bool]
CASES: list[Case] = [
    (name, dialect, streamed)
    for name, fault in FAULTS.items()
    for dialect in DIALECTS
    for streamed in fault.modes
]


def case_id(name: str, dialect: Dialect, streamed: bool) -> str:
    how = "streamed" if streamed else "in one piece"
    return f"{FAULTS[name].phase} | {name} | {dialect.name} | {how}"


@contextlib.asynccontextmanager
async def cell_of(
    fault: Fault, dialect: Dialect, streamed: bool
) -> AsyncIterator[Cell]:
    async with contextlib.AsyncExitStack() as stack:
        upstream = ScriptedUpstream()
        if fault.where is not None:
            url = stack.enter_context(fault.where())
        elif fault.scheme == "https":
            url = await stack.enter_async_context(not_tls())
        else:
            url = (await stack.enter_async_context(upstream)).url
        file = {
            "modelConfiguration": model_configuration(url),
            "timeouts": dict.fromkeys(fault.timeouts, CLOCK_S),
            "limits": {"eventBytes": EVENT_BYTES},
            "fallback": True,
        }
        proxy = await stack.enter_async_context(running(load(file)))
        yield Cell(dialect, streamed, upstream, proxy)


def open_files() -> int:
    path = "/proc/self/fd"
    return len(os.listdir(path)) if os.path.isdir(path) else 0


async def over(proxy: RunningProxy, number: int) -> None:
    """Wait until the requests are over for the proxy, too."""
    for _ in range(200):
        if len(proxy.outcomes) == number:
            return
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("name", "dialect", "streamed"), CASES, ids=[case_id(*case) for case in CASES]
)
async def test_faults(
    name: str, dialect: Dialect, streamed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(relay, "GRACE_S", CLOCK_S)
    fault, before_files = FAULTS[name], open_files()
    scripts = [fault.script(wire_of(dialect))] if fault.script is not None else []
    if fault.play is ask_twice:
        scripts += [[Close()], *scripts]
    async with cell_of(fault, dialect, streamed) as cell:
        for script in scripts:
            cell.upstream.script(script)
        raw = await fault.play(cell)
        number = 2 if fault.play is ask_twice else 1
        await over(cell.proxy, number)
        check_client(fault, cell, raw)
        check_outcome(name, fault, cell, number)
        await check_upstream(fault, cell)
        inside = cell.proxy.inside
        assert inside.relays == set() and inside.is_idle.is_set()
        assert [m.in_flight for m in inside.pools["acme"].members] == [0]
    # What was closed is gone only after the loop's next turns.
    for _ in range(20):
        if open_files() <= before_files and len(asyncio.all_tasks()) == 1:
            break
        await asyncio.sleep(0.005)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert open_files() <= before_files


def check_client(fault: Fault, cell: Cell, raw: RawReply | None) -> None:
    """The last bytes: one end, as the dialect has it, and what went wrong."""
    if fault.kind == "client_gone":
        assert raw is None
        return
    assert raw is not None
    seen = cell.dialect.read(raw, stream=cell.streamed)
    assert seen.text == (fault.text if cell.streamed else "")
    if fault.kind == "ok":
        assert (raw.status, seen.error) == (200, None)
        return
    assert seen.error
    is_way = fault.kind in (UNREACHABLE, "connect_timeout") or SILENCE in fault.message
    if cell.dialect.name == "gateway" and is_way and not fault.text:
        # It has words of its own for that.
        assert "upstream provider openai" in seen.error
    else:
        assert fault.message in seen.error
    assert "127.0.0.1" not in seen.error or fault.phase in (
        "connecting",
        "before the head",
    )
    if fault.text:
        assert raw.status == 200
    elif cell.dialect.says_status or not cell.streamed:
        assert raw.status >= 400


def check_outcome(name: str, fault: Fault, cell: Cell, number: int) -> None:
    outcomes = cell.proxy.outcomes
    assert len(outcomes) == number
    kind = fault.kind
    if not cell.streamed:
        kind = NOT_STREAMED_KINDS.get(name, kind)
    assert outcomes[-1]["kind"] == kind, outcomes[-1]


async def check_upstream(fault: Fault, cell: Cell) -> None:
    """Its connection is kept for the next request, or closed at once."""
    idle = cell.proxy.inside.upstreams["acme"]._idle
    if fault.keeps:
        for _ in range(50):
            if sum(map(len, idle.values())) == 1:
                break
            await asyncio.sleep(0.005)
        assert cell.upstream.open == 1
        assert sum(map(len, idle.values())) == 1
        return
    await cell.upstream.idle(1)
    assert not any(each.is_open for kept in idle.values() for each in kept)


# ------------------------------------------------------------------------ the table


def table(failed: Collection[str] = ()) -> str:
    """Return the matrix in Markdown: cases passed, of how many, per phase and dialect.

    Args: failed: ids of the cases that did not pass.
    """
    phases = list(dict.fromkeys(fault.phase for fault in FAULTS.values()))
    rows = [["client", *phases, "in all"], ["---"] * (len(phases) + 2)]
    for dialect in (*DIALECTS, None):
        mine = [case for case in CASES if dialect in (None, case[1])]
        split = [[case for case in mine if FAULTS[case[0]].phase == p] for p in phases]
        counts = [_count(cases, failed) for cases in (*split, mine)]
        rows.append([dialect.name if dialect else "all", *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _count(cases: list[Case], failed: Collection[str]) -> str:
    return f"{sum(case_id(*case) not in failed for case in cases)}/{len(cases)}"


if __name__ == "__main__":
    sys.exit(main(__file__, table))
