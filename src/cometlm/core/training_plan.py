"""How training steps are read: what is recomputed, cut, shared with other ranks and watched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from cometlm.core.observer import ChunkObserver
from cometlm.core.recompute import Recomputation
from cometlm.core.state import States

if TYPE_CHECKING:
    from cometlm.core.model import CometModel
    from cometlm.core.plan import Call


class Chunking(Protocol):
    """Says how the rows of a training batch are cut; see `train.chunk_plans`."""

    def draw(self, rows: Sequence[Sequence[int]], size: int) -> Any:
        """`chunk_lengths`, `stride` and `capacity` of a batch."""


class SharedReading(Protocol):
    """A way of reading a call together with other ranks; see `parallel.pipeline`."""

    def read(self, model: CometModel, call: Call) -> tuple[list[Tensor], States]:
        """What the steps leave that this rank has read, and the states after them."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a model reads while it is trained: a value, given as `model.training_plan`.

    Attributes:
        recomputation: how a step saves memory, or None to keep the whole graph; what
            `activation_checkpointing_enable()` sets.
        truncate_after: gradients reach back at most this many chunks; 0 is all.
        chunking: where samples are cut, unless a chunk is open; None cuts them as reading does.
        pipeline: reads each sample together with other ranks, in evaluation too.
        observer: adds losses of its own to those of labels.
        memory_frozen: train without the memory's weights; otherwise that is an error.
    """

    recomputation: Recomputation | None = None
    truncate_after: int = 0
    chunking: Chunking | None = None
    pipeline: SharedReading | None = None
    observer: ChunkObserver | None = None
    memory_frozen: bool = False

    def __post_init__(self) -> None:
        if self.truncate_after < 0:
            raise ValueError(f"truncate_after must be at least 0, got {self.truncate_after}")
