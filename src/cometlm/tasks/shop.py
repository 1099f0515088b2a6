"""The log of a shop that is made up: who searched, viewed, bought and sent back what.

Each customer prefers a thing, and a kind of it; he or she looks around, buys, has a change of mind
and sends things back.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from cometlm.tasks.base import Split
from cometlm.tasks.events import Answer, Log, Told, most_common, number, places
from cometlm.tasks.names import ADJECTIVES, PEOPLE, THINGS

Action = Literal["search", "view", "add", "remove", "buy", "return"]
_PREFERS = 0.5  # how often a customer takes what he or she prefers


@dataclass(frozen=True)
class ShopEvent:
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


class Shop(Log[ShopEvent]):
    """A shop's log, without end."""

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        self.kinds = tuple(_ASKERS)
        self.asked = ASKED

    def events(self, rng: random.Random, people: int) -> Iterator[ShopEvent]:
        """See `Log.events`; they come in the order of time."""
        return _events(rng, rng.sample(PEOPLE[self.split], people), self.split)

    def line(self, event: ShopEvent) -> str:
        """See `Log.line`."""
        return LINES[self.split][event.action].format(
            time=event.time, who=event.who, item=event.item, price=event.price
        )

    def answers(self, kind: str, who: str, own: Told[ShopEvent]) -> Iterator[Answer]:
        """See `Log.answers`."""
        return _ASKERS[kind](who, own)


# --- what customers do --------------------------------------------------------------------------


def _events(rng: random.Random, people: Sequence[str], split: Split) -> Iterator[ShopEvent]:
    """What happens in a shop, without end."""
    time = datetime(rng.randint(2015, 2024), rng.randint(1, 12), rng.randint(1, 28), 9)
    prefers = {who: (rng.choice(ADJECTIVES[split]), rng.choice(THINGS[split])) for who in people}
    bought: dict[str, list[tuple[str, int]]] = {who: [] for who in people}
    while True:
        who = rng.choice(people)
        for action, item, price in _visit(rng, prefers[who], bought[who], split):
            time += timedelta(minutes=rng.randint(1, 240))
            yield ShopEvent(time, who, action, item, price)


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

Own = Told[ShopEvent]


def _of(own: Own, action: Action) -> list[tuple[ShopEvent, range]]:
    return [(event, where) for event, where in own if event.action == action]


def _first(who: str, own: Own) -> Iterator[Answer]:
    if bought := _of(own, "buy"):
        event, where = bought[0]
        yield Answer("first", who, _named(event.item), (where,))


def _last(who: str, own: Own) -> Iterator[Answer]:
    bought = _of(own, "buy")
    if len(bought) > 1:
        event, where = bought[-1]
        yield Answer("last", who, _named(event.item), (where,))


def _count(who: str, own: Own) -> Iterator[Answer]:
    bought = _of(own, "buy")
    if len(bought) > 1:
        yield Answer("count", who, number(len(bought)), places(bought))


def _favourite(who: str, own: Own) -> Iterator[Answer]:
    """The thing that was bought most often, if it is one."""
    bought = _of(own, "buy")
    if thing := most_common(event.thing for event, _ in bought):
        yield Answer("favourite", who, (thing, f"{thing}s", f"a {thing}"), places(bought))


def _returned(who: str, own: Own) -> Iterator[Answer]:
    if returned := _of(own, "return"):
        event, where = returned[-1]
        yield Answer("returned", who, _named(event.item), (where,))


def _instead(who: str, own: Own) -> Iterator[Answer]:
    """What was bought in the place of something that was taken out of the cart only once."""
    removed = Counter(event.item for event, _ in _of(own, "remove"))
    for (event, where), (added, _), (last, bought) in zip(own, own[1:], own[2:], strict=False):
        changed = (event.action, added.action, last.action) == ("remove", "add", "buy")
        if changed and removed[event.item] == 1 and event.item != last.item == added.item:
            fields = {"item": event.item}
            yield Answer("instead", who, _named(last.item), (where, bought), fields)


_ASKERS: dict[str, Callable[[str, Own], Iterator[Answer]]] = {
    "first": _first,
    "last": _last,
    "count": _count,
    "favourite": _favourite,
    "returned": _returned,
    "instead": _instead,
}


def _named(item: str) -> tuple[str, ...]:
    article = "an" if item[0] in "aeiou" else "a"
    return (f"The {item}", item, f"{article} {item}")


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
ASKED: dict[Split, dict[str, tuple[str, ...]]] = {
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
