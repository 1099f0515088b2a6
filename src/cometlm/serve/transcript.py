"""The text of an answer while its tokens come: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from cometlm.session.plain_text import PlainText

_UNFINISHED = "\ufffd"  # a character whose last bytes are still to come


class Transcript:
    """Text of one answer.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer; they are no part of it.
        shown: ids of special tokens that are part of the text; others are not.
        last: strings that end the answer, and are the end of it.

    Attributes:
        text: what was given out so far.
        is_stopped: one of these strings came; more tokens are not taken.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        shown: Collection[int] = (),
        last: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._stop, self._last = tokenizer, tuple(stop), tuple(last)
        self._shown = frozenset(shown)
        self._ids: list[int] = []
        self._begin, self._read = 0, 0  # tokens before `_read` are text; those before `_begin` far
        self._held = ""  # may be the beginning of a string that ends the answer
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take a token; the text that it makes certain."""
        self._ids.append(token)
        text = self._decode(self._ids[self._begin :])
        if text.endswith(_UNFINISHED):
            return ""
        known = self._decode(self._ids[self._begin : self._read])
        self._begin, self._read = self._read, len(self._ids)
        return self._give_out(text[len(known) :])

    def finish(self) -> str:
        """The text that was held back, at the answer's end."""
        if self.is_stopped:
            return ""
        text = self._decode(self._ids[self._begin :])
        known = self._decode(self._ids[self._begin : self._read])
        certain = self._give_out(text[len(known) :])
        rest = "" if self.is_stopped else self._held
        self._held = ""
        self.text += rest
        return certain + rest

    def kept_ids(self) -> list[int]:
        """Ids of the answer as it was given out: without what a stop string cut off."""
        if not self.is_stopped:
            return list(self._ids)
        count = len(self._ids)
        while count and not self.text.startswith(self._decode(self._ids[:count])):
            count -= 1
        rest = self.text[len(self._decode(self._ids[:count])) :]
        return self._ids[:count] + PlainText.of(self._tokenizer).encode(rest)

    def _give_out(self, text: str) -> str:
        """What of the text held back and this one can be in no string that ends the answer."""
        held = self._held + text
        ends = [(at, at) for at in map(held.find, self._stop) if at >= 0]
        ends += [(at, at + len(one)) for one in self._last if (at := held.find(one)) >= 0]
        if ends:
            self.is_stopped = True
            held, self._held = held[: min(ends)[1]], ""
        else:
            awaited = (*self._stop, *self._last)
            most = max(map(len, awaited), default=0)
            waits = next(
                (
                    begin
                    for begin in range(max(0, len(held) - most + 1), len(held))
                    if any(one.startswith(held[begin:]) for one in awaited)
                ),
                len(held),
            )
            held, self._held = held[:waits], held[waits:]
        self.text += held
        return held

    def _decode(self, ids: list[int]) -> str:
        if self._shown.isdisjoint(ids):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return "".join(
            self._tokenizer.decode(list(run), skip_special_tokens=not is_shown)
            for is_shown, run in groupby(ids, self._shown.__contains__)
        )
