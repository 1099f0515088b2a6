"""Checkpoints: a model's memory and LoRA adapter, the backbone by reference.

A checkpoint is a folder: `config.json` (model_type cometlm, with the backbone's name or path),
`model.safetensors` (the module `comet`: all memory weights, R and C), `README.md` (a model card),
`lora/` if the backbone has LoRA adapters, and `backbone/` where it is saved too.

Footguns:
    - The backbone is saved only if you ask (`backbone=True`). Fine-tuned weights of it that are
      not LoRA are lost otherwise.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from cometlm.checkpoints.adapters import has_adapter
from cometlm.checkpoints.atomic_write import read_weights, write_whole
from cometlm.checkpoints.backbones import read_backbone
from cometlm.checkpoints.lora import CONFIG as LORA_CONFIG
from cometlm.checkpoints.lora import WEIGHTS as LORA_WEIGHTS
from cometlm.checkpoints.lora import LoraFile, save_lora
from cometlm.checkpoints.merge import merge_lora
from cometlm.checkpoints.source import BACKBONE, CARRIED, resolve_backbone
from cometlm.config import CometModelConfig

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM

WEIGHTS = "model.safetensors"
LORA = "lora"
_PREFIX = "model.comet."
_AUTO = ("trust_remote_code", "adapter_kwargs", "code_revision", "_from_auto", "_commit_hash")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_TAKEN = ("backbone", "config", "merge", "dtype", "device_map", "quantization_config", *_HUB)


def save_model(
    model: CometForCausalLM,
    directory: str | Path,
    *,
    backbone: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder; see the module's docstring.

    Args:
        backbone: write the backbone too, into a subfolder; the checkpoint then needs nothing else.
        state_dict: weights to take instead of the model's own (gathered ones, when sharded).

    Raises:
        ValueError: a LoRA adapter was merged into the backbone, which is not to be written.
        OSError: the folder cannot be written.
    """
    check_can_save(model, backbone)
    if not backbone:
        _warn_of_what_is_lost(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = memory_weights(model.state_dict() if state_dict is None else state_dict)
    config = CometModelConfig.from_dict(model.config.to_dict())
    if backbone:
        model.save_backbone(folder / BACKBONE, state_dict)
        config.backbone = CARRIED
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if has_adapter(model):
        save_lora(model, folder / LORA, state_dict)
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


def check_can_save(model: CometForCausalLM, backbone: bool) -> None:
    """Refuse a checkpoint that would name a backbone which is no longer that one.

    Raises:
        ValueError: a LoRA adapter was merged into the backbone, which is not to be written; a
            quantised backbone is to be.
    """
    if backbone and getattr(model._backbone, "is_quantized", False):
        raise ValueError(
            "a quantised backbone is not written with a checkpoint: save with backbone=False, "
            "which names it"
        )
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
    config: CometModelConfig | None = None,
    merge: bool = False,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: QuantizationConfigMixin | None = None,
    **options: Any,
) -> CometForCausalLM:
    """Load a checkpoint folder or hub repository and the backbone that it names.

    Args:
        kind: the model's class.
        backbone: use this model, or load this name or path, instead of the one named.
        dtype, device_map, quantization_config: of the backbone; the memory follows it, but one that
            was saved in float32 is not rounded, and none is quantised.
        merge: merge a LoRA adapter into the backbone, where that can be; see `merge_lora`.
        options: hub options (revision, token, cache_dir, local_files_only, force_download).

    Raises:
        ValueError: weights that are missing, left over or of another shape; no backbone named; an
            unknown option.
        OSError: something cannot be found or read.
    """
    for option in _AUTO:
        options.pop(option, None)
    for option in options:
        if option not in _HUB:
            raise ValueError(
                f"from_pretrained() does not take {option}; it takes {', '.join(_TAKEN)}"
            )
    name = str(name)
    config = config or CometModelConfig.from_pretrained(name, **options)
    if not isinstance(backbone, PreTrainedModel):
        where = {
            "dtype": dtype or "auto",
            "device_map": device_map,
            "quantization_config": quantization_config,
        }
        backbone = _load_backbone(name, config, backbone, where, options)
    model = kind.attached(backbone.eval(), config.comet_config)
    load_memory(model, read_weights(str(cached_file(name, WEIGHTS, **options))), name)
    model.config.suppressed_tokens = config.suppressed_tokens
    model.config.backbone = config.backbone
    if config.backbone == CARRIED and Path(name).is_dir():
        model.config.backbone = str((Path(name) / BACKBONE).resolve())  # for saving elsewhere
    with contextlib.suppress(OSError):  # older checkpoints have none; the backbone's then holds
        model.generation_config = GenerationConfig.from_pretrained(name, **options)
    model.config.name_or_path = name
    lora = cached_file(
        name, f"{LORA}/{LORA_CONFIG}", _raise_exceptions_for_missing_entries=False, **options
    )
    if lora is not None:
        cached_file(name, f"{LORA}/{LORA_WEIGHTS}", **options)  # on the hub each file comes alone
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
) -> str:
    """Put a checkpoint on the hub; a model card that is there already stays.

    Returns:
        The commit's address.
    """
    check_can_save(model, backbone)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, backbone=backbone)
        kept = ["README.md"] if api.file_exists(repo, "README.md", revision=revision) else []
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=kept,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit)


def memory_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the module `comet`, as a checkpoint holds them."""
    return {
        name: weight.detach().cpu().contiguous()
        for name, weight in state_dict.items()
        if name.startswith(_PREFIX)
    }


def load_memory(model: CometForCausalLM, weights: Mapping[str, Tensor], name: str) -> None:
    """Put saved weights into a model's memory.

    Raises:
        ValueError: they are not those of this model.
    """
    own = dict(model.model.comet.named_parameters())
    given = {key.removeprefix(_PREFIX): weight for key, weight in weights.items()}
    if not model.config.comet_config.gate:
        given = {key: weight for key, weight in given.items() if not key.endswith(".gate")}
    for key in sorted(own.keys() ^ given.keys()):
        what = "lacks" if key in own else "holds an unknown"
        raise ValueError(f"{name} does not fit this model: it {what} weight {_PREFIX}{key}")
    with torch.no_grad():
        for key, parameter in own.items():
            if given[key].shape != parameter.shape:
                raise ValueError(
                    f"{name} does not fit this model: {_PREFIX}{key} is "
                    f"{list(given[key].shape)}, expected {list(parameter.shape)}"
                )
            if given[key].dtype == torch.float32 and parameter.dtype.itemsize < 4:
                # Trained in float32: a gate applied thousands of times must not be rounded.
                parameter.data = parameter.data.float()
            parameter.copy_(given[key])


def model_card(model: CometForCausalLM, *, with_backbone: bool = False) -> str:
    """A README that says what the checkpoint is and how to use it."""
    sizes = model.config.comet_config
    backbone = model.config.backbone or "(not named)"
    added = sum(parameter.numel() for parameter in model.model.comet.parameters())
    hub_id = "/" in backbone and not backbone.startswith((".", "/"))
    head = ["---", "library_name: cometlm", "pipeline_tag: text-generation"]
    head += [f"base_model: {backbone}"] if hub_id else []
    head += ["tags:", "- cometlm", "- long-context", "- memory", "---"]
    holds = f"{added:,} memory weights" + (", a LoRA adapter" if has_adapter(model) else "")
    holds += " and its backbone" if with_backbone else ", and no backbone: that is loaded by name"
    table = "\n".join(f"| `{field}` | {value} |" for field, value in sizes.to_dict().items())
    return (
        "\n".join(head)
        + f"""

# A CoMeT memory for {backbone}

This checkpoint holds {holds}.
With it, the model reads text of any length in constant memory: {sizes.global_slots:,} slots of
global and {sizes.temporary_slots:,} of temporary memory per layer, whatever was read.

```python
import cometlm

model = cometlm.CometForCausalLM.from_pretrained("this checkpoint")
```

| size | value |
|---|---|
{table}

## Training

Say here which data, lengths and recipe the memory was trained with. A memory fresh from
`cometlm.attach` is untrained: it reads everything and recalls nothing beyond the open chunk.

Method: CoMeT, the Collaborative Memory Transformer, [arXiv 2602.01766](https://arxiv.org/abs/2602.01766).
"""
    )


def _load_backbone(
    name: str,
    config: CometModelConfig,
    given: str | Path | None,
    where: dict[str, Any],
    options: dict[str, Any],
) -> PreTrainedModel:
    wanted = str(given) if given is not None else config.backbone
    if wanted == CARRIED:
        return read_backbone(name, subfolder=BACKBONE, **where, **options)
    return resolve_backbone(name, wanted).load_backbone(**where)
