"""What a backbone does with its head's products: scales and caps that its config names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def final_logits(products: Tensor, config: Any) -> Tensor:
    """Logits [B, n, V] of the head's products, as the backbone's own forward has them.

    Args:
        products: what the head gives.
        config: the backbone's: `logits_scaling` divides (Granite, MiniCPM), `logit_scale` (Cohere)
            and `lm_head_multiplier` (Falcon-H1) multiply, `final_logit_softcapping` caps (Gemma 2).
    """
    logits = products
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and divisor != 1:
        logits = logits / divisor
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None and factor != 1:
            logits = logits * factor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
