"""What ``make soak`` would notice: its own judges are judged here."""

from typing import Any

import pytest

from tests.soak import check, servers
from tests.soak.clients import Ask, Load, Seen
from tests.support.dialects import CHAT, TGI, Dialect
from tests.support.upstream import (
    Close,
    Hang,
    ScriptedUpstream,
    chunk,
    json_reply,
    openai_chunks,
    sse,
    sse_head,
)


def ask(seen: Seen, status: int = 200, **more: Any) -> Ask:
    known: dict[str, Any] = {"number": 7, "dialect": CHAT, "stream": True, "model": "m"}
    fields = known | {"question": "?", "request": b"", "habit": "converses"} | more
    return Ask(**fields, seen=seen, status=status, id="a")


def line(kind: str = "ok", status: int = 200, **more: Any) -> dict[str, Any]:
    return {"client": "soak/7", "id": "a", "kind": kind, "status": status} | more


@pytest.mark.parametrize(
    ("asked", "lines", "what"),
    [
        (ask("ok"), [line()], ""),
        (ask("error", 503), [line("upstream_status", 503)], ""),
        (ask("left"), [line("client_gone", 0)], ""),
        (ask("left early", 0), [], ""),
        (ask("ok"), [], "no line"),
        (ask("left early", 0, began_s=1, ended_s=3), [], "no line"),
        (ask("ok"), [line(), line(id="b")], "more than one line"),
        (ask("ok"), [line(id="b")], "a line with another id"),
        (ask("ok"), [line("upstream_truncated")], "said to have failed"),
        (ask("error"), [line()], "an error that is not said to be one"),
        (ask("error"), [line("client_gone")], "an error that is not said to be one"),
        (ask("refused", 400), [line("internal", 400)], "refused for another reason"),
        (ask("ok"), [line(status=500)], "a line with the status 500"),
    ],
)
def test_compare(asked: Ask, lines: list[dict[str, Any]], what: str):
    found = check.compare([asked], lines)
    assert len(found) == bool(what)
    assert what in "".join(found)


def test_compare_finds_lines_of_nobody_and_ids_that_come_twice():
    others = [line(client="soak/8", id="b"), line(client="soak/9", id="b")]
    assert check.compare([], others) == [
        "the id b has 2 lines",
        "lines of nobody's request: 'soak/8'",
        "lines of nobody's request: 'soak/9'",
    ]


def test_compare_lets_lines_be_lost_only_where_a_process_was_killed():
    asked = [ask("ok", connected_s=1, ended_s=2)]
    assert check.compare(asked, [], may_be_lost=lambda since, until: until > 2) == []
    assert check.compare(asked, [], may_be_lost=lambda since, until: since > 1) != []


TEXTS = ["I am a simulator, not a model,", " so I can only tell you"]


@pytest.mark.parametrize(
    ("dialect", "reply", "what"),
    [
        (CHAT, sse(*openai_chunks(TEXTS)), "another text"),
        (CHAT, sse(*openai_chunks(TEXTS), *openai_chunks(TEXTS)), "after the end"),
        (CHAT, sse(*openai_chunks(TEXTS)[:-1]), "AssertionError"),
        (CHAT, [sse_head(), chunk(openai_chunks(TEXTS)[0]), Close()], "broke"),
        (CHAT, json_reply({"message": "no"}, status=500), "KeyError"),
        (TGI, sse(*openai_chunks(TEXTS)), "KeyError"),
    ],
)
async def test_load_notices(dialect: Dialect, reply: Any, what: str):
    async with ScriptedUpstream() as proxy:
        proxy.script(reply)
        load = Load(proxy.url, 1, habits=["converses"], faulty=0)
        asked = load._ask("converses", dialect, servers.STEADY, True, {})
        load.ask = lambda *_: asked  # type: ignore[method-assign]
        await load.run(1, 0.1)
        assert asked.seen in ("error", "cut")
    assert load.violations, asked
    assert what in load.violations[0]


async def test_load_notices_a_reply_that_hangs(monkeypatch):
    monkeypatch.setattr("tests.soak.clients.HANG_S", 0.3)
    async with ScriptedUpstream() as proxy:
        proxy.script([sse_head(), Hang()])
        load = Load(proxy.url, 1, habits=["converses"], faulty=0)
        await load.run(1, 0.1)
    assert "hangs" in load.violations[0]
