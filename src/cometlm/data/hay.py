"""Text to hide things in: token ids of any length, drawn at random places.

A `Hay` draws; where its text comes from is its own affair. Nothing is tokenised before it is
wanted, so a source may be as large as the disk.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)

# Numbers that nobody asks to keep, as programs and books have them: N is a number, W a word.
_STREWN = (
    "\nMAX_W = N\n", "\n    W = N\n", "W[N:N]", " if W > N:", "[N, N, N, N]", "(N, N)", " W=N ",
    '{"W": N, "W": N}', "\nN: 'W',\nN: 'W',\nN: 'W',\n", "\nN N N\nN N N\nN N N\n", " line N ",
    "\n# N-N-N, N:N\n", "\nassert W(N) == N\n", "\n| N | N | W |\n| N | N | W |\n", " N.N ",
    " (see page N) ", " In N there were N of them. ", " It cost N pounds. ", " about N or N, ",
    " chapter N, verse N. ", " on the Nth at N o'clock ", " W N, ", " N W, ", " no. N ", " port N ",
    " from N to N ", " +N N N ", " N% of N ", " error N: ",
    "\n    raise ValueError('W must be in N..N, got %d' % W)\n", " W must be below N, ",
    "\n# between N and N; N is too many\n", " (at most N) ", "\nassert 0 <= W < N, 'W out of N'\n",
    "\nW = W * N + N // N\n", " must be N ", " with N W at N, ", " the W is N of N. ",
)  # fmt: skip
_STREWN_WORDS = ("size", "count", "year", "offset", "limit", "people", "miles", "width", "total")

_NUMBER = re.compile(rb"(?<!\w)(?<!\d\.)\d{4,7}(?!\w)(?!\.\d)")
_AROUND = (30, 120, 400)  # bytes of text on either side of a number
_TRIES = 32  # places of files that hold nothing, one after the other


class Hay(ABC):
    """A source of token ids."""

    @abstractmethod
    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """Exactly `tokens` ids of running text from a place that `rng` chooses."""


class FileHay(Hay):
    """Running text from a random place of a random file; long files are chosen more often.

    A draw that is longer than what its file has left goes on in other files.

    Raises:
        ValueError: no files, or only empty ones; when drawing, no text in them.
    """

    def __init__(self, tokenizer: Any, files: Iterable[str | Path]) -> None:
        self._tokenizer = tokenizer
        self._files = [path for path in map(Path, files) if path.stat().st_size]
        if not self._files:
            raise ValueError("there is no text to draw from: no files, or only empty ones")
        self._weights = [path.stat().st_size for path in self._files]
        self._kept: tuple[Path, bytes] | None = None

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        ids: list[int] = []
        in_vain = 0
        while len(ids) < tokens:
            (path,) = rng.choices(self._files, self._weights)
            text = self._read(path)
            missing = tokens - len(ids)
            # Few texts have less than two characters a token; what is too much is cut off.
            size = min(len(text), max(64, missing * 7))
            start = rng.randrange(len(text) - size + 1)
            piece = text[start : start + size].decode("utf-8", errors="ignore")
            found = encode(self._tokenizer, piece)[:missing]
            in_vain = 0 if found else in_vain + 1
            if in_vain == _TRIES:
                raise ValueError(f"{path} holds no text to draw from, or none in UTF-8")
            ids += found
        return ids

    def _read(self, path: Path) -> bytes:
        if self._kept is None or self._kept[0] != path:
            self._kept = (path, path.read_bytes())
        return self._kept[1]


class PassageHay(FileHay):
    """Passages around numbers of four to seven digits, one after the other.

    Of running text such passages are few, and all that a memory of a key loses is lost at some of
    them: years in a program's constants, ports, sizes, tables.
    """

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`.

        Raises:
            ValueError: as `FileHay`, also where there are no such numbers.
        """
        ids: list[int] = []
        in_vain = 0
        while len(ids) < tokens:
            (path,) = rng.choices(self._files, self._weights)
            text = self._read(path)
            found = _NUMBER.search(text, rng.randrange(len(text))) or _NUMBER.search(text)
            in_vain = 0 if found else in_vain + 1
            if in_vain == _TRIES:
                raise ValueError(f"{path} holds no number to draw from, nor do others")
            if found is not None:
                before, behind = rng.choice(_AROUND), rng.choice(_AROUND)
                piece = text[max(0, found.start() - before) : found.end() + behind]
                ids += encode(self._tokenizer, piece.decode("utf-8", errors="ignore"))
        return ids[:tokens]


class WordHay(Hay):
    """Random words, as the tokenizer's vocabulary has them: nothing to expect, nothing to learn."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _words(self) -> list[int]:
        words = []
        for id_ in range(len(self._tokenizer)):
            text = self._tokenizer.decode([id_])
            if len(text) > 3 and text[0] == " " and text[1:].isascii() and text[1:].isalpha():
                words.append(id_)
        return words

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        return rng.choices(self._words, k=tokens)


class NumberHay(Hay):
    """Random numbers of four to six digits, one after the other."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        numbers = [str(rng.randrange(1000, 1_000_000)) for _ in range(tokens)]  # more than enough
        return encode(self._tokenizer, " ".join(numbers))[:tokens]


class StrewnHay(Hay):
    """Text of another hay with numbers strewn in that nobody asks to keep, thinly or thickly."""

    def __init__(self, tokenizer: Any, hay: Hay) -> None:
        self._tokenizer = tokenizer
        self._hay = hay

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        text = self._hay.draw(rng, tokens)  # more than enough
        apart = rng.choice((30, 80, 200))
        ids: list[int] = []
        while len(ids) < tokens:
            length = rng.randint(apart // 2, apart * 2)
            ids += text[:length] + encode(self._tokenizer, self._numbers(rng))
            del text[:length]
        return ids[:tokens]

    def _numbers(self, rng: random.Random) -> str:
        """One of the snippets, with numbers and words put in."""
        digits = rng.randint(1, 7)
        parts = []
        for letter in rng.choice(_STREWN):
            if letter == "N":
                parts.append(_number(rng, digits))
            elif letter == "W":
                parts.append(rng.choice(_STREWN_WORDS))
            else:
                parts.append(letter)
        return "".join(parts)


def _number(rng: random.Random, digits: int) -> str:
    """Any number, or one that people choose: round, all nines, about a power of two."""
    return rng.choice(
        (
            str(rng.randrange(10 ** (digits - 1), 10**digits)),
            str(rng.randint(1, 9)) + "0" * (digits - 1),
            "9" * digits,
            str(2 ** rng.randint(1, 24) - rng.randint(0, 1)),
        )
    )


class FillerHay(Hay):
    """A few sentences over and over: the usual filler of passkey tests.

    Args:
        anywhere: begin at any token; else at the first, so that every draw is the same text.
    """

    def __init__(self, tokenizer: Any, text: str = FILLER, anywhere: bool = True) -> None:
        self._ids = encode(tokenizer, text)
        self._anywhere = anywhere

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        start = rng.randrange(len(self._ids)) if self._anywhere else 0
        repeats = (start + tokens) // len(self._ids) + 1
        return (self._ids * repeats)[start : start + tokens]


class MixedHay(Hay):
    """Each draw from one of several sources, chosen by weight."""

    def __init__(self, sources: Sequence[Hay], weights: Sequence[float]) -> None:
        self._sources = list(sources)
        self._weights = list(weights)

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """See `Hay.draw`."""
        (source,) = rng.choices(self._sources, self._weights)
        return source.draw(rng, tokens)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of text in the middle of a document: no special tokens around it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
