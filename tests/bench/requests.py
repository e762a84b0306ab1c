"""What a request costs in this process: all of the proxy, and no sockets.

Clients' bytes are handed to their connections and upstreams' bytes to theirs, as the
loop would do it, in rounds of 32; what is said goes nowhere. µs per request, the best of
many rounds: caches are warm, so in a process that serves it is more.
"""

import asyncio
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvloop
import yaml

from proxy import config, connections
from proxy.config import secrets
from proxy.log import ExchangeLog
from proxy.redact import Redactor
from proxy.server import Proxy
from proxy.upstream import Upstream
from proxy.upstream.client import _target
from proxy.upstream.connection import Connection

AT_A_TIME = 32
ROUNDS = 400
EVENTS = 64
TOKEN = "sk-bench"
URL = "http://127.0.0.1:1/v1"

_CONFIGURATION = {
    "listen": "127.0.0.1:0",
    "auth": {"tokens": [{"name": "bench", "token": TOKEN}]},
    # On, and never reached.
    "limits": {"inFlight": 8192, "token": {"inFlight": 8192}},
    "modelConfiguration": {
        "providerOverrides": [
            {
                "id": "sim",
                "serverSideConfig": {
                    "type": "openaicompatible",
                    "endpoints": [{"url": URL}],
                },
            }
        ],
        "modelOverrides": [
            {"modelRef": "sim::v1::m", "capabilities": ["chat", "autocomplete"]}
        ],
        "defaultModels": dict.fromkeys(
            ("chat", "fastChat", "codeCompletion"), "sim::v1::m"
        ),
    },
}

_CODY = "/.api/completions/stream?api-version=8"
_CHAT = "/v1/chat/completions"
_ASKED = '"max_tokens":64,"messages":[{"role":"user","content":"What is your name?"}]}'
_SAID = (
    '"messages":[{"speaker":"human","text":"What is your name?"}],'
    '"maxTokensToSample":64}'
)
_USAGE = '"usage":{"prompt_tokens":7,"total_tokens":12,"completion_tokens":5}'
_OF = '"created":1700000000,"model":"sim","choices":'
_CHUNK = f'"object":"chat.completion.chunk",{_OF}'


def _request(path: str, body: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1:8080",
        f"Authorization: Bearer {TOKEN}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*head, "", body)).encode()


def _body() -> bytes:
    choice = (
        '{"index":0,"message":{"role":"assistant","content":"@My name is Simulator."},'
        '"logprobs":null,"finish_reason":"stop"}'
    )
    body = (
        f'{{"id":"chatcmpl-5e1f","object":"chat.completion",{_OF}[{choice}],{_USAGE}}}'
    )
    head = "HTTP/1.1 200 OK\r\nserver: sim\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


def _event(delta: str, reason: str = "null") -> bytes:
    choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}'
    data = f'data: {{"id":"chatcmpl-5e1f",{_CHUNK}[{choice}]}}\n\n'
    return _chunk(data)


def _chunk(data: str) -> bytes:
    return f"{len(data):x}\r\n{data}\r\n".encode()


_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: sim\r\ncontent-type: text/event-stream; charset=utf-8"
    b"\r\ntransfer-encoding: chunked\r\n\r\n"
)
_ROLE = _event('{"role":"assistant","content":""}')


def _text(number: int) -> bytes:
    word = ("@The", "@ of", "@ answer", "@, and")[number % 4]
    return _event(f'{{"content":"{word}"}}')


def _end(*, usage: bool) -> bytes:
    said = f'data: {{"id":"chatcmpl-5e1f",{_CHUNK}[],{_USAGE}}}\n\n'
    told = _chunk(said) if usage else b""
    return _event("{}", '"stop"') + told + _chunk("data: [DONE]\n\n") + b"0\r\n\r\n"


def _burst(*, usage: bool) -> list[bytes]:
    texts = b"".join(map(_text, range(EVENTS)))
    return [_HEAD + _ROLE + texts + _end(usage=usage)]


def _paced(*, usage: bool) -> list[bytes]:
    """As many events, a read each."""
    texts = [_text(number) for number in range(EVENTS - 1)]
    return [_HEAD + _ROLE, *texts, _text(EVENTS - 1) + _end(usage=usage)]


_STREAMED = '{"model":"m","stream":true,'
CASES: dict[str, tuple[bytes, list[bytes], int]] = {
    "plain": (_request(_CHAT, f'{{"model":"m",{_ASKED}'), [_body()], 1),
    "plain, for Cody": (
        _request(_CODY, f'{{"model":"m","stream":false,{_SAID}'),
        [_body()],
        1,
    ),
    "burst of 64": (_request(_CHAT, _STREAMED + _ASKED), _burst(usage=False), 1),
    "burst of 64, for Cody": (
        _request(_CODY, f'{{"model":"m",{_SAID}'),
        _burst(usage=True),
        1,
    ),
    "event, 64 reads": (
        _request(_CHAT, _STREAMED + _ASKED),
        _paced(usage=False),
        EVENTS,
    ),
    "event, 64 reads, for Cody": (
        _request(_CODY, f'{{"model":"m",{_SAID}'),
        _paced(usage=True),
        EVENTS,
    ),
}


class _Transport:
    """Takes what is written, and has nobody at its other end."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        # As quick as the loop's own, which are no functions of Python either.
        self.write = self.written.append
        self.is_closing = bool
        self.get_write_buffer_size = int

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 2) if name == "peername" else default

    def abort(self) -> None:
        sys.exit("a connection was aborted")

    close = pause_reading = abort

    def resume_reading(self) -> None:
        """aiohttp does so now and then, paused or not."""


class Bench:
    """The proxy with 32 clients and as many connections to its upstream."""

    def __init__(self) -> None:
        settings = config.load(
            yaml.safe_dump(_CONFIGURATION), environ={}, directory=Path()
        )
        redact = Redactor(secrets(settings))
        self._loop = asyncio.get_running_loop()
        self._upstream = Upstream()
        # As ``serve`` has it: lines leave many at a time.
        self._log_lines = io.StringIO()
        log = ExchangeLog(
            self._log_lines,
            redact,
            later=lambda flush: self._loop.call_later(0.1, flush),
        )
        self._proxy = Proxy(settings, self._upstream, log, redact)
        self._server = connections.Server(
            self._proxy.handle,
            self._proxy,
            settings.limits,
            settings.timeouts,
            request_factory=None,
            logger=connections.logger,
        )
        self._clients = [self._client() for _ in range(AT_A_TIME)]
        self._ways = [_Transport() for _ in range(AT_A_TIME)]
        key = _target(f"{URL}/chat/completions").key
        idle = self._upstream._idle[key] = []
        self._connections: list[Connection] = []
        for way in self._ways:
            connection = Connection(self._upstream.outbox)
            connection.connection_made(cast(asyncio.Transport, way))
            connection.idle_until_s = float("inf")
            self._connections.append(connection)
            idle.append(connection)

    def _client(self) -> tuple[connections.Connection, _Transport]:
        client, transport = cast(connections.Connection, self._server()), _Transport()
        client.connection_made(cast(asyncio.Transport, transport))
        return client, transport

    async def round(self, request: bytes, reply: list[bytes]) -> float:
        """Ask once on each connection; return the seconds that it took."""
        wall = time.perf_counter
        began_s = wall()
        for client, _ in self._clients:
            client.data_received(request)
        await asyncio.sleep(0)  # what is to be written is written then
        for read in reply:
            for connection in self._connections:
                connection.data_received(read)
            await asyncio.sleep(0)
        took_s = wall() - began_s
        for _, transport in self._clients:
            if not transport.written:
                sys.exit("a client was not answered")
            transport.written.clear()
        for way in self._ways:
            way.written.clear()
        self._log_lines.seek(0)
        self._log_lines.truncate()
        return took_s

    async def best(self, name: str) -> float:
        request, reply, parts = CASES[name]
        found = [await self.round(request, reply) for _ in range(ROUNDS)]
        return min(found) / AT_A_TIME / parts * 1e6

    async def close(self) -> None:
        self._proxy.log.flush()


async def _all(show: Callable[[str, float], None]) -> None:
    bench = Bench()
    await asyncio.sleep(0.01)  # aiohttp's tasks begin to wait
    for name in CASES:
        show(name, await bench.best(name))
    await bench.close()


def run() -> None:
    uvloop.run(_all(lambda name, us: print(f"{name:45} {us:6.1f} µs")))


if __name__ == "__main__":
    run()
