"""Which of a model's weights a checkpoint is made of, and putting a memory's back into a model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig

from cometlm.checkpoints.adapters import plain_names
from cometlm.checkpoints.source import CARRIED, kind_of

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM

MEMORY_NAME = "model.comet"  # of the module that holds all of its weights
_PREFIX = f"{MEMORY_NAME}."


def memory_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the module `comet`, as a checkpoint holds them."""
    return {
        name: weight.detach().cpu().contiguous()
        for name, weight in state_dict.items()
        if name.startswith(_PREFIX)
    }


def memory_parameters(model: CometForCausalLM) -> dict[str, torch.nn.Parameter]:
    """The memory's weights by their names in it; where adapters have copies, the active ones."""
    parameters = dict(model.named_parameters())
    return {
        plain.removeprefix(_PREFIX): parameters[name]
        for name, plain in plain_names(model, parameters, copied=MEMORY_NAME).items()
        if plain.startswith(_PREFIX)
    }


def saved_names(model: CometForCausalLM, backbone: bool = False) -> set[str]:
    """Names, as in `state_dict()`, of the weights that a checkpoint is made of.

    Args:
        backbone: the backbone's too; as always where no name brings it back.
    """
    names = model.state_dict().keys()
    if backbone or needs_backbone(model):
        return set(names)
    plain = plain_names(model, names)
    return {name for name in names if name not in plain or name.startswith(_PREFIX)}


def saved_weights(
    model: CometForCausalLM, state_dict: Mapping[str, Tensor], with_adapter: bool
) -> dict[str, Tensor]:
    """The memory's weights, and if wanted an adapter's under their names in the model.

    Raises:
        ValueError: one of the memory's is not among those given.
    """
    plain = plain_names(model, state_dict, copied=MEMORY_NAME)
    memory = memory_weights({plain[name]: state_dict[name] for name in plain})
    for name in memory_parameters(model):
        if f"{_PREFIX}{name}" not in memory:
            raise ValueError(f"the memory cannot be saved: its weight {_PREFIX}{name} is not given")
    if not with_adapter:
        return memory
    beside = {
        name: weight.detach().cpu().contiguous().clone()
        for name, weight in state_dict.items()
        if name not in plain and not name.startswith(_PREFIX)
    }
    return memory | beside


def load_memory(model: CometForCausalLM, weights: Mapping[str, Tensor], name: str) -> None:
    """Put saved weights into a model's memory.

    Raises:
        ValueError: they are not those of this model.
    """
    own = memory_parameters(model)
    given = {
        key.removeprefix(_PREFIX): weight
        for key, weight in weights.items()
        if key.startswith(_PREFIX)  # else an adapter's, which is in a folder of its own too
    }
    if not model.config.comet_config.gate:
        given = {key: weight for key, weight in given.items() if not key.endswith(".gate")}
    for key in sorted(own.keys() ^ given.keys()):
        what = "lacks" if key in own else "holds an unknown"
        raise ValueError(f"{name} does not fit this model: it {what} weight {_PREFIX}{key}")
    with torch.no_grad():
        for key, parameter in own.items():
            if given[key].shape != parameter.shape:
                raise ValueError(
                    f"{name} does not fit this model: {_PREFIX}{key} is "
                    f"{list(given[key].shape)}, expected {list(parameter.shape)}"
                )
            if given[key].dtype == torch.float32 and parameter.dtype.itemsize < 4:
                # Trained in float32: a gate applied thousands of times must not be rounded.
                parameter.data = parameter.data.float()
            parameter.copy_(given[key])


def needs_backbone(model: CometForCausalLM) -> bool:
    """Whether a checkpoint would name a backbone of another vocabulary, or could name none."""
    named = _vocabulary_of(model.config.backbone)
    return model.is_only_copy or named not in (None, model.config.vocab_size)


def _vocabulary_of(backbone: str) -> int | None:
    """Size of the vocabulary of a named backbone; None if nothing on this machine tells."""
    if backbone in ("", CARRIED) or kind_of(backbone) == "built-in":
        return None
    with contextlib.suppress(OSError, ValueError):
        config = AutoConfig.from_pretrained(backbone, local_files_only=True)
        return int(config.get_text_config().vocab_size)
    return None
