"""Models by name: a backbone with a new memory, or a trained memory and its backbone."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from cometlm.checkpoints.backbones import Bits, quantization_of
from cometlm.checkpoints.memory import check_vocabulary, name_to_keep
from cometlm.checkpoints.source import Source
from cometlm.config import CometModelConfig
from cometlm.core.attach import attach
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import as_dtype, default_dtype, find_device


class QuantizationWarning(UserWarning):
    """A memory is read beside another backbone than the quantised one that it learned beside."""


def load(
    name: str | os.PathLike[str] | Source,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    merge: bool = True,
    quantization: Bits | QuantizationConfigMixin | None = None,
    **sizes: Any,
) -> tuple[CometForCausalLM, Any]:
    """Load a model with memory and its tokenizer, by name.

    Args:
        name: a built-in name ("smollm2", "gemma3-270m"), a directory, or a hub id: of a backbone,
            which gets an untrained memory, or of a checkpoint, which comes with its own.
            "smollm2" comes with the trained memory that ships in the package. Or a `Source`, which
            is a name that was resolved before.
        device: where to put it; "auto" spreads it over all devices. Default: the accelerator if
            there is one, else the CPU.
        dtype: or its name; default bfloat16, but float32 on CPUs without bfloat16 products.
        merge: merge a checkpoint's LoRA adapter into the backbone, which then reads faster; False
            keeps it apart, to be trained or saved again. See `merge_lora`.
        quantization: keep the backbone, never the memory, in "4bit" or "8bit" (it needs
            bitsandbytes), or as a quantization config of transformers says. A LoRA adapter then
            stays apart.
        sizes: `CometConfig` fields and `seed` for a backbone; default the built-in model's own, or
            the paper's. A trained memory may be read with another `chunk_size`, `stride`,
            `capacity` and `overlap` than it came with, and with `gate=False` without its gates,
            which is the paper's ablation. Where one ships with a built-in model, sizes that
            change its weights, or a `seed`, ask for an untrained memory instead.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: a device that is not here; a dtype that is none; a built-in model that is not
            installed or not the one expected; other sizes for a checkpoint; what `attach` raises; a
            library that quantises and is not installed.
        OSError: a directory or hub id that cannot be read; a built-in model's converted copy cannot
            be kept.
    """
    spread = str(device) == "auto"
    place = find_device(device)
    kind = (as_dtype(dtype) if isinstance(dtype, str) else dtype) or default_dtype(place)
    where: dict[str, Any] = {
        "dtype": kind,
        "device_map": "auto" if spread else None,
        "quantization_config": quantization_of(quantization, kind),
    }
    if quantization is not None and not spread:
        where["device_map"] = {"": place}  # weights are quantised where they will be used
    source = Source.resolve(name)
    memory = source.memory_config(**sizes)
    if memory is not None:
        backbone = source.load_backbone(**where)
        check_vocabulary(source.name, memory, backbone)
        memory_place = str(source.memory_location)
        model = CometForCausalLM.from_pretrained(
            memory_place,
            backbone=backbone,
            config=memory,
            merge=merge,
        )
        model.config.backbone = name_to_keep(memory, memory_place)
        model.name_or_path = model.config.name_or_path = source.name
        _warn_of_bits(source.name, memory, model)
    else:
        comet = source.comet_config(**sizes)
        model = attach(source.load_backbone(**where).eval(), comet, seed=sizes.get("seed", 0))
    if where["device_map"] is None:
        torch.nn.Module.to(model, place)
    return model, source.load_tokenizer()


def _warn_of_bits(name: str, config: CometModelConfig, model: CometForCausalLM) -> None:
    """Warn where the backbone was quantised while the memory was trained, and is not now."""
    saved = getattr(config.backbone_config, "quantization_config", None)
    if saved is not None and not getattr(model._backbone, "is_quantized", False):
        warnings.warn(
            f"the memory of {name} was trained beside a quantised backbone and is read beside one "
            'that is not; load(..., quantization="4bit") or "8bit" quantises it again',
            QuantizationWarning,
            stacklevel=3,
        )
