"""A manual: questions of Perl's FAQ, whose answers stand among other sections of the manual.

Pages come as a corpus (`data.corpora`: `perl`, and for tests the pages that it holds out), so no
page is in both splits. An entry of the FAQ, or a part of a section, is a passage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cometlm.data.corpora import corpus_files
from cometlm.data.pod import sections
from cometlm.tasks.base import Split
from cometlm.tasks.passages import Asked, Pool

MOST_ASKED = 1200  # characters of the longest answer that is asked for
_PART = 2400  # characters of a part of a section, unless one of its paragraphs is longer
_NO_TEXT = ("perltoc", "perldelta")  # headings of all pages, and the newest delta once more


def manual(folder: Path | None, split: Split) -> Pool:
    """The passages of a split's pages.

    Args:
        folder: of pages, NAME.pod, all of this split; None: the corpus.

    Raises:
        OSError: the corpus cannot be fetched; says what is missing.
        ValueError: a folder without pages.
    """
    corpus = "perl" if split == "train" else "perl-test"
    return _pool(tuple(corpus_files(corpus if folder is None else str(folder / "*.pod"))))


@lru_cache(maxsize=2)
def _pool(paths: tuple[Path, ...]) -> Pool:
    passages: list[tuple[str, ...]] = []
    asked: list[Asked] = []
    for path in paths:
        if path.stem in _NO_TEXT:
            continue
        is_faq = re.fullmatch(r"perlfaq\d", path.stem)
        for level, heading, body in sections(path.read_text(encoding="utf-8", errors="replace")):
            if is_faq and level == 2 and body and heading.endswith("?"):
                if len(body) <= MOST_ASKED:
                    meta = {"kind": path.stem}
                    asked.append(Asked((heading,), (body,), len(passages), (1,), meta))
                passages.append((f"{heading}\n\n", f"{body}\n\n"))
            else:
                passages += [(f"{path.stem}: {heading}\n\n{part}\n\n",) for part in _parts(body)]
    return Pool(passages, asked)


def _parts(body: str) -> Iterator[str]:
    """A section in parts of whole paragraphs."""
    part = ""
    for paragraph in body.split("\n\n"):
        if part and len(part) + len(paragraph) > _PART:
            yield part
            part = ""
        part = f"{part}\n\n{paragraph}" if part else paragraph
    if part:
        yield part
