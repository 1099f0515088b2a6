"""Saving and loading, as the methods that people look for on a Hugging Face model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cometlm.backbones.text_half import attending_by
from cometlm.checkpoints.adapters import plain_names, refuse_merged
from cometlm.checkpoints.fingerprint import sample
from cometlm.checkpoints.memory import load_model, save_model, upload_model
from cometlm.checkpoints.published import from_published
from cometlm.checkpoints.weights import MEMORY_NAME
from cometlm.config import CometConfig

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM


class CheckpointMixin:
    """Checkpoints of a model with memory: the memory and LoRA, the backbone by name."""

    _backbone: Any
    _places: dict[str, str]
    _begun: dict[str, Tensor | None]

    @classmethod
    def attached(cls, backbone: PreTrainedModel, config: CometConfig, seed: int = 0) -> Any:
        """A new memory on a backbone; the model's class says how (`core.attachment`)."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether a LoRA adapter was merged into the backbone, which is then another one."""
        return bool(getattr(self._backbone, "lora_merged", False))

    @property
    def is_only_copy(self) -> bool:
        """Whether no name brings the backbone back: it was resized, or made of a config."""
        return bool(getattr(self._backbone, "only_copy", False))

    def mark_only_copy(self) -> None:
        """Say that no name brings the backbone back, so that checkpoints hold it."""
        self._backbone.only_copy = True  # where detach() and attach() keep it

    def changed_backbone_weights(self: Any) -> list[str]:
        """Names of the backbone's weights that are others than on `attach`, as far as samples say.

        A weight that has another number of elements since, as after quantising, is passed over.
        """
        changed = []
        for name, p in self._backbone_weights().items():
            begun, now = self._begun.get(name), sample(p)
            if begun is None or now is None or begun.shape != now.shape:
                continue
            if p.is_floating_point() and not torch.equal(begun.to(now), now):
                changed.append(name)
        return changed

    def _backbone_weights(self: Any) -> dict[str, Tensor]:
        """The backbone's weights, without adapters, by their names in a model without any."""
        weights = dict(self.named_parameters())
        plain = plain_names(self, weights)
        return {
            plain[name]: weight
            for name, weight in weights.items()
            if name in plain and not name.startswith(f"{MEMORY_NAME}.")
        }

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        backbone: bool = False,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint folder: the memory, an adapter, and the backbone's name.

        Args:
            save_directory: the folder; made if it is missing.
            is_main_process: other processes write nothing.
            state_dict: weights to take instead of the model's own.
            push_to_hub: upload it then, to `repo_id` or a repository named like the folder.
            backbone: write the backbone too; by default only its name is kept, unless its
                vocabulary was resized or it was made of a config.
            max_shard_size: of the backbone's files.
            kwargs: options of `push_to_hub`.

        Raises:
            ValueError: an unknown option; an adapter that no checkpoint can hold.
            OSError: the folder cannot be written.
        """
        pushing = _options_of_pushing(kwargs, push_to_hub)
        if is_main_process:
            save_model(
                self,
                Path(save_directory),
                backbone=backbone,
                state_dict=state_dict,
                max_shard_size=max_shard_size,
            )
        if push_to_hub:
            repo_id = pushing.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repo_id, backbone=backbone, max_shard_size=max_shard_size, **pushing)

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> str:
        """Put a checkpoint with a model card on the hub; options as `memory.upload_model`.

        Returns:
            The commit's address.
        """
        return upload_model(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint and the backbone that it names; see `memory.load_model`.

        Args:
            output_loading_info: return the model and what transformers says of weights that do not
                fit, which is nothing: such weights are an error.

        Raises:
            ValueError: weights that do not fit, no backbone named, an unknown option.
            OSError: something cannot be found or read.
        """
        model = load_model(cast("Any", cls), str(pretrained_model_name_or_path), **kwargs)
        if not output_loading_info:
            return model
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return model, {name: set() for name in names}

    def save_backbone(
        self: Any,
        directory: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Save the backbone alone, as transformers would without the memory and without adapters.

        Args:
            state_dict: this model's weights, to take instead of its own.
            options: of transformers' `save_pretrained`.

        Raises:
            ValueError: a weight is not among those given; an adapter is merged into the weights and
                stands beside them as well.
        """
        refuse_merged(self)
        backbone = cast("PreTrainedModel", self._backbone)
        weights = self._under_the_backbones_names(
            self.state_dict() if state_dict is None else state_dict
        )
        with attending_by(backbone, "sdpa"):  # ours means nothing to others
            backbone.save_pretrained(directory, state_dict=weights, **options)

    def _under_the_backbones_names(self: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this model that are the backbone's too, as that calls them.

        Raises:
            ValueError: one is not among them.
        """
        found = {
            f"{theirs}.{name.removeprefix(f'{ours}.')}": weights[wrapped]
            for wrapped, name in plain_names(self, weights).items()
            for ours, theirs in self._places.items()
            if name.startswith(f"{ours}.")
        }
        own = self._backbone.state_dict()
        parts = tuple(f"{theirs}." for theirs in self._places.values())
        for wrapped, name in sorted(plain_names(self._backbone, own).items()):
            if not name.startswith(parts):  # of a multimodal one, and no part of this model
                found[name] = own[wrapped]
            elif name not in found:
                raise ValueError(f"the backbone cannot be saved: its weight {name} is not given")
        return found

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> CometForCausalLM:
        """Build a model from a published checkpoint's weights and config (SPEC §8).

        Args:
            state_dict: weights under the names of SPEC §8.
            config: the backbone's fields and CoMeT's, under §8's names or the golden files'.

        Returns:
            A model in the weights' dtype.

        Raises:
            ValueError: a field is missing, or weights are missing, left over or of another shape.
        """
        return from_published(cast("Any", cls), state_dict, config)


_PUSHING = ("repo_id", "private", "token", "revision", "commit_message", "create_pr")
# What callers of transformers pass along and has no meaning here: files are safetensors, written
# whole, and adapters are kept as peft keeps them.
_IGNORED = (
    "distributed_checkpoint", "save_function", "save_original_format", "save_peft_format",
    "variant",
)  # fmt: skip


def _options_of_pushing(options: Mapping[str, Any], pushes: bool) -> dict[str, Any]:
    """The options of `save_pretrained` that are those of `push_to_hub`.

    Raises:
        ValueError: another one that says something.
    """
    if options.get("safe_serialization") is False:
        raise ValueError("safe_serialization must be True, got False: weights are safetensors")
    for name, value in options.items():
        known = name in (*_PUSHING, *_IGNORED, "safe_serialization")
        if not known or (name == "variant" and value):
            raise ValueError(
                f"save_pretrained() does not take {name}; it takes state_dict, backbone, "
                f"max_shard_size, push_to_hub and {', '.join(_PUSHING)}"
            )
    return {name: value for name, value in options.items() if pushes and name in _PUSHING}
