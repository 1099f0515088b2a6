"""Which token ids a session has read, as a value of constant size, and whether others begin so.

Ids are hashed in blocks, each with the hash of those before it; the rest stands as it is. So a
trail can be extended, and a long list of ids is compared with many trails in one pass.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_BLOCK = 64  # ids


@dataclass(frozen=True)
class Trail:
    """Ids that were read.

    Attributes:
        length: how many.
        chain: hash of the whole blocks of them, in hexadecimal.
        rest: what stands behind these, fewer than a block.
    """

    length: int = 0
    chain: str = ""
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids: Sequence[int]) -> Trail:
        """The trail of these ids."""
        return cls().extended(ids)

    def extended(self, ids: Sequence[int]) -> Trail:
        """The trail of these and more."""
        rest, chain = [*self.rest, *ids], self.chain
        whole = len(rest) - len(rest) % _BLOCK
        for begin in range(0, whole, _BLOCK):
            chain = _hash(chain, rest[begin : begin + _BLOCK])
        return Trail(self.length + len(ids), chain, tuple(rest[whole:]))

    @property
    def digest(self) -> str:
        """What only these ids have."""
        return _hash(self.chain, self.rest)

    def to_json(self) -> list[Any]:
        """As JSON values."""
        return [self.length, self.chain, list(self.rest)]

    @classmethod
    def from_json(cls, values: Any) -> Trail:
        """What `to_json` gave."""
        length, chain, rest = values
        return cls(int(length), str(chain), tuple(map(int, rest)))


def beginnings(ids: Sequence[int], lengths: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Digests of the beginnings of these ids, of some lengths, in ascending order."""
    trail = Trail()
    for length in sorted({length for length in lengths if 0 < length <= len(ids)}):
        trail = trail.extended(ids[trail.length : length])
        yield length, trail.digest


def _hash(chain: str, ids: Sequence[int]) -> str:
    return hashlib.sha256(chain.encode() + b"|" + array("q", ids).tobytes()).hexdigest()
