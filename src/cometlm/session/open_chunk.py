"""The open chunk as far as it was run for an answer, so that the next answer need not run it again.

A session folds each chunk into its memory whole, when it is full: how a text was cut makes no
difference to what is remembered. What is here is beside that and can be given up at any time; it
saves time, and says the same but for how numbers are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cometlm.core.cache import CometCache


@dataclass(frozen=True)
class OpenChunk:
    """What the model has made of the beginning of an open chunk.

    Attributes:
        memory: the cache at the chunk's beginning.
        ids: the tokens of the chunk that were run.
        cache: the cache behind them.
        logits: [V], of the token that comes next; None where they were not made.
    """

    memory: CometCache
    ids: tuple[int, ...]
    cache: CometCache
    logits: Tensor | None = None

    @classmethod
    def after(
        cls, memory: CometCache, ids: Sequence[int], past: tuple[CometCache, int]
    ) -> OpenChunk | None:
        """What writing has left of a chunk; None where the chunk was folded on the way.

        Args:
            memory: the cache at the chunk's beginning.
            ids: tokens of the chunk, and of the answer behind it.
            past: a cache that has read some of them, and which of its rows it is.
        """
        cache, row = past
        counts = cache.rows[row]
        if counts.folds != memory.chunks_folded:
            return None
        read = ids[: counts.tokens - memory.tokens_read]
        return cls(memory, tuple(read), cache.select([row]).restarted())

    def num_ready(self, memory: CometCache, ids: Sequence[int]) -> int:
        """How many of a chunk's tokens need not be run again; 0 in front of another chunk."""
        count = len(self.ids)
        if memory is not self.memory or tuple(ids[:count]) != self.ids:
            return 0
        return count if count < len(ids) or self.logits is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held beside the memory."""
        return self.cache.nbytes - self.memory.nbytes
