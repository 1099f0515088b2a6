"""What a task is: samples of one shape, to train on and to measure with.

A sample is a context and questions about it, or a context alone. A question may be asked anywhere
in the context; what is read later plays no part then. The same sample trains a memory
(`train.mixture`) and measures any method (`eval.runner`). To add a task, write a class with
`sample` in a file of its own and put it into `TASKS`, or name it as an entry point of the group
`cometlm.tasks`.
"""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from cometlm.session.chat_template import render_turn
from cometlm.session.plain_text import PlainText, prefix_ids
from cometlm.tasks.scoring import exact

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
_OF_TEST = 5  # one name in so many


def split_of(name: str) -> Split:
    """The split that a document or a person belongs to by name, the same on every machine."""
    return "test" if zlib.crc32(name.encode()) % _OF_TEST == 0 else "train"


@dataclass(frozen=True)
class Question:
    """A question about what was read.

    Attributes:
        text: as a user would type it.
        answers: each of them is right; the first one is taught.
        after: tokens of the context that have been read when it is asked; None: all of them.
        evidence: where in the context its answer stands, in tokens; empty where it is not said.
        until: tokens of the context up to which the answers are right; None: all of them.
        answer_prefix: how the answer begins; it is given away, and answers go on from it.
        max_new_tokens: of an answer at most; None: what the right one takes, and some more.
        meta: what a report may group by, beside the sample's.
    """

    text: str
    answers: tuple[str, ...]
    after: int | None = None
    evidence: tuple[range, ...] = ()
    until: int | None = None
    answer_prefix: str = ""
    max_new_tokens: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def moved(self, tokens: int) -> Question:
        """The same question where so many tokens stand in front of the context."""
        return replace(
            self,
            after=None if self.after is None else self.after + tokens,
            evidence=tuple(range(one.start + tokens, one.stop + tokens) for one in self.evidence),
            until=None if self.until is None else self.until + tokens,
        )


@dataclass(frozen=True)
class Sample:
    """A text and what is asked about it.

    Attributes:
        context: token ids of the text.
        questions: in the order in which they are asked; none where the text itself is learned.
        meta: what a report may group by, such as depth or kind.
    """

    context: list[int]
    questions: tuple[Question, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def begun(self, tokenizer: Any) -> Sample:
        """The sample as a text of its own: behind the tokens that a tokenizer begins texts with.

        Contexts come without these, since they may follow something. Models that were pretrained
        with a beginning-of-text token (Gemma, Llama) are lost without it.
        """
        first = prefix_ids(tokenizer)
        if not first:
            return self
        questions = tuple(question.moved(len(first)) for question in self.questions)
        return replace(self, context=[*first, *self.context], questions=questions)


class Task(ABC):
    """Makes samples, and judges answers.

    Sample i depends on the split, the seed and i, and on nothing before it. Train and test share no
    names, templates, sentences or documents.

    Args:
        tokenizer: whose ids contexts are made of.
        split: "train" or "test".
        seed: of everything that is drawn.

    Attributes:
        num_samples: how many samples there are; None: as many as are asked for.
        longest: tokens of the longest context, of a task whose texts have their own lengths; None:
            they are made as long as is asked for.
        lacking: of several data that samples are made of, those that cannot be had, and why; the
            others are taken.

    Raises:
        ValueError: another split.
    """

    num_samples: int | None = None
    longest: int | None = None
    lacking: Mapping[str, Exception] = MappingProxyType({})

    def __init__(self, tokenizer: Any, *, split: Split = "test", seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.tokenizer = tokenizer
        self.split = split
        self.seed = seed

    @abstractmethod
    def sample(self, index: int, tokens: int) -> Sample:
        """Sample `index`, with a context of at most `tokens` tokens, and close to it.

        Raises:
            ValueError: `tokens` is too few for what has to stand in it.
        """

    @property
    def fills(self) -> bool:
        """Whether contexts are meant to have nearly as many tokens as are asked for."""
        return self.longest is None

    def usual_length(self, tokens: int) -> float:
        """Tokens of a context, on average, where as many as `tokens` are asked for."""
        return tokens

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is: figures between 0 and 1 by name; here, whether it is the same."""
        return {"exact": exact(said, question.answers)}

    def rng(self, index: int) -> random.Random:
        """The generator that sample `index` is drawn with."""
        return random.Random(f"{type(self).__name__}/{self.split}/{self.seed}/{index}")

    def encode(self, text: str) -> list[int]:
        """Ids of text in the middle of a document: no special tokens around it, and none in it."""
        return PlainText.of(self.tokenizer).encode(text)


def turn_ids(
    tokenizer: Any, question: str, answer: str | None = None, first: bool = True
) -> tuple[list[int], list[int]]:
    """A question in the tokenizer's chat template, behind a text, and its answer.

    Args:
        answer: what is answered; None for the question alone.
        first: whether no question was asked before.

    Returns:
        Ids up to the head of the answer, and ids of the answer with the token that ends it.
    """
    turn = render_turn(tokenizer, question, first=first, began=True)
    # What follows the answer up to its end-of-turn token belongs to it: it says when to stop.
    # The rest of the frame, if any, stands in front of the next question.
    end, *rest = turn.closing_ids
    asked = turn.opening_ids if first else [*rest, *turn.opening_ids]
    if answer is None:
        return asked, []
    return asked, [*PlainText.of(tokenizer).encode(answer), end]


def asked_ids(tokenizer: Any, question: Question) -> list[int]:
    """A question in the tokenizer's chat template, up to where it is answered."""
    asked, _ = turn_ids(tokenizer, question.text)
    return [*asked, *PlainText.of(tokenizer).encode(question.answer_prefix)]


def asked_at_the_end(questions: Sequence[Question]) -> list[Question]:
    """Those of the questions that are asked when everything has been read."""
    return [question for question in questions if question.after is None]
