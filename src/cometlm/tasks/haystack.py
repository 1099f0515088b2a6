"""Haystacks: running text of any length, and needles put into it.

Nothing is tokenised before it is wanted, so a corpus may be as large as the disk.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cometlm.session.plain_text import PlainText

_TRIES = 32  # places of files that hold no text, one after the other
_NEAR = 16  # tokens within which a word begins, if one does
_WORD_MARK = "▁"  # what pieces of SentencePiece begin with where a word begins


class Haystack:
    """Running text from random places of files; long files are chosen more often.

    Args:
        tokenizer: whose ids are drawn.
        files: plain text.

    Raises:
        ValueError: no files, or only empty ones.
    """

    def __init__(self, tokenizer: Any, files: Iterable[str | Path]) -> None:
        self._tokenizer = tokenizer
        self._files = [path for path in map(Path, files) if path.stat().st_size]
        if not self._files:
            raise ValueError("files must hold text, got none, or only empty ones")
        self._sizes = [path.stat().st_size for path in self._files]
        self._last: tuple[Path, bytes] | None = None

    def draw(self, rng: random.Random, tokens: int) -> list[int]:
        """Exactly `tokens` ids of running text.

        Where a file ends, the text goes on at a random place of another.

        Args:
            rng: chooses the places.

        Raises:
            ValueError: the files hold no text in UTF-8.
        """
        ids: list[int] = []
        in_vain = 0
        while len(ids) < tokens:
            (path,) = rng.choices(self._files, self._sizes)
            text = self._read(path)
            missing = tokens - len(ids)
            # Few texts have more than seven bytes a token; what is too much is cut off.
            size = min(len(text), max(64, missing * 7))
            start = rng.randrange(len(text) - size + 1)
            piece = text[start : start + size].decode("utf-8", errors="ignore")
            found = PlainText.of(self._tokenizer).encode(piece)[:missing]
            in_vain = 0 if found else in_vain + 1
            if in_vain == _TRIES:
                raise ValueError(f"{path} must hold text in UTF-8, got none in {_TRIES} places")
            ids += found
        return ids

    def _read(self, path: Path) -> bytes:
        if self._last is None or self._last[0] != path:
            self._last = (path, path.read_bytes())
        return self._last[1]


def hide(
    tokenizer: Any,
    haystack: Sequence[int],
    needles: Sequence[Sequence[int]],
    depths: Sequence[float],
) -> tuple[list[int], list[range]]:
    """Put needles into a haystack, where words begin.

    Args:
        haystack: ids [N].
        needles: ids of each.
        depths: where each belongs, 0 (start of the haystack) … 1 (end).

    Returns:
        The ids, as many as haystack and needles have together, and where each needle stands in
        them, in the order of `needles`.
    """
    places = [_word_start(tokenizer, haystack, round(depth * len(haystack))) for depth in depths]
    ranges = [range(0)] * len(needles)
    ids: list[int] = []
    done = 0
    for i in sorted(range(len(needles)), key=places.__getitem__):
        ids += [*haystack[done : places[i]], *needles[i]]
        ranges[i] = range(len(ids) - len(needles[i]), len(ids))
        done = places[i]
    return [*ids, *haystack[done:]], ranges


def _word_start(tokenizer: Any, ids: Sequence[int], place: int) -> int:
    """The next place where a word begins, or this one if none is near."""
    for near in range(place, min(place + _NEAR, len(ids))):
        token = str(tokenizer.convert_ids_to_tokens(ids[near]))
        if near == 0 or token.startswith(_WORD_MARK) or tokenizer.decode([ids[near]])[:1].isspace():
            return near
    return place
