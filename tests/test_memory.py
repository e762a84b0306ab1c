"""What the process holds on to, as the system sees it."""

import gc
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.support.dialects import CHAT, CODY, Dialect
from tests.support.fixtures import Starter, model_configuration
from tests.support.upstream import Close, Step, reply, sse
from tests.test_failover import ask, good, wire_of

MIB = 1 << 20
# Large buffers among small pieces that stay, after one that was larger still.
_PROGRAM = """
import sys
from pathlib import Path
from proxy import serve

if sys.argv[1] == "given back":
    serve._give_buffers_back()

def rss_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

largest = b"x" * (20 << 20)
del largest
before, kept, buffers = rss_pages(), [], []
for _ in range(50):
    buffers.append(b"x" * (1 << 20))
    kept.append(b"x" * 50_000)
del buffers
print((rss_pages() - before) * 4096)
"""


def grown_bytes(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how], capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a habit of glibc")
def test_large_buffers_go_back_to_the_system():
    assert grown_bytes("kept") > 40 * MIB  # else there is nothing to do about it
    assert grown_bytes("given back") < 5 * MIB


def _cut(dialect: Dialect) -> list[Step]:
    return [*sse(*wire_of(dialect).streamed(["a", "b"], "stop", True))[:3], Close()]


REPLIES: dict[str, Callable[[Dialect], list[Step]]] = {
    "good": lambda dialect: good(dialect, streamed=True),
    "refused": lambda dialect: [reply(503, body="no")],
    "reported": lambda dialect: sse(wire_of(dialect).overload),
    "cut": _cut,
    "closed": lambda dialect: [Close()],
    "no HTTP": lambda dialect: [b"SSH-2.0-x\r\n\r\n"],
}


@pytest.mark.parametrize("dialect", [CHAT, CODY], ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("name", REPLIES)
async def test_nothing_of_a_request_waits_for_the_collector(
    start: Starter, upstream, name, dialect
):
    """It comes seldom, and buffers are among what a request leaves."""
    proxy = await start(model_configuration(f"{upstream.url}/v1"), fallback=True)

    async def ask_some() -> None:
        for _ in range(3):
            upstream.script(REPLIES[name](dialect))
            await ask(proxy.url, dialect, streamed=True)

    await ask_some()
    gc.collect()
    gc.disable()
    try:
        await ask_some()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(
            f"{type(each).__module__}.{type(each).__name__}" for each in gc.garbage
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not {name for name in left if name.startswith("proxy.")}
