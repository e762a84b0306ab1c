"""The proxy as its own process, run as a user runs it."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

ENVIRON = {k: v for k, v in os.environ.items() if k != "COMPLETIONS_PROXY_TOKENS"}


class Running:
    """``said`` is what it wrote to the standard error so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""
        self.url = ""
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.said += line.decode()

    async def says(self, text: str, within_s: float = 15.0) -> None:
        """Wait until it has said this."""
        await until(lambda: text in self.said, within_s, lambda: self.said)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    @property
    def children(self) -> list[int]:
        pid = self.process.pid
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(word) for word in text.split()]

    async def stop(self, within_s: float = 15.0) -> tuple[int, str]:
        """Return the exit status and what was written to the standard output."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await self.end(within_s)

    async def end(self, within_s: float = 15.0) -> tuple[int, str]:
        assert self.process.stdout is not None
        async with asyncio.timeout(within_s):
            out = await self.process.stdout.read()
            status = await self.process.wait()
            await self._listening
        return status, out.decode()


async def until(
    reached: Callable[[], bool],
    within_s: float = 5.0,
    what: Callable[[], object] = lambda: "",
) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not reached():  # noqa: ASYNC110  # it is another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {within_s} s; {what()}") from None


def command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "proxy", *arguments)


@contextlib.asynccontextmanager
async def spawn(*arguments: str, **environ: str) -> AsyncIterator[Running]:
    """Run a command to its end, or to ours."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRON | environ,
    )
    running = Running(process)
    try:
        yield running
    finally:
        try:
            await running.stop()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def serve(*arguments: str, **environ: str) -> AsyncIterator[Running]:
    """Serve on a free port, unless the arguments name one."""
    listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    async with spawn("serve", *listen, *arguments, **environ) as running:
        await until(
            lambda: "--data-raw" in running.said or running._listening.done(),
            20,
            lambda: running.said,
        )
        match = re.search(r"Serving (https?://\S+);", running.said)
        assert match, running.said
        running.url = match[1]
        yield running
