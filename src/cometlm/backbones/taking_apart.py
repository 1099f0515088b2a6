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
from cometlm.backbones.watching import refusal


def take_apart(backbone: PreTrainedModel, capture: bool = False) -> Parts:
    """Find the parts of a Hugging Face causal language model.

    Args:
        capture: do as if its family had no row.

    Raises:
        ValueError: it has no head, or cannot be given a memory.
    """
    config: Any = backbone.config
    text = config.get_text_config(decoder=True)
    if text is not config and text.model_type != config.model_type:
        raise refusal(
            backbone,
            f"it is multimodal, and only text can be read; load its language model "
            f"({text.model_type}) by itself",
        )
    family = family_of(config)
    head = backbone.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(backbone).__name__} has no language-model head; load it with "
            "AutoModelForCausalLM"
        )
    if family is None or capture:
        keep_weights_in_place(backbone)  # it is about to be read without gradients
        return discover(backbone)
    decoder: Any = backbone.get_decoder()
    layers = list(decoder.layers)[: config.num_hidden_layers]
    return Parts(
        family=family,
        config=config,
        embed_tokens=decoder.embed_tokens,
        layers=layers,
        calls=[LayerCall() for _ in layers],
        rotations=[_rotation(decoder.rotary_emb, family, config, i) for i in range(len(layers))],
        norm=decoder.norm,
        lm_head=head,
    )


def _rotation(rotary: nn.Module, family: Family, config: Any, layer: int) -> Rotation:
    named = (layer_type(config, layer),) if family.rotary_by_layer_type else ()
    return Rotation(rotary, (Given.LIKE, Given.POSITIONS, *named))
