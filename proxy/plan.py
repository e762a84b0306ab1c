"""What passes between the parent of workers and the processes that it starts."""

import struct
from typing import NamedTuple

# Where workers leave their counts for one another, and by which number: a worker goes on
# from those of its predecessor. For the workers' eyes only.
METRICS_DIR_VARIABLE = "COMPLETIONS_PROXY_METRICS_DIR"
NUMBER_VARIABLE = "COMPLETIONS_PROXY_WORKER"
# New settings for a worker: their length, then they.
LENGTH = struct.Struct("!Q")


class Plan(NamedTuple):
    """What the parent knows of the settings, in types that it need not import."""

    listen: tuple[tuple[str, int], ...]
    files: tuple[str, ...]
    stop_s: float
    stopping_text: str
    settings: bytes


def message(settings: bytes) -> bytes:
    return LENGTH.pack(len(settings)) + settings
