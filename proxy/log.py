"""What is written down: one JSON line per exchange, and payloads where asked for.

Lines go to a text stream; a reader that is gone or full must not stop the proxy.
"""

import time
from collections.abc import Mapping
from typing import TextIO

import msgspec

from proxy.outcome import Outcome
from proxy.redact import Redactor

_encode = msgspec.json.Encoder().encode


class ExchangeLog:
    """Args: stream: where lines go; redact: takes secrets out of payloads."""

    def __init__(self, stream: TextIO, redact: Redactor) -> None:
        self._stream = stream
        self._redact = redact

    def outcome(self, outcome: Outcome) -> None:
        self._write({"event": "exchange", **msgspec.structs.asdict(outcome)})

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
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        line: dict[str, object] = {"time": f"{moment}.{int(now % 1 * 1000):03}Z"}
        line |= {name: v for name, v in fields.items() if v not in (None, "", [])}
        try:
            self._stream.write(_encode(line).decode() + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # a broken pipe or a closed stream: serving matters more
