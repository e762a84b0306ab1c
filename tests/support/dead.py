"""Addresses at which nothing good happens: refused, never accepted, not TLS."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """Nobody listens there, and nobody else can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextlib.contextmanager
def full() -> Iterator[str]:
    """A connection there is never accepted: the queue is full."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}"


class Server:
    """Accepts, says ``reply`` at once, if anything, and waits for the end.

    ``left`` is set when the (last) peer has gone.
    """

    def __init__(self, reply: bytes = b"") -> None:
        self.opened = 0
        self.came = asyncio.Event()
        self.left = asyncio.Event()
        self._reply = reply

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.opened += 1
        self.came.set()
        writer.write(self._reply)
        with contextlib.suppress(OSError):
            while await reader.read(2**16):
                pass
        self.left.set()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    @contextlib.asynccontextmanager
    async def on(self, scheme: str) -> AsyncIterator[str]:
        """Listen; give the URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1")
        async with server:
            port = server.sockets[0].getsockname()[1]
            yield f"{scheme}://127.0.0.1:{port}"


def not_tls() -> contextlib.AbstractAsyncContextManager[str]:
    """It is asked for TLS and speaks HTTP."""
    return Server(b"HTTP/1.1 400 Bad Request\r\n\r\n").on("https")
