"""What the process holds on to, as the system sees it."""

import platform
import subprocess
import sys

import pytest

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
