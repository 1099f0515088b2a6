"""What a memory is made of: which chunks its slots hold, and how old that is.

A global slot is a mixture. Each gate g keeps a share g of the old state and takes 1 − g of the new
candidate (SPEC §3), so the share of chunk t in a slot is 1 − g of its own fold times the g of all
later ones. An entry of temporary memory was compressed from some tokens of one chunk.

The shares say where content came in, not where it was first read: a readout token sees the memory
too, and can write again what an earlier chunk said.

Legend: L layers that attend, M global slots, H heads, T passages, P parts of the row
(`attention.PARTS`).
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from cometlm.config import CometConfig
from cometlm.core.layout import RowCounts

MOST_PASSAGES = 256


@dataclass(frozen=True)
class SeenChunk:
    """One chunk as it was folded into the memory.

    Attributes:
        begin, end: its text tokens, counted from the beginning of the text. With an overlap it
            begins before the end of the chunk before it.
        gates: share of the old state that each slot kept [L, M]; 0 in the first chunk.
        masses: where its text tokens' attention went, on average [L, H, P].
    """

    begin: int
    end: int
    gates: Tensor
    masses: Tensor


@dataclass(frozen=True)
class Passage:
    """Some chunks in a row, which are told apart no further.

    Attributes:
        first, count: its first chunk, and how many there are.
        begin, end: its text tokens.
        gates, masses: as of `SeenChunk`, means over its chunks. NaN where nobody looked on.
    """

    first: int
    count: int
    begin: int
    end: int
    gates: Tensor
    masses: Tensor

    @property
    def is_seen(self) -> bool:
        """Whether somebody looked on while it was read."""
        return not bool(self.masses.isnan().any())

    def joined(self, other: Passage) -> Passage:
        """This passage and the one that follows it."""
        count = self.count + other.count
        share = other.count / count
        return replace(
            self,
            count=count,
            end=other.end,
            gates=self.gates.lerp(other.gates, share),
            masses=self.masses.lerp(other.masses, share),
        )


@dataclass(frozen=True)
class Entry:
    """The tokens that an entry of temporary memory was compressed from, and their chunk."""

    chunk: int
    begin: int
    end: int


@dataclass(frozen=True)
class History:
    """What the memory of a text is made of. A value: each chunk makes a new one.

    It holds as much however long the text is: of more than `MOST_PASSAGES` chunks, neighbours
    become one passage.

    Attributes:
        passages: of the text so far, in order.
        shares: of each passage in each global slot [L, M, T]; they sum to 1 over T.
        ages: of what each global slot holds, by these shares, in text tokens since the end of its
            chunk [L, M]. NaN: part of it was read where nobody looked on.
        entries: of temporary memory, the oldest first; None: unknown.
    """

    passages: tuple[Passage, ...]
    shares: Tensor
    ages: Tensor
    entries: tuple[Entry | None, ...] = ()

    @classmethod
    def empty(cls, layers: int, slots: int) -> History:
        """Before any text."""
        return cls((), torch.zeros(layers, slots, 0), torch.zeros(layers, slots))

    @classmethod
    def unseen(cls, layers: int, heads: int, row: RowCounts, sizes: CometConfig) -> History:
        """Of a memory that was read while nobody looked on: one passage, of unknown age.

        Entries are known where all chunks were full ones.
        """
        history = cls.empty(layers, sizes.global_slots)
        if not row.folds:
            return history
        unknown = torch.full_like(history.ages, torch.nan)
        end = row.tokens - (row.folds - 1) * sizes.overlap  # what was read again counts once
        masses = torch.full((layers, heads, 4), torch.nan)
        passage = Passage(0, row.folds, 0, end, unknown, masses)
        entries: tuple[Entry | None, ...] = (None,) * row.entries
        if row.entries and row.tokens == row.folds * sizes.chunk_size:
            new, each = sizes.chunk_size - sizes.overlap, sizes.compression_tokens(sizes.chunk_size)
            chunks = range(max(0, row.folds - row.entries // each - 1), row.folds)
            starts = ((chunk, chunk * new) for chunk in chunks)
            made = [_entries(chunk, at, at + sizes.chunk_size, sizes) for chunk, at in starts]
            entries = tuple(chain(*made))[-row.entries :]
        return cls((passage,), torch.ones(layers, sizes.global_slots, 1), unknown, entries)

    @property
    def chunks(self) -> int:
        """Chunks that were folded."""
        return self.passages[-1].first + self.passages[-1].count if self.passages else 0

    @property
    def end(self) -> int:
        """Text tokens that were folded."""
        return self.passages[-1].end if self.passages else 0

    def mean(self, of: Literal["gates", "masses"]) -> Tensor | None:
        """Mean over all chunks but the first passage's, which had no memory to look at.

        Returns:
            [L, M] or [L, H, P]; None where nobody looked on. Of one passage: its own.
        """
        seen = [one for one in self.passages if one.is_seen]
        if not seen:
            return None
        later = [one for one in seen if one.first] or seen
        return sum((getattr(one, of) * one.count for one in later), torch.zeros(())) / sum(
            one.count for one in later
        )

    def after(self, chunk: SeenChunk, sizes: CometConfig) -> History:
        """The history when one more chunk is folded."""
        written = 1 - chunk.gates
        shares = torch.cat([self.shares * chunk.gates[..., None], written[..., None]], dim=-1)
        new = Passage(self.chunks, 1, chunk.begin, chunk.end, chunk.gates, chunk.masses)
        entries = (*self.entries, *_entries(self.chunks, chunk.begin, chunk.end, sizes))
        kept = max(0, len(entries) - sizes.temporary_slots)
        ages = (self.ages + (chunk.end - self.end)) * chunk.gates
        ages = ages.where(chunk.gates > 0, 0.0)  # nothing is left of what is unknown
        passages, shares = _bounded((*self.passages, new), shares)
        return History(passages, shares, ages, entries[kept:])

    def passage_of(self, entry: Entry) -> int:
        """Which passage an entry's chunk is in."""
        return next(i for i, one in enumerate(self.passages) if entry.chunk < one.first + one.count)


def _entries(chunk: int, begin: int, end: int, sizes: CometConfig) -> list[Entry]:
    """What the compression tokens of a closed chunk stand for (SPEC §2)."""
    if not sizes.temporary_memory:
        return []
    starts = range(begin, end, sizes.stride)
    return [Entry(chunk, start, min(start + sizes.stride, end)) for start in starts]


def _bounded(passages: tuple[Passage, ...], shares: Tensor) -> tuple[tuple[Passage, ...], Tensor]:
    """Passages of equal numbers of chunks but the last, at most `MOST_PASSAGES` of them.

    One that nobody looked on at stays as it is.
    """
    first = 0 if passages[0].is_seen else 1
    if len(passages) - first > 1 and passages[-2].count < passages[first].count:
        return _joined(passages, shares, len(passages) - 2)  # the last one is being filled
    if len(passages) <= MOST_PASSAGES:
        return passages, shares
    return _joined(passages, shares, first)


def _joined(
    passages: tuple[Passage, ...], shares: Tensor, begin: int
) -> tuple[tuple[Passage, ...], Tensor]:
    """Passages from `begin` on in pairs, each as one."""
    starts = range(begin, len(passages), 2)
    pairs = [passages[i : i + 2] for i in starts]
    sums = [shares[..., i : i + 2].sum(-1, keepdim=True) for i in starts]
    made = tuple(pair[0].joined(pair[1]) if len(pair) > 1 else pair[0] for pair in pairs)
    return (*passages[:begin], *made), torch.cat([shares[..., :begin], *sums], dim=-1)


class TokenLog:
    """Token ids of a text, on disk; memory is not held for them.

    Args:
        begin: tokens that came before and are not known.
    """

    def __init__(self, begin: int = 0) -> None:
        self._begin = begin
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the last fork is gone)
        self._stored = 0
        self._own: array[int] | None = None  # what a fork has read itself

    def append(self, ids: Sequence[int]) -> None:
        """Add what follows."""
        new = array("i", ids)
        if self._own is not None:
            self._own += new
            return
        self._file.seek(self._stored * new.itemsize)
        self._file.write(new.tobytes())
        self._stored += len(new)

    def ids(self, begin: int, end: int) -> list[int]:
        """Ids of text tokens begin … end − 1, as far as they are known."""
        begin, end = max(0, begin - self._begin), max(0, end - self._begin)
        found = array("i")
        self._file.seek(begin * found.itemsize)
        wanted = max(0, min(end, self._stored) - begin)
        found.frombytes(self._file.read(wanted * found.itemsize))
        if self._own is not None:
            found += self._own[max(0, begin - self._stored) : max(0, end - self._stored)]
        return found.tolist()

    def fork(self) -> TokenLog:
        """A log that goes its own way from here, in memory."""
        fork = TokenLog.__new__(TokenLog)
        fork._begin, fork._file, fork._stored = self._begin, self._file, self._stored
        fork._own = array("i", self._own or ())
        return fork
