"""Replies of real servers, recorded byte by byte (tests/data; origin in README.md)."""

from pathlib import Path

from tests.support.client import RawReply

DATA = Path(__file__).parent.parent / "data"


def load(name: str) -> RawReply:
    """Return the reply ``server/name`` with its body de-chunked."""
    head, _, body = (DATA / f"{name}.raw").read_bytes().partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [(n, v.strip()) for n, _, v in (line.partition(":") for line in lines)]
    chunked = ("transfer-encoding", "chunked") in [(n.lower(), v) for n, v in headers]
    pieces = _chunks(body) if chunked else [body]
    return RawReply(
        status=int(status.split()[1]),
        reason="",
        headers=headers,
        framing="chunked" if chunked else "length",
        reads=[(0.0, piece) for piece in pieces],
        complete=True,
    )


def _chunks(body: bytes) -> list[bytes]:
    pieces: list[bytes] = []
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            return pieces
        pieces.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
