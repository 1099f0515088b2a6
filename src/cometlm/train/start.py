"""What the tokens of a new memory are like before training."""

from __future__ import annotations

from typing import Any

import torch

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.session.plain_text import encoded
from cometlm.train.config import Start


@torch.no_grad()
def start_like(model: CometForCausalLM, tokenizer: Any, start: Start) -> None:
    """Give compression and readout tokens the embeddings of a text's tokens.

    Raises:
        ValueError: a text without tokens.
    """
    comet, embed = model.model.comet, model.model.embed_tokens
    for name, rows in (("compression", comet.compression), ("readout", comet.readout)):
        text = getattr(start, name)
        if text is None or rows is None:
            continue
        ids = encoded(tokenizer, text, special=True)["input_ids"]
        if not ids:
            raise ValueError(f"start.{name} must be a text with tokens, got {text!r}")
        like = torch.tensor([ids[i % len(ids)] for i in range(len(rows))])
        rows.copy_(embed(like.to(rows.device)))
