"""A causal language model taken apart, as a value; `taking_apart` and `discovery` make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cometlm.backbones.calling import LayerCall
from cometlm.backbones.families import Family
from cometlm.backbones.rotary import Rotation
from cometlm.backbones.watching import Sample


@dataclass(frozen=True)
class LearnedPositions:
    """A table of positions that is added to what enters the first layer.

    Attributes:
        module: the embedding.
        offset: its row of position 0.
    """

    module: nn.Embedding
    offset: int

    @property
    def rows(self) -> int:
        """How many positions it has."""
        return self.module.num_embeddings - self.offset

    def __call__(self, positions: Tensor) -> Tensor:
        """Rows [1 or B, I, D] of positions [1 or B, I]."""
        return rows_of(self.module, positions + self.offset)


def rows_of(module: nn.Module, index: Tensor) -> Tensor:
    """Rows of an embedding, whatever its own forward takes."""
    if type(module).forward is nn.Embedding.forward:
        rows: Tensor = module(index)  # whose hooks bring weights that are kept elsewhere
        return rows
    weight: Any = module.weight
    return F.embedding(index.to(weight.device), weight)


@dataclass(frozen=True)
class Parts:
    """A causal language model taken apart; the modules are the model's own, not copies.

    Attributes:
        family: its row, or None.
        config: the backbone's.
        calls: how each layer is called.
        rotations: where each layer's rotary table comes from.
        scale: what embeddings of tokens are multiplied with before the first layer.
        positions: what is added to them then, or None.
        embed_norm: a norm in front of the first layer, or None.
        sample: what was seen of a backbone without a row, for comparison.
    """

    family: Family | None
    config: Any
    embed_tokens: nn.Module
    layers: list[nn.Module]
    calls: list[LayerCall]
    rotations: list[Rotation]
    norm: nn.Module
    lm_head: nn.Module
    scale: float = 1.0
    positions: LearnedPositions | None = None
    embed_norm: nn.Module | None = None
    sample: Sample | None = None

    @property
    def called(self) -> tuple[list[nn.Module], list[LayerCall]]:
        """The layers, and how each is called."""
        return self.layers, self.calls

    @property
    def rotary_modules(self) -> dict[str, nn.Module]:
        """Each rotary module once, by its name in the model with memory."""
        modules = dict.fromkeys(one.module for one in self.rotations if one.module is not None)
        names = ("rotary_emb", *(f"rotary_emb_{i}" for i in range(1, len(modules))))
        return dict(zip(names, modules, strict=False))
