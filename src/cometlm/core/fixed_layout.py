"""Where everything of one decoding step stands, in tensors that a device itself counts on.

`ChunkLayout` counts in Python integers, so every step of an open chunk has shapes and numbers of
its own. Here the whole row, memory and chunk, lies in one buffer whose index is the position, and
the number that moves is a tensor on the device. So one recorded step serves for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class FixedLayout:
    """A step of one text token, and a compression token after it or none; all rows alike.

    It is what a cell asks of a layout as long as no chunk ends.

    Args:
        batch: rows B.
        width: positions W of the buffers.
        items: I, 1 or 2: with a compression token.
        position: [] the first new item's; it stays what it is.
        memory_width: [] memory slots in front of the chunk.
    """

    batch: int
    width: int
    items: int
    position: Tensor
    memory_width: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    uniform: ClassVar[bool] = True
    even: ClassVar[bool] = True
    closes: ClassVar[bool] = False

    @property
    def compressions(self) -> tuple[int, ...]:
        """Compression tokens that each row adds."""
        return (self.items - 1,) * self.batch

    @cached_property
    def positions(self) -> Tensor:
        """[1, I]: position of each new item, which is also its place in the buffers."""
        return self.position + torch.arange(self.items, device=self.position.device)[None, :]

    @cached_property
    def compression_index(self) -> Tensor:
        """[1, 1]: which item is the compression token."""
        return torch.ones(1, 1, dtype=torch.long, device=self.position.device)

    def mask(self, window: int | None) -> Tensor:
        """[I, W] bool: what each new item sees of the buffers; the window applies to the chunk."""
        if window not in self._masks:
            place = torch.arange(self.width, device=self.position.device)[None, :]
            own = self.positions.T
            seen = place <= own
            if window is not None:
                seen &= (own - place < window) | (place < self.memory_width)
            self._masks[window] = seen
        return self._masks[window]
