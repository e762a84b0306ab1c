"""Small writes of one turn of the event loop, sent together at its end.

To write to a socket is to wake up who reads from it, and on a machine with an idle core
that costs more than all else of a short reply. Readers that were woken by the first
write are still awake for the next ones if these follow at once; so what many requests
have to say in one turn is kept until all of them have been looked at.
"""

import asyncio
import logging
from typing import Protocol

logger = logging.getLogger(__name__)

# What is longer goes out at once, and is seen by whoever asks how full a buffer is.
SMALL_BYTES = 16 * 1024


class Transport(Protocol):
    def write(self, data: bytes) -> None: ...
    def is_closing(self) -> bool: ...
    def get_write_buffer_size(self) -> int: ...


class Outbox:
    """For all connections of one loop. What is written later to the same transport
    must go this way, too; closing it before the turn ends would lose what is here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[Transport, bytes] = {}

    def write(self, transport: Transport, data: bytes) -> bool:
        """Write, in a moment or at once. Return whether the other side may not have read
        all that was written before.
        """
        pending = self._pending
        if (before := pending.pop(transport, None)) is not None:
            data = before + data
        if len(data) > SMALL_BYTES or transport.get_write_buffer_size():
            transport.write(data)
            return True
        if not pending:
            self._loop.call_soon(self._flush)
        pending[transport] = data
        return False

    def flush(self, transport: Transport) -> None:
        """Send now what is kept for one transport: it is about to be closed."""
        if (data := self._pending.pop(transport, None)) is not None:
            transport.write(data)

    def holds(self, transport: Transport) -> bool:
        """Whether something is kept for a transport."""
        return transport in self._pending

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for transport, data in pending.items():
            if transport.is_closing():
                continue
            try:
                transport.write(data)
            except Exception:  # a bug of one must not cost the others their bytes
                logger.exception("what was kept for a connection cannot be written")
