"""The simulated server's sockets and clock: when to send what, and to whom no more.

Everything that decides what to say is in ``answers``.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Literal, NoReturn

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
    generates,
    refuse,
)
from proxy.simulator.events import KEEP_ALIVE, Step
from proxy.simulator.faults import FaultError, Faults, Schedule, asked
from proxy.simulator.requests import Refusal
from proxy.simulator.script import Action, Cut, End, Head, Sleep, Tokens, script
from proxy.simulator.settings import Settings

# Nobody waits for simulated answers. To aiohttp, 0 would mean: wait for ever.
SHUTDOWN_S = 0.001
RESET_DELAY_S = 0.01


class Running:
    """A simulated server that listens. ``busy`` counts the generations under way."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.url = ""
        self.busy = 0
        self._schedule = Schedule()
        # The connections whose next request will be the last.
        self._liars: set[asyncio.Transport] = set()
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
        if self._liars and request.transport in self._liars:
            self._liars.discard(request.transport)
            await _cut(request, "fin")
        headers = {name.lower(): value for name, value in request.headers.items()}
        call = Call(
            method=request.method, path=request.path, headers=headers, body=body
        )
        try:
            faults = self._faults(call)
        except FaultError as error:
            return _respond(refuse(Refusal(str(error), "faults", 400)))
        free = self.settings.max_concurrent_requests - self.busy
        reply = answer(call, Situation(self.settings, time.time(), free))
        with self._occupied(reply.jobs):
            if faults is not None:
                response = await self._play(request, script(reply, faults))
                await self._lie(request, faults)
                return response
            if isinstance(reply, Stream):
                return await self._stream(request, reply)
            if reply.steps:
                await _Pace(self.settings).until(reply.steps)
            return _respond(reply)

    def _faults(self, call: Call) -> Faults | None:
        """Return what goes wrong with the reply to a call. Raises: FaultError."""
        faults = asked(call.headers, call.body)
        if faults is None:
            faults = self.settings.faults
            if faults is None or not (faults.everywhere or generates(call)):
                return None
        return faults if self._schedule.applies(faults, time.monotonic()) else None

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

    # --- with faults

    async def _play(
        self, request: web.BaseRequest, actions: Iterator[Action]
    ) -> web.StreamResponse:
        response, pace, steps = web.StreamResponse(), _Pace(self.settings), 0
        with contextlib.suppress(ConnectionResetError):
            for action in actions:
                match action:
                    case bytes():
                        await response.write(action)
                    case Head():
                        response = await _send_head(request, action)
                    case Tokens(count) if count:
                        steps += count
                        await pace.until(steps)
                    case Sleep(seconds) if seconds:
                        await asyncio.sleep(seconds)
                    case Cut(how):
                        await _cut(request, how)
                    case End():
                        await response.write_eof()
        return response

    async def _lie(self, request: web.BaseRequest, faults: Faults) -> None:
        transport = request.transport
        if transport is None:
            return
        if faults.keep_alive_lie == "idle":
            transport.close()
        elif faults.keep_alive_lie == "next":
            self._liars = {each for each in self._liars if not each.is_closing()}
            self._liars.add(transport)


async def _send_head(request: web.BaseRequest, head: Head) -> web.StreamResponse:
    response = web.StreamResponse(status=head.status, headers=head.headers)
    response.content_length = head.length
    await response.prepare(request)
    # Without this they would wait for the first byte of the body.
    await response.write(b"")
    return response


async def _cut(request: web.BaseRequest, how: Literal["fin", "rst"]) -> NoReturn:
    """End the connection; its end then ends this task."""
    transport = request.transport
    if transport is not None and how == "fin":
        transport.close()
    elif transport is not None:
        # A reset overtakes what was written just before it.
        await asyncio.sleep(RESET_DELAY_S)
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


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
