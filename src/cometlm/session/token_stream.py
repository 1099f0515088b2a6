"""Tokenising text in a stream, with the tokens that the whole text would have.

A tokenizer sees more than one piece at a time: the last tokens of a piece may change when more text
follows, and the first may change because of what came before. So `TokenStream` tokenises a window
that begins with text whose tokens it has given out already, and holds back the window's end until
enough text has followed. Windows are cut where a token begins with white space, since tokenizers
do not merge across the start of a word.
"""

from __future__ import annotations

from typing import Any

from cometlm.session.plain_text import (
    PlainText,
    Spans,
    encoded_with_spans,
    prefix_ids,
)

_CONTEXT = 1024  # characters in front of the window whose tokens are known
_WINDOW = 16384  # characters to collect before tokenising
_MARGIN = 512  # characters at the end that wait for what follows
_LONGEST_WORD = 8  # windows of text without white space, which is cut anywhere then


def most_waiting() -> int:
    """Characters that a stream never holds more of, if it is fed a window at a time."""
    return 2 * (_LONGEST_WORD + 1) * _WINDOW


class TokenStream:
    """Tokens of a text that comes in pieces.

    Args:
        tokenizer: its tokenizer.
        vocabulary: how many ids there are; None: as many as the tokenizer has.

    Raises:
        ValueError: a tokenizer that gives no offsets (a slow one).
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no offsets; streaming needs a fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._plain = PlainText.of(tokenizer)
        self._vocabulary = vocabulary
        self._text = ""
        self._special = False  # whether control tokens in _text count as such
        self._done = 0  # characters of _text whose tokens were given out
        self._enough = _WINDOW  # characters of _text at which it is tokenised
        self._started = False

    def feed(self, text: str, special: bool = False) -> list[int]:
        """Add text; return the tokens that can no longer change.

        Args:
            special: control tokens that are written in it count as such; else they are text. Where
                this changes, the text before ends.

        Raises:
            ValueError: text with tokens that the vocabulary lacks; nothing of it is taken.
        """
        if not text:
            return []
        goes_on = special == self._special
        self._refuse_unknown(self._text[-_MARGIN:] if goes_on else "", text, special)
        ids = [] if goes_on else self.finish()
        self._special = special
        self._text += text
        return ids + self.settle() if len(self._text) >= self._enough else ids

    def settle(self) -> list[int]:
        """The tokens that can no longer change, without waiting for a window of text."""
        ids = self._emit(final=False)
        # Also where no cut was found: one attempt per window, not one per piece of text.
        self._enough = len(self._text) + _WINDOW
        return ids

    def finish(self) -> list[int]:
        """The remaining tokens. The stream can go on after it, as a text of its own."""
        if not self._text:
            return []
        ids = self._emit(final=True)
        self._text, self._done, self._enough = "", 0, _WINDOW
        return ids

    def skip_prefix(self) -> None:
        """Say that something came before: the text begins without special tokens in front."""
        self._started = True

    def state(self) -> dict[str, Any]:
        """What the stream holds, as JSON values."""
        state = {"text": self._text, "done": self._done, "started": self._started}
        return {**state, "special": True} if self._special else state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._text, self._done = state["text"], state["done"]
        self._started, self._special = state["started"], state.get("special", False)
        self._enough = len(self._text) + _WINDOW

    def _emit(self, final: bool) -> list[int]:
        ids, spans = self._tokenise()
        stop = len(ids) if final else self._last_cut(spans)
        if stop == 0:
            return []
        end = len(self._text) if final else spans[stop][0]
        if not final:
            keep = max(0, end - _CONTEXT)
            self._text, self._done = self._text[keep:], end - keep
        first = [] if self._started else prefix_ids(self._tokenizer)
        self._started = True
        return first + ids[:stop]

    def _tokenise(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids after what was given out, and each one's characters in `_text`."""
        self._plain = PlainText.of(self._tokenizer)  # tokens or a chat template may have come
        ids, spans = self._encode(self._text)
        begin = next((i for i, (start, _) in enumerate(spans) if start >= self._done), len(ids))
        clean = begin == 0 or spans[begin - 1][1] <= self._done
        if clean and (begin == len(ids) or spans[begin][0] == self._done):
            return ids[begin:], spans[begin:]
        ids, spans = self._encode(self._text[self._done :])  # the context misleads: do without
        return ids, [(start + self._done, end + self._done) for start, end in spans]

    def _encode(self, text: str, special: bool | None = None) -> tuple[list[int], Spans]:
        if not (self._special if special is None else special):
            return self._plain.encode_with_spans(text)
        return encoded_with_spans(self._tokenizer, text, special=True)

    def _refuse_unknown(self, before: str, text: str, special: bool) -> None:
        """Refuse new text with tokens that the model does not have, before it is taken.

        Tokenising it for that is only needed where the tokenizer has more tokens than the model.
        """
        tokens = self._plain.num_tokens
        if self._vocabulary is None or tokens <= self._vocabulary:
            return
        control = () if special else self._plain.control.values()
        spelled = sum(number >= self._vocabulary for number in control)
        if tokens - spelled <= self._vocabulary:
            return  # the others are control tokens, which text has none of
        ids, spans = self._encode(before + text, special)
        for number, (begin, end) in zip(ids, spans, strict=True):
            if number >= self._vocabulary:
                raise ValueError(
                    f"token ids must lie in 0 … {self._vocabulary - 1}, but the tokenizer has "
                    f"{number} for {(before + text)[begin:end]!r}: resize the model's embeddings "
                    "(resize_token_embeddings), or take the tokenizer that belongs to it"
                )

    def _last_cut(self, spans: list[tuple[int, int]]) -> int:
        """Index of the last token that may begin the next window, or 0."""
        limit = len(self._text) - _MARGIN
        for i in range(len(spans) - 1, 0, -1):
            start = spans[i][0]
            if start > limit or spans[i - 1][1] > start:
                continue
            word = self._text[start].isspace() and not self._text[start - 1].isspace()
            if word or len(self._text) - self._done > _LONGEST_WORD * _WINDOW:
                return i
        return 0
