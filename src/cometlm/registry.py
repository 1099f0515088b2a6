"""Things by name, ours and other packages': tasks, methods, corpora, chunk plans, backbones.

A package of one's own adds to a registry by an entry point in its `pyproject.toml`:

    [project.entry-points."cometlm.tasks"]
    riddles = "my_package.riddles:Riddles"

In a program or a notebook, `TASKS.add("riddles", Riddles)` does the same until it ends.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """What is known by name; other packages' are imported when they are asked for.

    Args:
        kind: what one of them is called in messages, in the singular.
        group: of the entry points that add to it.
        own: those of this package.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, T]) -> None:
        self._kind = kind
        self._group = group
        self._known = dict(own)

    @cached_property
    def _offered(self) -> dict[str, EntryPoint]:
        """Entry points by name; what is ours cannot be replaced by them."""
        found = {point.name: point for point in entry_points(group=self._group)}
        return {name: point for name, point in found.items() if name not in self._known}

    def add(self, name: str, value: T) -> None:
        """Make a thing known in this process.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self:
            raise ValueError(f"{self._kind} {name!r} is there already")
        self._known[name] = value

    def find(self, name: str) -> T:
        """The thing of a name.

        Raises:
            ValueError: there is none; says which there are, and which is nearest. Or a package's
                cannot be imported.
        """
        if name not in self:
            close = difflib.get_close_matches(name, list(self), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown {self._kind} {name!r}; there are {', '.join(self)}{hint}")
        return self[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            self._known[name] = self._load(self._offered[name])
        return self._known[name]

    def _load(self, point: EntryPoint) -> T:
        try:
            loaded: Any = point.load()
        except Exception as error:  # whatever the package does when it is imported
            raise ValueError(
                f"{self._kind} {point.name!r} cannot be imported from {point.value}: {error}"
            ) from error
        found: T = loaded
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._offered

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._known, *self._offered])

    def __len__(self) -> int:
        return len(list(iter(self)))
