"""The pump: the loop between an upstream's reply and the client's, and its clock.

It decides only when something is said. No status line before the first meaningful
event; one write per read; after the first byte nothing but the rest of the reply or
its error. A slow client slows the upstream: nothing is queued in between.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import NoReturn

from aiohttp import web

from proxy import __version__
from proxy.completion import CompletionRequest
from proxy.dialects.adjust import ReplyFixer
from proxy.dialects.base import EVENT_STREAM, JSON, Writer, media_type
from proxy.errors import (
    ClientFault,
    DeadlineExceeded,
    ProxyError,
    ShuttingDown,
    UpstreamFault,
    UpstreamStatus,
)
from proxy.exchange import Exchange
from proxy.log import ExchangeLog
from proxy.outcome import Outcome
from proxy.passthrough import PassedBody, PassThrough
from proxy.providers.base import Call
from proxy.redact import Redactor
from proxy.stops import Cutter
from proxy.upstream import Upstream, UpstreamReply

logger = logging.getLogger(__name__)

# After the finish reason only usage can follow; some servers never say that it won't.
GRACE_S = 2.0
# How long a client that does not read may hold up its own last bytes.
LAST_WRITE_S = 5.0
# Most of an upstream's error body that is read, and that is shown.
ERROR_BODY_BYTES = 64 * 1024
ERROR_SHOWN_BYTES = 1024
ERROR_BODY_S = 2.0

SERVER = f"completions-proxy/{__version__}"
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

    Args:
        source: what the upstream is called in errors about its status.
        event_bytes: most bytes of one event.
        verbose: log what goes to and comes from the upstream.
        reply_headers: what a successful reply carries besides.
        clients_credential: the upstream was asked with the client's own credential,
            so that its refusal is the client's to hear.
    """

    def __init__(
        self,
        request: web.BaseRequest,
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
        reply_headers: dict[str, str],
        clients_credential: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._clients_credential = clients_credential
        self.response: web.StreamResponse | None = None
        self._request = request
        self._completion = completion
        self._writer = writer
        self._call = call
        self._outcome = outcome
        self._source = source
        self._event_bytes = event_bytes
        self._redact = redact
        self._log = log
        self._verbose = verbose
        self._unlogged = bytearray()
        self._exchange: Exchange | PassThrough | PassedBody | None = None
        self._reply_type = ""
        self._passed_headers: dict[str, str] = {}
        self._reply_headers = reply_headers
        self._status = 200
        self._loop = loop
        self._task: asyncio.Task[object] | None = None
        self._is_interrupted = False

    def interrupt(self) -> None:
        """End the reply now, with an error that the client understands."""
        if self._task is not None:
            self._is_interrupted = True
            self._task.cancel()

    async def run(
        self, upstream: Upstream, started_s: float, timeout_s: float
    ) -> web.StreamResponse:
        """Return the response, written to its end.

        Raises: ProxyError: it failed before anything was said to the client.
                ConnectionError: the client is gone.
        """
        self._started_s = started_s
        self._task = asyncio.current_task(self._loop)
        deadline_s = started_s + timeout_s
        try:
            try:
                async with asyncio.timeout_at(deadline_s) as clock:
                    await self._converse(upstream, clock, deadline_s)
            except TimeoutError:
                raise DeadlineExceeded(
                    "context deadline exceeded: the upstream did not complete the "
                    f"reply within {timeout_s * 1000:.0f} ms"
                ) from None
        except UpstreamFault as fault:
            await self._fail(fault)
        except (ConnectionError, ClientFault):
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_interrupted or task is None:
                raise
            task.uncancel()
            await self._fail(ShuttingDown())
        except Exception:
            # A bug: what was begun must still be ended as the client expects.
            if self.response is None:
                raise
            logger.exception("exchange %s: this is a bug", self._outcome.id)
            await self._fail(
                ProxyError(f"internal error, logged as {self._outcome.id}")
            )
        finally:
            if self._unlogged:  # a last line without an end
                self._log_data(len(self._unlogged))
        assert self.response is not None
        return self.response

    async def _converse(
        self, upstream: Upstream, clock: asyncio.Timeout, deadline_s: float
    ) -> None:
        call, endpoint = self._call, self._outcome.endpoint
        if self._verbose:
            self._log.upstream_request(
                self._outcome.id, call.url, call.headers, call.body
            )
        async with upstream.open(call.url, call.headers, call.body, endpoint) as reply:
            self._outcome.upstream_status = reply.status
            if self._verbose:
                self._log.upstream_reply(
                    self._outcome.id, reply.status, dict(reply.pairs)
                )
            if not 200 <= reply.status < 300 and self._call.adjust:
                raise await self._status_fault(reply)
            self._status = 200 if self._call.adjust else reply.status
            self._reply_type = reply.header("content-type")
            if call.native:
                self._passed_headers = _told(reply.pairs)
            exchange = self._exchange = self._new_exchange()
            is_closing = False
            out = b""
            while not exchange.is_ended:
                data = await self._read(reply)
                out = exchange.receive_data(data) if data else exchange.receive_eof()
                if exchange.is_answering and self._outcome.first_token_s is None:
                    elapsed_s = self._loop.time() - self._started_s
                    self._outcome.first_token_s = round(elapsed_s, 4)
                if out and not exchange.is_ended:
                    await self._write(out)
                if exchange.is_finishing and not is_closing:
                    is_closing = True
                    clock.reschedule(min(deadline_s, self._loop.time() + GRACE_S))
        self._note(exchange.error)
        clock.reschedule(deadline_s)  # the short wait was for the upstream
        await self._end(out)

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

    async def _read(self, reply: UpstreamReply) -> bytes:
        data = await reply.read()
        if self._verbose:
            self._unlogged += data
            # Lines as a whole: half of a credential would not be recognised as one.
            if end := data.rfind(b"\n") + 1:
                self._log_data(len(self._unlogged) - len(data) + end)
        return data

    def _log_data(self, end: int) -> None:
        self._log.upstream_data(self._outcome.id, bytes(self._unlogged[:end]))
        del self._unlogged[:end]

    async def _status_fault(self, reply: UpstreamReply) -> UpstreamStatus:
        body = b""
        # Whatever becomes of the body, the status is what the client needs to know.
        with contextlib.suppress(UpstreamFault, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_S):
                while len(body) < ERROR_BODY_BYTES and (
                    data := await self._read(reply)
                ):
                    body += data
        # A character cut in two at the limit is left out.
        cut = body[:ERROR_SHOWN_BYTES]
        errors = "ignore" if len(body) > ERROR_SHOWN_BYTES else "replace"
        text = cut.decode(errors=errors).strip()
        fault = UpstreamStatus(
            self._source, reply.status, text, headers=_safe(reply.pairs)
        )
        fault.is_clients_credential = self._clients_credential
        return fault

    # ------------------------------------------------------------------------ writing

    async def _write(self, out: bytes) -> None:
        if self.response is None:
            self.response = await self._start(out)
        if not isinstance(self.response, web.Response):
            await self.response.write(out)

    async def _start(self, out: bytes) -> web.StreamResponse:
        headers = own_headers(self._outcome.id) | self._reply_headers
        passed = not isinstance(self._exchange, Exchange)
        if adjusted := self._adjusted():
            headers["X-Proxy-Adjusted"] = ", ".join(adjusted)
        is_stream = (
            self._completion.stream
            if isinstance(self._exchange, Exchange)
            else isinstance(self._exchange, PassThrough)
        )
        if passed:
            headers = self._passed_headers | headers
        if not is_stream:
            headers["Content-Type"] = self._reply_type if passed else JSON
            return web.Response(status=self._status, body=out, headers=headers)
        headers = {**self._writer.stream_headers, **headers}
        if passed and self._reply_type:
            headers["Content-Type"] = self._reply_type
        response = web.StreamResponse(status=self._status, headers=headers)
        if not self._request.keep_alive:
            response.headers["Connection"] = "close"
        if self._request.version == (1, 1):
            response.enable_chunked_encoding()
        else:  # then only the end of the connection ends the reply
            response.force_close()
            response.headers["Connection"] = "close"
        await response.prepare(self._request)
        return response

    def _adjusted(self) -> list[str]:
        names = [f"request.{name}" for name in self._completion.dropped]
        names += self._call.adjusted
        if isinstance(self._exchange, PassThrough | PassedBody):
            names += self._exchange.adjusted
        return names

    async def _end(self, out: bytes) -> None:
        """Write the last bytes together with the end of the body."""
        self._outcome.adjusted = self._adjusted()
        if self.response is None:
            self.response = await self._start(out)
        await self.response.prepare(self._request)
        is_whole = isinstance(self.response, web.Response)  # it has its body already
        await self.response.write_eof(b"" if is_whole else out)

    async def _fail(self, error: ProxyError) -> None:
        """Say an error after the start of the reply. Raises it if there was none."""
        self._note(error)
        exchange = self._exchange
        if self.response is None and (exchange is None or exchange.is_ended):
            raise error
        if exchange is None or exchange.is_ended:
            self._abort()  # all was said, but the client does not take it
        try:
            out = exchange.receive_failure(error)
        except ProxyError:
            raise
        except Exception:
            # A bug in saying it. A second reply must not follow within the first.
            if self.response is None:
                raise
            logger.exception("exchange %s: this is a bug", self._outcome.id)
            self._abort()
        self._note(exchange.error)
        if self._call.native and not self._call.adjust and exchange.error is not None:
            # Bytes as they are: then a broken stream can only be broken here, too.
            self._abort()
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                await self._end(out)
        except TimeoutError:  # the client does not read
            self._abort()

    def _abort(self) -> NoReturn:
        if self._request.transport is not None:
            self._request.transport.abort()
        raise ConnectionResetError("aborted")

    def _note(self, error: ProxyError | None) -> None:
        self._outcome.kind = error.kind if error is not None else "ok"
        self._outcome.error = error.log_text if error is not None else ""


def own_headers(exchange_id: str) -> dict[str, str]:
    """What every reply of an exchange carries."""
    return {"Server": SERVER, "X-Request-Id": exchange_id}


def _told(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What a reply that passes through keeps of its headers: what it says of itself."""
    return {
        name: value
        for name, value in headers
        if name.lower().startswith(_TOLD_PREFIXES)
        and value.isascii()
        and value.isprintable()
    }


def _safe(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers of an upstream's error that help the client, and nothing else: not its
    cookies, not its lengths and encodings, which are those of another body.
    """
    return {
        lower: value
        for name, value in headers
        if (
            (lower := name.lower()) in _SAFE_HEADERS or lower.startswith(_SAFE_PREFIXES)
        )
        and value.isascii()
        and value.isprintable()
    }
