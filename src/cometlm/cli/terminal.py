"""Text in and out of terminals and pipes that do not speak UTF-8 (`LC_ALL=C`, code pages, …).

Python gives such a process arguments and input as ASCII with bytes as lone surrogates, and fails
where it prints a character that the encoding lacks. Here text that comes in is UTF-8, as files are,
and what cannot be printed is printed as something like it.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from pathlib import Path

from cometlm.text_file import read_blocks

_PASTED = 0.05  # seconds in which the next line of what is pasted comes
_SIMILAR = "cometlm.similar"
_ALIKE = {"·": "-", "…": "...", "›": ">", "×": "x", "–": "-", "—": "-"}
_ALIKE |= {"‘": "'", "’": "'", "“": '"', "”": '"'}


def allow_any_character() -> None:
    """Let nothing that is printed end the program, and take input for UTF-8 where it is ASCII.

    For the command's own process: it changes the standard streams.
    """
    codecs.register_error(_SIMILAR, _similar)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _holds_everything(stream):
            stream.reconfigure(errors=_SIMILAR)
    if (
        isinstance(sys.stdin, io.TextIOWrapper)
        and codecs.lookup(sys.stdin.encoding).name == "ascii"
    ):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def prompt_text(given: str) -> str:
    """A prompt as it was given on the command line, or standard input where that is "-".

    Raises:
        ValueError: standard input is not UTF-8 text.
    """
    if given == "-":
        return "".join(read_blocks(sys.stdin.buffer, "standard input"))
    return os.fsencode(given).decode("utf-8", errors="surrogateescape")


def read_message(prompt: str) -> str:
    """A message that is typed: a line, or all lines that were pasted at once.

    Raises:
        EOFError: the input ended.
        KeyboardInterrupt: Ctrl-C.
    """
    lines = [input(prompt)]
    while sys.stdin.isatty() and _more_is_there():
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines)


def _more_is_there() -> bool:
    """Whether a whole line stands in the terminal already: faster than anybody types."""
    try:
        return bool(select.select([sys.stdin], [], [], _PASTED)[0])
    except (OSError, ValueError):  # no such call for terminals: Windows
        return False


def as_path(text: str) -> Path:
    """The path that a line of input names, whatever the encoding of file names is."""
    return Path(os.fsdecode(text.encode("utf-8", errors="surrogateescape")))


def _holds_everything(stream: io.TextIOWrapper) -> bool:
    """Whether any text can be printed; not so UTF-8 that refuses file names which are not."""
    return codecs.lookup(stream.encoding).name.startswith("utf") and stream.errors != "strict"


def _similar(error: UnicodeError) -> tuple[str, int]:
    """What to print for characters that an encoding lacks: similar ones, or their numbers."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_ALIKE.get(one) or _number(one) for one in lacking), error.end


def _number(character: str) -> str:
    return character.encode("ascii", errors="backslashreplace").decode()
