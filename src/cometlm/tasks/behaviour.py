"""Behaviour: the log of a shop, and what its customers did first, last, most often or instead.

The log is generated: each customer prefers a thing, and a kind of it; he or she looks around, buys,
has a change of mind and sends things back. Answers are computed from the log. A text of any length
is all log, so that what is asked is far back, near, or spread over everything.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

from cometlm.tasks.base import Question, Sample, Split, Task
from cometlm.tasks.names import ADJECTIVES, PEOPLE, THINGS
from cometlm.tasks.scoring import found
from cometlm.tasks.story import bounds

Kind = Literal["first", "last", "count", "favourite", "returned", "instead"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Action = Literal["search", "view", "add", "remove", "buy", "return"]
MOST = 12  # customers
_PREFERS = 0.5  # how often a customer takes what he or she prefers


@dataclass(frozen=True)
class Event:
    """One line of a log."""

    time: datetime
    who: str
    action: Action
    item: str  # "blue kettle"; of a search only the thing
    price: int = 0

    @property
    def thing(self) -> str:
        """The item without its adjective."""
        return self.item.partition(" ")[2]


class Behaviour(Task):
    """What the customers of a shop did.

    Args:
        tokenizer, split, seed: see `Task`.
        customers: how many, or their fewest and most.
        questions: how many are asked at most, each of another customer or of another kind.
        kinds: which kinds of questions; all of them if empty.

    Raises:
        ValueError: an option out of its bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        customers: int | Sequence[int] = (2, 5),
        questions: int = 3,
        kinds: Kind | Sequence[Kind] = (),
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        self.customers = bounds("customers", customers, MOST)
        self.questions = bounds("questions", questions, MOST * len(KINDS))[0]
        self.kinds: Sequence[Kind] = (kinds,) if isinstance(kinds, str) else tuple(kinds) or KINDS
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {kind!r}")

    def sample(self, index: int, tokens: int) -> Sample:
        """A log of at most `tokens` tokens; see `Task.sample`.

        Its `meta` says how many `customers` and `events` there are; a question's, its `kind`.
        """
        rng = self.rng(index)
        people = rng.sample(PEOPLE[self.split], rng.randint(*self.customers))
        context: list[int] = []
        told: list[tuple[Event, range]] = []
        for event in _events(rng, people, self.split):
            line = self.encode(_line(event, self.split))
            # What is too short goes on until something can be asked, to say what it takes.
            if len(context) + len(line) > tokens and any(_answers(told, self.kinds)):
                break
            told.append((event, range(len(context), len(context) + len(line))))
            context += line
        if len(context) > tokens:
            raise ValueError(f"tokens must be at least {len(context)}, got {tokens}")
        known = list(_answers(told, self.kinds))
        chosen = rng.sample(known, min(self.questions, len(known)))
        questions = tuple(self._question(rng, one) for one in chosen)
        return Sample(context, questions, {"customers": len(people), "events": len(told)})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """`exact`, and `found`: whether an answer was said, maybe in a sentence."""
        return {**super().score(question, said), "found": found(said, question.answers)}

    def _question(self, rng: random.Random, answer: Answer) -> Question:
        text = rng.choice(ASKED[self.split][answer.kind])
        text = text.format(who=answer.who, item=answer.item)
        return Question(text, answer.said, evidence=answer.evidence, meta={"kind": answer.kind})


# --- what customers do --------------------------------------------------------------------------


def _events(rng: random.Random, people: Sequence[str], split: Split) -> Iterator[Event]:
    """What happens in a shop, without end."""
    time = datetime(rng.randint(2015, 2024), rng.randint(1, 12), rng.randint(1, 28), 9)
    prefers = {who: (rng.choice(ADJECTIVES[split]), rng.choice(THINGS[split])) for who in people}
    bought: dict[str, list[tuple[str, int]]] = {who: [] for who in people}
    while True:
        who = rng.choice(people)
        for action, item, price in _visit(rng, prefers[who], bought[who], split):
            time += timedelta(minutes=rng.randint(1, 240))
            yield Event(time, who, action, item, price)


def _visit(
    rng: random.Random, prefers: tuple[str, str], bought: list[tuple[str, int]], split: Split
) -> Iterator[tuple[Action, str, int]]:
    """What one customer does at one time."""
    if bought and rng.random() < 0.15:
        yield "return", *bought.pop(rng.randrange(len(bought)))
        return
    item, price = _wanted(rng, prefers, split), rng.randint(2, 400)
    if rng.random() < 0.4:
        yield "search", item.partition(" ")[2], 0
    if rng.random() < 0.6:
        yield "view", item, price
    if rng.random() < 0.3:
        return
    yield "add", item, price
    what = rng.random()
    if what < 0.2:
        yield "remove", item, price
    elif what < 0.4:  # a change of mind
        other, other_price = _wanted(rng, prefers, split), rng.randint(2, 400)
        yield "remove", item, price
        yield "add", other, other_price
        yield "buy", other, other_price
        bought.append((other, other_price))
    elif what < 0.9:
        yield "buy", item, price
        bought.append((item, price))


def _wanted(rng: random.Random, prefers: tuple[str, str], split: Split) -> str:
    adjective, thing = prefers
    adjective = adjective if rng.random() < _PREFERS else rng.choice(ADJECTIVES[split])
    thing = thing if rng.random() < _PREFERS else rng.choice(THINGS[split])
    return f"{adjective} {thing}"


# --- what can be asked --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What may be asked of a log, and its answer."""

    kind: Kind
    who: str
    said: tuple[str, ...]
    evidence: tuple[range, ...]
    item: str = ""


Told = Sequence[tuple[Event, range]]


def _answers(told: Told, kinds: Sequence[Kind]) -> Iterator[Answer]:
    """Everything that can be asked of a log and has one answer."""
    for who in dict.fromkeys(event.who for event, _ in told):
        own = [(event, where) for event, where in told if event.who == who]
        for kind in kinds:
            yield from _ASKERS[kind](who, own)


def _of(own: Told, action: Action) -> list[tuple[Event, range]]:
    return [(event, where) for event, where in own if event.action == action]


def _first(who: str, own: Told) -> Iterator[Answer]:
    if bought := _of(own, "buy"):
        event, where = bought[0]
        yield Answer("first", who, _named(event.item), (where,))


def _last(who: str, own: Told) -> Iterator[Answer]:
    bought = _of(own, "buy")
    if len(bought) > 1:
        event, where = bought[-1]
        yield Answer("last", who, _named(event.item), (where,))


def _count(who: str, own: Told) -> Iterator[Answer]:
    bought = _of(own, "buy")
    if len(bought) > 1:
        places = tuple(where for _, where in bought)
        yield Answer("count", who, _number(len(bought)), places)


def _favourite(who: str, own: Told) -> Iterator[Answer]:
    """The thing that was bought most often, if it is one."""
    bought = _of(own, "buy")
    ranked = Counter(event.thing for event, _ in bought).most_common(2)
    if ranked and ranked[0][1] > 1 and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
        places = tuple(where for _, where in bought)
        thing = ranked[0][0]
        yield Answer("favourite", who, (thing, f"{thing}s", f"a {thing}"), places)


def _returned(who: str, own: Told) -> Iterator[Answer]:
    if returned := _of(own, "return"):
        event, where = returned[-1]
        yield Answer("returned", who, _named(event.item), (where,))


def _instead(who: str, own: Told) -> Iterator[Answer]:
    """What was bought in the place of something that was taken out of the cart only once."""
    removed = Counter(event.item for event, _ in _of(own, "remove"))
    for (event, where), (added, _), (last, bought) in zip(own, own[1:], own[2:], strict=False):
        changed = (event.action, added.action, last.action) == ("remove", "add", "buy")
        if changed and removed[event.item] == 1 and event.item != last.item == added.item:
            yield Answer("instead", who, _named(last.item), (where, bought), event.item)


_ASKERS = {
    "first": _first,
    "last": _last,
    "count": _count,
    "favourite": _favourite,
    "returned": _returned,
    "instead": _instead,
}
_NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve",
)  # fmt: skip


def _named(item: str) -> tuple[str, ...]:
    article = "an" if item[0] in "aeiou" else "a"
    return (f"The {item}", item, f"{article} {item}")


def _number(count: int) -> tuple[str, ...]:
    spelled = (_NUMBERS[count],) if count < len(_NUMBERS) else ()
    return (str(count), *spelled)


# --- what is said -------------------------------------------------------------------------------

LINES: dict[Split, dict[Action, str]] = {
    "train": {
        "search": "{time:%Y-%m-%d %H:%M} {who} searched for a {item}\n",
        "view": "{time:%Y-%m-%d %H:%M} {who} looked at the {item}, {price} pounds\n",
        "add": "{time:%Y-%m-%d %H:%M} {who} put the {item} into the cart\n",
        "remove": "{time:%Y-%m-%d %H:%M} {who} took the {item} out of the cart\n",
        "buy": "{time:%Y-%m-%d %H:%M} {who} bought the {item} for {price} pounds\n",
        "return": "{time:%Y-%m-%d %H:%M} {who} sent the {item} back\n",
    },
    "test": {
        "search": "[{time:%d %b %Y, %H:%M}] customer {who}: search, query {item}\n",
        "view": "[{time:%d %b %Y, %H:%M}] customer {who}: page view, {item}, {price}.00 EUR\n",
        "add": "[{time:%d %b %Y, %H:%M}] customer {who}: cart add, {item}\n",
        "remove": "[{time:%d %b %Y, %H:%M}] customer {who}: cart remove, {item}\n",
        "buy": "[{time:%d %b %Y, %H:%M}] customer {who}: purchase, {item}, {price}.00 EUR\n",
        "return": "[{time:%d %b %Y, %H:%M}] customer {who}: return, {item}\n",
    },
}
ASKED: dict[Split, dict[Kind, tuple[str, ...]]] = {
    "train": {
        "first": ("What did {who} buy first?", "What was the first thing that {who} bought?"),
        "last": ("What did {who} buy last?", "What is the latest thing that {who} bought?"),
        "count": ("How many things did {who} buy?", "How often did {who} buy something?"),
        "favourite": (
            "What kind of thing did {who} buy most often?",
            "Which thing does {who} buy again and again?",
        ),
        "returned": ("What did {who} send back last?",),
        "instead": ("What did {who} buy instead of the {item}?",),
    },
    "test": {
        "first": ("Which item was the earliest purchase of {who}?",),
        "last": ("Which item was the most recent purchase of {who}?",),
        "count": ("How many purchases has {who} made?",),
        "favourite": ("Which type of item has {who} purchased the most?",),
        "returned": ("Which item did {who} return most recently?",),
        "instead": ("Having removed the {item} from the cart, which item did {who} purchase?",),
    },
}


def _line(event: Event, split: Split) -> str:
    return LINES[split][event.action].format(
        time=event.time, who=event.who, item=event.item, price=event.price
    )
