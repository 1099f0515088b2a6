"""Whether a model with memory reads as its backbone does, where nothing was said of the backbone.

A backbone without a row is taken apart by what a run of it showed (`backbones.discovery`). Here the
model reads the same few tokens, as one chunk and without memory, and has to give the backbone's own
logits; then it reads them in two pieces, which shows layers that carry more from token to token
than keys and values, and a state that is known of.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cometlm.backbones.recurrent_layers import alike
from cometlm.backbones.watching import Sample

_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


def difference(model: nn.Module, sample: Sample) -> str | None:
    """Why a model does not read a sample as its backbone does; None if it does.

    Args:
        model: a `CometForCausalLM`.
    """
    ids = sample.ids[:, : model.config.comet_config.chunk_size]  # type: ignore[union-attr]
    count, training = ids.shape[1], model.training
    model.eval()
    try:
        outputs, logits = _read(model, ids)
        pairs = zip([*outputs, logits], [*sample.outputs, sample.logits], strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            if not alike(ours, theirs[:, :count]):
                where = f"layer {i}" if i < len(outputs) else "its head"
                return f"{where} does something else beside what its layers and its head do"
        apart = _in_pieces(model, ids)
    except _ERRORS as error:
        return f"its layers cannot be run one by one: {error}"
    finally:
        model.train(training)
    if not alike(apart, logits):
        return "its layers carry more from token to token than is known of them"
    return None


def _read(model: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each layer's outputs and the logits of ids, all in front of the first compression token."""
    outputs: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for cell in model.model.cells:
            note = cell.register_forward_hook(lambda _, given, out: outputs.append(out[0]))
            stack.callback(note.remove)
        count = ids.shape[1]
        logits: Tensor = model(ids, use_cache=False, chunk_size=count, stride=count).logits
    return [out[:, :count] for out in outputs], logits


@torch.no_grad()
def _in_pieces(model: Any, ids: Tensor) -> Tensor:
    sizes = dict.fromkeys(("chunk_size", "stride"), ids.shape[1])
    cache, parts = None, []
    for piece in ids.split(max(1, ids.shape[1] // 2), dim=1):
        out = model(piece, past_key_values=cache, use_cache=True, **sizes)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1)
