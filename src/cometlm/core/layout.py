"""Where everything of one chunk stands: every index, position and mask, computed once per step.

A *step* feeds each row of the batch one `Piece` of its open chunk. `core.plan` cuts new tokens into
steps; `ChunkLayout` says for one step how items are ordered, at which positions they and the
memory stand, and who sees whom. All counting is done in Python integers, so nothing here waits for
a device. If every row of the batch stands at the same place (the usual case) the layout is
*uniform*: index tensors have a batch axis of 1 and no mask is needed but where a window is.

In a ragged batch each row keeps its items at the left of its slots, so that slot s of row b is
always item s of its open chunk: causality is a comparison of slots, and filling is never seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from cometlm.config import CometConfig
from cometlm.device import sent

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class RowCounts:
    """How far one row of a batch has come.

    Attributes:
        folds: chunks folded into memory.
        entries: temporary memory slots filled.
        text: text tokens in the open chunk.
        items: text and compression tokens in the open chunk.
        tokens: text tokens since the start.
    """

    folds: int = 0
    entries: int = 0
    text: int = 0
    items: int = 0
    tokens: int = 0

    @property
    def compressions(self) -> int:
        """Compression tokens in the open chunk."""
        return self.items - self.text


@dataclass(frozen=True)
class Piece:
    """What one row adds in one step: `text` tokens from `start` on, then maybe the chunk's end."""

    start: int
    text: int
    close: bool


Step = tuple[Piece, ...]


@dataclass(frozen=True)
class ChunkLayout:
    """One step of a batch: indices, positions and masks (SPEC §2).

    Args:
        config: sizes, with this call's stride and capacity.
        rows: counts before the step.
        step: what each row adds.
        max_positions: rows that the rotary table holds; positions of filling stop there.
        device: where the index tensors live.
        tables: index tensors and masks that were made already; `shared` finds those of a like step.
    """

    config: CometConfig
    rows: tuple[RowCounts, ...]
    step: Step
    max_positions: int
    device: torch.device
    tables: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def bare(self) -> ChunkLayout:
        """The same without any index or mask made yet: small enough to keep by the thousand."""
        return replace(self, tables={})

    def shared(self) -> ChunkLayout:
        """The same with the tables of earlier steps of its shape, which most chunks share.

        Ragged steps keep their own: each has another shape, and its masks are large.
        """
        if not self.uniform:
            self._fill()
            return self
        rows = tuple((bool(r.folds), r.entries, r.text, r.items) for r in self.rows)
        pieces = tuple((piece.text, piece.close) for piece in self.step)
        shape = (
            self.config,
            rows,
            pieces,
            self.max_positions,
            self.device,
            *_surroundings(self.device),
        )
        layout = replace(self, tables=_tables_of(shape))
        layout._fill()
        return layout

    def _fill(self) -> None:
        """Make what every cell reads before it runs: to a compiler, longer lists are other code."""
        _ = self.items, self.compressions, self.positions
        _ = self.order, self.text_index, self.compression_index, self.readout_index

    def _table(self, name: Any, make: Callable[[], _Made]) -> _Made:
        """What was made under a name, or what is made now."""
        if name not in self.tables:
            self.tables[name] = make()
        made: _Made = self.tables[name]
        return made

    # --- counts -----------------------------------------------------------------------------

    @cached_property
    def uniform(self) -> bool:
        """Whether all rows stand at the same place and add the same."""
        same_rows = len({(bool(r.folds), r.entries, r.text, r.items) for r in self.rows}) == 1
        return same_rows and len({(p.text, p.close) for p in self.step}) == 1

    @cached_property
    def even(self) -> bool:
        """Whether all rows add as many items, so that there is no filling among these."""
        return len(set(self.items)) == 1

    def of_rows(self, rows: Sequence[int]) -> ChunkLayout:
        """The same step of these rows only."""
        counts, step = tuple(self.rows[b] for b in rows), tuple(self.step[b] for b in rows)
        return replace(self, rows=counts, step=step, tables={})

    @property
    def distinct(self) -> range:
        """Rows that need a place of their own in the index tensors."""
        return range(1 if self.uniform else len(self.rows))

    @property
    def compressions(self) -> tuple[int, ...]:
        """Compression tokens that each row adds."""
        return self._table("compressions", self._count_compressions)

    def _count_compressions(self) -> tuple[int, ...]:
        return tuple(
            count - self.step[b].text - self._readouts(b) for b, count in enumerate(self.items)
        )

    @property
    def items(self) -> tuple[int, ...]:
        """Items that each row adds."""
        return self._table("items", self._count_items)

    def _count_items(self) -> tuple[int, ...]:
        return tuple(len(self._items(b)) for b in range(len(self.rows)))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Items of each row's open chunk after the step."""
        return tuple(row.items + n for row, n in zip(self.rows, self.items, strict=True))

    @cached_property
    def memory_width(self) -> int:
        """Memory rows in front of the chunk; in a ragged batch, of the longest."""
        return max(self._global(b) for b in self.distinct) + self.temporary_width

    @cached_property
    def temporary_width(self) -> int:
        """Temporary memory rows; in a ragged batch, of the longest."""
        return max(row.entries for row in self.rows)

    @property
    def closes(self) -> bool:
        """Whether any row's chunk ends."""
        return any(piece.close for piece in self.step)

    def counts_after(self) -> tuple[RowCounts, ...]:
        """Each row's counts when the step is done."""
        return tuple(self._after(b) for b in range(len(self.rows)))

    def _after(self, b: int) -> RowCounts:
        row, piece = self.rows[b], self.step[b]
        tokens = row.tokens + piece.text
        if not piece.close:
            return replace(row, text=row.text + piece.text, items=self.slots[b], tokens=tokens)
        entries = row.entries + row.compressions + self.compressions[b]
        limit = self.config.temporary_slots
        return RowCounts(folds=row.folds + 1, entries=min(entries, limit), tokens=tokens)

    def _global(self, b: int) -> int:
        return self.config.global_slots if self.rows[b].folds else 0

    def _readouts(self, b: int) -> int:
        return self.config.global_slots if self.step[b].close else 0

    def _items(self, b: int) -> list[int]:
        """Row b's new items as places in [its text of this step | C | R]."""
        return self._item_lists[b if not self.uniform else 0]

    @cached_property
    def _item_lists(self) -> list[list[int]]:
        return [self._order_row(b) for b in self.distinct]

    @cached_property
    def widest_text(self) -> int:
        """Text tokens that the longest piece adds."""
        return max(piece.text for piece in self.step)

    def _order_row(self, b: int) -> list[int]:
        row, piece = self.rows[b], self.step[b]
        compression, readout = self.widest_text, self.widest_text + 1
        items: list[int] = []
        for i in range(piece.text):
            items.append(i)
            if self.config.temporary_memory and (row.text + i + 1) % self.config.stride == 0:
                items.append(compression)
        if piece.close:
            rest = (row.text + piece.text) % self.config.stride
            if self.config.temporary_memory and rest:
                items.append(compression)
            items.extend(range(readout, readout + self.config.global_slots))
        return items

    # --- indices ----------------------------------------------------------------------------

    @property
    def order(self) -> Tensor:
        """[1 or B, I]: where each item comes from in [text (widest) | C | R]."""
        return self._table("order", lambda: self._placed([self._items(b) for b in self.distinct]))

    @property
    def text_index(self) -> Tensor:
        """[1 or B, n]: which items are text."""
        return self._table("text", lambda: self._where(lambda item: item < self.widest_text))

    @property
    def compression_index(self) -> Tensor:
        """[1 or B, e]: which items are compression tokens."""
        compression = self.widest_text
        return self._table("compression", lambda: self._where(lambda item: item == compression))

    @property
    def readout_index(self) -> Tensor:
        """[1 or B, M]: which items are readout tokens."""
        return self._table("readout", lambda: self._where(lambda item: item > self.widest_text))

    def _where(self, wanted: Callable[[int], bool]) -> Tensor:
        rows = [[i for i, item in enumerate(self._items(b)) if wanted(item)] for b in self.distinct]
        return self._placed(rows)

    def _placed(self, rows: list[list[int]]) -> Tensor:
        table: Tensor = _padded(rows, filling=0)
        return sent(table, self.device)

    # --- positions --------------------------------------------------------------------------

    @property
    def positions(self) -> Tensor:
        """[1 or B, I]: position of each new item over the row as it is."""
        return self._table("positions", self._make_positions)

    def _make_positions(self) -> Tensor:
        item = torch.arange(max(self.items))[None, :]
        first = torch.tensor([self._first_position(b) for b in self.distinct])
        return sent((item + first[:, None]).clamp(max=self.max_positions - 1), self.device)

    @property
    def first_position(self) -> int:
        """Position of the first new item, uniform layouts only; the others follow it."""
        assert self.uniform
        return self._first_position(0)

    def _first_position(self, b: int) -> int:
        return self._global(b) + self.rows[b].entries + self.rows[b].items

    # --- masks ------------------------------------------------------------------------------

    def chunk_mask(self, window: int | None, width: int) -> Tensor | None:
        """[I, width] bool: which of the chunk's slots each new item sees, uniform layouts only.

        Slots from the chunk's end up to `width` are filling and never seen. None where all that is
        needed is the causal flag (nothing of the chunk came before and the window holds it all)
        or nothing at all (a single item without filling).
        """
        assert self.uniform
        before, new = self.rows[0].items, self.items[0]
        fits = width == before + new and (window is None or width <= window)
        if fits and (before == 0 or new == 1):
            return None
        slot = torch.arange(before, before + new)
        make = lambda: sent(_sees(slot, torch.arange(width), window), self.device)  # noqa: E731
        return self._table((window, width), make)

    def within(self, window: int | None) -> bool:
        """Whether a window holds the whole chunk, uniform layouts only."""
        return window is None or self.slots[0] <= window

    def full_mask(self, window: int | None) -> Tensor:
        """[1 or B, 1, I, memory_width + slots] bool: what each new item sees of the whole row.

        Memory stays visible in layers with a window; the window applies to the chunk.
        """
        return self._table((window, 0), lambda: self._make_full_mask(window))

    def _make_full_mask(self, window: int | None) -> Tensor:
        mask = torch.cat([self._memory_mask(), self._slot_mask(window)], dim=-1)
        return sent(mask[:, None], self.device)

    def _memory_mask(self) -> Tensor:
        folded = torch.tensor([bool(self._global(b)) for b in self.distinct])
        entries = torch.tensor([self.rows[b].entries for b in self.distinct])
        temporary = torch.arange(self.temporary_width)[None, :] < entries[:, None]
        global_ = folded[:, None].expand(-1, self.memory_width - self.temporary_width)
        return torch.cat([global_, temporary], dim=-1)[:, None].expand(-1, max(self.items), -1)

    def _slot_mask(self, window: int | None) -> Tensor:
        before = torch.tensor([self.rows[b].items for b in self.distinct])
        slot = torch.arange(max(self.items))[None, :] + before[:, None]
        return _sees(slot, torch.arange(max(self.slots)), window)


@functools.lru_cache(maxsize=32)
def _tables_of(shape: tuple[Any, ...]) -> dict[Any, Any]:
    """The tables of steps of one shape; what a step needs of it is put in when it is asked for."""
    return {}


def _surroundings(device: torch.device) -> tuple[Any, ...]:
    """What a tensor is bound to: autograd takes none of inference mode, nor a stream another's."""
    stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)
    return torch.is_inference_mode_enabled(), stream


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _padded(rows: list[list[int]], filling: int) -> Tensor:
    """[rows, widest] of lists, which are constants to a compiler: one graph for each length."""
    width = max(len(row) for row in rows)
    full = [row + [filling] * (width - len(row)) for row in rows]
    return torch.tensor(full, dtype=torch.long).view(len(rows), width)


def _sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """[…, queries, keys]: causal over slots, and no further back than the window."""
    distance = query[..., :, None] - key
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, S, W] at index [1 or B, n]: [B, n, W]."""
    index = index.to(x.device)  # layers may lie on several devices
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
