"""Who used how much: requests and tokens by user, day and feature, in memory.

A request counts once an upstream took it on; what failed before cost nothing. Requests
are counted with the metrics, and arrive here as sums.
"""

import time

import msgspec

from proxy.dialects.base import JSON, Reply

KEPT_DAYS = 31
DAY_S = 86_400
# As instances and gateways call the features.
FEATURES = {"chat": "chat_completions", "code": "code_completions"}


class Tally(msgspec.Struct, rename="camel", gc=False):
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, more: "Tally") -> None:
        self.requests += more.requests
        self.prompt_tokens += more.prompt_tokens
        self.completion_tokens += more.completion_tokens


class Day(msgspec.Struct):
    """One day, in UTC."""

    date: str
    features: dict[str, Tally]


class Used(msgspec.Struct):
    """What was used: by user and feature since the start, and on each day, which is
    counted from 1970.
    """

    totals: dict[tuple[str, str], Tally] = {}
    days: dict[int, dict[tuple[str, str], Tally]] = {}

    def add(self, more: "Used") -> None:
        for key, tally in more.totals.items():
            self.totals.setdefault(key, Tally()).add(tally)
        for day, tallies in more.days.items():
            sums = self.days.setdefault(day, {})
            for key, tally in tallies.items():
                sums.setdefault(key, Tally()).add(tally)

    def of(self, user: str) -> list[Day]:
        """Return the user's days, the latest first; those without use are left out."""
        days = []
        for day, tallies in sorted(self.days.items(), reverse=True):
            features = {
                FEATURES.get(feature, feature): tally
                for (name, feature), tally in tallies.items()
                if name == user
            }
            if features:
                date = time.strftime("%Y-%m-%d", time.gmtime(day * DAY_S))
                days.append(Day(date, features))
        return days


class _Usage(msgspec.Struct):
    user: str
    since: str
    days: list[Day]


class UsageCounter:
    """Args: started_s: since when it counts, in seconds of the epoch."""

    def __init__(self, started_s: float) -> None:
        self._since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started_s))
        self.used = Used()

    def add(self, user: str, feature: str, day: int, tally: Tally) -> None:
        """Args: day: on which it was used, counted from 1970."""
        tallies = self.used.days.get(day)
        if tallies is None:
            tallies = self.used.days[day] = {}
            self._forget(day - KEPT_DAYS)
        for sums in (tallies, self.used.totals):
            sums.setdefault((user, feature), Tally()).add(tally)

    def reply(self, user: str, used: Used) -> Reply:
        """Say a user's own use, and nobody else's.

        Args: used: of all processes.
        """
        body = msgspec.json.encode(_Usage(user, self._since, used.of(user)))
        return Reply(200, JSON, body, {"Cache-Control": "no-store"})

    def _forget(self, last: int) -> None:
        days = self.used.days
        self.used.days = {day: tallies for day, tallies in days.items() if day > last}
