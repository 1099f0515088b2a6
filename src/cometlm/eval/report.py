"""What answers come to: means with intervals, bytes and seconds, for every length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cometlm.eval.metrics import NATS, mean_interval
from cometlm.eval.runner import Answer


@dataclass(frozen=True)
class Line:
    """Some answers of one method.

    Attributes:
        tokens: most tokens of their contexts.
        group: the value of the `meta` field that they are grouped by, None if by none.
        count: how many there are.
        scores: mean, low and high of each score.
        nbytes: most bytes held.
        seconds: mean of reading and answering together.
        error: what was said of those that the method could not answer, "" if there are none.
        num_errors: how many these are; they are not in `count`.
    """

    tokens: int
    group: Any
    count: int
    scores: dict[str, tuple[float, float, float]]
    nbytes: int
    seconds: float
    error: str
    num_errors: int


def summarize(answers: Iterable[Answer], by: str | None = None) -> list[Line]:
    """A line for every length, in order.

    Args:
        by: a field of `meta`, to have a line for each of its values as well.

    Raises:
        ValueError: an answer has no such field.
    """
    groups: dict[tuple[int, Any], list[Answer]] = {}
    for answer in answers:
        if by is not None and by not in answer.meta:
            known = ", ".join(answer.meta) or "nothing"
            raise ValueError(f"by must be one of {known}, got {by!r}")
        value = None if by is None else answer.meta[by]
        groups.setdefault((answer.tokens, value), []).append(answer)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], _sortable(item[0][1])))
    return [_line(tokens, value, own) for (tokens, value), own in ordered]


def _line(tokens: int, group: Any, answers: list[Answer]) -> Line:
    errors = [answer.error for answer in answers if answer.error]
    right = [answer for answer in answers if not answer.error]
    names = dict.fromkeys(name for answer in right for name in answer.scores)
    scores = {
        name: mean_interval(
            [a.scores[name] for a in right if name in a.scores], math.inf if name == NATS else 1.0
        )
        for name in names
    }
    seconds = [answer.read_seconds + answer.answer_seconds for answer in right]
    return Line(
        tokens=tokens,
        group=group,
        count=len(right),
        scores=scores,
        nbytes=max((answer.nbytes for answer in right), default=0),
        seconds=statistics.fmean(seconds) if seconds else 0.0,
        error=errors[0] if errors else "",
        num_errors=len(errors),
    )


def _sortable(value: Any) -> tuple[str, float, str]:
    """A key for values of any kind; numbers in their order."""
    is_number = isinstance(value, int | float)
    return type(value).__name__ * (not is_number), value if is_number else 0.0, str(value)
