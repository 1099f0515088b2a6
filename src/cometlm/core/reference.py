"""The naive CoMeT: memory slots as full rows, every chunk a fresh row, no cleverness.

Ground truth for the tests (SPEC §2, §3, §4), and the path that benchmarks call naive. It runs the
backbone's layers on whole rows [G | T | text and C | R] under an explicit mask, one sample at a
time, and shares no code with the fast path but the memory's weights, how text is embedded, and
plain attention where a backbone has softcaps or sinks (which a test compares with transformers').
A backbone without a row runs by its own forward; what in it carries a state from item to item runs
on all items since the beginning, chunk after chunk, and never on memory slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
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
    given: list[Tensor | None] = [None] * layers  # to what carries a state of its own, so far
    states: list[Tensor | None] = [None] * layers
    fifos: list[Tensor | None] = [None] * layers
    outputs = []
    borders = [0, *ends, len(input_ids)]
    parts = [input_ids[a:b].split(config.chunk_size) for a, b in pairwise(borders)]
    for ids in chain(*parts):
        chunk, text, compression, readout = _items(model, ids, config)
        slots = [_slots(model, i, states[i], fifos[i], chunk) for i in range(layers)]
        if model.model.cells[0].family is None:
            outs, last = _through_backbone(model, ids, slots, chunk, text, given)
        else:
            outs = _through_layers(model, slots, chunk, config.row_length)
            last = model.model.norm(outs[-1][text])
        for i, chunk in enumerate(outs):
            weights: Any = model.model.comet.layers[i]
            if weights.global_memory is not None:
                states[i] = _gate(weights.global_memory, states[i], chunk[readout])
            if weights.temporary_memory is not None:
                entries = weights.temporary_memory(chunk[compression])
                old = fifos[i]
                both = entries if old is None else torch.cat([old, entries])
                fifos[i] = both[-config.capacity :]
        outputs.append(last)
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
    embedded = model.model.embedded_text(ids[None])[0]
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


def _slots(
    model: CometForCausalLM, i: int, state: Tensor | None, fifo: Tensor | None, like: Tensor
) -> Tensor:
    """Memory slots [S, D] in front of layer i's chunk; none before the first fold."""
    weights: Any = model.model.comet.layers[i]
    slots = [like[:0]]
    if state is not None:
        slots.append(weights.global_memory.adapter(state))
    if fifo is not None:
        slots.append(fifo)
    return torch.cat(slots)


def _through_layers(
    model: CometForCausalLM, slots: Sequence[Tensor], chunk: Tensor, max_positions: int
) -> list[Tensor]:
    """Each layer's outputs [I, D] of a chunk's items [I, D], layer after layer."""
    outs = []
    for i, memory in enumerate(slots):
        cell: Any = model.model.cells[i]
        row = torch.cat([memory, chunk])[None]
        out = _layer(model, cell.layer, i, row, len(memory), max_positions)[0]
        chunk = out[len(memory) :]
        outs.append(chunk)
    return outs


def _through_backbone(
    model: CometForCausalLM,
    ids: Tensor,
    slots: Sequence[Tensor],
    chunk: Tensor,
    text: Sequence[int],
    given: list[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """The same, by the backbone's own forward, for those whose layers nothing is said of.

    It runs on the whole row. In front of each layer, that layer's memory is put in its place and
    the mask opened for it; compression and readout tokens come in at layer 0.

    Args:
        given: of each layer, the items [I, W] of earlier chunks that entered what carries a state;
            this chunk's are put behind them.

    Returns:
        Each layer's outputs [I, D], and the last hidden states [n, D] of the text.
    """
    backbone: Any = model._backbone
    memory = max(map(len, slots))
    length = memory + len(chunk)
    # A layer that does not attend has none, but its rows are as long as the others'.
    slots = [x if len(x) else chunk.new_zeros(memory, chunk.shape[1]) for x in slots]
    at_text = [memory + i for i in text]
    added = chunk.clone()
    added[text] = 0  # the backbone embeds its text itself
    row = chunk.new_zeros(length, chunk.shape[1])
    row = row.index_copy(0, torch.tensor(at_text), model.model.embed_tokens(ids[None])[0])
    outs: list[Tensor] = []

    def before(i: int, layer: Any, args: Any, kwargs: Any) -> Any:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        first = next(iter(bound.arguments))
        items = bound.arguments[first][0][memory:]
        items = items + added if i == 0 else items
        bound.arguments[first] = torch.cat([slots[i], items])[None]
        holder = bound.arguments if "attention_mask" in bound.arguments else bound.kwargs
        bias = _opened(holder.get("attention_mask"), memory, row)
        if "attention_mask" in _arguments(layer):
            bound.arguments["attention_mask"] = bias
            return bound.args, bound.kwargs
        return bound.args, {**bound.kwargs, "attention_mask": bias}

    def after(layer: Any, args: Any, out: Any) -> None:
        outs.append((out if isinstance(out, Tensor) else out[0])[0][memory:])

    def carry(i: int, module: Any, args: Any, kwargs: Any) -> Any:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        first = next(iter(bound.arguments))
        items, old = bound.arguments[first][0][memory:], given[i]
        given[i] = both = items if old is None else torch.cat([old, items])
        bound.arguments[first] = both[None]
        for holder in (bound.arguments, bound.kwargs):
            if "attention_mask" in holder:
                holder["attention_mask"] = None
        return bound.args, bound.kwargs

    def cut(module: Any, args: Any, out: Any) -> Any:
        new = (out if isinstance(out, Tensor) else out[0])[:, -len(chunk) :]
        row = torch.cat([new.new_zeros(1, memory, new.shape[2]), new], dim=1)
        return row if isinstance(out, Tensor) else (row, *out[1:])

    with ExitStack() as stack:
        for i, cell in enumerate(model.model.cells):
            layer: Any = cell.layer
            name: Any = cell.call.recurrent
            hook = partial(before, i)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if name is not None:
                keeper, enter = layer.get_submodule(name), partial(carry, i)
                stack.callback(keeper.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(keeper.register_forward_hook(cut).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        out = backbone.base_model(inputs_embeds=row[None], use_cache=False)
    return outs, out[0][0][at_text]


def _opened(mask: Tensor | None, memory: int, row: Tensor) -> Tensor:
    """A layer's mask to be added [1, 1, S, S], under which each item sees all of the memory."""
    place = torch.arange(len(row), device=row.device)
    causal = place[:, None] >= place[None, :]
    seen = causal if mask is None else (mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0)
    seen = seen | (causal & (place < memory)[None, :])
    bias = torch.zeros(len(row), len(row), dtype=row.dtype, device=row.device)
    return bias.masked_fill(~seen, -torch.inf)[None, None]


def _arguments(layer: Any) -> list[str]:
    """Names of the arguments of a layer's forward."""
    return list(inspect.signature(layer.forward).parameters)


def _layer(
    model: CometForCausalLM, layer: Any, index: int, row: Tensor, memory: int, max_positions: int
) -> Tensor:
    """One backbone layer over a whole row [1, S, D], under an explicit mask."""
    length = row.shape[1]
    place = torch.arange(length, device=row.device)
    distance = place[:, None] - place[None, :]
    visible = distance >= 0
    window = _window(model.config.backbone_config, index)
    if window is not None:  # in the chunk; memory stays visible
        visible = visible & ((distance < window) | (place < memory)[None, :])
    bias = torch.zeros(length, length, dtype=row.dtype, device=row.device)
    bias = bias.masked_fill(~visible, -torch.inf)[None, None]
    # The table covers the longest possible row, so that length-dependent scalings see one length.
    table = torch.arange(max_positions, device=row.device)[None]
    rotary: Any = model.model.rotary_emb
    types: Any = getattr(model.config.backbone_config, "layer_types", None)
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
