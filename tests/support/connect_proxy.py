"""A raw HTTP proxy that knows only CONNECT, and writes down what it was asked."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class ConnectProxy:
    """A tunnel on 127.0.0.1.

    Args: to: where every tunnel leads, whatever is asked for; None: where it asks.
          answer: what to say instead of opening one; the connection is closed then.

    ``heads`` are the requests as they came, ``through`` what went to upstreams.
    """

    def __init__(self, to: int | None = None, answer: bytes = b"") -> None:
        self.heads: list[str] = []
        self.through = b""
        self._to = to
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        gone = contextlib.suppress(OSError, asyncio.IncompleteReadError)
        with contextlib.closing(writer), gone:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            if self._answer:
                writer.write(self._answer)
                await writer.drain()
            else:
                await self._tunnel(head.split()[1], reader, writer)

    async def _tunnel(
        self, place: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        host, _, port = place.rpartition(":")
        if self._to is not None:
            host, port = "127.0.0.1", str(self._to)
        there, out = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
        with contextlib.closing(out):
            back = asyncio.create_task(_copy(there, writer))
            try:
                while data := await reader.read(65536):
                    self.through += data
                    out.write(data)
            finally:
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()
