"""The pump: the loop between an upstream's reply and the client's, and its clock.

It decides only when something is said. No status line before the first meaningful
event; one write per read; after the first byte nothing but the rest of the reply or
its error. A slow client slows the upstream: nothing is queued in between.
"""

import asyncio
from collections.abc import Mapping

from aiohttp import web

from proxy import __version__
from proxy.completion import CompletionRequest
from proxy.dialects.base import JSON, Writer
from proxy.errors import DeadlineExceeded, ProxyError, UpstreamFault, UpstreamStatus
from proxy.exchange import Exchange
from proxy.log import ExchangeLog
from proxy.outcome import Outcome
from proxy.providers.base import Call
from proxy.redact import Redactor
from proxy.stops import Cutter
from proxy.upstream import Upstream, UpstreamReply

# After the finish reason only usage can follow; some servers never say that it won't.
GRACE_S = 2.0
# How long a client that does not read may hold up its own last bytes.
LAST_WRITE_S = 5.0
# Most of an upstream's error body that is read, and that is shown.
ERROR_BODY_BYTES = 64 * 1024
ERROR_SHOWN_BYTES = 1024

SERVER = f"completions-proxy/{__version__}"
# What of an upstream's headers may reach the client beside an error.
_SAFE_HEADERS = ("retry-after", "request-id", "x-request-id")
_SAFE_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")


class Relay:
    """One call of an upstream and the reply it becomes.

    Args:
        source: what the upstream is called in errors about its status.
        event_bytes: most bytes of one event.
        verbose: log what goes to and comes from the upstream.
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
    ) -> None:
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
        self._exchange: Exchange | None = None
        self._loop = asyncio.get_running_loop()

    async def run(
        self, upstream: Upstream, started_s: float, timeout_s: float
    ) -> web.StreamResponse:
        """Return the response, written to its end.

        Raises: ProxyError: it failed before anything was said to the client.
                ConnectionError: the client is gone.
        """
        self._started_s = started_s
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
                self._log.upstream_reply(self._outcome.id, reply.status, reply.headers)
            if not 200 <= reply.status < 300:
                raise await self._status_fault(reply)
            exchange = self._exchange = self._new_exchange(reply)
            while not exchange.is_ended:
                data = await self._read(reply)
                out = exchange.receive_data(data) if data else exchange.receive_eof()
                if exchange.is_answering and self._outcome.first_token_s is None:
                    elapsed_s = self._loop.time() - self._started_s
                    self._outcome.first_token_s = round(elapsed_s, 4)
                if out:
                    await self._write(out)
                if exchange.is_finishing:
                    clock.reschedule(min(deadline_s, self._loop.time() + GRACE_S))
        self._note(exchange.error)
        await self._end()

    def _new_exchange(self, reply: UpstreamReply) -> Exchange:
        call = self._call
        cutter = Cutter(call.stops, call.ends) if call.stops or call.ends else None
        return Exchange(
            call.reader,
            self._writer,
            stream=self._completion.stream,
            content_type=reply.headers.get("Content-Type", ""),
            limit_bytes=self._event_bytes,
            cutter=cutter,
            redact=self._redact,
        )

    async def _read(self, reply: UpstreamReply) -> bytes:
        data = await reply.read()
        if self._verbose and data:
            self._log.upstream_data(self._outcome.id, data)
        return data

    async def _status_fault(self, reply: UpstreamReply) -> UpstreamStatus:
        body = b""
        while len(body) < ERROR_BODY_BYTES and (data := await self._read(reply)):
            body += data
        # A character cut in two at the limit is left out.
        cut = body[:ERROR_SHOWN_BYTES]
        errors = "ignore" if len(body) > ERROR_SHOWN_BYTES else "replace"
        text = cut.decode(errors=errors).strip()
        return UpstreamStatus(
            self._source, reply.status, text, headers=_safe(reply.headers)
        )

    # ------------------------------------------------------------------------ writing

    async def _write(self, out: bytes) -> None:
        if self.response is None:
            self.response = await self._start(out)
        if self._completion.stream:
            await self.response.write(out)

    async def _start(self, out: bytes) -> web.StreamResponse:
        headers = own_headers(self._outcome.id)
        if not self._completion.stream:
            return web.Response(body=out, headers=headers, content_type=JSON)
        response = web.StreamResponse(
            headers={**self._writer.stream_headers, **headers}
        )
        if not self._request.keep_alive:
            response.headers["Connection"] = "close"
        if self._request.version >= (1, 1):
            response.enable_chunked_encoding()
        await response.prepare(self._request)
        return response

    async def _end(self) -> None:
        assert self.response is not None
        await self.response.prepare(self._request)
        await self.response.write_eof()

    async def _fail(self, error: ProxyError) -> None:
        """Say an error after the start of the reply. Raises it if there was none."""
        self._note(error)
        exchange = self._exchange
        if exchange is None or exchange.is_ended:  # or the exchange itself raised it
            raise error
        out = exchange.receive_failure(error)
        self._note(exchange.error)
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                if out:
                    await self._write(out)
                await self._end()
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("client does not read") from None

    def _note(self, error: ProxyError | None) -> None:
        self._outcome.kind = error.kind if error is not None else "ok"
        self._outcome.error = error.log_text if error is not None else ""


def own_headers(exchange_id: str) -> dict[str, str]:
    """What every reply of an exchange carries."""
    return {"Server": SERVER, "X-Request-Id": exchange_id}


def _safe(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers of an upstream's error that help the client, and nothing else: not its
    cookies, not its lengths and encodings, which are those of another body.
    """
    return {
        lower: value
        for name, value in headers.items()
        if (lower := name.lower()) in _SAFE_HEADERS or lower.startswith(_SAFE_PREFIXES)
    }
