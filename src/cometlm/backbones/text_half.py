"""The half of a backbone that reads text: all of it, or the language model in a multimodal one.

A multimodal model is taken as its own forward reads ids without images. Its config holds that of
its language model, and the modules of that one, with the embedding and the head, are what a memory
is given to. The rest (vision towers, projectors) is neither called nor changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def text_config(backbone: PreTrainedModel) -> Any:
    """The config of what reads text: a plain language model's own."""
    return backbone.config.get_text_config(decoder=True)


def is_multimodal(backbone: PreTrainedModel) -> bool:
    """Whether it reads more than text."""
    return text_config(backbone) is not backbone.config


def language_model(backbone: PreTrainedModel) -> nn.Module:
    """What reads text, without its head: in a multimodal backbone its language model."""
    decoder: nn.Module = backbone.get_decoder() if is_multimodal(backbone) else backbone
    return decoder


def read_configs(backbone: PreTrainedModel) -> list[Any]:
    """The configs by which text is read: the model's, and its language model's."""
    configs = [backbone.config, text_config(backbone)]
    decoder = language_model(backbone)
    configs.append(getattr(decoder, "config", backbone.config))
    return list({id(config): config for config in configs}.values())


def attend_by(config: Any, name: str | None) -> None:
    """Set the attention function of one config, and of none that is inside it."""
    config._attn_implementation = {"": name}


@contextmanager
def attending_by(backbone: PreTrainedModel, name: str) -> Iterator[None]:
    """Let text be attended by the function of another name."""
    before = [(config, config._attn_implementation) for config in read_configs(backbone)]
    for config, _ in before:
        attend_by(config, name)
    try:
        yield
    finally:
        for config, own in before:
            attend_by(config, own)
