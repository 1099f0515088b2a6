"""Many keys and their values in a long text, and a question about some of them, as RULER asks.

RULER's four tasks on needles are options of this one: `keys` that nobody asks for, several `values`
of a key, several `queries` in one question.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, get_args

from cometlm.tasks.base import Question, Sample, Split
from cometlm.tasks.names import ADJECTIVES, THINGS
from cometlm.tasks.scoring import share_found
from cometlm.tasks.story import StoryTask, bounds, filled, num_fitting, room_beside

Form = Literal["words", "numbers", "uuids"]
FORMS: tuple[Form, ...] = get_args(Form)
MOST = 256


class Keys(StoryTask):
    """Values of keys.

    Args:
        tokenizer, split, seed, corpora: see `StoryTask`.
        keys: how many are told, or their fewest and most. What does not fit into a text is not
            told, down to those that are asked for.
        values: of each key, each told in a sentence of its own.
        queries: how many keys one question asks for.
        key_form, value_form: "words" (two of them), "numbers" (of seven digits) or "uuids".

    Raises:
        ValueError: an option out of its bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        keys: int | Sequence[int] = 4,
        values: int = 1,
        queries: int = 1,
        key_form: Form = "words",
        value_form: Form = "numbers",
        corpora: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed, corpora=corpora)
        self.queries = bounds("queries", queries, MOST)[0]
        self.keys = bounds("keys", keys, MOST, self.queries)
        self.values = bounds("values", values, 16)[0]
        for name, form in (("key_form", key_form), ("value_form", value_form)):
            if form not in FORMS:
                raise ValueError(f"{name} must be one of {', '.join(FORMS)}, got {form!r}")
        self.key_form: Form = key_form
        self.value_form: Form = value_form

    def sample(self, index: int, tokens: int) -> Sample:
        """A sample with a context of exactly `tokens` tokens; see `Task.sample`.

        Its `meta` says how many `keys` there are.
        """
        rng = self.rng(index)
        taken: set[str] = set()
        count = rng.randint(*self.keys)
        keys = [self._drawn(rng, self.key_form, taken) for _ in range(count)]
        values = [
            [self._drawn(rng, self.value_form, taken) for _ in range(self.values)] for _ in keys
        ]
        told = [
            [self._needle(rng, key, value) for value in own]
            for key, own in zip(keys, values, strict=True)
        ]
        count = num_fitting([list(chain(*own)) for own in told], tokens, self.queries)
        needles = list(chain(*told[:count]))
        name, haystack = self.haystack(index)
        running = haystack.draw(rng, room_beside(needles, tokens))
        depths = [rng.random() for _ in needles]
        context, ranges = self.tell(running, needles, depths, tokens)
        asked = rng.sample(range(count), self.queries)
        found: list[tuple[range, str]] = []  # key by key, in the order in which they are told
        for number in asked:
            own = ranges[number * self.values : (number + 1) * self.values]
            found += sorted(zip(own, values[number], strict=True), key=lambda place: place[0].start)
        answer = ", ".join(value for _, value in found)
        text = filled(rng, ASKED[self.split], {"keys": _listed([keys[number] for number in asked])})
        question = Question(text, (answer,), evidence=tuple(where for where, _ in found))
        return Sample(context, (question,), {"keys": count, "haystack": name})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """How good an answer is.

        Returns:
            `exact`: nothing but the values was said, in their order. `found`: the share of them
            that was said, in any order.
        """
        parts = question.answers[0].split(", ")
        return {**super().score(question, said), "found": share_found(said, parts)}

    def _needle(self, rng: random.Random, key: str, value: str) -> list[int]:
        return self.needle(rng, rng.choice(TOLD[self.split]).format(key=key, value=value))

    def _drawn(self, rng: random.Random, form: Form, taken: set[str]) -> str:
        """A key or value that is not taken; now it is."""
        while (drawn := _draw(rng, form, self.split)) in taken:
            pass
        taken.add(drawn)
        return drawn


def _draw(rng: random.Random, form: Form, split: Split) -> str:
    if form == "words":
        return f"{rng.choice(ADJECTIVES[split])} {rng.choice(THINGS[split])}"
    if form == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


# --- what is said -------------------------------------------------------------------------------

TOLD: dict[Split, tuple[str, ...]] = {
    "train": (
        "The entry for {key} is {value}.",
        "One entry for {key} is {value}.",
        "{key}: {value}.",
        "Under {key} one finds {value}.",
        "{value} stands beside {key}.",
        "What goes with {key} is {value}.",
    ),
    "test": ("A special value of {key} is: {value}.", "{key} -> {value}"),
}
ASKED: dict[Split, tuple[str, ...]] = {
    "train": (
        "What are all the entries for {keys}?",
        "Which entries does the text have for {keys}? Answer with these alone.",
        "List everything that goes with {keys}.",
    ),
    "test": ("What are all the special values of {keys} mentioned in the text?",),
}
