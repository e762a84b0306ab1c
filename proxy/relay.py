"""The pump: the loop between an upstream's reply and the client's, and its clock.

It decides only when something is said. No status line before the first meaningful
event; one write per read; after the first byte nothing but the rest of the reply or
its error. A slow client slows the upstream: nothing is queued in between.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import msgspec

from proxy.completion import CompletionRequest
from proxy.config import KeepAlive
from proxy.dialects.adjust import ReplyFixer
from proxy.dialects.base import EVENT_STREAM, JSON, Writer, media_type
from proxy.errors import (
    ClientFault,
    DeadlineExceeded,
    FirstTokenTimeout,
    HeadersTimeout,
    ProxyError,
    ShuttingDown,
    TokenGapTimeout,
    UpstreamFault,
    UpstreamStatus,
    drop_traceback,
)
from proxy.exchange import Exchange
from proxy.log import ExchangeLog
from proxy.modelconfig.resolved import Timeouts
from proxy.outcome import Outcome, rounded
from proxy.passthrough import PassedBody, PassThrough
from proxy.providers.base import Call
from proxy.redact import BUG, Redactor
from proxy.response import Response, render
from proxy.stops import Cutter
from proxy.translation import Translation
from proxy.upstream import Prepared, Upstream, UpstreamCall, UpstreamReply

logger = logging.getLogger(__name__)

# After the finish reason only usage can follow; some servers never say that it won't.
GRACE_S = 2.0
# How long a client that does not read may hold up its own last bytes.
LAST_WRITE_S = 5.0
# Most of an upstream's error body that is read, and that is shown.
ERROR_BODY_BYTES = 64 * 1024
ERROR_SHOWN_BYTES = 1024
ERROR_BODY_S = 2.0
# How far a relay looks ahead for what is due.
AHEAD_S = 2.0
# Upstreams may call the type of their replies what they like.
_MOST_HEADS = 64

# What of an upstream's headers may reach the client beside an error.
_SAFE_HEADERS = ("retry-after", "request-id")
_SAFE_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
_TOLD_PREFIXES = (
    *_SAFE_PREFIXES,
    *("openai-", "x-compute-", "x-total-time", "x-validation-time", "x-queue-time"),
    *("x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens"),
)


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all relays of one model at one path.

    ``source`` is what the upstream is called in errors about its status; ``event_bytes``
    the most bytes of one event; ``verbose``: log what goes to and comes from the
    upstream; ``timeouts``: how long the upstream may take, ``connect_s`` among them, which
    every request asks for; ``keep_alive``: what to say while it is silent;
    ``reply_headers``: what a successful reply carries besides;
    ``clients_credential``: the upstream was asked with the client's own credential, so
    that its refusal is the client's to hear; ``shortest_s``: what ``shortest`` says of
    the clocks; ``heads``: of replies that were said.
    """

    upstream: Upstream
    loop: asyncio.AbstractEventLoop
    log: ExchangeLog
    redact: Redactor
    source: str
    event_bytes: int
    verbose: bool
    timeouts: Timeouts
    connect_s: float
    keep_alive: KeepAlive
    reply_headers: dict[str, str]
    clients_credential: bool
    shortest_s: float
    heads: dict[tuple[int, bool, str, type[Writer]], bytes] = {}


def shortest(timeouts: Timeouts, keep_alive: KeepAlive) -> float:
    """Return how long nothing can be due in a stream."""
    clocks_s = (
        timeouts.headers_s,
        timeouts.first_token_s,
        timeouts.between_tokens_s,
        keep_alive.every_s,
    )
    return min(each_s for each_s in clocks_s if each_s)


class Relay:
    """One call of an upstream and the reply it becomes.

    The socket's callbacks carry each read to the client at once (``_step``). A task is
    only needed where something else has to be waited for: a new connection, a client
    that does not read fast enough, the words of an error. ``begin`` does without one
    until then; with one there is only ``run``.

    Args:
        started_s, timeout_s: when the request came, on the loop's clock, and how long
            its answer may take.
        now_s: when the upstream is asked.
        prepared: the beginning of ``call``, if it is known.
    """

    def __init__(
        self,
        terms: Terms,
        response: Response,
        completion: CompletionRequest,
        writer: Writer,
        call: Call,
        outcome: Outcome,
        started_s: float,
        timeout_s: float,
        now_s: float,
        prepared: Prepared | None = None,
    ) -> None:
        self._terms = terms
        self._response = response
        self._completion = completion
        self._is_stream = completion.stream
        self._writer = writer
        self._call = call
        self._outcome = outcome
        self._started_s = started_s
        self._timeout_s = timeout_s
        self._closing_s = started_s + timeout_s
        self._asked_s = self._quiet_s = now_s
        self._asked: UpstreamCall = terms.upstream.open(
            call.url,
            call.headers,
            call.body,
            outcome.endpoint,
            connect_s=terms.connect_s,
            prepared=prepared,
        )

    # What most relays never change.
    _progress = 0  # of the exchange, when it was last looked at
    _answered_s = 0.0  # when the answer began or last went on
    _spoken = 0  # writes to the client, and their number at the last tick
    _spoken_before = 0
    _unlogged = b""
    _exchange: Exchange | None = None
    _reply: UpstreamReply | None = None
    _reply_type = ""
    _passed_headers: Mapping[str, str] = {}
    _status = 200
    _task: asyncio.Task[object] | None = None
    _stopped: ProxyError | None = None
    _timer: asyncio.TimerHandle | None = None
    _due_s = math.inf
    _event: asyncio.Future[None] | None = None
    error: ProxyError | None = None  # what went wrong, said to the client or not
    _is_over = False  # the last byte was written
    _is_closing = False
    # Until there is a task: whom to tell of the end, whom to ask for a task, and why.
    _ended: Callable[[], None] | None = None
    _call_task: Callable[[], None] | None = None
    _failure: Exception | None = None

    def is_complete(self) -> bool:
        """All was said to the client, and nothing was wrong."""
        return self._is_over and self.error is None

    @property
    def _deadline_s(self) -> float:
        return self._started_s + self._timeout_s

    def forget(self) -> None:
        """Let go of what went wrong, when everybody knows of it.

        An error's traceback leads back to here, and with it to all that was buffered:
        that would stay until the garbage collector comes, which is seldom.
        """
        if self._exchange is not None:
            self._exchange.error = None
        if self.error is not None:
            drop_traceback(self.error)
        self.error = self._stopped = None
        self._failure = self._ended = self._call_task = None
        self._exchange = self._reply = self._event = self._task = None

    def interrupt(self) -> None:
        """End the reply now, with an error that the client understands."""
        self._stop(ShuttingDown())

    def begin(self, ended: Callable[[], None], call_task: Callable[[], None]) -> None:
        """Ask, and say the reply without a task, as far as that goes.

        In a later turn one of them is called, once: ``ended`` when all is said, or
        ``call_task`` when from now on ``run`` is needed.
        """
        self._ended, self._call_task = ended, call_task
        self._response.outbox = self._terms.upstream.outbox
        if self._terms.verbose:
            self._log_request()
        try:
            is_asked = self._asked.start_now(self._step)
        except Exception as error:  # for the task to say
            self._failure, is_asked = error, False
        if is_asked:
            self._due_s = self._closing_s
            if self._is_stream:
                # Not when it is due, but before: then it is looked at closely.
                early_s = self._asked_s + self._terms.shortest_s
                self._due_s = min(self._due_s, early_s)
            self.look_ahead(self._asked_s + AHEAD_S)
        else:
            self._terms.loop.call_soon(self._wake)

    def abandon(self) -> None:
        """The client is gone, and there is no task that could be told so."""
        self._ended = self._call_task = None
        self._put_away()

    async def run(self) -> None:
        """Say the whole reply, or what is left of it.

        Raises: ProxyError: it failed before anything was said to the client.
                ConnectionError: the client is gone.
        """
        self._task = asyncio.current_task(self._terms.loop)
        self._set_clock()
        try:
            await self._converse()
        except asyncio.CancelledError:
            # Either the client is gone, or we wanted to stop waiting.
            if self._stopped is None or self._task is None or self._task.uncancel():
                raise
            self._say_failure(self._stopped)
        except (UpstreamFault, ShuttingDown) as fault:
            self._say_failure(fault)
        except (ConnectionError, ClientFault):
            raise
        except Exception:
            # A bug: what was begun must still be ended as the client expects.
            if not self._response.is_begun:
                raise
            logger.error(BUG, self._outcome.id, self._terms.redact.trace())
            self._say_failure(
                ProxyError(f"internal error, logged as {self._outcome.id}")
            )
        finally:
            self._put_away()
        if self._response.is_clogged():
            await self._last_drain()

    def _put_away(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._asked.drop()
        if self._unlogged:  # a last line without an end
            self._log_data(len(self._unlogged))

    async def _converse(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._reply is None:
            if self._terms.verbose and self._call_task is None:
                self._log_request()
            head = await self._asked.start()
            # The task has waited, so whatever aiohttp writes next comes in a later turn.
            self._response.outbox = self._terms.upstream.outbox
            self._receive(head)
        reply, exchange = self._reply, self._exchange
        assert reply is not None
        if exchange is None:
            reply.listen(None)
            raise await self._status_fault(reply)
        if not (self._is_over or self._response.is_clogged()):
            self._step_on(reply, exchange)
        reply.listen(self._step)
        while not self._is_over:
            if self._response.is_clogged():
                await self._hold(reply)
            else:
                self._event = self._terms.loop.create_future()
                await self._event
                if self._stopped is not None:
                    raise self._stopped
            if not (self._is_over or self._response.is_clogged()):
                # What came while nobody listened is not announced again.
                self._step_on(reply, exchange)
        self._asked.finish()

    def _receive(self, reply: UpstreamReply) -> None:
        """The upstream's status is known: say what its reply becomes."""
        call, outcome = self._call, self._outcome
        self._reply = reply
        outcome.upstream_status = reply.status
        if self._terms.verbose:
            self._terms.log.upstream_reply(outcome.id, reply.status, dict(reply.pairs))
        if not 200 <= reply.status < 300 and call.adjust:
            return
        self._status = 200 if call.adjust else reply.status
        self._reply_type = reply.header("content-type")
        if call.native:
            self._passed_headers = _told(reply)
        self._exchange = self._new_exchange()
        self._exchange.is_started = self._response.is_begun

    async def _hold(self, reply: UpstreamReply) -> None:
        """Let the upstream wait for a slow client: nothing is queued in between."""
        self._event = None
        reply.pause()
        await self._response.drain()
        reply.resume()
        if self._answered_s:  # none of that time was the upstream's
            self._answered_s = self._terms.loop.time()

    def _step(self) -> None:
        """Called by the upstream's socket when something has come."""
        event = self._event
        if self._ended is None if event is None else event.done():
            return  # the task goes on by itself, or will once it runs
        try:
            if self._exchange is None:
                if (reply := self._asked.reply()) is not None:
                    self._receive(reply)
                elif not self._asked.is_failed:
                    return
                if self._exchange is None:
                    self._wake()
                    return
            assert self._reply is not None
            self._step_on(self._reply, self._exchange)
        except Exception as error:
            self._fail(error)
            return
        if self._response.is_clogged():
            self._wake()
        elif self._is_over:
            if event is not None:
                event.set_result(None)
            elif self._ended is not None:
                ended, self._ended, self._call_task = self._ended, None, None
                self._asked.finish()
                self._put_away()
                ended()

    def _step_on(self, reply: UpstreamReply, exchange: Exchange) -> None:
        """Say what has arrived."""
        out = b""
        if data := reply.take():
            if self._terms.verbose:
                self._note_data(data)
            out = exchange.receive_data(data)
        is_going_on = reply.is_going_on()
        if not (is_going_on or exchange.is_ended) and reply.is_complete():
            out += exchange.receive_eof()
        if exchange.progress != self._progress:
            self._note_progress(exchange.progress)
        if exchange.is_ended:
            self._outcome.kind = "ok"
            if exchange.error is not None:
                self._note(exchange.error)
            self._end(out)
            return
        if out:
            self._write(out)
        if not (is_going_on or data) and (failure := reply.failure) is not None:
            raise failure
        if not self._is_closing and exchange.is_finishing():
            self._wait_a_little()
        if not is_going_on:
            self._look_again(reply, bool(data))

    def _look_again(self, reply: UpstreamReply, has_come: bool) -> None:
        """There may be more to take, or to say, of which nobody will tell."""
        is_more = reply.has_more or (has_come and reply.failure is not None)
        if is_more and not self._response.is_clogged():
            self._terms.loop.call_soon(self._step)

    def _note_progress(self, progress: int) -> None:
        """The answer has begun, or gone on."""
        self._progress = progress
        now_s = self._terms.loop.time()
        if not self._answered_s and self._outcome.first_token_s is None:
            self._outcome.first_token_s = rounded(now_s - self._started_s)
        self._answered_s = now_s

    def _wait_a_little(self) -> None:
        """The answer is complete; its usage may follow, or never come."""
        self._is_closing = True
        self._closing_s = min(self._deadline_s, self._terms.loop.time() + GRACE_S)
        self._set_clock()

    def _wake(self) -> None:
        """Let the task go on; if there is none, there has to be one now."""
        if self._event is not None:
            if not self._event.done():
                self._event.set_result(None)
        elif self._task is None and self._ended is not None:
            self._ended = None
            if self._call_task is not None:
                self._call_task()

    def _fail(self, error: Exception) -> None:
        """Let the task deal with an error."""
        if self._event is not None:
            if not self._event.done():
                self._event.set_exception(error)
        else:
            self._failure = self._failure or error
            self._wake()

    # -------------------------------------------------------------------------- clocks

    def _set_clock(self) -> None:
        """Wake up when the next thing is due. What the events do to that is only noted:
        then it is looked at again.
        """
        terms, due_s = self._terms, self._closing_s
        now_s = terms.loop.time()
        if self._is_stream:
            due_s = min(
                due_s,
                self._expected_s()[0],
                # The answer may begin, or the client read again, the moment after this.
                now_s + terms.timeouts.between_tokens_s,
                self._quiet_s + (terms.keep_alive.every_s or math.inf),
            )
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due_s = due_s
        self.look_ahead(now_s + AHEAD_S)

    def look_ahead(self, until_s: float) -> None:
        """Set a timer if something is due before ``until_s``.

        To be called every now and then, at least twice in ``AHEAD_S``: most replies
        have ended by then, and were spared a timer, which costs more than the look.
        """
        if self._due_s < until_s and self._timer is None:
            self._timer = self._terms.loop.call_at(self._due_s, self._tick)

    def _expected_s(self) -> tuple[float, type[DeadlineExceeded], str]:
        """When the upstream must have done what, and how its failure is called."""
        timeouts = self._terms.timeouts
        if self._is_stream and self._answered_s:
            if not self._response.is_clogged():  # else it is the client's turn
                due_s = self._answered_s + timeouts.between_tokens_s
                return due_s, TokenGapTimeout, "go on with its answer"
        elif self._is_stream:
            headers_s, first_s = timeouts.headers_s, timeouts.first_token_s
            if self._reply is not None or headers_s is None:
                headers_s = math.inf
            if first_s is not None and first_s < headers_s:
                due_s = self._asked_s + first_s
                return due_s, FirstTokenTimeout, "begin its answer"
            if headers_s < math.inf:
                due_s = self._asked_s + headers_s
                return due_s, HeadersTimeout, "begin its reply"
        return self._deadline_s, DeadlineExceeded, "complete the reply"

    def _tick(self) -> None:
        now_s = self._terms.loop.time()
        due_s, kind, what = self._expected_s()
        if now_s >= self._closing_s:  # be it that nothing but usage was missing
            self._stop(self._late(DeadlineExceeded, "complete the reply"))
        elif now_s >= due_s:
            self._stop(self._late(kind, what))
        else:
            with contextlib.suppress(ConnectionError):  # the task is told of that, too
                self._speak_again(now_s)
            self._set_clock()

    def _late(self, kind: type[DeadlineExceeded], what: str) -> DeadlineExceeded:
        limits_s = {
            HeadersTimeout: self._terms.timeouts.headers_s,
            FirstTokenTimeout: self._terms.timeouts.first_token_s,
            TokenGapTimeout: self._terms.timeouts.between_tokens_s,
        }
        limit_s = limits_s.get(kind) or self._timeout_s
        return kind(
            f"context deadline exceeded: the upstream did not {what} within "
            f"{limit_s * 1000:.0f} ms"
        )

    def _speak_again(self, now_s: float) -> None:
        """Let a client that has heard nothing for a while know that we are there."""
        if self._spoken != self._spoken_before:
            self._spoken_before, self._quiet_s = self._spoken, now_s
        if now_s < self._quiet_s + self._terms.keep_alive.every_s:
            return  # looked at for another reason
        self._quiet_s = now_s
        response, exchange = self._response, self._exchange
        if response.is_clogged() or self._is_over:
            return
        if not response.is_begun and not self._terms.keep_alive.before_first_token:
            return
        if not self._is_stream or not self._call.adjust:
            return
        if not (out := self._writer.keep_alive()):
            return
        if not response.is_begun:
            headers = dict(self._writer.stream_headers) | self._terms.reply_headers
            response.begin(200, render(200, headers), out)
            if exchange is not None:
                exchange.is_started = True
        else:
            response.write(out)

    def _stop(self, error: ProxyError) -> None:
        """Stop waiting, whatever for."""
        if self._stopped is not None or self._is_over:
            return
        self._stopped = error
        if self._task is None:
            self._fail(error)
        elif self._event is None:  # connecting, or waiting for a slow client
            self._task.cancel()
        else:
            self._wake()

    # ------------------------------------------------------------------------- reading

    def _new_exchange(self) -> Exchange:
        """Translate, or pass on what is of the client's dialect and form already."""
        call = self._call
        is_stream = _IS_STREAM[self._reply_type]
        if call.native and (is_stream == self._is_stream or not call.adjust):
            if not is_stream:
                return PassedBody(
                    call.reader,
                    dialect=call.native if call.adjust else "",
                    limit_bytes=self._terms.event_bytes,
                    redact=self._terms.redact,
                )
            return PassThrough(
                call.reader,
                self._writer,
                dialect=call.native,
                limit_bytes=self._terms.event_bytes,
                fixer=ReplyFixer(call.native) if call.adjust else None,
                several=call.several,
                redact=self._terms.redact,
            )
        cutter = Cutter(call.stops, call.ends) if call.stops or call.ends else None
        return Translation(
            call.reader,
            self._writer,
            stream=self._is_stream,
            content_type=self._reply_type,
            limit_bytes=self._terms.event_bytes,
            cutter=cutter,
            redact=self._terms.redact,
        )

    def _note_data(self, data: bytes) -> None:
        self._unlogged += data  # seldom asked for, so never mind the copies
        # Lines as a whole: half of a credential would not be recognised as one.
        if end := data.rfind(b"\n") + 1:
            self._log_data(len(self._unlogged) - len(data) + end)

    def _log_data(self, end: int) -> None:
        self._terms.log.upstream_data(self._outcome.id, self._unlogged[:end])
        self._unlogged = self._unlogged[end:]

    def _log_request(self) -> None:
        call = self._call
        self._terms.log.upstream_request(
            self._outcome.id, call.url, call.headers, call.body
        )

    async def _status_fault(self, reply: UpstreamReply) -> UpstreamStatus:
        headers = reply.named(_is_safe)
        body = b""
        # Whatever becomes of the body, the status is what the client needs to know.
        with contextlib.suppress(UpstreamFault, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_S):
                while len(body) < ERROR_BODY_BYTES and (data := await reply.read()):
                    if self._terms.verbose:
                        self._note_data(data)
                    body += data
        # A character cut in two at the limit is left out.
        cut = body[:ERROR_SHOWN_BYTES]
        errors = "ignore" if len(body) > ERROR_SHOWN_BYTES else "replace"
        text = cut.decode(errors=errors).strip()
        fault = UpstreamStatus(
            self._terms.source, reply.status, text, headers=_printable(headers)
        )
        fault.is_clients_credential = self._terms.clients_credential
        return fault

    # ------------------------------------------------------------------------- writing

    def _write(self, out: bytes) -> None:
        self._spoken += 1
        if self._response.is_begun:
            self._response.write(out)
        else:
            head = self._head(self._adjusted(), is_stream=True)
            self._response.begin(self._status, head, out)

    def _head(self, adjusted: Sequence[str], *, is_stream: bool) -> bytes:
        """The beginning of the reply's head, mostly that of the one before."""
        if self._passed_headers or adjusted:
            return render(self._status, self._headers(adjusted, is_stream=is_stream))
        # A kind of writer has the same headers for all replies.
        key = (self._status, is_stream, self._reply_type, type(self._writer))
        heads = self._terms.heads
        if (head := heads.get(key)) is None:
            head = render(self._status, self._headers([], is_stream=is_stream))
            if len(heads) < _MOST_HEADS:
                heads[key] = head
        return head

    def _headers(self, adjusted: Sequence[str], *, is_stream: bool) -> dict[str, str]:
        headers = dict(self._writer.stream_headers) if is_stream else {}
        if isinstance(self._exchange, Translation):
            if not is_stream:
                headers["Content-Type"] = JSON
        else:
            headers |= self._passed_headers
            if self._reply_type:
                headers["Content-Type"] = self._reply_type
        headers |= self._terms.reply_headers
        if adjusted:
            headers["X-Proxy-Adjusted"] = ", ".join(adjusted)
        return headers

    def _adjusted(self) -> Sequence[str]:
        names = self._call.adjusted
        if dropped := self._completion.dropped:  # by every attempt the same ones
            names = [*(f"request.{name}" for name in dict.fromkeys(dropped)), *names]
        exchange = self._exchange
        if exchange is not None and (mended := exchange.adjusted()):
            names = [*names, *mended]
        return names

    def _end(self, out: bytes) -> None:
        """Write the last bytes together with the end of the body."""
        self._is_over = True
        adjusted = self._adjusted()
        if adjusted:
            self._outcome.adjusted = tuple(adjusted)
        response = self._response
        if response.is_begun:
            response.end(out)
            return
        exchange, is_stream = self._exchange, self._is_stream
        if exchange is not None and not isinstance(exchange, Translation):
            is_stream = isinstance(exchange, PassThrough)
        head = self._head(adjusted, is_stream=is_stream)
        if is_stream:
            response.begin(self._status, head, out, is_all=True)
        else:
            response.whole(self._status, head, out)

    def _say_failure(self, error: ProxyError) -> None:
        """Say an error after the start of the reply. Raises it if there was none."""
        self._note(error)
        exchange, is_begun = self._exchange, self._response.is_begun
        if not is_begun and (exchange is None or exchange.is_ended):
            raise error
        if exchange is None:  # only that we are there was said
            error.message = self._terms.redact(error.message)
            self._end(self._writer.error(error))
            return
        if exchange.is_ended:
            self._abort()  # all was said, but the client does not take it
        try:
            out = exchange.receive_failure(error)
        except ProxyError:
            raise
        except Exception:
            # A bug in saying it. A second reply must not follow within the first.
            if not is_begun:
                raise
            logger.error(BUG, self._outcome.id, self._terms.redact.trace())
            self._abort()
        if exchange.error is not None:
            self._note(exchange.error)
        else:  # it came after the end of the answer
            self.error = None
            self._outcome.kind, self._outcome.error = "ok", ""
        if self._call.native and not self._call.adjust and exchange.error is not None:
            # Bytes as they are: then a broken stream can only be broken here, too.
            self._abort()
        self._end(out)

    async def _last_drain(self) -> None:
        """The client has its last bytes to read; one that does not is not waited for."""
        now_s = self._terms.loop.time()
        is_whole = self._outcome.kind == "ok"
        end_s = max(now_s + LAST_WRITE_S, is_whole and self._deadline_s)
        try:
            async with asyncio.timeout_at(end_s):
                await self._response.drain()
        except TimeoutError:
            self._abort()

    def _abort(self) -> NoReturn:
        self._response.abort()
        raise ConnectionResetError("aborted")

    def _note(self, error: ProxyError) -> None:
        self.error = error
        self._outcome.kind = error.kind
        self._outcome.error = error.log_text


def _told(reply: UpstreamReply) -> dict[str, str]:
    """What a reply that passes through keeps of its headers: what it says of itself."""
    headers = reply.named(_is_told)
    return _printable(headers) if headers else headers


class _Answers(dict[str, bool]):
    """What ``ask`` says of a text; most replies have the same few."""

    def __init__(self, ask: Callable[[str], bool]) -> None:
        self._ask = ask

    def __missing__(self, text: str) -> bool:
        answer = self._ask(text)
        if len(self) < 1024 and len(text) < 64:
            self[text] = answer
        return answer


# By content types, and by names of headers.
_IS_STREAM = _Answers(lambda text: media_type(text) == EVENT_STREAM)
_is_told = _Answers(lambda name: name.startswith(_TOLD_PREFIXES)).__getitem__


def _is_safe(name: str) -> bool:
    """Headers of an upstream's error that help the client, and nothing else: not its
    cookies, not its lengths and encodings, which are those of another body.
    """
    return name in _SAFE_HEADERS or name.startswith(_SAFE_PREFIXES)


def _printable(headers: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if value.isascii() and value.isprintable()
    }
