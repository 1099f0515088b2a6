"""Attention written out: what no fused kernel does, and what others are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention whose weights are formed; heads of a key may be shared by query heads.

    Args:
        query: [B, heads, I, W]; key: [B, key-value heads, S, W]; value: [B, key-value heads, S, V].
        mask: bool [I, S] or [1 or B, 1, I, S]: what is seen; or the same to be added. Default:
            what came before.
        scale: of the products. Default: 1 / sqrt(W).
        softcap: products p become softcap · tanh(p / softcap) (Gemma 2).
        sinks: [heads] a logit of each head that takes its share of the weight and gives nothing
            (gpt-oss).

    Returns:
        [B, heads, I, V] in the value's dtype.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = attention_weights(query, key, mask, scale, softcap, sinks)
    weights = F.dropout(weights, dropout) if dropout else weights
    groups = query.shape[1] // key.shape[1]
    shared = weights.to(value.dtype).unflatten(1, (-1, groups)) @ value[:, :, None]
    return shared.flatten(1, 2)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Weights [..., heads, I, S] of `plain_attention`, in float32 or wider.

    Args:
        query: [..., heads, I, W]; key: [..., key-value heads, S, W].
        mask, scale, softcap, sinks: as there.
    """
    groups = query.shape[-3] // key.shape[-3]
    products = (query.unflatten(-3, (-1, groups)) * scale) @ key.unsqueeze(-3).transpose(-1, -2)
    products = products.flatten(-4, -3)
    wide = torch.promote_types(products.dtype, torch.float32)
    products = products.to(wide)
    if softcap is not None:
        products = torch.tanh(products / softcap) * softcap
    if mask is None:
        mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
    if mask.dtype == torch.bool:
        products = products.masked_fill(~mask, -torch.inf)
    else:
        products = products + mask
    if sinks is None:
        return products.softmax(dim=-1)
    column = sinks.to(wide).view(-1, 1, 1).expand(*products.shape[:-1], 1)
    return torch.cat([products, column], dim=-1).softmax(dim=-1)[..., :-1]
