"""One reply, from the upstream's bytes to the client's, without I/O.

Duties of whoever drives it: hand in every read (``receive_data``), then either the
end (``receive_eof``) or what went wrong (``receive_failure``), and write what comes
back to the client, each time in one piece. An ``UpstreamFault`` that is raised means
that nothing was said yet: the client can still get a real status. Once ``is_ended``,
the reply is complete and the upstream may be closed. ``is_finishing`` means that only
usage may follow, so a short wait is enough.
"""

from collections.abc import Callable

from proxy.errors import ProxyError


class Exchange:
    """What a translation and a reply that passes have in common."""

    # What most replies begin with, or keep, is no work for each of them.
    is_started = False  # something was said to the client
    is_answering = False  # the upstream has begun its answer
    is_ended = False
    progress = 0  # grows with every read that goes on with the answer
    error: ProxyError | None = None

    def is_finishing(self) -> bool:
        """The answer is complete."""
        return False

    def adjusted(self) -> tuple[str, ...]:
        """Return the names of what was mended in the reply."""
        return ()

    def receive_data(self, data: bytes) -> bytes:
        """Return what one read says to the client.

        Raises: UpstreamFault: it is an error, and nothing was said yet.
        """
        raise NotImplementedError

    def receive_eof(self) -> bytes:
        """The upstream's reply is over. Raises like ``receive_data``."""
        raise NotImplementedError

    def receive_failure(self, error: ProxyError) -> bytes:
        """The upstream's reply cannot go on. Raises like ``receive_data``, but the given
        error.
        """
        raise NotImplementedError

    def _end_by(self, error: ProxyError, redact: Callable[[str], str]) -> None:
        """Keep what went wrong, without secrets; nothing is said after it."""
        self.error = error
        error.message = redact(error.message)
        self.is_ended = True
