"""Starting what is measured: the proxy, nginx, peers; and the upstream of them all."""

import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from tests.bench.load import machine, tools

TOKEN = "sk-load"  # the prefix is what LiteLLM insists on

_NGINX = """\
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/error.log warn;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  keepalive_requests 1000000000; tcp_nodelay on;
  upstream there {{ server 127.0.0.1:{upstream}; keepalive 2048;
                    keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://there; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Connection "";
    }}
  }}
}}
"""


BURST_MODEL = "sim-n64-d0"  # see upstream.c
PYTHON_MODEL = "tgi"  # what the simulator in Python is asked for instead


@dataclass(frozen=True)
class Server:
    pid: int
    port: int
    start_s: float  # until it accepted connections
    burst_model: str = BURST_MODEL  # of an upstream


Starter = Callable[
    [int, tuple[str, ...]], contextlib.AbstractContextManager[Server]
]  # of the upstream's port and the models' names


@contextlib.contextmanager
def upstream() -> Iterator[Server]:
    """Start the simulator: the compiled one, else our own in Python, which is slow."""
    port = _free_port()
    compiled = tools.compiled("upstream")
    python = (sys.executable, "-m", "proxy", "simulate", "--port", str(port))
    fast = ("--tokens-per-second", "0", "--first-token", "0")
    command = (str(compiled), str(port)) if compiled else (*python, *fast)
    with _running(port, command, cpus=machine.halves()[1]) as server:
        yield server if compiled else replace(server, burst_model=PYTHON_MODEL)


@contextlib.contextmanager
def proxy(
    upstream_port: int, models: tuple[str, ...], root: Path = tools.ROOT
) -> Iterator[Server]:
    """Start the proxy as a product: with tokens asked for and its log line written.

    Args: root: where the package is that is to be run.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "proxy.yaml"
        file.write_text(yaml.safe_dump(_configuration(port, upstream_port, models)))
        command = (sys.executable, "-m", "proxy", "serve", "--config", str(file))
        with _running(port, command, root=root) as server:
            yield server


compiled_proxy: Starter = functools.partial(proxy, root=tools.COPY)


def _configuration(
    port: int, upstream_port: int, models: tuple[str, ...]
) -> dict[str, object]:
    url = f"http://127.0.0.1:{upstream_port}/v1"
    sim = {"type": "openaicompatible", "endpoints": [{"url": url}]}
    refs = [f"sim::v1::{model}" for model in models]
    features = ("chat", "fastChat", "codeCompletion")
    return {
        "listen": f"127.0.0.1:{port}",
        "auth": {"tokens": [{"name": "load", "token": TOKEN}]},
        # On, and never reached.
        "limits": {"inFlight": 8192, "token": {"inFlight": 8192}},
        "modelConfiguration": {
            "providerOverrides": [{"id": "sim", "serverSideConfig": sim}],
            "modelOverrides": [
                {"modelRef": ref, "capabilities": ["chat", "autocomplete"]}
                for ref in refs
            ],
            "defaultModels": dict.fromkeys(features, refs[0]),
        },
    }


@contextlib.contextmanager
def nginx(upstream_port: int, models: tuple[str, ...]) -> Iterator[Server]:
    port = _free_port()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "nginx.conf"
        file.write_text(_NGINX.format(dir=directory, upstream=upstream_port, port=port))
        program = tools.where("nginx") or "nginx"
        with _running(port, (program, "-c", str(file), "-p", directory)) as server:
            yield server


@contextlib.contextmanager
def litellm(upstream_port: int, models: tuple[str, ...]) -> Iterator[Server]:
    port = _free_port()
    url = f"http://127.0.0.1:{upstream_port}/v1"
    listed = [
        {
            "model_name": model,
            "litellm_params": {
                "model": f"openai/{model}",
                "api_base": url,
                "api_key": "none",
            },
        }
        for model in models
    ]
    environ = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
    }
    program = tools.installed("litellm")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "litellm.yaml"
        settings = {"num_retries": 0, "telemetry": False}
        general = {"master_key": TOKEN}
        file.write_text(
            yaml.safe_dump(
                {
                    "model_list": listed,
                    "litellm_settings": settings,
                    "general_settings": general,
                }
            )
        )
        at = ("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
        command = (str(program), "--config", str(file), *at)
        with _running(port, command, environ=environ, within_s=120) as server:
            yield server


PEERS: dict[str, Starter] = {"litellm": litellm}


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextlib.contextmanager
def _running(
    port: int,
    command: tuple[str, ...],
    cpus: set[int] | None = None,
    environ: dict[str, str] | None = None,
    within_s: float = 20,
    root: Path = tools.ROOT,
) -> Iterator[Server]:
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=os.environ | (environ or {}),
            cwd=root,
        )
        try:
            os.sched_setaffinity(process.pid, cpus or machine.halves()[0])
            while not _listens(port):
                if process.poll() is not None or time.monotonic() - begun > within_s:
                    said.seek(0)
                    text = said.read().decode(errors="replace")[-2000:]
                    sys.exit(f"{command[0]} does not listen on port {port}:\n{text}")
                time.sleep(0.005)
            yield Server(process.pid, port, time.monotonic() - begun)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
