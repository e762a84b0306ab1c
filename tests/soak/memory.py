"""Whether memory grows: a line through measurements."""

from collections.abc import Sequence

MIB = 1 << 20


def growth_bytes(samples: Sequence[tuple[float, int]]) -> float:
    """Return by how much a line through (seconds, bytes) rises from first to last.

    The line is that of least squares: single peaks move it little.
    """
    if len(samples) < 2:
        return 0.0
    mean_s = sum(at for at, _ in samples) / len(samples)
    mean = sum(size for _, size in samples) / len(samples)
    over = sum((at - mean_s) * (size - mean) for at, size in samples)
    under = sum((at - mean_s) ** 2 for at, _ in samples)
    return over / under * (samples[-1][0] - samples[0][0])
