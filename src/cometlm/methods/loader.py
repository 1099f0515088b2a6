"""What methods are opened on: a model's name, and how to load it, with its memory or without."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from cometlm.checkpoints.backbones import Bits, quantization_of
from cometlm.checkpoints.fingerprint import fingerprint
from cometlm.checkpoints.source import Source
from cometlm.config import position_limit
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.device import default_dtype, find_device
from cometlm.model_loader import load


class Loader:
    """Loads one model, with its memory or without; the last one loaded is kept.

    Args:
        name: a built-in name, a directory or a hub id, see `cometlm.load`; or a source.
        device: default: the accelerator, else the CPU.
        dtype: default: what the device is fast at.
        quantization: of the backbone, "4bit" or "8bit".
        sizes: of the memory, see `cometlm.load`.

    Attributes:
        weights: fingerprint of the model that was loaded last, "" before that.
    """

    def __init__(
        self,
        name: str | Source,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantization: Bits | None = None,
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = Source.resolve(name)
        self.device = find_device(device)
        self.dtype = dtype or default_dtype(self.device)
        self.quantization = quantization
        self.sizes = dict(sizes or {})
        self.weights = ""
        self._kept: PreTrainedModel | None = None
        self._kept_sizes: dict[str, Any] = {}

    def with_memory(self, **sizes: Any) -> CometForCausalLM:
        """The model with its memory, a new one if it has none.

        Args:
            sizes: of the memory, in place of those that the loader was given.

        Raises:
            ValueError, OSError: as `cometlm.load`.
        """
        sizes = {**self.sizes, **sizes}
        if not isinstance(self._kept, CometForCausalLM) or self._kept_sizes != sizes:
            self._kept = None  # two models need not fit into memory
            where: Any = {"device": self.device, "dtype": self.dtype}
            where["quantization"] = self.quantization
            model, _ = load(self.source, **where, **sizes)
            self._keep(model)
            self._kept_sizes = sizes
        assert isinstance(self._kept, CometForCausalLM)
        return self._kept

    @property
    def model(self) -> PreTrainedModel:
        """The model that was loaded last.

        Raises:
            ValueError: none was.
        """
        if self._kept is None:
            raise ValueError("no model was loaded yet")
        return self._kept

    def backbone(self) -> PreTrainedModel:
        """The backbone, as it was before any training with a memory.

        Raises:
            ValueError, OSError: as `Source.load_backbone`.
        """
        if self._kept is None or isinstance(self._kept, CometForCausalLM):
            self._kept = None
            bits = quantization_of(self.quantization, self.dtype)
            place = None if bits is None else {"": self.device}
            model = self.source.load_backbone(
                dtype=self.dtype, device_map=place, quantization_config=bits
            ).eval()
            if bits is None:
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
        return self.source.load_tokenizer()

    def _keep(self, model: PreTrainedModel) -> None:
        self._kept = model
        self.weights = fingerprint(model.state_dict().items())


def max_positions(model: PreTrainedModel) -> int | None:
    """Most tokens that a backbone has positions for; None where nothing says."""
    return position_limit(model.config.get_text_config())
