"""A cache in buffers of fixed size, written in place: what decoding on an accelerator is fast with.

`CometCache` is a value: every step makes new tensors, and Python launches each kernel. Here the
open chunk of each layer lies in one buffer for the whole row, so every step is the same work on the
same memory, which a device can record once and replay. `forward` still closes chunks; then the
buffers take over what the cache holds.

Pitfalls:
    - It changes under your hands. `value()` gives what it holds as a `CometCache`.
    - The next step overwrites the logits of the last one.
    - A recorded step goes on with the weights, adapters and autocast that it was recorded with;
      weights that are changed in place are seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cometlm.backbones.calling import KeyValue
from cometlm.backbones.recurrence import OwnState
from cometlm.config import CometConfig
from cometlm.core.cache import CometCache
from cometlm.core.fixed_layout import FixedLayout
from cometlm.core.layout import RowCounts
from cometlm.core.recording import Recorder
from cometlm.core.state import LayerState, OpenChunk
from cometlm.core.walk import Grid, through_layers


class Writer(Protocol):
    """What is asked of the model, a `CometForCausalLM`, which knows this module."""

    model: Any

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, n, V] of last hidden states [B, n, D]."""

    def __call__(self, ids: Tensor, **options: Any) -> Any:
        """Read text; see `CometForCausalLM.forward`."""


class FixedCache:
    """Writes token after token; see the module's docstring.

    Args:
        cache: what was read so far; all of its rows stand at the same place.
        record: record a step where the device can, and replay it.

    Raises:
        ValueError: rows that stand at different places; layers on several devices.
    """

    # Asked by transformers' generate().
    is_compileable: ClassVar[bool] = False
    is_linear: ClassVar[tuple[bool, ...]] = (False,)

    def __init__(self, model: Writer, cache: CometCache, record: bool = True) -> None:
        self._model = model
        self._record = record
        self._buffers: _Buffers | None = None
        self._replays: dict[int, Callable[[], Tensor]] = {}
        self._cache: CometCache
        self._rows: tuple[RowCounts, ...]
        self.take_over(cache)

    def read(self, ids: Tensor) -> Tensor:
        """Logits [B, V] of what follows ids [B, N]; the same as a call of the model."""
        logits: Tensor = self._model(ids, past_key_values=self, logits_to_keep=1).logits[:, -1]
        return logits

    def can_step(self, ids: Tensor, **budget: int | None) -> bool:
        """Whether a call is one token of each open chunk, under the sizes of the buffers."""
        if ids.shape != (len(self._rows), 1) or not self._rows[0].items > 0:
            return False
        sizes = self._model.model.sizes_of_call(**budget)
        return bool(self._rows[0].text < sizes.chunk_size and sizes == self._cache.config)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read a token of each row, for which `can_step` holds.

        Args:
            ids: [B, 1].

        Returns:
            Logits [B, V] of what follows, which the next step overwrites.
        """
        assert self._buffers is not None
        config, before = self._cache.config, self._rows[0]
        compress = config.temporary_memory and (before.text + 1) % config.stride == 0
        items = 1 + compress
        self._buffers.ids.copy_(ids)
        if items not in self._replays:
            self._replays[items] = self._replay_of(items)
        logits = self._replays[items]()
        self._rows = tuple(
            replace(row, text=row.text + 1, items=row.items + items, tokens=row.tokens + 1)
            for row in self._rows
        )
        return logits

    def value(self) -> CometCache:
        """What was read, as a value that nothing changes any more."""
        layers = self._cache.layers
        if self._rows[0].items:
            assert self._buffers is not None
            opened = self._buffers.open_chunks(self._rows[0])
            states = zip(layers, opened, self._buffers.own, strict=True)
            layers = tuple(
                LayerState(layer.memory, chunk, {name: x.clone() for name, x in own.items()})
                for layer, chunk, own in states
            )
        columns = self.get_seq_length()
        return replace(self._cache, layers=layers, rows=self._rows, columns=columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` read since `generate()` began (transformers' name)."""
        return self._cache.columns + self._rows[0].tokens - self._cache.rows[0].tokens

    def take_over(self, cache: CometCache) -> None:
        """Go on from what a call of the model returned.

        Raises:
            ValueError: rows that stand at different places; layers on several devices.
        """
        _check(cache, self._model)
        self._rows = cache.rows
        if cache.rows[0].items:  # else the next token opens a chunk, and has its memory projected
            if self._buffers is None or not self._buffers.fit(cache):
                grid = self._model.model.grid(cache.max_positions)
                # Also written to outside of the inference mode that they may be made in.
                with torch.inference_mode(False), torch.no_grad():
                    self._buffers, self._replays = _Buffers.like(cache, grid), {}
            self._buffers.fill(cache)
            closed = tuple(LayerState(layer.memory) for layer in cache.layers)
            cache = replace(cache, layers=closed)  # the rest is held once, in the buffers
        self._cache = cache

    def _replay_of(self, items: int) -> Callable[[], Tensor]:
        """A step as it is to be run from now on: recorded, or as it is where that fails."""
        buffers = self._buffers
        assert buffers is not None

        def work() -> Tensor:
            return _run(self._model, buffers, items)

        if not self._record:
            return work
        try:
            return _recorded(work, buffers) or work
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what devices raise at work that cannot be recorded
            reason = " ".join(str(error).split())[:300]
            warnings.warn(f"decoding is not recorded, since that failed: {reason}", stacklevel=2)
            self._record = False
            return work


@dataclass
class _Buffers:
    """One buffer for each layer's row, and the numbers that move, all on the device.

    Attributes:
        config: sizes that the buffers were made for.
        max_positions: rows that the rotary tables hold.
        grid: cells and rotary tables; a recorded step reads these very tables.
        ids: [B, 1] the token to read.
        rows: of each layer, memory and open chunk by position, [B, key-value heads, W, head width];
            None where the layer does not attend.
        pending: of each layer, entries of the open chunk, [B, e, E]; empty without a temporary
            memory.
        own: of each layer, its own state, by name, [B, …] each.
        position: [1] the next item's.
        memory_width: [1] memory slots.
        compressions: [1] entries.
    """

    config: CometConfig
    max_positions: int
    grid: Grid
    ids: Tensor
    rows: list[KeyValue | None]
    pending: list[Tensor]
    own: list[OwnState]
    position: Tensor
    memory_width: Tensor
    compressions: Tensor

    @classmethod
    def like(cls, cache: CometCache, grid: Grid) -> _Buffers:
        """Buffers for all that an open chunk like this one's can come to hold."""
        config, batch = cache.config, len(cache.rows)
        most = _most_entries(cache)
        device = grid.rotary[0][0].device
        rows: list[KeyValue | None] = []
        pending = []
        for layer, cell in zip(cache.layers, grid.cells, strict=True):
            if layer.open is None:
                rows.append(None)
                pending.append(torch.zeros(batch, 0, 0, device=device))
                continue
            row = KeyValue(*(_wide(x, _width(cache)) for x in layer.open.chunk))
            rows.append(row)
            pending.append(row.key.new_zeros(batch, most, cell.entry_width))
        own: list[OwnState] = [
            {name: torch.zeros_like(x) for name, x in layer.own.items()} for layer in cache.layers
        ]
        zeros = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(3))
        ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        return cls(config, cache.max_positions, grid, ids, rows, pending, own, *zeros)

    def fit(self, cache: CometCache) -> bool:
        """Whether another cache's open chunk fits in."""
        made_for = (self.config, self.max_positions, self.ids.shape[0])
        room = max((entries.shape[1] for entries in self.pending), default=0)
        same = made_for == (cache.config, cache.max_positions, len(cache.rows))
        return same and (not cache.config.temporary_memory or _most_entries(cache) <= room)

    def fill(self, cache: CometCache) -> None:
        """Take over what a cache holds."""
        counts = cache.rows[0]
        memory = self._memory_width(counts)
        for buffer, pending, layer in zip(self.rows, self.pending, cache.layers, strict=True):
            if buffer is None:
                continue
            assert layer.open is not None
            for whole, read in zip(buffer, layer.open.memory or (), strict=False):
                whole[:, :, :memory] = read
            for whole, read in zip(buffer, layer.open.chunk, strict=True):
                whole[:, :, memory : memory + counts.items] = read[:, :, : counts.items]
            if layer.open.pending:
                pending[:, : counts.compressions] = torch.cat(layer.open.pending, dim=1)
        self.keep_own([layer.own for layer in cache.layers])
        self.memory_width.fill_(memory)
        self.position.fill_(memory + counts.items)
        self.compressions.fill_(counts.compressions)

    def keep_own(self, states: Sequence[OwnState]) -> None:
        """Take over each layer's own state."""
        for kept, state in zip(self.own, states, strict=True):
            for name, buffer in kept.items():
                buffer.copy_(state[name])

    def open_chunks(self, counts: RowCounts) -> Iterator[OpenChunk | None]:
        """What each layer holds, copied.

        Args:
            counts: how far the rows have come.
        """
        start = self._memory_width(counts)
        for row, entries in zip(self.rows, self.pending, strict=True):
            if row is None:
                yield None
                continue
            memory = KeyValue(*(x[:, :, :start].clone() for x in row)) if start else None
            chunk = KeyValue(*(x[:, :, start : start + counts.items].clone() for x in row))
            held = entries[:, : counts.compressions].clone()
            yield OpenChunk(memory, chunk, (held,) if counts.compressions else ())

    def _memory_width(self, counts: RowCounts) -> int:
        return (self.config.global_slots if counts.folds else 0) + counts.entries

    @property
    def moved(self) -> tuple[Tensor, ...]:
        """What a step reads and moves on: counters, and layers' own states."""
        own = (x for state in self.own for x in state.values())
        return self.position, self.compressions, *own


def _most_entries(cache: CometCache) -> int:
    """Entries that an open chunk can come to hold; calls with a shorter stride have left more."""
    config, counts = cache.config, cache.rows[0]
    surplus = max(0, counts.compressions - counts.text // config.stride)
    return config.compression_tokens(config.chunk_size) + surplus


def _width(cache: CometCache) -> int:
    """Positions of a row before its chunk ends, which is where readout tokens come in."""
    return cache.max_positions - cache.config.global_slots


def _wide(x: Tensor, width: int) -> Tensor:
    """Zeros for so many positions of keys or values [B, key-value heads, n, head width]."""
    return x.new_zeros(*x.shape[:2], width, x.shape[3])


def _check(cache: CometCache, model: Writer) -> None:
    """Refuse what has no buffers of one shape on one device."""
    if len({(bool(r.folds), r.entries, r.text, r.items) for r in cache.rows}) > 1:
        raise ValueError(
            "cache_implementation='static' needs rows that stand at the same place, got rows with "
            f"{sorted({row.text for row in cache.rows})} tokens in the open chunk"
        )
    devices = sorted(
        {str(table[0].device) for table in model.model.grid(cache.max_positions).rotary}
    )
    if len(devices) > 1:
        raise ValueError(
            "cache_implementation='static' needs all layers on one device, got "
            f"{', '.join(devices)}"
        )


def _run(model: Writer, buffers: _Buffers, items: int) -> Tensor:
    """One step in the buffers: logits [B, V]; the same work however far the chunk has come."""
    inner = model.model
    row = next(row for row in buffers.rows if row is not None)
    batch, _, width, _ = row.key.shape
    place = (buffers.position.clone()[0], buffers.memory_width[0])
    layout = FixedLayout(batch, width, items, *place)
    embedded: Tensor = inner.embedded_text(buffers.ids)
    if items == 2:
        assert inner.comet.compression is not None
        compression = inner.comet.compression.to(embedded)
        embedded = torch.cat([embedded, compression.expand(batch, 1, -1)], dim=1)
    embedded = inner.placed(embedded, layout)
    states = tuple(
        LayerState(open=None if row is None else OpenChunk(None, row), own=own)
        for row, own in zip(buffers.rows, buffers.own, strict=True)
    )
    hidden, after = through_layers(buffers.grid, embedded, layout, states)
    if items == 2:
        for entries, state in zip(buffers.pending, after, strict=True):
            if state.open is None:
                continue
            entries.index_copy_(1, buffers.compressions, state.open.pending[-1].to(entries.dtype))
        buffers.compressions += 1
    buffers.keep_own([state.own for state in after])
    buffers.position += items
    return model.logits(inner.norm(hidden[:, :1]))[:, 0]


def _recorded(work: Callable[[], Tensor], buffers: _Buffers) -> Callable[[], Tensor] | None:
    """Work that a device replays; None on a device that records nothing."""
    before = [counter.clone() for counter in buffers.moved]

    def reset() -> None:
        for counter, value in zip(buffers.moved, before, strict=True):
            counter.copy_(value)

    return Recorder().recorded(work, buffers.ids.device, reset)
