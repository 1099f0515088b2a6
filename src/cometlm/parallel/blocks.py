"""Consecutive blocks of steps or layers, one for each rank, as even as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def balanced(costs: Sequence[float], parts: int) -> list[range]:
    """Consecutive blocks of steps of which the most expensive is as cheap as can be.

    Args:
        costs: of each step, more than 0.
        parts: blocks wanted; with fewer steps the last ones are empty, else none is.
    """
    low, high = max(costs), sum(costs)
    for _ in range(60):
        middle = (low + high) / 2
        if len(_filled(costs, middle)) <= parts:
            high = middle
        else:
            low = middle
    sizes = _filled(costs, high)
    while len(sizes) < parts:  # a block more costs nothing, and leaves no part without a step
        i = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[i : i + 1] = [sizes[i] - sizes[i] // 2, sizes[i] // 2]
    sizes.sort(key=bool, reverse=True)
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def _filled(costs: Sequence[float], most: float) -> list[int]:
    """Sizes of blocks that are filled in turn as long as none costs more than `most`."""
    sizes, spent = [0], 0.0
    for cost in costs:
        if sizes[-1] and spent + cost > most:
            sizes.append(0)
            spent = 0.0
        sizes[-1] += 1
        spent += cost
    return sizes
