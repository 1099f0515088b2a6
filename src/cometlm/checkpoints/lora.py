"""LoRA adapters as checkpoints keep them: written as peft does, read and merged without it.

Whoever only reads a text needs no adapter apart from the weights that it adapts, and so no peft.
peft is needed where an adapter stays apart: to train it, or beside weights that are quantised.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cometlm.checkpoints.adapters import MEMORY, check_kind, has_adapter, without_memory
from cometlm.checkpoints.atomic_write import read_weights, write_whole
from cometlm.checkpoints.merge import can_change, mark_merged, merge_delta
from cometlm.extras import lacks

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what peft puts in front of a weight's name in a file
# Fields of peft's LoraConfig with which an adapter is two matrices and a scale for each weight.
# Whatever else is set, as in a peft that is newer than this list, makes it more than that.
_PLAIN = {
    "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Others (pissa, olora, corda, …) change the weight that is adapted as well.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True)
class LoraFile:
    """An adapter in a checkpoint's folder.

    Attributes:
        folder: where it lies.
        config: peft's settings of it.
        weights: by their names in the file.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> LoraFile:
        """Read an adapter.

        Raises:
            ValueError: a file of it is damaged.
            OSError: a file of it cannot be read.
        """
        path = Path(folder) / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return cls(Path(folder), config, read_weights(Path(folder) / WEIGHTS))

    def merge_into(self, model: CometForCausalLM) -> bool:
        """Add the adapter to the weights that it adapts; needs no peft.

        Returns:
            Whether that was done: not where it is more than two matrices and a scale for each
            weight, nor where weights are quantised, kept elsewhere or tied to others.

        Raises:
            ValueError: it adapts a weight that the model does not have, or one of another shape.
                The model is then as it was.
        """
        pairs = self._pairs()
        if not pairs:
            return False
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        layers = {name: self._layer(model, name) for name in pairs}
        if not all(type(one) is nn.Linear and can_change(one, uses) for one in layers.values()):
            return False
        for name, layer in layers.items():
            self._check_fits(*pairs[name], layer, name)
        for name, layer in layers.items():
            weight: Tensor = layer.weight  # type: ignore[assignment]
            down, up = (part.to(weight) for part in pairs[name])  # in its dtype, as peft has them
            adapted = {"lora_A.default.weight": down, "lora_B.default.weight": up}
            own = {f"base_layer.{key}": p for key, p in layer.named_parameters()}
            scale = self._scale(down.shape[0])
            merge_delta(layer, _product(up, down) * scale, {**own, **adapted}, {"default": scale})
        mark_merged(model)
        return True

    def put_beside(self, model: CometForCausalLM) -> None:
        """Put the adapter beside the weights that it adapts, as peft does.

        Raises:
            ValueError: peft is not installed; it does not fit the model.
        """
        if message := lacks(f"keeping the adapter in {self.folder} apart", ["peft"]):
            raise ValueError(message)
        from peft import PeftConfig, set_peft_model_state_dict

        model.add_adapter(PeftConfig.from_pretrained(str(self.folder)))
        plain = {name.removeprefix(_PREFIX): weight for name, weight in self.weights.items()}
        # Norms of the memory may have copies too, by their names: those stay as they are.
        plain |= {n: w for n, w in model.get_adapter_state_dict().items() if _is_memorys(n)}
        result = set_peft_model_state_dict(model, plain, adapter_name="default")
        if unexpected := getattr(result, "unexpected_keys", None):
            raise ValueError(f"{self.folder} does not fit this model: it adapts {unexpected[0]}")
        if lacking := sorted(model.get_adapter_state_dict().keys() - plain.keys()):
            raise ValueError(f"{self.folder} does not fit this model: it lacks {lacking[0]}")
        model.requires_grad_(False)

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """The two matrices for each adapted layer, or None where there is more to it."""
        more = any(value for name, value in self.config.items() if name not in _PLAIN)
        plain = self.config.get("init_lora_weights", True) in _PLAIN_BEGINNINGS
        kinds = (self.config.get("peft_type"), self.config.get("bias", "none"))
        if more or not plain or kinds != ("LORA", "none"):
            return None
        found: dict[str, dict[str, Tensor]] = {}
        for name, weight in self.weights.items():
            layer, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
            found.setdefault(layer, {})[part] = weight
        if any(set(parts) != {"A.weight", "B.weight"} for parts in found.values()):
            return None
        return {name: (parts["A.weight"], parts["B.weight"]) for name, parts in found.items()}

    def _layer(self, model: nn.Module, name: str) -> nn.Module:
        try:
            return model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{self.folder} does not fit this model: it adapts {name}, which is not there"
            ) from None

    def _check_fits(self, down: Tensor, up: Tensor, layer: nn.Module, name: str) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        out, into = weight.shape
        rank = down.shape[0] if down.dim() else 0
        if (down.shape, up.shape) != ((rank, into), (out, rank)):
            raise ValueError(
                f"{self.folder} does not fit this model: it adapts {name} of shape {[out, into]} "
                f"with matrices of shapes {list(down.shape)} and {list(up.shape)}"
            )

    def _scale(self, rank: int) -> float:
        root = bool(self.config.get("use_rslora"))
        return float(self.config["lora_alpha"] / (math.sqrt(rank) if root else rank))


def _product(up: Tensor, down: Tensor) -> Tensor:
    """What an adapter adds but for its scale; at least in float32."""
    wide = torch.promote_types(up.dtype, torch.float32)
    return up.to(wide) @ down.to(wide)


def save_lora(
    model: CometForCausalLM,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    with_backbone: bool = False,
) -> None:
    """Write the active adapter, as peft keeps one.

    Args:
        state_dict: the model's weights, to take instead of its own.
        with_backbone: the weights that it adapts are written too, as they are now: adapters that
            changed them when they were made (pissa, olora, …) must not do so once more.

    Raises:
        ValueError: as `check_can_save_adapter`.
    """
    adapter = check_can_save_adapter(model)
    folder.mkdir(exist_ok=True)
    weights = model.get_adapter_state_dict(adapter, state_dict)
    plain = {
        f"{_PREFIX}{name}": weight.detach().cpu().contiguous().clone()  # none shares another's
        for name, weight in weights.items()
        if not _is_memorys(name)
    }
    config = without_memory(model.peft_config[adapter])
    if with_backbone and hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    config.save_pretrained(folder)
    write_whole(folder / WEIGHTS, to_bytes(plain, {"format": "pt"}))


def check_can_save_adapter(model: CometForCausalLM) -> str:
    """The name of the adapter that a checkpoint is to hold.

    Raises:
        ValueError: several adapters are active; it is of a kind that a checkpoint cannot hold.
    """
    adapter, *more = model.active_adapters()
    if more:
        raise ValueError(f"only one adapter can be saved, active are {[adapter, *more]}")
    check_kind(model.peft_config[adapter])
    return adapter


def _is_memorys(name: str) -> bool:
    return f".{MEMORY}." in f".{name}"


def load_lora(model: CometForCausalLM, folder: Path) -> None:
    """Put the weights of a saved adapter, if there is one, into the active adapter of a model.

    Raises:
        ValueError: they do not fit it, or it has none.
    """
    file = folder / WEIGHTS
    if not has_adapter(model):
        if file.exists():
            raise ValueError(f"{folder} has LoRA weights, but this model has no adapter")
        return
    own = model.get_adapter_state_dict(check_can_save_adapter(model))  # the weights themselves
    own = {name: weight for name, weight in own.items() if not _is_memorys(name)}
    given = {name.removeprefix(_PREFIX): weight for name, weight in read_weights(file).items()}
    for name in sorted(own.keys() ^ given.keys()):
        what = "lacks" if name in own else "holds an unknown"
        raise ValueError(f"{file} does not fit this model: it {what} weight {name}")
    for name, parameter in own.items():
        if given[name].shape != parameter.shape:
            raise ValueError(
                f"{file} does not fit this model: {name} has shape {list(given[name].shape)}, "
                f"expected {list(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])
