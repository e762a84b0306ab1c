"""Which endpoint of a provider is asked next, and which are left alone for a while.

Policy only: nothing here waits or connects, and the time is an argument. Whoever asks
an endpoint says so (``pick``), and how it ended (``finished``): of a stream that is
known at its end, not when its headers come.
"""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Literal, TypeAlias

from proxy.errors import (
    ProxyError,
    UpstreamFault,
    UpstreamReported,
    UpstreamStatus,
    UpstreamUnreachable,
)
from proxy.modelconfig.resolved import Endpoint

Balance: TypeAlias = Literal["least-outstanding", "round-robin", "random"]

# Failures in a row after which an endpoint is left alone. One that cannot be reached
# is left alone at once.
FAILURES = 3
FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0
# Of all requests of a pool, how many more may be asked again: an outage of one endpoint
# must not double the load on the others.
RETRY_SHARE = 0.2
MOST_RETRIES = 10.0


class Member:
    """One endpoint and what is known of how it does.

    ``in_flight`` counts what is asked of it now. While ``now < closed_until_s`` it is
    not asked; after that by one request at a time, until one succeeds.
    """

    __slots__ = (
        "back_off_s",
        "closed_until_s",
        "endpoint",
        "failures",
        "in_flight",
        "is_closed",
        "name",
        "prober",
        "weight",
    )

    def __init__(self, endpoint: Endpoint, weight: int) -> None:
        self.endpoint = endpoint
        self.name = endpoint.name
        self.weight = weight
        self.in_flight = 0
        self.failures = 0
        self.is_closed = False
        # Whose request decides whether it opens again, None if none is out.
        self.prober: object | None = None
        self.closed_until_s = 0.0
        self.back_off_s = FIRST_BACK_OFF_S


class Pool:
    """The endpoints of one provider.

    Args:
        weights: how much of the load each endpoint gets, in relation to the others.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        balance: Balance = "least-outstanding",
        weights: Sequence[int] = (),
        uniform: Callable[[], float] = random.random,
    ) -> None:
        given = weights or [1] * len(endpoints)
        self.members = [
            Member(endpoint, weight)
            for endpoint, weight in zip(endpoints, given, strict=True)
        ]
        self._balance = balance
        self._uniform = uniform
        self._turns = [0.0] * len(self.members)
        self._retries = MOST_RETRIES

    def __len__(self) -> int:
        return len(self.members)

    def pick(
        self, now: float, by: object, tried: Collection[Member] = ()
    ) -> Member | None:
        """Return the endpoint to ask, counted as asked from now on.

        None if all have been ``tried``. If none is open, the one that is to be asked
        again first is asked now: a refusal by it tells more than one by us.

        Args: by: who asks; the same has to be said when it has ``finished``.
        """
        member: Member | None
        if len(self.members) == 1 and not tried:
            member = self.members[0]
        else:
            member = self._pick(now, tried)
        if member is None:
            return None
        if member.is_closed and _may_be_asked(member, now):
            member.prober = by
        member.in_flight += 1
        if not tried:
            self._retries = min(self._retries + RETRY_SHARE, MOST_RETRIES)
        return member

    def _pick(self, now: float, tried: Collection[Member]) -> Member | None:
        left = [member for member in self.members if member not in tried]
        if not left:
            return None
        return self._choose(
            [member for member in left if _may_be_asked(member, now)]
        ) or min(left, key=lambda member: member.closed_until_s)

    def may_retry(self) -> bool:
        """Say whether one more request may be asked again, and count it."""
        if self._retries < 1:
            return False
        self._retries -= 1
        return True

    def finished(
        self,
        member: Member,
        error: ProxyError | None,
        now: float,
        by: object,
        *,
        is_complete: bool,
    ) -> None:
        """Note how a request ended: with an error, or ``is_complete``, or neither since
        the client went away before anything could be known.
        """
        member.in_flight -= 1
        was_probe = member.prober is by
        if was_probe:
            member.prober = None
        if isinstance(error, UpstreamFault) and error.is_sick:
            at_once = isinstance(error, UpstreamUnreachable)
            self._failed(member, now, at_once=at_once, was_probe=was_probe)
        elif is_complete or _is_answer(error):
            member.failures = 0
            if member.is_closed:
                member.is_closed, member.prober = False, None
                member.back_off_s = FIRST_BACK_OFF_S

    def _failed(
        self, member: Member, now: float, *, at_once: bool, was_probe: bool
    ) -> None:
        member.failures += 1
        if member.is_closed:
            if not was_probe:
                return  # asked before it was closed: that counts once
            member.back_off_s = min(2 * member.back_off_s, LONGEST_BACK_OFF_S)
        elif not at_once and member.failures < FAILURES:
            return
        member.is_closed = True
        member.closed_until_s = now + member.back_off_s

    def _choose(self, members: list[Member]) -> Member | None:
        if not members:
            return None
        if self._balance == "random":
            return self._at_random(members)
        if self._balance == "round-robin":
            return self._in_turn(members)
        least = min(member.in_flight / member.weight for member in members)
        return self._at_random(
            [member for member in members if member.in_flight / member.weight == least]
        )

    def _at_random(self, members: list[Member]) -> Member:
        if len(members) == 1:
            return members[0]
        point = self._uniform() * sum(member.weight for member in members)
        for member in members:
            point -= member.weight
            if point < 0:
                return member
        return members[-1]

    def _in_turn(self, members: list[Member]) -> Member:
        """Smooth weighted round-robin: a heavy one does not get all its turns in a row."""
        turns = self._turns
        indices = [i for i, member in enumerate(self.members) if member in members]
        for i in indices:
            turns[i] += self.members[i].weight
        chosen = max(indices, key=lambda i: turns[i])
        turns[chosen] -= sum(self.members[i].weight for i in indices)
        return self.members[chosen]


def _may_be_asked(member: Member, now: float) -> bool:
    return not member.is_closed or (
        now >= member.closed_until_s and member.prober is None
    )


def _is_answer(error: ProxyError | None) -> bool:
    """Whether the endpoint does what it is there for: it refuses this request. One that
    is busy is neither good nor bad.
    """
    return isinstance(error, UpstreamStatus | UpstreamReported) and not error.retryable
