"""How far into its text a session is, and which text that is.

An interrupted read goes on by it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator


class Place:
    """Characters of a text read so far, and their digest.

    Args:
        characters: read so far.
        digest: SHA-256 of these as UTF-8, in hexadecimal, as `digest` gave it; None: not known.

    Attributes:
        characters: read so far.
    """

    def __init__(self, characters: int = 0, digest: str | None = None) -> None:
        self.characters = characters
        self._known = digest
        # Of a place that was kept, only the digest is here; more text cannot be added to that.
        self._running = hashlib.sha256() if characters == 0 else None

    def add(self, characters: int, encoded: bytes) -> None:
        """Go on by so many characters, given as UTF-8."""
        if not characters:
            return
        self.characters += characters
        self._known = None
        if self._running is not None:
            self._running.update(encoded)

    @property
    def digest(self) -> str | None:
        """SHA-256 of what was read, if it is known."""
        return self._known if self._running is None else self._running.hexdigest()

    def fork(self) -> Place:
        """A place that goes its own way from here."""
        fork = copy.copy(self)
        fork._running = None if self._running is None else self._running.copy()
        return fork

    def behind(self, blocks: Iterable[str], name: str) -> Iterator[str]:
        """The part of a text that comes after this place.

        Args:
            blocks: the text from its beginning.
            name: what errors call it.

        Raises:
            ValueError: it is shorter, or begins otherwise than what was read.
        """
        missing, passed = self.characters, hashlib.sha256()
        rest = ""
        blocks = iter(blocks)
        while missing:
            block = next(blocks, None)
            if block is None:
                raise ValueError(
                    f"{name} is shorter than what the session has read, {self.characters} "
                    "characters; is it that text?"
                )
            passed.update(block[:missing].encode())
            rest, missing = block[missing:], missing - len(block[:missing])
        if self.digest not in (None, passed.hexdigest()):
            raise ValueError(
                f"{name} is another text than the one that the session has read "
                f"{self.characters} characters of"
            )
        self._running = passed
        if rest:
            yield rest
        yield from blocks
