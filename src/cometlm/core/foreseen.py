"""How likely the tokens of a text were to come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Foreseen:
    """How likely a token was to come next.

    Attributes:
        loglikelihood: log-probability in nats.
        is_likeliest: whether greedy decoding would have written it.
    """

    loglikelihood: float
    is_likeliest: bool


def foreseen(logits: Tensor, ids: Sequence[int]) -> list[Foreseen]:
    """How likely tokens were.

    Args:
        logits: [n, V], at the positions in front of the tokens.
        ids: the n tokens.
    """
    of_ids = torch.tensor(list(ids), device=logits.device)
    likely = logits.float().log_softmax(-1).gather(1, of_ids[:, None])[:, 0]
    likeliest = logits.argmax(-1) == of_ids
    return list(map(Foreseen, likely.tolist(), likeliest.tolist()))
