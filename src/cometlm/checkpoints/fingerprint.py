"""Telling models apart: a short digest of weights, the same on every device.

Every number counts, through an exact integer sum of its bits, and evenly spaced samples fix the
order. That finds another checkpoint, dtype, merge or fine-tuning step; it is no defence against
somebody who constructs a collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_SAMPLES = 64
_FEW = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(weight: Tensor) -> Tensor | None:
    """A few of a weight's numbers, evenly spaced; None of one that is not here, or not whole."""
    sharded = hasattr(weight, "to_local")
    if sharded or weight.device.type == "meta" or not weight.numel():
        return None
    numbers = weight.detach().reshape(-1)
    return numbers[:: max(1, numbers.numel() // _FEW)].clone()


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Digest (32 hexadecimal digits) of named tensors, in any order.

    Tensors without storage (offloaded to disk) count with their name and shape only.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        if tensor.device.type != "meta" and tensor.numel():
            bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.element_size()])
            step = max(1, bits.numel() // _SAMPLES)
            numbers = torch.cat([bits.sum(dtype=torch.int64)[None], bits[::step].long()])
            digest.update(str(numbers.tolist()).encode())
    return digest.hexdigest()[:32]
