"""How a model holds on to its backbone, and gives it back as it was.

The backbone's modules are shared with the model, never copied, so its weights, hooks and adapters
stay its own. What changes on it is the name of its attention function, and that its layers do not
checkpoint themselves: chunks are recomputed instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from cometlm.backbones.families import keep_weights_in_place
from cometlm.backbones.text_half import attend_by, read_configs, text_config
from cometlm.backbones.watching import Sample, UnsupportedBackboneError
from cometlm.checkpoints.adapters import base_of, refuse_offsets, take_adapters, within
from cometlm.config import CometConfig, CometModelConfig
from cometlm.core import attention
from cometlm.core.backbone_check import difference
from cometlm.core.model import checkpointing

_HELD = "_has_cometlm_memory"  # an attribute of backbones that are attached


class AttachmentMixin:
    """A model that is made of a backbone, and gives it back."""

    _backbone: PreTrainedModel
    _given: nn.Module  # what was attached: the backbone, or a PeftModel round it
    _places: dict[str, str]  # where the backbone's parts stand: names in the model, and in it
    _undo: Undo | None

    @classmethod
    def attached(cls, backbone: nn.Module, config: CometConfig, seed: int = 0) -> Self:
        """A model of a backbone and a new, untrained memory; see `attach`.

        Raises:
            ValueError: as `attach`.
        """
        bare = base_of(backbone)
        if isinstance(bare, AttachmentMixin) or getattr(bare, _HELD, False):
            raise ValueError(f"{type(bare).__name__} already has a memory; detach() it first")
        if bare.config._attn_implementation == attention.NAME:
            raise ValueError(
                f"this {type(bare).__name__} was made of the config object of a model that has a "
                "memory: make each of a config of its own"
            )
        kind: Any = cls
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)  # modules initialise themselves on the CPU
            name = str(bare.config.name_or_path or "")
            model = kind(CometModelConfig.around(text_config(bare), config, name), bare)
        object.__setattr__(model, "_given", backbone)
        if not name:  # made of a config: no name brings these weights back
            model.mark_only_copy()
        return cast("Self", model)

    def _hold(self, undo: Undo) -> None:
        """Keep the backbone that this model's parts are of.

        Args:
            undo: as the backbone was before the model was made.
        """
        model: Any = self
        backbone = undo.backbone
        keep_weights_in_place(backbone)
        undo.restore_implementations()  # a config resets those of the configs inside it
        for config in read_configs(backbone):
            attend_by(config, attention.NAME)
        theirs = {id(module): name for name, module in backbone.named_modules()}
        parts = ["lm_head", *(f"model.cells.{i}.layer" for i in range(len(model.model.cells)))]
        own = {"cells", "comet"}
        parts += [f"model.{name}" for name, _ in model.model.named_children() if name not in own]
        places = {name: theirs[id(model.get_submodule(name))] for name in parts}
        # Not registered as a submodule: its parts are, and detach() gives it back whole.
        for name, value in (("backbone", backbone), ("given", backbone), ("undo", undo)):
            object.__setattr__(self, f"_{name}", value)
        setattr(backbone, _HELD, True)
        self._places = places
        take_adapters(model, backbone)
        model.model.take_over_checkpointing()
        if hasattr(backbone, "hf_device_map"):
            model.hf_device_map = backbone.hf_device_map
        model.train(backbone.training)

    def _check_against(self, sample: Sample) -> None:
        """Refuse a backbone that does more than was found out about it.

        Raises:
            UnsupportedBackboneError: it does; it is as it was before.
        """
        model: Any = self
        why = difference(model, sample)
        if why is not None:
            kind = self._backbone.config.model_type
            self.detached()
            raise UnsupportedBackboneError(f"{kind} cannot be given a memory: {why}")

    def _hand_back(self) -> None:
        """Put into the backbone what stands in its parts' places here: resized, or adapted."""
        model: Any = self
        for ours, theirs in self._places.items():
            part = model.get_submodule(ours)
            if self._backbone.get_submodule(theirs) is not part:
                self._backbone.set_submodule(theirs, part)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **options: Any
    ) -> nn.Module:
        """Give the embedding and the head other numbers of rows, as transformers does.

        A checkpoint then holds the backbone too, which is another one than the one it names.

        Raises:
            ValueError: the backbone is quantised, so that it could not be saved.
        """
        if getattr(self._backbone, "is_quantized", False):
            raise ValueError(
                "the vocabulary of a quantised backbone cannot be resized, since no checkpoint "
                "could hold it: resize the backbone before it is quantised"
            )
        model: Any = self
        self._hand_back()
        before = model.config.vocab_size
        self._backbone.resize_token_embeddings(new_num_tokens, *args, **options)
        model.model.embed_tokens = self._backbone.get_input_embeddings()
        model.lm_head = self._backbone.get_output_embeddings()
        self._vocabulary = model.vocab_size = model.config.vocab_size
        if self._vocabulary != before:
            model.mark_only_copy()
        return cast("nn.Module", model.model.embed_tokens)

    def _check_attached(self) -> None:
        """Refuse a model without a backbone, one that was resized by itself, or adapted by offsets.

        Raises:
            ValueError: it is so.
        """
        model: Any = self
        if self._undo is None:
            raise ValueError("this model was detached from its backbone; attach() again to use it")
        for config in self.__dict__.get("peft_config", {}).values():
            refuse_offsets(config)  # of a PeftModel round this one
        if model.config.vocab_size != self._vocabulary:
            raise ValueError(
                f"the backbone's vocabulary was resized from {self._vocabulary} to "
                f"{model.config.vocab_size} while it is attached: resize the model with memory "
                "(model.resize_token_embeddings), or detach() first"
            )

    def detached(self) -> nn.Module:
        """The backbone as it was before; this model is of no use any more.

        Adapters that the model was given stay beside the weights that they adapt.

        Raises:
            ValueError: it was given back before.
        """
        if self._undo is None:
            raise ValueError("this model is not attached to a backbone; it was detached before")
        model: Any = self
        model.unpack_weights()
        if model.changed_backbone_weights():
            model.mark_only_copy()  # whoever gives it a memory again must not name it instead
        self._hand_back()
        known = getattr(self._backbone, "peft_config", None) or {}
        if getattr(model, "peft_config", None) and set(model.peft_config) - set(known):
            take_adapters(self._backbone, model)
        self._undo()
        delattr(self._backbone, _HELD)
        object.__setattr__(self, "_undo", None)
        return self._given


@dataclass(frozen=True)
class Undo:
    """What is changed on a backbone, as it was before."""

    backbone: PreTrainedModel
    implementations: tuple[tuple[Any, str | None, str | None], ...]  # of attention and experts
    requires_grad: dict[str, bool]
    checkpointing: tuple[nn.Module, ...]

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Undo:
        """Note how a backbone is."""
        flags = {name: p.requires_grad for name, p in backbone.named_parameters()}
        implementations = tuple(
            (config, config._attn_implementation, config._experts_implementation)
            for config in read_configs(backbone)
        )
        return cls(backbone, implementations, flags, tuple(checkpointing(backbone)))

    def restore_implementations(self) -> None:
        """Set back which functions the backbone calls."""
        for config, attention_name, experts in self.implementations:
            attend_by(config, attention_name)
            config._experts_implementation = {"": experts}

    def __call__(self) -> None:
        """Set back everything."""
        self.restore_implementations()
        for name, parameter in self.backbone.named_parameters():
            before = self.requires_grad.get(within(name), self.requires_grad.get(name))
            parameter.requires_grad_(parameter.requires_grad if before is None else before)
        for layer in self.checkpointing:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
