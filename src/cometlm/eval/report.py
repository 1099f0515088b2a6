"""What answers come to, for every length: means with intervals, bytes, seconds, differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cometlm.eval.metrics import NATS, difference_interval, mean_interval
from cometlm.eval.runner import Answer

_NEARLY = 0.9  # of the tokens that were asked for: what a text may have and pass for as long


def is_shorter(read: int, tokens: int) -> bool:
    """Whether a text has far fewer tokens than were asked for."""
    return 0 < read < _NEARLY * tokens


@dataclass(frozen=True)
class Line:
    """Some answers of one method.

    Attributes:
        tokens: most tokens of their contexts.
        group: the value of the `meta` field that they are grouped by, None if by none.
        count: how many there are.
        scores: mean, low and high of each score.
        nbytes: most bytes held.
        open_nbytes: most of them that were an open chunk's.
        read: tokens of each text, from the shortest to the longest; rows that are older than the
            field do not say.
        peak_bytes: most bytes in use; None where nothing says.
        read_seconds, answer_seconds: means, of a question.
        error: what was said of those that the method could not answer, "" if there are none.
        num_errors: how many these are; they are not in `count`.
    """

    tokens: int
    group: Any
    count: int
    scores: dict[str, tuple[float, float, float]]
    nbytes: int
    open_nbytes: int
    read: list[int]
    peak_bytes: int | None
    read_seconds: float
    answer_seconds: float
    error: str
    num_errors: int

    @property
    def seconds(self) -> float:
        """Mean of reading and answering together."""
        return self.read_seconds + self.answer_seconds

    @property
    def shorter(self) -> str:
        """What is to be said of texts with far fewer tokens than were asked for; "" if nothing."""
        short = [read for read in self.read if is_shorter(read, self.tokens)]
        if not short:
            return ""
        some = "" if len(short) == len(self.read) else f"{len(short)} of {len(self.read)} texts "
        span = " … ".join(f"{read:,}" for read in dict.fromkeys((short[0], short[-1])))
        return f"{some}shorter: {span} tokens"


@dataclass(frozen=True)
class Difference:
    """How much better one method is than another, over the questions that both have answered.

    With another tokenizer a task may ask something else in the same place, which is left out.

    Attributes:
        tokens, group: see `Line`.
        count: how many these are.
        scores: mean, low and high of each score's difference.
    """

    tokens: int
    group: Any
    count: int
    scores: dict[str, tuple[float, float, float]]


def summarize(answers: Iterable[Answer], by: str | None = None) -> list[Line]:
    """A line for every length, in order.

    Args:
        by: a field of `meta`, to have a line for each of its values as well; errors without it,
            such as those of texts that could not be made, have a line of their own.

    Raises:
        ValueError: an answer that is no error has no such field.
    """
    return [_line(tokens, value, own) for tokens, value, own in _grouped(answers, by)]


def differences(
    ours: Iterable[Answer], theirs: Iterable[Answer], by: str | None = None
) -> list[Difference]:
    """A difference for every length at which both have answered something, in order.

    Args:
        ours: answers of the method that counts positively.
        theirs: those of the other one, to the same task.
        by: see `summarize`.

    Raises:
        ValueError: as `summarize`.
    """
    others = {answer.place: answer for answer in theirs if not answer.error}
    found = []
    for tokens, value, own in _grouped(ours, by):
        both = [(a, others[a.place]) for a in own if not a.error and a.place in others]
        pairs = [pair for pair in both if _are_asked_alike(*pair)]
        if not pairs:
            continue
        names = dict.fromkeys(name for pair in pairs for name in pair[0].scores)
        scores = {}
        for name in names:
            both = [(a, b) for a, b in pairs if name in a.scores and name in b.scores]
            if both:
                less = [(a.index, a.scores[name] - b.scores[name]) for a, b in both]
                scores[name] = difference_interval(_of_texts(less), most_of(name))
        found.append(Difference(tokens, value, len(pairs), scores))
    return found


def _are_asked_alike(one: Answer, other: Answer) -> bool:
    """Whether two answers are to the same question, or of the same text if there is none."""
    if one.question or other.question:
        return (one.question, *one.answers) == (other.question, *other.answers)
    return one.digest == other.digest or not (one.digest and other.digest)  # older rows have none


def _grouped(answers: Iterable[Answer], by: str | None) -> list[tuple[int, Any, list[Answer]]]:
    """Answers by the length of their contexts and a field of `meta`."""
    groups: dict[tuple[int, str], tuple[Any, list[Answer]]] = {}
    for answer in answers:
        if by is not None and by not in answer.meta and not answer.error:
            known = ", ".join(answer.meta) or "nothing"
            raise ValueError(f"by must be one of {known}, got {by!r}")
        value = None if by is None else answer.meta.get(by)
        key = answer.tokens, json.dumps(value, sort_keys=True)  # lists cannot be keys
        groups.setdefault(key, (value, []))[1].append(answer)
    found = [(tokens, value, own) for (tokens, _), (value, own) in groups.items()]
    return sorted(found, key=lambda one: (one[0], _sortable(one[1])))


def _of_texts(values: Iterable[tuple[int, float]]) -> list[list[float]]:
    """Figures by the index of their sample."""
    texts: dict[int, list[float]] = {}
    for index, value in values:
        texts.setdefault(index, []).append(value)
    return list(texts.values())


def _line(tokens: int, group: Any, answers: list[Answer]) -> Line:
    errors = [answer.error for answer in answers if answer.error]
    answered = [answer for answer in answers if not answer.error]
    names = dict.fromkeys(name for answer in answered for name in answer.scores)
    scores = {
        name: mean_interval(
            _of_texts((a.index, a.scores[name]) for a in answered if name in a.scores),
            most_of(name),
        )
        for name in names
    }
    peaks = [answer.peak_bytes for answer in answered if answer.peak_bytes is not None]
    return Line(
        tokens=tokens,
        group=group,
        count=len(answered),
        scores=scores,
        nbytes=max((answer.nbytes for answer in answered), default=0),
        open_nbytes=max((answer.open_nbytes for answer in answered), default=0),
        read=sorted({answer.index: answer.read for answer in answered if answer.read}.values()),
        peak_bytes=max(peaks, default=None),
        read_seconds=_mean(answer.read_seconds for answer in answered),
        answer_seconds=_mean(answer.answer_seconds for answer in answered),
        error=errors[0] if errors else "",
        num_errors=len(errors),
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else 0.0


def _sortable(value: Any) -> tuple[str, float, str]:
    """A key for values of any kind; numbers in their order."""
    is_number = isinstance(value, int | float)
    return type(value).__name__ * (not is_number), value if is_number else 0.0, str(value)


def most_of(name: str) -> float:
    """The most that a figure can be."""
    return math.inf if name == NATS else 1.0
