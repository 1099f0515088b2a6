"""What a method is: it is opened on a model and gives a reader, which reads a text and is asked.

To add a method, write a class with `open`, and a reader, in a file of its own and put it into
`METHODS`, or name it as an entry point of the group `cometlm.methods`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from cometlm.methods.loader import Loader


class TooLongError(ValueError):
    """A text, with its question and answer, is longer than a method can read."""


class Reader(ABC):
    """Reads one text as it comes and can be asked about it at any time.

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
    def loglikelihood(self, ids: Sequence[int]) -> list[float]:
        """Log-probability, in nats, of each of these ids coming next; the reader stays as it is.

        Raises:
            ValueError: nothing was read.
            TooLongError: as `read`.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are held of what was read: a memory, or keys and values."""


class Method(ABC):
    """A way to read a long text and answer about it."""

    @classmethod
    @abstractmethod
    def open(cls, loader: Loader, budget: int | None = None) -> Reader:
        """A reader that has read nothing; its forks read one text each.

        Args:
            loader: loads the model.
            budget: tokens whose keys and values may be held, for methods that can hold more or
                fewer; None is as many as the model has positions.

        Raises:
            ValueError: a model that the method cannot use, a budget out of its bounds.
            OSError: the model cannot be read.
        """


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options for `generate`: greedy and of bounded length, unless they say."""
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": 256, **given}
