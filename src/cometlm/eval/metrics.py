"""Means with the interval that they are known to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Z = 1.96  # standard deviations that hold 95%
NATS = "nats"  # the one figure that is not between 0 and 1


def interval(hits: int, total: int, z: float = Z) -> tuple[float, float]:
    """The interval of a share that 95% of repetitions would lie in (Wilson's).

    Raises:
        ValueError: no trials.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    share, square = hits / total, z * z / total
    middle = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    low, high = ((middle + sign * spread) / (1 + square) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding aside


def mean_interval(values: Sequence[float], most: float = 1.0) -> tuple[float, float, float]:
    """The mean of figures between 0 and `most`, and the interval of it that holds 95%.

    Wilson's where all figures are 0 or 1, else that of a normal distribution, which is too narrow
    for few figures; of one it is 0 … `most`.

    Returns:
        Mean, low, high.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must be at least 1, got none")
    mean = statistics.fmean(values)
    if most == 1 and all(value in (0, 1) for value in values):
        return (mean, *interval(round(sum(values)), len(values)))
    if len(values) == 1:
        return mean, 0.0, most
    spread = Z * statistics.stdev(values) / math.sqrt(len(values))
    return mean, max(0.0, mean - spread), min(most, mean + spread)
