"""One call of the model, checked and planned: its text, its steps, and what is wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypedDict

from torch import Tensor, nn

from cometlm.config import CometConfig
from cometlm.core.cache import CometCache
from cometlm.core.layout import ChunkLayout, Piece, RowCounts, Step
from cometlm.core.observer import ChunkObserver
from cometlm.core.text_batch import TextBatch


class Scored(NamedTuple):
    """What a caller wants of the hidden states instead of the hidden states themselves.

    Attributes:
        score: from one chunk's last hidden states [B, n, D] and labels [B, n] to [summed loss,
            labels that were the likeliest token]. It is run again where chunks are.
        labels: [B, N], -100 where there is nothing to score.
        parameters: what `score` uses.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    parameters: Sequence[nn.Parameter]


class Budget(TypedDict):
    """Sizes of one call; None leaves the config's."""

    chunk_size: int | None
    stride: int | None
    capacity: int | None


class ReadOptions(TypedDict, total=False):
    """What `CometModel.forward` takes beside what every call says.

    Attributes:
        chunk_lengths: text tokens of each row's chunks, in order, instead of full ones and a rest
            (SPEC §5). Only where the past has no open chunk.
        close_last: more text follows, so a chunk that ends full is closed in the same step; with
            `chunk_lengths` the last chunk is closed, however short it is.
        hidden_to_keep: how many last hidden states are wanted; 0 is all. A long prompt of which
            only the end counts then holds no more than a chunk.
        position_ids: [1, N] where one row holds several documents: they start again at 0 with
            each, and so does the memory. With an `attention_mask` they are not looked at.
        cu_seq_lens_q: [documents + 1] where those documents begin and the last one ends.
    """

    chunk_lengths: Sequence[Sequence[int]] | None
    close_last: bool
    hidden_to_keep: int
    position_ids: Tensor | None
    cu_seq_lens_q: Tensor | None


@dataclass
class Call:
    """One call of `forward`, checked and planned.

    Attributes:
        first: the first column whose hidden states are wanted.
        observer: what adds losses of its own, where labels are scored.
        rows: each row's counts after the layouts made so far.
    """

    text: TextBatch
    cache: CometCache
    steps: list[Step]
    sizes: CometConfig
    max_positions: int
    first: int = 0
    use_cache: bool = True
    scored: Scored | None = None
    observer: ChunkObserver | None = None

    def __post_init__(self) -> None:
        self.rows = self.cache.rows

    def layouts(self) -> Iterator[ChunkLayout]:
        """Each step's layout, made when its turn comes."""
        for step in self.steps:
            layout = self.layout(self.rows, step)
            self.rows = layout.counts_after()
            yield layout

    def layout(self, rows: tuple[RowCounts, ...], step: Step) -> ChunkLayout:
        """The layout of a step of this call's text, or beside it, from these counts on."""
        device = self.text.ids.device
        return ChunkLayout(self.sizes, rows, step, self.max_positions, device).shared()

    def is_last(self, layout: ChunkLayout) -> bool:
        """Whether nothing of the text follows a step."""
        return layout.step is self.steps[-1]

    def wants(self, step: Step) -> bool:
        """Whether a step's hidden states are wanted."""
        return step is self.steps[-1] or self.text.reaches(step, self.first)


# --- steps ----------------------------------------------------------------------------------


def plan_full_chunks(
    rows: Sequence[RowCounts], lengths: Sequence[int], chunk_size: int, close_last: bool = False
) -> list[Step]:
    """Cut `lengths[b]` new text tokens of each row into steps.

    A chunk is closed when it is full and another token of its row arrives (SPEC §4); with
    `close_last` the caller says that one will, so that a chunk that ends full is closed at once.

    Raises:
        ValueError: a row's open chunk is longer than `chunk_size`.
    """
    steps: list[Step] = []
    used = [0] * len(rows)
    open_text = [row.text for row in rows]
    if max(open_text) > chunk_size:
        raise ValueError(
            f"chunk_size must be at least the open chunk's {max(open_text)} tokens, got "
            f"{chunk_size}"
        )
    while True:
        step = []
        for b, length in enumerate(lengths):
            left = length - used[b]
            text = min(chunk_size - open_text[b], left)
            full = open_text[b] + text == chunk_size
            close = full and (left > text or (close_last and length > 0))
            step.append(Piece(used[b], text, close))
            used[b] += text
            open_text[b] = 0 if close else open_text[b] + text
        if not any(piece.text or piece.close for piece in step):
            return steps
        steps.append(tuple(step))


def plan_chunks(chunk_lengths: Sequence[Sequence[int]], close_last: bool = False) -> list[Step]:
    """Steps of rows without an open chunk whose chunks hold so many text tokens each.

    Every chunk but a row's last is closed; with `close_last` that one too.
    """
    starts = [list(accumulate(row, initial=0)) for row in chunk_lengths]

    def piece(b: int, t: int) -> Piece:
        lengths = chunk_lengths[b]
        if t >= len(lengths):
            return Piece(starts[b][-1], 0, False)
        return Piece(starts[b][t], lengths[t], close_last or t + 1 < len(lengths))

    steps = range(max(map(len, chunk_lengths)))
    return [tuple(piece(b, t) for b in range(len(chunk_lengths))) for t in steps]


def check_chunk_lengths(
    chunk_lengths: Sequence[Sequence[int]],
    lengths: Sequence[int],
    rows: Sequence[RowCounts],
    chunk_size: int,
) -> None:
    """Refuse chunk lengths that do not fit the rows of a batch.

    Raises:
        ValueError: those of other rows, chunks longer than `chunk_size` or empty, an open chunk.
    """
    if [sum(row) for row in chunk_lengths] != list(lengths):
        raise ValueError(
            f"chunk_lengths must add up to the tokens of each row, {list(lengths)}, got "
            f"{list(chunk_lengths)}"
        )
    wrong = [length for row in chunk_lengths for length in row if not 1 <= length <= chunk_size]
    if wrong:
        raise ValueError(f"chunk_lengths must lie in 1 … chunk_size={chunk_size}, got {wrong[0]}")
    if open_rows := [b for b, row in enumerate(rows) if row.text]:
        raise ValueError(
            f"chunk_lengths need a past without open chunks, but row {open_rows[0]} has one"
        )
