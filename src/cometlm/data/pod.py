"""POD, the markup of Perl's manual, as plain text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator


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
