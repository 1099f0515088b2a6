"""Saving and loading, as the methods that people look for on a Hugging Face model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cometlm.checkpoints.fingerprint import sample
from cometlm.checkpoints.memory import load_model, save_model, upload_model
from cometlm.checkpoints.published import from_published
from cometlm.config import CometConfig

if TYPE_CHECKING:
    from cometlm.core.causal_lm import CometForCausalLM


class CheckpointMixin:
    """Checkpoints of a model with memory: the memory and LoRA, the backbone by name."""

    _backbone: Any
    _begun: dict[str, Tensor | None]

    @classmethod
    def attached(cls, backbone: PreTrainedModel, config: CometConfig, seed: int = 0) -> Any:
        """A new memory on a backbone; the model's class says how (`core.attachment`)."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether a LoRA adapter was merged into the backbone, which is then another one."""
        return bool(getattr(self._backbone, "lora_merged", False))

    def changed_backbone_weights(self: Any) -> list[str]:
        """Names of the backbone's weights that are others than on `attach`, as far as samples say.

        A weight that has another number of elements since, as after quantising, is passed over.
        """
        changed = []
        for name, p in self.named_parameters():
            begun, now = self._begun.get(name.replace(".base_layer.", ".")), sample(p)
            if begun is None or now is None or begun.shape != now.shape:
                continue
            if p.is_floating_point() and not torch.equal(begun.to(now), now):
                changed.append(name)
        return changed

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint folder: the memory, LoRA adapters, and the backbone's name.

        Args:
            save_directory: the folder; made if it is missing.
            is_main_process: other processes write nothing.
            state_dict: weights to take instead of the model's own.
            push_to_hub: upload it then, to `repo_id` or a repository named like the folder.
            backbone: write the backbone too; by default only its name is kept.
            kwargs: options of `push_to_hub`.

        Raises:
            OSError: the folder cannot be written.
        """
        if is_main_process:
            save_model(self, Path(save_directory), backbone=backbone, state_dict=state_dict)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
            self.push_to_hub(repo_id, backbone=backbone, **kwargs)

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> str:
        """Put a checkpoint with a model card on the hub; options as `memory.upload_model`.

        Returns:
            The commit's address.
        """
        return upload_model(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> CometForCausalLM:
        """Load a checkpoint and the backbone that it names; see `memory.load_model`.

        Raises:
            ValueError: weights that do not fit, no backbone named, an unknown option.
            OSError: something cannot be found or read.
        """
        return load_model(cast("Any", cls), str(pretrained_model_name_or_path), **kwargs)

    def save_backbone(
        self: Any,
        directory: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the backbone alone, as transformers would without the memory and without adapters.

        Args:
            state_dict: this model's weights, to take instead of its own.
        """
        backbone = cast("PreTrainedModel", self._backbone)
        weights = self._under_the_backbones_names(state_dict or self.state_dict())
        name = backbone.config._attn_implementation
        backbone.config._attn_implementation = "sdpa"  # ours means nothing to others
        try:
            backbone.save_pretrained(directory, state_dict=weights)
        finally:
            backbone.config._attn_implementation = name

    def _under_the_backbones_names(self: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this model that are the backbone's too, as that calls them."""
        ours = {id(value): name for name, value in self.state_dict(keep_vars=True).items()}
        theirs = cast("PreTrainedModel", self._backbone).state_dict(keep_vars=True)
        return {
            name.replace(".base_layer.", "."): weights[ours[id(value)]]
            for name, value in theirs.items()
            if ".lora_" not in name
        }

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
