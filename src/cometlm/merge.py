"""LoRA adapters merged into the weights that they adapt: the same model, with fewer products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from cometlm.causal_lm import CometForCausalLM


def merge_lora(model: CometForCausalLM) -> bool:
    """Merge a model's LoRA adapter into its backbone and remove it.

    What the model computes stays the same but for rounding. It can then only be saved together
    with its backbone, which is no longer the one that it names.

    Returns:
        Whether that was done: not without an adapter, nor beside weights that are quantised or
        kept elsewhere, where the adapter stays.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):
        return False
    from peft.tuners.lora import LoraLayer

    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    if not all(_can_merge(layer) for layer in layers.values()):
        return False
    adapters: Any = model.active_adapters()
    for name, layer in layers.items():
        layer.merge(adapter_names=adapters)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.merged = True
    return True


def _can_merge(layer: Any) -> bool:
    base = layer.get_base_layer()
    return (
        type(base) in (nn.Linear, nn.Embedding, nn.Conv1d)
        and base.weight.is_floating_point()
        and base.weight.device != torch.device("meta")
    )
