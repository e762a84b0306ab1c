"""Who may use the proxy: from an ``Authorization`` header to a configured token."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable

from proxy.config import Token
from proxy.errors import Unauthorized

# Cody clients say `token X`, its documentation also has `token token="X"`; clients of
# OpenAI-like servers send `Bearer X`.
_HEADER = re.compile(r'(?:token|Bearer)(?:\s+(?:token="([^"]*)"|(.*)))?', re.IGNORECASE)

_MOST_LET_IN = 4096

# As Cody's clients know it.
NOT_GIVEN = "cody is not enabled: not authenticated"


def credential(authorization: str | None) -> str | None:
    """Return what follows the scheme; None if there is no scheme that is known."""
    match = _HEADER.fullmatch((authorization or "").strip())
    return (match[1] or match[2] or "").strip() if match else None


class Access:
    """The tokens that are let in, or ``open`` for everybody."""

    def __init__(self, tokens: Iterable[Token], open: bool) -> None:
        self._open = open
        # A dict compares digests byte by byte up to the first difference, and the time
        # that takes tells how far a guess was right. With a key that nobody outside
        # knows, the digests of two guesses have nothing to do with each other, so there
        # is nothing to learn, and one look-up does for any number of tokens.
        self._key = secrets.token_bytes(32)
        self._tokens = {self._keyed(token.sha256): token for token in tokens}
        # Header values that were let in: hashing them twice costs more than all the
        # rest. Text is looked up by a hash with a key of this process, too.
        self._let_in: dict[str, Token] = {}

    def check(self, authorization: str | None) -> Token | None:
        """Return the token that ``authorization`` names, None if none is asked for.

        Raises: Unauthorized: with the texts that Cody clients know.
        """
        if self._open:
            return None
        if authorization is not None and authorization in self._let_in:
            return self._let_in[authorization]
        given = (authorization or "").strip()
        if not given:
            raise Unauthorized(NOT_GIVEN)
        text = credential(given)
        if text is None:
            raise Unauthorized(
                "unrecognized HTTP Authorization request header scheme"
                " (known: token, Bearer)"
            )
        token = self._find(text)
        if token is None:
            raise Unauthorized("Invalid access token.")
        if len(self._let_in) >= _MOST_LET_IN:  # one token can be written in many ways
            self._let_in.clear()
        self._let_in[given] = token
        return token

    def _find(self, text: str) -> Token | None:
        # Header bytes that are not UTF-8 arrive as surrogates.
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        token = self._tokens.get(self._keyed(digest))
        if token is None or not hmac.compare_digest(token.sha256, digest):
            return None
        return token if text else None

    def _keyed(self, digest: bytes) -> bytes:
        return hmac.digest(self._key, digest, "sha256")
