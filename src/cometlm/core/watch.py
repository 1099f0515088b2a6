"""A look at the memory that each chunk's end has written: is it finite?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cometlm.core.layout import ChunkLayout
from cometlm.core.state import States
from cometlm.device import return_freed_memory


class Watch:
    """What follows every step of a call: a look at the memory that a chunk's end has written.

    The CPU looks at once. On another device a look would wait for all work under way, so numbers
    are fetched beside that work, and looked at when the next chunk ends, or the call does.

    Args:
        give_back: give freed memory back to the system; in training it is wanted again at once.
    """

    def __init__(self, give_back: bool) -> None:
        self._give_back = give_back
        self._coming: _Sums | None = None

    def __call__(self, layout: ChunkLayout, states: States) -> None:
        """Look at what one step has written.

        Raises:
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        if not layout.closes:
            return
        if states:
            self.end()
            self._coming = _Sums.of(states, layout)
            if self._coming is not None and self._coming.event is None:
                self.end()
        if self._give_back:
            return_freed_memory(layout.device)

    def end(self) -> None:
        """Look at what was fetched last.

        Raises:
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.check()


@dataclass(frozen=True)
class _Sums:
    """Sums of what a chunk wrote, some for each layer: not finite where a term is not.

    Attributes:
        sums: on the CPU, or on their way there.
        event: says when they are there; None: they are.
        layers: which layer each is of.
        chunk: which chunk, from 0 on.
    """

    sums: Tensor
    event: torch.Event | None
    layers: tuple[int, ...]
    chunk: int

    @classmethod
    def of(cls, states: States, layout: ChunkLayout) -> _Sums | None:
        """Sum what this chunk wrote: one pass, in which nothing of the memory's size is made."""
        parts: list[Tensor] = []
        layers: list[int] = []
        for i, state in enumerate(states):
            written = (state.memory.state, *state.memory.entries[-1:], *state.own.values())
            found = [x.detach().sum(dtype=torch.float32) for x in written if x is not None]
            parts += found
            layers += [i] * len(found)
        if not parts:
            return None
        sums = torch.stack([part.to(parts[0].device) for part in parts])
        chunk = max(row.folds for row in layout.rows)
        if sums.device.type == "cpu":
            return cls(sums, None, tuple(layers), chunk)
        event = torch.Event(sums.device)
        there = torch.empty(sums.shape, dtype=sums.dtype, device="cpu", pin_memory=True)
        there.copy_(sums, non_blocking=True)
        event.record(torch.accelerator.current_stream(sums.device))
        return cls(there, event, tuple(layers), chunk)

    def check(self) -> None:
        """Look at them; waits for them alone.

        Raises:
            FloatingPointError: one is not finite.
        """
        if self.event is not None:
            self.event.synchronize()
        for layer, total in zip(self.layers, self.sums.tolist(), strict=True):
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"the memory of layer {layer} is not finite (NaN or infinite) after "
                    f"chunk {self.chunk}; the cache given to this call is unharmed"
                )
