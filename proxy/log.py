"""What is written down: one JSON line per exchange, and payloads where asked for.

Lines go to a text stream; a reader that is gone or full must not stop the proxy. What is
noted becomes text when it leaves: many exchanges at once cost less than half of what they
cost one by one.
"""

import json
import select
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TextIO, TypeAlias

import msgspec

from proxy.outcome import Outcome
from proxy.redact import Redactor

_encoder = msgspec.json.Encoder()
PIPE_BYTES = select.PIPE_BUF
_Line: TypeAlias = Outcome | dict[str, object]


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
        self._lines: list[_Line] = []
        # The millisecond that ``_time`` is the text of.
        self._since_s = self._until_s = 0.0
        self._time = ""

    def outcome(self, outcome: Outcome, now_s: float) -> None:
        """Write down an exchange that has ended; nothing of it may change any more.

        Args: now_s: Unix time.
        """
        outcome.time = self._text_of(now_s)
        self._put(outcome)

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
        line: dict[str, object] = {"time": self._text_of(time.time())}
        line |= {name: v for name, v in fields.items() if v not in (None, "", [])}
        self._put(line)

    def _put(self, line: _Line) -> None:
        lines = self._lines
        lines.append(line)
        if len(lines) == 1:
            if self._later is None:
                self.flush()
            else:
                self._later(self.flush)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        try:
            for piece in _pieces(_encoded(lines)):
                self._stream.write(piece.decode())
                self._stream.flush()
        except (OSError, ValueError):
            pass  # a broken pipe or a closed stream: serving matters more

    def _text_of(self, now_s: float) -> str:
        if not self._since_s <= now_s < self._until_s:
            ms = int(now_s * 1000)
            self._since_s, self._until_s = ms / 1000, (ms + 1) / 1000
            self._time = f"{_second(ms // 1000)}.{ms % 1000:03}Z"
        return self._time


def _encoded(lines: list[_Line]) -> bytes:
    try:
        return _encoder.encode_lines(lines)
    except UnicodeEncodeError:
        # Half a surrogate pair, which no UTF-8 can say. The others lose nothing by it.
        return b"".join(_mended(line) for line in lines)


def _mended(line: _Line) -> bytes:
    try:
        return _encoder.encode(line) + b"\n"
    except UnicodeEncodeError:
        fields = msgspec.to_builtins(line)
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _pieces(lines: bytes) -> Iterator[bytes]:
    """Cut between lines, no more than a pipe takes as one: else those of several
    processes would mix.
    """
    begin = 0
    while len(lines) - begin > PIPE_BYTES:
        end = lines.rfind(b"\n", begin, begin + PIPE_BYTES) + 1
        if not end:  # one line is longer
            end = lines.index(b"\n", begin) + 1
        yield lines[begin:end]
        begin = end
    if begin < len(lines):
        yield lines[begin:]


@lru_cache(maxsize=2)
def _second(whole_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole_s))
