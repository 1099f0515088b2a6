"""Methods: ways to read a long text and answer about it, to be measured side by side."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from cometlm.core.foreseen import Foreseen
from cometlm.methods.base import Budget, Method, Reader, TooLongError
from cometlm.methods.comet import Comet
from cometlm.methods.full import Full
from cometlm.methods.loader import Loader
from cometlm.methods.retrieve import Retrieve
from cometlm.methods.rmt import Rmt
from cometlm.methods.summary import Summary
from cometlm.methods.truncate import Truncate
from cometlm.methods.window import Window
from cometlm.methods.xl import Xl
from cometlm.registry import Registry

METHODS: Registry[type[Method]] = Registry(
    "method",
    "cometlm.methods",
    {
        "comet": Comet,
        "full": Full,
        "retrieve": Retrieve,
        "rmt": Rmt,
        "summary": Summary,
        "truncate": Truncate,
        "window": Window,
        "xl": Xl,
    },
)


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse options that a method's `open` does not take.

    Args:
        name: one of `METHODS`.
        options: their names.

    Raises:
        ValueError: no method of that name, or an option that it does not have.
    """
    known = set(inspect.signature(METHODS.find(name).open).parameters) - {"loader", "budget"}
    if unknown := set(options) - known:
        raise ValueError(
            f"options of the method {name} are {', '.join(sorted(known)) or 'none'}, got "
            f"{', '.join(sorted(unknown))}"
        )


__all__ = [
    "METHODS",
    "Budget",
    "Foreseen",
    "Loader",
    "Method",
    "Reader",
    "TooLongError",
    "check_options",
]
