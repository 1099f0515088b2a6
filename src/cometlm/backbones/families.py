"""One row for a model family whose memory slots are projected faster than by capture.

Any decoder attaches without a row: `discovery` finds out how its layers are called, and keys and
values of memory slots are captured (`calling`). A row says what cannot be read off a family's
modules: which norm stands before the key and value projections, whether these are fused, and how
keys are normed. From that, `Family.key_value` projects memory slots exactly as the layer would
project its own input, without running the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cometlm.backbones.calling import KeyValue
from cometlm.registry import Registry


@dataclass(frozen=True)
class Family:
    """How one model family turns a layer's input into keys and values.

    Attributes:
        pre_norm: name of the norm in front of the attention; None where there is none (post-norm).
        fused: name of a projection that makes query, key and value in one; None if separate.
        key_norm: what the key norm runs over: one head, all heads together, or nothing.
        rotary_by_layer_type: the rotary module wants the layer's type (one base per type).
    """

    pre_norm: str | None = "input_layernorm"
    fused: str | None = None
    key_norm: Literal["head", "full"] | None = None
    rotary_by_layer_type: bool = False

    def key_value(self, layer: nn.Module, hidden: Tensor) -> KeyValue:
        """Un-rotated keys and values [B, key-value heads, S, head width] of inputs [B, S, D]."""
        attention: Any = layer.self_attn
        normed = getattr(layer, self.pre_norm)(hidden) if self.pre_norm else hidden
        key, value = self._project(attention, normed)
        if self.key_norm == "full":
            key = attention.k_norm(key)
        key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in (key, value))
        if self.key_norm == "head":
            key = attention.k_norm(key)
        return KeyValue(key.transpose(1, 2), value.transpose(1, 2))

    def _project(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused is None:
            return attention.k_proj(normed), attention.v_proj(normed)
        fused = getattr(attention, self.fused)
        width = attention.config.num_key_value_heads * attention.head_dim
        if type(fused) is nn.Linear and not _hooked(fused):  # leave out the query's share
            bias = None if fused.bias is None else fused.bias[-2 * width :]
            both = F.linear(normed, fused.weight[-2 * width :], bias)
        else:  # adapted, quantised or offloaded: only the module knows its product
            both = fused(normed)[..., -2 * width :]
        key, value = both.split(width, dim=-1)
        return key, value


# What a row speaks for: layers of other types are looked at one by one, as those without a row.
_LAYER_TYPES = {"full_attention", "sliding_attention"}

# One row per family; see "Add a backbone" in CONTRIBUTING.md.
FAMILIES: Registry[Family] = Registry(
    "model family",
    "cometlm.backbones",
    {
        "llama": Family(),
        "mistral": Family(),
        "qwen2": Family(),
        "qwen3": Family(key_norm="head"),
        "qwen3_moe": Family(key_norm="head"),
        "phi3": Family(fused="qkv_proj"),
        "olmo2": Family(pre_norm=None, key_norm="full"),
        "smollm3": Family(),
        "gemma3_text": Family(key_norm="head", rotary_by_layer_type=True),
    },
)


def family_of(config: Any) -> Family | None:
    """The row for a backbone's config; None where it has none.

    Raises:
        ValueError: an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder: memory needs a decoder")
    kind = config.model_type
    usual = set(getattr(config, "layer_types", None) or ()) <= _LAYER_TYPES
    return FAMILIES[kind] if usual and kind in FAMILIES else None


def keep_weights_in_place(backbone: nn.Module) -> None:
    """Have 4-bit weights keep their layout.

    On some CPUs bitsandbytes repacks them the first time that they are read without a gradient.
    After that none flows through them, and the weights that a session was made with look like
    others.
    """
    for module in backbone.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def layer_type(config: Any, layer: int) -> str:
    """The type of one layer, as the config names it."""
    types = getattr(config, "layer_types", None)
    return str(types[layer]) if types else "full_attention"


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: its weights' device, or its hook's if they are kept elsewhere."""
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        return parameter.device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        hooks = [hook, *getattr(hook, "hooks", ())]
        for one in hooks:
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device
    return parameter.device if parameter is not None else torch.device("cpu")


def rotate_keys(layer: nn.Module, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate keys [B, heads, S, width] with the family's own function, or not at all (NoPE)."""
    attention: Any = layer.self_attn
    if not getattr(attention, "use_rope", True):
        return key
    apply: Callable[..., tuple[Tensor, Tensor]]
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    no_query = key[:, :0]
    return apply(no_query, key, cos, sin)[1]


def _hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook") or bool(module._forward_hooks or module._forward_pre_hooks)
