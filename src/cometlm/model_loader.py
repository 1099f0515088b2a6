"""Models by name: a backbone with a new memory, or a trained memory and its backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cometlm.checkpoints.backbones import (
    BUILT_IN,
    Bits,
    load_backbone,
    not_found,
    quantization_of,
    source_of,
)
from cometlm.checkpoints.memory import BACKBONE, WEIGHTS
from cometlm.config import RUNTIME_SIZES, CometConfig, CometModelConfig, known_sizes
from cometlm.core.attach import attach
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import default_dtype, find_device


class QuantizationWarning(UserWarning):
    """A memory is read beside another backbone than the quantised one that it learned beside."""


def load(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    merge: bool = True,
    quantization: Bits | QuantizationConfigMixin | None = None,
    **sizes: Any,
) -> tuple[CometForCausalLM, Any]:
    """Load a model with memory and its tokenizer, by name.

    Args:
        name: a built-in name ("smollm2", "gemma3-270m"), a directory, or a hub id: of a backbone,
            which gets an untrained memory, or of a checkpoint, which comes with its own.
            "smollm2" comes with the trained memory that ships in the package.
        device: where to put it; "auto" spreads it over all devices. Default: the accelerator if
            there is one, else the CPU.
        dtype: default bfloat16, but float32 on CPUs without bfloat16 products.
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
        ValueError: a device that is not here; a built-in model that is not installed or not the
            one expected; other sizes for a checkpoint; what `attach` raises; a library that
            quantises and is not installed.
        OSError: a directory or hub id that cannot be read; a built-in model's converted copy cannot
            be kept.
    """
    built_in = BUILT_IN.get(name)
    spread = str(device) == "auto"
    place = find_device(device)
    where: dict[str, Any] = {
        "dtype": dtype or default_dtype(place),
        "device_map": "auto" if spread else None,
        "quantization_config": quantization_of(quantization, dtype or default_dtype(place)),
    }
    if quantization is not None and not spread:
        where["device_map"] = {"": place}  # weights are quantised where they will be used
    config = _config_of(name)
    trained = _trained_config(name, config, sizes)
    if trained is not None:
        model = CometForCausalLM.from_pretrained(_home(name), config=trained, merge=merge, **where)
        model.config.name_or_path = name
        _warn_of_bits(name, trained, model)
    else:
        chosen = {**built_in.sizes, **sizes} if built_in else sizes
        model = attach(load_backbone(name, **where).eval(), **chosen)
    if where["device_map"] is None:
        torch.nn.Module.to(model, place)
    return model, _load_tokenizer(name, config)


def _warn_of_bits(name: str, config: CometModelConfig, model: CometForCausalLM) -> None:
    """Warn where the backbone was quantised while the memory was trained, and is not now."""
    saved = getattr(config.text_config, "quantization_config", None)
    if saved is not None and not getattr(model._backbone, "is_quantized", False):
        warnings.warn(
            f"the memory of {name} was trained beside a quantised backbone and is read beside one "
            'that is not; load(..., quantization="4bit") or "8bit" quantises it again',
            QuantizationWarning,
            stacklevel=3,
        )


def has_memory(name: str) -> bool:
    """Whether a trained memory comes with a name: a checkpoint, or a built-in model's own.

    Raises:
        ValueError, OSError: as `load`.
    """
    return _trained_config(name, _config_of(name), {}) is not None


def described(name: str, **sizes: Any) -> tuple[Any, CometConfig]:
    """The backbone's config and the memory's sizes that `load` would take; no weights are loaded.

    Args:
        name, sizes: as for `load`.

    Raises:
        ValueError, OSError: as `load`.
    """
    config = _config_of(name)
    trained = _trained_config(name, config, sizes)
    if trained is not None:
        return trained.text_config, trained.comet_config
    chosen = {**BUILT_IN[name].sizes, **sizes} if name in BUILT_IN else sizes
    return config.get_text_config(), CometConfig().replace(**known_sizes(chosen))


def _config_of(name: str) -> Any:
    source = source_of(name)
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise not_found(name, error) from error


def _home(name: str) -> str:
    """The folder or hub id of the trained memory that comes with a name."""
    built_in = BUILT_IN.get(name)
    return str(built_in.trained) if built_in else name


def _trained_config(name: str, config: Any, sizes: Mapping[str, Any]) -> CometModelConfig | None:
    """The config of the trained memory that comes with a name, with these sizes.

    Returns:
        None for a backbone, and for a built-in model where sizes ask for an untrained memory.

    Raises:
        ValueError: sizes that a checkpoint cannot have.
    """
    if isinstance(config, CometModelConfig):
        if not _resized(config, sizes):
            free = ", ".join(RUNTIME_SIZES)
            raise ValueError(
                f"{name} is a checkpoint: only {free} may be others, and gate false, got {sizes}"
            )
        return config
    built_in = BUILT_IN.get(name)
    if built_in is None or built_in.trained is None or not (built_in.trained / WEIGHTS).exists():
        return None
    own: CometModelConfig = CometModelConfig.from_pretrained(str(built_in.trained))
    return own if _resized(own, sizes) else None


def _resized(config: CometModelConfig, sizes: Mapping[str, Any]) -> bool:
    """Put sizes into a trained memory's config, if it can have them."""
    if "seed" in sizes:
        return False
    own = config.comet_config
    wanted = own.replace(**known_sizes(sizes))
    free = {name: getattr(own, name) for name in RUNTIME_SIZES}
    if not wanted.gate:
        free["gate"] = own.gate  # the weights of one are left out
    if wanted.replace(**free) != own:
        return False
    config.comet = wanted.to_dict()
    return True


def _load_tokenizer(name: str, config: Any) -> Any:
    """A checkpoint's own tokenizer, or its backbone's."""
    try:
        return AutoTokenizer.from_pretrained(source_of(name))
    except (OSError, ValueError):
        if not isinstance(config, CometModelConfig) or not config.backbone:
            raise
        if config.backbone == f"./{BACKBONE}":
            raise OSError(
                f"{name} holds no tokenizer; put one there: tokenizer.save_pretrained({name!r})"
            ) from None
        return AutoTokenizer.from_pretrained(source_of(config.backbone))
