"""What a method is: it is opened on a model and gives a reader, which reads a text and is asked.

To add a method, write a class with `open`, and a reader, in a file of its own and put it into
`METHODS`, or name it as an entry point of the group `cometlm.methods`.

A budget is in tokens or in bytes. In tokens it says how much of the text a backbone sees at once,
and CoMeT, which holds no tokens, does not obey it. In bytes it says what may be held, and all
methods obey it as far as they can; each one's docstring says what it counts. Not equal then:

- A prompt's keys and values are what `full`, `window`, `truncate`, `retrieve` and `summary` count.
  A token costs the same in all of them: what `full` holds for one.
- `retrieve` holds an index and all token ids besides, which grow with the text; no budget bounds
  them, `nbytes` shows them.
- `comet` counts its memory, and the keys and values of its open chunk, which is run for the first
  question and kept for others. A budget bounds the memory alone; the open chunk comes on top, and
  grows up to `chunk_size` text tokens with their compression tokens. `open_nbytes` says how much of
  `nbytes` it is.
- Nobody counts what is computed in passing: the keys and values to which the open chunk projects
  memory slots, those of a piece of text that `window` reads, or of the prompts by which `summary`
  rewrites. The peak of a process shows them.
- `rmt` and `xl` count as `comet` does. `xl` holds tokens, so a budget in tokens is its capacity.
- `comet` has a trained memory's capacity changed to what fits, also beyond what it was trained at.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cometlm.core.foreseen import Foreseen
from cometlm.methods.loader import Loader
from cometlm.session.plain_text import prefix_ids

_FORESEEN_AT_A_TIME = 256  # tokens that a reader which forgets by length foresees before it reads


class TooLongError(ValueError):
    """A text, with its question and answer, is longer than a method can read."""


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Budget:
    """What may be held of a text.

    Attributes:
        amount: how many, at least 1.
        unit: of what: tokens of a prompt, or bytes.

    Raises:
        ValueError: an amount below 1.
    """

    amount: int
    unit: Literal["tokens", "bytes"] = "tokens"

    def __post_init__(self) -> None:
        if self.amount < 1:
            raise ValueError(f"budget must be at least 1, got {self.amount}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget as people write it: "512" tokens, "3MB", "1.5 GiB".

        Raises:
            ValueError: something else.
        """
        number = text.strip().rstrip("BGIKMbgikm")
        unit = text.strip()[len(number) :].casefold()
        try:
            if not unit:
                return cls(int(number))
            return cls(int(float(number) * _UNITS[unit]), "bytes")
        except (KeyError, OverflowError) as error:
            raise ValueError(_no_budget(text)) from error
        except ValueError as error:
            if str(error).startswith("budget"):
                raise
            raise ValueError(_no_budget(text)) from error

    @property
    def plain(self) -> int | str:
        """As settings of rows say it: a number is of tokens; of bytes it is "N bytes"."""
        return self.amount if self.unit == "tokens" else f"{self.amount} bytes"

    def tokens(self, bytes_per_token: int) -> int:
        """Tokens that it allows.

        Raises:
            ValueError: not one.
        """
        if self.unit == "tokens":
            return self.amount
        if self.amount < bytes_per_token:
            raise ValueError(
                f"budget must be at least {bytes_per_token} bytes, the keys and values of a token, "
                f"got {self.amount}"
            )
        return self.amount // bytes_per_token


def _no_budget(text: str) -> str:
    return f"budget must be tokens like 512, or bytes like 3MB or 1.5GiB, got {text!r}"


@dataclass(frozen=True)
class Bounds:
    """Tokens that a reader deals with at most, however long a text is; None: with more and more.

    Attributes:
        asked: that an answer reads, or looks at.
        held: behind which what is held does not grow, an open chunk apart.
        chunk: that are run together when more follows; an answer runs what is behind the last of
            these. 0: everything is run when it is read.
        overlap: that each chunk runs again of the one before it; the first has so many more.
    """

    asked: int | None = None
    held: int | None = None
    chunk: int = 0
    overlap: int = 0

    def run(self, tokens: float) -> float:
        """Those of a text's tokens that reading it runs."""
        if not self.chunk:
            return tokens
        chunks = math.ceil((tokens - self.overlap) / self.chunk)
        return max(0, chunks - 1) * self.chunk  # the last is open

    def left(self, tokens: float) -> float:
        """Those that an answer deals with."""
        if self.chunk:
            return tokens - self.run(tokens)
        return tokens if self.asked is None else min(tokens, self.asked)


UNBOUNDED = Bounds()


class Reader(ABC):
    """Reads one text as it comes and can be asked about it at any time.

    The text begins with what the tokenizer puts in front of texts, a beginning-of-text token maybe:
    `parted` tells it from the rest.

    Attributes:
        tokenizer: whose ids it reads.
    """

    tokenizer: Any

    @abstractmethod
    def read(self, ids: Sequence[int]) -> None:
        """Read on.

        Raises:
            TooLongError: the method cannot read as much.
        """

    def read_question(self, ids: Sequence[int]) -> None:
        """Read a question whose answer comes next; like any text, unless a method says else.

        Raises:
            TooLongError: as `read`.
        """
        self.read(ids)

    def check_room(self, tokens: int) -> None:  # noqa: B027 (most methods have room for any text)
        """Say before anything is read whether so many more tokens can be.

        Args:
            tokens: of text, question and answer together.

        Raises:
            TooLongError: they cannot.
        """

    def check_asked(self, tokens: int) -> None:  # noqa: B027 (most have room for any question)
        """Say before anything is read whether a question has room, however short the text is.

        Args:
            tokens: of question and answer together.

        Raises:
            TooLongError: it has none.
        """

    @abstractmethod
    def fork(self) -> Reader:
        """A reader that goes its own way from here; this one stays as it is."""

    @abstractmethod
    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """Write what follows, without special tokens; the reader stays as it is.

        Args:
            ids: a question to read first.
            generation: options of transformers' `generate`; 256 new tokens, greedily, unless they
                say.

        Raises:
            ValueError: nothing was read.
            TooLongError: there is no room for the question and the answer.
        """

    @abstractmethod
    def foresee(self, ids: Sequence[int]) -> list[Foreseen]:
        """How likely each of these ids is to come next; the reader stays as it is.

        Raises:
            ValueError: nothing was read.
            TooLongError: as `read`.
        """

    def read_foreseen(self, ids: Sequence[int]) -> list[Foreseen]:
        """Read on, and say of each id how likely it was, after all that stood before it.

        Raises:
            ValueError: nothing was read.
            TooLongError: as `read`.
        """
        found: list[Foreseen] = []
        for begin in range(0, len(ids), self._foreseen_at_a_time):
            piece = ids[begin : begin + self._foreseen_at_a_time]
            found += self.foresee(piece)
            self.read(piece)
        return found

    @property
    def _foreseen_at_a_time(self) -> int:
        """Tokens that `read_foreseen` foresees together; at most half of what an answer sees."""
        asked = self.bounds.asked
        return (
            _FORESEEN_AT_A_TIME if asked is None else max(1, min(_FORESEEN_AT_A_TIME, asked // 2))
        )

    def loglikelihood(self, ids: Sequence[int]) -> list[float]:
        """Log-probability, in nats, of each of these ids coming next; see `foresee`."""
        return [token.loglikelihood for token in self.foresee(ids)]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are held of what was read: a memory, or keys and values."""

    @property
    def open_nbytes(self) -> int:
        """Those of them that are an open chunk's, which no budget bounds; 0 of most methods."""
        return 0

    @property
    def bounds(self) -> Bounds:
        """What does not grow with the text, by which a forecast goes; all does, unless it says."""
        return UNBOUNDED


class Method(ABC):
    """A way to read a long text and answer about it."""

    @classmethod
    @abstractmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> Reader:
        """A reader that has read nothing; its forks read one text each.

        Args:
            loader: loads the model.
            budget: what may be held, in tokens or in bytes; None is as much as the model has
                positions for. The method's docstring says how it obeys.

        Raises:
            ValueError: a model that the method cannot use, a budget out of its bounds.
            OSError: the model cannot be read.
        """


def parted(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer begins a text with, if it begins so, and the others.

    A method that reads a part of a text anew puts the first ones in front of it.
    """
    first = prefix_ids(tokenizer) if tokenizer is not None else []
    begun = len(first) if list(ids[: len(first)]) == first else 0
    return list(ids[:begun]), list(ids[begun:])


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options for `generate`: greedy and of bounded length, unless they say."""
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": 256, **given}
