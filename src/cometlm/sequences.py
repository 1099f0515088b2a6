"""Sequences of any kind, token ids and text alike: what two of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def num_shared(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
