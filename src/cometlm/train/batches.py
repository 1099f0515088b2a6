"""Generated training batches: rows of one length, made from their number alone.

Batch i depends on the settings, the seed and i, and on nothing before it, so a run that is resumed
anywhere sees the same batches as one that never stopped.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from cometlm.chunking import Chunking, sentence_ends
from cometlm.data.hay import FileHay, FillerHay, MixedHay, NumberHay, WordHay, encode
from cometlm.data.passkey import TRAINING, PasskeyTask
from cometlm.data.texts import text_files
from cometlm.train.config import ChunkSettings, Generated, HayShares, Stage

AGAIN = "\n\nOnce more, word for word:\n\n"


class GeneratedBatches:
    """Passkey samples, texts read twice and plain texts, stage after stage."""

    def __init__(self, settings: Generated, tokenizer: Any, seed: int) -> None:
        self._stages = settings.stages
        self._seed = seed
        texts = FileHay(tokenizer, [f for name in settings.texts for f in text_files(name)])
        code = [f for name in settings.code for f in text_files(name)]
        self._texts = texts
        self._hay = {
            "texts": texts,
            "code": FileHay(tokenizer, code) if code else texts,
            "words": WordHay(tokenizer),
            "filler": FillerHay(tokenizer),
            "same": FillerHay(tokenizer, anywhere=False),
        }
        self._shares = settings.hay
        self._task = PasskeyTask(tokenizer, texts, digits=settings.digits)
        # No random words: their loss, five times that of digits, would drown everything else.
        self._repeated = MixedHay([NumberHay(tokenizer), texts], [3, 1])
        self._again = encode(tokenizer, AGAIN)

    def __len__(self) -> int:
        return sum(stage.steps for stage in self._stages)

    def stage(self, number: int) -> Stage:
        """The stage that batch `number` belongs to."""
        for stage in self._stages:
            if number < stage.steps:
                return stage
            number -= stage.steps
        return self._stages[-1]

    def __getitem__(self, number: int) -> dict[str, list[list[int]]]:
        """Batch `number`: ids and labels of its rows."""
        chance = random.Random(f"{self._seed}/{number}")
        stage = self.stage(number)
        kind = chance.random()
        length = chance.randint(*stage.tokens)
        rows = max(1, stage.batch_tokens // length)
        if kind < stage.passkey:
            task = replace(
                self._task,
                hay=self._mixed(stage.hay or self._shares),
                keys=stage.keys,
                distinct=stage.distinct,
                wording=TRAINING.first(stage.wordings),
            )
            depths = [chance.uniform(*stage.depth) for _ in range(rows)]
            made = [task.draw(chance, length, depth=depth) for depth in depths]
            pairs = [(sample.input_ids, sample.labels) for sample in made]
        elif kind < stage.passkey + stage.repeat:
            pairs = [self._twice(chance, length) for _ in range(rows)]
        else:
            texts = [self._texts.draw(chance, length) for _ in range(rows)]
            pairs = [(ids, ids) for ids in texts]
        ids, labels = map(list, zip(*pairs, strict=True))
        return {"input_ids": ids, "labels": labels}

    def _mixed(self, shares: HayShares) -> MixedHay:
        return MixedHay(list(self._hay.values()), [getattr(shares, name) for name in self._hay])

    def _twice(self, chance: random.Random, length: int) -> tuple[list[int], list[int]]:
        """A text, and the same again to learn; one token longer the first time if need be."""
        half = max(1, (length - len(self._again)) // 2)
        text = self._repeated.draw(chance, length - len(self._again) - half)
        head = text + self._again
        return head + text[:half], [-100] * len(head) + text[:half]


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One generated batch, which comes as the only feature, as tensors [rows, length]."""
    (feature,) = features
    return {name: torch.tensor(feature[name]) for name in ("input_ids", "labels")}


def chunking_of(settings: ChunkSettings, tokenizer: Any, seed: int) -> Chunking:
    """The chunk plans that settings name."""
    ends = sentence_ends(tokenizer) if settings.plans.get("sentence_ends") else ()
    chunking = Chunking.of(settings.plans, ends, seed=seed)
    chunking.sizes = settings.sizes
    chunking.strides = settings.strides
    chunking.capacities = settings.capacities
    return chunking
