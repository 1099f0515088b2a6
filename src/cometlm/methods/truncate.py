"""Truncation: the plain backbone reads the last tokens that fit, and nothing of what came before.

When it is asked, the kept tokens are read anew, from position 0, behind the tokens that the text
began with if a tokenizer puts some there. An eighth of the room is for the
question and the answer; where they need more, fewer tokens are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from cometlm.core.foreseen import Foreseen
from cometlm.methods.base import (
    Bounds,
    Budget,
    Method,
    Reader,
    TooLongError,
    generation_options,
    parted,
)
from cometlm.methods.full import CacheReader, token_limit
from cometlm.methods.loader import Loader

_SHARE = 8  # an eighth of the room is for question and answer


class Truncate(Method):
    """Keeps the last tokens; with the question and the answer they stay within the budget."""

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> TruncateReader:
        """See `Method.open`."""
        model = loader.backbone()
        limit = token_limit(model, budget)
        return TruncateReader(CacheReader(model, loader.tokenizer, limit))


class TruncateReader(Reader):
    """Keeps token ids, and reads them when it is asked.

    Args:
        empty: a reader that has read nothing; its limit says how many tokens fit.
    """

    def __init__(self, empty: CacheReader) -> None:
        self.tokenizer = empty.tokenizer
        self._empty = empty
        self._first: list[int] = []  # tokens that the text begins with
        self._ids: list[int] = []
        self._made: tuple[int, CacheReader] | None = (
            None  # reserved room, and who has read the rest
        )

    def read(self, ids: Sequence[int]) -> None:
        """See `Reader.read`; no text is too long."""
        if ids:
            if not self._first and not self._ids:
                self._first, ids = parted(self.tokenizer, ids)
            self._ids += ids
            self._made = None
            if self._empty.limit is not None:
                del self._ids[: -self._empty.limit]

    def check_asked(self, tokens: int) -> None:
        """See `Reader.check_asked`."""
        limit = self._empty.limit
        if limit is not None and tokens + len(self._first) >= limit:
            raise TooLongError(
                f"question and answer must be fewer than {limit - len(self._first)}, got {tokens} "
                "tokens"
            )

    def fork(self) -> TruncateReader:
        """See `Reader.fork`."""
        fork = copy.copy(self)
        fork._ids = list(self._ids)
        return fork

    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """See `Reader.answer`."""
        options = generation_options(generation)
        return self._reader(len(ids) + options["max_new_tokens"]).answer(ids, **options)

    def foresee(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.foresee`."""
        return self._reader(len(ids)).foresee(ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the tokens that are kept."""
        return self._reader(0).nbytes

    @property
    def bounds(self) -> Bounds:
        """See `Reader.bounds`: the tokens that are kept."""
        limit = self._empty.limit
        kept = None if limit is None else limit - limit // _SHARE
        return Bounds(asked=kept, held=kept)

    def _reader(self, room: int) -> CacheReader:
        """Who has read the last tokens that fit beside so many others."""
        limit = self._empty.limit
        self.check_asked(room)
        room = 0 if limit is None else max(room, limit // _SHARE) + len(self._first)
        if self._made is None or self._made[0] != room:
            reader = self._empty.fork()
            kept = self._ids if limit is None else self._ids[room - limit :]
            reader.read([*self._first, *kept])
            self._made = room, reader
        return self._made[1]
