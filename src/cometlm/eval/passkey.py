"""Passkey retrieval: is a number found again, wherever it stood in a text of some length?

A measurement is a grid of lengths and depths. For each length some texts are read; in each of them
a key is hidden ten times, once per decile of depth, with a wording of its own. What stands before
a key is read only once, and the session forked there. Each trial is also asked with one half of the
memory taken away right before the question, which shows which half carries the answer.

Keys, hay (`data.texts`) and wording (`data.wordings.MEASURING`) are none that were trained with.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cometlm.data.corpora import text_files
from cometlm.data.hay import FileHay, Hay
from cometlm.data.passkey import PasskeySample, PasskeyTask
from cometlm.data.wordings import MEASURING
from cometlm.session.session import Session

HAY = ("austen-test", "bible", "python")  # taken in turn
DECILES = 10
VARIANTS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "without_global": ("global",),
    "without_temporary": ("temporary",),
}


@dataclass(frozen=True)
class Trial:
    """One key, asked for.

    Attributes:
        length: most tokens of the text, the question and the answer.
        text: which of the texts of that length.
        hay: where it is from.
        decile: of the depth, 0 … 9.
        depth: of the key, 0 (start) … 1.
        key: what was hidden.
        answers: what each of `VARIANTS` said.
    """

    length: int
    text: int
    hay: str
    decile: int
    depth: float
    key: str
    answers: dict[str, str]

    @property
    def cell(self) -> tuple[int, int, int]:
        """What identifies the trial in a measurement."""
        return self.length, self.text, self.decile

    def hit(self, variant: str = "whole") -> bool:
        """Whether the whole key was said, and nothing else."""
        return self.answers[variant] == self.key

    def digits(self, variant: str = "whole") -> float:
        """Share of the key's digits that are right, place by place."""
        said = self.answers[variant].ljust(len(self.key))
        return sum(a == b for a, b in zip(self.key, said, strict=False)) / len(self.key)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PasskeyTest:
    """What is measured.

    Args:
        length: most tokens of the text, the question and the answer.
        texts: how many texts.
        deciles: at which depths.
        hay: names that `data.texts` knows, taken in turn.
        digits: shortest and longest key.
        seed: of keys, places and wordings.
        jitter: most tokens by which a text is shorter, so that questions stand anywhere in a chunk.
    """

    length: int
    texts: int = 4
    deciles: Sequence[int] = tuple(range(DECILES))
    hay: Sequence[str] = HAY
    digits: tuple[int, int] = (5, 5)
    seed: int = 0
    jitter: int = 256

    def cells(self) -> list[tuple[int, int, int]]:
        """All trials that `run` makes; those of one text come as their keys stand in it."""
        return [(self.length, text, d) for text in range(self.texts) for d in self.deciles]

    def run(
        self, model: Any, tokenizer: Any, skip: frozenset[Any] = frozenset()
    ) -> Iterator[Trial]:
        """Each trial as it is done.

        Args:
            skip: cells that are done already.

        Raises:
            ValueError: `length` is too short for a key and a question.
            OSError: a text cannot be fetched.
        """
        for text in range(self.texts):
            wanted = [d for d in self.deciles if (self.length, text, d) not in skip]
            if wanted:
                yield from self._run_text(model, tokenizer, text, wanted)

    def _run_text(
        self, model: Any, tokenizer: Any, text: int, deciles: Sequence[int]
    ) -> Iterator[Trial]:
        name = self.hay[text % len(self.hay)]
        hay = FileHay(tokenizer, text_files(name))
        straw = hay.draw(random.Random(f"{self.seed}/{self.length}/{text}"), self.length)
        task = PasskeyTask(tokenizer, _StartOf(straw), MEASURING, digits=self.digits)
        made = [(decile, self._draw(task, text, decile)) for decile in deciles]
        # As they branch off: texts differ in length, so that a later decile may come first.
        made.sort(key=lambda one: _shared(one[1].text, straw))
        base, done = Session(model, tokenizer), 0
        for decile, sample in made:
            shared = _shared(sample.text, straw)
            base.read(straw[done:shared])
            done = shared
            fork = base.fork()
            fork.read(sample.text[done:])
            answers = {name: said(fork, sample, gone) for name, gone in VARIANTS.items()}
            yield Trial(self.length, text, name, decile, sample.depth, sample.key, answers)

    def _draw(self, task: PasskeyTask, text: int, decile: int) -> PasskeySample:
        chance = random.Random(f"{self.seed}/{self.length}/{text}/{decile}")
        depth = (decile + chance.random()) / DECILES
        tokens = self.length - chance.randint(0, min(self.jitter, self.length // 4))
        return task.draw(chance, tokens, depth=depth)


def said(session: Session, sample: PasskeySample, without: Sequence[str] = ()) -> str:
    """What a session that has read a sample's text answers, greedily; it stays as it is.

    Args:
        without: halves of the memory to take away first.
    """
    fork = session.fork(without=without)
    fork.pose(sample.turns[0][0])
    ids = fork.continuation(len(sample.answer) + 2)
    text: str = session.tokenizer.decode(ids)
    end: str = session.tokenizer.decode(sample.answer[-1:])
    return text.partition(end)[0].strip()


def interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share that 95% of repetitions would lie in (Wilson's).

    Raises:
        ValueError: no trials.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    share, square = hits / total, z * z / total
    middle = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    low, high = ((middle + sign * spread) / (1 + square) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding aside


class _StartOf(Hay):
    """The beginning of one text, whatever the generator says."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        return self._ids[:tokens]


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(ids), len(others)))
