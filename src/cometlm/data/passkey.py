"""Passkey samples: a key somewhere in a long text, and a question about it at the end.

A sample is what a session does: the text is read as it is, then asked in the tokenizer's chat
template. It may hide several keys under names and ask for one. How is said in `data.wordings`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from cometlm.data.hay import Hay, encode
from cometlm.data.wordings import TRAINING, Wording
from cometlm.session.chat_template import render_turn

# fmt: off
_NAMES = (
    "Ada", "Basil", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Imani", "Jonas", "Keiko",
    "Luca", "Mira", "Nadia", "Omar", "Priya", "Quinn", "Rosa", "Stefan", "Tomas", "Uma", "Viktor",
    "Wanda", "Xenia", "Yusuf", "Zoe",
)
_THINGS = (
    "the archive", "the boiler room", "the north gate", "the safe", "the library", "the vault",
    "the greenhouse", "the server", "the old cabin", "the ferry", "the laboratory", "the museum",
    "the garage", "the attic", "the school",
)
# fmt: on


@dataclass(frozen=True)
class PasskeySample:
    """One text with its questions and answers, as token ids.

    Attributes:
        text: the text that keys are hidden in.
        turns: for each question its turn up to the head of the answer, and the answer with the
            token that ends it.
        key: what the first question asks for.
        depth: where that was hidden, 0 (start of the text) … 1 (end).
        said: where in the text the sentence stands that says so.
    """

    text: list[int]
    turns: list[tuple[list[int], list[int]]]
    key: str
    depth: float
    said: range

    @property
    def prompt(self) -> list[int]:
        """The text and the first question."""
        return self.text + self.turns[0][0]

    @property
    def answer(self) -> list[int]:
        """What follows the prompt: the first answer."""
        return self.turns[0][1]

    @property
    def input_ids(self) -> list[int]:
        """The text and all turns."""
        return self.text + [id_ for turn in self.turns for part in turn for id_ in part]

    @property
    def labels(self) -> list[int]:
        """Ids over the answers, -100 elsewhere."""
        labels = [-100] * len(self.text)
        for question, answer in self.turns:
            labels += [-100] * len(question) + answer
        return labels


@dataclass(frozen=True)
class PasskeyTask:
    """Makes samples of an exact length.

    Args:
        tokenizer: with a chat template.
        hay: what keys are hidden in.
        wording: how.
        digits: shortest and longest key.
        distinct: fewest and most different digits in a key. With few, it is their order that has to
            be remembered: which digit followed which does not say it.
        keys: fewest and most keys in one text; with more than one each has an owner.
        questions: ask for so many of them at most, one after the other.
    """

    tokenizer: Any
    hay: Hay
    wording: Wording = TRAINING
    digits: tuple[int, int] = (5, 5)
    distinct: tuple[int, int] = (10, 10)
    keys: tuple[int, int] = (1, 1)
    questions: int = 1
    _boundaries: list[set[int]] = field(default_factory=list, repr=False, compare=False)

    def draw(
        self,
        rng: random.Random,
        tokens: int,
        depth: float | None = None,
        key: str | None = None,
        asked: bool = True,
    ) -> PasskeySample:
        """A sample of exactly `tokens` tokens, its answers among them.

        Args:
            depth: where to hide the key that is asked for first; drawn if None.
            key: what to hide there; drawn if None.
            asked: count the questions and answers among the tokens.

        Raises:
            ValueError: `tokens` is too few for the keys, questions and answers.
        """
        count = rng.randint(*self.keys)
        owners = rng.sample(_NAMES + _THINGS, count)
        owned = any("{owner}" in sentence for sentence in self.wording.hidden)
        if count == 1 and (not owned or rng.random() < 0.5):
            owners = [""]
        whats = rng.choices(self.wording.whats, k=count)
        keys = [key or self._key(rng), *(self._key(rng) for _ in owners[1:])]
        depths = [rng.random() if depth is None else depth, *(rng.random() for _ in owners[1:])]
        names = [
            {"owner": owner, "what": what, "key": key}
            for owner, what, key in zip(owners, whats, keys, strict=True)
        ]
        needles = [self._needle(rng, one) for one in names]
        turns = [self._turn(rng, one, first=not i) for i, one in enumerate(names[: self.questions])]
        said = sum(len(part) for turn in turns for part in turn) if asked else 0
        left = tokens - said - sum(map(len, needles))
        if left < 0:
            raise ValueError(
                f"tokens must be at least {tokens - left} for the keys, questions and answers, "
                f"got {tokens}"
            )
        text, places = self._hide(self.hay.draw(rng, left), needles, depths)
        return PasskeySample(text, turns, keys[0], depths[0], places[0])

    def _key(self, rng: random.Random) -> str:
        digits = rng.randint(*self.digits)
        if self.distinct == (10, 10):
            return str(rng.randrange(10 ** (digits - 1), 10**digits))
        drawn = rng.sample("0123456789", rng.randint(*self.distinct))
        first = rng.choice([digit for digit in drawn if digit != "0"])
        return first + "".join(rng.choices(drawn, k=digits - 1))

    def _needle(self, rng: random.Random, names: dict[str, str]) -> list[int]:
        hidden = _fitting(rng, self.wording.hidden, names)
        frame = rng.choice(("\n\n{}\n\n", " {} ", "\n{}\n"))
        return encode(self.tokenizer, frame.format(hidden[0].upper() + hidden[1:]))

    def _turn(
        self, rng: random.Random, names: dict[str, str], first: bool
    ) -> tuple[list[int], list[int]]:
        asked = _fitting(rng, self.wording.asked, names)
        turn = render_turn(self.tokenizer, asked, first=first, began=True)
        # What follows the answer up to its end-of-turn token belongs to it: it says when to stop.
        # The rest of the frame, if any, stands in front of the next question.
        end, *rest = encode(self.tokenizer, turn.closing)
        question = ([] if first else rest) + encode(self.tokenizer, turn.opening)
        answered = rng.choice(self.wording.answered).format(**names)
        return question, [*encode(self.tokenizer, answered), end]

    def _hide(
        self, hay: list[int], needles: list[list[int]], depths: list[float]
    ) -> tuple[list[int], list[range]]:
        """Needles put into the hay at their depths, where words begin, and where each stands."""
        places = [self._word_start(hay, round(depth * len(hay))) for depth in depths]
        said = [range(0)] * len(needles)
        text: list[int] = []
        done = 0
        for i in sorted(range(len(needles)), key=places.__getitem__):
            text += hay[done : places[i]] + needles[i]
            said[i] = range(len(text) - len(needles[i]), len(text))
            done = places[i]
        return text + hay[done:], said

    def _word_start(self, hay: list[int], place: int) -> int:
        for near in range(place, min(place + 16, len(hay))):
            if near == 0 or hay[near] in self._word_starts:
                return near
        return place

    @property
    def _word_starts(self) -> set[int]:
        """Ids that begin with white space; found once per task."""
        if not self._boundaries:
            size = len(self.tokenizer)
            self._boundaries.append(
                {i for i in range(size) if self.tokenizer.decode([i])[:1].isspace()}
            )
        return self._boundaries[0]


def _fitting(rng: random.Random, sentences: tuple[str, ...], names: dict[str, str]) -> str:
    """A sentence that has a place for an owner if there is one, and none if not, filled in."""
    owned = bool(names["owner"])
    return rng.choice([s for s in sentences if ("{owner}" in s) == owned]).format(**names)
