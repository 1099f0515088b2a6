"""Retrieval: an index of words over passages, whose best ones stand in the prompt of a question.

It is what most people build today over long texts: BM25 (the package `bm25s`), without a model of
embeddings or a reranker. Passages are windows of up to 256 token ids that overlap by an eighth, so
they are cut anywhere. Words are runs of at least two letters or digits, in lower case; there are no
stop words and no stems, so any language with spaces works, and "code" does not find "codes". What
the chat template puts around a question is not searched for.

Passages stand in the prompt in the order of the text, neighbours without their overlap. Equal ones,
and those that share no word with the question, rank by their place, the last ones first. Without a
question, what follows the end of the text is asked for, and the end stands in the prompt.

Held are the ids of all that was read and the index; both grow with the text, whatever the budget,
and are all that `nbytes` counts: keys and values are made for one question and let go. The index is
built when it is asked for and anew when more was read, since what a word weighs depends on all
passages; that takes about a second for a million tokens.
"""

from __future__ import annotations

import copy
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from cometlm.core.foreseen import Foreseen
from cometlm.extras import EVAL, lacks
from cometlm.methods.base import (
    Bounds,
    Budget,
    Method,
    Reader,
    TooLongError,
    generation_options,
    parted,
)
from cometlm.methods.full import CacheReader, token_limit
from cometlm.methods.loader import Loader
from cometlm.sequences import num_shared
from cometlm.session.chat_template import render_turn

_PASSAGE = 256  # tokens
_LEAST_PASSAGES = 4  # that a prompt has room for; they are shorter where it is small
_OVERLAP = 8  # an eighth of a passage
_DEFAULT = 4096  # tokens of a prompt, where neither the budget nor the model says


class Retrieve(Method):
    """Finds the passages that share words with the question.

    The prompt with the question and the answer stays within the budget; the index does not count.
    """

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> RetrieveReader:
        """See `Method.open`.

        Raises:
            ImportError: `bm25s` is not installed.
        """
        if message := lacks("retrieval", ["bm25s"], EVAL):
            raise ImportError(message, name="bm25s")
        model = loader.backbone()
        limit = token_limit(model, budget) or _DEFAULT
        return RetrieveReader(CacheReader(model, loader.tokenizer, limit))


class RetrieveReader(Reader):
    """Keeps token ids and an index of them.

    Args:
        empty: a reader that has read nothing; its limit says how many tokens a prompt has.
    """

    def __init__(self, empty: CacheReader) -> None:
        self.tokenizer = empty.tokenizer
        self._empty = empty
        self._limit = empty.limit or _DEFAULT
        self._size = max(1, min(_PASSAGE, self._limit // _LEAST_PASSAGES))
        self._first: list[int] = []  # tokens that the text begins with; in front of each prompt
        self._ids = array("i")  # shared with forks, which may have read on in it
        self._num_read = 0
        self._question: list[int] = []
        self._index: Index | None = None

    def read(self, ids: Sequence[int]) -> None:
        """See `Reader.read`; no text is too long."""
        new = [*self._question, *ids]  # what is read behind a question is text, as it is
        if not new:
            return
        if not self._first and not self._num_read:
            self._first, new = parted(self.tokenizer, new)
        if len(self._ids) > self._num_read:
            self._ids = self._ids[: self._num_read]
        self._ids.extend(new)
        self._num_read += len(new)
        self._question, self._index = [], None

    def read_question(self, ids: Sequence[int]) -> None:
        """See `Reader.read_question`; it is what passages are found by."""
        self.read(())
        self._question = list(ids)

    def check_asked(self, tokens: int) -> None:
        """See `Reader.check_asked`."""
        if tokens >= self._limit:
            raise self._too_long(tokens)

    def fork(self) -> RetrieveReader:
        """See `Reader.fork`; ids and index are shared until more is read."""
        return copy.copy(self)

    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """See `Reader.answer`."""
        options = generation_options(generation)
        asked = self.fork()
        if ids:
            asked.read_question(ids)
        self._share_index_of(asked)
        return asked._prompted(options["max_new_tokens"]).answer((), **options)

    def foresee(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.foresee`."""
        return self._prompted(len(ids)).foresee(ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids that were read, and of the index with its words."""
        held = (self._num_read + len(self._first)) * self._ids.itemsize
        return held + (self._indexed().nbytes if self._num_read else 0)

    @property
    def bounds(self) -> Bounds:
        """See `Reader.bounds`: a prompt; the index, which takes little time, has none."""
        return Bounds(asked=self._limit)

    # --- inside -----------------------------------------------------------------------------

    def _prompted(self, room: int) -> CacheReader:
        """Who has read the best passages and the question, and has room for so many more."""
        room += len(self._first)
        left = self._limit - room - len(self._question)
        if left < 0 or (left == 0 and self._num_read):
            raise self._too_long(room + len(self._question))
        reader = self._empty.fork()
        reader.read(self._first)
        for span in self._found(left):
            reader.read(self._ids[span.start : span.stop].tolist())
        reader.read(self._question)
        return reader

    def _too_long(self, tokens: int) -> TooLongError:
        said = f"question and answer must be fewer than {self._limit}, got {tokens} tokens"
        return TooLongError(said)

    def _found(self, room: int) -> list[range]:
        """Where what belongs into a prompt stands, at most `room` tokens, in order."""
        if self._num_read <= room:
            return [range(self._num_read)]
        chosen: list[range] = []
        wanted = self._asked(self._question)
        if not self._question:
            end = range(self._num_read - min(self._size, room), self._num_read)
            chosen, wanted = [end], self._text(end)
        for passage in self._indexed().ranked(wanted):
            joined = _joined([*chosen, passage])
            if sum(map(len, joined)) <= room:
                chosen = joined
            elif not chosen:
                return [passage[:room]]
        return chosen

    def _asked(self, ids: Sequence[int]) -> str:
        """The text of a question without what the chat template puts around it."""
        if not getattr(self.tokenizer, "chat_template", None):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        frame = render_turn(self.tokenizer, "", first=True, began=True).opening_ids
        begin = num_shared(ids, frame)
        behind = frame[begin:]  # of the question; the beginning of an answer may follow
        ends = range(len(ids) - len(behind), begin - 1, -1)
        end = next((end for end in ends if ids[end : end + len(behind)] == behind), None)
        if end is None:  # tokens that the question's end has changed
            parts = [ids[begin : len(ids) - num_shared(ids[begin:][::-1], frame[::-1])]]
        else:
            parts = [ids[begin:end], ids[end + len(behind) :]]
        said = (self.tokenizer.decode(part, skip_special_tokens=True) for part in parts if part)
        return " ".join(said)

    def _text(self, span: range) -> str:
        ids = self._ids[span.start : span.stop].tolist()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _indexed(self) -> Index:
        """The index of what was read."""
        if self._index is None:
            step = self._size - self._size // _OVERLAP
            last = max(1, self._num_read - self._size // _OVERLAP)  # no passage is overlap only
            begins = range(0, last, step)
            spans = [range(b, min(b + self._size, self._num_read)) for b in begins]
            self._index = Index(spans, [self._text(span) for span in spans])
        return self._index

    def _share_index_of(self, fork: RetrieveReader) -> None:
        """Build the index once, and not in each fork."""
        if fork._num_read == self._num_read > self._limit:
            fork._index = self._indexed()


class Index:
    """BM25 over passages.

    Args:
        spans: where they stand.
        texts: what they say.
    """

    def __init__(self, spans: Sequence[range], texts: Sequence[str]) -> None:
        self._spans = spans
        self._bm25: Any = None  # where no passage has a word
        words = _words(texts)
        if any(words):
            import bm25s

            self._bm25 = bm25s.BM25()
            self._bm25.index(words, show_progress=False)

    def ranked(self, text: str) -> list[range]:
        """All passages, those first that share the most telling words with a text."""
        scores = [0.0] * len(self._spans)
        if self._bm25 is not None:
            words = [word for word in _words([text])[0] if word in self._bm25.vocab_dict]
            if words:
                scores = self._bm25.get_scores(words).tolist()
        order = sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)
        return [self._spans[i] for i in order]

    @property
    def nbytes(self) -> int:
        """Bytes of its scores and its words."""
        if self._bm25 is None:
            return 0
        scores = self._bm25.scores
        words = self._bm25.vocab_dict
        tensors = sum(scores[name].nbytes for name in ("data", "indices", "indptr"))
        return int(tensors) + sum(map(sys.getsizeof, [words, *words, *words.values()]))


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    options: dict[str, Any] = {"stopwords": [], "return_ids": False, "show_progress": False}
    found: list[list[str]] = bm25s.tokenize(list(texts), **options)
    return found


def _joined(spans: Sequence[range]) -> list[range]:
    """Spans in order, those that overlap or touch as one."""
    joined: list[range] = []
    for span in sorted(spans, key=lambda span: span.start):
        if joined and span.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined
