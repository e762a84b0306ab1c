"""Which endpoint is asked next: the policy by itself, with a clock that is a number."""

import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, strategies as st

from proxy.errors import (
    ConnectTimeout,
    DeadlineExceeded,
    FirstTokenTimeout,
    HeadersTimeout,
    InvalidRequest,
    ProxyError,
    ShuttingDown,
    TokenGapTimeout,
    UpstreamGarbled,
    UpstreamReported,
    UpstreamStatus,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.modelconfig.resolved import Endpoint
from proxy.pool import (
    FAILURES,
    FIRST_BACK_OFF_S,
    LONGEST_BACK_OFF_S,
    MOST_RETRIES,
    RETRY_SHARE,
    Member,
    Pool,
)

REFUSED = UpstreamUnreachable("refused")


def pool_of(number: int, balance="least-outstanding", weights=(), seed=0) -> Pool:
    endpoints = [Endpoint(f"http://{chr(97 + i)}") for i in range(number)]
    return Pool(endpoints, balance, weights, random.Random(seed).random)


def status(code: int) -> UpstreamStatus:
    return UpstreamStatus("OpenAI", code, "")


def ask(
    pool: Pool,
    error: ProxyError | None = None,
    now: float = 0.0,
    *,
    is_complete: bool | None = None,
) -> Member:
    """One request from its beginning to its end."""
    by = object()
    member = pool.pick(now, by)
    assert member is not None
    done = error is None if is_complete is None else is_complete
    pool.finished(member, error, now, by, is_complete=done)
    return member


def names(pool: Pool, number: int, now: float = 0.0) -> Counter[str]:
    return Counter(ask(pool, now=now).name for _ in range(number))


# ----------------------------------------------------------------------- balance


def test_round_robin_keeps_to_the_weights_exactly():
    pool = pool_of(3, "round-robin", (5, 1, 2))
    turns = [ask(pool).name for _ in range(16)]
    assert Counter(turns[:8]) == Counter(turns[8:]) == {"a": 5, "b": 1, "c": 2}
    assert "aaaa" not in "".join(turns)  # not all its turns in a row


def test_random_keeps_to_the_weights():
    found = names(pool_of(2, "random", (1, 3)), 4000)
    assert 850 < found["a"] < 1150


def test_least_outstanding_keeps_to_the_weights():
    pool = pool_of(2, weights=(1, 3))
    held: Counter[str] = Counter()
    for by in range(40):
        member = pool.pick(0, by)
        assert member is not None
        held[member.name] += 1
    assert held == {"a": 10, "b": 30}


def test_least_outstanding_takes_any_of_equals():
    found = names(pool_of(2), 400)
    assert min(found.values()) > 100


@pytest.mark.parametrize("balance", ["least-outstanding", "round-robin", "random"])
def test_each_endpoint_is_asked_once_per_request(balance):
    pool = pool_of(3, balance)
    tried: list[Member] = []
    while (member := pool.pick(0, "me", tried)) is not None:
        tried.append(member)
    assert sorted(each.name for each in tried) == ["a", "b", "c"]


# ------------------------------------------------------------------------ ejection

SICK = {
    "status 500": status(500),
    "status 502": status(502),
    "error event": UpstreamReported("", status=503),
    "cut": UpstreamTruncated(""),
    "HTML": UpstreamGarbled(""),
    "no headers": HeadersTimeout(""),
    "no first token": FirstTokenTimeout(""),
    "no next token": TokenGapTimeout(""),
}
WELL = {
    "ok": None,
    "status 400": status(400),
    "status 404": status(404),
    "refused in a stream": UpstreamReported("", status=400),
}
NEITHER = {
    "status 429": status(429),
    "overloaded in a stream": UpstreamReported("", status=429),
    # A client that has little time says nothing about the endpoint.
    "deadline": DeadlineExceeded(""),
    "shutting down": ShuttingDown(),
    "bug": ProxyError("internal error"),
    "client's fault": InvalidRequest(""),
}


def is_closed(pool: Pool, now: float = 0.0) -> bool:
    """Whether the first endpoint is left alone: a pool of two asks it no more."""
    return "a" not in names(pool, 40, now)


def fail(pool: Pool, error: ProxyError | None, times: int, now: float = 0.0) -> None:
    """Let the first endpoint fail, whatever the balance would have chosen."""
    others = pool.members[1:]
    for _ in range(times):
        by = object()
        member = pool.pick(now, by, others)
        assert member is pool.members[0]
        pool.finished(member, error, now, by, is_complete=False)


@pytest.mark.parametrize("name", SICK)
def test_some_failures_in_a_row_close_an_endpoint(name):
    pool = pool_of(2)
    fail(pool, SICK[name], FAILURES - 1)
    assert not is_closed(pool)  # and a success in between starts the count anew
    fail(pool, SICK[name], FAILURES - 1)
    assert not pool.members[0].is_closed
    fail(pool, SICK[name], 1)
    assert is_closed(pool)


@pytest.mark.parametrize("error", [REFUSED, ConnectTimeout("")])
def test_one_that_cannot_be_reached_is_left_alone_at_once(error):
    pool = pool_of(2)
    fail(pool, error, 1)
    assert is_closed(pool)


@pytest.mark.parametrize("name", [*WELL, *NEITHER])
def test_what_closes_no_endpoint(name):
    pool = pool_of(2)
    fail(pool, {**WELL, **NEITHER}[name], 10 * FAILURES)
    assert not is_closed(pool)


@pytest.mark.parametrize("name", WELL)
def test_an_answer_to_the_probe_opens_it(name):
    pool = pool_of(1)
    ask(pool, REFUSED)
    ask(pool, WELL[name], FIRST_BACK_OFF_S, is_complete=WELL[name] is None)
    assert not pool.members[0].is_closed
    assert pool.members[0].back_off_s == FIRST_BACK_OFF_S


@pytest.mark.parametrize("name", [*NEITHER, "client gone"])
def test_a_probe_that_tells_nothing_is_followed_by_another(name):
    pool = pool_of(2)
    fail(pool, REFUSED, 1)
    error = NEITHER.get(name)
    fail(pool, error, 1, now=FIRST_BACK_OFF_S)
    member = pool.members[0]
    assert member.is_closed and member.prober is None
    assert member.back_off_s == FIRST_BACK_OFF_S
    assert not is_closed(pool, FIRST_BACK_OFF_S)


def test_back_off_grows_and_ends():
    pool, now, waits = pool_of(1), 0.0, []
    for _ in range(9):
        ask(pool, REFUSED, now)
        waits.append(pool.members[0].closed_until_s - now)
        now = pool.members[0].closed_until_s
    assert waits == [1, 2, 4, 8, 16, 32, LONGEST_BACK_OFF_S, 60, 60]
    ask(pool, None, now)
    ask(pool, REFUSED, now)
    assert pool.members[0].closed_until_s == now + FIRST_BACK_OFF_S


def test_if_none_is_open_the_next_one_to_open_is_asked():
    pool = pool_of(2)
    fail(pool, REFUSED, 1, now=5)
    ask(pool, REFUSED, 5.25)  # b, since a is left alone
    assert [member.is_closed for member in pool.members] == [True, True]
    assert ask(pool, REFUSED, 5.5).name == "a"  # rather than no one at all
    # That was no probe: the time of neither has changed.
    assert [member.closed_until_s for member in pool.members] == [6, 6.25]


def test_a_request_of_before_is_not_the_probe():
    """An old stream may end, in any way, while the probe is out."""
    pool = pool_of(2)
    (member, other) = pool.members
    for by in ("old", "older", "oldest", "bad"):
        assert pool.pick(0, by, [other]) is member
    pool.finished(member, REFUSED, 0, "bad", is_complete=False)
    assert pool.pick(FIRST_BACK_OFF_S, "probe", [other]) is member
    pool.finished(member, None, 1, "old", is_complete=False)  # its client left
    pool.finished(member, REFUSED, 1, "older", is_complete=False)
    assert member.back_off_s == FIRST_BACK_OFF_S and member.prober == "probe"
    assert is_closed(pool, 1.0)
    pool.finished(member, REFUSED, 1, "probe", is_complete=False)
    assert member.back_off_s == 2 * FIRST_BACK_OFF_S
    pool.finished(member, None, 1, "oldest", is_complete=True)  # it does work
    assert not member.is_closed and member.in_flight == 0


# ------------------------------------------------------------------------ any course

ENDS: list[tuple[ProxyError | None, bool]] = [
    (None, True),
    (None, False),
    (REFUSED, False),
]
ENDS += [(error, False) for error in (*SICK.values(), *NEITHER.values())]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "again", "end", "wait"]),
        st.integers(0, 20),
        st.sampled_from(ENDS),
    ),
    max_size=80,
)
BALANCES = st.sampled_from(["least-outstanding", "round-robin", "random"])


@given(STEPS, BALANCES, st.integers(1, 4), st.integers(0, 9))
def test_any_course_of_requests(steps, balance, number, seed):
    pool = pool_of(number, balance, seed=seed)
    now, identity = 0.0, count()
    # Who asked whom, and whether that was a probe while another endpoint was open.
    out: list[tuple[object, Member, bool]] = []

    def pick(tried: list[Member]) -> None:
        left = [member for member in pool.members if member not in tried]
        is_free = any(not member.is_closed for member in left)
        by = next(identity)
        member = pool.pick(now, by, tried)
        if member is None:
            assert not left
            return
        assert member in left
        if member.is_closed and is_free:
            assert now >= member.closed_until_s
            assert not any(m is member and probes for _, m, probes in out)
        out.append((by, member, member.is_closed and is_free))

    def finish(index: int, error: ProxyError | None, is_complete: bool) -> None:
        by, member, _ = out.pop(index)
        was_closed = member.is_closed
        pool.finished(member, error, now, by, is_complete=is_complete)
        if was_closed and not member.is_closed:  # it is open for all: no probes left
            out[:] = [(b, m, probes and m is not member) for b, m, probes in out]

    for step, number_given, (error, is_complete) in steps:
        if step == "ask":
            pick([])
        elif step == "again" and out:
            pick([out[number_given % len(out)][1]])
        elif step == "end" and out:
            finish(number_given % len(out), error, is_complete)
        else:
            now += number_given / 4
        counted = Counter(member.name for _, member, _ in out)
        for member in pool.members:
            assert member.in_flight == counted[member.name]
            assert FIRST_BACK_OFF_S <= member.back_off_s <= LONGEST_BACK_OFF_S
            assert member.closed_until_s <= now + LONGEST_BACK_OFF_S
    while out:
        finish(0, None, True)
    assert all(member.in_flight == 0 for member in pool.members)
    # Whatever happened, an answer opens an endpoint, and after some time all are asked.
    now += LONGEST_BACK_OFF_S
    for member in pool.members:
        others = [each for each in pool.members if each is not member]
        assert pool.pick(now, member, others) is member
        pool.finished(member, None, now, member, is_complete=True)
    assert not any(member.is_closed or member.prober for member in pool.members)


@given(st.lists(st.booleans(), max_size=300))
def test_the_retry_budget_bounds_the_retries(want_retry):
    pool, retries = pool_of(2), 0
    for is_wanted in want_retry:
        ask(pool)
        retries += is_wanted and pool.may_retry()
    assert retries <= MOST_RETRIES + RETRY_SHARE * len(want_retry)


def test_an_outage_does_not_double_the_load():
    pool = pool_of(2)
    asked = 0
    for _ in range(1000):
        member = pool.pick(0, "me")
        assert member is not None
        asked += 1 + pool.may_retry()
        pool.finished(member, None, 0, "me", is_complete=True)
    assert asked <= 1000 * (1 + RETRY_SHARE) + MOST_RETRIES
