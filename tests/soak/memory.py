"""Whether memory grows: a line through measurements."""

from collections.abc import Sequence
from operator import itemgetter
from typing import TypeAlias

MIB = 1 << 20


Sample: TypeAlias = tuple[float, int]  # seconds, bytes


def floors(samples: Sequence[Sample], window_s: float) -> list[Sample]:
    """Return the least of the samples in each window of time."""
    least: dict[int, Sample] = {}
    for sample in samples:
        window = int(sample[0] / window_s)
        least[window] = min(sample, least.get(window, sample), key=itemgetter(1))
    return [*least.values()]


def growth_bytes(samples: Sequence[Sample]) -> float:
    """Return by how much a line through samples rises from first to last.

    The line is that of least squares: single peaks move it little.
    """
    if len(samples) < 2:
        return 0.0
    mean_s = sum(at for at, _ in samples) / len(samples)
    mean = sum(size for _, size in samples) / len(samples)
    over = sum((at - mean_s) * (size - mean) for at, size in samples)
    under = sum((at - mean_s) ** 2 for at, _ in samples)
    return over / under * (samples[-1][0] - samples[0][0])
