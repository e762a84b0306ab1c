"""The proxy under load: ``python -m tests.bench.load`` (``make load``).

wrk asks the proxy and, for comparison, nginx in front of the same simulator, both in one
run. What counts is the CPU time of each proxy's process per request: it survives a busy
machine, wall-clock does not.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "deploy" / "wrk" / "request.lua"
KINDS = (
    *("openai-plain", "openai-stream"),
    *("cody-plain", "cody-stream", "cody-v1", "cody-legacy", "cody-code", "mixed"),
)
TICKS = os.sysconf("SC_CLK_TCK")

_NGINX = """\
worker_processes 1; daemon off; pid {dir}/nginx.pid; error_log {dir}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  keepalive_requests 1000000000;
  upstream there {{ server 127.0.0.1:{upstream}; keepalive 512; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://there; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Connection "";
    }}
  }}
}}
"""


def main() -> None:
    options = _options()
    for program, package in (("wrk", "wrk"), ("nginx", "nginx")):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: install the system's package {package}")
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        upstream, own, nginx = _free_port(), _free_port(), _free_port()
        python = (sys.executable, "-m", "proxy")
        fast = ("--tokens-per-second", "0", "--first-token", "0")
        simulate = (*python, "simulate", *fast, "--port", str(upstream))
        stack.enter_context(_running(upstream, *simulate))
        url = f"http://127.0.0.1:{upstream}"
        serve = ("serve", "--tgi-url", url, "--listen", f"127.0.0.1:{own}")
        proxy = stack.enter_context(_running(own, *python, *serve))
        conf = Path(directory) / "nginx.conf"
        conf.write_text(_NGINX.format(dir=directory, upstream=upstream, port=nginx))
        master = stack.enter_context(
            _running(nginx, "nginx", "-c", str(conf), "-p", directory)
        )
        worker = _child_of(master)
        _measure(options, proxy, own, worker, nginx)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    parser.add_argument("--seconds", type=int, default=3, help="per figure")
    parser.add_argument("--connections", type=int, default=32)
    return parser.parse_args()


def _measure(
    options: argparse.Namespace, proxy: int, own: int, worker: int, nginx: int
) -> None:
    columns = ("requests/s", "CPU µs", "to nginx", "p50 ms", "p99 ms", "failed")
    print(f"{'':<24}" + "".join(f"{column:>12}" for column in columns))
    _load("openai-plain", own, proxy, 1, options.connections)  # warm up
    for kind in options.kinds or KINDS:
        reference = None
        if kind.startswith("openai"):
            reference = _load(kind, nginx, worker, options.seconds, options.connections)
            _print(f"{kind}, nginx", reference, None)
        figures = _load(kind, own, proxy, options.seconds, options.connections)
        _print(kind, figures, reference)


Figures = tuple[float, float, float, float, int]


def _load(kind: str, port: int, pid: int, seconds: int, connections: int) -> Figures:
    before = _cpu_s(pid)
    done = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(SCRIPT)),
            *(f"http://127.0.0.1:{port}", "--", kind),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    )
    spent_s = _cpu_s(pid) - before
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    requests, micros, p50, p99, failed, errors = map(int, line.split()[1:])
    per_s = requests / micros * 1e6
    each_us = spent_s / max(requests, 1) * 1e6
    return per_s, each_us, p50 / 1000, p99 / 1000, failed + errors


def _print(name: str, figures: Figures, reference: Figures | None) -> None:
    per_s, each_us, p50, p99, failed = figures
    ratio = f"{each_us / reference[1]:.1f}" if reference else ""
    print(
        f"{name:<24}{per_s:>12,.0f}{each_us:>12.0f}{ratio:>12}"
        f"{p50:>12.1f}{p99:>12.1f}{failed:>12}",
        flush=True,
    )


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else pid


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextlib.contextmanager
def _running(port: int, *command: str) -> Iterator[int]:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, process)
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    sys.exit(f"{process.args!r} does not listen on port {port}")


if __name__ == "__main__":
    main()
