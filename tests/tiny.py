"""Tiny random models of every supported family, and what their tests compare with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import cometlm

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SMALL = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5, "rank": 2}

# What each family adds; windows are short so that they bite inside a chunk.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},  # keys and values smaller than hidden rows: packed
    "mistral": {"sliding_window": 7},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "experts_implementation": "eager",  # the grouped kernels have no float64
    },
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
}


def tiny_backbone(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random backbone in float64, with norms and biases away from their defaults."""
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    scramble(model, 0.3)
    return model


def tiny_comet(family: str, seed: int = 0, **sizes: Any) -> cometlm.CometForCausalLM:
    """A tiny backbone with a small random memory attached."""
    model = cometlm.attach(tiny_backbone(family, seed), **{**SMALL, **sizes})
    scramble(model.model.comet, 0.5)
    return model


def scramble(module: torch.nn.Module, spread: float) -> None:
    """Random weights large enough that an error in any of them shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * spread)
            else:
                parameter.copy_(torch.randn_like(parameter) * spread)


def random_ids(count: int, seed: int = 0, vocabulary: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count,), generator=generator)


def batch_of(count: int, length: int) -> Tensor:
    """[count, length] random ids, every row its own."""
    return torch.stack([random_ids(length, seed=b) for b in range(count)])


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |Δ| / max |ref| (SPEC §9)."""
    ours, theirs = ours.detach(), theirs.detach()
    scale = theirs.abs().max().clamp(min=1e-30)
    return float((ours - theirs).abs().max() / scale)


def refused(said: str) -> Any:
    """Expects a `ValueError` that says this."""
    return pytest.raises(ValueError, match=re.escape(said))


def examples(count: int) -> Any:
    """So many examples of a property, or in proportion where hypothesis' profile has not 100."""
    return settings(max_examples=count * settings().max_examples // 100)


def load_golden(path: Path) -> tuple[cometlm.CometForCausalLM, dict[str, Tensor], dict[str, Any]]:
    """The model of a golden file, its tensors and its config."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    return cometlm.CometForCausalLM.from_published(weights, config), tensors, config
