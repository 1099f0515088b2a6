"""Each layer's rotary table for rows of a length, made once and kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from cometlm.backbones.calling import RotaryTable

_KEPT = 4  # lengths; budgets that change from call to call would keep one each


class Given(Enum):
    """What a rotary module is called with, beside constants."""

    LIKE = "a tensor of the table's dtype and device"
    POSITIONS = "positions [1, length]"


@dataclass(frozen=True)
class AllKinds:
    """Positions [kinds, 1, length] in time, height and width, which for text are all alike."""

    kinds: int


@dataclass(frozen=True)
class Rotation:
    """Where a layer's rotary table comes from.

    Attributes:
        module: the backbone's rotary module; None where the layer takes no table.
        args: what the module is called with.
        kwargs: the same by name.
        with_positions: the positions themselves are a last part of the table.
        kinds: the module makes its table for each of so many kinds of positions; one is kept.
    """

    module: nn.Module | None
    args: tuple[Any, ...] = (Given.LIKE, Given.POSITIONS)
    kwargs: tuple[tuple[str, Any], ...] = ()
    with_positions: bool = False
    kinds: int = 0

    def table(self, length: int, like: Tensor) -> RotaryTable:
        """The table [length, …], each part of it.

        It is computed for the whole `length` at once: scalings that look at the longest position
        (longrope, dynamic) then do not depend on how the input was cut.
        """
        positions = torch.arange(length, device=like.device)[None, :]
        meant = {Given.LIKE: like, Given.POSITIONS: positions}

        def filled(value: Any) -> Any:
            if isinstance(value, AllKinds):
                return positions.expand(value.kinds, 1, -1)
            return meant[value] if isinstance(value, Given) else value

        parts: tuple[Tensor, ...] = ()
        if self.module is not None:
            args = [filled(value) for value in self.args]
            made = self.module(*args, **{name: filled(value) for name, value in self.kwargs})
            parts = (made,) if isinstance(made, Tensor) else tuple(made)
            parts = tuple(part[0] for part in parts) if self.kinds else parts
        own = (positions,) if self.with_positions else ()
        return tuple(part[0] for part in (*parts, *own))


class RotaryTables:
    """Tables of the last few lengths that were asked for.

    Args:
        rotations: of each layer.
    """

    def __init__(self, rotations: Sequence[Rotation]) -> None:
        self._rotations = tuple(rotations)
        self._kept: dict[tuple[Any, ...], list[RotaryTable]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, length: int, like: Tensor, devices: Sequence[torch.device]) -> list[RotaryTable]:
        """Cosines and sines [length, rotated width] for each layer, on that layer's device.

        Args:
            length: the longest row's items.
            like: has the dtype of the tables and the device that they are made on.
            devices: of each layer.
        """
        key = (length, like.dtype, *devices)
        if key not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False), torch.no_grad():  # they outlive this call
                self._kept[key] = self._placed(length, like, devices)
            for device in {device for device in devices if device.type != "cpu"}:
                torch.accelerator.synchronize(device)  # another stream may be the next to use them
        return self._kept[key]

    def _placed(
        self, length: int, like: Tensor, devices: Sequence[torch.device]
    ) -> list[RotaryTable]:
        """One copy for each kind of table and device, however many layers share it."""
        made = {one: one.table(length, like) for one in dict.fromkeys(self._rotations)}
        placed: dict[tuple[Rotation, torch.device], RotaryTable] = {}
        for one, device in zip(self._rotations, devices, strict=True):
            if (one, device) not in placed:
                placed[one, device] = tuple(part.to(device) for part in made[one])
        return [placed[pair] for pair in zip(self._rotations, devices, strict=True)]
