"""Memory of one layer: the value that is carried, and the small modules that update it.

`LayerMemory` is a value: updates return a new one and nothing is changed in place, so memories can
be kept, forked, saved and sent. The modules hold weights only (SPEC §3). Rows of a batch may hold
different amounts of memory; how much is counted once for all layers in `layout.RowCounts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cometlm.config import CometConfig
from cometlm.device import sent

# RMSNorm_g keeps torch.nn.RMSNorm's default for float32 whatever the dtype (SPEC §3).
GLOBAL_EPS = float(torch.finfo(torch.float32).eps)
TEMPORARY_EPS = 1e-12


@dataclass(frozen=True)
class LayerMemory:
    """What one layer remembers between chunks.

    Attributes:
        state: gated global state [B, M, D], un-adapted; None before the first fold.
        entries: temporary memory, oldest first: blocks [B, e, E] whose lengths add up to at most
            the capacity. E is D for hidden rows, or the width of a key and a value where that is
            smaller. In a ragged batch there is one block, and row b holds its first
            `RowCounts.entries` rows.
    """

    state: Tensor | None = None
    entries: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        state = 0 if self.state is None else self.state.nbytes
        return state + sum(block.nbytes for block in self.entries)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 for the half types."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x [..., D], in the weight's dtype."""
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight = self.weight.to(wide)
        return F.rms_norm(x.to(wide), weight.shape, weight, self.eps).to(self.weight.dtype)


class LowRankAdapter(nn.Module):
    """x + Up(Down(x)), without bias: RLA of SPEC §3. Starts as the identity.

    Like all memory weights these are parameters and no `nn.Linear`, so that adapters and
    quantisation meant for the backbone's projections never reach them.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        """X [..., D] with its low-rank update."""
        return x + F.linear(F.linear(x, self.down), self.up)


class GlobalMemory(nn.Module):
    """The gated update of the global state, and the slots that the next chunk sees (SPEC §3)."""

    def __init__(self, width: int, rank: int, gate: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(width, GLOBAL_EPS)
        # An even mix until trained.
        self.gate = nn.Parameter(torch.zeros(1, 2 * width)) if gate else None
        self.adapter = LowRankAdapter(width, rank)

    def update(self, state: Tensor | None, readout: Tensor) -> Tensor:
        """New state [B, M, D] from the old one and the layer's readout outputs [B, M, D]."""
        candidate: Tensor = self.norm(readout)
        if state is None or self.gate is None:
            return candidate
        keep = self.share_kept(state, candidate)
        return torch.lerp(candidate, state, keep.to(candidate.dtype))

    def share_kept(self, state: Tensor, candidate: Tensor) -> Tensor:
        """The gate [B, M, 1]: the share of the old state [B, M, D] that stays; 0 without gates."""
        if self.gate is None:
            return state.new_zeros(*state.shape[:-1], 1)
        return torch.sigmoid(F.linear(torch.cat([candidate, state], dim=-1), self.gate))

    def forward(self, state: Tensor) -> Tensor:
        """Slots G [B, M, D] that the next chunk sees."""
        slots: Tensor = self.adapter(state)
        return slots


class TemporaryMemory(nn.Module):
    """Turns the layer's compression outputs into entries (SPEC §3)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, TEMPORARY_EPS)
        self.adapter = LowRankAdapter(width, rank)

    def forward(self, compression: Tensor) -> Tensor:
        """Entries [B, e, D] from outputs [B, e, D]."""
        entries: Tensor = self.adapter(self.norm(compression))
        return entries


class LayerMemoryWeights(nn.Module):
    """All memory weights of one layer; a part is None where its memory is switched off.

    Args:
        attends: whether the layer does; one that does not has no memory.
    """

    def __init__(self, width: int, config: CometConfig, attends: bool = True) -> None:
        super().__init__()
        has_global = attends and config.global_memory
        has_temporary = attends and config.temporary_memory
        self.global_memory = GlobalMemory(width, config.rank, config.gate) if has_global else None
        self.temporary_memory = TemporaryMemory(width, config.rank) if has_temporary else None


class Comet(nn.Module):
    """Every weight that CoMeT adds to a backbone: this module is what a checkpoint holds.

    Attributes:
        readout: R [M, D], or None.
        compression: C [1, D], or None.
        layers: one `LayerMemoryWeights` per layer of the backbone.

    Args:
        width: D of the backbone.
        attends: of each layer, whether it does.
        config: sizes.
    """

    def __init__(self, width: int, attends: Sequence[bool], config: CometConfig) -> None:
        super().__init__()
        self.readout = (
            nn.Parameter(torch.randn(config.readout_tokens, width) * 0.02)
            if config.global_memory
            else None
        )
        self.compression = (
            nn.Parameter(torch.randn(1, width) * 0.02) if config.temporary_memory else None
        )
        self.layers = nn.ModuleList([LayerMemoryWeights(width, config, one) for one in attends])

    def imitate(self, embeddings: Tensor) -> None:
        """Draw R and C like embeddings [V, D] that the backbone knows: same mean and spread."""
        mean, spread = embeddings.mean(0), embeddings.std(0)
        with torch.no_grad():
            for parameter in (self.readout, self.compression):
                if parameter is not None:
                    parameter.copy_(torch.randn_like(parameter) * spread + mean)


def push(blocks: Sequence[Tensor], new: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """Append a block [B, e, E] to the FIFO and drop what exceeds `capacity` from its old end."""
    kept = [*blocks, new]
    excess = sum(block.shape[1] for block in kept) - capacity
    while excess > 0:
        oldest = kept[0].shape[1]
        if oldest <= excess:
            kept.pop(0)
        else:
            kept[0] = kept[0][:, excess:]
        excess -= min(oldest, excess)
    return tuple(kept)


def join_ragged(
    old: Tensor, old_lengths: Sequence[int], new: Tensor, new_lengths: Sequence[int]
) -> Tensor:
    """Per row: the first `old_lengths[b]` of old, then the first `new_lengths[b]` of new.

    Args:
        old: [B, …, S, W]; new: [B, …, T, W]. Rows are counted along the last axis but one.

    Returns:
        [B, …, longest, W]. What follows a shorter row's own length is filling, to be masked.
    """
    longest = max(o + n for o, n in zip(old_lengths, new_lengths, strict=True))
    most, count = max(old_lengths), new.shape[-2]
    # One copy, since this is done for each token of rows that are decoded together.
    joined = F.pad(old[..., :most, :], (0, 0, 0, count))
    place = torch.tensor(list(old_lengths))[:, None] + torch.arange(count)
    rows = torch.arange(len(place), device=new.device)[:, None]
    joined.movedim(-2, 1)[rows, sent(place, new.device)] = new.movedim(-2, 1)
    return joined[..., :longest, :]


def push_ragged(
    old: Tensor,
    old_lengths: Sequence[int],
    new: Tensor,
    new_lengths: Sequence[int],
    most: Sequence[int],
) -> Tensor:
    """The last `most[b]` rows of each [B, longest, E] of what `join_ragged` of [B, S, E] gives."""
    ends = [o + n for o, n in zip(old_lengths, new_lengths, strict=True)]
    kept = [min(end, limit) for end, limit in zip(ends, most, strict=True)]
    drops = torch.tensor([end - count for end, count in zip(ends, kept, strict=True)])[:, None]
    slot = torch.arange(max(kept)) + drops
    first = torch.tensor(list(old_lengths))[:, None]
    source = torch.where(slot < first, slot, old.shape[1] + slot - first)
    both = torch.cat([old, new], dim=1)
    index = sent(source.clamp(max=both.shape[1] - 1), both.device)
    return both[torch.arange(len(both), device=both.device)[:, None], index]
