"""What every training loop begins with: the model and what is trained, and how text is cut.

Nothing here needs trl, so that a loop can do without it (`train.loop`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from cometlm.checkpoints.adapters import has_adapter
from cometlm.checkpoints.atomic_write import read_weights
from cometlm.checkpoints.lora import load_lora
from cometlm.checkpoints.source import Source
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import as_dtype
from cometlm.model_loader import load
from cometlm.train.chunk_plans import Chunking
from cometlm.train.config import ChunkSettings, Log, LoraSettings, TrainConfig
from cometlm.train.gates import check_room
from cometlm.train.start import start_like
from cometlm.train.trainable import lora_config, set_trainable


class Prepared(NamedTuple):
    """A model to train.

    Attributes:
        is_new: whether its memory is one that nothing has trained.
    """

    model: CometForCausalLM
    tokenizer: Any
    is_new: bool


def prepare(
    config: TrainConfig, *, device: str | None = None, going_on: bool = False, log: Log = print
) -> Prepared:
    """Load a run's model and choose what is trained.

    Args:
        going_on: whether weights of an earlier part of the run come next.

    Raises:
        ValueError: settings that do not fit the model.
        OSError: it cannot be read.
    """
    source = Source.resolve(config.model)
    is_new = bool(config.comet) or not source.has_memory
    if config.comet and source.is_checkpoint:
        raise ValueError(
            f"model {config.model} is a checkpoint and has its memory: comet is for new ones; say "
            "in sizes what this one is to be read with"
        )
    sizes = {**config.comet, **config.sizes, **({"seed": config.seed} if is_new else {})}
    model, tokenizer = load(
        source,
        device=device,
        dtype=as_dtype(config.dtype),
        quantization=config.quantization,
        merge=config.mode == "full",  # an adapter is trained on, or becomes a part of the whole
        **sizes,
    )
    if is_new and not going_on:
        start_like(model, tokenizer, config.start)
    if config.lora is not None and has_adapter(model):
        raise ValueError(
            f"lora is for new adapters, and model {config.model} goes on with its own: leave it out"
        )
    lora = config.lora or LoraSettings()
    adapters = lora_config(lora.r, lora.alpha, lora.dropout, lora.modules)
    if config.gates.whiten:
        check_room(model)
    torch.manual_seed(config.seed)
    set_trainable(model, config.mode, adapters)
    model.config.trained_for = config.purpose
    log(describe_trained(model))
    if config.compile:
        model.model.train().compile_cells()
    return Prepared(model, tokenizer, is_new)


def describe_trained(model: CometForCausalLM) -> str:
    """How many weights are trained, and where."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    memory = sum(p.numel() for name, p in named if ".comet." in name)
    others = sum(p.numel() for name, p in named if ".comet." not in name)
    return f"training {memory:,} weights of the memory and {others:,} of the backbone"


def chunking_of(settings: ChunkSettings, tokenizer: Any, seed: int) -> Chunking:
    """The chunk plans that settings name."""
    return Chunking.of(
        settings.plans,
        tokenizer,
        seed=seed,
        sizes=settings.sizes,
        strides=settings.strides,
        capacities=settings.capacities,
    )


def restore(model: CometForCausalLM, checkpoint: str | Path, whole: bool) -> None:
    """Put what a checkpoint holds into a model that has the same parts.

    Args:
        whole: with its backbone.
    """
    from cometlm.checkpoints.backbones import read_backbone
    from cometlm.checkpoints.memory import BACKBONE, LORA, WEIGHTS
    from cometlm.checkpoints.weights import load_memory

    folder = Path(checkpoint)
    load_memory(model, read_weights(folder / WEIGHTS), str(folder))
    load_lora(model, folder / LORA)
    if whole:
        saved = read_backbone(str(folder / BACKBONE), dtype=model.dtype)
        cast("nn.Module", model._backbone).load_state_dict(saved.state_dict())
