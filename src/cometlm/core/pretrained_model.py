"""What both models share with transformers, and its switches for our recomputation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cometlm.checkpoints.adapters import AdapterMixin
from cometlm.compat import CheckpointingSwitches
from cometlm.config import CometModelConfig
from cometlm.core.attention import NAME
from cometlm.core.recompute import Recomputation


class CometPreTrainedModel(CheckpointingSwitches, AdapterMixin, PreTrainedModel):
    """What both models share with transformers."""

    config_class = CometModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Cell"]  # noqa: RUF012 (transformers' own form)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the backbone comes trained and `Comet` initialises itself."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the backbone has tied what it ties, whatever its config says."""

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: attention to a memory has one implementation.

        Raises:
            ValueError: another one is wanted.
        """
        asked = attn_implementation
        for name in asked.values() if isinstance(asked, dict) else [asked]:
            if name != NAME:
                raise ValueError(
                    f"attn_implementation must be {NAME!r}, got {name!r}: memory is read by an "
                    "attention function of its own; the backbone's is what it was before attach()"
                )

    # --- activation checkpointing: transformers' switches for our recomputation -------------

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether chunks are recomputed in the backward pass."""
        model: Any = self.base_model
        return model.training_plan.recomputation is not None

    def _activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        options = dict(activation_checkpointing_kwargs or {})
        options.pop("use_reentrant", None)  # of torch's checkpoint, which is not used
        every = options.pop("every", 1)
        truncate = options.pop("truncate_after", 0)
        offload = options.pop("offload", offload)  # here from a Trainer of transformers below 5.23
        if options or every_n_layers != 1:
            unknown = ", ".join(options) or f"every_n_layers={every_n_layers}"
            raise ValueError(
                f"activation checkpointing recomputes chunks and does not take {unknown}; it takes "
                "every (chunks), truncate_after (chunks) and offload"
            )
        model: Any = self.base_model
        how = Recomputation(every, offload)
        model.training_plan = replace(
            model.training_plan, recomputation=how, truncate_after=truncate
        )

    def _activation_checkpointing_disable(self) -> None:
        model: Any = self.base_model
        model.take_over_checkpointing()  # what was switched on on the backbone is off, too
        model.training_plan = replace(model.training_plan, recomputation=None)
