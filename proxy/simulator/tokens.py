"""Text in pieces that look like a model's tokens; joined, they are the text again."""

import re
import zlib

import msgspec

END = "</s>"
END_ID = 2
VOCABULARY = 32_000

# A word's start carries the blank before it, long words are several tokens, and
# everything else is one token per character.
_PIECE = re.compile(r" ?\w{1,5}|\s|[^\w\s]")


class Token(msgspec.Struct, frozen=True, gc=False):
    """One token, with the fields and in the order of TGI's events."""

    id: int
    text: str
    logprob: float
    special: bool = False


class SimpleToken(msgspec.Struct, frozen=True, gc=False):
    """One token of a tokenised text; positions count characters."""

    id: int
    text: str
    start: int
    stop: int


END_TOKEN = Token(END_ID, END, -0.125, special=True)


def split(text: str) -> list[str]:
    return _PIECE.findall(text)


def count(text: str) -> int:
    return len(split(text))


def make(text: str) -> Token:
    """The token of a piece: the same piece is always the same token."""
    digest = zlib.crc32(text.encode(errors="replace"))
    # Halves of powers of two print the same as 32-bit and 64-bit floats.
    return Token(3 + digest % (VOCABULARY - 3), text, -(digest % 64) / 32)


def tokenize(text: str) -> list[SimpleToken]:
    found, at = [], 0
    for piece in split(text):
        found.append(SimpleToken(make(piece).id, piece, at, at + len(piece)))
        at += len(piece)
    return found
