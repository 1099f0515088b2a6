"""Facts about people and things in plain sentences, asked for in other words than they were told.

Some facts change later on, some differ from another in one word of a name, and some questions are
about what was never told. A memory that keeps words rather than what they say finds no answer here:
a question shares only names with the sentence that answers it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

from cometlm.tasks.base import Question, Sample, Split
from cometlm.tasks.names import ADJECTIVES, FAMILIES, PEOPLE, THINGS, TOWNS, invented
from cometlm.tasks.scoring import NOT_SAID, exact_found_f1
from cometlm.tasks.story import (
    StoryTask,
    bounds,
    check_share,
    filled,
    in_order,
    num_fitting,
    room_beside,
)

MOST = 64
Kind = Literal["person", "place", "thing", "date", "price", "code"]
About = Literal["person", "thing"]
Name = tuple[str, str]  # both words count: Ada Weiss is not Ada Rossi
_TRIES = 1000  # draws until something is found that is not taken


@dataclass(frozen=True)
class Relation:
    """What may be told of somebody or something, and how it is asked for.

    Attributes:
        about: what {subject} is.
        kind: what {value} is.
        told: sentences.
        changed: sentences that say later that it is another.
        asked: questions that share no word with the sentences but names and little ones.
    """

    about: About
    kind: Kind
    told: tuple[str, ...]
    changed: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """What a text tells.

    Attributes:
        relation: what is told.
        subject: of whom or what.
        values: what holds, and after that what holds later, if it changes.
        twin: the number of the fact that differs from it in one word of its subject, or None.
    """

    relation: Relation
    subject: Name
    values: tuple[str, ...]
    twin: int | None = None


class Facts(StoryTask):
    """People, places, things, dates, prices and codes, told in real text.

    A question's `meta` says the `kind` of its answer; what is `asked`: "told", "pair" (another fact
    differs in one word), "changed" (what holds in the end), "earlier" (what held, asked in between)
    or "unknown", whose `decile` is None: its answer stands nowhere.

    Args:
        tokenizer, split, seed, corpora: see `StoryTask`.
        facts: how many are told, or their fewest and most. What does not fit into a text is not
            told, down to the fewest.
        questions: how many are asked of one text at most.
        changes: share of facts that a later sentence changes. The last one holds. If a changed fact
            is asked for and another question may be, that one asks for the earlier value, between
            the two sentences.
        pairs: share of facts that differ from another in one word of a name, and in their value.
        unknown: share of questions that the text does not answer: about a name that differs from a
            known one in a word, or something else about a known one. Their answer is "Not said".

    Raises:
        ValueError: an option out of its bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        facts: int | Sequence[int] = (1, 8),
        questions: int = 4,
        changes: float = 0.2,
        pairs: float = 0.2,
        unknown: float = 0.1,
        corpora: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed, corpora=corpora)
        self.facts = bounds("facts", facts, MOST)
        if questions < 1:
            raise ValueError(f"questions must be at least 1, got {questions}")
        self.questions = questions
        self.changes = check_share("changes", changes)
        self.pairs = check_share("pairs", pairs)
        self.unknown = check_share("unknown", unknown)
        self.relations = RELATIONS[split]

    def sample(self, index: int, tokens: int) -> Sample:
        """A sample with a context of exactly `tokens` tokens; see `Task.sample`."""
        rng = self.rng(index)
        facts = self._facts(rng, rng.randint(*self.facts))
        told = [[self.needle(rng, one) for one in _sentences(rng, fact)] for fact in facts]
        whole = [list(chain(*needles)) for needles in told]
        count = num_fitting(whole, tokens, self.facts[0])
        facts, told = facts[:count], told[:count]
        depths = [in_order(rng, len(needles)) for needles in told]
        needles = list(chain(*told))
        name, haystack = self.haystack(index)
        running = haystack.draw(rng, room_beside(needles, tokens))
        context, ranges = self.tell(running, needles, list(chain(*depths)), tokens)
        places = iter(ranges)
        where = [[next(places) for _ in own] for own in told]
        questions = self._questions(rng, facts, where)
        return Sample(context, tuple(questions), {"haystack": name, "facts": count})

    def sentences(self, index: int, count: int) -> list[tuple[str, Question]]:
        """Facts for a text of one's own: each in a sentence (two, if it changes) and asked for."""
        rng = self.rng(index)
        return [
            (
                " ".join(_sentences(rng, fact)),
                Question(_question(rng, fact.relation, fact.subject), _forms(fact.values[-1])),
            )
            for fact in self._facts(rng, count)
        ]

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`: nothing but the answer was said. `found`: it was, maybe in a sentence. `f1`:
            the words that it shares with the answer.
        """
        return exact_found_f1(said, question.answers)

    # --- what is told ---------------------------------------------------------------------------

    def _facts(self, rng: random.Random, count: int) -> list[Fact]:
        """Facts about different names with different values."""
        taken: set[str] = set()
        facts: list[Fact] = []
        while len(facts) < count:
            relation, number = rng.choice(self.relations), len(facts)
            subject = self._new(taken, partial(self._name, rng, relation.about))
            # A fact that brings a twin makes two, so this share of them makes `pairs` of all.
            has_twin = number + 1 < count and rng.random() < self.pairs / (2 - self.pairs)
            values = self._values(rng, relation, taken)
            facts.append(Fact(relation, subject, values, number + 1 if has_twin else None))
            if has_twin:
                subject = self._twin(rng, relation.about, subject, taken)
                values = self._values(rng, relation, taken)
                facts.append(Fact(relation, subject, values, number))
        return facts

    def _values(self, rng: random.Random, relation: Relation, taken: set[str]) -> tuple[str, ...]:
        count = 2 if rng.random() < self.changes else 1
        return tuple(self._value(rng, relation.kind, taken) for _ in range(count))

    def _value(self, rng: random.Random, kind: Kind, taken: set[str]) -> str:
        if kind in ("person", "thing"):
            about: About = "person" if kind == "person" else "thing"
            return _called(about, self._new(taken, partial(self._name, rng, about)))
        draw = _DRAWN[kind]
        for _ in range(_TRIES):
            value = draw(rng, self.split)
            if value not in taken:
                break
        taken.add(value)  # there are fewer towns than facts may want; then two are in one town
        return value

    def _name(self, rng: random.Random, about: About) -> Name:
        if about == "person":
            return _word(rng, PEOPLE, self.split), _word(rng, FAMILIES, self.split)
        return rng.choice(ADJECTIVES[self.split]), rng.choice(THINGS[self.split])

    def _twin(self, rng: random.Random, about: About, name: Name, taken: set[str]) -> Name:
        """A new name that differs from this one in a word."""

        def draw() -> Name:
            other = self._name(rng, about)
            return (name[0], other[1]) if rng.random() < 0.5 else (other[0], name[1])

        return self._new(taken, draw)

    @staticmethod
    def _new(taken: set[str], draw: Callable[[], Name]) -> Name:
        """A name that is not taken; now it is."""
        while (name := draw()) and " ".join(name) in taken:
            pass
        taken.add(" ".join(name))
        return name

    # --- what is asked --------------------------------------------------------------------------

    def _questions(
        self, rng: random.Random, facts: Sequence[Fact], where: Sequence[Sequence[range]]
    ) -> list[Question]:
        order = rng.sample(range(len(facts)), len(facts))
        questions: list[Question] = []
        taken = {" ".join(fact.subject) for fact in facts}
        taken |= {value.removeprefix("the ") for fact in facts for value in fact.values}
        while len(questions) < self.questions:
            if rng.random() < self.unknown:
                questions.append(self._unknown(rng, rng.choice(facts), taken))
            elif order:
                number = order.pop()
                fact, places = facts[number], where[number]
                text = _question(rng, fact.relation, fact.subject)
                paired = fact.twin is not None and fact.twin < len(facts)  # else it did not fit
                asked = "changed" if len(places) > 1 else "pair" if paired else "told"
                meta = {"kind": fact.relation.kind, "asked": asked}
                questions.append(
                    Question(text, _forms(fact.values[-1]), evidence=(places[-1],), meta=meta)
                )
                if len(places) > 1 and len(questions) < self.questions:
                    first, second = places
                    questions.append(
                        Question(
                            _question(rng, fact.relation, fact.subject),
                            _forms(fact.values[0]),
                            after=rng.randint(first.stop, second.start),
                            evidence=(first,),
                            until=second.start,
                            meta={**meta, "asked": "earlier"},
                        )
                    )
            else:
                break
        return questions

    def _unknown(self, rng: random.Random, fact: Fact, taken: set[str]) -> Question:
        """A question that looks like one about this fact, and has no answer."""
        relation, subject = fact.relation, fact.subject
        others = [
            r for r in self.relations if r.about == relation.about and r.kind != relation.kind
        ]
        if rng.random() < 0.5:
            subject = self._twin(rng, relation.about, subject, taken)
        else:
            relation = rng.choice(others)
        meta = {"kind": relation.kind, "asked": "unknown", "decile": None}
        return Question(_question(rng, relation, subject), NOT_SAID, meta=meta)


def _sentences(rng: random.Random, fact: Fact) -> list[str]:
    relation = fact.relation
    return [
        filled(rng, templates, {"subject": _called(relation.about, fact.subject), "value": value})
        for templates, value in zip((relation.told, relation.changed), fact.values, strict=False)
    ]


def _question(rng: random.Random, relation: Relation, subject: Name) -> str:
    return filled(rng, relation.asked, {"subject": _called(relation.about, subject)})


def _called(about: About, name: Name) -> str:
    return " ".join(name if about == "person" else ("the", *name))


def _forms(value: str) -> tuple[str, ...]:
    """A value, and without its article if it has one."""
    bare = value.removeprefix("the ")
    return (value,) if bare == value else (value, bare)


# --- what is said -------------------------------------------------------------------------------

# fmt: off
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
# fmt: on
# What is the same in all training samples is learned and not read: a currency, a century.
_YEARS = {"train": (*range(1400, 1900), *range(2000, 2100)), "test": range(1900, 2000)}
_MONEY = {
    "train": ("euros", "pounds", "francs", "crowns", "pesos", "rupees", "florins", "roubles"),
    "test": ("dollars",),
}
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_LATE = "NPQRSTUVWXYZ"  # both letters of a code in the split for tests
_INVENTED = 0.4  # share of names of people and towns in training that are made up


def _date(rng: random.Random, split: Split) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.choice(_YEARS[split])}"


def _price(rng: random.Random, split: Split) -> str:
    number = rng.randint(11, 9999)
    return f"{number} {_MONEY[split][0] if split == 'test' else rng.choice(_MONEY[split])}"


def _code(rng: random.Random, split: Split) -> str:
    letters = rng.choices(_LATE if split == "test" else _LETTERS, k=2)
    if split == "train" and set(letters) <= set(_LATE):
        letters[rng.randrange(2)] = rng.choice("ABCDEFGHJKLM")
    return f"{''.join(letters)}-{rng.randint(1000, 9999)}"


def _place(rng: random.Random, split: Split) -> str:
    return _word(rng, TOWNS, split)


def _word(rng: random.Random, pool: dict[Split, tuple[str, ...]], split: Split) -> str:
    """A name of a person or a town."""
    if split == "train" and rng.random() < _INVENTED:
        return invented(rng)
    return rng.choice(pool[split])


_DRAWN: dict[str, Callable[[random.Random, Split], str]] = {
    "date": _date,
    "price": _price,
    "code": _code,
    "place": _place,
}

_TRAIN = (
    Relation(
        "person",
        "place",
        ("{subject} lives in {value}.", "The home of {subject} is in {value}."),
        (
            "{subject} has packed up and lives in {value} now.",
            "By now the home of {subject} is in {value}.",
        ),
        ("Where does {subject} reside?", "Which town is the residence of {subject}?"),
    ),
    Relation(
        "thing",
        "place",
        ("{subject} is kept in {value}.", "They keep {subject} in {value}."),
        (
            "{subject} has been fetched away; it is kept in {value} now.",
            "These days they keep {subject} in {value}.",
        ),
        (
            "Which town would you travel to in order to see {subject}?",
            "Where is {subject} to be seen?",
        ),
    ),
    Relation(
        "thing",
        "person",
        ("{subject} belongs to {value}.", "{value} is the one to whom {subject} belongs."),
        (
            "{subject} was sold and belongs to {value} now.",
            "As of today {subject} belongs to {value}.",
        ),
        ("Who owns {subject}?", "What is the name of the owner of {subject}?"),
    ),
    Relation(
        "person",
        "person",
        ("{subject} is married to {value}.", "{subject} married {value}."),
        (
            "{subject} has parted and is married to {value} now.",
            "Then {subject} married {value} instead.",
        ),
        ("Who is the spouse of {subject}?", "With whom did {subject} tie the knot?"),
    ),
    Relation(
        "person",
        "thing",
        ("{subject} inherited {value}.", "An aunt bequeathed {value} to {subject}."),
        (
            "The lawyer had misread it: {subject} inherited {value}.",
            "No, what {subject} inherited is {value}.",
        ),
        ("What was left to {subject} in a will?", "Which object did {subject} get as an heirloom?"),
    ),
    Relation(
        "person",
        "date",
        ("{subject} was born on {value}.", "{value} is when {subject} was born."),
        (
            "According to the parish, {subject} was born on {value}.",
            "It is now certain that {subject} was born on {value}.",
        ),
        (
            "When did {subject} come into the world?",
            "On which day does the life of {subject} begin?",
        ),
    ),
    Relation(
        "thing",
        "date",
        ("{subject} was finished on {value}.", "They finished {subject} on {value}."),
        (
            "A letter corrects this: {subject} was finished on {value}.",
            "In fact they finished {subject} on {value}.",
        ),
        ("When was {subject} completed?", "On which day was the work on {subject} done?"),
    ),
    Relation(
        "thing",
        "price",
        ("{subject} is on sale for {value}.", "They are selling {subject} for {value}."),
        (
            "{subject} has a new tag and is on sale for {value}.",
            "From today they are selling {subject} for {value}.",
        ),
        ("What is the price of {subject}?", "How much does {subject} cost?"),
    ),
    Relation(
        "person",
        "price",
        ("{subject} earns {value} a week.", "Every week {subject} earns {value}."),
        (
            "Since the promotion {subject} earns {value} a week.",
            "It changed: every week {subject} earns {value}.",
        ),
        ("What salary does {subject} get?", "How much is {subject} paid?"),
    ),
    Relation(
        "thing",
        "code",
        ("{subject} opens with {value}.", "Use {value} to open {subject}."),
        (
            "{subject} was reset and opens with {value} now.",
            "From now on, use {value} to open {subject}.",
        ),
        (
            "What has to be typed to unlock {subject}?",
            "Which combination gives access to {subject}?",
        ),
    ),
    Relation(
        "person",
        "code",
        ("{subject} is listed as {value}.", "The list has {subject} down as {value}."),
        (
            "{subject} got a new card and is listed as {value} now.",
            "The latest list has {subject} down as {value}.",
        ),
        ("Which membership number does {subject} have?", "What is the identifier of {subject}?"),
    ),
)
_TEST = (
    Relation(
        "person",
        "place",
        ("{subject} works in {value}.", "The workplace of {subject} is in {value}."),
        ("{subject} has been transferred and works in {value} at present.",),
        ("In which city is {subject} employed?", "Where does {subject} have a job?"),
    ),
    Relation(
        "thing",
        "place",
        ("{subject} was made in {value}.", "A workshop in {value} made {subject}."),
        ("An expert disagrees: {subject} was made in {value}.",),
        ("Which city does {subject} come from?", "Where does {subject} originate?"),
    ),
    Relation(
        "thing",
        "person",
        ("{subject} was designed by {value}.", "{value} designed {subject}."),
        ("Recent research shows that {value} designed {subject}.",),
        ("Whose invention is {subject}?", "Who drew the plans of {subject}?"),
    ),
    Relation(
        "person",
        "person",
        ("{subject} was an apprentice of {value}.", "{value} took {subject} on as an apprentice."),
        ("In truth {subject} was an apprentice of {value}.",),
        ("Who taught {subject}?", "Who was the teacher of {subject}?"),
    ),
    Relation(
        "person",
        "thing",
        ("{subject} lost {value} on a train.", "On a train {subject} lost {value}."),
        ("It turned out that {subject} lost {value}.",),
        ("What is {subject} missing?", "What can {subject} no longer find?"),
    ),
    Relation(
        "person",
        "date",
        ("{subject} retired on {value}.", "The retirement of {subject} began on {value}."),
        ("After a delay, {subject} retired on {value}.",),
        ("When did {subject} stop working?", "What was the last day of {subject} in the office?"),
    ),
    Relation(
        "thing",
        "date",
        ("{subject} was stolen on {value}.", "Somebody stole {subject} on {value}."),
        ("The police are sure by this time that {subject} was stolen on {value}.",),
        ("When did a thief take {subject}?", "On which day did {subject} disappear?"),
    ),
    Relation(
        "thing",
        "price",
        ("{subject} is insured for {value}.", "The insurance on {subject} pays {value}."),
        ("Following a review, {subject} is insured for {value}.",),
        (
            "How much would be refunded if {subject} were destroyed?",
            "What sum is {subject} covered for?",
        ),
    ),
    Relation(
        "person",
        "price",
        ("{subject} owes the bank {value}.", "What {subject} owes the bank is {value}."),
        ("Interest was added, and {subject} owes the bank {value}.",),
        ("How large is the debt of {subject}?", "How much money did {subject} borrow?"),
    ),
    Relation(
        "thing",
        "code",
        ("The label on {subject} reads {value}.", "{subject} is labelled {value}."),
        ("The label on {subject} was replaced and reads {value}.",),
        ("Which inventory mark does {subject} bear?", "Under which entry is {subject} catalogued?"),
    ),
    Relation(
        "person",
        "code",
        ("{subject} booked a seat as {value}.", "The booking of {subject} is {value}."),
        ("The trip was moved, and the booking of {subject} is {value}.",),
        (
            "What is the reservation reference of {subject}?",
            "Which reference was {subject} sent for the journey?",
        ),
    ),
)
RELATIONS: dict[Split, tuple[Relation, ...]] = {"train": _TRAIN, "test": _TEST}
