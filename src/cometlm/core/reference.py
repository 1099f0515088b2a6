"""The naive CoMeT: memory slots as full rows, every chunk a fresh row, no cleverness.

Ground truth for the tests (SPEC §2, §3, §4), and the path that benchmarks call naive. It runs the
backbone's layers on whole rows [G | T | text and C | R] under an explicit mask, one sample at a
time, and shares no code with the fast path but the memory's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from cometlm.core.causal_lm import CometForCausalLM


def reference_logits(
    model: CometForCausalLM, input_ids: Tensor, ends: Sequence[int] = (), **budget: int
) -> Tensor:
    """Logits [N, V] of one sample's ids [N], computed chunk after chunk from nothing.

    Args:
        ends: numbers of tokens after which a chunk ends that may not be full (SPEC §5), rising.
        budget: stride or capacity, where they are not the model's own.
    """
    return model.logits(reference_hidden(model, input_ids, ends, **budget)[None])[0]


def reference_hidden(
    model: CometForCausalLM, input_ids: Tensor, ends: Sequence[int] = (), **budget: int
) -> Tensor:
    """Last hidden states [N, D] of one sample's ids [N]. Every chunk is closed, the last too."""
    config = model.config.comet_config.replace(**budget)
    layers = len(model.model.cells)
    states: list[Tensor | None] = [None] * layers
    fifos: list[Tensor | None] = [None] * layers
    outputs = []
    borders = [0, *ends, len(input_ids)]
    parts = [input_ids[a:b].split(config.chunk_size) for a, b in pairwise(borders)]
    for ids in chain(*parts):
        chunk, text, compression, readout = _items(model, ids, config)
        for i in range(layers):
            cell: Any = model.model.cells[i]
            weights: Any = model.model.comet.layers[i]
            slots = []
            if states[i] is not None:
                slots.append(weights.global_memory.adapter(states[i]))
            if fifos[i] is not None:
                slots.append(fifos[i])
            memory = sum(x.shape[0] for x in slots)
            row = torch.cat([*slots, chunk])[None]
            out = _layer(model, cell.layer, i, row, memory, config.row_length)[0]
            chunk = out[memory:]
            if weights.global_memory is not None:
                states[i] = _gate(weights.global_memory, states[i], chunk[readout])
            if weights.temporary_memory is not None:
                entries = weights.temporary_memory(chunk[compression])
                old = fifos[i]
                both = entries if old is None else torch.cat([old, entries])
                fifos[i] = both[-config.capacity :]
        outputs.append(model.model.norm(chunk[text]))
    return torch.cat(outputs)


def reference_generate(
    model: CometForCausalLM, input_ids: Tensor, count: int, ends: Sequence[int] = ()
) -> list[int]:
    """`count` greedy ids after `input_ids` [N]: the argmax of repeated full forwards (SPEC §4)."""
    generated: list[int] = []
    for _ in range(count):
        ids = torch.cat([input_ids, input_ids.new_tensor(generated)])
        logits = reference_logits(model, ids, ends)[-1]
        logits[model.config.suppressed_tokens or []] = -torch.inf
        generated.append(int(logits.argmax()))
    return generated


def _items(
    model: CometForCausalLM, ids: Tensor, config: Any
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """Embedded items [I, D] of a closed chunk, and where its text, C and R stand."""
    comet = model.model.comet
    embedded = model.model.embed_tokens(ids[None])[0]
    rows: list[Tensor] = []
    text: list[int] = []
    compression: list[int] = []
    for i, row in enumerate(embedded):
        text.append(len(rows))
        rows.append(row)
        if comet.compression is not None:
            rest_ends = i + 1 == len(embedded)
            if (i + 1) % config.stride == 0 or rest_ends:
                compression.append(len(rows))
                rows.append(comet.compression[0].to(row))
    readout = list(range(len(rows), len(rows) + config.global_slots))
    if comet.readout is not None:
        rows.extend(comet.readout.to(embedded))
    return torch.stack(rows), text, compression, readout


def _layer(
    model: CometForCausalLM, layer: Any, index: int, row: Tensor, memory: int, max_positions: int
) -> Tensor:
    """One backbone layer over a whole row [1, S, D], under an explicit mask."""
    length = row.shape[1]
    place = torch.arange(length, device=row.device)
    distance = place[:, None] - place[None, :]
    visible = distance >= 0
    window = _window(model.config.text_config, index)
    if window is not None:  # in the chunk; memory stays visible
        visible = visible & ((distance < window) | (place < memory)[None, :])
    bias = torch.zeros(length, length, dtype=row.dtype, device=row.device)
    bias = bias.masked_fill(~visible, -torch.inf)[None, None]
    # The table covers the longest possible row, so that length-dependent scalings see one length.
    table = torch.arange(max_positions, device=row.device)[None]
    rotary: Any = model.model.rotary_emb
    types: Any = getattr(model.config.text_config, "layer_types", None)
    per_type = isinstance(getattr(rotary, "rope_type", None), dict)
    cos, sin = rotary(row, table, types[index]) if per_type else rotary(row, table)
    embeddings = (cos[:, :length], sin[:, :length])
    out: Tensor = layer(row, attention_mask=bias, position_embeddings=embeddings)
    return out


def _window(config: Any, index: int) -> int | None:
    types = getattr(config, "layer_types", None)
    if types and types[index] != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _gate(memory: Any, state: Tensor | None, readout: Tensor) -> Tensor:
    candidate: Tensor = memory.norm(readout)
    if state is None or memory.gate is None:
        return candidate
    gate = torch.sigmoid(torch.cat([candidate, state], dim=-1) @ memory.gate.T)
    return gate * state + (1 - gate) * candidate
