"""Generated training batches: rows of one length, made from their number alone.

Batch i depends on the settings, the seed and i, and on nothing before it, so a run that is resumed
anywhere sees the same batches as one that never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cometlm.config import CometConfig
from cometlm.data.corpora import text_files
from cometlm.data.hay import (
    FileHay,
    FillerHay,
    MixedHay,
    NumberHay,
    PassageHay,
    StrewnHay,
    WordHay,
    encode,
)
from cometlm.data.passkey import PasskeyTask
from cometlm.data.wordings import TRAINING
from cometlm.train.chunk_plans import Chunking, sentence_ends
from cometlm.train.histories import CHUNKS_BETWEEN
from cometlm.train.stages import ChunkSettings, Gates, Generated, HayShares, Stage

_TEXTS_AT_ONCE = 4
_DRAWS = 8  # of each stage, to see that its shortest samples have room for their words
_LEARNED = 0.25  # share of a text that is learned beside the answers about it
AGAIN = "\n\nOnce more, word for word:\n\n"
Said = tuple[Tensor, Sequence[Sequence[range]]]  # texts [B, N], and where each says its keys


class GeneratedBatches:
    """Passkey samples, texts read twice and plain texts, stage after stage.

    Args:
        sizes: of the memory that reads them.
        per_step: batches that one step of the optimiser takes, on all ranks together.
    """

    def __init__(
        self,
        settings: Generated,
        tokenizer: Any,
        seed: int,
        sizes: CometConfig | None = None,
        per_step: int = 1,
    ) -> None:
        self._per_step = per_step
        self._sizes = CometConfig() if sizes is None else sizes
        self._stages = settings.stages
        self._seed = seed
        prose, programs = (
            [file for name in names for file in text_files(name)]
            for names in (settings.texts, settings.code)
        )
        texts = FileHay(tokenizer, prose)
        code = FileHay(tokenizer, programs) if programs else texts
        self._texts = texts
        self._hay = {
            "texts": texts,
            "code": code,
            "strewn": StrewnHay(tokenizer, MixedHay([texts, code], [1, 1])),
            "numbered": PassageHay(tokenizer, [*prose, *programs]),
            "words": WordHay(tokenizer),
            "filler": FillerHay(tokenizer),
            "same": FillerHay(tokenizer, anywhere=False),
        }
        self._shares = settings.hay
        self._task = PasskeyTask(tokenizer, texts, digits=settings.digits)
        # No random words: their loss, five times that of digits, would drown everything else.
        self._repeated = MixedHay([NumberHay(tokenizer), texts], [3, 1])
        self._again = encode(tokenizer, AGAIN)
        self._vocabulary = len(tokenizer)

    def __len__(self) -> int:
        return sum(stage.steps for stage in self._stages) * self._per_step

    def stage(self, step: int) -> Stage:
        """The stage that a step of the optimiser belongs to."""
        for stage in self._stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self._stages[-1]

    def optimizer_start(self, step: int) -> int:
        """The step, this one or before it, at which its optimiser was new."""
        start = first = 0
        for stage in self._stages:
            if first > step:
                break
            if stage.fresh_optimizer:
                start = first
            first += stage.steps
        return start

    def check(self) -> None:
        """Draw a shortest sample of each stage, so that what is too short is known at once.

        Raises:
            ValueError: names the stage.
        """
        for i, stage in enumerate(self._stages):
            chance = random.Random(f"{self._seed}/check/{i}")
            task = self._task_of(stage)
            with _naming(f"generated.stages.{i}"):
                for _ in range(_DRAWS if stage.passkey else 0):
                    sample = task.draw(chance, stage.tokens[0], asked=stage.ask == "end")
                    if stage.told_weight:
                        self._spelled(sample.key)
                if stage.silent_hay:
                    self._silence()
            gates = stage.gates or Gates()
            if stage.gates:
                with _naming(f"generated.stages.{i}.gates, for each of keys"):
                    _drawn(task, chance, gates.tokens // gates.keys)
            own = self._sizes.chunk_size
            for name, tokens, size in (
                ("history", stage.history, own),
                ("gates.history", gates.history, gates.chunk_size or own),
            ):
                if 0 < tokens < CHUNKS_BETWEEN * size:
                    raise ValueError(
                        f"generated.stages.{i}.{name} must be 0, or at least {CHUNKS_BETWEEN} "
                        f"chunks of {size} tokens, got {tokens}"
                    )

    def __getitem__(self, number: int) -> dict[str, list[list[int]]]:
        """Batch `number`: ids and labels of its rows."""
        chance = random.Random(f"{self._seed}/{number}")
        stage = self.stage(number // self._per_step)
        kind = chance.random()
        length = _drawn_length(chance, stage)
        rows = max(1, stage.batch_tokens // length)
        if kind < stage.passkey:
            task = self._task_of(stage)
            depths = [chance.uniform(*stage.depth) for _ in range(rows)]
            if stage.ask == "borders":
                return self._asked_on_the_way(stage, chance, length, depths)
            made = [task.draw(chance, length, depth=depth) for depth in depths]
            pairs = [(sample.input_ids, sample.labels) for sample in made]
        elif kind < stage.passkey + stage.repeat:
            pairs = [self._twice(chance, length) for _ in range(rows)]
        else:
            texts = [self._texts.draw(chance, length) for _ in range(rows)]
            pairs = [(ids, ids) for ids in texts]
        ids, labels = map(list, zip(*pairs, strict=True))
        return {"input_ids": ids, "labels": labels}

    def hidden_keys(self, step: int) -> Iterator[Said]:
        """Texts with keys in them to fit gates to, as the stage of a step hides them."""
        stage = self.stage(step)
        gates = stage.gates or Gates()
        chance = random.Random(f"{self._seed}/gates/{step}")
        task = self._task_of(stage)
        for _ in range(gates.texts // _TEXTS_AT_ONCE):
            yield _drawn(task, chance, gates.tokens, gates.keys)

    def histories(self, step: int, tokens: int) -> Iterator[Said]:
        """Texts that memories are to have read before a step: hay, and hay with a key somewhere."""
        if not tokens:
            return
        chance = random.Random(f"{self._seed}/histories/{step}")
        task = self._task_of(self.stage(step))
        hay = [task.hay.draw(chance, tokens) for _ in range(_TEXTS_AT_ONCE)]
        yield torch.tensor(hay), [[]] * _TEXTS_AT_ONCE
        yield _drawn(task, chance, tokens)

    def _task_of(self, stage: Stage) -> PasskeyTask:
        return replace(
            self._task,
            hay=self._mixed(stage.hay or self._shares),
            keys=stage.keys,
            distinct=stage.distinct,
            wording=TRAINING.first(stage.wordings, owned=max(stage.keys) > 1),
        )

    def _asked_on_the_way(
        self, stage: Stage, chance: random.Random, length: int, depths: list[float]
    ) -> dict[str, list[Any]]:
        """Texts to learn, and their questions as asides, behind some text to have one length."""
        task = self._task_of(stage)
        made = [task.draw(chance, length, depth=depth, asked=False) for depth in depths]
        turns = [sample.turns[0] for sample in made]
        longest = max(sum(map(len, turn)) for turn in turns)
        room = max(0, min(stage.before_question, self._sizes.chunk_size - longest))
        width = longest + chance.randint(0, room)
        hay = [task.hay.draw(chance, width - sum(map(len, turn))) for turn in turns]
        texts = [sample.text for sample in made]
        told: dict[str, list[Any]] = {
            "told_labels": [self._spelled(sample.key) for sample in made],
            "told_until": [sample.said.stop for sample in made],
            "told_weight": [stage.told_weight],
        }
        if stage.silent_hay:
            told["told_since"] = [sample.said.start for sample in made]
            told["told_otherwise"] = [self._silence()] * len(made)
        return {
            "input_ids": texts,
            "labels": [self._some(text, chance) for text in texts],
            "aside_ids": [h + q + a for h, (q, a) in zip(hay, turns, strict=True)],
            "aside_labels": [[-100] * (width - len(a)) + a for _, a in turns],
            "aside_since": [sample.said.stop for sample in made],
            "aside_weight": [stage.answer_weight],
            **(told if stage.told_weight else {}),
        }

    @cached_property
    def _digits(self) -> frozenset[int]:
        # What tokens say, not how the vocabulary spells them: bytes are spelled in hexadecimal.
        tokens = self._task.tokenizer.batch_decode([[id_] for id_ in range(self._vocabulary)])
        return frozenset(id_ for id_, text in enumerate(tokens) if any(map(str.isdecimal, text)))

    def _some(self, text: list[int], chance: random.Random) -> list[int]:
        """Labels of a part of a text: the head is wide, and answers are what is taught here.

        Digits are left out. Which number comes next cannot be known, and its loss, where numbers
        are many, is most of all that is learned.
        """
        length = round(len(text) * _LEARNED)
        start = chance.randrange(len(text) - length + 1)
        labels = [-100] * len(text)
        for i in range(start, start + length):
            if text[i] not in self._digits:
                labels[i] = text[i]
        return labels

    def _spelled(self, key: str) -> list[int]:
        """A key's tokens over and over, as often as they fit into the readout tokens."""
        ids = encode(self._task.tokenizer, key)
        if len(ids) > self._sizes.global_slots:
            raise ValueError(
                f"stages.told_weight asks {self._sizes.global_slots} readout tokens for the "
                f"{len(ids)} tokens of a key; set told_weight: 0, or fewer generated.digits"
            )
        often, rest = divmod(self._sizes.global_slots, len(ids))
        return ids * often + [-100] * rest

    def _silence(self) -> list[int]:
        """The end of a text, in every readout token."""
        end = self._task.tokenizer.eos_token_id
        if end is None:
            raise ValueError("stages.silent_hay needs a tokenizer that has an eos_token")
        return [end] * self._sizes.global_slots

    def _mixed(self, shares: HayShares) -> MixedHay:
        return MixedHay(list(self._hay.values()), [getattr(shares, name) for name in self._hay])

    def _twice(self, chance: random.Random, length: int) -> tuple[list[int], list[int]]:
        """A text, and the same again to learn; one token longer the first time if need be."""
        half = max(1, (length - len(self._again)) // 2)
        text = self._repeated.draw(chance, length - len(self._again) - half)
        head = text + self._again
        return head + text[:half], [-100] * len(head) + text[:half]


def _drawn(task: PasskeyTask, chance: random.Random, tokens: int, keys: int = 1) -> Said:
    """Some texts with a key in each of their parts."""
    task = replace(task, keys=(1, 1))  # of several, a sample says only where the first one stands
    borders = [tokens * i // keys for i in range(keys + 1)]
    texts: list[list[int]] = []
    places: list[list[range]] = []
    for _ in range(_TEXTS_AT_ONCE):
        parts = [
            task.draw(chance, end - begin, depth=chance.random(), asked=False)
            for begin, end in pairwise(borders)
        ]
        texts.append([id_ for part in parts for id_ in part.text])
        places.append(
            [
                range(begin + part.said.start, begin + part.said.stop)
                for begin, part in zip(borders, parts, strict=False)
            ]
        )
    return torch.tensor(texts), places


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Errors say where in the settings they come from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _drawn_length(chance: random.Random, stage: Stage) -> int:
    """Tokens of a batch's rows; with questions on the way, each octave is as likely as any."""
    if stage.ask == "end":
        return chance.randint(*stage.tokens)
    shortest, longest = stage.tokens
    return round(shortest * (longest / shortest) ** chance.random())


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One generated batch, which comes as the only feature, as tensors [rows, length].

    Raises:
        ValueError: several of them.
    """
    if len(features) != 1:
        raise ValueError(
            f"trainer.per_device_train_batch_size must be 1 for generated batches, which are "
            f"batches already, got {len(features)}; set batch_tokens of the stages"
        )
    (feature,) = features
    return {name: torch.tensor(values) for name, values in feature.items() if values is not None}


def chunking_of(settings: ChunkSettings, tokenizer: Any, seed: int) -> Chunking:
    """The chunk plans that settings name."""
    ends = sentence_ends(tokenizer) if settings.plans.get("sentence_ends") else ()
    chunking = Chunking.of(settings.plans, ends, seed=seed)
    chunking.sizes = settings.sizes
    chunking.strides = settings.strides
    chunking.capacities = settings.capacities
    return chunking
