"""Work for a client that shutting down may end before its own end."""

import asyncio
from types import TracebackType
from typing import Protocol

from proxy.errors import ShuttingDown


class Interruptible(Protocol):
    def interrupt(self) -> None:
        """End the work now, with an error that the client understands."""


class Work:
    """A part of the current task, in a ``with``: interrupted, it raises ShuttingDown."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._is_interrupted = False

    def interrupt(self) -> None:
        if self._task is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def take_interrupt(self) -> bool:
        """Whether a CancelledError was ours; then it is dealt with."""
        if not self._is_interrupted or self._task is None:
            return False
        self._task.uncancel()
        return True

    def __enter__(self) -> "Work":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, asyncio.CancelledError) and self.take_interrupt():
            raise ShuttingDown from None
