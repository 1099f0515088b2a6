"""A manual: questions of Perl's FAQ, whose answers stand among other sections of the manual.

Pages come as a corpus (`data.corpora`: `perl`, and for tests the pages that it holds out), so no
page is in both splits. An entry of the FAQ, or a part of a section, is a passage.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cometlm.data.corpora import corpus_files
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


# --- POD, the markup of Perl's manual -----------------------------------------------------------


def sections(pod: str) -> Iterator[tuple[int, str, str]]:
    """The level, the heading and the plain text of each section that has one."""
    level, heading, told = 0, "", list[str]()
    for paragraph in re.split(r"\n[ \t]*\n", pod):
        command, _, rest = paragraph.strip("\n").partition(" ")
        if command.startswith("=head"):
            if heading and told:
                yield level, heading, _text(told)
            level, heading, told = int(command[5:6]), plain(" ".join(rest.split())).strip(), []
        elif command.startswith("=item"):
            name = re.sub(r"^\*(\s+|$)", "", plain(rest).strip())  # a bullet, not a sign's name
            told.append(f"* {name}".rstrip())
        elif paragraph[:1] in (" ", "\t"):
            told.append(paragraph.rstrip())  # program text stands as it is
        elif not paragraph.startswith("=") and paragraph.strip():
            told.append(plain(paragraph).strip())
    if heading and told:
        yield level, heading, _text(told)


def _text(paragraphs: list[str]) -> str:
    return "\n\n".join(filter(str.strip, paragraphs)).strip("\n")


_HIDDEN = str.maketrans("<>", "\ue000\ue001")  # signs that are text, while codes are taken out
_SHOWN = str.maketrans("\ue000\ue001", "<>")


def plain(paragraph: str) -> str:
    """A paragraph without its formatting codes, such as C<print> or L<perlfunc/open>."""
    text = re.sub(r"E<(\w+)>", lambda code: _sign(code[1]).translate(_HIDDEN), paragraph)
    for count in (4, 3, 2):
        opening, closing = "<" * count, ">" * count
        code = rf"([A-Z]){opening}\s+(.*?)\s+{closing}"
        text = re.sub(code, _without_code, text, flags=re.DOTALL)
    while (less := re.sub(r"([A-Z])<([^<>]*)>", _without_code, text)) != text:
        text = less
    return text.translate(_SHOWN)


def _sign(name: str) -> str:
    """What stands for a name or a number in E<…>."""
    number = re.fullmatch(r"(0x[\da-fA-F]+|\d+)", name)
    return chr(int(name, 0)) if number else html.unescape(f"&{name};")


def _without_code(code: re.Match[str]) -> str:
    letter, text = code[1], code[2].translate(_HIDDEN)
    if letter in "XZ":  # entries of an index, and nothing
        return ""
    if letter == "L":
        text, bar, _ = text.partition("|")
        if not bar and "/" in text and "://" not in text:
            page, _, part = text.partition("/")
            part = part.strip('"')
            return f"{part} in {page}" if page else part
    return text
