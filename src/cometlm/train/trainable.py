"""What is trained: the memory alone, LoRA beside it, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cometlm.checkpoints.adapters import has_adapter, plain_names
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.extras import TRAIN, lacks

if TYPE_CHECKING:
    from peft import LoraConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


def lora_config(
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    modules: Sequence[str] = PROJECTIONS,
    **options: Any,
) -> LoraConfig:
    """LoRA on the backbone's projections, with the memory trained and saved beside it.

    For `SFTTrainer(peft_config=...)` or `get_peft_model`. The adapters can be merged; the memory
    is a module of its own that peft keeps whole.

    Args:
        modules: names of the backbone's projections; those that it does not have are passed over.
        options: further fields of peft's `LoraConfig`.

    Raises:
        ImportError: peft is not installed.
    """
    if message := lacks("LoRA", ["peft"], TRAIN):
        raise ImportError(message, name="peft")
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A pattern for whole names: below a cell's layer, so never in the memory.
        target_modules=rf".*\.cells\.\d+\.layer\..*({'|'.join(modules)})",
        modules_to_save=["comet"],
        task_type="CAUSAL_LM",
        **options,
    )


def set_trainable(model: CometForCausalLM, mode: str, lora: LoraConfig | None = None) -> None:
    """Choose what is trained; trained weights are kept in float32.

    The backbone stays in its own dtype where it is frozen, so nothing of it is ever copied.

    Args:
        mode: "memory", "lora" (a new adapter unless the model has one, of any kind) or "full".
        lora: for mode "lora".

    Raises:
        ValueError: an unknown mode; mode "full" of a quantised backbone; mode "lora" of an adapter
            that has copies of modules (peft's `modules_to_save`) in less than float32.
    """
    if mode not in ("memory", "lora", "full"):
        raise ValueError(f"mode must be memory, lora or full, got {mode!r}")
    if mode == "full":
        if getattr(model._backbone, "is_quantized", False):
            raise ValueError("mode full cannot train a quantised backbone; use memory or lora")
        wide = torch.promote_types(model.dtype, torch.float32)
        torch.nn.Module.to(model, wide).requires_grad_(True)
        return
    model.requires_grad_(False)
    if mode == "lora" and not has_adapter(model):
        config = lora or lora_config()
        config.modules_to_save = None  # the memory is trained in place, not in a copy
        model.add_adapter(config)
    trained = dict(model.model.comet.named_parameters())
    if mode == "lora":
        trained |= _of_adapters(model)
    for parameter in trained.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


def _of_adapters(model: CometForCausalLM) -> dict[str, torch.nn.Parameter]:
    """Weights of a model's adapters, by name.

    Raises:
        ValueError: a copy of a module that could not be trained in float32.
    """
    named = dict(model.named_parameters())
    plain = plain_names(model, named)
    found = {name: p for name, p in named.items() if name not in plain}
    for name, p in found.items():
        module, is_copy, _ = name.partition(".modules_to_save.")
        if is_copy and p.dtype.itemsize < 4:  # it would not take what layers in p.dtype give it
            raise ValueError(
                f"mode lora trains in float32, but the adapter's copy of {module} cannot be beside "
                f"a backbone in {p.dtype}: load the model with dtype float32"
            )
    return found


def parameter_groups(
    model: torch.nn.Module,
    learning_rate: float,
    memory_factor: float,
    weight_decay: float = 0.0,
    gate_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Trained parameters for an optimiser: the memory's learn faster (SPEC §5: five times).

    Args:
        model: wrapped by peft or not.
        gate_factor: the gates' learning rate as a multiple of the memory's.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    memory = [p for name, p in named if ".comet." in f".{name}" and not name.endswith(".gate")]
    gates = [p for name, p in named if ".comet." in f".{name}" and name.endswith(".gate")]
    others = [p for name, p in named if ".comet." not in f".{name}"]
    faster = learning_rate * memory_factor
    groups = [
        (others, learning_rate, weight_decay),
        (memory, faster, 0.0),
        (gates, faster * gate_factor, 0.0),
    ]
    return [{"params": ps, "lr": lr, "weight_decay": wd} for ps, lr, wd in groups if ps]
