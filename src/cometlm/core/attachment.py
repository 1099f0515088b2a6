"""How a model holds on to its backbone, and gives it back as it was.

The backbone's modules are shared with the model, never copied, so its weights, hooks and adapters
stay its own. All that changes on it is the name of its attention function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from transformers import PreTrainedModel

from cometlm.backbones.families import keep_weights_in_place, take_apart
from cometlm.config import CometConfig, CometModelConfig
from cometlm.core import attention
from cometlm.core.model import position_limit


class AttachmentMixin:
    """A model that is made of a backbone, and gives it back."""

    _backbone: PreTrainedModel
    _undo: Undo | None

    @classmethod
    def attached(cls, backbone: PreTrainedModel, config: CometConfig, seed: int = 0) -> Self:
        """A model of a backbone and a new, untrained memory; see `attach`.

        Raises:
            ValueError: as `attach`.
        """
        if getattr(backbone.config, "_attn_implementation", None) == attention.NAME:
            raise ValueError(f"{type(backbone).__name__} already has a memory; detach() it first")
        take_apart(backbone)
        config.check_positions(position_limit(backbone.config))
        keep_weights_in_place(backbone)
        undo = Undo.of(backbone)
        model_config = CometModelConfig(
            text_config=backbone.config,
            backbone=str(backbone.config.name_or_path or ""),
            comet=config.to_dict(),
        )
        kind: Any = cls
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)  # modules initialise themselves on the CPU
            model = kind(model_config, backbone)
        undo.restore_implementations()  # a config resets those of the configs inside it
        backbone.config._attn_implementation = attention.NAME
        object.__setattr__(model, "_undo", undo)
        if hasattr(backbone, "hf_device_map"):
            model.hf_device_map = backbone.hf_device_map
        return cast("Self", model.train(backbone.training))

    def detached(self) -> PreTrainedModel:
        """The backbone as it was before; this model is of no use any more.

        Raises:
            ValueError: it was given back before.
        """
        if self._undo is None:
            raise ValueError("this model is not attached to a backbone; it was detached before")
        self._undo()
        object.__setattr__(self, "_undo", None)
        return self._backbone


@dataclass(frozen=True)
class Undo:
    """What is changed on a backbone, as it was before."""

    backbone: PreTrainedModel
    attention: str | None
    experts: str | None
    requires_grad: dict[str, bool]

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Undo:
        """Note how a backbone is."""
        config = backbone.config
        flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
        return cls(backbone, config._attn_implementation, config._experts_implementation, flags)

    def restore_implementations(self) -> None:
        """Set back which functions the backbone calls."""
        self.backbone.config._attn_implementation = self.attention
        self.backbone.config._experts_implementation = self.experts

    def __call__(self) -> None:
        """Set back everything."""
        self.restore_implementations()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
