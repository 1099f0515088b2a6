"""What a text will take, foreseen from shorter ones that the same method has read.

Seconds follow a law with terms of at least 0: a constant and one that is linear in the length. A
quadratic term is tried only of a method whose held bytes grow with the text, since one that holds
the same does the same for every token. What a method bounds (`Reader.bounds`) does not go on
growing: an answer takes what the tokens take that it reads, and behind a full window reading goes
straight on. The law is fitted by relative error; of laws that fit alike the simplest is taken.
Lengths that are much alike say nothing of growth: it is taken to be in proportion. What
the answers take is fitted apart, for each task where it is known. Bytes at the highest point are
the most that stood beside what was held, and what will be held.

A forecast is as good as the lengths that it was made from. Results show it beside what it took.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cometlm.eval.metrics import NATS
from cometlm.eval.rows import Forecast
from cometlm.eval.runner import Answer, answers_to
from cometlm.methods.base import UNBOUNDED, Bounds, Reader
from cometlm.tasks.base import Sample

_WARM_UP = 64  # tokens of a first reading, which is slower
_CALIBRATED = 1536  # tokens of the longer one of two calibrating readings
_GROWS = 0.5  # the exponent of what is held, above which it grows with the text
_APART = 1.5  # by which the longest text must be longer than the shortest to say how it goes on
_ALIKE = 0.01  # relative error by which a law must be better than a simpler one


@dataclass(frozen=True)
class Reading:
    """What one text took.

    Attributes:
        task: what was asked, by its name in the comparison; "" where a text was only foreseen.
        tokens: that the text has.
        questions: that were answered.
        read_seconds, answer_seconds: of all questions together.
        nbytes: most bytes held, an open chunk's apart: these come and go as the text grows.
        peak_bytes: most in use; None where nothing says.
    """

    task: str
    tokens: int
    questions: int
    read_seconds: float
    answer_seconds: float
    nbytes: int
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """Of reading and answering."""
        return self.read_seconds + self.answer_seconds


def readings_of(task: str, answers: Iterable[Answer]) -> list[Reading]:
    """A reading for each text of which something was answered."""
    texts: dict[tuple[int, int], list[Answer]] = {}
    for answer in answers:
        if not answer.error:
            texts.setdefault((answer.tokens, answer.index), []).append(answer)
    return [_reading(task, own) for own in texts.values()]


def _reading(task: str, answers: Sequence[Answer]) -> Reading:
    peaks = [answer.peak_bytes for answer in answers if answer.peak_bytes is not None]
    is_foreseen = any(NATS in answer.scores for answer in answers)
    return Reading(
        task="" if is_foreseen else task,
        tokens=max(answer.read or answer.tokens for answer in answers),
        questions=0 if is_foreseen else len(answers),
        read_seconds=max(answer.read_seconds for answer in answers),
        answer_seconds=sum(answer.answer_seconds for answer in answers),
        nbytes=max(answer.nbytes - answer.open_nbytes for answer in answers),
        peak_bytes=max(peaks, default=None),
    )


def calibrate(
    empty: Reader,
    name: str,
    sample: Sample,
    device: torch.device,
    max_new_tokens: int | None = None,
) -> list[Reading]:
    """Readings of the beginning of a text, asked what the whole text is asked; nothing is scored.

    Args:
        empty: has read nothing; it stays so.
        name: of the task.
        sample: whose beginning is read, at most half of it.
        device, max_new_tokens: see `evaluate`.
    """
    bounds = empty.bounds
    least = bounds.overlap + 3 * bounds.chunk // 2  # that at least one is run before it is asked
    longer = min(max(_CALIBRATED, least), len(sample.context) // 2)
    found: list[Reading] = []
    for tokens in (min(_WARM_UP, longer), longer // 3, longer):
        if tokens > 1:
            asked = _cut(sample, tokens)
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "device": device}
            found += readings_of(name, answers_to(empty.fork(), None, asked, **limits))
    return found[1:] if len(found) > 1 else found


def _cut(sample: Sample, tokens: int) -> Sample:
    """Its first tokens, and the same questions behind them."""
    questions = tuple(
        replace(one, after=None if one.after is None else min(one.after, tokens), evidence=())
        for one in sample.questions
    )
    return Sample(sample.context[:tokens], questions, sample.meta)


def foresee(
    readings: Sequence[Reading],
    task: str,
    tokens: int,
    questions: float,
    usual: float | None = None,
    bounds: Bounds = UNBOUNDED,
) -> Forecast:
    """What a text will take of a method.

    Args:
        readings: of the same method.
        task: "" for a text that is only foreseen.
        tokens: of the longest text; bytes are foreseen of it.
        questions: that are asked about a text.
        usual: tokens of a text on average; seconds are foreseen of it. Default: `tokens`.
        bounds: of the method's reader.
    """
    usual = tokens if usual is None else usual
    alike = [one for one in readings if bool(one.task) == bool(task)]
    if not alike:
        return Forecast(tokens)
    grows = _grows(alike)
    own = [one for one in alike if one.task == task]
    answers = [
        (int(bounds.left(one.tokens)), one.answer_seconds / one.questions)
        for one in own or alike
        if one.questions
    ]
    run = bounds.run if task else float  # what is only foreseen is run as a whole
    reads = [(int(run(one.tokens)), one.read_seconds) for one in alike if run(one.tokens)]
    # Of texts within a chunk it is answers that say how long one takes.
    seconds = law(reads or answers, grows)(run(usual), bounds.held)
    if questions and answers:
        seconds += questions * law(answers, grows)(bounds.left(usual))
    lengths = sorted({one.tokens for one in alike})
    return Forecast(tokens, seconds, _peak(alike, tokens, bounds.held), lengths)


def _bounded(tokens: float, most: int | None) -> float:
    return tokens if most is None else min(tokens, most)


def questions_of(readings: Sequence[Reading], task: str) -> float | None:
    """How many questions a text of the task has; None where none was read."""
    numbers = [one.questions for one in readings if one.task == task]
    return statistics.fmean(numbers) if numbers else None


class Law:
    """A sum of terms `factor × length ** power`."""

    def __init__(self, powers: Sequence[int], factors: Sequence[float]) -> None:
        self.terms = dict(zip(powers, factors, strict=True))

    def __call__(self, length: float, bend: float | None = None) -> float:
        """What it says of a length.

        Args:
            bend: the length behind which it goes straight on.
        """
        if bend is not None and length > bend:
            slope = sum(
                factor * power * bend ** (power - 1)
                for power, factor in self.terms.items()
                if power
            )
            return self(bend) + slope * (length - bend)
        return sum(factor * length**power for power, factor in self.terms.items())


def law(points: Iterable[tuple[int, float]], is_quadratic: bool) -> Law:
    """The law that lies nearest to what was measured, by relative error.

    Args:
        points: lengths of at least 1, and seconds or the like; at least one point.
        is_quadratic: whether there may be a quadratic term.
    """
    measured = [(length, max(value, 1e-9)) for length, value in points]
    lengths = {length for length, _ in measured}
    kinds = [(0,), (1,), (0, 1)] if are_apart(lengths) else [(1,)]
    if is_quadratic and are_apart(lengths):
        kinds += [(1, 2), *([(0, 1, 2)] if len(lengths) > 2 else [])]
    best, least = Law((1,), (0.0,)), math.inf
    for powers in kinds:
        factors, error = _fitted(measured, powers)
        if min(factors) >= 0 and error < least - _ALIKE:
            best, least = Law(powers, factors), error
    return best


def are_apart(lengths: Collection[int]) -> bool:
    """Whether lengths differ enough to say how something grows with them."""
    return bool(lengths) and max(lengths) >= _APART * min(lengths)


def _fitted(
    measured: Sequence[tuple[int, float]], powers: Sequence[int]
) -> tuple[list[float], float]:
    """Factors of the terms, and the root of the mean square of relative errors."""
    longest = max(length for length, _ in measured)
    terms = torch.tensor(
        [[(length / longest) ** power / value for power in powers] for length, value in measured],
        dtype=torch.float64,
    )
    wanted = torch.ones(len(measured), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(terms, wanted, driver="gelsd").solution
    error = float((terms @ solved - wanted).square().mean().sqrt())
    scaled = zip(powers, solved[:, 0].tolist(), strict=True)
    return [factor / longest**power for power, factor in scaled], error


def _grows(readings: Sequence[Reading]) -> bool:
    """Whether what is held grows with the text, by the greatest lengths that are apart."""
    (shorter, less), (longer, more) = _last_two((one.tokens, one.nbytes) for one in readings)
    if longer == shorter or not less:
        return True
    return math.log(max(more, 1) / less) / math.log(longer / shorter) > _GROWS


def _last_two(points: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Most bytes held at the greatest length, and at the greatest that is apart from it.

    The greatest stands for both where none is.
    """
    held: dict[int, int] = {}
    for length, nbytes in points:
        held[length] = max(nbytes, held.get(length, 0))
    longest = max(held)
    shorter = max((one for one in held if are_apart([one, longest])), default=longest)
    return [(shorter, held[shorter]), (longest, held[longest])]


def _peak(readings: Sequence[Reading], tokens: int, most: int | None) -> int | None:
    beside = [one.peak_bytes - one.nbytes for one in readings if one.peak_bytes is not None]
    if not beside:
        return None
    points = ((int(_bounded(one.tokens, most)), one.nbytes) for one in readings)
    (shorter, less), (longer, more) = _last_two(points)
    slope = max(0.0, (more - less) / (longer - shorter)) if longer > shorter else more / longer
    held = max(0.0, more + slope * (_bounded(tokens, most) - longer))
    return max(0, *beside) + round(held)
