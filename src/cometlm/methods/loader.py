"""What methods are opened on: a model's name, and how to load it, with its memory or without."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from cometlm.checkpoints.backbones import load_backbone, source_of
from cometlm.checkpoints.fingerprint import fingerprint
from cometlm.checkpoints.memory import BACKBONE
from cometlm.config import CometModelConfig
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import default_dtype, find_device
from cometlm.model_loader import load


class Loader:
    """Loads one model, with its memory or without; the last one loaded is kept.

    Args:
        name: a built-in name, a directory or a hub id, see `cometlm.load`.
        device: default: the accelerator, else the CPU.
        dtype: default: what the device is fast at.
        sizes: of the memory, see `cometlm.load`.

    Attributes:
        weights: fingerprint of the model that was loaded last, "" before that.
    """

    def __init__(
        self,
        name: str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.device = find_device(device)
        self.dtype = dtype or default_dtype(self.device)
        self.sizes = dict(sizes or {})
        self.weights = ""
        self._kept: PreTrainedModel | None = None

    def with_memory(self) -> CometForCausalLM:
        """The model with its memory, a new one if it has none.

        Raises:
            ValueError, OSError: as `cometlm.load`.
        """
        if not isinstance(self._kept, CometForCausalLM):
            self._kept = None  # two models need not fit into memory
            model, _ = load(self.name, device=self.device, dtype=self.dtype, **self.sizes)
            self._keep(model)
        assert isinstance(self._kept, CometForCausalLM)
        return self._kept

    def backbone(self) -> PreTrainedModel:
        """The backbone, as it was before any training with a memory.

        Raises:
            ValueError, OSError: as `load_backbone`.
        """
        if self._kept is None or isinstance(self._kept, CometForCausalLM):
            self._kept = None
            model = load_backbone(self._backbone_name, dtype=self.dtype).eval()
            torch.nn.Module.to(model, self.device)
            self._keep(model)
        assert self._kept is not None
        return self._kept

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or its backbone's.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        try:
            return AutoTokenizer.from_pretrained(source_of(self.name))
        except (OSError, ValueError):
            if self._backbone_name == self.name:
                raise
            return AutoTokenizer.from_pretrained(source_of(self._backbone_name))

    @cached_property
    def _backbone_name(self) -> str:
        config = AutoConfig.from_pretrained(source_of(self.name))
        if not isinstance(config, CometModelConfig):
            return self.name
        if config.backbone == f"./{BACKBONE}":
            return str(Path(self.name) / BACKBONE)
        return config.backbone

    def _keep(self, model: PreTrainedModel) -> None:
        self._kept = model
        self.weights = fingerprint(model.state_dict().items())


def max_positions(model: PreTrainedModel) -> int | None:
    """Most tokens that a backbone has positions for; None where nothing says."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found
