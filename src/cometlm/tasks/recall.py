"""Asked to say it again: what was told of somebody, or a passage of the text, word for word.

A memory that can repeat a text has kept all of it. Answers to other questions touch a few words of
a text; these touch every word of a passage.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

from cometlm.tasks.base import Question, Sample, Split
from cometlm.tasks.names import (
    ADJECTIVES,
    FAMILIES,
    PEOPLE,
    ROOMS,
    SMALL_THINGS,
    THINGS,
    TOWNS,
)
from cometlm.tasks.scoring import f1, words_in_order
from cometlm.tasks.story import (
    StoryTask,
    bounds,
    check_share,
    filled,
    in_order,
    num_fitting,
    room_beside,
)

MOST_PEOPLE, MOST_SENTENCES, MOST_TOKENS = 16, 8, 4096
_TRIES = 32  # places of a passage, until its beginning stands only there


class Recall(StoryTask):
    """What was said about somebody, or how a passage goes on, to be said again.

    A question's `meta` says what is `asked` ("said" or "passage") and how many `words` its answer
    has.

    Args:
        tokenizer, split, seed, corpora: see `StoryTask`.
        said: share of texts that are asked what was said about people; the others are asked for
            passages.
        people: how many the text tells of, or their fewest and most; each is asked about.
        sentences: told of each of them.
        passages: how many of a text are asked for.
        passage: tokens of a passage, or their fewest and most. With `ask: probes` it has to fit
            into a chunk together with its question.
        opening: words of a passage that the question says.

    Raises:
        ValueError: an option out of its bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        said: float = 0.5,
        people: int | Sequence[int] = (1, 3),
        sentences: int | Sequence[int] = (1, 3),
        passages: int = 2,
        passage: int | Sequence[int] = (24, 96),
        opening: int = 6,
        corpora: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed, corpora=corpora)
        self.said = check_share("said", said)
        self.people = bounds("people", people, MOST_PEOPLE)
        self.sentences = bounds("sentences", sentences, MOST_SENTENCES)
        self.passages = bounds("passages", passages, MOST_PEOPLE)[1]
        self.passage = bounds("passage", passage, MOST_TOKENS)
        self.opening = bounds("opening", opening, MOST_TOKENS)[1]

    def sample(self, index: int, tokens: int) -> Sample:
        """A sample with a context of exactly `tokens` tokens; see `Task.sample`."""
        rng = self.rng(index)
        make = self._said if rng.random() < self.said else self._read
        return make(rng, index, tokens)

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`: nothing but the answer was said. `in_order`: the share of its words that were
            said in their order. `f1`: the words that it shares with the answer, in any order.
        """
        return {
            **super().score(question, said),
            "in_order": words_in_order(said, question.answers),
            "f1": f1(said, question.answers),
        }

    # --- about somebody -------------------------------------------------------------------------

    def _said(self, rng: random.Random, index: int, tokens: int) -> Sample:
        """Sentences about people, anywhere in running text."""
        told = [self._told(rng, name) for name in self._people(rng)]
        needles = [[self.needle(rng, sentence) for sentence in own] for _, own in told]
        whole = [list(chain(*own)) for own in needles]
        count = num_fitting(whole, tokens, self.people[0])
        told, needles = told[:count], needles[:count]
        depths = [in_order(rng, len(own)) for own in needles]
        flat = list(chain(*needles))
        name, haystack = self.haystack(index)
        running = haystack.draw(rng, room_beside(flat, tokens))
        context, ranges = self.tell(running, flat, list(chain(*depths)), tokens)
        places = iter(ranges)
        where = [tuple(next(places) for _ in own) for own in needles]
        questions = [
            self._question(
                filled(rng, ASKED[self.split], {"name": person}), " ".join(own), at, "said"
            )
            for (person, own), at in zip(told, where, strict=True)
        ]
        return Sample(context, tuple(questions), {"haystack": name})

    def _people(self, rng: random.Random) -> list[str]:
        """Different people, none of whom shares a name with another."""
        count = rng.randint(*self.people)
        firsts = rng.sample(PEOPLE[self.split], count)
        families = rng.sample(FAMILIES[self.split], count)
        return [" ".join(name) for name in zip(firsts, families, strict=True)]

    def _told(self, rng: random.Random, person: str) -> tuple[str, list[str]]:
        """What is told of somebody: their name, and different sentences."""
        count = rng.randint(*self.sentences)
        templates = rng.sample(TOLD[self.split], count)
        return person, [filled(rng, [one], self._fields(rng, person)) for one in templates]

    def _fields(self, rng: random.Random, person: str) -> dict[str, str]:
        words = {
            "town": TOWNS, "adjective": ADJECTIVES, "thing": THINGS, "small": SMALL_THINGS,
            "room": ROOMS,
        }  # fmt: skip
        drawn = {name: rng.choice(known[self.split]) for name, known in words.items()}
        return {**drawn, "name": person, "number": str(rng.randint(2, 99))}

    # --- a passage ------------------------------------------------------------------------------

    def _read(self, rng: random.Random, index: int, tokens: int) -> Sample:
        """Running text, and passages of it."""
        name, haystack = self.haystack(index)
        context = haystack.draw(rng, tokens)
        found = [self._passage(rng, context) for _ in range(self.passages)]
        questions = [
            self._question(
                filled(rng, AGAIN[self.split], {"count": str(len(words)), "opening": opening}),
                " ".join(words),
                (where,),
                "passage",
            )
            for words, opening, where in found
        ]
        return Sample(context, tuple(questions), {"haystack": name})

    def _passage(self, rng: random.Random, context: Sequence[int]) -> tuple[list[str], str, range]:
        """Words of a passage, how it begins, and where it stands.

        In a text that repeats itself it may begin like another, and in one of few words it may be
        no longer than its opening.

        Raises:
            ValueError: the text has too few tokens, or no words.
        """
        text = _plain(self.tokenizer.decode(context))
        most = min(self.passage[1], len(context))
        if most < self.passage[0]:
            raise ValueError(f"tokens must be at least {self.passage[0]}, got {len(context)}")
        words: list[str] = []
        for _ in range(_TRIES):
            length = rng.randint(self.passage[0], most)
            start = rng.randrange(len(context) - length + 1)
            # The first and the last word may be cut.
            words = self.tokenizer.decode(context[start : start + length]).split()[1:-1]
            opening = " ".join(words[: self.opening])
            if len(words) > self.opening and text.count(opening) == 1:
                break
        if not words:
            raise ValueError(f"a passage of {self.passage[0]} tokens must have words, got none")
        return words, " ".join(words[: self.opening]), range(start, start + length)

    def _question(
        self, text: str, answer: str, evidence: tuple[range, ...], asked: str
    ) -> Question:
        meta = {"asked": asked, "words": len(answer.split())}
        return Question(text, (answer,), evidence=evidence, meta=meta)


def _plain(text: str) -> str:
    """Text with one space between its words."""
    return " ".join(text.split())


TOLD: dict[Split, tuple[str, ...]] = {
    "train": (
        "{name} left the {adjective} {thing} in {town}.",
        "In {town}, {name} paid {number} euros for the {small}.",
        "{name} has {number} cousins, and all of them live near {town}.",
        "The {adjective} {thing} was repaired by {name}.",
        "{name} once slept in the {room} for {number} nights.",
        "Nobody but {name} knew that the {small} lay behind the {thing}.",
        "When it rains, {name} sits in the {room} and draws the {adjective} {thing}.",
        "{name} walked from {town} with the {small} in a pocket.",
        "It was {name} who counted {number} steps to the {room}.",
    ),
    "test": (
        "{name} sold the {adjective} {thing} to a stranger from {town}.",
        "For {number} dollars {name} had the {small} gilded.",
        "{name} spent {number} winters in {town}.",
        "The letters about the {thing} were all written by {name}.",
        "{name} locked the {small} into the {room} and went away.",
        "A photograph shows {name} beside the {adjective} {thing}.",
        "{name} swears that the {room} is haunted by a {thing}.",
        "On the way to {town}, {name} broke the {small}.",
    ),
}
ASKED: dict[Split, tuple[str, ...]] = {
    "train": (
        "Repeat what was said about {name}.",
        "Write again what the text tells of {name}.",
        "Say word for word what you have read about {name}.",
    ),
    "test": (
        "What exactly was stated about {name}? Quote it.",
        "Quote every sentence on {name}.",
    ),
}
AGAIN: dict[Split, tuple[str, ...]] = {
    "train": (
        "Write again the passage of {count} words that begins with: {opening}",
        'Repeat the {count} words of the text that start with "{opening}".',
    ),
    "test": (
        'Quote the {count} words from "{opening}" on.',
        "Reproduce {count} words of what you have read, from here: {opening}",
    ),
}
