"""What Prometheus is told: counts of exchanges, by labels that no client chooses.

Counting is adding to integers, for many exchanges at once, since the first pays most;
they become samples when somebody asks. The labels are routes, providers, endpoints,
models and users of the configuration, kinds of outcomes and statuses, so their number is
bounded. Of several worker processes one answers for all: each leaves its counts in a
directory, see ``Board``.
"""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from proxy.counts import (
    DURATION_S,
    FAMILIES,
    FIRST_TOKEN_S,
    ExchangeKey,
    Histogram,
    Series,
    SeriesKey,
    Snapshot,
    Values,
)
from proxy.outcome import Outcome
from proxy.usage import DAY_S, Tally, UsageCounter, Used

# How many that have ended are summed up together, within 0.1 ms.
_BATCH = 64
# For how many labels: users times endpoints times kinds could be a lot of memory.
_MAX_SUMS = 1024
# Of a path that is none of the proxy's own: there is no end of those.
OTHER = "other"
# How often a worker leaves its counts, and after how many times that it is taken for
# dead, so that what it had open is not counted any more.
PUBLISH_S = 2.0
DEAD_AFTER_S = 5 * PUBLISH_S

# route, provider, endpoint, model, kind, status, user, feature, and whether an upstream
# took it on
_Labels: TypeAlias = tuple[str, str, str, str, str, int, str, str, bool]
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Snapshot).decode


class _Sums:
    """What the exchanges came to that have all labels in common."""

    # Of a Struct's fields each sum would cost twice as much.
    __slots__ = (
        "adjusted",
        "completion_tokens",
        "count",
        "duration_s",
        "durations",
        "first_token_s",
        "first_tokens",
        "prompt_tokens",
    )

    def __init__(self) -> None:
        self.count = 0
        self.first_tokens = [0] * (len(FIRST_TOKEN_S) + 1)
        self.first_token_s = 0.0
        self.durations = [0] * (len(DURATION_S) + 1)
        self.duration_s = 0.0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.adjusted = 0

    def series(self) -> Series:
        return Series(
            Histogram(self.first_tokens, self.first_token_s),
            Histogram(self.durations, self.duration_s),
            self.prompt_tokens,
            self.completion_tokens,
            self.adjusted,
        )

    def tally(self) -> Tally:
        return Tally(self.count, self.prompt_tokens, self.completion_tokens)


class Metrics:
    """The counts of this process.

    Args: dialects: of each route that is counted under its own name.
          usage: what each user used is counted there.
    """

    def __init__(self, dialects: Mapping[str, str], usage: UsageCounter) -> None:
        self._dialects = dict(dialects)
        self.usage = usage
        self._ended: list[Outcome] = []  # on one day, and in no sum yet
        self._day_s = 0.0
        self._sums: dict[_Labels, _Sums] = {}  # of that day, and not in what follows
        self._exchanges: dict[ExchangeKey, int] = defaultdict(int)
        self._series: dict[SeriesKey, Series] = defaultdict(Series)
        self._limits: dict[str, int] = defaultdict(int)
        self._readers: dict[str, Callable[[], Values]] = {}
        self._before = Snapshot()

    def name(self, dialects: Mapping[str, str]) -> None:
        """Count other routes under their own names from now on."""
        self._settle()
        self._dialects = dict(dialects)

    def read(self, name: str, reader: Callable[[], Values]) -> None:
        """Let ``reader`` say one of ``FAMILIES`` whenever somebody asks."""
        assert name in FAMILIES, name
        self._readers[name] = reader

    def count(self, outcome: Outcome, now_s: float) -> None:
        """Count one exchange; it has ended, and nothing of it may change any more.

        Args: now_s: Unix time.
        """
        if not self._day_s <= now_s < self._day_s + DAY_S:  # or the clock was set
            self._settle()
            self._day_s = now_s // DAY_S * DAY_S
        ended = self._ended
        ended.append(outcome)
        if len(ended) >= _BATCH:
            self._sum_up()

    def _sum_up(self) -> None:
        dialects, limits, all_sums = self._dialects, self._limits, self._sums
        for outcome in self._ended:
            route = outcome.route
            labels = (
                route if route in dialects else OTHER,
                outcome.provider,
                outcome.endpoint,
                outcome.model,
                outcome.kind,
                outcome.status,
                outcome.user,
                outcome.feature,
                200 <= outcome.upstream_status < 300,
            )
            sums: _Sums | None = all_sums.get(labels)
            if sums is None:
                sums = all_sums[labels] = _Sums()
            sums.count += 1
            if (seconds := outcome.first_token_s) is not None:
                sums.first_tokens[bisect_left(FIRST_TOKEN_S, seconds)] += 1
                sums.first_token_s += seconds
            if (seconds := outcome.duration_s) is not None:
                sums.durations[bisect_left(DURATION_S, seconds)] += 1
                sums.duration_s += seconds
            if tokens := outcome.prompt_tokens:
                sums.prompt_tokens += tokens
            if tokens := outcome.completion_tokens:
                sums.completion_tokens += tokens
            if outcome.adjusted:
                sums.adjusted += 1
            if outcome.limit:
                limits[outcome.limit] += 1
        self._ended.clear()
        if len(all_sums) > _MAX_SUMS:
            self._settle()

    def _settle(self) -> None:
        """Bring everything up to date: before it is read, and when a day is over."""
        if self._ended:
            self._sum_up()
        day = int(self._day_s // DAY_S)
        for labels, sums in self._sums.items():
            route, provider, endpoint, model, kind, status, user, feature, took = labels
            dialect = self._dialects.get(route, OTHER)
            key = (route, dialect, provider, endpoint, model, kind, status)
            self._exchanges[key] += sums.count
            if model:  # else nobody was asked
                self._series[dialect, provider, model].add(sums.series())
            if feature and took:
                self.usage.add(user, feature, day, sums.tally())
        self._sums.clear()

    def snapshot(self) -> bytes:
        return _encode(self._snapshot())

    def restore(self, snapshot: bytes) -> None:
        """Go on from what a process counted that was here before, so that a counter
        never goes back. Raises: ValueError: it is no snapshot.
        """
        try:
            self._before = Snapshot()
            self._before.add(_decode(snapshot), gauges=False)
        except msgspec.MsgspecError as error:
            raise ValueError(f"no snapshot of this version: {error}") from None

    def page(self, accept: str, others: Iterable[bytes] = ()) -> tuple[bytes, str]:
        """Return what to answer to Prometheus, and its content type.

        Args: accept: the header.
              others: snapshots of the other processes; what is none is left out.
        """
        # Where nobody asks, its library is 10 ms of each start, and 1 MiB.
        from proxy import prometheus

        return prometheus.page(self._whole(others), accept)

    def used(self, others: Iterable[bytes] = ()) -> Used:
        """Return what was used, in the other processes as well."""
        return self._whole(others).used

    def _whole(self, others: Iterable[bytes]) -> Snapshot:
        whole = self._snapshot()
        for snapshot in others:
            add(whole, snapshot)
        return whole

    def _snapshot(self) -> Snapshot:
        self._settle()
        whole = Snapshot()
        whole.add(self._before)
        others = {name: dict(read()) for name, read in self._readers.items()}
        used = self.usage.used
        whole.add(Snapshot(self._exchanges, self._series, self._limits, others, used))
        return whole


def add(whole: Snapshot, snapshot: bytes) -> None:
    try:
        whole.add(_decode(snapshot))
    except (msgspec.MsgspecError, ValueError):
        return  # of another version: one that is being replaced


class Board:
    """Where the processes of one proxy leave their snapshots for one another.

    A file for each ``slot``, which is a number that a worker keeps when it is replaced;
    the new one goes on from what the file says.
    """

    def __init__(self, directory: Path, slot: int) -> None:
        self._directory = directory
        self._own = directory / f"{slot}.metrics"

    def left(self) -> bytes | None:
        """What the process in this slot left behind."""
        try:
            return self._own.read_bytes()
        except OSError:
            return None

    def publish(self, snapshot: bytes) -> None:
        """Raises: OSError: the directory cannot be written to."""
        draft = self._own.with_suffix(".draft")
        draft.write_bytes(snapshot)
        os.replace(draft, self._own)  # nobody reads half of it

    def others(self, now_s: float) -> list[bytes]:
        """Return what the other processes left, of dead ones without their gauges.

        Args: now_s: Unix time.
        """
        found = []
        for path in sorted(self._directory.glob("*.metrics")):
            if path == self._own:
                continue
            try:
                snapshot, left_s = path.read_bytes(), path.stat().st_mtime
            except OSError:
                continue
            is_dead = now_s - left_s > DEAD_AFTER_S
            found.append(_counters(snapshot) if is_dead else snapshot)
        return found


def _counters(snapshot: bytes) -> bytes:
    whole = Snapshot()
    try:
        whole.add(_decode(snapshot), gauges=False)
    except (msgspec.MsgspecError, ValueError):
        return b""
    return _encode(whole)
