"""Checkpoints: building a model from the names of published ones (SPEC §8)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cometlm.backbones.families import FAMILIES
from cometlm.checkpoints.atomic_write import read_weights
from cometlm.checkpoints.memory import save_model
from cometlm.config import CometConfig

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM

# Published field -> the name used in the golden files' metadata.
_FIELDS = {
    "temp_beacon_stride": "compression_stride",
    "temp_mem_budget": "temporary_capacity",
    "global_beacon_ids": "readout_token_ids",
    "temp_beacon_id": "compression_token_id",
    "placeholder_id": "placeholder_token_id",
}
# What these configs carry beside the backbone's own fields.
_OURS = {"chunk_size", "family", "num_global_tokens", "generate_max_new_tokens", *_FIELDS.values()}
_THEIRS = {"architectures", "auto_map", "model_type", "transformers_version"}
_MEMORY = (
    (r"global_memory_net\.norm\.weight", "global_memory.norm.weight"),
    (r"global_memory_net\.g_proj\.weight", "global_memory.gate"),
    (r"global_memory_net\.o_proj\.(down|up)_proj\.weight", r"global_memory.adapter.\1"),
    (r"temp_memory_net\.0\.weight", "temporary_memory.norm.weight"),
    (r"temp_memory_net\.1\.(down|up)_proj\.weight", r"temporary_memory.adapter.\1"),
)


def from_published(
    kind: type[CometForCausalLM], state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> CometForCausalLM:
    """Build a model from a published checkpoint's weights and config.

    Args:
        kind: the model's class.
        state_dict: weights under the names of SPEC §8.
        config: the backbone's fields and CoMeT's, under §8's names or the golden files'.

    Returns:
        A model in the weights' dtype. R and C are rows of the published embedding; they stay in
        the vocabulary (the softmax runs over them) but are never generated.

    Raises:
        ValueError: a field is missing, or weights are missing, left over or of another shape.
    """
    fields = {_FIELDS.get(name, name): value for name, value in config.items()}
    embedding = _required(state_dict, "model.embed_tokens.weight")
    readout = list(_required(fields, "readout_token_ids"))
    stride = int(_required(fields, "compression_stride"))
    sizes: dict[str, Any] = {"chunk_size": int(_required(fields, "chunk_size"))}
    if readout:
        sizes["readout_tokens"] = len(readout)
    sizes["global_memory"] = bool(readout)
    sizes["temporary_memory"] = stride > 0
    if stride > 0:
        sizes["stride"] = stride
        sizes["capacity"] = int(_required(fields, "temporary_capacity"))
    ranks = {
        w.shape[0]
        for name, w in state_dict.items()
        if name.endswith("down_proj.weight") and "_memory_net." in name
    }
    if ranks:
        sizes["rank"] = int(ranks.pop())
    model = kind.attached(_backbone(state_dict, fields, embedding), CometConfig(**sizes))
    comet = model.model.comet
    compression = fields.get("compression_token_id")
    weights = _memory_weights(state_dict)
    if readout:
        weights["readout"] = embedding[readout]
    if stride > 0:
        weights["compression"] = embedding[[_required(fields, "compression_token_id")]]
    _load(comet, weights, "memory")
    reserved = {*readout, compression, fields.get("placeholder_token_id")} - {None}
    model.config.suppressed_tokens = sorted(reserved)
    return model


def convert_published(
    kind: type[CometForCausalLM], directory: str | Path, out: str | Path
) -> CometForCausalLM:
    """Turn a published folder (one safetensors file, or shards with an index) into a checkpoint.

    The backbone was trained too, so it is saved beside the memory.

    Raises:
        ValueError: a file is missing or is not what it should be.
        OSError: something cannot be read or written.
    """
    folder = Path(directory)
    config = _read_json(folder / "config.json")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        weights.update(read_weights(file))
    model = from_published(kind, weights, config)
    save_model(model, out, backbone=True)
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{folder} holds neither {single.name} nor {index.name}")
    names = sorted(set(_required(_read_json(index), "weight_map").values()))
    missing = [name for name in names if not (folder / name).is_file() or Path(name).name != name]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / name for name in names]


def _backbone(
    state_dict: Mapping[str, Tensor], fields: Mapping[str, Any], embedding: Tensor
) -> PreTrainedModel:
    family = str(fields.get("family") or fields.get("model_type"))
    if family not in FAMILIES:
        family = "qwen3"  # published ones have a type of their own
    own = {k: v for k, v in fields.items() if k not in _OURS and k not in _THEIRS}
    own["vocab_size"] = embedding.shape[0]
    text_config = AutoConfig.for_model(family, **own)
    backbone = AutoModelForCausalLM.from_config(text_config, dtype=embedding.dtype)
    weights = {
        name.replace(".inner_layer.", "."): value
        for name, value in state_dict.items()
        if "_memory_net." not in name
    }
    if text_config.tie_word_embeddings:
        weights["lm_head.weight"] = embedding
    _load(backbone, weights, "backbone")
    result: PreTrainedModel = backbone.eval()
    return result


def _memory_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, value in state_dict.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(\w+_memory_net\..+)", name)
        if not found:
            continue
        layer, part = found.groups()
        for pattern, ours in _MEMORY:
            if re.fullmatch(pattern, part):
                weights[f"layers.{layer}.{re.sub(pattern, ours, part)}"] = value
                break
        else:
            raise ValueError(f"unknown memory weight {name!r} in the published state dict")
    return weights


def _load(module: Any, weights: dict[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the published {what} weights do not fit the config: {error}") from error


def _required(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        theirs = next((k for k, v in _FIELDS.items() if v == name), None)
        also = f" (or {theirs!r})" if theirs else ""
        raise ValueError(f"the published checkpoint has no {name!r}{also}")
    return values[name]
