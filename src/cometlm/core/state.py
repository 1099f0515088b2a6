"""What a layer carries from step to step, as a value: its memory, its open chunk, its own state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cometlm.backbones.calling import KeyValue
from cometlm.backbones.recurrence import OwnState
from cometlm.config import CometConfig
from cometlm.core.layout import RowCounts
from cometlm.core.memory import LayerMemory
from cometlm.device import sent


@dataclass(frozen=True)
class OpenChunk:
    """What a layer keeps of a chunk that is not closed yet.

    Attributes:
        memory: rotated keys and values of the memory slots, projected once per chunk.
        chunk: rotated keys and values of the chunk's items so far, and maybe filling after them.
        pending: entries of its compression tokens so far, blocks [B, e, E].
    """

    memory: KeyValue | None
    chunk: KeyValue
    pending: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        memory = 0 if self.memory is None else self.memory.nbytes
        return memory + self.chunk.nbytes + sum(block.nbytes for block in self.pending)


@dataclass(frozen=True)
class LayerState:
    """Everything one layer carries.

    Attributes:
        memory: what it remembers of closed chunks.
        open: the open chunk, if there is one.
        own: the state that the layer itself carries from item to item, by name, [B, …] each:
            of all layers but convolutions, scans and linear attention, nothing.
    """

    memory: LayerMemory = field(default_factory=LayerMemory)
    open: OpenChunk | None = None
    own: OwnState = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        own = sum(x.nbytes for x in self.own.values())
        return self.memory.nbytes + own + (0 if self.open is None else self.open.nbytes)

    def select(
        self, rows: Sequence[int], counts: Sequence[RowCounts], config: CometConfig
    ) -> LayerState:
        """The state of a batch made of these rows, as wide as the longest of them needs.

        Args:
            rows: rows of this state's batch.
            counts: theirs.
        """
        entries = max(row.entries for row in counts)
        folded = any(row.folds for row in counts)
        state = self.memory.state
        state = _rows_of(state, rows) if folded and state is not None else None
        blocks = _clip([_rows_of(block, rows) for block in self.memory.entries], entries)
        memory = LayerMemory(state, blocks)
        own = {name: _rows_of(x, rows) for name, x in self.own.items()}
        items = max(row.items for row in counts)
        if self.open is None or items == 0:
            return LayerState(memory, own=own)
        slots = entries + (config.global_slots if folded else 0)
        read = self.open.memory
        if read is not None:
            read = KeyValue(*(_rows_of(x, rows)[:, :, :slots] for x in read)) if slots else None
        chunk = KeyValue(*(_rows_of(x, rows)[:, :, :items] for x in self.open.chunk))
        compressions = max(row.compressions for row in counts)
        pending = _clip([_rows_of(block, rows) for block in self.open.pending], compressions)
        return LayerState(memory, OpenChunk(read, chunk, pending), own)


def join_layers(layers: Sequence[LayerState]) -> LayerState:
    """The state of a batch of these rows, as wide as the longest of them needs.

    Args:
        layers: one layer's state of each row; all have an open chunk, or none has.
    """
    memories = [layer.memory for layer in layers]
    entries = _stacked([_whole(memory.entries) for memory in memories], 1)
    memory = LayerMemory(
        _stacked([memory.state for memory in memories], 1), () if entries is None else (entries,)
    )
    own = _joined_states([layer.own for layer in layers])
    chunks = [layer.open for layer in layers if layer.open is not None]
    if not chunks:
        return LayerState(memory, own=own)
    assert len(chunks) == len(layers), "a row with an open chunk goes with others of them"
    read = _stacked_pairs([chunk.memory for chunk in chunks])
    chunk = _stacked_pairs([chunk.chunk for chunk in chunks])
    assert chunk is not None
    pending = _stacked([_whole(one.pending) for one in chunks], 1)
    return LayerState(memory, OpenChunk(read, chunk, () if pending is None else (pending,)), own)


States = tuple[LayerState, ...]


def tensors_of(states: States) -> list[Tensor]:
    """All tensors of these states, in an order that only their structure decides."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(states, note)
    return found


def with_tensors(states: States, tensors: Iterable[Tensor]) -> States:
    """States of the same structure that hold other tensors, given in `tensors_of`'s order."""
    following = iter(tensors)
    return map_tensors(states, lambda _: next(following))


def map_tensors(states: States, change: Callable[[Tensor], Tensor]) -> States:
    """States of the same structure, each tensor changed."""

    def pair(old: KeyValue | None) -> KeyValue | None:
        return None if old is None else KeyValue(change(old.key), change(old.value))

    def one(old: LayerState) -> LayerState:
        state = None if old.memory.state is None else change(old.memory.state)
        memory = LayerMemory(state, tuple(map(change, old.memory.entries)))
        own = {name: change(x) for name, x in old.own.items()}
        if old.open is None:
            return LayerState(memory, own=own)
        chunk = KeyValue(change(old.open.chunk.key), change(old.open.chunk.value))
        pending = tuple(map(change, old.open.pending))
        return LayerState(memory, OpenChunk(pair(old.open.memory), chunk, pending), own)

    return tuple(map(one, states))


def _rows_of(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x.index_select(0, sent(torch.tensor(list(rows)), x.device))


def _clip(blocks: Sequence[Tensor], length: int) -> tuple[Tensor, ...]:
    """The first `length` rows of blocks [B, e, E]."""
    kept = []
    for block in blocks:
        if length > 0:
            kept.append(block[:, :length])
        length -= block.shape[1]
    return tuple(kept)


def _whole(blocks: Sequence[Tensor]) -> Tensor | None:
    """Blocks [1, e, E] as one; None where there is none."""
    return torch.cat(list(blocks), dim=1) if blocks else None


def _stacked_pairs(pairs: Sequence[KeyValue | None]) -> KeyValue | None:
    """Keys and values [1, H, n, d] of rows as those of a batch."""
    keys = _stacked([None if pair is None else pair.key for pair in pairs], 2)
    values = _stacked([None if pair is None else pair.value for pair in pairs], 2)
    return None if keys is None or values is None else KeyValue(keys, values)


def _joined_states(rows: Sequence[OwnState]) -> OwnState:
    """Own states [1, …] of rows as those of a batch; zeros are those of a row without any."""
    some = next((row for row in rows if row), {})
    return {
        name: torch.cat([row[name] if row else torch.zeros_like(x) for row in rows])
        for name, x in some.items()
    }


def _stacked(rows: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """Tensors [1, …] of rows as one of a batch, with filling behind the shorter ones.

    Args:
        rows: of the same shape but for `dim`; None is one without anything.
        dim: where they differ.

    Returns:
        None where no row has anything.
    """
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    longest = max(row.shape[dim] for row in rows if row is not None)
    shape = [len(rows), *some.shape[1:]]
    shape[dim] = longest
    full = some.new_zeros(shape)
    for b, row in enumerate(rows):
        if row is not None:
            full[b : b + 1].narrow(dim, 0, row.shape[dim]).copy_(row)
    return full
