"""Following what happens: values through assignments, and things through rooms.

The first is RULER's variable tracking, with chains that nobody asks for beside the one that is
asked for. The others are what bAbI's tasks 1, 2 and 3 ask, in sentences and names of our own: where
somebody is (one supporting fact), where something that somebody carries is (two), and where it was
before (three).
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from cometlm.tasks.base import Question, Sample, Split
from cometlm.tasks.names import PEOPLE, ROOMS, SMALL_THINGS
from cometlm.tasks.scoring import share_found
from cometlm.tasks.story import StoryTask, bounds, filled, in_order, num_fitting

Kind = Literal["variables", "one-fact", "two-facts", "three-facts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LEAST: dict[Kind, int] = {"variables": 1, "one-fact": 1, "two-facts": 2, "three-facts": 3}
_TRIES = 100
_CAST = 4  # most people, and most things, of a story


@dataclass(frozen=True)
class Templates:
    """How events are told and asked for.

    Attributes:
        given: assignments of a {value} to a {name}.
        copied: assignments of what {other} has to a {name}.
        value_asked: which value a {name} has.
        names_asked: which variables have a {value}.
        goes, takes, drops: a {person} enters a {room}, takes a {thing}, leaves it behind.
        person_asked, thing_asked, before_asked: where a {person} is, where a {thing} is, and where
            it was before it was in a {room}.
        letters: that names of variables begin with.
    """

    given: tuple[str, ...]
    copied: tuple[str, ...]
    value_asked: tuple[str, ...]
    names_asked: tuple[str, ...]
    goes: tuple[str, ...]
    takes: tuple[str, ...]
    drops: tuple[str, ...]
    person_asked: tuple[str, ...]
    thing_asked: tuple[str, ...]
    before_asked: tuple[str, ...]
    letters: str


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the numbers of the events that say it, in order."""

    text: str
    answer: str
    events: tuple[int, ...]
    form: str


@dataclass
class World:
    """Who is where and has what, and by which events that is known.

    Attributes:
        at: the room of each person, and the number of the event that says it.
        trails: the rooms of each thing, one after the other, and the events that say it.
        carried: who has each thing, and the number of the event in which it was taken.
    """

    at: dict[str, tuple[str, int]] = field(default_factory=dict)
    trails: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    carried: dict[str, tuple[str, int]] = field(default_factory=dict)

    def go(self, number: int, person: str, room: str) -> None:
        """Somebody enters a room, with all that is carried."""
        self.at[person] = room, number
        for thing, (holder, taken) in self.carried.items():
            if holder == person:
                self.trails[thing].append((room, (taken, number)))

    def take(self, number: int, person: str, thing: str) -> None:
        """Somebody takes a thing where both are."""
        room, since = self.at[person]
        self.carried[thing] = person, number
        trail = self.trails.setdefault(thing, [])
        if not trail:
            trail.append((room, (since, number)))

    def drop(self, number: int, person: str, thing: str) -> None:
        """Somebody leaves a thing where it is: this says it better than that it was taken."""
        room, since = self.at[person]
        del self.carried[thing]
        self.trails[thing][-1] = room, (since, number)

    def can_take(self, person: str, thing: str) -> bool:
        """Whether nobody has it, and it was never seen or is in the same room."""
        trail = self.trails.get(thing)
        here = person in self.at and (not trail or trail[-1][0] == self.at[person][0])
        return here and thing not in self.carried


class Tracking(StoryTask):
    """What a variable is in the end, or where somebody or something is.

    A sample's `meta` says its `kind`, a question's which `form` of question it is: "value" or
    "names" of variables, "person", "thing" or "before". Its evidence is every sentence that is
    needed, in their order.

    Args:
        tokenizer, split, seed, corpora: see `StoryTask`.
        kind: one of "variables", "one-fact", "two-facts", "three-facts", or several, drawn by
            chance.
        events: sentences about people and things, or their fewest and most. What does not fit into
            a text does not happen.
        chains: of variables, each with a value of its own.
        hops: assignments of one variable to another in each chain, or their fewest and most.
        questions: how many are asked of one text at most.

    Raises:
        ValueError: an option out of its bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        kind: Kind | Sequence[Kind] = KINDS,
        events: int | Sequence[int] = (6, 16),
        chains: int | Sequence[int] = 2,
        hops: int | Sequence[int] = (1, 4),
        questions: int = 1,
        corpora: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed, corpora=corpora)
        self.kinds = [kind] if isinstance(kind, str) else list(kind)
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kind must be one or more of {', '.join(KINDS)}, got {kind}")
        self.events = bounds("events", events, 256, max(_LEAST[one] for one in self.kinds))
        self.chains = bounds("chains", chains, 16)
        self.hops = bounds("hops", hops, 16, 0)
        if questions < 1:
            raise ValueError(f"questions must be at least 1, got {questions}")
        self.questions = questions
        self.templates = TEMPLATES[split]

    def sample(self, index: int, tokens: int) -> Sample:
        """A sample with a context of exactly `tokens` tokens; see `Task.sample`."""
        rng = self.rng(index)
        kind = rng.choice(self.kinds)
        name, haystack = self.haystack(index)
        running = haystack.draw(rng, tokens)
        if kind == "variables":
            foreign = set(re.findall(r"\w+", self.tokenizer.decode(running)))
            sentences, asked = self._variables(rng, foreign)
            needles = [self.needle(rng, sentence) for sentence in sentences]
        else:
            needles, asked = self._story(rng, kind, tokens)
        context, ranges = self.tell(running, needles, in_order(rng, len(needles)), tokens)
        questions = tuple(
            Question(
                one.text,
                (one.answer,),
                evidence=tuple(ranges[number] for number in one.events),
                meta={"form": one.form},
            )
            for one in rng.sample(asked, min(self.questions, len(asked)))
        )
        return Sample(context, questions, {"kind": kind, "haystack": name, "events": len(needles)})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`: nothing but the answer was said. `found`: it was, maybe in a sentence; of
            several variables the share that was.
        """
        parts = question.answers[0].split(", ")
        return {**super().score(question, said), "found": share_found(said, parts)}

    # --- variables ------------------------------------------------------------------------------

    def _variables(
        self, rng: random.Random, foreign: Collection[str]
    ) -> tuple[list[str], list[Asked]]:
        """Assignments of several chains, in turns, and a question of each form for each chain."""
        lengths = [1 + rng.randint(*self.hops) for _ in range(rng.randint(*self.chains))]
        # Program text may have variables of its own.
        every = [f"{a}{n}" for a in self.templates.letters for n in range(1, 100)]
        every = [name for name in every if name not in foreign]
        names = iter(rng.sample(every, sum(lengths)))
        chains = [[next(names) for _ in range(length)] for length in lengths]
        values = [str(value) for value in rng.sample(range(100, 1000), len(chains))]
        turns = [number for number, length in enumerate(lengths) for _ in range(length)]
        rng.shuffle(turns)
        sentences: list[str] = []
        places: list[list[int]] = [[] for _ in chains]
        for number in turns:
            done = len(places[number])
            fields = {"name": chains[number][done], "value": values[number]}
            if done:
                fields["other"] = chains[number][done - 1]
            templates = self.templates.copied if done else self.templates.given
            places[number].append(len(sentences))
            sentences.append(rng.choice(templates).format(**fields))
        asked = []
        for chain, value, own in zip(chains, values, places, strict=True):
            text = filled(rng, self.templates.value_asked, {"name": chain[-1]})
            asked.append(Asked(text, value, tuple(own), "value"))
            text = filled(rng, self.templates.names_asked, {"value": value})
            asked.append(Asked(text, ", ".join(chain), tuple(own), "names"))
        return sentences, asked

    # --- rooms ----------------------------------------------------------------------------------

    def _story(
        self, rng: random.Random, kind: Kind, tokens: int
    ) -> tuple[list[list[int]], list[Asked]]:
        """Ids of the sentences of a story that fits, and what can be asked about it."""
        count = rng.randint(*self.events)
        for _ in range(_TRIES):
            sentences, world = self._events(rng, kind, count)
            asked = self._asked(rng, kind, world)
            needles = [self.needle(rng, sentence) for sentence in sentences]
            fitting = num_fitting(needles, tokens, _LEAST[kind])
            if fitting == count and asked:
                return needles, asked
            count = fitting
        raise ValueError(f"events must leave something to ask, got {self.events}")

    def _events(self, rng: random.Random, kind: Kind, count: int) -> tuple[list[str], World]:
        """So many events; among them those that make a question of this kind possible."""
        people = rng.sample(PEOPLE[self.split], rng.randint(2, _CAST))
        things = rng.sample(SMALL_THINGS[self.split], rng.randint(1, _CAST))
        rooms = rng.sample(ROOMS[self.split], rng.randint(4, len(ROOMS[self.split])))
        world, sentences = World(), list[str]()
        hero, thing = people[0], things[0]
        wanted = ["go", "take", "go"][: _LEAST[kind]]
        for number in range(count):
            if wanted and rng.random() < len(wanted) / (count - number):
                step, person = wanted.pop(0), hero
            else:  # until the hero has done that, the others act, and leave the thing alone
                person = rng.choice(people[1:] if wanted else people)
                step = rng.choice(("go", "go", "take", "drop"))
            free = [x for x in things if world.can_take(person, x)]
            free = [x for x in free if not wanted or x != thing or person == hero]
            held = [x for x, (holder, _) in world.carried.items() if holder == person]
            if person == hero and step == "take" and thing in free:
                free = [thing]
            if step == "take" and free:
                it = rng.choice(free)
                world.take(number, person, it)
                sentence = self._told(rng, self.templates.takes, person, thing=it)
            elif step == "drop" and held:
                it = rng.choice(held)
                world.drop(number, person, it)
                sentence = self._told(rng, self.templates.drops, person, thing=it)
            else:
                here = world.at[person][0] if person in world.at else None
                room = rng.choice([room for room in rooms if room != here])
                world.go(number, person, room)
                sentence = self._told(rng, self.templates.goes, person, room=room)
            sentences.append(sentence)
        return sentences, world

    @staticmethod
    def _told(rng: random.Random, templates: Sequence[str], person: str, **more: str) -> str:
        return filled(rng, templates, {"person": person, **more})

    def _asked(self, rng: random.Random, kind: Kind, world: World) -> list[Asked]:
        """All that can be asked of a kind."""
        if kind == "one-fact":
            templates = self.templates.person_asked
            return [
                Asked(filled(rng, templates, {"person": who}), room, (since,), "person")
                for who, (room, since) in world.at.items()
            ]
        if kind == "two-facts":
            return [
                Asked(filled(rng, self.templates.thing_asked, {"thing": what}), *trail[-1], "thing")
                for what, trail in world.trails.items()
            ]
        asked = []
        for what, trail in world.trails.items():
            rooms = [room for room, _ in trail]
            for (before, first), (room, second) in pairwise(trail):
                needed = tuple(sorted({*first, *second}))
                if len(needed) == 3 and rooms.count(room) == 1:
                    text = filled(rng, self.templates.before_asked, {"thing": what, "room": room})
                    asked.append(Asked(text, before, needed, "before"))
        return asked


# --- what is said -------------------------------------------------------------------------------

TEMPLATES: dict[Split, Templates] = {
    "train": Templates(
        given=("{name} = {value}", "let {name} be {value}", "set {name} to {value}"),
        copied=("{name} = {other}", "let {name} be {other}", "set {name} to {other}"),
        value_asked=("What is the value of {name}?", "Which number is {name} in the end?"),
        names_asked=(
            "Which variables have the value {value}? List them all.",
            "Name every variable that is {value}.",
        ),
        goes=(
            "{person} went to the {room}.",
            "{person} walked into the {room}.",
            "{person} moved to the {room}.",
        ),
        takes=("{person} picked up the {thing}.", "{person} took the {thing}."),
        drops=("{person} put down the {thing}.", "{person} dropped the {thing}."),
        person_asked=("Where is {person}?", "In which room is {person} now?"),
        thing_asked=("Where is the {thing}?", "In which room is the {thing} now?"),
        before_asked=(
            "Where was the {thing} before it was in the {room}?",
            "From where did the {thing} get into the {room}?",
        ),
        letters="abcdxyz",
    ),
    "test": Templates(
        given=("{name} := {value};", "assign {value} to {name};"),
        copied=("{name} := {other};", "assign {other} to {name};"),
        value_asked=("What does {name} hold at last?",),
        names_asked=("Find all names that hold {value} at last.",),
        goes=("{person} entered the {room}.", "{person} has come to the {room}."),
        takes=("{person} got hold of the {thing}.", "{person} lifted the {thing}."),
        drops=("{person} let go of the {thing}.", "{person} set the {thing} aside."),
        person_asked=("Which place would one have to visit to meet {person}?",),
        thing_asked=("Which place would one have to search for the {thing}?",),
        before_asked=("Which place had the {thing} been at just before the {room}?",),
        letters="pqrstuvw",
    ),
}
