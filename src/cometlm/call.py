"""One call of the model, checked and planned: its text, its steps, and what is wanted of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cometlm.batch import TextBatch
from cometlm.cache import CometCache
from cometlm.config import CometConfig
from cometlm.device import return_freed_memory
from cometlm.grid import States
from cometlm.layout import ChunkLayout, Step


class Scored(NamedTuple):
    """What a caller wants of the hidden states instead of the hidden states themselves.

    Attributes:
        score: from one chunk's last hidden states [B, n, D] and labels [B, n] to a few numbers,
            which are summed over all chunks. It is run again where chunks are.
        labels: [B, N], -100 where there is nothing to score.
        parameters: what `score` uses.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    parameters: Sequence[nn.Parameter]


@dataclass
class Call:
    """One call of `forward`, checked and planned.

    Attributes:
        first: the first column whose hidden states are wanted.
        rows: each row's counts after the layouts made so far.
    """

    text: TextBatch
    cache: CometCache
    steps: list[Step]
    sizes: CometConfig
    reach: int
    first: int
    use_cache: bool
    scored: Scored | None

    def __post_init__(self) -> None:
        self.rows = self.cache.rows

    def layouts(self) -> Iterator[ChunkLayout]:
        """Each step's layout, made when its turn comes."""
        for step in self.steps:
            layout = ChunkLayout(self.sizes, self.rows, step, self.reach, self.text.ids.device)
            self.rows = layout.counts_after()
            yield layout

    def wants(self, step: Step) -> bool:
        """Whether a step's hidden states are wanted."""
        return step is self.steps[-1] or self.text.reaches(step, self.first)


def finished(layout: ChunkLayout, states: States) -> None:
    """What follows every step of reading."""
    checked(layout, states)
    if layout.closes:
        return_freed_memory(layout.device)


def checked(layout: ChunkLayout, states: States) -> None:
    """What follows every step of training, where freed memory is wanted again at once."""
    if layout.closes and states:
        _check_finite(states, layout)


def _check_finite(states: States, layout: ChunkLayout) -> None:
    """Stop at the first layer whose memory is not finite; looks at what this chunk wrote."""
    checks: list[Tensor] = []
    for state in states:
        written = (state.memory.state, *state.memory.entries[-1:])
        # A sum is not finite where a term is not: one pass, nothing of the memory's size is made.
        checks.extend(x.detach().sum(dtype=torch.float32) for x in written if x is not None)
    if not checks:
        return
    per_layer = len(checks) // len(states)
    sums = torch.stack([check.to(checks[0].device) for check in checks])  # one wait for the device
    for i, total in enumerate(sums.tolist()):
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the memory of layer {i // per_layer} is not finite (NaN or infinite) after chunk "
                f"{max(row.folds for row in layout.rows)}; the cache given to this call is unharmed"
            )
