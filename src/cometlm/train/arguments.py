"""Fields of trl's configuration as YAML gives them: their types and the packages they need."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from trl import SFTConfig

from cometlm.extras import lacks

_NEEDS = {"deepspeed": "deepspeed", "use_liger_kernel": "liger_kernel"}
_TEMPLATE = "the run takes the chat template and the tokens of the model's own tokenizer"
_LOSS = "the loss is the cross entropy of each token, chunk by chunk"
_WITHOUT_EFFECT = {
    "chat_template_path": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "dataset_text_field": "text stands in the field text",
    "model_init_kwargs": "dtype, quantization and sizes are fields of the run",
    "loss_type": _LOSS,
    "label_smoothing_factor": _LOSS,
}
_AT_LEAST_ONE = ("gradient_accumulation_steps", "per_device_train_batch_size")
_OPTIMISERS = {
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "apex": "apex",
    "galore": "galore_torch",
}


def typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SFTConfig` with numbers that YAML takes for text, such as 1e-8, as numbers.

    Raises:
        ValueError: a field that trl does not have, one that would change nothing, one that must be
            a number and is none, or one that needs a package that is not installed; names it.
    """
    hints = typing.get_type_hints(SFTConfig)
    fields = SFTConfig.__dataclass_fields__
    for name, value in given.items():
        if name not in fields:
            raise ValueError(f"trainer.{name} is no field of trl's SFTConfig")
        if name in _WITHOUT_EFFECT and value != fields[name].default:
            raise ValueError(f"trainer.{name} would change nothing: {_WITHOUT_EFFECT[name]}")
        needed = _NEEDS.get(name) if value else None
        if name == "optim":
            needed = next((one for part, one in _OPTIMISERS.items() if part in str(value)), None)
        if needed is not None and (message := lacks(f"trainer.{name}: {value}", [needed])):
            raise ValueError(message)
    found = {name: _number(name, value, hints[name]) for name, value in given.items()}
    for name in _AT_LEAST_ONE:
        if found.get(name, 1) < 1:
            raise ValueError(f"trainer.{name} must be at least 1, got {found[name]}")
    return found


def _number(name: str, value: Any, hint: Any) -> Any:
    """A value as the number that its field wants, if it wants one."""
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    wanted = {int, float} & kinds
    if not wanted or type(value) in kinds or (float in wanted and isinstance(value, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"trainer.{name} must be a number, got {value!r}") from error
    if float in wanted:
        return number
    if not number.is_integer():
        raise ValueError(f"trainer.{name} must be a whole number, got {value!r}")
    return int(number)
