"""Checkpoints: a model's memory and LoRA adapter, the backbone by reference.

A checkpoint is a folder: `config.json` (model_type cometlm, with the backbone's name or path),
`model.safetensors` (the module `comet`: all memory weights, R and C), `README.md` (a model card),
`lora/` if the backbone has LoRA adapters, and `backbone/` where it is saved too.

Pitfalls:
    - The backbone is saved only if you ask (`backbone=True`), or if no name brings it back: its
      vocabulary was resized, or it was made of a config.
      Fine-tuned weights of it that are not an adapter's are lost otherwise.
    - An adapter's weights are in `lora/`, which loading reads, and beside the memory's, since
      transformers' Trainer reads that file and no other.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cometlm.checkpoints.adapters import has_adapter, refuse_merged
from cometlm.checkpoints.atomic_write import read_weights, write_whole
from cometlm.checkpoints.backbones import HUB, read_backbone
from cometlm.checkpoints.card import model_card
from cometlm.checkpoints.lora import CONFIG as LORA_CONFIG
from cometlm.checkpoints.lora import WEIGHTS as LORA_WEIGHTS
from cometlm.checkpoints.lora import LoraFile, check_can_save_adapter, save_lora
from cometlm.checkpoints.merge import merge_lora
from cometlm.checkpoints.source import BACKBONE, CARRIED, resolve_backbone
from cometlm.checkpoints.weights import load_memory, needs_backbone, saved_weights
from cometlm.config import CometModelConfig

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM

WEIGHTS = "model.safetensors"
LORA = "lora"
# Of how a backbone is read; the memory is a few megabytes, and is read as it is.
_OF_BACKBONE = (
    "allow_all_kernels", "attn_implementation", "disable_mmap", "experts_implementation",
    "ignore_mismatched_sizes", "kernel_config", "max_memory", "offload_buffers", "offload_folder",
    "use_kernels", "use_safetensors", "weights_only",
)  # fmt: skip
# What callers of transformers pass along, and what transformers itself ignores.
_IGNORED = (
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name",
    "code_revision", "from_flax", "from_tf", "low_cpu_mem_usage", "mirror", "offload_state_dict",
    "proxies", "resume_download", "tqdm_class", "trust_remote_code",
)  # fmt: skip
_TAKEN = (
    "backbone", "config", "merge", "dtype", "device_map", "quantization_config",
    "generation_config", "output_loading_info", *HUB, *_OF_BACKBONE,
)  # fmt: skip
# Fields of a config that are not a checkpoint's to say, but the backbone's or the model's.
_NOT_KEPT = (
    "_name_or_path", "architectures", "backbone", "backbone_config", "comet", "dtype", "model_type",
    "quantization_config", "tie_word_embeddings", "transformers_version",
)  # fmt: skip


def save_model(
    model: CometForCausalLM,
    directory: str | Path,
    *,
    backbone: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str | None = None,
    adapter_twice: bool = True,
) -> None:
    """Write a checkpoint folder; see the module's docstring.

    Args:
        backbone: write the backbone too, into a subfolder; the checkpoint then needs nothing else.
            One that no name brings back is always written.
        state_dict: weights to take instead of the model's own (gathered ones, when sharded).
        max_shard_size: of the backbone's files.
        adapter_twice: put an adapter's weights beside the memory's too, as a Trainer needs them.

    Raises:
        ValueError: as `check_can_save`; `state_dict` lacks a weight.
        OSError: the folder cannot be written.
    """
    check_can_save(model, backbone)
    state = model.state_dict() if state_dict is None else state_dict
    weights = saved_weights(model, state, adapter_twice)
    backbone = backbone or needs_backbone(model)
    if not backbone:
        _warn_of_what_is_lost(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = CometModelConfig.from_dict(model.config.to_dict())
    if backbone:
        shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_backbone(folder / BACKBONE, state_dict, **shards)
    if backbone or _is_same(config.backbone, folder / BACKBONE):
        config.backbone = CARRIED
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if has_adapter(model):
        save_lora(model, folder / LORA, state_dict, with_backbone=backbone)
    elif (folder / LORA).exists():  # of a model that stood here before
        shutil.rmtree(folder / LORA)
    card = folder / "README.md"
    if not card.exists():
        card.write_text(model_card(model, with_backbone=backbone), encoding="utf-8")
    write_whole(folder / WEIGHTS, to_bytes(weights, {"format": "pt"}))


def _warn_of_what_is_lost(model: CometForCausalLM) -> None:
    """Name weights of the backbone that were changed and are not saved."""
    changed = model.changed_backbone_weights()
    if changed:
        warnings.warn(
            f"{len(changed)} weights of the backbone were changed ({changed[0]} …) and are not in "
            "the checkpoint: save with backbone=True. A Trainer cannot; use `cometlm train` with "
            "mode: full, or CometTrainer(whole=True)",
            stacklevel=3,
        )


def check_vocabulary(name: str, config: CometModelConfig, backbone: PreTrainedModel) -> None:
    """Refuse a backbone of another vocabulary than the one that a checkpoint was saved beside.

    Raises:
        ValueError: it is another one.
    """
    here = int(backbone.config.get_text_config().vocab_size)
    if here != config.vocab_size:
        raise ValueError(
            f"{name} was saved beside a backbone with a vocabulary of {config.vocab_size}, but "
            f"{config.backbone} has {here}: give backbone=, resized as that one was"
        )


def check_can_save(model: CometForCausalLM, backbone: bool) -> None:
    """Refuse a checkpoint that could not be loaded as the model that it is of.

    Raises:
        ValueError: a LoRA adapter was merged into the backbone, which is not to be written; a
            quantised backbone is to be, or has to be since no name brings it back; several adapters
            are active, or one of a kind that a checkpoint cannot hold, or one that is merged into a
            backbone that is to be written.
    """
    if has_adapter(model):
        check_can_save_adapter(model)
    needed = needs_backbone(model)
    if (backbone or needed) and getattr(model._backbone, "is_quantized", False):
        what_to_do = "save with backbone=False, which names it"
        if needed:
            what_to_do = (
                f"no name brings this one back, whose vocabulary of {model.config.vocab_size} was "
                "resized or which was made of a config: save the backbone before it is quantised, "
                "and load it from there"
            )
        raise ValueError(f"a quantised backbone is not written with a checkpoint: {what_to_do}")
    backbone = backbone or needed
    if backbone:
        refuse_merged(model)
    if model.merged and not backbone:
        raise ValueError(
            "a LoRA adapter was merged into the backbone, which is then no longer the one that the "
            "checkpoint would name: save with backbone=True, or load with merge=False"
        )


def load_model(
    kind: type[CometForCausalLM],
    name: str | Path,
    *,
    backbone: PreTrainedModel | str | Path | None = None,
    config: CometModelConfig | str | Path | None = None,
    merge: bool = False,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: QuantizationConfigMixin | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> CometForCausalLM:
    """Load a checkpoint folder or hub repository and the backbone that it names.

    Options of transformers' `from_pretrained` that have no meaning here are ignored.

    Args:
        kind: the model's class.
        backbone: use this model, or load this name or path, instead of the one named.
        config: instead of the checkpoint's own; or a folder or hub id that has one.
        dtype, device_map, quantization_config: of the backbone; the memory follows it, but one that
            was saved in float32 is not rounded, and none is quantised.
        merge: merge a LoRA adapter into the backbone, where that can be; see `merge_lora`.
        generation_config: default the checkpoint's.
        options: hub options (revision, token, cache_dir, subfolder, local_files_only,
            force_download), options of how the backbone is read (attn_implementation, max_memory,
            offload_folder, …), and fields of the config.

    Raises:
        ValueError: weights that are missing, left over or of another shape; no backbone named, or
            one of another vocabulary; an unknown option.
        OSError: something cannot be found or read.
    """
    name = str(name)
    hub, reading, fields = _sorted_options(options)
    dtype = dtype or fields.pop("torch_dtype", None)
    config = _config_of(name, config, hub)
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}"
        )
    for field, value in fields.items():
        if hasattr(config, field) and field not in _NOT_KEPT:
            setattr(config, field, value)
        elif value is not False:  # else it is not asked for
            raise ValueError(
                f"from_pretrained() does not take {field}; it takes {', '.join(_TAKEN)}"
            )
    given = backbone
    if not isinstance(backbone, PreTrainedModel):
        where = {
            "dtype": dtype or "auto",
            "device_map": device_map,
            "quantization_config": quantization_config,
            **reading,
        }
        backbone = _load_backbone(name, config, backbone, where, hub)
        if given is None:
            check_vocabulary(name, config, backbone)
    model = kind.attached(backbone.eval(), config.comet_config)
    load_memory(model, read_weights(str(cached_file(name, WEIGHTS, **hub))), name)
    for field, value in config.to_dict().items():
        if field not in _NOT_KEPT and getattr(model.config, field, None) != value:
            setattr(model.config, field, value)
    if given is not None and not isinstance(given, PreTrainedModel):
        model.config.backbone = str(given)
    elif given is None or model.config.backbone == name:  # out of this very checkpoint
        model.config.backbone = name_to_keep(config, name, **hub)
    with contextlib.suppress(OSError):  # older checkpoints have none; the backbone's then holds
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
    if generation_config is not None:
        model.generation_config = generation_config
    model.name_or_path = model.config.name_or_path = name
    lora = cached_file(
        name, f"{LORA}/{LORA_CONFIG}", _raise_exceptions_for_missing_entries=False, **hub
    )
    if lora is not None:
        cached_file(name, f"{LORA}/{LORA_WEIGHTS}", **hub)  # on the hub each file comes alone
        adapter = LoraFile.read(Path(lora).parent)
        if not (merge and adapter.merge_into(model)):
            adapter.put_beside(model)
            if merge:
                merge_lora(model)
    return model.eval()


def upload_model(
    model: CometForCausalLM,
    repo_id: str,
    *,
    backbone: bool = False,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a CoMeT memory",
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
) -> str:
    """Put a checkpoint on the hub; a model card that is there already stays.

    A backbone that came with the memory goes with it, unless it is quantised.

    Returns:
        The commit's address.
    """
    is_quantised = getattr(model._backbone, "is_quantized", False)
    backbone = backbone or (_is_carried(model.config.backbone) and not is_quantised)
    check_can_save(model, backbone)
    if not (backbone or needs_backbone(model)) and Path(model.config.backbone).is_dir():
        warnings.warn(
            f"{repo_id} names its backbone by a folder of this machine, {model.config.backbone}: "
            "push with backbone=True, so that others can load it",
            stacklevel=3,
        )
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, backbone=backbone, max_shard_size=max_shard_size)
        kept = ["README.md"] if api.file_exists(repo, "README.md", revision=revision) else []
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=kept,
            delete_patterns=[f"{LORA}/*"],  # an older model's; files that are uploaded now stay
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit)


def name_to_keep(config: CometModelConfig, name: str, **hub: Any) -> str:
    """The backbone that a checkpoint names, by a name that also holds elsewhere on this machine.

    Args:
        config: the checkpoint's.
        name: its folder or hub id.
        hub: options of the hub.
    """
    if config.backbone != CARRIED:
        return config.backbone
    weights = Path(str(cached_file(name, WEIGHTS, **hub)))  # beside which the backbone is
    return str(weights.parent.absolute() / BACKBONE)


def _is_same(name: str, folder: Path) -> bool:
    """Whether a backbone's name is that of a folder that is there."""
    return bool(name) and folder.is_dir() and Path(name).is_dir() and Path(name).samefile(folder)


def _is_carried(backbone: str) -> bool:
    """Whether a backbone is named by a folder of this machine that came with a memory."""
    folder = Path(backbone)
    return folder.name == BACKBONE and (folder.parent / WEIGHTS).exists()


def _config_of(name: str, given: Any, hub: dict[str, Any]) -> CometModelConfig:
    """The config that a checkpoint is loaded with.

    Raises:
        ValueError: one of another kind is given.
        OSError: it cannot be read.
    """
    if given is None:
        return CometModelConfig.from_pretrained(name, **hub)
    if isinstance(given, (str, Path)):
        return CometModelConfig.from_pretrained(str(given))
    if not isinstance(given, CometModelConfig):
        raise ValueError(
            f"config must be a CometModelConfig, or where one is, got {type(given).__name__}"
        )
    return given


def _load_backbone(
    name: str,
    config: CometModelConfig,
    given: str | Path | None,
    where: dict[str, Any],
    hub: dict[str, Any],
) -> PreTrainedModel:
    wanted = str(given) if given is not None else config.backbone
    if wanted == CARRIED:
        inside = str(PurePosixPath(hub.get("subfolder", "")) / BACKBONE)
        return read_backbone(name, **where, **{**hub, "subfolder": inside})
    return resolve_backbone(name, wanted).load_backbone(**where)


def _sorted_options(
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options of the hub, of how a backbone is read, and others; not those that say nothing."""
    given = {
        name: value
        for name, value in options.items()
        if name not in _IGNORED and value is not None and value != ""
    }
    hub = {name: given.pop(name) for name in HUB if name in given}
    reading = {name: given.pop(name) for name in _OF_BACKBONE if name in given}
    return hub, reading, given
