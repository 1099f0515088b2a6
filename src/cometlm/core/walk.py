"""Walks over the grid of cells, chunks x layers.

Any order that respects what a cell needs gives the same numbers, so a walk is only an order:
`through_layers` takes one chunk through all layers, which repeated is streaming in constant memory;
`walk_by_layer` takes one layer over a block of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cometlm.backbones.calling import RotaryTable
from cometlm.core.cell import Cell
from cometlm.core.fixed_layout import FixedLayout
from cometlm.core.layout import ChunkLayout
from cometlm.core.memory import LayerMemoryWeights
from cometlm.core.state import LayerState, States


@dataclass(frozen=True)
class Grid:
    """The fixed side of the grid: each layer's cell, memory weights and rotary table."""

    cells: Sequence[Cell]
    weights: Sequence[LayerMemoryWeights]
    rotary: Sequence[RotaryTable]


def through_layers(
    grid: Grid, hidden: Tensor, layout: ChunkLayout | FixedLayout, states: States
) -> tuple[Tensor, States]:
    """One step through all layers: streaming, when repeated chunk after chunk.

    Args:
        hidden: embedded items [B, I, D].
        states: each layer's state before the step.

    Returns:
        The last layer's outputs [B, I, D] and all layers' states.
    """
    after = []
    for cell, weights, rotary, state in zip(
        grid.cells, grid.weights, grid.rotary, states, strict=True
    ):
        hidden, new = cell(hidden.to(rotary[0].device), state, layout, rotary, weights)
        after.append(new)
    return hidden, tuple(after)


def walk_by_layer(
    grid: Grid,
    hidden: Sequence[Tensor],
    layouts: Sequence[ChunkLayout],
    states: Iterable[LayerState],
    leave: Callable[[LayerState], LayerState] = lambda state: state,
    recompute: bool = False,
    note: Callable[[Sequence[LayerState]], None] = lambda states: None,
) -> tuple[list[Tensor], States]:
    """Layer after layer over a whole block of chunks: the order of the layer-level pipeline.

    Args:
        hidden: embedded items of each step, [B, I, D].
        layouts: of each step.
        states: each layer's state before the block; taken only when that layer's turn comes.
        leave: given each layer's state after the block as soon as it is there.
        recompute: as in `Cell.along`.
        note: given each layer's states after every step, layer after layer.

    Returns:
        The last layer's outputs of every step, and what `leave` made of all layers' states.
    """
    hidden = list(hidden)
    after = []
    for cell, weights, rotary, state in zip(
        grid.cells, grid.weights, grid.rotary, states, strict=True
    ):
        moved = [x.to(rotary[0].device) for x in hidden]
        hidden, states = cell.along(moved, state, layouts, rotary, weights, recompute)
        after.append(leave(states[-1] if states else state))
        note(states)
    return hidden, tuple(after)
