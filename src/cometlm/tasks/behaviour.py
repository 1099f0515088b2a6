"""Behaviour: what customers did first, last, how often, most of all: a log is the text.

The log is a shop's that is made up (`tasks.shop`), or one that was kept (`tasks.logs`). Answers are
computed from it. A text of any length is all log, so that what is asked is far back, near, or
spread over everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from cometlm.tasks.base import Question, Sample, Split, Task
from cometlm.tasks.events import Answer, Log, Told
from cometlm.tasks.logs import Clicks, Purchases, Ratings
from cometlm.tasks.scoring import found
from cometlm.tasks.shop import Shop
from cometlm.tasks.story import bounds

Data = Literal["shop", "purchases", "ratings", "clicks"]
DATA: tuple[Data, ...] = get_args(Data)
MOST = 12  # customers, and questions of each kind about each of them
_KEPT: dict[Data, Callable[[Split, Path | None], Log[Any]]] = {
    "purchases": Purchases,
    "ratings": Ratings,
    "clicks": Clicks,
}


class Behaviour(Task):
    """What customers did.

    Args:
        tokenizer, split, seed: see `Task`.
        data: "shop" (made up, as long as is asked for), or a log that was kept: "purchases" (of
            CDs), "ratings" (of films), "clicks" (on a shop's pages). People of such a log belong to
            the split of their names.
        customers: how many, or their fewest and most. A log that was kept goes on with others where
            all that these did has been told.
        questions: how many are asked at most, each of another customer or of another kind.
        kinds: which kinds of questions; all of the log's if empty.
        folder: where the data of a log that was kept lie, instead of where they are installed.

    Raises:
        ValueError: an option out of its bounds.
        OSError: data are not there; says what to install.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        data: Data = "shop",
        customers: int | Sequence[int] = (2, 5),
        questions: int = 3,
        kinds: str | Sequence[str] = (),
        folder: str | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        if data not in DATA:
            raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
        if folder is not None and data == "shop":
            raise ValueError(f"folder must come with a log that was kept, got {folder} for shop")
        place = None if folder is None else Path(folder)
        self.log: Log[Any] = Shop(split) if data == "shop" else _KEPT[data](split, place)
        self.customers = bounds("customers", customers, MOST)
        self.questions = bounds("questions", questions, MOST * len(self.log.kinds))[0]
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds) or self.log.kinds
        for kind in self.kinds:
            if kind not in self.log.kinds:
                raise ValueError(f"kinds must be of {', '.join(self.log.kinds)}, got {kind!r}")

    def sample(self, index: int, tokens: int) -> Sample:
        """A log of at most `tokens` tokens; see `Task.sample`.

        Its `meta` says how many `customers` and `events` there are; a question's, its `kind`.
        """
        rng = self.rng(index)
        lines: list[tuple[Any, list[int]]] = []
        length = 0
        for event in self.log.events(rng, rng.randint(*self.customers)):
            ids = self.encode(self.log.line(event))
            # What is too short goes on until something can be asked, to say what it takes.
            if length + len(ids) > tokens and any(self._answers(_told(lines)[1])):
                break
            lines.append((event, ids))
            length += len(ids)
        if length > tokens:
            raise ValueError(f"tokens must be at least {length}, got {tokens}")
        context, told = _told(lines)
        known: dict[tuple[str, str], list[Answer]] = {}
        for answer in self._answers(told):
            known.setdefault((answer.who, answer.kind), []).append(answer)
        questions = []
        for chosen in rng.sample(list(known), min(self.questions, len(known))):
            answer = rng.choice(known[chosen])
            text = rng.choice(self.log.asked[self.split][answer.kind])
            text = text.format(who=answer.who, **answer.fields)
            meta = {"kind": answer.kind}
            questions.append(Question(text, answer.said, evidence=answer.evidence, meta=meta))
        people = {event.who for event, _ in told}
        return Sample(context, tuple(questions), {"customers": len(people), "events": len(told)})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """`exact`, and `found`: whether an answer was said, maybe in a sentence."""
        return {**super().score(question, said), "found": found(said, question.answers)}

    def _answers(self, told: Told[Any]) -> Iterator[Answer]:
        """Everything that can be asked of a log and has one answer."""
        people: dict[str, list[tuple[Any, range]]] = {}
        for event, where in told:
            people.setdefault(event.who, []).append((event, where))
        for who, own in people.items():
            for kind in self.kinds:
                yield from self.log.answers(kind, who, own)


def _told(lines: list[tuple[Any, list[int]]]) -> tuple[list[int], Told[Any]]:
    """Lines in the order of time, and where each stands."""
    context: list[int] = []
    told = []
    for event, ids in sorted(lines, key=lambda line: line[0].time):
        told.append((event, range(len(context), len(context) + len(ids))))
        context += ids
    return context, told
