"""Passages: texts that stand whole in a context, in any order, and what is asked about them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A question that one passage answers.

    Attributes:
        texts: ways to ask it.
        answers: each of them is right; the first one is taught.
        passage: place in `Pool.passages`.
        pieces: of the passage, in which the answer stands.
        meta: what a report may group by.
    """

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    passage: int
    pieces: tuple[int, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """What a split has: passages, each as its pieces in their order, and questions."""

    passages: list[tuple[str, ...]]
    asked: list[Asked]


def pack(
    rng: random.Random,
    wanted: Sequence[list[int]],
    others: Iterable[list[int]],
    tokens: int,
    misses: int = 0,
) -> tuple[list[int], list[range], int]:
    """A context of whole passages in any order.

    Args:
        wanted: ids of passages that have to be in it.
        others: those of more, which fill it up.
        tokens: most of the context.
        misses: how many of the others may be too long for what is left and are passed over.

    Returns:
        The ids, where each wanted passage stands in them, and how many passages there are.

    Raises:
        ValueError: `tokens` is too few for those that are wanted.
    """
    room = tokens - sum(map(len, wanted))
    if room < 0:
        raise ValueError(f"tokens must be at least {tokens - room}, got {tokens}")
    all_of_them = list(wanted)
    for ids in others:
        if len(ids) <= room:
            all_of_them.append(ids)
            room -= len(ids)
        elif misses:
            misses -= 1
        else:
            break
    order = list(range(len(all_of_them)))
    rng.shuffle(order)
    context: list[int] = []
    places = [range(0)] * len(all_of_them)
    for i in order:
        places[i] = range(len(context), len(context) + len(all_of_them[i]))
        context += all_of_them[i]
    return context, places[: len(wanted)], len(all_of_them)
