"""What a model carries between calls: every layer's memory and open chunk, and each row's counts.

`CometCache` is a value. `forward` returns a new one and leaves the one it was given as it was, so
keeping an old cache is a fork, and an error halfway loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from cometlm.config import CometConfig
from cometlm.grid import LayerState
from cometlm.layout import RowCounts


@dataclass(frozen=True)
class CometCache:
    """Memory and open chunks of a batch after some text.

    Attributes:
        layers: one state per layer.
        rows: one count per row of the batch.
        config: sizes of the last call, with its stride and capacity.
        reach: rows that the rotary tables hold.
    """

    layers: tuple[LayerState, ...]
    rows: tuple[RowCounts, ...]
    config: CometConfig
    reach: int

    @classmethod
    def empty(cls, layers: int, batch: int, config: CometConfig) -> CometCache:
        """The cache before any text."""
        return cls((LayerState(),) * layers, (RowCounts(),) * batch, config, config.row_length)

    def reach_under(self, config: CometConfig) -> int:
        """Rows that the rotary tables of a call with `config` must hold.

        What an open chunk and a memory hold already stays, so a row can be as long as the larger
        of the two budgets makes it, and one rest longer where the stride changes inside a chunk.
        """
        return self.reach if config == self.config else max(self.reach, config.row_length) + 1

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
