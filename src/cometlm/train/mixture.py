"""Training batches out of tasks, made from their number alone.

Batch i depends on the settings, the seed and i, and on nothing before it, so a run that is resumed
anywhere sees the same batches as one that never stopped.

Legend: B rows of a batch, A tokens of a question and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cometlm.tasks import TASKS
from cometlm.tasks.base import Question, Sample, Task, asked_at_the_end, turn_ids
from cometlm.train.config import Mixture
from cometlm.train.probes import Probe

_ROWS = 1 << 12  # more than any batch has
PROBES = ("probe_ids", "probe_labels", "probe_since", "probe_until")
_TRIES = 16  # samples of one place in a batch, where what has to stand in them is too long
_CHECKED = 16  # samples of each task that are drawn before a run


class MixtureBatches:
    """Samples of the tasks of a mixture, a batch for each number.

    Args:
        settings: which tasks, how long and how many.
        tokenizer: with a chat template, unless no sample has a question.
        seed: of everything that is drawn.
        per_step: batches that one step of the optimiser takes, on all ranks together.

    Raises:
        ValueError: a task that is not there, or an option that it does not take.
    """

    def __init__(self, settings: Mixture, tokenizer: Any, seed: int, per_step: int = 1) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._seed = seed
        self._per_step = per_step
        self._tasks = [task_of(name, settings, tokenizer, seed) for name in settings.tasks]
        self._weights = list(settings.tasks.values())

    def __len__(self) -> int:
        return self._settings.steps * self._per_step

    def check(self, chunk_size: int) -> None:
        """Draw some shortest samples of each task, so that most of what is wrong is known at once.

        Args:
            chunk_size: the model's, which is what a fork has room for.

        Raises:
            ValueError: names the task.
        """
        shortest = self._settings.tokens[0]
        for name, task in zip(self._settings.tasks, self._tasks, strict=True):
            for index in range(_CHECKED):
                sample = self._sample(name, task, index, shortest)
                _, labels = self._row(sample, random.Random(0))
                probes = self._probes([sample]) if self._settings.ask == "probes" else {}
                width = max((len(ids) for (ids,) in probes.get("probe_ids", [])), default=0)
                if width > chunk_size:
                    raise ValueError(
                        f"mixture.tasks.{name}: a probe must fit into a chunk of {chunk_size} "
                        f"tokens, got {width} for a question and its answer"
                    )
                if not probes and all(label == -100 for label in labels):
                    raise ValueError(
                        f'mixture.tasks.{name}: nothing is learned of sample {index}: ask "end" '
                        "leaves out questions that belong on the way, and text_share is 0"
                    )

    def questions(self) -> list[str]:
        """What is asked about some shortest samples of each task."""
        shortest = self._settings.tokens[0]
        samples = (
            self._sample(name, task, index, shortest)
            for name, task in zip(self._settings.tasks, self._tasks, strict=True)
            for index in range(_CHECKED)
        )
        return [question.text for sample in samples for question in sample.questions]

    def _sample(self, name: str, task: Task, index: int, tokens: int) -> Sample:
        """A sample of a task; where one needs more tokens than these, another."""
        refused: list[ValueError] = []
        while len(refused) < _TRIES:
            try:
                sample = task.sample(index + len(refused) * _ROWS // _TRIES, tokens)
            except ValueError as error:
                refused.append(error)
            else:
                return sample.begun(self._tokenizer)
        raise ValueError(f"mixture.tasks.{name}: {refused[0]}") from refused[0]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Batch `number`: `input_ids` and `labels` of its rows, and with probes `PROBES`."""
        rng = random.Random(f"{self._seed}/{number}")
        tasks = list(zip(self._settings.tasks, self._tasks, strict=True))
        ((name, task),) = rng.choices(tasks, self._weights)
        length = self._length(number, rng)
        rows = max(1, self._settings.batch_tokens // length)
        first = number * _ROWS
        samples = [self._sample(name, task, first + row, length) for row in range(rows)]
        pairs = [self._row(sample, rng) for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": [ids for ids, _ in pairs],
            "labels": [labels for _, labels in pairs],
        }
        if self._settings.ask == "probes":
            batch |= self._probes(samples)
        return batch

    def _length(self, number: int, rng: random.Random) -> int:
        """Tokens of a batch's contexts; octaves are alike."""
        shortest, longest = self._settings.tokens
        growing = self._settings.grow * self._per_step
        grown = min(1.0, (number + 1) / growing) if growing else 1.0
        return round(shortest * (longest / shortest) ** (grown * rng.random()))

    def _row(self, sample: Sample, rng: random.Random) -> tuple[list[int], list[int]]:
        """Ids and labels of one sample."""
        ids, labels = list(sample.context), self._learned(sample, rng)
        if self._settings.ask == "end":
            for i, question in enumerate(asked_at_the_end(sample.questions)):
                asked, answer = self._turn(question, first=i == 0)
                ids += asked + answer
                labels += [-100] * len(asked) + answer
        return ids, labels

    def _learned(self, sample: Sample, rng: random.Random) -> list[int]:
        """Labels of a part of a context: all of one without questions."""
        context = sample.context
        share = self._settings.text_share if sample.questions else 1.0
        length = round(len(context) * share)
        start = rng.randrange(len(context) - length + 1)
        end = start + length
        return [-100] * start + context[start:end] + [-100] * (len(context) - end)

    def _probes(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Questions of all rows, the first of each row together, then the second, and so on.

        A row that has no more questions stands there without labels.
        """
        count = max(len(sample.questions) for sample in samples)
        if not count:
            return {}
        turns = [[self._asked(sample, i) for sample in samples] for i in range(count)]
        width = max(len(asked) + len(answer) for rows in turns for asked, answer in rows)
        filling = self._tokenizer.eos_token_id or 0

        def padded(row: list[int], value: int) -> list[int]:
            return row + [value] * (width - len(row))

        return {
            "probe_ids": [[padded(q + a, filling) for q, a in rows] for rows in turns],
            "probe_labels": [
                [padded([-100] * len(q) + a, -100) for q, a in rows] for rows in turns
            ],
            "probe_since": [[_since(sample, i) for sample in samples] for i in range(count)],
            "probe_until": [[_until(sample, i) for sample in samples] for i in range(count)],
        }

    def _asked(self, sample: Sample, number: int) -> tuple[list[int], list[int]]:
        if number >= len(sample.questions):
            return [], []
        return self._turn(sample.questions[number], first=True)

    def _turn(self, question: Question, first: bool) -> tuple[list[int], list[int]]:
        answer = question.answer_prefix + question.answers[0]
        return turn_ids(self._tokenizer, question.text, answer, first=first)


def task_of(name: str, settings: Mixture, tokenizer: Any, seed: int) -> Task:
    """A task of a mixture, of the train split.

    Raises:
        ValueError: an option that it does not take.
    """
    options = settings.options.get(name, {})
    try:
        return TASKS.find(name)(tokenizer, split="train", seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"mixture.options.{name}: {error}") from error


def _since(sample: Sample, number: int) -> int:
    """Tokens by which a question may be asked: its evidence is read, or it says so itself."""
    if number >= len(sample.questions):
        return 0
    question = sample.questions[number]
    read = [place.stop for place in question.evidence]
    asked = len(sample.context) if question.after is None and not read else question.after or 0
    return max([asked, *read])


def _until(sample: Sample, number: int) -> int:
    """Tokens up to which a question may be asked."""
    until = sample.questions[number].until if number < len(sample.questions) else None
    return len(sample.context) if until is None else until


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One batch, which comes as the only feature, as tensors; shorter rows are padded.

    Raises:
        ValueError: several of them.
    """
    if len(features) != 1:
        raise ValueError(
            f"trainer.per_device_train_batch_size must be 1 for a mixture, whose samples are "
            f"batches already, got {len(features)}; set mixture.batch_tokens"
        )
    (feature,) = features
    lengths = [len(row) for row in feature["input_ids"]]
    width = max(lengths)
    filling = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row + [value] * (width - len(row)) for row in feature[name]])
        for name, value in filling.items()
    }
    if min(lengths) < width:
        batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    for name in PROBES:
        if feature.get(name) is not None:
            batch[name] = torch.tensor(feature[name])
    return batch


def probes_of(inputs: dict[str, Tensor]) -> list[Probe]:
    """Take the probes out of a batch of `collate`."""
    parts = [inputs.pop(name, None) for name in PROBES]
    if parts[0] is None:
        return []
    ids, labels, since, until = parts
    assert ids is not None
    assert labels is not None
    assert since is not None
    assert until is not None
    return [
        Probe(q, wanted, tuple(rows), tuple(ends))
        for q, wanted, rows, ends in zip(ids, labels, since.tolist(), until.tolist(), strict=True)
    ]
