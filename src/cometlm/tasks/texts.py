"""Tasks whose texts have lengths of their own: none is cut."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import Any

from cometlm.tasks.base import Question, Sample, Split, Task


@dataclass(frozen=True)
class Text:
    """A context and what is asked about it; see `Sample`."""

    context: str
    questions: tuple[Question, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


class TextsTask(Task):
    """Texts that are as long as they are.

    In the split "test" sample i is text i, and there are as many samples as texts. In "train" there
    are as many as are asked for, each a text that fits.

    Args:
        tokenizer, split, seed: see `Task`.
        texts: at least one.
        max_tokens: texts with more are left out; None: none is.

    Raises:
        ValueError: no text has so few tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[Text],
        *,
        split: Split = "test",
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        self._texts = list(texts)
        self._most = max_tokens
        self._lengths: dict[int, int] = {}
        kept = None if split == "test" else 8  # a training split may be larger than the memory
        self._ids = lru_cache(kept)(self._encoded)
        if split == "test":
            lengths = [self._length(i) for i in range(len(self._texts))]
            self._numbers = [i for i, length in enumerate(lengths) if self._is_taken(length)]
            if not self._numbers:
                raise ValueError(f"max_tokens must be at least {min(lengths)}, got {max_tokens}")
            self.num_samples = len(self._numbers)
            self.longest = max(lengths[i] for i in self._numbers)

    def sample(self, index: int, tokens: int) -> Sample:
        """See `Task.sample`; a text is not cut.

        Raises:
            ValueError: the text has more tokens; there is no such sample.
        """
        if self.split == "train":
            return self._made(self._drawn(index, tokens))
        if not 0 <= index < len(self._numbers):
            raise ValueError(f"index must lie in 0 … {len(self._numbers) - 1}, got {index}")
        number = self._numbers[index]
        if (length := self._length(number)) > tokens:
            raise ValueError(f"tokens must be at least {length}, got {tokens}")
        return self._made(number)

    def usual_length(self, tokens: int) -> float:
        """See `Task.usual_length`; the mean of the texts that are so short."""
        if self.split == "train":
            return tokens  # of the largest splits not all texts are encoded
        lengths = [self._length(i) for i in self._numbers if self._length(i) <= tokens]
        return fmean(lengths) if lengths else tokens

    def _drawn(self, index: int, tokens: int) -> int:
        """A text that fits."""
        order = list(range(len(self._texts)))
        self.rng(index).shuffle(order)
        for number in order:
            if self._length(number) <= tokens and self._is_taken(self._length(number)):
                return number
        raise ValueError(f"tokens must be at least {min(self._lengths.values())}, got {tokens}")

    def _is_taken(self, length: int) -> bool:
        return self._most is None or length <= self._most

    def _made(self, number: int) -> Sample:
        text = self._texts[number]
        return Sample(self._ids(number).tolist(), text.questions, text.meta)

    def _length(self, number: int) -> int:
        if number not in self._lengths:
            self._lengths[number] = len(self._ids(number))
        return self._lengths[number]

    def _encoded(self, number: int) -> array[int]:
        return array("I", self.encode(self._texts[number].context))
