"""A ragged step in parts: rows that add as many items go through a layer together.

Attention never sees what fills up shorter rows, but a state that a layer carries from item to item
would take it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cometlm.backbones.calling import KeyValue
from cometlm.backbones.recurrence import OwnState
from cometlm.core.attention import CellCall
from cometlm.core.layout import ChunkLayout
from cometlm.device import sent

Run = Callable[[Tensor, OwnState, CellCall], tuple[Tensor, OwnState]]


def run_apart(call: CellCall, hidden: Tensor, own: OwnState, run: Run) -> tuple[Tensor, OwnState]:
    """Outputs [B, I, D] of a ragged step, zeros where there is filling, and the state after it.

    Args:
        call: of all rows; it gets the chunk's keys and values as a call of the whole batch would
            leave them.
        hidden: [B, I, D], with filling behind shorter rows.
        own: the layer's own state before the step.
        run: runs the layer on rows that add as many items each.
    """
    layout = call.layout
    assert isinstance(layout, ChunkLayout)
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(layout.items):
        groups.setdefault(count, []).append(row)
    width, slots = hidden.shape[1], max(layout.slots)
    outs: list[Tensor] = []
    states: list[OwnState] = []
    chunks: list[KeyValue | None] = []
    for count, rows in groups.items():
        part = _of_rows(call, layout, rows)
        out = _rows(hidden, rows)[:, :count]
        state: OwnState = {name: _rows(x, rows) for name, x in own.items()}
        if count:
            out, state = run(out, state, part)
        outs.append(_filled(out, width, 1))
        states.append(state)
        chunks.append(part.chunk)
    grouped = list(groups.values())
    order = sorted(range(len(layout.rows)), key=[b for rows in grouped for b in rows].__getitem__)
    call.chunk = _joined_chunks(chunks, grouped, slots, order)
    return _rows(torch.cat(outs), order), _joined_states(states, grouped, order)


def _of_rows(call: CellCall, layout: ChunkLayout, rows: Sequence[int]) -> CellCall:
    """The call of some rows, as wide as the longest of them needs."""
    part = layout.of_rows(rows)
    memory, chunk = call.memory, call.chunk
    if memory is not None:
        width = part.memory_width
        memory = KeyValue(*(_rows(x, rows)[:, :, :width] for x in memory)) if width else None
    if chunk is not None:
        before = max(row.items for row in part.rows)
        chunk = KeyValue(*(_rows(x, rows)[:, :, :before] for x in chunk)) if before else None
    return CellCall(part, memory, chunk, call.window)


def _joined_chunks(
    chunks: Sequence[KeyValue | None],
    groups: Sequence[Sequence[int]],
    slots: int,
    order: Sequence[int],
) -> KeyValue | None:
    """Keys and values of all rows' chunks; None where the layer does not attend."""
    some = next((chunk for chunk in chunks if chunk is not None), None)
    if some is None:
        return None
    pairs = []
    for chunk, rows in zip(chunks, groups, strict=True):
        nothing = (x.new_zeros(len(rows), x.shape[1], 0, x.shape[3]) for x in some)
        pairs.append([_filled(x[:, :, :slots], slots, 2) for x in chunk or nothing])
    return KeyValue(*(_rows(torch.cat(parts), order) for parts in zip(*pairs, strict=True)))


def _joined_states(
    states: Sequence[OwnState], groups: Sequence[Sequence[int]], order: Sequence[int]
) -> OwnState:
    """Own states of all rows; zeros are those of rows that have read nothing."""
    some = next((state for state in states if state), {})
    joined = {}
    for name, x in some.items():
        parts = [
            state[name] if state else x.new_zeros(len(rows), *x.shape[1:])
            for state, rows in zip(states, groups, strict=True)
        ]
        joined[name] = _rows(torch.cat(parts), order)
    return joined


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x.index_select(0, sent(torch.tensor(list(rows)), x.device))


def _filled(x: Tensor, width: int, dim: int) -> Tensor:
    """A tensor with zeros behind it along one of its dimensions."""
    behind = [0] * (2 * (x.dim() - dim))
    behind[-1] = width - x.shape[dim]
    return F.pad(x, behind)
