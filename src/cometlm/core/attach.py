"""Giving a backbone a memory, and taking it off again."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cometlm.config import CometConfig, known_sizes
from cometlm.core.causal_lm import CometForCausalLM


def attach(
    backbone: PreTrainedModel | nn.Module,
    config: CometConfig | None = None,
    *,
    seed: int = 0,
    **sizes: Any,
) -> CometForCausalLM:
    """Give a Hugging Face causal language model a memory. Undo with `detach`.

    4-bit weights of bitsandbytes keep their layout from now on, also after `detach`.

    Args:
        backbone: the model, or a `PeftModel` of it; its modules are shared with the result, and a
            LoRA or IA3 adapter of it is the result's own: saved and loaded with the memory.
        config: sizes and switches; default the paper's.
        seed: of the untrained memory's random numbers. They are drawn apart from torch's own, so
            that a backbone always gets the same memory and sessions outlive the process.
        sizes: `CometConfig` fields to change, e.g. `chunk_size=512`.

    Raises:
        ValueError: a family that is not supported, an impossible size, sizes that exceed the
            backbone's positions, a backbone that already has a memory, or that has an adapter of
            another kind.
    """
    comet = (config or CometConfig()).replace(**known_sizes(sizes))
    return CometForCausalLM.attached(backbone, comet, seed)


def detach(model: CometForCausalLM) -> Any:
    """Take the memory off and give back the backbone as it was before `attach`.

    Its attention function is its own again, and so is every parameter's `requires_grad`.

    Raises:
        ValueError: the model was detached before.
    """
    return model.detached()
