"""How a backbone calls one of its layers, as a value; and a layer's keys and values by capture.

A layer is told of its cell's call by the keyword argument `comet`, which it hands on to the
attention function; layers that hand nothing on are told aside (`told`). A `Capture` in its place
takes the keys and values that the layer made, rotated and normed as they are, and stops the layer
there: that is how memory slots are projected in any backbone. A family's row (`backbones.families`)
only makes it faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from cometlm.backbones.recurrence import OwnState, StateCache

RotaryTable = tuple[Tensor, ...]


class KeyValue(NamedTuple):
    """Keys and values [B, key-value heads, S, head width]."""

    key: Tensor
    value: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.key.nbytes + self.value.nbytes


class Captured(Exception):
    """Stops a layer when its keys and values are there."""


class Capture:
    """Stands in for a cell's call, and takes the first keys and values that are to be attended.

    Attributes:
        taken: rotated keys and values, once they are there.
    """

    def __init__(self) -> None:
        self.taken: KeyValue | None = None

    def take(self, key: Tensor, value: Tensor) -> NoReturn:
        """Keep them and stop the layer.

        Raises:
            Captured: always.
        """
        self.taken = KeyValue(key, value)
        raise Captured


_TOLD: ContextVar[Any] = ContextVar("told", default=None)


def told() -> Any:
    """What the layer that is run now was told aside, or None."""
    return _TOLD.get()


@dataclass(frozen=True)
class LayerCall:
    """How one layer is called.

    Attributes:
        options: arguments that are the same in every call, by name.
        rotary: the argument that rotary tables go to; None where the layer takes none.
        alone: the table is one tensor and no tuple.
        positions: the argument that positions go to; they are then the last part of a table.
        attention: the name of the module in the layer that attends; None where none does.
        window: how far an item sees in its chunk where the backbone says so by a mask alone.
        aside: the layer does not hand the argument `comet` on.
        kinds: it takes its table once for each of so many kinds of positions, which text has alike.
        cache: the argument that a cache goes to, where the layer carries a state of its own.
        recurrent: the name of the module in the layer that carries it.
        stepwise: the layer goes on from its state by one item a call only.
    """

    options: Mapping[str, Any] = field(default_factory=lambda: {"attention_mask": None})
    rotary: str | None = "position_embeddings"
    alone: bool = False
    positions: str | None = None
    attention: str | None = "self_attn"
    window: int | None = None
    aside: bool = False
    kinds: int = 0
    cache: str | None = None
    recurrent: str | None = None
    stepwise: bool = False

    def __call__(
        self,
        layer: nn.Module,
        hidden: Tensor,
        table: RotaryTable,
        comet: Any,
        cache: StateCache | None = None,
    ) -> Tensor:
        """The layer's outputs [B, I, D].

        Args:
            hidden: [B, I, D].
            table: rows of the layer's rotary table at the items' positions, [1 or B, I, …] each.
            comet: what the attention function is told.
            cache: what the layer takes its own state from, and leaves it in.
        """
        given: dict[str, Any] = dict(self.options)
        if cache is not None:
            assert self.cache is not None
            given[self.cache] = cache
        if self.positions is not None:
            *table_parts, given[self.positions] = table
            table = tuple(table_parts)
        if self.kinds:
            table = tuple(part.expand(self.kinds, *part.shape) for part in table)
        if self.rotary is not None:
            given[self.rotary] = table[0] if self.alone else table
        if self.aside:
            token = _TOLD.set(comet)
            try:
                out = layer(hidden, **given)
            finally:
                _TOLD.reset(token)
        else:
            out = layer(hidden, **given, comet=comet)
        outputs: Tensor = out if isinstance(out, Tensor) else out[0]
        return outputs

    def with_state(
        self, layer: nn.Module, hidden: Tensor, table: RotaryTable, comet: Any, state: OwnState
    ) -> tuple[Tensor, OwnState]:
        """The layer's outputs [B, I, D] and its own state after them, as a value.

        Args:
            state: its own state before.
        """
        if self.cache is None:
            return self(layer, hidden, table, comet), state
        width = hidden.shape[1]
        parts = []
        for start in range(0, width, 1 if self.stepwise else width):
            piece = slice(start, start + 1 if self.stepwise else width)
            place = tuple(part[:, piece] for part in table)
            cache = StateCache(state)
            parts.append(self(layer, hidden[:, piece], place, comet, cache))
            state = cache.after()
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), state

    @torch.compiler.disable
    def key_value(self, layer: nn.Module, hidden: Tensor, table: RotaryTable) -> KeyValue:
        """Rotated keys and values that the layer makes of inputs [B, S, D], by capture.

        Raises:
            ValueError: the layer came to its end without attending.
        """
        capture = Capture()
        try:
            self(layer, hidden, table, capture)
        except Captured:
            assert capture.taken is not None
            return capture.taken
        raise ValueError(
            f"{type(layer).__name__} ran to its end without transformers' attention interface, so "
            "no memory can be read there"
        )
