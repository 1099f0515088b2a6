"""Each layer's rotary table for rows of a length, made once and kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cometlm.backbones.families import Family, RotaryTable, layer_type, rotary_tables

_KEPT = 4  # lengths; budgets that change from call to call would keep one each


class RotaryTables:
    """Tables of the last few lengths that were asked for.

    Args:
        rotary: the backbone's rotary module.
        config: the backbone's, of its text.
        family: the backbone's.
    """

    def __init__(self, rotary: nn.Module, config: Any, family: Family) -> None:
        self._rotary = rotary
        self._config = config
        self._family = family
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
        """One copy for each type of layer and device, however many layers share it."""
        by_type = self._family.rotary_by_layer_type
        tables = rotary_tables(self._rotary, self._config, by_type, length, like)
        placed: dict[tuple[str, torch.device], RotaryTable] = {}
        found = []
        for i, device in enumerate(devices):
            kind = layer_type(self._config, i)
            if (kind, device) not in placed:
                cos, sin = tables[kind]
                placed[kind, device] = (cos.to(device), sin.to(device))
            found.append(placed[kind, device])
        return found
