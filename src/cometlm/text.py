"""Tokenising text in a stream, with the tokens that the whole text would have.

A tokenizer sees more than one piece at a time: the last tokens of a piece may change when more text
follows, and the first may change because of what came before. So `TokenStream` tokenises a window
that begins with text whose tokens it has given out already, and holds back the window's end until
enough text has followed. Windows are cut where a token begins with white space, since tokenizers
do not merge across the start of a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

_CONTEXT = 1024  # characters in front of the window whose tokens are known
_WINDOW = 16384  # characters to collect before tokenising
_MARGIN = 512  # characters at the end that wait for what follows
_BLOCK = 65536  # characters read from a file at a time


class TokenStream:
    """Tokens of a text that comes in pieces.

    Raises:
        ValueError: a tokenizer that gives no offsets (a slow one).
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no offsets; streaming needs a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._text = ""
        self._done = 0  # characters of _text whose tokens were given out
        self._started = False

    def feed(self, text: str) -> list[int]:
        """Add text; return the tokens that can no longer change."""
        self._text += text
        if len(self._text) - self._done < _WINDOW:
            return []
        return self._emit(final=False)

    def finish(self) -> list[int]:
        """The remaining tokens. The stream can go on after it, as a text of its own."""
        ids = self._emit(final=True)
        self._text, self._done = "", 0
        return ids

    def _emit(self, final: bool) -> list[int]:
        ids, spans = self._tokenise()
        stop = len(ids) if final else self._last_cut(spans)
        if stop == 0:
            return []
        end = len(self._text) if final else spans[stop][0]
        if not final:
            keep = max(0, end - _CONTEXT)
            self._text, self._done = self._text[keep:], end - keep
        first = [] if self._started else self._prefix()
        self._started = True
        return first + ids[:stop]

    def _tokenise(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids after what was given out, and each one's characters in `_text`."""
        ids, spans = self._encode(self._text)
        begin = next((i for i, (start, _) in enumerate(spans) if start >= self._done), len(ids))
        clean = begin == 0 or spans[begin - 1][1] <= self._done
        if clean and (begin == len(ids) or spans[begin][0] == self._done):
            return ids[begin:], spans[begin:]
        ids, spans = self._encode(self._text[self._done :])  # the context misleads: do without
        return ids, [(start + self._done, end + self._done) for start, end in spans]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _last_cut(self, spans: list[tuple[int, int]]) -> int:
        """Index of the last token that may begin the next window, or 0."""
        limit = len(self._text) - _MARGIN
        for i in range(len(spans) - 1, 0, -1):
            start = spans[i][0]
            if start > limit or spans[i - 1][1] > start:
                continue
            word = self._text[start].isspace() and not self._text[start - 1].isspace()
            if word or len(self._text) - self._done > 8 * _WINDOW:
                return i
        return 0

    def _prefix(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of a text."""
        ids: list[int] = self._tokenizer("")["input_ids"]
        eos = self._tokenizer.eos_token_id
        return ids[:-1] if ids and ids[-1] == eos and eos != self._tokenizer.bos_token_id else ids


def read_blocks(file: IO[str], name: str) -> Iterator[str]:
    """Text of a file block by block.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    while True:
        try:
            block = file.read(_BLOCK)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error.reason}") from error
        if "\0" in block:
            raise ValueError(f"{name} is not text: it holds a zero byte")
        if not block:
            return
        yield block
