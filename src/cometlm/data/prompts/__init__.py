"""Prompts that a user might begin with, by name: what a backbone answers without any context.

Train and test share none. To learn or measure with prompts of your own, name a file, a prompt a
line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from cometlm.data.corpora import corpus_files
from cometlm.data.pod import plain

Split = Literal["train", "test"]


def prompts_of(name: str, split: Split) -> list[str]:
    """The prompts of a name, always in the same order.

    Args:
        name: "everyday" (small talk, facts, chores), "knowledge" (what is widely known), "faq"
            (what Perl's manual is asked; Debian's package), or a file of your own, which is the
            same for both splits.
        split: which of them.

    Raises:
        ValueError: neither a name nor a file, or a file without prompts.
        OSError: a file or package that cannot be read or fetched.
    """
    if name in SOURCES:
        return SOURCES[name](split)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"prompts must be {', '.join(SOURCES)} or a file, got {name!r}")
    found = _lines(path)
    if not found:
        raise ValueError(f"{path} must hold prompts, a line each, got none")
    return found


def _listed(name: str, split: Split) -> list[str]:
    """Those of a file here."""
    return _lines(Path(__file__).parent / f"{name}-{split}.txt")


def _faq(split: Split) -> list[str]:
    """Headings that ask, of the pages of the split's corpus."""
    pages = corpus_files("perl" if split == "train" else "perl-test")
    wanted = [page for page in pages if re.fullmatch(r"perlfaq\d\.pod", page.name)]
    heads = (line.removeprefix("=head2 ") for page in wanted for line in _lines(page, "=head2 "))
    return [plain(head).strip() for head in heads if head.endswith("?")]


def _lines(path: Path, beginning: str = "") -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and line.startswith(beginning)]


SOURCES: dict[str, Callable[[Split], list[str]]] = {
    "everyday": partial(_listed, "everyday"),
    "knowledge": partial(_listed, "knowledge"),
    "faq": _faq,
}
