"""Ids of what the server keeps: nobody can guess one, and the server knows those that it gave.

An id ends with a keyed hash of itself and its owner. So, without a list of all that was ever given,
a server can say of an id that it is kept no longer; to others than its owner there is none.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

_RANDOM, _PROOF = 24, 16  # hexadecimal digits
_SHAPE = re.compile(rf"[a-z]+[-_][0-9a-f]{{{_RANDOM + _PROOF}}}")


class Ids:
    """Gives ids and knows them again.

    Args:
        secret: the key of the hash; whoever has it can make ids.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def new(self, kind: str, owner: str) -> str:
        """An id, such as `resp_0123…`.

        Args:
            kind: what it begins with, with its `_` or `-`.
            owner: whose it is.
        """
        begin = kind + secrets.token_hex(_RANDOM // 2)
        return begin + self._proof(begin, owner)

    def of(self, kind: str, owner: str, known: str) -> str:
        """The one id of something that is known otherwise.

        Args:
            kind, owner: as `new`.
            known: what it is known by.
        """
        said = f"{kind}|{owner}|{known}".encode(errors="surrogatepass")
        begin = kind + hmac.new(self._secret, said, hashlib.sha256).hexdigest()[:_RANDOM]
        return begin + self._proof(begin, owner)

    def was_given(self, name: str, owner: str) -> bool:
        """Whether this is an id that was given to this owner; others are not even well-formed."""
        if not _SHAPE.fullmatch(name):
            return False
        proof = self._proof(name[:-_PROOF], owner)
        return hmac.compare_digest(proof, name[-_PROOF:])

    def _proof(self, begin: str, owner: str) -> str:
        said = f"{begin}|{owner}".encode()
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()[:_PROOF]
