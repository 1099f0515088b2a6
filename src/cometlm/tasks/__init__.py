"""Tasks: samples of one shape, to train on and to measure with."""

from __future__ import annotations

import inspect
from typing import Any

from cometlm.registry import Registry
from cometlm.tasks.base import Question, Sample, Split, Task
from cometlm.tasks.behaviour import Behaviour
from cometlm.tasks.continuation import Continuation
from cometlm.tasks.documents import Documents
from cometlm.tasks.facts import Facts
from cometlm.tasks.keys import Keys
from cometlm.tasks.lcr import LongReasoning
from cometlm.tasks.own import Own
from cometlm.tasks.passkey import Passkey
from cometlm.tasks.questions import Questions
from cometlm.tasks.recall import Recall
from cometlm.tasks.ruler import Ruler
from cometlm.tasks.scrolls import Scrolls
from cometlm.tasks.traces import Traces
from cometlm.tasks.tracking import Tracking

_OURS: dict[str, type[Task]] = {
    "passkey": Passkey,
    "facts": Facts,
    "tracking": Tracking,
    "keys": Keys,
    "behaviour": Behaviour,
    "traces": Traces,
    "questions": Questions,
    "documents": Documents,
    "scrolls": Scrolls,
    "lcr": LongReasoning,
    "ruler": Ruler,
    "continue": Continuation,
    "recall": Recall,
}
TASKS: Registry[type[Task]] = Registry("task", "cometlm.tasks", _OURS)


def make_task(
    name: str, tokenizer: Any, *, split: Split = "test", seed: int = 0, **options: Any
) -> Task:
    """The task of a name.

    Args:
        name: one of `TASKS`.
        tokenizer, split, seed: see `Task`.
        options: what else its class takes.

    Raises:
        ValueError: no task of that name, an option that it does not have, or a value that is out of
            an option's bounds.
    """
    kind = TASKS.find(name)
    parameters = inspect.signature(kind).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"split", "seed"}
    if unknown := options.keys() - known:
        raise ValueError(
            f"options of the task {name} are {', '.join(sorted(known)) or 'none'}, got "
            f"{', '.join(sorted(unknown))}"
        )
    try:
        return kind(tokenizer, split=split, seed=seed, **options)
    except TypeError as error:
        if not options:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(f"options of the task {name} cannot be {given}: {error}") from error


__all__ = ["TASKS", "Own", "Question", "Sample", "Task", "make_task"]
