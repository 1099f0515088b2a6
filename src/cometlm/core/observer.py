"""Watching a training step: called when a chunk is closed, an observer adds losses of its own.

Questions on the way and what readout tokens should say are observers (`train.probes`). They run
inside the step, so recomputation and the wave are exact for them as they are for the text.

Legend: B batch, P probes, A tokens of a probe, M readout tokens, n text tokens of a step, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cometlm.core.layout import ChunkLayout, RowCounts
from cometlm.core.state import States


@dataclass(frozen=True)
class Score:
    """A sum of losses over labels.

    Attributes:
        loss: summed, in nats (a scalar).
        num_correct: how many labels were the likeliest token (a scalar).
        count: how many labels there were (a scalar).
    """

    loss: Tensor
    num_correct: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss of one label; 0 where there were none."""
        return self.loss / self.count.clamp(min=1)

    @property
    def accuracy(self) -> Tensor:
        """The share of labels that were the likeliest token; 0 where there were none."""
        return self.num_correct / self.count.clamp(min=1)

    def __add__(self, other: Score) -> Score:
        return Score(*(one + more for one, more in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its three numbers."""
        return self.loss, self.num_correct, self.count


@dataclass(frozen=True)
class ClosedChunk:
    """A chunk whose end has just been folded into the memory.

    Attributes:
        layout: where its items stand; `layout.rows` are each row's counts before the step.
        rows: each row's counts after it.
        is_last: whether nothing of the text follows.
        states: every layer's state after it.
        text: last hidden states [B, n, D] of its text.
        readout: last hidden states [B, M, D] of its readout tokens; M is 0 without global memory.
        score: from hidden states [B, any, D] and labels [B, any], which stand at the position that
            is to say them (-100 is not counted), to their `Score`.
        read: from ids [P·B, A] and labels [P·B, A] to the `Score` of those labels, each the token
            that follows the one before it, as in `forward`. Each of the P blocks of rows is read by
            a fork of the memory that is then forgotten, all of them in one pass. A is at most what
            the open chunks have room for.
    """

    layout: ChunkLayout
    rows: tuple[RowCounts, ...]
    is_last: bool
    states: States
    text: Tensor
    readout: Tensor
    score: Callable[[Tensor, Tensor], Score]
    read: Callable[[Tensor, Tensor], Score]


class ChunkObserver(ABC):
    """Adds losses to a training step.

    Under recomputation `after_chunk` is called twice for a chunk, and must do the same both times.

    Attributes:
        losses: names of the losses that `after_chunk` may return.
    """

    losses: tuple[str, ...]

    @abstractmethod
    def after_chunk(self, chunk: ClosedChunk) -> Mapping[str, Score]:
        """Look at a chunk that was closed.

        Returns:
            Scores by the names in `losses`; names may be left out.
        """


def as_vector(scores: Mapping[str, Score], names: tuple[str, ...], like: Tensor) -> Tensor:
    """Scores in one tensor [3 · names], so that a step leaves one.

    Raises:
        ValueError: a score under a name that is not among `names`.
    """
    if unknown := set(scores) - set(names):
        raise ValueError(f"losses must name {', '.join(names)}, got {', '.join(sorted(unknown))}")
    nothing = like.new_zeros(())
    none = Score(nothing, nothing, nothing)
    parts = [part for name in names for part in scores.get(name, none).parts]
    return torch.stack([part.to(nothing) for part in parts]) if parts else like.new_zeros(0)


def from_vector(values: Tensor, names: tuple[str, ...]) -> dict[str, Score]:
    """The scores in a tensor of `as_vector`."""
    return {name: Score(*values[3 * i : 3 * i + 3].unbind()) for i, name in enumerate(names)}
