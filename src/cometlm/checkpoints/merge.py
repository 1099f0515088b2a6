"""LoRA adapters merged into the weights that they adapt: the same model, with fewer products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cometlm.checkpoints.adapters import has_adapter
from cometlm.checkpoints.fingerprint import fingerprint

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM


def merge_lora(model: CometForCausalLM) -> bool:
    """Merge a model's LoRA adapter into its backbone and remove it.

    What the model computes stays the same but for rounding. It can then only be saved together
    with its backbone, which is no longer the one that it names.

    Returns:
        Whether that was done: not without a LoRA adapter that is switched on and the only one, nor
        where weights are quantised, kept elsewhere or tied to others. The adapter stays then.
    """
    if not has_adapter(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {
        name: one for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)
    }
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if len(model.peft_config) > 1 or not layers:
        return False
    if not all(_can_merge(layer, uses) for layer in layers.values()):
        return False
    for name, layer in layers.items():
        base = layer.get_base_layer()
        parts = _digest_of_parts(dict(layer.named_parameters()), layer.scaling)
        layer.merge()
        base.lora_origin = _Origin(fingerprint([("", base.weight)]), parts)
        model.set_submodule(name, base)
    del model.peft_config
    model._hf_peft_config_loaded = False
    mark_merged(model)
    return True


def merge_delta(
    layer: nn.Module, delta: Tensor, parts: Mapping[str, Tensor], scales: Mapping[str, float]
) -> None:
    """Add what an adapter adds to a layer's weight, and note what the weight came from.

    Args:
        parts: weights of the layer and its adapter, by the names that peft gives them.
        scales: of its adapter, by name.
    """
    digest = _digest_of_parts(parts, scales)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    weight.data += delta.to(weight.dtype)
    layer.lora_origin = _Origin(fingerprint([("", weight)]), digest)  # type: ignore[assignment]


def mark_merged(model: CometForCausalLM) -> None:
    """Say that a model's backbone is another one now."""
    backbone: Any = model._backbone  # where detach() and attach() keep it
    backbone.lora_merged = True


def weights_before_merging(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, to tell models apart: a merged one as a digest of its parts.

    Merging rounds as the machine multiplies, so that what comes out is not the same on every one.
    A weight that was changed after merging counts as it is.
    """
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, layer in model.named_modules():
        origin = getattr(layer, "lora_origin", None)
        if origin and fingerprint([("", layer.weight)]) == origin.merged:
            weights[f"{name}.weight"] = origin.parts
    return weights


def can_change(layer: Any, uses: Mapping[int, int]) -> bool:
    """Whether a layer's weight is plain numbers, here, and nobody else's.

    Args:
        uses: how often each parameter comes up in the model, by its `id`.
    """
    weight: Tensor = layer.weight
    here = weight.device != torch.device("meta")
    return weight.is_floating_point() and here and uses[id(weight)] == 1


@dataclass(frozen=True)
class _Origin:
    """What a merged weight came from.

    Attributes:
        merged: digest of the weight as merging left it.
        parts: digest of the weight before, the adapter and its scale.
    """

    merged: str
    parts: Tensor


def _digest_of_parts(parts: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    scaling = {name: torch.tensor(float(scale)) for name, scale in scales.items()}
    digest = fingerprint([*parts.items(), *scaling.items()])
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _can_merge(layer: Any, uses: Counter[int]) -> bool:
    from peft.tuners.lora import LoraLayer

    base = layer.get_base_layer()
    return (
        isinstance(layer, LoraLayer)
        and not layer.disable_adapters
        and bool(layer.active_adapters)
        and (getattr(base, "bias", None) is not None or not any(layer.lora_bias.values()))
        and type(base) in (nn.Linear, nn.Embedding)
        and can_change(base, uses)
    )
