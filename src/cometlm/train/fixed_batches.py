"""Batches of a few fixed shapes, out of tasks: what a device can record the steps of.

Every row of a batch has the same tokens, cut into the same chunks, and is asked the same number of
questions at the same places. A row is text of a corpus, a sample's context and, at its end, one of
the sample's questions with its answer, in the open chunk; all its questions are asked beside it,
of forks of the memory. Which of them count where is data. Each row has a task of its own.

Batch i depends on the settings, the seed and i, and on nothing before it.

Legend: B rows, T tokens of a row, C chunks, P questions of a row, A tokens of a question and its
answer, N tokens of an answer, S places that questions are asked at, K rows that are kept, W their
tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cometlm.data.corpora import corpus_files
from cometlm.session.plain_text import prefix_ids
from cometlm.tasks.base import Question, Sample, asked_at_the_end, turn_ids
from cometlm.tasks.haystack import Haystack
from cometlm.train.config import FixedShapes, Mixture, StepShape
from cometlm.train.keep import KeepBatches
from cometlm.train.mixture import task_of

_TRIES = 32  # samples of one row, where what is asked does not fit
_ROWS = 1 << 12  # more than any batch has


@dataclass(frozen=True)
class FixedBatch:
    """A batch; all tensors on one device.

    Attributes:
        ids: [B, T].
        learned: [B, C], where in each chunk the text begins that is learned.
        said: [B, N], which tokens of a row are the answer at its end: their places.
        answers: [B, N], the tokens there, -100 behind a shorter one.
        asked: [P·B, A] questions with their answers, P blocks of rows; filling behind them.
        places: [P·B, N], where in `asked` the answers' tokens stand.
        wanted: [S, P·B, N], the tokens there, -100 where a question is not asked.
        kept: [K, W] ids of rows that are held to the backbone.
        counted: [K, W], 1 where the distribution of the next token is held, else 0.
    """

    ids: Tensor
    learned: Tensor
    said: Tensor
    answers: Tensor
    asked: Tensor
    places: Tensor
    wanted: Tensor
    kept: Tensor
    counted: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in the order above."""
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device) -> FixedBatch:
        """The same on a device."""
        return FixedBatch(*(x.to(device, non_blocking=True) for x in self.tensors()))


@dataclass(frozen=True)
class _Row:
    """One row of a batch; `spans` of each of its questions: since and until when it is asked."""

    ids: list[int]
    answer: list[int]
    asked: list[tuple[list[int], list[int]]]
    spans: list[range]


class FixedBatches:
    """A batch for each step.

    Args:
        settings: tasks, how often each is drawn, and their options.
        shapes: of the batches.
        tokenizer: with a chat template.
        keep: what holds the model to its backbone; None: nothing does.
        seed: of everything that is drawn.

    Raises:
        ValueError: a task that is not there, or an option that it does not take.
    """

    def __init__(
        self,
        settings: Mixture,
        shapes: FixedShapes,
        tokenizer: Any,
        keep: KeepBatches | None,
        seed: int,
    ) -> None:
        self._settings, self._shapes, self._tokenizer = settings, shapes, tokenizer
        self._keep, self._seed = keep, seed
        self._tasks = [task_of(name, settings, tokenizer, seed) for name in settings.tasks]
        self._weights = list(settings.tasks.values())
        self._first = prefix_ids(tokenizer)
        self._filling = Haystack(
            tokenizer, [file for name in shapes.corpora for file in corpus_files(name)]
        )

    def __len__(self) -> int:
        return self._settings.steps

    def shape(self, number: int) -> StepShape:
        """The shape of a step's batch."""
        return random.Random(f"shape/{self._seed}/{number}").choice(self._shapes.at(number))

    def __getitem__(self, number: int) -> FixedBatch:
        """Batch `number`, on the CPU."""
        return self.of_shape(self.shape(number), number)

    def long_ids(self, number: int) -> Tensor:
        """Ids [B, T] of batch `number`, were it of the shape with the most chunks."""
        longest = max(self._shapes.shapes, key=lambda shape: len(shape.chunks))
        return self.of_shape(longest, number).ids

    def of_shape(self, shape: StepShape, number: int) -> FixedBatch:
        """Batch `number`, were it of this shape."""
        rng = random.Random(f"fixed/{self._seed}/{number}")
        first = number * _ROWS
        rows = [self._row(shape, first + row, rng) for row in range(shape.rows)]
        kept = self._kept(number)
        return FixedBatch(
            torch.tensor([row.ids for row in rows]),
            torch.tensor([self._learned(shape, rng) for _ in rows]),
            *self._said(rows, shape),
            *self._asked(rows, shape),
            *kept,
        )

    # --- rows ---------------------------------------------------------------------------------

    def _row(self, shape: StepShape, index: int, rng: random.Random) -> _Row:
        """A row of a task that is drawn; of another sample, where what is asked is too long."""
        (task,) = rng.choices(self._tasks, self._weights)
        room = shape.tokens - self._shapes.width - len(self._first)
        for attempt in range(_TRIES):
            try:
                sample = task.sample(index * _TRIES + attempt, room)
            except ValueError:
                continue
            fitting = [(q, self._turn(q)) for q in sample.questions]
            fitting = [(q, turn) for q, turn in fitting if self._fits(turn)]
            if fitting or not sample.questions:
                return self._filled(shape, sample, fitting, rng)
        raise ValueError(
            f"samples of {type(task).__name__} must fit into {room} tokens, and a question with "
            f"its answer into fixed.width={self._shapes.width}, got none in {_TRIES}"
        )

    def _filled(
        self,
        shape: StepShape,
        sample: Sample,
        fitting: Sequence[tuple[Question, tuple[list[int], list[int]]]],
        rng: random.Random,
    ) -> _Row:
        at_end = asked_at_the_end([question for question, _ in fitting])
        turns = {id(question): turn for question, turn in fitting}
        asked, answer = turns[id(rng.choice(at_end))] if at_end else ([], [])
        before = shape.tokens - len(sample.context) - len(asked) - len(answer)
        filling = self._filling.draw(rng, before - len(self._first))
        chosen = rng.sample(fitting, min(self._shapes.questions, len(fitting)))
        spans = [_span(question, sample, before, shape.tokens) for question, _ in chosen]
        ids = [*self._first, *filling, *sample.context, *asked, *answer]
        return _Row(ids, answer, [turn for _, turn in chosen], spans)

    def _turn(self, question: Question) -> tuple[list[int], list[int]]:
        answer = question.answer_prefix + question.answers[0]
        return turn_ids(self._tokenizer, question.text, answer, first=True)

    def _fits(self, turn: tuple[list[int], list[int]]) -> bool:
        asked, answer = turn
        short = len(answer) <= self._shapes.answer
        return short and len(asked) + len(answer) <= self._shapes.width

    # --- tensors ------------------------------------------------------------------------------

    def _learned(self, shape: StepShape, rng: random.Random) -> list[int]:
        """Where the learned text of each chunk begins; its last token has one that follows it."""
        return [rng.randrange(length - self._shapes.learned) for length in shape.chunks]

    def _said(self, rows: Sequence[_Row], shape: StepShape) -> tuple[Tensor, Tensor]:
        """`said` and `answers`."""
        longest = self._shapes.answer
        begins = [shape.tokens - len(row.answer) for row in rows]
        places = [[min(b + i, shape.tokens - 1) for i in range(longest)] for b in begins]
        return torch.tensor(places), torch.tensor([_padded(r.answer, longest) for r in rows])

    def _asked(self, rows: Sequence[_Row], shape: StepShape) -> tuple[Tensor, Tensor, Tensor]:
        """`asked`, `places` and `wanted`: the first question of each row, then the second."""
        width, longest = self._shapes.width, self._shapes.answer
        asked, places, answers, spans = [], [], [], []
        for number in range(self._shapes.questions):
            for row in rows:
                there = number < len(row.asked)
                question, answer = row.asked[number] if there else ([], [])
                asked.append((question + answer + [0] * width)[:width])
                places.append([max(1, min(len(question) + i, width - 1)) for i in range(longest)])
                answers.append(_padded(answer, longest))
                spans.append(row.spans[number] if there else range(0))
        read = list(accumulate(shape.chunks))
        wanted = [
            [
                answer if read[place] in span else [-100] * longest
                for answer, span in zip(answers, spans, strict=True)
            ]
            for place in shape.asks
        ]
        return torch.tensor(asked), torch.tensor(places), torch.tensor(wanted)

    def _kept(self, number: int) -> tuple[Tensor, Tensor]:
        """`kept` and `counted`, of a fixed number of rows."""
        rows, width = self._shapes.kept, self._shapes.kept_width
        ids = torch.zeros(rows, width, dtype=torch.long)
        counted = torch.zeros(rows, width)
        if self._keep is not None:
            (drawn,) = self._keep[number]
            n, w = min(rows, len(drawn.ids)), min(width, drawn.ids.shape[1])
            ids[:n, :w] = drawn.ids[:n, :w]
            counted[:n, :w] = drawn.counted[:n, :w].float()
        return ids, counted


def _span(question: Question, sample: Sample, before: int, tokens: int) -> range:
    """Tokens of a row by which a question may be asked.

    Args:
        before: tokens of the row in front of the context.
        tokens: of the row.
    """
    end = len(sample.context)
    asked = end if question.after is None and not question.evidence else question.after or 0
    since = max([asked, *(place.stop for place in question.evidence)])
    until = tokens if question.until is None else before + question.until
    return range(before + since, until + 1)


def _padded(ids: list[int], width: int) -> list[int]:
    return ids + [-100] * (width - len(ids))
