"""Clients of every dialect and of every bad habit, many at once.

Each request carries a number (``client-name=soak&client-version=17``) that the proxy
writes into its log line, and asks a question of its own that the simulator's answer
repeats: a reply that reaches another client than the one who asked is seen at once.
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn, TypeAlias

from proxy.simulator import prose
from tests.soak import servers
from tests.support.client import RawConnection, RawReply, RawStream, build_request
from tests.support.dialects import (
    ANTHROPIC,
    CHAT,
    CODY,
    CODY_1,
    COMPLETIONS,
    LEGACY,
    MODEL,
    PROMPT,
    TGI,
    Dialect,
)

# What a client can make of a request: the answer; an error in its dialect; it hung up
# itself, before or after the head of the reply; the connection broke; or what it sent
# was wrong, and refused as it should be.
Seen: TypeAlias = Literal["", "ok", "error", "left", "left early", "cut", "refused"]

CODE = replace(CODY, name="cody code", path="/.api/completions/code?api-version=2")
DIALECTS = (CODY, CODY_1, LEGACY, CODE, CHAT, COMPLETIONS, ANTHROPIC, TGI)
_CODY_NAMES = {CODY.name, CODY_1.name, LEGACY.name, CODE.name}
# Of a whole session; none may take so long, whatever goes wrong.
HANG_S = 6 * servers.CHAT_S
# Of one reply: its deadline, its last bytes, and what a busy machine takes.
LATE_S = servers.CHAT_S + 8
# A client that waited so long for its reply was surely noticed before it left.
NOTICED_S = 1.5


@dataclass
class Ask:
    """One request and what its client saw; ``id`` is the proxy's name for it."""

    number: int
    dialect: Dialect
    stream: bool
    model: str
    question: str
    request: bytes
    habit: str
    follows: bool = False  # another one that was not yet answered
    connected_s: float = 0.0
    began_s: float = 0.0
    ended_s: float = 0.0
    seen: Seen = ""
    status: int = 0
    id: str = ""
    expected_kinds: frozenset[str] = field(default_factory=frozenset)

    @property
    def tag(self) -> str:
        return f"soak/{self.number}"


class _Broken(Exception):
    """The connection is of no more use."""


class _Connection(RawConnection):
    opened_s = 0.0


class Load:
    """So many clients at once, each in one session after the other.

    Args: habits: the only ones that clients have; all by default.
          faulty: the share of requests for models that fail.
          may_break: whether a connection that was open in between, from when to when,
                     may have broken; by default none may.
    """

    def __init__(
        self,
        url: str,
        seed: int,
        *,
        habits: Collection[str] = (),
        faulty: float = 0.5,
        may_break: Callable[[float, float], bool] = lambda begun_s, ended_s: False,
    ) -> None:
        self.url = url
        self.asks: list[Ask] = []
        self.violations: list[str] = []
        self.open = 0
        self._rng = random.Random(seed)
        self._habits = {
            name: habit
            for name, habit in _HABITS.items()
            if not habits or name in habits
        }
        self._faulty = faulty
        self._may_break = may_break
        self._numbers = seed * 10_000_000
        self._end_s = 0.0

    async def run(self, clients: int, seconds: float) -> None:
        self._end_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._live())

    async def _live(self) -> None:
        habits = self._habits
        names, weights = [*habits], [weight for weight, _ in habits.values()]
        left_s = self._end_s - time.monotonic()
        await asyncio.sleep(self._rng.random() * min(1, left_s / 2))  # not all at once
        while not self._is_over:
            name = self._rng.choices(names, weights)[0]
            self.open += 1
            before = len(self.asks)
            try:
                async with asyncio.timeout(HANG_S):
                    await habits[name][1](self, name)
            except TimeoutError:
                mine = [ask.tag for ask in self.asks[before:] if ask.habit == name]
                self.violations.append(f"{name}: hangs; one of {mine[:5]}")
            except _Broken:
                pass
            except OSError as error:  # at the very connecting
                now_s = time.monotonic()
                if not self._may_break(now_s - 1, now_s):
                    self.violations.append(f"{name}: no connection: {error!r}")
            finally:
                self.open -= 1

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self._end_s

    # ------------------------------------------------------------------------- asking

    def ask(self, habit: str, model: str = "", **headers: str) -> Ask:
        """Make up a request."""
        rng = self._rng
        if not model:
            is_faulty = rng.random() < self._faulty
            faulty = [*servers.FAULTY, servers.RESCUED, servers.DEAD]
            model = rng.choice(
                faulty if is_faulty else [servers.STEADY, servers.TGI, servers.SLOW]
            )
        is_stream = rng.random() < 0.7
        return self._ask(habit, rng.choice(DIALECTS), model, is_stream, headers)

    def _ask(
        self,
        habit: str,
        dialect: Dialect,
        model: str,
        stream: bool,
        headers: dict[str, str],
    ) -> Ask:
        self._numbers += 1
        number = self._numbers
        question = f"Who asks number {number}?"
        body = dialect.body(stream=stream)
        if dialect is not TGI:
            body["model"] = model
        elif "+" in servers.NAMES[model]:  # all its requests go to a TGI as they are
            body["parameters"] = {"adapter_id": servers.NAMES[model]}
        for most in ("max_tokens", "maxTokensToSample"):
            if most in body:
                body[most] = 1000
        text = json.dumps(body).replace(PROMPT, question).replace(MODEL, model)
        tag = f"client-name=soak&client-version={number}"
        path = f"{dialect.path}{'&' if '?' in dialect.path else '?'}{tag}"
        given = {"Authorization": f"Bearer {servers.TOKEN}", **dialect.headers}
        request = build_request(
            self.url, "POST", path, given | headers, text.encode(), False
        )
        ask = Ask(number, dialect, stream, model, question, request, habit)
        self.asks.append(ask)
        return ask

    async def send(
        self, connection: _Connection, ask: Ask, data: bytes | None = None
    ) -> None:
        """Send a request, or ``data`` of it."""
        ask.connected_s = connection.opened_s
        ask.began_s = ask.began_s or time.monotonic()
        try:
            await connection.send(ask.request if data is None else data)
        except ConnectionError as error:
            self._break(ask, repr(error))

    # ------------------------------------------------------------------------ hearing

    async def head(self, connection: _Connection, ask: Ask) -> RawStream:
        """Wait for the head of the reply."""
        try:
            stream = await connection.head()
        except ConnectionError as error:
            self._break(ask, repr(error))
        except AssertionError as error:
            self._break(ask, str(error))
        ask.status = stream.status
        ask.id = stream.header("x-request-id") or ""
        return stream

    async def hear(
        self, connection: _Connection, ask: Ask, pause_s: float = 0.0
    ) -> RawReply:
        """Read the whole reply and judge it; ``pause_s`` before each read."""
        stream = await self.head(connection, ask)
        return await self.rest(stream, ask, pause_s)

    async def rest(self, stream: RawStream, ask: Ask, pause_s: float = 0.0) -> RawReply:
        while await stream.read(HANG_S):
            if pause_s:
                await asyncio.sleep(pause_s)
        if not stream.reply.complete:
            self._break(ask, f"{stream.status}, then {stream.reply.body[-80:]!r}")
        self._judge(ask, stream.reply)
        return stream.reply

    def leave(self, ask: Ask) -> None:
        ask.ended_s = time.monotonic()
        ask.seen = "left" if ask.status else "left early"

    def _break(self, ask: Ask, how: str) -> NoReturn:
        ask.ended_s, ask.seen = time.monotonic(), "cut"
        if not self._may_break(ask.connected_s, ask.ended_s):
            self.blame(ask, f"the connection broke: {how}")
        raise _Broken

    def _judge(self, ask: Ask, raw: RawReply) -> None:
        """Exactly one end, or its dialect's error, and nothing but its own answer."""
        ask.ended_s = time.monotonic()
        took_s = ask.ended_s - ask.began_s
        if took_s > LATE_S and not ask.follows:
            self.blame(ask, f"it took {took_s:.1f} s")
        expected = prose.answer(ask.question)
        try:
            seen = ask.dialect.read(raw, stream=ask.stream)
            if raw.status != 200 and ask.dialect.name not in _CODY_NAMES:
                kind = raw.header("content-type") or ""
                assert kind.startswith("application/json"), kind
            if seen.error is None:
                # TGI ends a stream of completions with its end token, which passes.
                text = seen.text.strip().removesuffix("</s>")
                assert text == expected, f"another text: {seen.text!r}"
            else:
                assert seen.error.strip(), "an error without words"
                is_part = expected.startswith(seen.text.lstrip())
                assert is_part, f"another text: {seen.text!r}"
        except (AssertionError, ValueError, LookupError, TypeError) as error:
            ask.seen = "error"
            self.blame(ask, f"status {raw.status}, {error!r}: {raw.body[-200:]!r}")
            return
        ask.seen = "ok" if seen.error is None else "error"

    def blame(self, ask: Ask, what: str) -> None:
        form = "streamed" if ask.stream else "whole"
        self.violations.append(
            f"{ask.tag} ({ask.habit}, {ask.dialect.name}, {form}, {ask.model}): {what}"
        )

    # ------------------------------------------------------------------------- habits

    async def converse(self, habit: str) -> None:
        """Ask a few questions over one connection."""
        async with self._connected() as connection:
            for _ in range(self._rng.randint(1, 5)):
                ask = self.ask(habit)
                await self.send(connection, ask)
                raw = await self.hear(connection, ask)
                if raw.header("connection") == "close" or self._is_over:
                    return
                await asyncio.sleep(self._rng.random() * 0.1)

    async def hurry(self, habit: str) -> None:
        """Have little time."""
        async with self._connected() as connection:
            ask = self.ask(habit, **{"X-Timeout-Ms": str(self._rng.randint(20, 900))})
            await self.send(connection, ask)
            await self.hear(connection, ask)

    async def be_limited(self, habit: str) -> None:
        """Have a token that allows little."""
        token = {"Authorization": f"token {servers.LIMITED_TOKEN}"}
        async with self._connected() as connection:
            ask = self.ask(habit, servers.STEADY, **token)
            await self.send(connection, ask)
            await self.hear(connection, ask)

    async def pipeline(self, habit: str) -> None:
        """Send the next questions before the first one is answered."""
        async with self._connected() as connection:
            asks = [self.ask(habit) for _ in range(self._rng.randint(2, 4))]
            for number, ask in enumerate(asks):
                ask.connected_s, ask.began_s = connection.opened_s, time.monotonic()
                ask.follows = number > 0
            await self.send(connection, asks[0], b"".join(a.request for a in asks))
            for number, ask in enumerate(asks):
                try:
                    raw = await self.hear(connection, ask)
                except _Broken:
                    raw = None
                if raw is None or raw.header("connection") == "close":
                    for left in asks[number + 1 :]:
                        self.leave(left)
                    return

    async def send_slowly(self, habit: str) -> None:
        async with self._connected() as connection:
            ask = self.ask(habit)
            third = len(ask.request) // 3
            for at in (0, third, 2 * third):
                end = None if at == 2 * third else at + third
                await self.send(connection, ask, ask.request[at:end])
                await asyncio.sleep(self._rng.random() * 0.5)
            await self.hear(connection, ask)

    async def read_slowly(self, habit: str) -> None:
        async with self._connected(receive_buffer=4096) as connection:
            ask = self.ask(habit)
            await self.send(connection, ask)
            await self.hear(connection, ask, pause_s=0.02)

    async def stall(self, habit: str) -> None:
        """Stop reading for a while, mostly where much is said; then go on, or leave."""
        rng = self._rng
        large = servers.FAULTY[servers.FAULTS.index("oversized=900000+after=3")]
        async with self._connected(receive_buffer=4096) as connection:
            ask = self.ask(habit, rng.choice([large, large, ""]))
            await self.send(connection, ask)
            stream = await self.head(connection, ask)
            await asyncio.sleep(rng.uniform(0.5, 4))
            if rng.random() < 0.5:
                self.leave(ask)
                await self._hang_up(connection)
            else:
                await self.rest(stream, ask)

    async def leave_early(self, habit: str) -> None:
        """Hang up within the request, right behind it, or while waiting."""
        rng = self._rng
        async with self._connected() as connection:
            ask = self.ask(habit)
            head = ask.request.index(b"\r\n\r\n") + 4
            cut = rng.choice([head // 2, head, head + 9, None, None, None, None])
            await self.send(connection, ask, ask.request[:cut])
            await asyncio.sleep(rng.choice([0, 0, 0.01, 0.3 * rng.random(), 2]))
            if cut is not None:
                ask.began_s = time.monotonic()  # it was never whole
            self.leave(ask)
            await self._hang_up(connection)

    async def leave_in_between(self, habit: str) -> None:
        """Hang up when some of the reply is there."""
        async with self._connected() as connection:
            ask = self.ask(habit)
            await self.send(connection, ask)
            stream = await self.head(connection, ask)
            for _ in range(self._rng.choice([0, 1, 1, 3, 10, 30])):
                if not await stream.read(HANG_S):
                    break
            if stream.reply.complete:
                self._judge(ask, stream.reply)
            else:
                self.leave(ask)
            await self._hang_up(connection)

    async def send_nonsense(self, habit: str) -> None:
        """Send what must be refused, and be refused as it should be."""
        rng = self._rng
        name, wrong = rng.choice([*_NONSENSE.items()])
        dialect = rng.choice(DIALECTS)
        ask = self._ask(f"{habit}: {name}", dialect, servers.STEADY, True, {})
        ask.request = wrong.make(ask.request)
        ask.expected_kinds = wrong.kinds
        async with self._connected() as connection:
            await self.send(connection, ask)
            stream = await self.head(connection, ask)
            with contextlib.suppress(ConnectionError):
                await stream.rest(HANG_S)
            ask.ended_s, ask.seen = time.monotonic(), "refused"
            if stream.status not in wrong.statuses:
                body = stream.reply.body[:200]
                self.blame(ask, f"status {stream.status} {body!r}")

    @contextlib.asynccontextmanager
    async def _connected(
        self, receive_buffer: int | None = None
    ) -> AsyncIterator[_Connection]:
        connection = await _Connection.open(self.url, receive_buffer)
        connection.opened_s = time.monotonic()
        try:
            yield connection
        finally:
            await connection.close()

    async def _hang_up(self, connection: _Connection) -> None:
        if self._rng.random() < 0.5:
            await connection.reset()
        else:
            await connection.close()


Habit: TypeAlias = Callable[[Load, str], Awaitable[None]]
# How often which; a session of some takes longer than of others.
_HABITS: dict[str, tuple[int, Habit]] = {
    "converses": (40, Load.converse),
    "hurries": (6, Load.hurry),
    "is limited": (6, Load.be_limited),
    "pipelines": (6, Load.pipeline),
    "sends slowly": (5, Load.send_slowly),
    "reads slowly": (8, Load.read_slowly),
    "stalls": (6, Load.stall),
    "leaves early": (12, Load.leave_early),
    "leaves in between": (12, Load.leave_in_between),
    "sends nonsense": (10, Load.send_nonsense),
}


@dataclass(frozen=True)
class _Wrong:
    """``kinds``: of the log line; none if there is nothing to write one about."""

    make: Callable[[bytes], bytes]
    statuses: frozenset[int]
    kinds: frozenset[str] = frozenset()


def _wrong(make: Callable[[bytes], bytes], status: int, *kinds: str) -> _Wrong:
    # TGI says 422 where others say 400.
    statuses = {400, 422} if status == 400 else {status}
    return _Wrong(make, frozenset(statuses), frozenset(kinds))


def _with_body(request: bytes, body: bytes, *lines: bytes) -> bytes:
    head = request.partition(b"\r\n\r\n")[0].split(b"\r\n")
    head = [line for line in head if not line.startswith(b"Content-Length")]
    head += [b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


_TOKEN = f"Bearer {servers.TOKEN}".encode()
_LENGTH = b"Content-Length: "
_NONSENSE = {
    "no token": _wrong(
        lambda r: r.replace(b"Authorization: " + _TOKEN + b"\r\n", b""),
        401,
        "unauthorized",
    ),
    "another token": _wrong(
        lambda r: r.replace(_TOKEN, b"Bearer x"), 401, "unauthorized"
    ),
    "no JSON": _wrong(lambda r: _with_body(r, b'{"a"'), 400, "bad_request"),
    "deep JSON": _wrong(
        lambda r: _with_body(r, b'{"messages":' + b"[" * 5000), 400, "bad_request"
    ),
    "no bytes of gzip": _wrong(
        lambda r: _with_body(r, b"x" * 99, b"Content-Encoding: gzip"),
        400,
        "bad_request",
    ),
    "wrong method": _Wrong(
        lambda r: r.replace(b"POST ", b"PUT ", 1),
        frozenset({405, 404}),  # TGI's clients ask at "/", which others only GET
        frozenset({"method_not_allowed", "unknown_path"}),
    ),
    "unknown path": _wrong(
        lambda r: r.replace(b"POST /", b"POST /nowhere/", 1), 404, "unknown_path"
    ),
    "a body that is too long": _wrong(
        lambda r: r.replace(_LENGTH, _LENGTH + b"99999", 1), 413, "payload_too_large"
    ),
    "two lengths": _wrong(
        lambda r: r.replace(_LENGTH, _LENGTH + b"1\r\n" + _LENGTH), 400
    ),
    "a header that is too long": _wrong(
        lambda r: r.replace(b"\r\n", b"\r\nX-Long: " + b"x" * 40000 + b"\r\n", 1), 431
    ),
    "no HTTP": _wrong(lambda r: b"\x16\x03\x01\x02\x00\x01" + r, 400),
}
