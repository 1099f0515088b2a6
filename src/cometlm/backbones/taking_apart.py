"""Finding the parts of a Hugging Face causal language model: by its family's row, or by looking."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cometlm.backbones.calling import LayerCall
from cometlm.backbones.discovery import discover
from cometlm.backbones.families import Family, family_of, keep_weights_in_place, layer_type
from cometlm.backbones.parts import Parts
from cometlm.backbones.rotary import Given, Rotation
from cometlm.backbones.text_half import is_multimodal, text_config
from cometlm.backbones.watching import refusal, watch


def take_apart(backbone: PreTrainedModel, capture: bool = False) -> Parts:
    """Find the parts of a Hugging Face causal language model.

    Args:
        capture: do as if its family had no row.

    Raises:
        ValueError: it has no head, or cannot be given a memory.
    """
    config: Any = text_config(backbone)
    family = family_of(config)
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise refusal(backbone, "it is an encoder-decoder: memory needs a decoder")
    head = backbone.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(backbone).__name__} has no language-model head; load it with "
            "AutoModelForCausalLM"
        )
    if family is None or capture or not _is_of_transformers(backbone):
        keep_weights_in_place(backbone)  # it is about to be read without gradients
        return discover(backbone)
    decoder: Any = backbone.get_decoder()
    layers = list(decoder.layers)[: config.num_hidden_layers]
    sample = None
    # A row knows nothing of what stands round a language model, or what a subclass does.
    if is_multimodal(backbone) or not _is_transformers_own(type(backbone)):
        keep_weights_in_place(backbone)
        sample, _ = watch(backbone, layers)
    return Parts(
        family=family,
        config=config,
        embed_tokens=decoder.embed_tokens,
        layers=layers,
        calls=[LayerCall() for _ in layers],
        rotations=[_rotation(decoder.rotary_emb, family, config, i) for i in range(len(layers))],
        norm=decoder.norm,
        lm_head=head,
        sample=sample,
    )


def _is_of_transformers(backbone: PreTrainedModel) -> bool:
    """Whether it is a causal language model of transformers, or of a class derived from one."""
    return any(map(_is_transformers_own, type(backbone).__mro__))


def _is_transformers_own(model_type: type) -> bool:
    """Whether a class is in transformers' code of a model."""
    return model_type.__module__.startswith("transformers.models.")


def _rotation(rotary: nn.Module, family: Family, config: Any, layer: int) -> Rotation:
    named = (layer_type(config, layer),) if family.rotary_by_layer_type else ()
    return Rotation(rotary, (Given.LIKE, Given.POSITIONS, *named))
