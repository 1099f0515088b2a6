"""Tokens of a conversation's frame, part by part: what was said before is not tokenised again.

A tokenizer cuts a text at its special tokens before it does anything else. So a part from one of
them up to the next has the same tokens wherever it stands, and a conversation that is sent again
with one more turn has new tokens in its last parts only.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from transformers import AddedToken

_MOST = 1 << 20  # ids that are remembered: some 10 MB with their texts
_A_PART = 32  # ids that take as much as what is kept beside those of a part


class FrameParts:
    """Ids of texts in which special tokens count, each part of them made once.

    Safe to use from several threads.

    Args:
        added: the tokens that were added to a tokenizer, by their ids.
        encode: ids of several texts.
        most: ids that are remembered, and `_A_PART` for each part; what was not used for longest
            goes first.
    """

    def __init__(
        self,
        added: Mapping[int, AddedToken],
        encode: Callable[[list[str]], Sequence[Sequence[int]]],
        most: int = _MOST,
    ) -> None:
        # Tokens that are looked for in what a normaliser makes of a text are no borders.
        cutting = [token for token in added.values() if not token.normalized]
        longest = sorted((token.content for token in cutting), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        # Before a token that takes white space in front of it, the part before would keep it.
        self._borders = {token.content for token in cutting if not token.lstrip}
        # Whether such a token is one depends on what stands beside it.
        self._can_cut = not any(token.single_word for token in cutting)
        self._encode = encode
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._held, self._most = 0, most
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        parts = self._cut(text)
        with self._lock:
            found = {part: self._known[part] for part in parts if part in self._known}
        missing = [part for part in dict.fromkeys(parts) if part not in found]
        for part, ids in zip(missing, self._encode(missing) if missing else (), strict=True):
            found[part] = array("i", ids)
        self._remember(found)
        return [number for part in parts for number in found[part]]

    def _cut(self, text: str) -> list[str]:
        matches = self._pattern.finditer(text) if self._can_cut else ()
        begins = [found.start() for found in matches if found[0] in self._borders]
        edges = [0, *[begin for begin in begins if begin], len(text)]
        return [text[begin:end] for begin, end in pairwise(edges)]

    def _remember(self, found: Mapping[str, array[int]]) -> None:
        with self._lock:
            for part, ids in found.items():
                if part not in self._known:
                    self._known[part] = ids
                    self._held += len(ids) + _A_PART
                self._known.move_to_end(part)
            while self._held > self._most:
                _, ids = self._known.popitem(last=False)
                self._held -= len(ids) + _A_PART
