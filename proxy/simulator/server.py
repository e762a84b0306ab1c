"""The simulated server's sockets and clock: when to send what, and to whom no more.

Everything that decides what to say is in ``answers``.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from aiohttp import StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler

from proxy.simulator.answers import (
    TOO_LARGE,
    Call,
    Situation,
    Stream,
    Whole,
    answer,
    refuse,
)
from proxy.simulator.events import KEEP_ALIVE, Step
from proxy.simulator.settings import Settings

# Nobody waits for simulated answers. To aiohttp, 0 would mean: wait for ever.
SHUTDOWN_S = 0.001


class Running:
    """A simulated server that listens. ``busy`` counts the generations under way."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = ""
        self.busy = 0
        self._runner = web.ServerRunner(
            web.Server(
                self._handle,
                request_factory=self._make_request,
                # A client that hangs up ends its generation at once.
                handler_cancellation=True,
                access_log=None,
            ),
            shutdown_timeout=SHUTDOWN_S,
        )

    async def listen(self, host: str, port: int) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """Close the port, end every reply."""
        await self._runner.cleanup()
        await asyncio.sleep(0)  # for the cancelled handlers to end

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            asyncio.get_running_loop(),
            client_max_size=self.settings.payload_limit_bytes,
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _respond(refuse(TOO_LARGE))
        headers = {name.lower(): value for name, value in request.headers.items()}
        free = self.settings.max_concurrent_requests - self.busy
        reply = answer(
            Call(method=request.method, path=request.path, headers=headers, body=body),
            Situation(self.settings, time.time(), free),
        )
        with self._occupied(reply.jobs):
            if isinstance(reply, Stream):
                return await self._stream(request, reply)
            if reply.steps:
                await _Pace(self.settings).until(reply.steps)
            return _respond(reply)

    @contextlib.contextmanager
    def _occupied(self, jobs: int) -> Iterator[None]:
        self.busy += jobs
        try:
            yield
        finally:
            self.busy -= jobs

    async def _stream(
        self, request: web.BaseRequest, reply: Stream
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=reply.headers)
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):
            await self._write_events(response, reply.events)
            await response.write_eof()
        return response

    async def _write_events(
        self, response: web.StreamResponse, events: Iterator[Step]
    ) -> None:
        pace, steps = _Pace(self.settings), 0
        for needed, event in events:
            if needed:
                steps += needed
                while not await pace.until(steps, self.settings.keep_alive_s):
                    await response.write(KEEP_ALIVE)
            await response.write(event)


class _Pace:
    """When the n-th token is there, counted from now."""

    def __init__(self, settings: Settings) -> None:
        self._start = time.monotonic() + settings.first_token_s
        rate = settings.tokens_per_s
        self._interval = 1 / rate if rate else 0.0

    async def until(self, steps: int, patience_s: float = float("inf")) -> bool:
        """Wait for a token, but at most ``patience_s``; return whether it is there.

        The first token has the delay of its own, the others follow at the rate.
        """
        left = self._start + (steps - 1) * self._interval - time.monotonic()
        # Even without a wait the other connections get their turn.
        await asyncio.sleep(max(0.0, min(left, patience_s)))
        return left <= patience_s


def _respond(reply: Whole) -> web.Response:
    response = web.Response(
        status=reply.status, headers=reply.headers, body=reply.body or None
    )
    if not reply.body:
        # aiohttp would call an empty body a stream of octets.
        response.headers.pop(hdrs.CONTENT_TYPE, None)
    return response


async def start(settings: Settings, host: str = "127.0.0.1", port: int = 0) -> Running:
    """Start a simulated server; port 0 takes any free one."""
    running = Running(settings)
    await running.listen(host, port)
    return running
