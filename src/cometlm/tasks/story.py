"""Sentences told somewhere in real text: what tasks that hide something have in common."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from cometlm.data.corpora import corpus_files
from cometlm.tasks.base import Split, Task
from cometlm.tasks.haystack import Haystack, hide

CORPORA_OF: dict[Split, tuple[str, ...]] = {
    "train": ("anarchism", "austen", "perl"),
    "test": ("austen-test", "bible", "python"),
}
DECILES = 10
_FRAMES = ("\n\n{}\n\n", " {} ", "\n{}\n")


class StoryTask(Task):
    """A task whose sentences stand in real text.

    Args:
        tokenizer, split, seed: see `Task`.
        corpora: names that `corpus_files` knows, taken in turn. Default: those of the split.

    Raises:
        OSError: when sampling, a corpus that cannot be fetched.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        corpora: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        self.corpora = [corpora] if isinstance(corpora, str) else list(corpora or CORPORA_OF[split])
        self._haystack = cache(lambda name: Haystack(tokenizer, corpus_files(name)))

    def haystack(self, number: int) -> tuple[str, Haystack]:
        """The corpus whose turn it is, and its name."""
        name = self.corpora[number % len(self.corpora)]
        return name, self._haystack(name)

    def needle(self, rng: random.Random, sentence: str) -> list[int]:
        """Ids of a sentence, as a paragraph or a line of its own, or within one."""
        return self.encode(rng.choice(_FRAMES).format(sentence))

    def tell(
        self,
        running: Sequence[int],
        needles: Sequence[Sequence[int]],
        depths: Sequence[float],
        tokens: int,
    ) -> tuple[list[int], list[range]]:
        """A context of exactly `tokens` tokens, and where each needle stands in it.

        Args:
            running: real text, at least as long as what the needles leave.
            needles: ids of sentences; those of the same depth keep their order.
            depths: where each belongs, 0 (start of the text) … 1 (end).
            tokens: of the context.

        Raises:
            ValueError: `tokens` is too few for the needles.
        """
        return hide(self.tokenizer, running[: room_beside(needles, tokens)], needles, depths)


def room_beside(needles: Sequence[Sequence[int]], tokens: int) -> int:
    """Tokens that some needles leave.

    Raises:
        ValueError: they leave less than none.
    """
    left = tokens - sum(map(len, needles))
    if left < 0:
        raise ValueError(f"tokens must be at least {tokens - left}, got {tokens}")
    return left


def num_fitting(needles: Sequence[Sequence[int]], tokens: int, least: int) -> int:
    """How many of the first needles fit into so many tokens, `least` of them whatever comes."""
    count, used = 0, 0
    for needle in needles:
        used += len(needle)
        if used > tokens and count >= least:
            break
        count += 1
    return count


def decile(where: range, tokens: int) -> int:
    """In which tenth of a context of so many tokens something begins, 0 … 9."""
    return min(DECILES - 1, where.start * DECILES // tokens)


def in_order(rng: random.Random, count: int) -> list[float]:
    """So many depths, the first one the smallest."""
    return sorted(rng.random() for _ in range(count))


def filled(rng: random.Random, templates: Sequence[str], fields: Mapping[str, str]) -> str:
    """One of some templates, with its fields filled in; it begins with a capital letter."""
    return capital(rng.choice(templates).format(**fields))


def bounds(name: str, value: int | Sequence[int], most: int, least: int = 1) -> tuple[int, int]:
    """The fewest and the most that an option says.

    Raises:
        ValueError: names the option and its bounds.
    """
    given: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
    whole = len(given) == 2 and all(map(is_whole, given))
    if not whole or not least <= given[0] <= given[1] <= most:
        raise ValueError(
            f"{name} must be one or two numbers in {least} … {most}, in order, got {value!r}"
        )
    return given[0], given[1]


def is_whole(value: object) -> bool:
    """Whether an option's value is a whole number, and not yes or no."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_share(name: str, value: float) -> float:
    """A share that an option says.

    Raises:
        ValueError: names the option and its bounds.
    """
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ValueError(f"{name} must lie in 0 … 1, got {value!r}")
    return value


def capital(sentence: str) -> str:
    """A sentence that begins with a capital letter."""
    return sentence[:1].upper() + sentence[1:]
