"""Giving a backbone a memory, and taking it off again."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cometlm.backbones.text_half import is_multimodal, language_model, read_configs, text_config
from cometlm.checkpoints.adapters import base_of
from cometlm.config import CometConfig, known_sizes, sizes_for
from cometlm.core.attention import NAME
from cometlm.core.causal_lm import CometForCausalLM


def attach(
    backbone: PreTrainedModel | nn.Module,
    config: CometConfig | None = None,
    *,
    seed: int = 0,
    **sizes: Any,
) -> CometForCausalLM:
    """Give a Hugging Face causal language model a memory. Undo with `detach`.

    Of a model that reads images or sound as well, the language model gets it, and reads text alone
    until `detach` gives the whole model back; a warning names it.

    The layers of a family without a row of its own are looked at while the backbone reads a few
    tokens. 4-bit weights of bitsandbytes keep their layout from now on, also after `detach`.

    Args:
        backbone: the model, or a `PeftModel` of it; its modules are shared with the result, and a
            LoRA or IA3 adapter of it is the result's own: saved and loaded with the memory. While
            it has a memory it attends by a function of its own, whichever was set before.
        config: sizes and switches; default the paper's. Where neither these nor sizes are given
            and the backbone has too few positions, the paper's halves, quarters, … with a warning.
        seed: of the untrained memory's random numbers. They are drawn apart from torch's own, so
            that a backbone always gets the same memory and sessions outlive the process.
        sizes: `CometConfig` fields to change, e.g. `chunk_size=512`.

    Raises:
        TypeError: something that is no model.
        ValueError: a backbone that can have no memory (says which layer and why), an impossible
            size, sizes that exceed the backbone's positions, a backbone that already has a memory,
            or that has an adapter of another kind.
    """
    bare = base_of(_model(backbone))
    if not isinstance(bare, PreTrainedModel):
        raise TypeError(_WANTED.format(f"a {type(bare).__name__}, which is none of transformers'"))
    if config is None:
        comet = sizes_for(text_config(bare), sizes)
    else:
        comet = config.replace(**known_sizes(sizes))
    attends = _chosen_attention(bare)
    model = CometForCausalLM.attached(backbone, comet, seed)
    if is_multimodal(bare):
        warnings.warn(
            f"{type(bare).__name__} reads more than text: its language model "
            f"({type(language_model(bare)).__name__}) gets the memory, and reads text alone",
            stacklevel=2,
        )
    if attends is not None:
        warnings.warn(
            f"with a memory the backbone attends by {NAME!r}, not by {attends!r}; detach() sets "
            "that again",
            stacklevel=2,
        )
    return model


def detach(model: CometForCausalLM) -> Any:
    """Take the memory off and give back the backbone as it was before `attach`.

    Its attention function is its own again, and so is every parameter's `requires_grad`.

    Raises:
        TypeError: a model without a memory; says what is wanted.
        ValueError: the model was detached before.
    """
    detached = getattr(model, "detached", None)  # a PeftModel round one has it, too
    if detached is None:
        raise TypeError(
            f"detach() takes the model that attach() returned, got a {type(model).__name__}"
        )
    return detached()


_WANTED = (
    "attach() takes a causal language model of transformers, as AutoModelForCausalLM."
    "from_pretrained returns it, got {}"
)


def _chosen_attention(backbone: PreTrainedModel) -> str | None:
    """The attention function that a user set: one that transformers would not take by itself."""
    usual = {None, NAME, "sdpa"}
    if not getattr(backbone, "_supports_sdpa", False):
        usual.add("eager")
    names = (config._attn_implementation for config in read_configs(backbone))
    return next((name for name in names if name not in usual), None)


def _model(given: Any) -> nn.Module:
    """What is given, if it is a model.

    Raises:
        TypeError: says what is wanted.
    """
    if isinstance(given, (str, os.PathLike)):
        shown = f"the name {os.fspath(given)!r}: cometlm.load({os.fspath(given)!r}) takes one"
        raise TypeError(_WANTED.format(shown))
    if not isinstance(given, nn.Module):
        kind = given.__name__ if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(_WANTED.format(kind))
    return given
