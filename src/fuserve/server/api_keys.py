"""Which client a request comes from, by its API key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


class ApiKeys:
    """Compares in constant time: how long an answer takes tells nothing about a key.

    Args:
        keys: the accepted keys; with none every request is let in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests are of one length, and all are compared, whichever matches.
        self._digests = [_digest(key) for key in keys]

    def client_of(self, authorization: str | None) -> str | None:
        """A name for the sender that is safe to log; None if it brought no accepted key.

        Args:
            authorization: the header of that name, ``Bearer <key>``.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or True not in matches:
            return None
        return f"key-{matches.index(True)}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
