"""The house's floors: a module imports only from floors below its own."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.certificates import Authority

ROOT = Path(__file__).parent.parent / "proxy"

FLOORS = [
    {
        "errors",
        "sse",
        "completion",
        "stops",
        "redact",
        "hop",
        "tls",
        "egress",
        "watch",
        "plan",
        "status",
    },
    {"dialects", "providers", "modelconfig"},
    {
        *("exchange", "translation", "passthrough", "outcome", "log", "heads"),
        *("auth", "config", "pool", "routes", "pages", "transport"),
        *("cors", "instance", "knobs", "siteconfig", "usage", "limits", "metrics"),
        *("memory_storage", "counts", "prometheus"),
    },
    {
        *("upstream", "response", "relay", "forward", "server", "simulator", "probe"),
        "listener",
        *("sockets", "interrupt", "admission", "connections", "outbox"),
        *("body", "lean"),
    },
    {"__main__", "serve", "workers"},
]
# Rooms of one floor are independent of one another, but for these.
NEIGHBOURS = {
    "sse": {"errors"},
    "completion": {"errors"},
    "providers": {"dialects", "modelconfig"},
    "config": {"transport"},
    "translation": {"exchange"},
    "passthrough": {"exchange"},
    "log": {"outcome"},
    "auth": {"config"},
    "routes": {"config"},
    "siteconfig": {"config"},
    "instance": {"auth", "config"},
    "limits": {"config", "memory_storage"},
    "counts": {"usage"},
    "prometheus": {"counts"},
    "metrics": {"counts", "outcome", "prometheus", "usage"},
    "relay": {"upstream", "response"},
    "upstream": {"outbox"},
    "response": {"outbox"},
    "probe": {"upstream"},
    "forward": {"body", "upstream", "interrupt", "relay"},
    "connections": {"response"},
    "server": {
        *("relay", "forward", "response", "upstream", "body"),
        *("interrupt", "admission"),
    },
    "listener": {"server", "relay", "sockets", "connections"},
    "workers": {"serve"},
    "status": {"errors"},
    "__main__": {"serve", "workers"},
}
WAITING = {"asyncio", "aiohttp", "socket", "threading", "uvloop"}


def room_of(module: str) -> str:
    return module.split(".")[1]


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts != ("proxy", "__init__"):
            yield ".".join(parts), path


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "proxy":
                yield from (f"proxy.{alias.name}" for alias in node.names)
            else:
                yield node.module


def floor_of(room: str) -> int:
    return next(n for n, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module, _ in modules()}
    assert rooms == set().union(*FLOORS)


def test_imports_go_down():
    wrong = []
    for module, path in modules():
        room = room_of(module)
        for name in imports_of(path):
            if not name.startswith("proxy.") or name == "proxy.__version__":
                continue
            other = room_of(name)
            below = floor_of(other) < floor_of(room)
            if not (below or other == room or other in NEIGHBOURS.get(room, ())):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_only_the_edges_wait():
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        for name in imports_of(path)
        if name.split(".")[0] in WAITING and floor_of(room_of(module)) < 3
    ]
    assert wrong == []


def run_apart(code: str, **environ: str) -> str:
    """Run ``code`` in a process that has imported nothing yet."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        env=os.environ | environ,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_what_few_configurations_need_is_not_imported_to_serve():
    found = run_apart("import sys, proxy.serve; print(*sys.modules)").split()
    assert "aiohttp" in found
    assert not {"limits", "prometheus_client", "redis"} & set(found)


# How many authorities each context trusts that was made while what serves was imported,
# and one that is made afterwards.
COUNT_TRUSTED = """
import gc, json, os, ssl, sys
import proxy.serve, proxy.lean
from proxy.tls import upstream_context

made = [thing for thing in gc.get_objects() if isinstance(thing, ssl.SSLContext)]
trusted = [len(context.get_ca_certs()) for context in [*made, upstream_context(None)]]
variables = {name: os.environ.get(name) for name in proxy.lean.MEANWHILE}
print(json.dumps([trusted, variables, "frozenlist._frozenlist" in sys.modules]))
"""


def test_what_only_the_client_of_aiohttp_needs_is_not_loaded(tmp_path):
    authority = Authority(tmp_path)
    environ = {"SSL_CERT_FILE": str(authority.ca), "SSL_CERT_DIR": ""}
    trusted, variables, is_compiled = json.loads(run_apart(COUNT_TRUSTED, **environ))
    # As they were for whoever asks later, which upstreams do.
    assert variables == environ | {"FROZENLIST_NO_EXTENSIONS": None}
    assert trusted[-1] == 1
    assert trusted[:-1]
    assert not any(trusted[:-1])
    assert not is_compiled
