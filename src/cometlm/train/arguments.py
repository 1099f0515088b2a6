"""Fields of trl's configuration as YAML gives them: their types and the packages they need."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from trl import SFTConfig

from cometlm.extras import lacks

_NEEDS = {"deepspeed": "deepspeed", "use_liger_kernel": "liger_kernel"}
_OPTIMISERS = {
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "apex": "apex",
    "galore": "galore_torch",
}


def typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SFTConfig` with numbers that YAML takes for text, such as 1e-8, as numbers.

    Raises:
        ValueError: a field that trl does not have, one that must be a number and is none, or one
            that needs a package that is not installed; names it.
    """
    hints = typing.get_type_hints(SFTConfig)
    for name, value in given.items():
        if name not in SFTConfig.__dataclass_fields__:
            raise ValueError(f"trainer.{name} is no field of trl's SFTConfig")
        needed = _NEEDS.get(name) if value else None
        if name == "optim":
            needed = next((one for part, one in _OPTIMISERS.items() if part in str(value)), None)
        if needed is not None and (message := lacks(f"trainer.{name}: {value}", [needed])):
            raise ValueError(message)
    return {name: _number(name, value, hints[name]) for name, value in given.items()}


def _number(name: str, value: Any, hint: Any) -> Any:
    """A value as the number that its field wants, if it wants one."""
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    wanted = {int, float} & kinds
    if not wanted or str in kinds or not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"trainer.{name} must be a number, got {value!r}") from error
    if float in wanted:
        return number
    if not number.is_integer():
        raise ValueError(f"trainer.{name} must be a whole number, got {value!r}")
    return int(number)
