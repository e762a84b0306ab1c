"""Whether files have changed: by looking, which works on every file system.

A file may be written in place, replaced by another, or be reached through a symbolic
link that is changed (as in Kubernetes); what is at its name in the end is what counts.
"""

import contextlib
import os
from collections.abc import Iterable
from typing import TypeAlias

POLL_S = 0.5

Mark: TypeAlias = tuple[int, ...] | None


class Watch:
    """Ask ``has_changed`` every ``POLL_S``."""

    def __init__(self, files: Iterable[str]) -> None:
        self._known = self._last = {file: _mark(file) for file in files}

    def has_changed(self) -> bool:
        """Whether the files are others than last time, and whole: nobody has touched
        them since the question before this one. Says it once for every change.
        """
        now = {file: _mark(file) for file in self._known}
        is_still, self._last = now == self._last, now
        if not is_still or now == self._known:
            return False
        self._known = now
        return True

    def look(self) -> None:
        """The files are about to be read: what changes from now on is a change."""
        self._known = self._last = {file: _mark(file) for file in self._known}

    def follow(self, files: Iterable[str]) -> None:
        """These have been read since ``look``."""
        known = {
            file: self._known[file] if file in self._known else _mark(file)
            for file in files
        }
        self._known = self._last = known


def _mark(file: str) -> Mark:
    """What distinguishes a file from another, or from itself before a change."""
    with contextlib.suppress(OSError):
        stat = os.stat(file)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None
