"""Packages that not every install has: which are missing, and the command that brings them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

# Double quotes: cmd.exe on Windows passes single ones on to pip.
EVAL = 'pip install "cometlm[eval]"'
PLOT = 'pip install "cometlm[plot]"'
RULER = 'pip install "cometlm[ruler]"'
TRAIN = 'pip install "cometlm[train]"'


def missing(modules: Iterable[str]) -> list[str]:
    """Those of some top-level modules that cannot be imported; none of them is imported."""
    return [name for name in modules if find_spec(name) is None]


def lacks(purpose: str, modules: Iterable[str], command: str | None = None) -> str | None:
    """One sentence on what `purpose` needs and is not installed, or None if all of it is.

    Args:
        modules: top-level modules, whose packages have the same names.
        command: what brings them all; default pip with the missing ones.
    """
    names = missing(modules)
    if not names:
        return None
    return f"{purpose} needs {listed(names)}; run: {command or pip_install(names)}"


def pip_install(packages: Iterable[str]) -> str:
    """The command that installs packages."""
    return f"pip install {' '.join(packages)}"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: "a", "a and b", "a, b and c"; at least one."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
