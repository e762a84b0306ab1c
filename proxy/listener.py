"""The low-level server on its sockets: it begins, changes its configuration, and ends."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable
from typing import cast

from aiohttp import web

from proxy import connections, sockets
from proxy.metrics import PUBLISH_S, Board, Metrics
from proxy.relay import LAST_WRITE_S
from proxy.server import Proxy
from proxy.tls import renew, server_context

logger = logging.getLogger(__name__)

# aiohttp would log each malformed request with a traceback, headers included.
_http_logger = logging.getLogger("proxy.http")
_http_logger.addFilter(lambda record: not record.exc_info)
# How long a client may take to shake hands over TLS.
_HANDSHAKE_S = 15.0


class Listener:
    """The low-level server on its sockets.

    ``swap`` puts another proxy, that is another configuration, in the place of the one
    that answers; what is open is finished by the one that began it. ``stop`` goes by
    ``shutdown`` in the configuration and ends what is left with an error in its dialect.

    Args: listening: sockets that listen already, instead of the addresses configured.
    """

    def __init__(
        self, proxy: Proxy, listening: list[socket.socket] | None = None
    ) -> None:
        self._proxy = proxy
        self._retired: dict[asyncio.Task[None], Proxy] = {}
        self._listening = listening
        self._tls: ssl.SSLContext | None = None
        self._servers: list[asyncio.Server] = []
        self._connections = connections.Server(
            self._handle,
            proxy,
            proxy.settings.limits,
            proxy.settings.timeouts,
            request_factory=self._request,
            logger=_http_logger,
        )
        # aiohttp takes 0 for "as long as it takes".
        self._runner = web.ServerRunner(
            self._connections, shutdown_timeout=0.001, access_log=None
        )
        self._loop = asyncio.get_running_loop()
        self._hurried = asyncio.Event()
        self._publisher: asyncio.TimerHandle | None = None
        self._tell(proxy.metrics)

    def _handle(self, request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        # What aiohttp asks of a response, ours can answer.
        return cast("Awaitable[web.StreamResponse]", self._proxy.handle(request))

    def _tell(self, metrics: Metrics) -> None:
        """Say what only the listener knows."""
        metrics.read("client_connections", lambda: {"": self._connections.count})
        metrics.read("connections_refused", lambda: self._connections.refused)
        metrics.read(
            "in_flight", lambda: {"": sum(each.in_flight for each in self._proxies)}
        )

    # aiohttp gives the factory's arguments no public types.
    def _request(  # type: ignore[no-untyped-def]
        self, message, payload, protocol, writer, task
    ):
        if self._proxy.is_stopping:  # the client goes elsewhere with its next request
            message = message._replace(should_close=True)
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            self._loop,
            # The server's own limit is 1 MiB, less than one image.
            client_max_size=self._proxy.settings.limits.body_bytes,
        )

    async def start(self) -> list[tuple[str, int]]:
        """Return the addresses that are listened on.

        Raises: OSError: one of them cannot be had. BadFile.
        """
        settings = self._proxy.settings
        if settings.tls is not None:
            self._tls = server_context(settings.tls)
        if self._listening is None:
            self._listening = sockets.listen(settings.listen)
        await self._runner.setup()
        for each in self._listening:
            server = await self._loop.create_server(
                self._connections,
                sock=each,
                backlog=sockets.BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=_HANDSHAKE_S if self._tls else None,
            )
            self._servers.append(server)
        if self._proxy.board is not None:
            self._restore(self._proxy.board)
            self._publish(self._proxy.board)
        return [
            each.getsockname()[:2]
            for server in self._servers
            for each in server.sockets
        ]

    def swap(self, proxy: Proxy) -> None:
        """Let another proxy answer from now on. Raises: BadFile: nothing has changed."""
        if self._tls is not None and proxy.settings.tls is not None:
            renew(self._tls, proxy.settings.tls)
        old, self._proxy = self._proxy, proxy
        self._connections.visitor = proxy
        proxy.take_over(old)
        self._tell(proxy.metrics)
        self._connections.configure(proxy.settings.limits, proxy.settings.timeouts)
        proxy.is_stopping, proxy.is_closed = old.is_stopping, old.is_closed
        task = self._loop.create_task(_retire(old))
        self._retired[task] = old
        task.add_done_callback(self._retired.pop)

    @property
    def _proxies(self) -> list[Proxy]:
        """All that have something open."""
        return [self._proxy, *self._retired.values()]

    def _restore(self, board: Board) -> None:
        if (left := board.left()) is not None:
            # Of another version: the counters begin anew.
            with contextlib.suppress(ValueError):
                metrics = self._proxy.metrics
                metrics.restore(left)

    def _publish(self, board: Board) -> None:
        try:
            metrics = self._proxy.metrics
            board.publish(metrics.snapshot())
        except OSError as error:
            logger.warning("metrics of this process are not shared: %s", error)
            return
        self._publisher = self._loop.call_later(PUBLISH_S, self._publish, board)

    @property
    def is_busy(self) -> bool:
        return any(proxy.relays for proxy in self._proxies)

    def hurry(self) -> None:
        """Wait for nobody any more: end open replies with an error in their dialect."""
        if self._hurried.is_set():
            return  # an error that is on its way must not be interrupted
        self._hurried.set()
        for proxy in self._proxies:
            proxy.is_closed = True
            for relay in list(proxy.relays):
                relay.interrupt()

    async def stop(self) -> None:
        shutdown = self._proxy.settings.shutdown
        self._proxy.is_stopping = True
        self._connections.hurry()  # what has begun is to be finished
        if self._servers and shutdown.delay_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(shutdown.delay_s):
                    await self._hurried.wait()
        for server in self._servers:
            server.close()
        for _ in range(2):  # turns, until aiohttp has handed on what was held
            await asyncio.sleep(0)
        self._proxy.is_closed = True
        await self._drain(shutdown.grace_s)
        self.hurry()
        await self._drain(LAST_WRITE_S)
        await self._runner.cleanup()
        for proxy in self._proxies:
            await _put_away(proxy)
        for task in list(self._retired):
            task.cancel()
        if self._proxy.admission is not None:
            await self._proxy.admission.close()
        if self._publisher is not None and self._proxy.board is not None:
            self._publisher.cancel()
            with contextlib.suppress(OSError):
                metrics = self._proxy.metrics
                self._proxy.board.publish(metrics.snapshot())

    async def _drain(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for proxy in self._proxies:
                    while proxy.relays:  # one may follow the other at once
                        await proxy.is_idle.wait()


async def _retire(proxy: Proxy) -> None:
    await proxy.is_idle.wait()
    await _put_away(proxy)


async def _put_away(proxy: Proxy) -> None:
    await proxy.upstream.close()
    proxy.log.flush()
