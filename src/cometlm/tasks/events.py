"""Logs: lines that say when somebody did something, and what can be asked of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from cometlm.tasks.base import Split


class Event(Protocol):
    """What a line tells, and more that its log knows."""

    @property
    def time(self) -> datetime:
        """When it happened."""

    @property
    def who(self) -> str:
        """Who did it, as the line and questions name him or her."""


E = TypeVar("E", bound=Event)
Told = Sequence[tuple[E, range]]  # events in the order of their lines, and where these stand


@dataclass(frozen=True)
class Answer:
    """What may be asked of a log, and its answer.

    Attributes:
        kind: of question.
        who: whom it is about.
        said: each of them is right; the first one is taught.
        evidence: lines that it is found from.
        fields: what else the question names.
    """

    kind: str
    who: str
    said: tuple[str, ...]
    evidence: tuple[range, ...]
    fields: Mapping[str, str] = field(default_factory=dict)


class Log(ABC, Generic[E]):
    """Where events come from, how a line tells them, and what is asked.

    Args:
        split: whose people and templates these are.

    Attributes:
        kinds: of questions.
        asked: ways to ask each kind, with the fields `who` and those of an `Answer`.
    """

    kinds: tuple[str, ...]
    asked: Mapping[Split, Mapping[str, tuple[str, ...]]]

    def __init__(self, split: Split) -> None:
        self.split = split

    @abstractmethod
    def events(self, rng: random.Random, people: int) -> Iterator[E]:
        """Events of so many people, those first that have to be in a short log.

        They need not come in the order of time; where theirs end, those of others may follow.
        """

    @abstractmethod
    def line(self, event: E) -> str:
        """What a log says of an event, with the end of the line."""

    @abstractmethod
    def answers(self, kind: str, who: str, own: Told[E]) -> Iterator[Answer]:
        """What can be asked about a person and has one answer.

        Args:
            kind: one of `kinds`.
            own: all of the person's events in the log.
        """


_NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
)  # fmt: skip


def number(count: int) -> tuple[str, ...]:
    """How one may say a number."""
    spelled = (_NUMBERS[count],) if count < len(_NUMBERS) else ()
    return (str(count), *spelled)


def day(time: datetime, form: str) -> tuple[str, ...]:
    """How one may say a day; first as `form` has it."""
    told = f"{time.day} {time:%B %Y}"
    others = (told, f"{time:%B} {time.day}, {time.year}", f"{time:%Y-%m-%d}", f"{time:%d %b %Y}")
    return tuple(dict.fromkeys([time.strftime(form), *others]))


def most_common(values: Iterable[str]) -> str | None:
    """What is there most often, if it is there more than once and no other as often."""
    ranked = Counter(values).most_common(2)
    if not ranked or ranked[0][1] == 1 or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def places(told: Told[E]) -> tuple[range, ...]:
    """Where the lines of events stand."""
    return tuple(where for _, where in told)
