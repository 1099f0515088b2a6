"""The cell: one layer applied to one chunk, and the update of its memory.

Cell (t, i) is layer i applied to chunk t. It needs the hidden states of (t, i-1) and the memory
that layer i left after (t-1, i), and nothing else (SPEC §1). This is the one implementation of it.
Everything that a layer carries between steps is a `LayerState`, a value that goes in; a new one
comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from cometlm.backbones.calling import KeyValue, LayerCall, RotaryTable
from cometlm.backbones.families import Family, rotate_keys
from cometlm.backbones.recurrence import OwnState
from cometlm.core.attention import CellCall
from cometlm.core.fixed_layout import FixedLayout
from cometlm.core.layout import ChunkLayout, take
from cometlm.core.memory import LayerMemory, LayerMemoryWeights, join_ragged, push, push_ragged
from cometlm.core.rows_apart import run_apart
from cometlm.core.state import LayerState, OpenChunk
from cometlm.device import sent


class Cell(nn.Module):
    """One layer of the backbone with its memory: the whole of cell (t, i).

    It touches all the layer's weights inside `forward` and is called once per layer and step, which
    is what sharding (FSDP2) and offloading hooks need. The memory weights come in as an argument:
    they live in the one module `comet` that adapters train and save.

    Args:
        layer: the backbone's.
        call: how it is called.
        family: the backbone's row, which projects memory slots without running the layer. None:
            its keys and values are captured.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, family: Family | None) -> None:
        super().__init__()
        self.layer = layer
        self.call = call
        self.family = family

    def forward(
        self,
        hidden: Tensor,
        state: LayerState,
        layout: ChunkLayout | FixedLayout,
        rotary: RotaryTable,
        weights: LayerMemoryWeights,
    ) -> tuple[Tensor, LayerState]:
        """Run the layer on one step's items.

        Args:
            hidden: [B, I, D].
            state: what the layer carries.
            layout: where the items stand.
            rotary: cosines and sines, [positions, width] each (or what the layer is called with).
            weights: the layer's memory weights.

        Returns:
            Outputs [B, I, D] and the new state.
        """
        if not self.attends:
            return self._without_memory(hidden, state, layout, rotary)

        def slots(memory: LayerMemory, layout: ChunkLayout) -> KeyValue | None:
            return self._slots(memory, layout, rotary, weights, hidden.dtype)

        pending: tuple[Tensor, ...]
        if state.open is None:
            assert isinstance(layout, ChunkLayout), "a fixed layout has no place to open a chunk"
            memory, before, pending = slots(state.memory, layout), None, ()
        else:
            memory, before, pending = state.open.memory, state.open.chunk, state.open.pending
        call = CellCall(layout, memory, before, self.call.window)
        out, own = hidden, state.own
        if hidden.shape[1]:  # else a chunk ends that is full already and has no readout tokens
            out, own = self._run(hidden, own, call, rotary)
        if call.chunk is None:
            raise ValueError(_OTHER_ATTENTION.format(self.attention.config._attn_implementation))
        pending = self._extend(pending, out, layout, weights)
        if not layout.closes:
            return out, replace(state, open=OpenChunk(memory, call.chunk, pending), own=own)
        assert isinstance(layout, ChunkLayout), "a fixed layout closes no chunk"
        folded = self._fold(state.memory, out, pending, layout, weights)
        after = replace(layout, rows=layout.counts_after(), tables={})
        longest = max(row.items for row in after.rows)
        if longest == 0:
            return out, LayerState(folded, own=own)
        # Rows whose chunk goes on keep their items; the slots of the others are filling from here.
        chunk = KeyValue(*(x[:, :, :longest] for x in call.chunk))
        entries = max(row.compressions for row in after.rows)
        kept = tuple(block[:, :entries] for block in pending)
        return out, LayerState(folded, OpenChunk(slots(folded, after), chunk, kept), own)

    def along(
        self,
        hidden: Sequence[Tensor],
        state: LayerState,
        layouts: Sequence[ChunkLayout],
        rotary: RotaryTable,
        weights: LayerMemoryWeights,
        recompute: bool = False,
    ) -> tuple[list[Tensor], list[LayerState]]:
        """The cells of one layer along a block of chunks: one call, however many they are.

        Args:
            hidden: of each step, [B, I, D]; none is allowed, and leaves the state as it is.
            layouts: of each step.
            recompute: keep what goes into a cell, and run it again in the backward pass.

        Returns:
            Outputs of each step, and the state after each.
        """
        outs, states = [], []
        for x, layout in zip(hidden, layouts, strict=True):
            args = (x, state, layout, rotary, weights)
            if recompute:
                out, state = checkpoint(self.forward, *args, use_reentrant=False)
            else:
                out, state = self.forward(*args)
            outs.append(out)
            states.append(state)
        return outs, states

    # --- running the layer ------------------------------------------------------------------

    @property
    def attends(self) -> bool:
        """Whether the layer does, and so has a memory."""
        return self.call.attention is not None

    def _without_memory(
        self,
        hidden: Tensor,
        state: LayerState,
        layout: ChunkLayout | FixedLayout,
        rotary: RotaryTable,
    ) -> tuple[Tensor, LayerState]:
        """What a layer does that does not attend: text, C and R go through, and it carries on."""
        if not hidden.shape[1]:
            return hidden, state
        out, own = self._run(hidden, state.own, CellCall(layout, None, None), rotary)
        return out, replace(state, own=own)

    def _run(
        self, hidden: Tensor, own: OwnState, call: CellCall, rotary: RotaryTable
    ) -> tuple[Tensor, OwnState]:
        """The layer's outputs [B, I, D], and the state of its own after the items.

        Filling would disturb such a state, so rows with as many items go together.

        Args:
            own: the state before.
            call: told to the attention function, which leaves the chunk's keys and values in it.
        """
        layout = call.layout
        table = _of_items(rotary, layout)
        if self.call.cache is None or layout.even:
            return self.call.with_state(self.layer, hidden, table, call, own)
        return run_apart(call, hidden, own, partial(self._run, rotary=rotary))

    @torch.no_grad()
    def own_like(self, hidden: Tensor, rotary: RotaryTable) -> OwnState:
        """A state of the layer's own in shape and dtype; the numbers mean nothing.

        Args:
            hidden: [B, 1, D], a step's first item.
        """
        if self.call.cache is None:
            return {}
        table = _between(rotary, 0, 1)
        return self.call.with_state(self.layer, hidden, table, None, {})[1]

    # --- reading memory ---------------------------------------------------------------------

    def _slots(
        self,
        memory: LayerMemory,
        layout: ChunkLayout,
        rotary: RotaryTable,
        weights: LayerMemoryWeights,
        dtype: torch.dtype,
    ) -> KeyValue | None:
        """Rotated keys and values of the memory slots; a slot is never anything else (SPEC §2)."""
        parts = []
        if memory.state is not None and weights.global_memory is not None:
            parts.append(weights.global_memory(memory.state).to(dtype))
        if not self.packs:
            parts.extend(memory.entries)
        table = _between(rotary, 0, layout.memory_width)
        if self.family is None:
            if not parts:
                return None
            made: KeyValue = self.call.key_value(self.layer, _joined(parts), table)
            return made
        pairs = [self.family.key_value(self.layer, _joined(parts))] if parts else []
        if self.packs and memory.entries:
            pairs.append(self._unpack(_joined(memory.entries)))
        if not pairs:
            return None
        key, value = (torch.cat(part, dim=2) for part in zip(*pairs, strict=True))
        cos, sin = table
        return KeyValue(rotate_keys(self.layer, key, cos, sin), value)

    @property
    def attention(self) -> Any:
        """The layer's module that attends, where one does."""
        assert self.call.attention is not None
        return self.layer.get_submodule(self.call.attention)

    @property
    def packs(self) -> bool:
        """Whether entries are kept as keys and values: where a row has them, and they are smaller.

        Captured ones are rotated, so they are as good as at one place only.
        """
        return self.family is not None and self._packed_width < self._width

    @property
    def _width(self) -> int:
        """Width of a hidden row."""
        return int(self.attention.config.hidden_size)

    @property
    def _packed_width(self) -> int:
        """Width of a key and a value."""
        return 2 * int(self.attention.config.num_key_value_heads) * int(self.attention.head_dim)

    @property
    def entry_width(self) -> int:
        """Width E of one entry of this layer's temporary memory."""
        return self._packed_width if self.packs else self._width

    def _pack(self, entries: Tensor) -> Tensor:
        """Entries [B, e, D] as they are kept, [B, e, E]: projected here, once in their life."""
        if not self.packs:
            return entries
        assert self.family is not None
        pair = self.family.key_value(self.layer, entries)
        return torch.cat([x.transpose(1, 2).flatten(2) for x in pair], dim=-1)

    def _unpack(self, packed: Tensor) -> KeyValue:
        head: int = self.attention.head_dim
        pair = (x.unflatten(-1, (-1, head)).transpose(1, 2) for x in packed.chunk(2, dim=-1))
        return KeyValue(*pair)

    # --- writing memory ---------------------------------------------------------------------

    def _extend(
        self,
        pending: tuple[Tensor, ...],
        out: Tensor,
        layout: ChunkLayout | FixedLayout,
        weights: LayerMemoryWeights,
    ) -> tuple[Tensor, ...]:
        """Entries of the open chunk with those of this step's compression tokens added."""
        temporary = weights.temporary_memory
        if temporary is None or not any(layout.compressions):
            return pending
        entries = temporary(take(out, layout.compression_index)).to(out.dtype)
        new = self._pack(entries)
        if isinstance(layout, FixedLayout) or layout.uniform:
            return (*pending, new)
        before = [row.compressions for row in layout.rows]
        old = _joined(pending) if pending else new[:, :0]
        return (join_ragged(old, before, new, layout.compressions),)

    def _fold(
        self,
        memory: LayerMemory,
        out: Tensor,
        pending: tuple[Tensor, ...],
        layout: ChunkLayout,
        weights: LayerMemoryWeights,
    ) -> LayerMemory:
        """The memory after the chunk's end; rows whose chunk goes on keep theirs (SPEC §3)."""
        state, entries = memory.state, memory.entries
        if layout.config.global_memory:
            state = self._fold_state(state, take(out, layout.readout_index), layout, weights)
        if layout.config.temporary_memory:
            entries = self._fold_entries(entries, pending, layout)
        return LayerMemory(state, entries)

    def _fold_state(
        self,
        state: Tensor | None,
        readout: Tensor,
        layout: ChunkLayout,
        weights: LayerMemoryWeights,
    ) -> Tensor:
        assert weights.global_memory is not None
        if layout.uniform:
            return weights.global_memory.update(state, readout)
        first = weights.global_memory.update(None, readout)
        if state is None:
            state = torch.zeros_like(first)
        later = weights.global_memory.update(state, readout)
        seen = _per_row([bool(row.folds) for row in layout.rows], out=first)
        closes = _per_row([piece.close for piece in layout.step], out=first)
        return torch.where(closes, torch.where(seen, later, first), state)

    def _fold_entries(
        self, entries: tuple[Tensor, ...], pending: tuple[Tensor, ...], layout: ChunkLayout
    ) -> tuple[Tensor, ...]:
        capacity = layout.config.capacity
        if not (pending or entries):
            return ()
        # A chunk has none where its other calls had a longer stride.
        new = _joined(pending) if pending else entries[0][:, :0]
        if layout.uniform:
            return push(entries, new, capacity)
        old = _joined(entries) if entries else new[:, :0]
        added = [
            row.compressions + count if piece.close else 0
            for row, count, piece in zip(layout.rows, layout.compressions, layout.step, strict=True)
        ]
        before = [row.entries for row in layout.rows]
        most = [
            capacity if piece.close else row.entries
            for row, piece in zip(layout.rows, layout.step, strict=True)
        ]
        return (push_ragged(old, before, new, added, most),)


_OTHER_ATTENTION = (
    "the attention of a backbone with memory must be 'cometlm', got {!r}: set it back, or detach() "
    "before another is set"
)


def _of_items(rotary: RotaryTable, layout: ChunkLayout | FixedLayout) -> RotaryTable:
    """A table's rows of the new items: [1 or B, I, width] each."""
    # To a compiler, numbers of a slice are constants: one more graph for each length.
    if isinstance(layout, ChunkLayout) and layout.uniform and not is_compiling():
        return _between(rotary, layout.first_position, layout.items[0])
    positions = layout.positions.to(rotary[0].device)
    return tuple(part[positions] for part in rotary)


def _between(rotary: RotaryTable, first: int, count: int) -> RotaryTable:
    """A table's rows at so many positions in a row: [1, count, width] each, not copied."""
    return tuple(part[None, first : first + count] for part in rotary)


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks [B, n, W] behind each other; one block is not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=1)


def _per_row(flags: Sequence[bool], out: Tensor) -> Tensor:
    """Flags as [B, 1, …], ready to choose between rows of `out`."""
    shape = (len(flags), *repeat(1, out.dim() - 1))
    return sent(torch.tensor(list(flags)), out.device).view(shape)
