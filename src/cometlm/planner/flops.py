"""What attaching a memory costs and what the fast path saves, by counting multiplications.

Counted per chunk at steady state (memory full) and per layer: matrix products of the layer and of
attention. Norms, activations and the memory's own small products are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cometlm.backbones.families import FAMILIES
from cometlm.config import CometConfig


@dataclass(frozen=True)
class LayerSizes:
    """Widths of one layer, as far as a config says them.

    Attributes:
        width: of a hidden row.
        query: of all queries of an item.
        key_value: of all keys and values of an item.
        entry: of an entry of the temporary memory.
        inner: of the MLP that an item runs through; of all its experts.
        inner_weights: of the MLP, or of all experts there are.
    """

    width: int
    query: int
    key_value: int
    entry: int
    inner: int
    inner_weights: int

    @classmethod
    def of(cls, config: Any) -> LayerSizes:
        """The sizes that a backbone's config gives; what it leaves out is as in a plain decoder."""
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        head = _first(config, "head_dim") or width // heads
        key_heads = _first(config, "num_key_value_heads") or heads
        dense = _first(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
        expert = _first(config, "moe_intermediate_size") or dense
        taken = _first(config, "num_experts_per_tok")
        there = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
        inner = taken * expert if taken else dense
        weights = there * expert if taken and there else inner
        key_value = 2 * key_heads * head
        entry = min(width, key_value) if config.model_type in FAMILIES else width
        return cls(width, heads * head, key_value, entry, inner, weights)


def _first(config: Any, *names: str) -> int:
    """The first of these fields that a config has a number in; 0 if none."""
    return next((int(x) for name in names if (x := getattr(config, name, None))), 0)


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
    layer = LayerSizes.of(config)
    width, query, key_value, inner = layer.width, layer.query, layer.key_value, layer.inner
    per_row = width * (2 * query + key_value) + 3 * width * inner
    items, memory = sizes.chunk_items, sizes.memory_rows
    row = items + memory

    # Entries that are kept as keys and values are projected once in their life.
    packs = layer.entry < width
    entries = sizes.compression_tokens(sizes.chunk_size) if packs else sizes.temporary_slots
    projected = (sizes.global_slots + entries) * width * key_value

    def causal(rows: int) -> int:
        return 2 * query * rows * (rows + 1) // 2

    fast = items * per_row + projected + 2 * query * items * memory + causal(items)
    return ChunkCost(fast=fast, naive=row * per_row + causal(row), projections=projected)
