"""Memories that have read for long, for training batches to begin with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM

CHUNKS_BETWEEN = 4  # two memories of one text


class Histories:
    """What batches begin with: a memory somewhere in a long text, drawn by the batch's number."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._memories: list[CometCache] = []

    def read(self, model: CometForCausalLM, texts: Sequence[Tensor]) -> None:
        """Take the memories of these texts [B, N] instead of those held; none if there are none."""
        training = model.training
        model.eval()  # nothing dropped out
        try:
            self._memories = [memory for ids in texts for memory in read_on(model, ids)]
        finally:
            model.train(training)

    def __bool__(self) -> bool:
        return bool(self._memories)

    def of(self, batch: int, rows: int) -> CometCache | None:
        """The memory that a batch begins with, for as many rows; None for new memories."""
        if not self._memories:
            return None
        chance = random.Random(f"{self._seed}/history/{batch}")
        memory = chance.choice(self._memories)
        return memory.select([row % len(memory.rows) for row in range(rows)])


@torch.no_grad()
def read_on(model: CometForCausalLM, ids: Tensor) -> Iterator[CometCache]:
    """The memory of texts [B, N] on the way, every few chunks; no chunk is open there."""
    step = CHUNKS_BETWEEN * model.config.comet_config.chunk_size
    cache = None
    for begin in range(0, ids.shape[1] - step + 1, step):
        piece = ids[:, begin : begin + step].to(model.device)
        out = model.model(piece, past_key_values=cache, use_cache=True, more_text=True)
        assert out.past_key_values is not None
        cache = out.past_key_values
        yield cache
