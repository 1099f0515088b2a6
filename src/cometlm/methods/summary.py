"""A rolling summary: the backbone itself rewrites what it knows of a text, part by part.

When a part of the text has come, half of the budget, the backbone is asked in its chat template to
rewrite the notes that it has so that they hold what matters in that part too. Held are the notes
and the rest that no notes have been made of, and a question is asked behind both.

What it costs: a text of T tokens is read about twice, and up to T / 2 tokens are generated, one by
one, so reading takes far longer than in any other method here. `num_generated` of the reader says
how many tokens the notes had that were written so far. What it is worth depends on the backbone.
Models of less than a billion parameters seldom carry a detail through several rewritings: they copy
the instructions, repeat themselves, or tell what was in the last part. And nobody knows the
question when notes are taken.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from cometlm.core.foreseen import Foreseen
from cometlm.methods.base import Bounds, Budget, Method, Reader, parted
from cometlm.methods.full import CacheReader, token_limit
from cometlm.methods.loader import Loader
from cometlm.session.chat_template import Turn, render_turn
from cometlm.session.plain_text import PlainText, encoded, prefix_ids

_DEFAULT = 2048  # tokens, where neither the budget nor the model says
_NOTES, _PART = "cometlm stand-in notes", "cometlm stand-in part"
_ASKED = (
    "Rewrite these notes on a text so that they hold the names, numbers and facts of its next part "
    f"too. Be brief; write only the notes.\n\nNotes:\n{_NOTES}\n\nNext part:\n{_PART}"
)
_NOW = "\n\nNotes now:\n"
_NO_NOTES = "none so far"
_BEFORE, _AFTER = "Notes on a text:\n", "\n\nHow it goes on:\n"
_LEAST = 4  # tokens of notes


class Summary(Method):
    """Keeps notes that the backbone writes, and what it has made no notes of.

    Notes, a part and the new notes together stay within the budget, with the instructions around
    them; so do notes, the rest, the question and the answer.
    """

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> SummaryReader:
        """See `Method.open`.

        A budget of None is the model's positions.
        """
        model = loader.backbone()
        limit = token_limit(model, budget) or _DEFAULT
        return SummaryReader(CacheReader(model, loader.tokenizer, limit))


class SummaryReader(Reader):
    """Keeps token ids, and reads them when it is asked.

    Args:
        empty: a reader that has read nothing; its limit says how many tokens fit.

    Attributes:
        part: tokens of text that the notes are rewritten for.
        most_notes: tokens of the notes at most.
        num_generated: tokens of all notes that were written.

    Raises:
        ValueError: a budget that has no room beside the instructions.
    """

    def __init__(self, empty: CacheReader) -> None:
        self.tokenizer = empty.tokenizer
        self._empty = empty
        self._limit = empty.limit or _DEFAULT
        turn = Turn(_ASKED + _NOW, "")  # for a backbone that learned no chats
        if getattr(self.tokenizer, "chat_template", None):
            turn = render_turn(self.tokenizer, _ASKED, first=True, began=False)
        self._first: list[int] = []  # tokens that the text begins with
        head, _, rest = turn.opening.partition(_NOTES)
        middle, _, tail = rest.partition(_PART)
        self._frame = [
            list(encoded(self.tokenizer, piece, special=True)["input_ids"])
            for piece in (head, middle, tail)
        ]
        self._end = turn.closing_ids[:1]
        begun = parted(self.tokenizer, self._frame[0])[0]
        unsaid = len(prefix_ids(self.tokenizer)) - len(begun)  # in front of the frame
        room = self._limit - sum(map(len, self._frame)) - unsaid
        self.part, self.most_notes = room // 2, room // 4
        if self.most_notes < _LEAST:
            raise ValueError(
                f"budget of a summary must be at least {self._limit - room + 4 * _LEAST} tokens, "
                f"{self._limit - room} of them for instructions, got {self._limit}"
            )
        self.num_generated = 0
        self._notes: list[int] = []
        self._unread: list[int] = []  # what no notes were made of
        self._made: CacheReader | None = None

    @property
    def notes(self) -> str:
        """The notes so far."""
        return self._decode(self._notes)

    def read(self, ids: Sequence[int]) -> None:
        """See `Reader.read`; no text is too long."""
        if ids:
            self._made = None
            if not self._first and not self._unread and not self._notes:
                self._first, ids = parted(self.tokenizer, ids)
        self._unread += ids
        while len(self._unread) > self.part:
            self._rewrite(self._unread[: self.part])
            del self._unread[: self.part]

    def read_question(self, ids: Sequence[int]) -> None:
        """See `Reader.read_question`; it stays as it is, behind notes and rest."""
        self._unread += ids
        self._made = None

    def check_asked(self, tokens: int) -> None:
        """See `Reader.check_asked`; a token of text stands in front at least."""
        self._empty.check_room(1 + tokens)

    def fork(self) -> SummaryReader:
        """See `Reader.fork`."""
        fork = copy.copy(self)
        fork._unread = list(self._unread)
        return fork

    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """See `Reader.answer`."""
        return self._reader().answer(ids, **generation)

    def foresee(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.foresee`."""
        return self._reader().foresee(ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the notes and the rest."""
        return self._reader().nbytes

    @property
    def bounds(self) -> Bounds:
        """See `Reader.bounds`: the notes and the rest."""
        most = self.part + self.most_notes + len(self._encode(_BEFORE) + self._encode(_AFTER))
        return Bounds(asked=most, held=most)

    # --- inside -----------------------------------------------------------------------------

    def _reader(self) -> CacheReader:
        """Who has read the notes and the rest."""
        if self._made is None:
            made = self._empty.fork()
            made.read(self._first)
            if self._notes:
                made.read([*self._encode(_BEFORE), *self._notes, *self._encode(_AFTER)])
            made.read(self._unread)
            self._made = made
        return self._made

    def _rewrite(self, part: list[int]) -> None:
        """Have the notes rewritten for a part of the text."""
        head, middle, tail = self._frame
        writer = self._empty.fork()
        notes = self._notes or self._encode(_NO_NOTES)[: self.most_notes]
        if parted(self.tokenizer, head)[0] != self._first:
            head = [*self._first, *head]  # a chat template that has them may have put them there
        writer.read([*head, *notes, *middle, *part, *tail])
        ends = sorted({*self._end, self.tokenizer.eos_token_id} - {None})
        said = writer.answer((), max_new_tokens=self.most_notes, eos_token_id=ends)
        said = said.removesuffix(self.tokenizer.decode(self._end)).strip()
        written = self._encode(said)
        self.num_generated += len(written)
        # Tokens of a text may be more than those that it was written with.
        self._notes = written[: self.most_notes] or self._notes

    def _encode(self, text: str) -> list[int]:
        return PlainText.of(self.tokenizer).encode(text)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
