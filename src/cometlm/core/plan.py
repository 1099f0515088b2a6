"""One call of the model, checked and planned: its text, its steps, and what is wanted of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cometlm.config import CometConfig
from cometlm.core.cache import CometCache
from cometlm.core.layout import ChunkLayout, Piece, Step
from cometlm.core.state import States
from cometlm.core.text_batch import TextBatch
from cometlm.device import return_freed_memory


class Scored(NamedTuple):
    """What a caller wants of the hidden states instead of the hidden states themselves.

    Attributes:
        score: from one chunk's last hidden states [B, n, D] and labels [B, n] to a few numbers,
            which are summed over all chunks. It is run again where chunks are.
        labels: [B, N], -100 where there is nothing to score.
        parameters: what `score` uses.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    parameters: Sequence[nn.Parameter]


class Aside(NamedTuple):
    """Text that is read from forks of the memory, as a question is that is asked and forgotten.

    Attributes:
        ids: [B, A] text tokens, no more than a chunk.
        labels: [B, A], -100 where there is nothing to score.
        since: [B] tokens of the call's text; asides follow those chunks by whose ends every row
            has read so many. They grow rarer the further on: after the 1st of those chunks, the
            2nd, 4th, 8th and so on, and after the last.
    """

    ids: Tensor
    labels: Tensor
    since: Tensor

    def check(self, batch: int, chunk_size: int) -> None:
        """Refuse an aside that does not fit a batch.

        Raises:
            ValueError: other shapes, or more tokens than a chunk.
        """
        shapes = [tuple(x.shape) for x in self]
        width = shapes[0][-1]
        if shapes != [(batch, width), (batch, width), (batch,)]:
            raise ValueError(
                f"an aside to {batch} rows needs ids and labels [{batch}, A] and since [{batch}], "
                f"got {shapes}"
            )
        if width > chunk_size:
            raise ValueError(
                f"an aside must fit into one chunk of chunk_size={chunk_size}, got {width} tokens"
            )


class Told(NamedTuple):
    """What readout tokens are to say, at the end of the chunk in which a part of the text ends.

    Where a border cuts that part, its beginning can only come from the memory.

    Attributes:
        labels: [B, M], -100 where nothing is asked of a readout token.
        until: [B] where in the call's text each row's part ends.
        since: [B] where it begins; with `otherwise`.
        otherwise: [B, M], the same as `labels` for chunks that hold nothing of that part; None asks
            nothing of them there.
    """

    labels: Tensor
    until: Tensor
    since: Tensor | None = None
    otherwise: Tensor | None = None

    def check(self, batch: int, readout_tokens: int) -> None:
        """Refuse labels and places of other shapes.

        Raises:
            ValueError: they do not fit the batch and the readout tokens.
        """
        shapes = [tuple(x.shape) for x in self if x is not None]
        wanted = [(batch, readout_tokens), (batch,), (batch,), (batch, readout_tokens)]
        if shapes != wanted[: 2 if self.otherwise is None else 4]:
            raise ValueError(
                f"{readout_tokens} readout tokens and {batch} rows need labels "
                f"[{batch}, {readout_tokens}] and places [{batch}], got {shapes}"
            )

    def of(self, layout: ChunkLayout) -> Tensor:
        """Labels [B, M] of one step."""
        since = self.until if self.since is None else self.since
        parts = zip(since.tolist(), self.until.tolist(), strict=True)
        ends, apart = [], []
        for (begin, end), row, piece in zip(parts, layout.rows, layout.step, strict=True):
            first, last = row.tokens - row.text, row.tokens + piece.text
            ends.append(piece.close and first < end <= last)
            apart.append(piece.close and (end <= first or last <= begin))
        labels = _only(self.labels, ends)
        if self.otherwise is None:
            return labels
        return torch.maximum(labels, _only(self.otherwise, apart))


def _only(labels: Tensor, rows: Sequence[bool]) -> Tensor:
    """These rows of labels [B, M], and -100 in the others."""
    return labels.masked_fill(~torch.tensor(rows, device=labels.device)[:, None], -100)


@dataclass
class Call:
    """One call of `forward`, checked and planned.

    Attributes:
        first: the first column whose hidden states are wanted.
        aside: what is read beside the text, `aside_text` its tokens.
        told: what is asked of readout tokens; each step's score is then followed by their summed
            loss and their number.
        asides: for each layout made so far, whether it was of the aside.
        rows: each row's counts after the layouts made so far.
    """

    text: TextBatch
    cache: CometCache
    steps: list[Step]
    sizes: CometConfig
    reach: int
    first: int
    use_cache: bool
    scored: Scored | None
    aside: Aside | None = None
    aside_text: TextBatch | None = None
    told: Told | None = None

    def __post_init__(self) -> None:
        self.rows = self.cache.rows
        # Rows count what was read since their memory began, the caller's places from here.
        before = torch.tensor([row.tokens for row in self.rows])
        if self.aside is not None:
            self.aside = self.aside._replace(since=self.aside.since.cpu() + before)
        if self.told is not None:
            places = {"since": self.told.since, "until": self.told.until}
            moved = {name: x.cpu() + before for name, x in places.items() if x is not None}
            self.told = self.told._replace(**moved)
        self.asides: list[bool] = []
        self._aside_step: Step = ()
        if self.aside is not None:
            batch, width = self.aside.ids.shape
            self._aside_step = (Piece(0, width, close=False),) * batch

    def layouts(self) -> Iterator[ChunkLayout]:
        """Each step's layout, made when its turn comes; after some steps the aside's."""
        passed = 0
        for step in self.steps:
            layout = self._layout(step)
            self.rows = layout.counts_after()
            self.asides.append(False)
            yield layout
            if self.aside is None or not layout.closes or not self._due(self.aside):
                continue
            passed += 1
            if passed.bit_count() == 1 or step is self.steps[-1]:
                self.asides.append(True)
                yield self._layout(self._aside_step)

    def _layout(self, step: Step) -> ChunkLayout:
        device = self.text.ids.device
        return ChunkLayout(self.sizes, self.rows, step, self.reach, device).shared()

    def _due(self, aside: Aside) -> bool:
        since = aside.since.tolist()
        return all(row.tokens >= least for row, least in zip(self.rows, since, strict=True))

    def is_aside(self, layout: ChunkLayout) -> bool:
        """Whether a layout is of the aside; its memory is then forgotten."""
        return self.aside is not None and layout.step is self._aside_step

    def text_of(self, layout: ChunkLayout) -> tuple[TextBatch, Tensor | None]:
        """The text that a layout reads, and its labels if it is scored."""
        if self.is_aside(layout):
            assert self.aside is not None
            assert self.aside_text is not None
            return self.aside_text, self.aside.labels
        return self.text, self.scored and self.scored.labels

    def wants(self, step: Step) -> bool:
        """Whether a step's hidden states are wanted."""
        return step is self.steps[-1] or self.text.reaches(step, self.first)


class Watch:
    """What follows every step of a call: a look at the memory that a chunk's end has written.

    The CPU looks at once. On another device a look would wait for all work under way, so numbers
    are fetched beside that work, and looked at when the next chunk ends, or the call does.

    Args:
        give_back: give freed memory back to the system; in training it is wanted again at once.
    """

    def __init__(self, give_back: bool) -> None:
        self._give_back = give_back
        self._coming: _Sums | None = None

    def __call__(self, layout: ChunkLayout, states: States) -> None:
        """Look at what one step has written.

        Raises:
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        if not layout.closes:
            return
        if states:
            self.end()
            self._coming = _Sums.of(states, layout)
            if self._coming is not None and self._coming.event is None:
                self.end()
        if self._give_back:
            return_freed_memory(layout.device)

    def end(self) -> None:
        """Look at what was fetched last.

        Raises:
            FloatingPointError: a memory is not finite; names layer and chunk.
        """
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.check()


@dataclass(frozen=True)
class _Sums:
    """Sums of what a chunk wrote, some for each layer: not finite where a term is not.

    Attributes:
        sums: on the CPU, or on their way there.
        event: says when they are there; None: they are.
        layers: how many.
        chunk: which chunk, from 0 on.
    """

    sums: Tensor
    event: torch.Event | None
    layers: int
    chunk: int

    @classmethod
    def of(cls, states: States, layout: ChunkLayout) -> _Sums | None:
        """Sum what this chunk wrote: one pass, in which nothing of the memory's size is made."""
        parts: list[Tensor] = []
        for state in states:
            written = (state.memory.state, *state.memory.entries[-1:])
            parts.extend(x.detach().sum(dtype=torch.float32) for x in written if x is not None)
        if not parts:
            return None
        sums = torch.stack([part.to(parts[0].device) for part in parts])
        chunk = max(row.folds for row in layout.rows)
        if sums.device.type == "cpu":
            return cls(sums, None, len(states), chunk)
        event = torch.Event(sums.device)
        there = torch.empty(sums.shape, dtype=sums.dtype, device="cpu", pin_memory=True)
        there.copy_(sums, non_blocking=True)
        event.record(torch.accelerator.current_stream(sums.device))
        return cls(there, event, len(states), chunk)

    def check(self) -> None:
        """Look at them; waits for them alone.

        Raises:
            FloatingPointError: one is not finite.
        """
        if self.event is not None:
            self.event.synchronize()
        per_layer = len(self.sums) // self.layers
        for i, total in enumerate(self.sums.tolist()):
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"the memory of layer {i // per_layer} is not finite (NaN or infinite) after "
                    f"chunk {self.chunk}; the cache given to this call is unharmed"
                )
