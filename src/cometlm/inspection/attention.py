"""What a layer attends to: attention weights beside the ordinary path, which never forms them.

Fused kernels give no weights. While a model is watched, its layers call an attention function of
another name, which does what theirs does and then hands over what it was given. Weights are
computed from that, for the items that somebody asks about.

Pitfalls:
    - Cells that were compiled keep the function that they were compiled with: watch others.

Legend: H heads, I items of a step, q some of them, S slots of the row: memory, then chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from cometlm.backbones.calling import told
from cometlm.backbones.plain_attention import attention_weights
from cometlm.backbones.text_half import attending_by
from cometlm.core.attention import CellCall, comet_attention
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.layout import ChunkLayout

NAME = "cometlm-watched"
PARTS = ("global memory", "temporary memory", "first token", "rest of the chunk")
_MOST_WEIGHTS = 1 << 24  # formed at a time


@dataclass(frozen=True)
class LayerAttention:
    """One call of a layer's attention, of one row of text.

    Attributes:
        layout: where everything stands.
        query: rotated queries of the step's items [H, I, W].
        key: rotated keys of the row [key-value heads, S, W].
        window: how far back an item sees in its chunk; None is all of it.
        scale: of the products.
        softcap: bounds the products, or None.
        sinks: [H] a logit of each head that takes weight and gives nothing, or None.
    """

    layout: ChunkLayout
    query: Tensor
    key: Tensor
    window: int | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def global_slots(self) -> int:
        """Slots of global memory, the first ones of the row."""
        return self.layout.memory_width - self.layout.temporary_width

    @property
    def memory_slots(self) -> int:
        """Slots of memory; the chunk follows."""
        return self.layout.memory_width

    def weights(self, items: Tensor) -> Tensor:
        """Attention weights [H, q, S] of some of the step's items [q], in float32 or wider."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:, items].to(wide), self.key.to(wide)
        seen = self.layout.full_mask(self.window)[0, 0, items]
        return attention_weights(query, key, seen, self.scale, self.softcap, self.sinks)

    def mean_weights(self, items: Tensor) -> Tensor:
        """The same, the mean over at least one item: [H, S]. Never forms many of them at once."""
        at_a_time = max(1, _MOST_WEIGHTS // (len(self.query) * self.key.shape[1]))
        sums = [self.weights(some).sum(1) for some in items.split(at_a_time)]
        return torch.stack(sums).sum(0) / len(items)

    def parts(self, weights: Tensor) -> Tensor:
        """Weights [..., S] summed by where they went: [..., 4], as in `PARTS`.

        The chunk's first token stands apart: many backbones put there what they have no use for (an
        attention sink), whatever the token is.
        """
        first, memory = self.global_slots, self.memory_slots
        borders = (slice(0, first), slice(first, memory), slice(memory, memory + 1))
        parts = [weights[..., part].sum(-1) for part in (*borders, slice(memory + 1, None))]
        return torch.stack(parts, dim=-1)


See = Callable[[int, LayerAttention], None]
_SEE: ContextVar[Callable[[nn.Module, LayerAttention], None] | None] = ContextVar(
    "see", default=None
)


@contextmanager
def watching(model: CometForCausalLM, see: See) -> Iterator[None]:
    """Call `see(layer, attention)` after each layer's attention, in this thread.

    Layers that do not attend are not counted.
    """
    attending = [cell for cell in _cells(model) if cell.attends]
    layers = {id(cell.attention): i for i, cell in enumerate(attending)}
    token = _SEE.set(lambda module, attention: see(layers[id(module)], attention))
    try:
        with attending_by(model._backbone, NAME):
            yield
    finally:
        _SEE.reset(token)


def _cells(model: CometForCausalLM) -> Any:
    return model.model.cells


def _watched(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *args: Any,
    comet: CellCall | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers under `NAME`."""
    comet = told() if comet is None else comet
    options = {**kwargs, "comet": comet, "scaling": scaling, "sliding_window": sliding_window}
    out = comet_attention(module, query, key, *args, **options)
    see = _SEE.get()
    if see is None or not isinstance(comet, CellCall):
        return out
    assert isinstance(comet.layout, ChunkLayout), "a buffer of fixed size is being watched"
    assert comet.chunk is not None
    (slots,) = comet.layout.slots  # what follows is filling; of one row
    keys = [comet.chunk.key[0, :, :slots]]
    if comet.memory is not None:
        keys.insert(0, comet.memory.key[0])
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    row = torch.cat(keys, dim=1)
    window = sliding_window if comet.window is None else comet.window
    more = (kwargs.get("softcap"), kwargs.get("s_aux"))
    see(module, LayerAttention(comet.layout, query[0], row, window, scale, *more))
    return out


AttentionInterface.register(NAME, _watched)
AttentionMaskInterface.register(NAME, sdpa_mask)
