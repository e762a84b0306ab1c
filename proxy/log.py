"""What is written down: one JSON line per exchange, and payloads where asked for.

Lines go to a text stream; a reader that is gone or full must not stop the proxy.
"""

import select
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TextIO

import msgspec

from proxy.outcome import Outcome
from proxy.redact import Redactor

_encode = msgspec.json.Encoder().encode
PIPE_BYTES = select.PIPE_BUF


class ExchangeLog:
    """Args:

    stream: where lines go.
    redact: takes secrets out of payloads.
    later:  calls a function in a moment, so that the lines of many exchanges leave in
            one piece; without it each leaves at once.
    """

    def __init__(
        self,
        stream: TextIO,
        redact: Redactor,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._stream = stream
        self._redact = redact
        self._later = later
        self._lines: list[bytes] = []

    def outcome(self, outcome: Outcome) -> None:
        outcome.time = _now()
        self._put(_encode(outcome))

    def upstream_request(
        self, id: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        """For providers with ``enableVerboseLogs``: this is where prompts show."""
        self._write(
            {
                "event": "upstream_request",
                "id": id,
                "url": self._redact(url),
                "headers": self._redact.headers(headers),
                "body": self._text(body),
            }
        )

    def upstream_reply(self, id: str, status: int, headers: Mapping[str, str]) -> None:
        self._write(
            {
                "event": "upstream_reply",
                "id": id,
                "status": status,
                "headers": self._redact.headers(headers),
            }
        )

    def upstream_data(self, id: str, data: bytes) -> None:
        self._write({"event": "upstream_data", "id": id, "data": self._text(data)})

    def _text(self, data: bytes) -> str:
        return self._redact(data.decode(errors="replace"))

    def _write(self, fields: dict[str, object]) -> None:
        line: dict[str, object] = {"time": _now()}
        line |= {name: v for name, v in fields.items() if v not in (None, "", [])}
        self._put(_encode(line))

    def _put(self, line: bytes) -> None:
        self._lines.append(line)
        if self._later is None:
            self.flush()
        elif len(self._lines) == 1:
            self._later(self.flush)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        try:
            for piece in _pieces(lines):
                self._stream.write(piece.decode())
                self._stream.flush()
        except (OSError, ValueError):
            pass  # a broken pipe or a closed stream: serving matters more


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """Join whole lines, no more than a pipe takes as one: else those of several
    processes would mix.
    """
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) >= PIPE_BYTES:
            yield piece
            piece = b""
        piece += line + b"\n"
    yield piece


@lru_cache(maxsize=2)
def _second(whole_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole_s))


def _now() -> str:
    now_s = time.time()
    return f"{_second(int(now_s))}.{int(now_s % 1 * 1000):03}Z"
