"""What a model carries between calls: every layer's memory and open chunk, and each row's counts.

`CometCache` is a value. `forward` returns a new one and leaves the one it was given as it was, so
keeping an old cache is a fork, and an error halfway loses nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from cometlm.config import CometConfig
from cometlm.core.layout import RowCounts
from cometlm.core.state import LayerState, join_layers

PARTS = ("global", "temporary")  # the two halves of a memory


@dataclass(frozen=True)
class CometCache:
    """Memory and open chunks of a batch after some text.

    Attributes:
        layers: one state per layer.
        rows: one count per row of the batch.
        config: sizes of the last call, with its stride and capacity.
        max_positions: rows that the rotary tables hold.
        columns: columns of `input_ids` read since `generate()` began; what transformers calls
            the cache's length. The session may have read far more: `tokens_read`.
        ahead: of the columns that the next `generate()` is given, those that were read already.
    """

    # Asked by transformers' generate(), the second one from 5.24 on.
    is_compileable: ClassVar[bool] = False
    is_linear: ClassVar[tuple[bool, ...]] = (False,)

    layers: tuple[LayerState, ...]
    rows: tuple[RowCounts, ...]
    config: CometConfig
    max_positions: int
    columns: int = 0
    ahead: int = 0

    @classmethod
    def empty(cls, layers: int, batch: int, config: CometConfig) -> CometCache:
        """The cache before any text."""
        return cls((LayerState(),) * layers, (RowCounts(),) * batch, config, config.row_length)

    def max_positions_under(self, config: CometConfig) -> int:
        """The longest row that can come up in a call with `config`, on top of what is held.

        It is `config.row_length` while the budget stays as it is. After a change of budget the
        open chunk keeps the memory and the compression tokens that it has.
        """
        longest = config.row_length
        rest = 1 if config.chunk_size % config.stride else 0
        for row in self.rows:
            memory = (config.global_slots if row.folds else 0) + row.entries
            added = config.chunk_size - row.text
            if config.temporary_memory:
                added += config.chunk_size // config.stride - row.text // config.stride + rest
            longest = max(longest, memory + row.items + added + config.global_slots)
        return longest

    @classmethod
    def join(cls, caches: Sequence[CometCache]) -> CometCache:
        """The cache of a batch of all rows of these, which may stand at different places.

        Raises:
            ValueError: none, or of different sizes; some rows have an open chunk and others not.
        """
        if len(caches) == 1:
            return caches[0]
        if not caches:
            raise ValueError("caches must be at least one, got none")
        first = caches[0]
        if any(cache.config != first.config for cache in caches):
            raise ValueError("caches must be of the same sizes to be joined")
        single = [cache.select([row]) for cache in caches for row in range(len(cache.rows))]
        rows = tuple(cache.rows[0] for cache in single)
        if len({row.items > 0 for row in rows}) > 1:
            raise ValueError("caches must all have an open chunk to be joined, or none")
        layers = tuple(map(join_layers, zip(*(cache.layers for cache in single), strict=True)))
        longest = max(cache.max_positions for cache in caches)
        return cls(layers, rows, first.config, longest)

    def select(self, rows: Sequence[int]) -> CometCache:
        """The cache of a batch made of these rows of this one; a row may come up repeatedly.

        Raises:
            ValueError: a row that the cache does not have.
        """
        if list(rows) == list(range(len(self.rows))):
            return self
        for row in rows:
            if not 0 <= row < len(self.rows):
                raise ValueError(f"row must lie in 0 … {len(self.rows) - 1}, got {row}")
        counts = tuple(self.rows[row] for row in rows)
        layers = tuple(layer.select(rows, counts, self.config) for layer in self.layers)
        return replace(self, layers=layers, rows=counts)

    def without(self, parts: Collection[str]) -> CometCache:
        """The cache of a model that has lost a part of its memory: "global", "temporary" or both.

        Raises:
            ValueError: another part; a chunk is open, which has read the memory already.
        """
        for part in parts:
            if part not in PARTS:
                raise ValueError(f"a part must be one of {', '.join(PARTS)}, got {part!r}")
        if not parts:
            return self
        if any(row.items for row in self.rows):
            raise ValueError("memory can only be taken away at a chunk's end, and a chunk is open")
        layers, rows = self.layers, self.rows
        if "global" in parts:
            layers = tuple(replace(x, memory=replace(x.memory, state=None)) for x in layers)
            rows = tuple(replace(row, folds=0) for row in rows)
        if "temporary" in parts:
            layers = tuple(replace(x, memory=replace(x.memory, entries=())) for x in layers)
            rows = tuple(replace(row, entries=0) for row in rows)
        return replace(self, layers=layers, rows=rows)

    def restarted(self) -> CometCache:
        """The same memory, with `get_seq_length` counting from here, or from `ahead` before."""
        if self.columns == self.ahead == 0:
            return self
        return replace(self, columns=self.ahead, ahead=0)

    def ahead_by(self, columns: int) -> CometCache:
        """For a `generate()` whose ids begin with so many that this cache has read."""
        return replace(self, columns=0, ahead=columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` read since `generate()` began (transformers' name)."""
        return self.columns

    @property
    def is_open(self) -> bool:
        """Whether some row has text that is in no memory yet."""
        return any(row.text for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: constant once the memory is full."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def chunks_folded(self) -> int:
        """Chunks folded into memory, of the row that has folded most."""
        return max(row.folds for row in self.rows)

    @property
    def tokens_read(self) -> int:
        """Text tokens read, of the row that has read most."""
        return max(row.tokens for row in self.rows)
