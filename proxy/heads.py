"""Heads of requests told by their bytes: clients send the same one every time.

Between two requests of one client nothing in the head changes but the number that says
how long the body is. So a head that was parsed and checked once is remembered by its
bytes without that number, and whatever has the same bytes comes to the same.
"""

import re
from collections.abc import Iterable
from typing import TypeAlias

# Longer ones, and more of them, are not worth the memory.
MOST_BYTES = 4096
MOST = 1024
_MOST_DIGITS = 9

# What stands before the line with the length of the body, and after it.
Head: TypeAlias = tuple[bytes, bytes]

# As nearly all clients write it.
_LENGTHS = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_END = b"\r\n\r\n"
_HEADER = re.compile(rb"([!-9;-~]+): ([!-~](?:[ -~]*[!-~])?)")
# What asks for more than to take the body as it comes and to answer it.
_SPECIAL = {
    b"connection",
    b"content-encoding",
    b"expect",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}


def cut(data: bytes) -> tuple[Head, bytes, int] | None:
    """Return the head without the length of the body, what is there of the body or
    beyond, and that length.

    None if ``data`` does not begin with the whole head of a request that has a body
    with a length.
    """
    head, end, body = data.partition(_END)
    if not end or len(head) > MOST_BYTES:
        return None
    before, found, after = head.partition(_LENGTHS[0])
    if not found:
        before, found, after = head.partition(_LENGTHS[1])
        if not found:
            return None
    digits, _, after = after.partition(b"\r\n")
    if not digits.isdigit() or len(digits) > _MOST_DIGITS:
        return None
    return (before, after), body, int(digits)


class Again:
    """A head with which the next requests of its connection may begin, too: then nothing
    has to be cut, or looked up.

    Args: data: a request that begins with it.
          head: as ``cut`` returned it.
          known: what is known of it.
    """

    __slots__ = ("_after", "_before", "_digits", "known")

    def __init__(self, data: bytes, head: Head, known: object) -> None:
        before, after = head
        self.known = known
        self._before = data[: len(before) + len(_LENGTHS[0])]
        self._after = b"\r\n%b\r\n\r\n" % after if after else _END
        self._digits = 0  # of the last length, which mostly has as many as the next

    def body_of(self, data: bytes) -> bytes | None:
        """Return the body of a request; None if it has another head, or is not whole."""
        before, after = self._before, self._after
        begin = len(before)
        if data[:begin] != before:
            return None
        end = begin + self._digits
        if data[end : end + len(after)] != after:
            end = data.find(b"\r", begin, begin + _MOST_DIGITS + 1)
            if data[end : end + len(after)] != after:
                return None
            self._digits = end - begin
        digits, body = data[begin:end], data[end + len(after) :]
        return body if digits.isdigit() and len(body) == int(digits) else None


def is_waiting(head: Head) -> bool:
    """Whether its client may want to hear something before it sends the body."""
    return b"100-continue" in b"\n".join(head).lower()


def is_repeatable(
    head: Head, path: str, headers: Iterable[tuple[bytes, bytes]]
) -> bool:
    """Whether a head can be told by its bytes from now on.

    Only if nothing about it is unusual, so that it can be read in one way only.

    Args: head: as ``cut`` returned it.
          path, headers: what the parser found in it.
    """
    before, after = head
    first, *lines = before.split(b"\r\n")
    if after:
        lines += after.split(b"\r\n")
    if first != b"POST %b HTTP/1.1" % path.encode("utf-8", "surrogateescape"):
        return False
    if b"content-length" in b"\n".join(head).lower():
        return False  # a second one
    found = []
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            return False
        name, value = match.groups()
        if name.lower() in _SPECIAL and line.lower() != b"connection: keep-alive":
            return False
        found.append((name, value))
    return found == [
        (name, value) for name, value in headers if name.lower() != b"content-length"
    ]
