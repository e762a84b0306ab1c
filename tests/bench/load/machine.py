"""What the kernel says of processes and of the machine (Linux)."""

import contextlib
import functools
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for thread in (PROC / str(pid) / "task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from tree(int(child))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process and its descendants have used so far.

    In nanoseconds from the scheduler rather than in ticks of 10 ms.
    """
    spent_ns = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            for thread in (PROC / str(process) / "task").iterdir():
                spent_ns += int((thread / "schedstat").read_text().split()[0])
    return spent_ns / 1e9


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process and its descendants."""
    pages = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            pages += int((PROC / str(process) / "statm").read_text().split()[1])
    return pages * _PAGE


def busy_s() -> float:
    """Return the seconds that the machine's CPUs have worked so far, or were stolen."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS


def own_s() -> float:
    """Return the CPU seconds of this process and of those that it has waited for."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


def allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


@functools.cache
def halves() -> tuple[set[int], set[int]]:
    """Return the CPU for what is measured, and those for what measures it."""
    every = sorted(os.sched_getaffinity(0))
    return ({every[-1]}, set(every[:-1])) if len(every) > 1 else (set(every),) * 2


def step_aside() -> None:
    """Leave a CPU to what is measured, with all that this process starts from now on."""
    os.sched_setaffinity(0, halves()[1])


def description() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in (PROC / "cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.machine()
    cores = len(set.union(*halves()))
    return f"{cores} × {cpu}, Linux {platform.release().split('-')[0]}"
