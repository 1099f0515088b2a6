"""Bytes that a model's memory and open chunk take, found by reading a token."""

from __future__ import annotations

from typing import Any

import torch

from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM


def bytes_of_memory(model: CometForCausalLM) -> tuple[int, int]:
    """Bytes of global memory, with layers' own states, and of one slot of temporary memory."""
    cache = _cache_of_a_token(model, chunk_lengths=[[1]], close_last=True)
    entry = sum(block.nbytes for layer in cache.layers for block in layer.memory.entries)
    return cache.nbytes - entry, entry


def bytes_of_item(model: CometForCausalLM) -> int:
    """Bytes of the keys and values of an open chunk's text or compression token."""
    cache = _cache_of_a_token(model)
    chunks = [layer.open.chunk for layer in cache.layers if layer.open is not None]
    return sum(chunk.nbytes // chunk.key.shape[2] for chunk in chunks if chunk.nbytes)


@torch.no_grad()
def _cache_of_a_token(model: CometForCausalLM, **options: Any) -> CometCache:
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache: CometCache = model.model(
        ids, use_cache=True, hidden_to_keep=1, **options
    ).past_key_values
    return cache
