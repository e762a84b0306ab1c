"""The pump: the loop between an upstream's reply and the client's, and its clock.

It decides only when something is said. No status line before the first meaningful
event; one write per read; after the first byte nothing but the rest of the reply or
its error. A slow client slows the upstream: nothing is queued in between.
"""

import asyncio
import contextlib
import logging
import math
from functools import lru_cache
from typing import NoReturn

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
)
from proxy.exchange import Exchange
from proxy.log import ExchangeLog
from proxy.modelconfig.resolved import Timeouts
from proxy.outcome import Outcome
from proxy.passthrough import PassedBody, PassThrough
from proxy.providers.base import Call
from proxy.redact import BUG, Redactor
from proxy.response import Response
from proxy.stops import Cutter
from proxy.upstream import Upstream, UpstreamCall, UpstreamReply

logger = logging.getLogger(__name__)

# After the finish reason only usage can follow; some servers never say that it won't.
GRACE_S = 2.0
# How long a client that does not read may hold up its own last bytes.
LAST_WRITE_S = 5.0
# Most of an upstream's error body that is read, and that is shown.
ERROR_BODY_BYTES = 64 * 1024
ERROR_SHOWN_BYTES = 1024
ERROR_BODY_S = 2.0

# What of an upstream's headers may reach the client beside an error.
_SAFE_HEADERS = ("retry-after", "request-id")
_SAFE_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
_TOLD_PREFIXES = (
    *_SAFE_PREFIXES,
    *("openai-", "x-compute-", "x-total-time", "x-validation-time", "x-queue-time"),
    *("x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens"),
)


class Relay:
    """One call of an upstream and the reply it becomes.

    Until the upstream's status is known a task waits; from then on the socket's
    callbacks carry each read to the client at once (``_step``), and the task only
    waits for the end, or for a client that does not read fast enough.

    Args:
        source: what the upstream is called in errors about its status.
        event_bytes: most bytes of one event.
        verbose: log what goes to and comes from the upstream.
        timeouts: how long the upstream may take.
        keep_alive: what to say while it is silent.
        reply_headers: what a successful reply carries besides.
        clients_credential: the upstream was asked with the client's own credential,
            so that its refusal is the client's to hear.
    """

    def __init__(
        self,
        response: Response,
        completion: CompletionRequest,
        writer: Writer,
        call: Call,
        outcome: Outcome,
        *,
        source: str,
        event_bytes: int,
        redact: Redactor,
        log: ExchangeLog,
        verbose: bool,
        timeouts: Timeouts,
        keep_alive: KeepAlive,
        reply_headers: dict[str, str],
        clients_credential: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._response = response
        self._completion = completion
        self._writer = writer
        self._call = call
        self._outcome = outcome
        self._source = source
        self._event_bytes = event_bytes
        self._redact = redact
        self._log = log
        self._verbose = verbose
        self._timeouts = timeouts
        self._keep_alive = keep_alive
        self._progress = 0  # of the exchange, when it was last looked at
        self._answered_s = 0.0  # when the answer began or last went on
        self._spoken = 0  # writes to the client, and their number at the last tick
        self._spoken_before = 0
        self._quiet_s = 0.0  # since when the client is known to have heard nothing
        self._reply_headers = reply_headers
        self._clients_credential = clients_credential
        self._loop = loop
        self._unlogged = bytearray()
        self._exchange: Exchange | PassThrough | PassedBody | None = None
        self._reply: UpstreamReply | None = None
        self._reply_type = ""
        self._passed_headers: dict[str, str] = {}
        self._status = 200
        self._task: asyncio.Task[object] | None = None
        self._stopped: ProxyError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._event: asyncio.Future[None] | None = None
        self._error: ProxyError | None = None
        self._is_over = False  # the last byte was written
        self._is_closing = False

    @property
    def error(self) -> ProxyError | None:
        """What went wrong, said to the client or not."""
        return self._error

    @property
    def is_complete(self) -> bool:
        """All was said to the client, and nothing was wrong."""
        return self._is_over and self._error is None

    def forget(self) -> None:
        """Let go of what went wrong, when everybody knows of it.

        An error's traceback leads back to here, and with it to all that was buffered:
        that would stay until the garbage collector comes, which is seldom.
        """
        if self._exchange is not None:
            self._exchange.error = None
        self._error = self._stopped = None
        self._exchange = self._reply = self._event = self._task = None

    def interrupt(self) -> None:
        """End the reply now, with an error that the client understands."""
        self._stop(ShuttingDown())

    async def run(self, upstream: Upstream, started_s: float, timeout_s: float) -> None:
        """Say the whole reply.

        Raises: ProxyError: it failed before anything was said to the client.
                ConnectionError: the client is gone.
        """
        self._started_s = started_s
        self._timeout_s = timeout_s
        self._deadline_s = self._closing_s = started_s + timeout_s
        self._task = asyncio.current_task(self._loop)
        self._asked_s = self._quiet_s = self._loop.time()
        self._outbox = upstream.outbox
        self._set_clock()
        call = self._call
        asked = upstream.open(
            call.url,
            call.headers,
            call.body,
            self._outcome.endpoint,
            connect_s=self._timeouts.connect_s,
        )
        try:
            await self._converse(asked)
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
            logger.error(BUG, self._outcome.id, self._redact.trace())
            self._say_failure(
                ProxyError(f"internal error, logged as {self._outcome.id}")
            )
        finally:
            if self._timer is not None:
                self._timer.cancel()
            asked.drop()
            if self._unlogged:  # a last line without an end
                self._log_data(len(self._unlogged))
        if self._response.is_clogged:
            await self._last_drain()

    async def _converse(self, asked: UpstreamCall) -> None:
        call, outcome = self._call, self._outcome
        if self._verbose:
            self._log.upstream_request(outcome.id, call.url, call.headers, call.body)
        reply = self._reply = await asked.start()
        # The task has waited, so whatever aiohttp writes next comes in a later turn.
        self._response.outbox = self._outbox
        outcome.upstream_status = reply.status
        if self._verbose:
            self._log.upstream_reply(outcome.id, reply.status, dict(reply.pairs))
        if not 200 <= reply.status < 300 and call.adjust:
            raise await self._status_fault(reply)
        self._status = 200 if call.adjust else reply.status
        self._reply_type = reply.header("content-type")
        if call.native:
            self._passed_headers = _told(reply)
        self._exchange = self._new_exchange()
        self._exchange.is_started = self._response.is_begun
        self._step_on(reply, self._exchange)
        if not self._is_over:
            reply.listen(self._step)
        while not self._is_over:
            if self._response.is_clogged:
                await self._hold(reply)
            else:
                self._event = self._loop.create_future()
                await self._event
                if self._stopped is not None:
                    raise self._stopped
            if not (self._is_over or self._response.is_clogged):
                # What came while nobody listened is not announced again.
                self._step_on(reply, self._exchange)
        asked.finish()

    async def _hold(self, reply: UpstreamReply) -> None:
        """Let the upstream wait for a slow client: nothing is queued in between."""
        self._event = None
        reply.pause()
        await self._response.drain()
        reply.resume()
        if self._answered_s:  # none of that time was the upstream's
            self._answered_s = self._loop.time()

    def _step(self) -> None:
        """Called by the upstream's socket when something has come."""
        if self._event is None or self._reply is None or self._exchange is None:
            return  # the task goes on by itself
        if self._event.done():
            return
        try:
            self._step_on(self._reply, self._exchange)
        except Exception as error:
            self._event.set_exception(error)

    def _step_on(
        self, reply: UpstreamReply, exchange: "Exchange | PassThrough | PassedBody"
    ) -> None:
        """Say what has arrived."""
        out = b""
        if data := reply.take():
            if self._verbose:
                self._note_data(data)
            out = exchange.receive_data(data)
        is_going_on = reply.is_going_on
        if not (is_going_on or exchange.is_ended) and reply.is_complete:
            out += exchange.receive_eof()
        if exchange.progress != self._progress:
            self._note_progress(exchange.progress)
        if exchange.is_ended:
            self._note(exchange.error)
            self._end(out)
            return
        if out:
            self._write(out)
        if not (is_going_on or data) and (failure := reply.failure) is not None:
            raise failure
        if exchange.is_finishing and not self._is_closing:
            self._wait_a_little()
        if self._response.is_clogged:
            self._wake()
        elif not is_going_on and (reply.has_more or (data and reply.failure)):
            self._loop.call_soon(self._step)

    def _note_progress(self, progress: int) -> None:
        """The answer has begun, or gone on."""
        self._progress = progress
        self._answered_s = self._loop.time()
        if self._outcome.first_token_s is None:
            elapsed_s = self._answered_s - self._started_s
            self._outcome.first_token_s = round(elapsed_s, 4)

    def _wait_a_little(self) -> None:
        """The answer is complete; its usage may follow, or never come."""
        self._is_closing = True
        self._closing_s = min(self._deadline_s, self._loop.time() + GRACE_S)
        self._set_clock()

    def _wake(self) -> None:
        if self._event is not None and not self._event.done():
            self._event.set_result(None)

    # -------------------------------------------------------------------------- clocks

    def _set_clock(self) -> None:
        """Wake up when the next thing is due. What the events do to that is only noted:
        then it is looked at again.
        """
        due_s = min(self._closing_s, self._expected_s()[0])
        if self._completion.stream:
            # The answer may begin, or the client read again, the moment after this.
            due_s = min(due_s, self._loop.time() + self._timeouts.between_tokens_s)
            if every_s := self._keep_alive.every_s:
                due_s = min(due_s, self._quiet_s + every_s)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due_s, self._tick)

    def _expected_s(self) -> tuple[float, type[DeadlineExceeded], str]:
        """When the upstream must have done what, and how its failure is called."""
        timeouts = self._timeouts
        if self._completion.stream and self._answered_s:
            if not self._response.is_clogged:  # else it is the client's turn
                due_s = self._answered_s + timeouts.between_tokens_s
                return due_s, TokenGapTimeout, "go on with its answer"
        elif self._completion.stream:
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
        now_s = self._loop.time()
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
            HeadersTimeout: self._timeouts.headers_s,
            FirstTokenTimeout: self._timeouts.first_token_s,
            TokenGapTimeout: self._timeouts.between_tokens_s,
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
        if now_s < self._quiet_s + self._keep_alive.every_s:
            return  # looked at for another reason
        self._quiet_s = now_s
        response, exchange = self._response, self._exchange
        if response.is_clogged or self._is_over:
            return
        if not response.is_begun and not self._keep_alive.before_first_token:
            return
        if not self._completion.stream or not self._call.adjust:
            return
        if not (out := self._writer.keep_alive()):
            return
        if not response.is_begun:
            headers = dict(self._writer.stream_headers) | self._reply_headers
            response.begin(200, headers, out)
            if exchange is not None:
                exchange.is_started = True
        else:
            response.write(out)

    def _stop(self, error: ProxyError) -> None:
        """Stop waiting, whatever for."""
        if self._task is None or self._stopped is not None or self._is_over:
            return
        self._stopped = error
        if self._event is None:  # connecting, or waiting for a slow client
            self._task.cancel()
        else:
            self._wake()

    # ------------------------------------------------------------------------- reading

    def _new_exchange(self) -> Exchange | PassThrough | PassedBody:
        """Translate, or pass on what is of the client's dialect and form already."""
        call = self._call
        is_stream = media_type(self._reply_type) == EVENT_STREAM
        if call.native and (is_stream == self._completion.stream or not call.adjust):
            fixer = ReplyFixer(call.native) if call.adjust else None
            if not is_stream:
                return PassedBody(
                    call.reader,
                    limit_bytes=self._event_bytes,
                    fixer=fixer,
                    redact=self._redact,
                )
            return PassThrough(
                call.reader,
                self._writer,
                dialect=call.native,
                limit_bytes=self._event_bytes,
                fixer=fixer,
                several=call.several,
                redact=self._redact,
            )
        cutter = Cutter(call.stops, call.ends) if call.stops or call.ends else None
        return Exchange(
            call.reader,
            self._writer,
            stream=self._completion.stream,
            content_type=self._reply_type,
            limit_bytes=self._event_bytes,
            cutter=cutter,
            redact=self._redact,
        )

    def _note_data(self, data: bytes) -> None:
        self._unlogged += data
        # Lines as a whole: half of a credential would not be recognised as one.
        if end := data.rfind(b"\n") + 1:
            self._log_data(len(self._unlogged) - len(data) + end)

    def _log_data(self, end: int) -> None:
        self._log.upstream_data(self._outcome.id, bytes(self._unlogged[:end]))
        del self._unlogged[:end]

    async def _status_fault(self, reply: UpstreamReply) -> UpstreamStatus:
        headers = reply.named(_is_safe)
        body = b""
        # Whatever becomes of the body, the status is what the client needs to know.
        with contextlib.suppress(UpstreamFault, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_S):
                while len(body) < ERROR_BODY_BYTES and (data := await reply.read()):
                    if self._verbose:
                        self._note_data(data)
                    body += data
        # A character cut in two at the limit is left out.
        cut = body[:ERROR_SHOWN_BYTES]
        errors = "ignore" if len(body) > ERROR_SHOWN_BYTES else "replace"
        text = cut.decode(errors=errors).strip()
        fault = UpstreamStatus(
            self._source, reply.status, text, headers=_printable(headers)
        )
        fault.is_clients_credential = self._clients_credential
        return fault

    # ------------------------------------------------------------------------- writing

    def _write(self, out: bytes) -> None:
        self._spoken += 1
        if self._response.is_begun:
            self._response.write(out)
        else:
            self._response.begin(self._status, self._headers(is_stream=True), out)

    def _headers(self, *, is_stream: bool) -> dict[str, str]:
        headers = dict(self._writer.stream_headers) if is_stream else {}
        if isinstance(self._exchange, Exchange):
            if not is_stream:
                headers["Content-Type"] = JSON
        else:
            headers |= self._passed_headers
            if self._reply_type:
                headers["Content-Type"] = self._reply_type
        headers |= self._reply_headers
        if adjusted := self._adjusted():
            headers["X-Proxy-Adjusted"] = ", ".join(adjusted)
        return headers

    def _adjusted(self) -> list[str]:
        names = self._call.adjusted
        if self._completion.dropped:
            names = [*(f"request.{n}" for n in self._completion.dropped), *names]
        exchange = self._exchange
        if exchange is not None and exchange.adjusted:
            names = [*names, *exchange.adjusted]
        return names

    def _end(self, out: bytes) -> None:
        """Write the last bytes together with the end of the body."""
        self._is_over = True
        self._outcome.adjusted = self._adjusted()
        response = self._response
        if response.is_begun:
            response.end(out)
        elif self._is_stream():
            response.begin(self._status, self._headers(is_stream=True), b"")
            response.end(out)
        else:
            response.whole(self._status, self._headers(is_stream=False), out)
        self._wake()

    def _is_stream(self) -> bool:
        if isinstance(self._exchange, Exchange):
            return self._completion.stream
        return isinstance(self._exchange, PassThrough)

    def _say_failure(self, error: ProxyError) -> None:
        """Say an error after the start of the reply. Raises it if there was none."""
        self._note(error)
        exchange, is_begun = self._exchange, self._response.is_begun
        if not is_begun and (exchange is None or exchange.is_ended):
            raise error
        if exchange is None:  # only that we are there was said
            error.message = self._redact(error.message)
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
            logger.error(BUG, self._outcome.id, self._redact.trace())
            self._abort()
        self._note(exchange.error)
        if self._call.native and not self._call.adjust and exchange.error is not None:
            # Bytes as they are: then a broken stream can only be broken here, too.
            self._abort()
        self._end(out)

    async def _last_drain(self) -> None:
        """The client has its last bytes to read; one that does not is not waited for."""
        now_s = self._loop.time()
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

    def _note(self, error: ProxyError | None) -> None:
        self._error = error
        self._outcome.kind = error.kind if error is not None else "ok"
        self._outcome.error = error.log_text if error is not None else ""


def _told(reply: UpstreamReply) -> dict[str, str]:
    """What a reply that passes through keeps of its headers: what it says of itself."""
    return _printable(reply.named(_is_told))


@lru_cache(maxsize=1024)
def _is_told(name: str) -> bool:
    return name.startswith(_TOLD_PREFIXES)


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
