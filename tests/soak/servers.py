"""What runs: simulators, the proxy, Redis; each a process, each can be killed."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.process import ENVIRON, command

TOKEN = "soak-token"
LIMITED_TOKEN = "limited-token"
BODY_BYTES = 1 << 20
EVENT_BYTES = 1 << 20
# How long replies may take in all, and a client's last bytes after that.
CHAT_S = 12
_SERVING = re.compile(r"(?:Serving|answers at) (http://[^;\s]+)")

# Models that fail, by the simulator's names of faults.
FAULTS = (
    "cut=rst+after=3",
    "cut=fin+after=3.5",
    "cut=short+after=5",
    "cut=rst+after=nothing",
    "cut=fin+after=head",
    "cut=rst+after=end",
    "cut=fin+after=2+every=3",
    "stall+after=2",
    "stall+after=head",
    "stall+after=nothing",
    "stall=1.2+after=2",
    "status=500",
    "status=503+retry-after=1",
    "status=429+retry-after=1+for=2+pause=2",
    "status=503+every=2",
    "error=tgi+after=3",
    "error=openai+after=head",
    "error=llamacpp+after=2",
    "error=html+after=nothing",
    "only=comments+after=2",
    "only=empty+after=2",
    "only=pings+after=head",
    "oversized=300000",
    "oversized=900000+after=3",
    "oversized=3000000+after=2",
    "bomb=20000000",
    "content-type=text/html",
    "redirect",
    "lines=crlf",
    "split-utf8",
    "trickle=0.0002",
    "bom",
    "no-done",
    "keep-alive-lie=next",
    "keep-alive-lie=idle",
    "delay-head=0.7",
    "delay-first=1.5",
    "delay-gap=0.06",
    "delay-end=0.5",
)
STEADY, TGI, SLOW = "steady::v1::plain", "tgi::v1::native", "steady::v1::slow"
RESCUED = "faulty::v1::rescued"
FAULTY = [f"faulty::v1::f{number}" for number in range(len(FAULTS))]
DEAD = "dead::v1::gone"
# What the simulator is asked for.
NAMES = {
    **dict.fromkeys((STEADY, TGI, DEAD), "tgi"),
    SLOW: "tgi+delay-gap=0.05",
    RESCUED: "tgi+status=503",
    **{ref: f"tgi+{fault}" for ref, fault in zip(FAULTY, FAULTS, strict=True)},
}


class Process:
    """One that runs until it is stopped or killed; ``said`` is on its standard error.

    Its output goes to files: a pipe would have to be read all the time.
    """

    def __init__(self, directory: Path, name: str, arguments: tuple[str, ...]) -> None:
        self.name = name
        self.out = directory / f"{name}.out"
        self._err = directory / f"{name}.err"
        self._arguments = arguments
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def said(self) -> str:
        return self._err.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def children(self) -> list[int]:
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    async def start(self) -> Self:
        """Start it, also once more; wait until it says where it listens."""
        start = self._err.stat().st_size if self._err.exists() else 0
        with self.out.open("ab") as out, self._err.open("ab") as err:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments, stdout=out, stderr=err, env=ENVIRON
            )
        for _ in range(1000):
            if match := _SERVING.search(self.said, start):
                self.url = match[1]
                return self
            assert self._process.returncode is None, self.said
            await asyncio.sleep(0.02)
        raise AssertionError(f"{self.name} does not start: {self.said}")

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> int:
        """Return its exit status; one that does not stop is killed: then -9."""
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(CHAT_S + 15):
                return await process.wait()
        except TimeoutError:
            await self.kill()
            return -signal.SIGKILL


def simulator(directory: Path, name: str, faults: str = "") -> Process:
    """Simulate an endpoint; it has the same port whenever it is started."""
    arguments = ["simulate", "--port", str(free_port()), "--tokens-per-second", "100"]
    if faults:
        arguments += ["--fault", faults]
    return Process(directory, name, command(*arguments))


def proxy(directory: Path, config: Path, workers: int = 1) -> Process:
    arguments = ["serve", "--config", str(config), "--workers", str(workers)]
    return Process(directory, f"proxy-{workers}", command(*arguments))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ------------------------------------------------------------------------ configuration


_LIMITED = {
    "inFlight": 2,
    "chat": {"requestsPerMinute": 90, "tokensPerDay": 1_000_000_000},
    "code": {"requestsPerMinute": 30},
}


def write_config(path: Path, urls: list[str], redis_url: str | None = None) -> None:
    """Put the proxy in front of endpoints, with a model per fault and short clocks."""
    endpoints = [{"url": f"{url}/v1"} for url in urls]
    dead = [{"url": f"http://127.0.0.1:{free_port()}/v1"}]
    block = {
        "providerOverrides": [
            _provider("steady", "openaicompatible", endpoints),
            _provider("faulty", "openaicompatible", endpoints),
            _provider("tgi", "huggingface-tgi", endpoints),
            _provider("dead", "openaicompatible", dead),
        ],
        "modelOverrides": [_model(ref, name) for ref, name in NAMES.items()],
        # What TGI's own clients mean who name none.
        "defaultModels": {"chat": STEADY, "fastChat": STEADY, "codeCompletion": TGI},
    }
    file = {
        "listen": f"127.0.0.1:{free_port()}",
        "auth": {
            "tokens": [
                {"name": "ann", "token": TOKEN},
                {"name": "ben", "token": LIMITED_TOKEN, "limits": _LIMITED},
            ]
        },
        "limits": {
            "bodyBytes": BODY_BYTES,
            "eventBytes": EVENT_BYTES,
            "inFlight": 50,
            "waiting": 20,
            **({"redis": redis_url} if redis_url else {}),
        },
        "timeouts": {
            "connect": 1,
            "headers": 2,
            "firstToken": 2.5,
            "betweenTokens": 2,
            "chat": CHAT_S,
            "code": 8,
        },
        "keepAlive": {"every": 0.5},
        "models": {RESCUED: {"fallback": STEADY}},
        "shutdown": {"grace": 2},
        "modelConfiguration": block,
    }
    path.write_text(yaml.safe_dump(file))


def _provider(id: str, type: str, endpoints: list[dict[str, str]]) -> dict[str, Any]:
    return {"id": id, "serverSideConfig": {"type": type, "endpoints": endpoints}}


def _model(ref: str, name: str) -> dict[str, Any]:
    return {
        "modelRef": ref,
        "modelName": name,
        "capabilities": ["chat", "autocomplete"],
        "contextWindow": {"maxInputTokens": 8000, "maxOutputTokens": 4000},
    }


# ---------------------------------------------------------------------------- measuring


def open_files(pid: int, but_port: int) -> tuple[int, int]:
    """Return how many files are open, and how many of them are sockets.

    Args: but_port: connections to it do not count.
    """
    ignored = _sockets_to(pid, but_port)
    names = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            names.append(os.readlink(each))
    names = [name for name in names if name not in ignored]
    return len(names), sum(name.startswith("socket:") for name in names)


def _sockets_to(pid: int, port: int) -> set[str]:
    rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    fields = [row.split() for row in rows]
    return {f"socket:[{row[9]}]" for row in fields if row[2].endswith(f":{port:04X}")}


async def settled(
    pid: int, files: int, within_s: float, but_port: int
) -> tuple[int, int]:
    """Wait until no more than ``files`` are open; return what is open then."""
    end_s = time.monotonic() + within_s
    await asyncio.sleep(1)
    while True:
        now = open_files(pid, but_port)
        if now[0] <= files or time.monotonic() >= end_s:
            return now
        await asyncio.sleep(0.2)


def has_redis() -> bool:
    return shutil.which("redis-server") is not None
