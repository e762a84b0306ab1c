"""Metrics: what is counted, how it is said, and that no client can blow it up."""

import asyncio
import hashlib
import io
import os
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics,
)

from proxy import __version__
from proxy.log import ExchangeLog
from proxy.metrics import DEAD_AFTER_S, OTHER, PUBLISH_S, Board, Metrics
from proxy.outcome import Outcome
from proxy.redact import Redactor
from proxy.server import Proxy
from proxy.upstream import Upstream
from proxy.usage import UsageCounter
from tests.support.client import build_request, connect, request, stream
from tests.support.fixtures import (
    QUESTION,
    Starter,
    load,
    model_configuration,
    running,
)
from tests.support.metrics import Page, scrape
from tests.support.upstream import (
    Hang,
    chunk,
    openai_chunks,
    reply,
    sse,
    sse_head,
)

PATH = "/.api/completions/stream"
ANSWER = sse(*openai_chunks(["Hello"], usage=(3, 4)))
BEGUN = [sse_head(), chunk(openai_chunks(["a"])[1]), Hang()]
TOKEN = "cp_0123456789"


# ---------------------------------------------------------------------------- a page


async def test_exchanges_are_counted_by_how_they_ended(start: Starter, upstream):
    upstream.script(ANSWER).script(ANSWER).script(reply(500, {}, b"no"))
    proxy = await start(model_configuration(upstream.url))
    for _ in range(3):
        await proxy.chat(version="8")
    page = await scrape(proxy.url)
    labels = {
        "route": PATH,
        "dialect": "cody",
        "provider": "acme",
        "endpoint": upstream.url.removeprefix("http://"),
        "model": "acme::v1::large",
        "status": "200",
    }
    assert page.value("exchanges_total", kind="ok", **labels) == 2
    assert page.value("exchanges_total", kind="upstream_status", **labels) == 1
    assert page.value("exchanges_total") == 3
    series = {"dialect": "cody", "provider": "acme", "model": "acme::v1::large"}
    assert page.value("first_token_seconds_count", **series) == 2
    assert page.value("duration_seconds_count", **series) == 3
    assert page.value("duration_seconds_bucket", le="+Inf", **series) == 3
    spent_s = sum(line["duration_s"] for line in proxy.outcomes[:3])
    assert page.value("duration_seconds_sum") == pytest.approx(spent_s)
    assert page.value("tokens_total", of="prompt", **series) == 6
    assert page.value("tokens_total", of="completion", **series) == 8
    assert page.value("info", version=__version__) == 1
    assert (await scrape(proxy.url)).value("exchanges_total", route="/-/metrics") == 1


async def test_gauges_say_what_is_open(start: Starter, upstream):
    upstream.script(ANSWER).script(BEGUN)
    proxy = await start(model_configuration(upstream.url), limits={"inFlight": 5})
    await proxy.chat()
    page = await scrape(proxy.url)
    assert page.value("in_flight") == 0
    assert page.value("upstream_connections", state="idle") == 1
    async with stream(proxy.url, path=PATH, body=QUESTION):
        page = await scrape(proxy.url)
        assert page.value("in_flight") == 1
        assert page.value("waiting") == 0
        assert page.value("client_connections") == 2
        assert page.value("upstream_connections", state="in_use") == 1
        assert page.value("upstream_connections", state="idle") == 0


async def test_who_waits_is_not_in_flight(start: Starter, upstream):
    upstream.script(BEGUN)
    proxy = await start(model_configuration(upstream.url), limits={"inFlight": 1})
    async with (
        stream(proxy.url, path=PATH, body=QUESTION),
        connect(proxy.url) as connection,
    ):
        late = build_request(proxy.url, "POST", PATH, {}, QUESTION, False)
        await connection.send(late)
        async with asyncio.timeout(2):
            while not (page := await scrape(proxy.url)).value("waiting"):
                pass
        assert (page.value("waiting"), page.value("in_flight")) == (1, 1)


async def test_limits_that_were_reached_are_counted(start: Starter, upstream):
    upstream.script(ANSWER)
    limits = {"token": {"chat": {"requestsPerDay": 1}}}
    proxy = await start(model_configuration(upstream.url), limits=limits)
    for _ in range(3):
        await proxy.chat()
    page = await scrape(proxy.url)
    assert page.value("limit_reached_total", limit="token.chat.requestsPerDay") == 2
    assert page.value("exchanges_total", kind="rate_limited", status="429") == 2


async def test_what_was_adjusted_is_counted(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url, type="huggingface-tgi"))
    chat = {"model": "large-1", "messages": [{"role": "user", "content": "Hi"}]}
    for top_p in (0.5, 1):
        body = chat | {"top_p": top_p, "stream": True}
        await request(proxy.url, path="/v1/chat/completions", body=body)
    page = await scrape(proxy.url)
    assert page.value("adjusted_total", dialect="openai-chat") == 1


async def test_metrics_need_a_token_like_all_else(start: Starter, upstream):
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens = [{"name": "ann", "sha256": digest}]
    proxy = await start(model_configuration(upstream.url), auth={"tokens": tokens})
    assert (await request(proxy.url, "GET", "/-/metrics")).status == 401
    assert (await scrape(proxy.url, {"Authorization": f"Bearer {TOKEN}"})).samples
    assert (await request(proxy.url, "POST", "/-/metrics")).status in (401, 404)


async def test_openmetrics_for_who_asks_for_it(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    await proxy.chat()
    accept = "application/openmetrics-text;version=1.0.0"
    raw = await request(proxy.url, "GET", "/-/metrics", {"Accept": accept})
    assert (raw.header("content-type") or "").startswith(accept.partition(";")[0])
    families = {each.name for each in openmetrics(raw.text)}
    assert "completions_proxy_exchanges" in families


async def test_no_client_chooses_a_label(start: Starter, upstream):
    upstream.script(ANSWER)
    proxy = await start(model_configuration(upstream.url))
    for number in range(30):
        mark = f"mark{number}"
        await request(proxy.url, "GET", f"/{mark}")
        await request(proxy.url, "GET", f"/v1/models/{mark}")
        await request(
            proxy.url,
            path=f"{PATH}?api-version=2&client-name={mark}",
            headers={"X-Sourcegraph-Feature": mark, "Authorization": mark},
            body=QUESTION | {"model": mark, mark: 1},
        )
        body = {"model": mark, "messages": [{"role": "user", "content": mark}]}
        await request(proxy.url, path="/v1/chat/completions", body=body)
    raw = await request(proxy.url, "GET", "/-/metrics")
    assert "mark" not in raw.text
    page = Page(raw.text)
    assert page.value("exchanges_total") == 120
    assert page.value("exchanges_total", route=OTHER) == 60
    assert len(page.samples) < 100


# -------------------------------------------------------------------- several processes


def outcome(**fields) -> Outcome:
    known = {"kind": "ok", "status": 200, "model": "m", "duration_s": 1.0}
    return Outcome(**{"id": "x", "route": "/a", **known, **fields})


def counting(dialects: dict[str, str]) -> Metrics:
    return Metrics(dialects, UsageCounter(0.0))


def page_of(metrics: Metrics, *others: bytes) -> Page:
    body, content_type = metrics.page("", others)
    assert content_type.startswith("text/plain")
    return Page(body.decode())


def test_snapshots_add_up():
    one, two = counting({"/a": "cody"}), counting({"/a": "cody"})
    for metrics, count in ((one, 2), (two, 3)):
        for _ in range(count):
            metrics.count(
                outcome(limit="l", first_token_s=0.1, prompt_tokens=5, adjusted=("x",)),
                0.0,
            )
        metrics.read("in_flight", partial(dict, {"": count}))
    page = page_of(one, two.snapshot(), b"no snapshot", b"")
    assert page.value("exchanges_total", route="/a", dialect="cody") == 5
    assert page.value("limit_reached_total", limit="l") == 5
    assert page.value("first_token_seconds_bucket", le="0.1") == 5
    assert page.value("first_token_seconds_bucket", le="0.05") == 0
    assert page.value("duration_seconds_sum") == 5
    assert page.value("tokens_total", of="prompt") == 25
    assert page.value("adjusted_total") == 5
    assert page.value("in_flight") == 5
    assert page_of(one).value("exchanges_total") == 2  # it has learnt nothing of it


def test_use_adds_up_by_user_and_for_the_user_by_day():
    one, two = counting({}), counting({})
    used = {"upstream_status": 200, "feature": "chat", "completion_tokens": 4}
    one.count(outcome(user="ann", **used), 0.0)
    two.count(outcome(user="ann", **used), 86_400.0)
    two.count(outcome(user="ben", **used), 86_400.0)
    two.count(outcome(user="ben", **used | {"upstream_status": 0}), 86_400.0)
    page = page_of(one, two.snapshot())
    assert page.value("user_requests_total", user="ann", feature="chat") == 2
    assert page.value("user_tokens_total", user="ben", of="completion") == 4
    days = one.used([two.snapshot()]).of("ann")
    assert [day.date for day in days] == ["1970-01-02", "1970-01-01"]
    two.restore(one.snapshot())  # as a worker does that takes another one's place
    assert two.used().of("ann") == days
    for day in range(2, 40):
        one.count(outcome(user="ann", **used), day * 86_400.0)
    assert len(one.used().of("ann")) == 31


@pytest.mark.parametrize("at_once", [1, 63, 64, 65, 10_000])
def test_counts_are_whole_whenever_they_are_read(at_once):
    metrics = counting({"/a": "cody"})
    used = {"upstream_status": 200, "feature": "chat", "completion_tokens": 4}
    for number in range(2 * at_once):
        # More labels than are kept apart from the rest.
        user = f"u{number % 1500}"
        metrics.count(outcome(user=user, **used), 86_399.0 + number // at_once)
    page = page_of(metrics)
    assert page.value("exchanges_total", route="/a", kind="ok") == 2 * at_once
    assert page.value("duration_seconds_count") == 2 * at_once
    assert page.value("tokens_total", of="completion") == 8 * at_once
    assert page.value("user_requests_total") == 2 * at_once
    requests = [
        sum(tally.requests for tally in tallies.values())
        for tallies in metrics.used().days.values()
    ]
    assert requests == [at_once, at_once]
    metrics.count(outcome(), 86_400.0)
    metrics.name({})
    assert page_of(metrics).value("exchanges_total", route="/a") == 2 * at_once + 1
    metrics.count(outcome(), 86_400.0)
    assert page_of(metrics).value("exchanges_total", route=OTHER) == 1


def test_replaced_process_goes_on_from_what_was_left():
    old, new = counting({"/a": "cody"}), counting({"/a": "cody"})
    old.count(outcome(), 0.0)
    old.read("in_flight", lambda: {"": 7})
    old.read("connections_refused", lambda: {"connections": 2})
    new.restore(old.snapshot())
    new.count(outcome(), 0.0)
    new.read("connections_refused", lambda: {"connections": 1})
    page = page_of(new)
    assert page.value("exchanges_total") == 2
    assert page.value("connections_refused_total", reason="connections") == 3
    assert page.value("in_flight") == 0
    third = counting({})
    third.restore(new.snapshot())
    assert page_of(third).value("exchanges_total") == 2
    with pytest.raises(ValueError, match="no snapshot of this version"):
        third.restore(b"\xc1")


def test_board_leaves_out_what_dead_processes_had_open(tmp_path: Path):
    dead, alive = counting({"/a": "cody"}), counting({"/a": "cody"})
    for slot, metrics in ((1, dead), (2, alive)):
        metrics.count(outcome(), 0.0)
        metrics.read("in_flight", lambda: {"": 1})
        Board(tmp_path, slot).publish(metrics.snapshot())
    (tmp_path / "3.metrics").write_bytes(b"half of")
    os.utime(tmp_path / "1.metrics", (1000, 1000))
    os.utime(tmp_path / "2.metrics", (1000 + DEAD_AFTER_S, 1000 + DEAD_AFTER_S))
    own = Board(tmp_path, 0)
    assert own.left() is None
    others = own.others(now_s=1000 + DEAD_AFTER_S + 1)
    page = page_of(counting({}), *others)
    assert (page.value("exchanges_total"), page.value("in_flight")) == (2, 1)


async def test_one_of_several_processes_answers_for_all(upstream, tmp_path: Path):
    upstream.script(ANSWER)
    settings = load({"modelConfiguration": model_configuration(upstream.url)})
    async with running(settings, board=Board(tmp_path, 0)) as one:
        async with running(settings, board=Board(tmp_path, 1)) as two:
            for proxy in (one, two, two):
                await proxy.chat()
        # It has published its last counts on its way out.
        page = await scrape(one.url)
        assert page.value("exchanges_total", route=PATH) == 3
    async with running(settings, board=Board(tmp_path, 1)) as again:
        await again.chat()
        page = await scrape(again.url)
        assert page.value("exchanges_total", route=PATH) == 4


async def test_proxy_that_replaces_another_goes_on_with_its_counts(upstream):
    upstream.script(ANSWER)
    limits = {"token": {"chat": {"requestsPerDay": 1}}}
    block = {"modelConfiguration": model_configuration(upstream.url), "limits": limits}
    link = Upstream()
    redact = Redactor([])
    log = ExchangeLog(io.StringIO(), redact)
    old, new = (Proxy(load(block), link, log, redact) for _ in range(2))
    old.metrics.count(outcome(route=PATH), 0.0)
    assert new.admission is not old.admission
    new.take_over(old)
    assert new.admission is old.admission
    page = Page(new.metrics_page("").body.decode())
    assert page.value("exchanges_total", route=PATH) == 1
    await link.close()


async def test_counts_are_published_from_time_to_time(
    upstream, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("proxy.listener.PUBLISH_S", 0.05)
    assert PUBLISH_S > 1
    upstream.script(ANSWER)
    settings = load({"modelConfiguration": model_configuration(upstream.url)})
    async with (
        running(settings, board=Board(tmp_path, 0)) as one,
        running(settings, board=Board(tmp_path, 1)) as two,
    ):
        await two.chat()
        async with asyncio.timeout(2):
            while not (await scrape(one.url)).value("exchanges_total", route=PATH):
                pass


async def test_directory_that_is_gone_costs_the_sharing_only(
    upstream, tmp_path: Path, caplog
):
    upstream.script(ANSWER)
    settings = load({"modelConfiguration": model_configuration(upstream.url)})
    async with running(settings, board=Board(tmp_path / "gone", 0)) as proxy:
        assert (await proxy.chat()).status == 200
        assert (await scrape(proxy.url)).value("exchanges_total") == 1
    assert "metrics of this process are not shared" in caplog.text
