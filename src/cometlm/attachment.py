"""Giving a backbone a memory, and taking it off again.

The backbone's modules are shared with the model that `attach` returns, never copied, so its
weights, hooks and adapters stay its own. All that changes on it is the name of its attention
function; `detach` sets that back, and every parameter's `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from cometlm import attention
from cometlm.backbone import keep_weights_in_place, take_apart
from cometlm.causal_lm import CometForCausalLM
from cometlm.config import CometConfig
from cometlm.model import position_limit
from cometlm.model_config import CometModelConfig


def attach(
    backbone: PreTrainedModel, config: CometConfig | None = None, *, seed: int = 0, **sizes: Any
) -> CometForCausalLM:
    """Give a Hugging Face causal language model a memory. Undo with `detach`.

    4-bit weights of bitsandbytes keep their layout from now on, also after `detach`.

    Args:
        backbone: the model; its modules are shared with the result.
        config: sizes and switches; default the paper's.
        seed: of the untrained memory's random numbers. They are drawn apart from torch's own, so
            that a backbone always gets the same memory and sessions outlive the process.
        sizes: `CometConfig` fields to change, e.g. `chunk_size=512`.

    Raises:
        ValueError: a family that is not supported, an impossible size, sizes that exceed the
            backbone's positions, a backbone that already has a memory.
    """
    comet = (config or CometConfig()).replace(**known_sizes(sizes))
    if getattr(backbone.config, "_attn_implementation", None) == attention.NAME:
        raise ValueError(f"{type(backbone).__name__} already has a memory; detach() it first")
    take_apart(backbone)
    comet.check_positions(position_limit(backbone.config))
    keep_weights_in_place(backbone)
    undo = _Undo.of(backbone)
    model_config = CometModelConfig(
        text_config=backbone.config,
        backbone=str(backbone.config.name_or_path or ""),
        comet=comet.to_dict(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)  # modules initialise themselves on the CPU
        model = CometForCausalLM(model_config, backbone)
    undo.restore_implementations()  # a config resets those of the configs inside it
    backbone.config._attn_implementation = attention.NAME
    object.__setattr__(model, "_undo", undo)
    if hasattr(backbone, "hf_device_map"):
        model.hf_device_map = backbone.hf_device_map
    return model.train(backbone.training)


def detach(model: CometForCausalLM) -> PreTrainedModel:
    """Take the memory off and give back the backbone as it was before `attach`.

    Raises:
        ValueError: the model was detached before.
    """
    undo = cast("_Undo | None", model._undo)
    if undo is None:
        raise ValueError("this model is not attached to a backbone; it was detached before")
    undo()
    object.__setattr__(model, "_undo", None)
    return cast("PreTrainedModel", model._backbone)


@dataclass(frozen=True)
class _Undo:
    """What `attach` changes on a backbone, as it was before."""

    backbone: PreTrainedModel
    attention: str | None
    experts: str | None
    requires_grad: dict[str, bool]

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> _Undo:
        config = backbone.config
        flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
        return cls(backbone, config._attn_implementation, config._experts_implementation, flags)

    def restore_implementations(self) -> None:
        self.backbone.config._attn_implementation = self.attention
        self.backbone.config._experts_implementation = self.experts

    def __call__(self) -> None:
        self.restore_implementations()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))


def known_sizes(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same sizes, all of them fields of `CometConfig`.

    Raises:
        ValueError: a name that is none.
    """
    for name in sizes:
        if name not in CometConfig.__dataclass_fields__:
            fields = ", ".join(CometConfig.__dataclass_fields__)
            raise ValueError(f"unknown CometConfig field {name!r}; it has {fields}")
    return sizes
