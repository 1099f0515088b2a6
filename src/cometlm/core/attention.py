"""Attention of one chunk to its memory and to itself.

The chunk's keys are appended inside the attention function that transformers calls, so any decoder
layer works unchanged: the layer is handed a `CellCall` as the keyword argument `comet` and passes
it on. Without that argument the function is transformers' own sdpa.

A uniform chunk splits into two parts: memory without a mask, chunk with the causal flag, merged by
their log-sum-exp. The split saves the mask, which costs CPU kernels all that skipping the memory's
dead rows gains. torch's log-sum-exp carries no gradient, so both parts live in one
`autograd.Function` that hands each backward the *merged* output and log-sum-exp; with these a flash
backward computes exactly its part of the whole. On other devices one call with a lower-right causal
flag does the same without a split.

CPUs have two shorter ways, found by measuring (docs/lab-notes.md, "Speed on a CPU"). A single new
item sees all that is there, and the query heads that share a key head are taken as its items:
torch's kernel is several times slower for one row than for two. Several items in bfloat16 are
attended in blocks of plain products where nothing is learned: they are larger than the kernel's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cometlm.backbones.calling import Capture, KeyValue, told
from cometlm.backbones.plain_attention import plain_attention
from cometlm.compat import cpu_flash_attention
from cometlm.core.fixed_layout import FixedLayout
from cometlm.core.layout import ChunkLayout
from cometlm.core.memory import join_ragged
from cometlm.device import multiplies_bfloat16

NAME = "cometlm"
_FEW = 64
_FEW_ITEMS = 16
_BLOCK_ITEMS = 128


@dataclass
class CellCall:
    """What one call of a layer reads and leaves: made by the cell, filled by the attention.

    Attributes:
        layout: where everything stands.
        memory: rotated keys and values of the memory slots, or None.
        chunk: rotated keys and values of the open chunk, before the call and, afterwards, after;
            filling may follow. Under a `FixedLayout` a buffer with the whole row, written in place.
        window: how far an item sees in its chunk, where the layer does not say so itself.
    """

    layout: ChunkLayout | FixedLayout
    memory: KeyValue | None
    chunk: KeyValue | None
    window: int | None = None

    def append(self, new: KeyValue) -> KeyValue:
        """Add the new items' keys and values to the chunk's and return all of them."""
        old, layout = self.chunk, self.layout
        if old is None:
            self.chunk = new
        elif isinstance(layout, FixedLayout):
            for buffer, part in zip(old, new, strict=True):
                buffer.index_copy_(2, layout.positions[0], part)
        elif layout.uniform:
            before = layout.rows[0].items
            self.chunk = KeyValue(*(_appended(o, n, before) for o, n in zip(old, new, strict=True)))
        else:
            lengths = [row.items for row in layout.rows]
            self.chunk = KeyValue(
                *(join_ragged(o, lengths, n, layout.items) for o, n in zip(old, new, strict=True))
            )
        assert self.chunk is not None
        return self.chunk


def comet_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    comet: CellCall | Capture | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers under `NAME`.

    Args:
        query: [B, heads, I, head width]; key, value: [B, key-value heads, I, head width].
        comet: the cell's call, or what takes keys and values only. None: as the backbone attends
            by itself, so that it still runs.
        softcap, s_aux: as `softcap` and `sinks` of `plain_attention`; with one of them weights are
            formed, since no fused kernel of torch takes such.

    Returns:
        [B, I, heads, head width], and None for the weights.

    Raises:
        ValueError: the layer asks for more: a mask of its own, or a tensor that means nothing here.
    """
    comet = told() if comet is None else comet
    if isinstance(comet, Capture):
        comet.take(key, value)
    if comet is None and (softcap is not None or s_aux is not None):
        row = (query, key, value, attention_mask)
        alone = plain_attention(*row, scaling, dropout, softcap, s_aux)
        return alone.transpose(1, 2).contiguous(), None
    if comet is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
        return out
    _refuse_more({**kwargs, "attention_mask": attention_mask})
    chunk = comet.append(KeyValue(key, value))
    window = sliding_window if comet.window is None else comet.window
    given = (query, comet.memory, chunk, comet.layout, window, scaling, dropout)
    if softcap is not None or s_aux is not None:
        attended = attend_plain(*given, softcap, s_aux)
    else:
        attended = attend(*given)
    return attended.transpose(1, 2).contiguous(), None


def _refuse_more(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(value, Tensor) and name != "position_ids":
            raise ValueError(
                f"a layer gives its attention {name!r}, which attention to a memory does not take"
            )


def attend(
    query: Tensor,
    memory: KeyValue | None,
    chunk: KeyValue,
    layout: ChunkLayout | FixedLayout,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the new items to the whole row, [B, heads, I, head width]."""
    if isinstance(layout, FixedLayout):
        return attend_masked(query, chunk, layout.mask(window), scale)
    if not layout.uniform or (dropout and memory is not None):
        chunk = KeyValue(*(x[:, :, : max(layout.slots)] for x in chunk))  # without filling
        row = chunk if memory is None else _joined(memory, chunk)
        return attend_masked(query, row, layout.full_mask(window), scale, dropout)
    same_width = query.shape[-1] == chunk.value.shape[-1]  # else latent attention
    # To a compiler, numbers of a slice are constants: one more graph for each length.
    if query.device.type == "cpu" and layout.within(window) and not is_compiling() and not dropout:
        filled = KeyValue(*(x[:, :, : layout.slots[0]] for x in chunk))
        if query.shape[2] == 1 and same_width and (memory is None or _FLASH is not None):
            return attend_single(query, memory, filled, scale)
        if query.shape[2] > 1 and _in_blocks(query):
            return attend_in_blocks(query, memory, filled, scale)
    mask = layout.chunk_mask(window, chunk.key.shape[2])
    causal = mask is None and query.shape[2] > 1
    if memory is None and mask is not None:
        return attend_masked(query, chunk, mask, scale, dropout)
    if memory is None:
        return sdpa(query, *chunk, None, dropout, causal, scale=scale, enable_gqa=True)
    if query.device.type == "cpu" and _FLASH is not None and same_width:
        return attend_two_part(query, memory, chunk, mask, causal, scale)
    whole = None if mask is None else layout.full_mask(window)
    chunk = KeyValue(*(x[:, :, : layout.slots[0]] for x in chunk))  # without filling
    return attend_one_part(query, memory, chunk, whole, causal, scale)


def attend_plain(
    query: Tensor,
    memory: KeyValue | None,
    chunk: KeyValue,
    layout: ChunkLayout | FixedLayout,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend`, with weights formed: for what no fused kernel does."""
    if isinstance(layout, FixedLayout):
        row, mask = chunk, layout.mask(window)
    else:
        chunk = KeyValue(*(x[:, :, : max(layout.slots)] for x in chunk))  # without filling
        row = chunk if memory is None else _joined(memory, chunk)
        mask = layout.full_mask(window)
    query, key, value = _cast(query, *row)
    return plain_attention(query, key, value, mask, scale, dropout, softcap, sinks)


def attend_single(
    query: Tensor, memory: KeyValue | None, chunk: KeyValue, scale: float | None
) -> Tensor:
    """One new item [B, heads, 1, head width], which sees all of its memory and chunk; CPU only."""
    batch, heads, _, width = query.shape
    key_heads = chunk.key.shape[1]
    groups = heads // key_heads
    rows = query.reshape(batch, key_heads, groups, width)
    if groups == 1 and query.dtype.itemsize < 4:  # half types take a slow way for a single row
        rows = rows.expand(-1, -1, 2, -1)
    if memory is None:
        out = sdpa(rows, *chunk, scale=scale)
    else:
        out = attend_two_part(rows, memory, chunk, None, False, scale)
    apart: Tensor = out[:, :, :groups].reshape(batch, heads, 1, width)
    return apart


def attend_in_blocks(
    query: Tensor, memory: KeyValue | None, chunk: KeyValue, scale: float | None
) -> Tensor:
    """Blocks of items, each over the memory and what stands before it; scores in query's dtype.

    Args:
        query: [B, heads, I, head width], the chunk's last items.
        chunk: without filling.
    """
    batch, heads, items, width = query.shape
    key, value = chunk if memory is None else _joined(memory, chunk)
    key_heads, length = key.shape[1:3]
    groups = heads // key_heads
    scale = width**-0.5 if scale is None else scale
    grouped = query.unflatten(1, (key_heads, groups))
    keys, values = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    unseen = _causal_bias(query.dtype)
    out = query.new_empty(batch, items, key_heads, groups, value.shape[-1])
    for start in range(0, items, _BLOCK_ITEMS):
        end = min(start + _BLOCK_ITEMS, items)
        count, seen = end - start, length - items + end
        rows = grouped[:, :, :, start:end].reshape(batch * key_heads, groups * count, width)
        scores = rows.new_empty(len(rows), groups * count, seen)
        torch.baddbmm(scores, rows, keys[:, :, :seen], beta=0, alpha=scale, out=scores)
        last = scores.view(-1, groups, count, seen)[..., seen - count :]
        last += unseen[:count, :count]
        part = torch.bmm(scores.softmax(-1), values[:, :seen])
        apart = part.view(batch, key_heads, groups, count, -1)
        out[:, start:end] = apart.permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3).transpose(1, 2)


@functools.lru_cache(maxsize=2)
def _causal_bias(dtype: torch.dtype) -> Tensor:
    """What a block's scores of its own items get: 0, and minus infinity for later ones."""
    with torch.inference_mode(False):  # it outlives this call
        return torch.full((_BLOCK_ITEMS, _BLOCK_ITEMS), -torch.inf, dtype=dtype).triu_(1)


def _in_blocks(query: Tensor) -> bool:
    """Whether blocks of plain products are the faster way, and nothing flows back through them."""
    fast = query.dtype == torch.bfloat16 and _BFLOAT16_PRODUCTS
    return fast and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def attend_two_part(
    query: Tensor,
    memory: KeyValue,
    chunk: KeyValue,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Memory without a mask, chunk under `mask` [I, slots] or the causal flag; CPU only."""
    tensors = _cast(query, *memory, *chunk)
    if not torch.is_grad_enabled():
        bias = None if mask is None else _additive(mask, query.dtype)
        return _two_parts(tensors, bias, causal, scale)[0]
    out: Tensor = _TwoPart.apply(*tensors, mask, causal, scale)  # type: ignore[no-untyped-call]
    return out


def attend_one_part(
    query: Tensor,
    memory: KeyValue,
    chunk: KeyValue,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Memory and chunk as one row under a full mask or a lower-right causal flag."""
    row = _joined(memory, chunk)
    if mask is not None:
        return attend_masked(query, row, mask, scale)
    bias = causal_lower_right(query.shape[2], row.key.shape[2]) if causal else None
    query, key, value = _cast(query, *row)
    return sdpa(query, key, value, bias, scale=scale, enable_gqa=True)


def attend_masked(
    query: Tensor,
    row: KeyValue,
    mask: Tensor,
    scale: float | None,
    dropout: float = 0.0,
    grouped: bool | None = None,
) -> Tensor:
    """A whole row under a mask.

    Args:
        mask: bool, [I, S] or [1 or B, 1, I, S].
        grouped: let the kernel group the heads of a key. Default: on CPUs, for more than a few
            items; fused kernels of other devices take a mask or groups, but not both.
    """
    (heads, items), key_heads = query.shape[1:3], row.key.shape[1]
    is_few = items <= _FEW_ITEMS
    grouped = query.device.type == "cpu" and not is_few if grouped is None else grouped
    if grouped or heads == key_heads:
        return sdpa(query, *row, mask, dropout, scale=scale, enable_gqa=heads != key_heads)
    groups = heads // key_heads
    if not is_few:
        row = KeyValue(*(x.repeat_interleave(groups, 1) for x in row))
        return sdpa(query, *row, mask, dropout, scale=scale)
    # Query heads that share a key head are treated as further items: no key is copied.
    more = query.unflatten(1, (key_heads, groups)).flatten(2, 3)
    seen = mask.repeat(*(1,) * (mask.dim() - 2), groups, 1)
    out = sdpa(more, *row, seen, dropout, scale=scale)
    apart: Tensor = out.unflatten(2, (groups, items))
    return apart.flatten(1, 2)


def _appended(old: Tensor, new: Tensor, length: int) -> Tensor:
    """New rows [B, heads, n, W] behind the first `length` of old ones, and filling on CPUs.

    An open chunk grows by a token a step. CPU kernels and the heap like few sizes, so there its
    rows are kept up to a multiple of `_FEW`; what follows the last item is filling.
    """
    end = length + new.shape[2]
    width = -(-end // _FEW) * _FEW if new.device.type == "cpu" else end
    filling = old[:, :, end:width]
    missing = width - end - filling.shape[2]
    if missing:
        filling = F.pad(filling, (0, 0, 0, missing))
    return torch.cat([old[:, :, :length], new, filling], dim=2)


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as autocast would have them; it knows torch's attention, but not what is under it."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def _joined(memory: KeyValue, chunk: KeyValue) -> KeyValue:
    return KeyValue(*(torch.cat(pair, dim=2) for pair in zip(memory, chunk, strict=True)))


_FLASH = cpu_flash_attention()
_BFLOAT16_PRODUCTS = multiplies_bfloat16()


def _two_parts(
    tensors: tuple[Tensor, ...], bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Both parts as one softmax, and its log-sum-exp [B, heads, I].

    Args:
        tensors: query, keys and values of the memory, keys and values of the chunk.
    """
    assert _FLASH is not None
    flash, _ = _FLASH
    query, memory_key, memory_value, key, value = tensors
    far, far_lse = flash(query, memory_key, memory_value, 0.0, False, scale=scale)
    near, near_lse = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    lse = torch.logaddexp(far_lse, near_lse)
    out: Tensor = far * (far_lse - lse).exp().unsqueeze(-1).to(far.dtype)
    out.addcmul_(near, (near_lse - lse).exp().unsqueeze(-1).to(near.dtype))
    return out, lse


class _TwoPart(torch.autograd.Function):
    """Memory without a mask and chunk under a mask or the causal flag, as one softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        bias = None if mask is None else _additive(mask, query.dtype)
        parts = (query, memory_key, memory_value, key, value)
        out, lse = _two_parts(parts, bias, causal, scale)
        ctx.save_for_backward(query, memory_key, memory_value, key, value, bias, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, memory_key, memory_value, key, value, bias, out, lse = ctx.saved_tensors
        assert _FLASH is not None
        _, backward = _FLASH
        merged = (out, lse, 0.0)
        far = backward(grad, query, memory_key, memory_value, *merged, False, scale=ctx.scale)
        near = backward(
            grad, query, key, value, *merged, ctx.causal, attn_mask=bias, scale=ctx.scale
        )
        return far[0] + near[0], *far[1:], *near[1:], None, None, None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [I, S] as the additive [1, 1, I, S] that the kernel's own entry takes."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    bias.masked_fill_(~mask, -torch.inf)
    return bias[None, None]


AttentionInterface.register(NAME, comet_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
