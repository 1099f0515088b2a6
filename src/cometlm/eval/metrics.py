"""Means and differences with the interval that they are known to.

Questions about one text are not independent of each other, so it is texts that are drawn again in a
bootstrap. A share of hits has Wilson's interval instead where each text has one question: a
bootstrap of hits only, or of misses only, has no width, which says too much of few texts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

Z = 1.96  # standard deviations that hold 95%
_NO_WIDTH = 1e-12
NATS = "nats"  # the one figure that is not between 0 and 1


def interval(hits: int, total: int, z: float = Z) -> tuple[float, float]:
    """The interval of a share that 95% of repetitions would lie in (Wilson's).

    Raises:
        ValueError: no trials.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    return _wilson(hits / total, total, z)


def _wilson(share: float, total: int, z: float = Z) -> tuple[float, float]:
    square = z * z / total
    middle = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    low, high = ((middle + sign * spread) / (1 + square) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding aside


def mean_interval(
    texts: Sequence[Sequence[float]], most: float = 1.0
) -> tuple[float, float, float]:
    """The mean of figures between 0 and `most`, and the interval of it that holds 95%.

    Wilson's where each text has one figure and these are 0 or 1, and where a bootstrap would have
    no width, since all texts have the same mean; a bootstrap of texts elsewhere; of one text,
    unless it has only hits or only misses, it is 0 … `most`.

    Args:
        texts: the figures of each text, at least one.

    Returns:
        Mean, low, high.

    Raises:
        ValueError: no figures.
    """
    values = [value for text in texts for value in text]
    if not values:
        raise ValueError("values must be at least 1, got none")
    mean = statistics.fmean(values)
    is_of_hits = most == 1 and all(value in (0, 1) for value in values)
    if is_of_hits and (len(values) == len(texts) or mean in (0, 1)):
        return (mean, *interval(round(mean * len(texts)), len(texts)))
    if len(texts) == 1:
        return mean, 0.0, most
    low, high = bootstrap(texts)
    if most == 1 and high - low < _NO_WIDTH:
        low, high = _wilson(mean, len(texts))
    return mean, min(low, mean), max(high, mean)  # rounding aside


def difference_interval(
    texts: Sequence[Sequence[float]], most: float = 1.0
) -> tuple[float, float, float]:
    """The mean of paired differences up to `most`, and the interval of it that holds 95%.

    A bootstrap of texts. Where all differences are the same it has no width; the interval then
    allows as many texts another figure as Wilson's interval does, each by 1. Of one text and
    another `most` than 1, it is all that there may be.

    Args:
        texts: the differences of each text, at least one.

    Returns:
        Mean, low, high.

    Raises:
        ValueError: no differences.
    """
    values = [value for text in texts for value in text]
    if not values:
        raise ValueError("differences must be at least 1, got none")
    mean = statistics.fmean(values)
    if most != 1 and len(texts) == 1:
        return mean, -most, most
    if most != 1 or (len(texts) > 1 and min(values) < max(values)):
        low, high = bootstrap(texts)
    else:
        _, spread = interval(0, len(texts))
        low, high = mean - spread, mean + spread
    return mean, max(-most, min(low, mean)), min(most, max(high, mean))


def bootstrap(
    texts: Sequence[Sequence[float]], *, repeats: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """The interval that holds 95% of the means, if texts are drawn again with replacement.

    It is too narrow for few texts, as any percentile bootstrap.

    Args:
        texts: the figures of each text, at least one in each.
        repeats: how often they are drawn.
        seed: of what is drawn; the same figures have the same interval.
    """
    sums = torch.tensor([sum(text) for text in texts], dtype=torch.float64)
    counts = torch.tensor([len(text) for text in texts], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(texts), (repeats, len(texts)), generator=generator)
    means = (sums[drawn].sum(1) / counts[drawn].sum(1)).sort().values
    low, high = (means[round(share * (repeats - 1))] for share in (0.025, 0.975))
    return float(low), float(high)
