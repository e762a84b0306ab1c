"""The programs that make the load, and where they come from."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from deploy import compile as proxy_compiler

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "deploy" / "wrk" / "request.lua"
BUILD = ROOT / "build"
COPY = BUILD / "compiled"  # of the proxy, see deploy/compile.py

PACKAGES = {"litellm": "litellm[proxy]"}  # of peers

Figures = dict[str, Any]


def missing() -> list[str]:
    """Return which of the system's packages have to be installed first."""
    return [program for program in ("wrk", "nginx") if where(program) is None]


def where(program: str) -> str | None:
    # nginx is often where only root looks.
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def compiled(program: str) -> Path | None:
    """Build a C program of this directory; None without a compiler."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        return None
    made = BUILD / "bench" / program
    _make(made)
    return made


def compile_proxy() -> list[str]:
    """Build the compiled proxy, if need be; return what is missing for that."""
    if not (missing := proxy_compiler.missing()):
        # For the Python that runs this, wherever it is.
        python = f"BIN={Path(sys.executable).parent}"
        _make(COPY / ".done", python, "--old-file=.venv/.compile")
    return missing


def _make(target: Path, *options: str) -> None:
    command = ("make", "--silent", "--no-print-directory", *options)
    subprocess.run(
        (*command, str(target.relative_to(ROOT))),
        cwd=ROOT,
        check=True,
        env=_clean_environ(),
        stdout=sys.stderr,
    )


def installed(program: str) -> Path:
    """Install a peer in an environment of its own, once; return its command."""
    home = BUILD / "peers" / program
    command, package = home / "bin" / program, PACKAGES[program]
    if not command.exists():
        print(f"Installing {package} in {home}; this takes a while.", file=sys.stderr)
        venv.create(home, with_pip=True)
        pip = (str(home / "bin" / "python"), "-m", "pip", "install", "--quiet")
        subprocess.run((*pip, package), check=True)
    return command


def version_of(program: str) -> str:
    """Return the version of a peer, installing it if need be."""
    python = installed(program).with_name("python")
    code = f"import importlib.metadata as m; print(m.version({program!r}))"
    done = subprocess.run(
        (python, "-c", code), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _clean_environ() -> dict[str, str]:
    """Return the environment without what a make that runs us wants of its children."""
    return {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS")}


def wrk(
    port: int, kind: str, model: str, token: str, *, connections: int, seconds: int
) -> Figures:
    """Ask in a closed loop; return requests, failed, seconds, latency (µs)."""
    done = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s"),
            *("-s", str(SCRIPT), f"http://127.0.0.1:{port}"),
            *("--", kind, model, token),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    requests, micros, failed, *latency = map(int, line.split()[1:])
    return {
        "requests": requests,
        "failed": failed,
        "seconds": micros / 1e6,
        "total": latency,
    }


def streams(
    port: int,
    path: str,
    body: dict[str, object],
    token: str,
    *,
    events: int,
    ending: str,
    connections: int,
    replies: int,
    cumulative: bool = False,
    ramp_ms: int = 0,
    within_s: int = 60,
) -> Figures:
    """Read streams as they come; return what streams.c prints."""
    program = compiled("streams")
    assert program is not None
    with tempfile.NamedTemporaryFile() as file:
        file.write(json.dumps(body).encode())
        file.flush()
        done = subprocess.run(
            [
                *(str(program), "-p", str(port), "-a", path, "-b", file.name),
                *("-H", f"Authorization: Bearer {token}", "-e", ending),
                *("-c", str(connections), "-n", str(replies), "-m", str(events)),
                *("-r", str(ramp_ms), "-t", str(within_s)),
                *(["-1"] if cumulative else []),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=within_s + 60,
        )
    figures: Figures = json.loads(done.stdout)
    return figures
