"""A real Redis server for one test."""

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Self

import pytest


class RedisServer:
    """``redis-server`` on a port of its own; it can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> Self:
        program = shutil.which("redis-server")
        if program is None:
            if "CI" in os.environ:
                pytest.fail("redis-server is not installed, see .ci/run")
            pytest.skip("redis-server is not installed")
        self._process = await asyncio.create_subprocess_exec(
            program,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
            *("--dir", str(self._directory)),
            stdout=asyncio.subprocess.DEVNULL,
        )
        for _ in range(200):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                await writer.wait_closed()
                return self
        raise AssertionError("redis-server does not listen")

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None
