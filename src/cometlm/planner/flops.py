"""What attaching a memory costs and what the fast path saves, by counting multiplications.

Counted per chunk at steady state (memory full) and per layer: matrix products of the layer and of
attention. Norms, activations and the memory's own small products are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cometlm.config import CometConfig


@dataclass(frozen=True)
class ChunkCost:
    """Multiply-adds of one layer over one chunk with a full memory.

    Attributes:
        fast: memory slots as keys and values only.
        naive: memory slots as full rows.
        projections: the part of `fast` that makes keys and values of memory slots.
    """

    fast: int
    naive: int
    projections: int

    @property
    def gain(self) -> float:
        """How many times fewer multiplications the fast path does."""
        return self.naive / self.fast


def chunk_cost(config: Any, sizes: CometConfig) -> ChunkCost:
    """Count one layer of a backbone with this config (dense MLP of three matrices)."""
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query = config.num_attention_heads * head
    key_value = 2 * config.num_key_value_heads * head
    experts = getattr(config, "num_experts_per_tok", None)
    inner = experts * config.moe_intermediate_size if experts else config.intermediate_size
    per_row = width * (2 * query + key_value) + 3 * width * inner
    items, memory = sizes.chunk_items, sizes.memory_rows
    row = items + memory

    # Entries that are kept as keys and values are projected once in their life.
    packs = key_value < width
    entries = sizes.compression_tokens(sizes.chunk_size) if packs else sizes.temporary_slots
    projected = (sizes.global_slots + entries) * width * key_value

    def causal(rows: int) -> int:
        return 2 * query * rows * (rows + 1) // 2

    fast = items * per_row + projected + 2 * query * items * memory + causal(items)
    return ChunkCost(fast=fast, naive=row * per_row + causal(row), projections=projected)
