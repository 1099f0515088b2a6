"""Traces: terminal and tool-call sessions whose next step needs what an earlier one gave out.

The session is generated: commands with what they print, calls with what they return, and output
that nobody needs. A question asks for the next command or call; it has to name a number, a digest
or a code that was given out once, maybe long ago. Steps of its kind stand around as distractors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cometlm.tasks.base import Question, Sample, Split, Task
from cometlm.tasks.names import ADJECTIVES, FAMILIES, PEOPLE, THINGS, TOWNS
from cometlm.tasks.story import bounds, check_share


@dataclass(frozen=True)
class Step:
    """A kind of step that gives something out, and the step that needs it.

    Attributes:
        text: what the session shows, with {name}, what it is about, and {value}, what it gives out.
        value: how the value is made: "number", "digest" or "code".
        asked: the question, with {name}.
        next: the command or call that is the answer, with {value}.
    """

    text: str
    value: str
    asked: str
    next: str


class Traces(Task):
    """The next command of a terminal, or the next call of a tool.

    Args:
        tokenizer, split, seed: see `Task`.
        questions: how many are asked at most.
        noise: share of steps that give out nothing that is asked for.

    Raises:
        ValueError: an option out of its bounds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        split: Split = "test",
        seed: int = 0,
        questions: int = 3,
        noise: float = 0.4,
    ) -> None:
        super().__init__(tokenizer, split=split, seed=seed)
        self.questions = bounds("questions", questions, 256)[0]
        self.noise = check_share("noise", noise)

    def sample(self, index: int, tokens: int) -> Sample:
        """A session of at most `tokens` tokens; see `Task.sample`.

        Its `meta` says how many `steps` give something out; a question's, its `kind`.
        """
        rng = self.rng(index)
        context: list[int] = []
        given: list[tuple[str, str, str, range]] = []
        for kind, name, value, text in self._steps(rng):
            ids = self.encode(text)
            where = range(len(context), len(context) + len(ids))
            if where.stop > tokens and not given:
                raise ValueError(f"tokens must be at least {len(ids)}, got {tokens}")
            if where.stop > tokens:
                break
            context += ids
            if kind:
                given.append((kind, name, value, where))
        chosen = rng.sample(given, min(self.questions, len(given)))
        questions = tuple(self._question(*one) for one in chosen)
        return Sample(context, questions, {"steps": len(given)})

    def score(self, question: Question, said: str) -> dict[str, float]:
        """`exact`: the whole step; and `found`: what was given out is in what was said."""
        return {**super().score(question, said), "found": float(question.meta["value"] in said)}

    def _question(self, kind: str, name: str, value: str, where: range) -> Question:
        step = STEPS[self.split][kind]
        meta = {"kind": kind, "value": value}
        answer = step.next.format(value=value)
        return Question(step.asked.format(name=name), (answer,), evidence=(where,), meta=meta)

    def _steps(self, rng: random.Random) -> Iterator[tuple[str, str, str, str]]:
        """Kind, name, value and text of one step after the other, from one that gives out on.

        Noise has only a text.
        """
        names: set[tuple[str, str]] = set()
        values: set[str] = set()
        kinds = list(STEPS[self.split])
        while True:
            kind = rng.choice(kinds)
            step = STEPS[self.split][kind]
            name, value = _name(rng, kind, self.split), _VALUES[step.value](rng)
            is_known = (kind, name) in names or value in values  # in a long text names run out
            if is_known or (names and rng.random() < self.noise):
                yield "", "", "", self._noise(rng)
                continue
            names.add((kind, name))
            values.add(value)
            yield kind, name, value, step.text.format(name=name, value=value)

    def _noise(self, rng: random.Random) -> str:
        lines = [
            rng.choice(NOISE[self.split]).format(
                thing=rng.choice(THINGS[self.split]).replace(" ", "-"),
                adjective=rng.choice(ADJECTIVES[self.split]),
                number=rng.randrange(10, 10_000),
            )
            for _ in range(rng.randint(1, 5))
        ]
        return "".join(lines)


# --- what is said -------------------------------------------------------------------------------

STEPS: dict[Split, dict[str, Step]] = {
    "train": {
        "process": Step(
            "$ pgrep -l {name}\n{value} {name}\n",
            "number",
            "Which command ends the process {name}?",
            "kill {value}",
        ),
        "commit": Step(
            "$ git commit -am '{name}'\n[main {value}] {name}\n 1 file changed\n",
            "digest",
            "Which command reverts the commit '{name}'?",
            "git revert {value}",
        ),
        "order": Step(
            'call place_order(customer="{name}")\nreturned order_id="{value}", status="open"\n',
            "code",
            "Which call cancels the order of {name}?",
            'cancel_order(order_id="{value}")',
        ),
    },
    "test": {
        "container": Step(
            "# docker run --detach {name}\n{value}\n",
            "digest",
            "How is the container of the image {name} stopped?",
            "docker stop {value}",
        ),
        "job": Step(
            "# sbatch {name}.sh\nSubmitted batch job {value}\n",
            "number",
            "How is the batch job of {name}.sh taken off the queue?",
            "scancel {value}",
        ),
        "booking": Step(
            '> book_flight {{"destination": "{name}"}}\n< {{"reference": "{value}", "seats": 1}}\n',
            "code",
            "How does the tool check_in have to be called for the flight to {name}?",
            'check_in {{"reference": "{value}"}}',
        ),
    },
}
NOISE: dict[Split, tuple[str, ...]] = {
    "train": (
        "$ ls -s {adjective}\n{number} {thing}.txt\n",
        "$ wc -l {thing}.csv\n{number} {thing}.csv\n",
        "warning: {thing} is {adjective}, {number} times\n",
        'call look_up(item="{thing}")\nreturned price={number}\n',
    ),
    "test": (
        "# du -k /srv/{adjective}\n{number}\t/srv/{adjective}\n",
        "# grep -c {thing} access.log\n{number}\n",
        "info: {number} requests for /{adjective}/{thing}\n",
        '> get_stock {{"article": "{thing}"}}\n< {{"left": {number}}}\n',
    ),
}


def _name(rng: random.Random, kind: str, split: Split) -> str:
    """What a step is about."""
    if kind == "order":
        return f"{rng.choice(PEOPLE[split])} {rng.choice(FAMILIES[split])}"
    if kind == "booking":
        return rng.choice(TOWNS[split])
    adjective, thing = rng.choice(ADJECTIVES[split]), rng.choice(THINGS[split])
    if kind == "commit":
        return f"Mend the {adjective} {thing}"
    return f"{adjective}-{thing.replace(' ', '-')}"


_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def _digest(rng: random.Random) -> str:
    """Eight hexadecimal digits, among which no number of five digits stands."""
    halves = (rng.choice("abcdef") + f"{rng.randrange(1 << 12):03x}" for _ in range(2))
    return "".join(halves)


_VALUES: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randrange(10_000, 100_000)),
    "digest": _digest,
    "code": lambda rng: "".join(rng.choices(_LETTERS, k=3)) + str(rng.randrange(100, 1000)),
}
