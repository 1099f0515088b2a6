"""Ranks that read one text together and end with one ordinary session.

Blocks of chunks go round the ranks in turn: while one rank is at layer i of its block, the next is
a layer behind in the block that follows, and the last hands its memory on to the first. So all
ranks are at work from the second block on, however long the text is. Every rank is given the whole
text; what travels is each layer's memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from cometlm.config import CometConfig
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.layout import ChunkLayout, Piece
from cometlm.core.plan import Call, plan_chunks
from cometlm.core.state import States
from cometlm.core.text_batch import TextBatch
from cometlm.core.walk import walk_by_layer
from cometlm.core.watch import Watch
from cometlm.parallel.p2p import Neighbour, answering
from cometlm.parallel.pipeline import TIMEOUT, Wave, memory_at
from cometlm.session.session import Session, SessionStats

CHUNKS = 8  # of a block: one message for each layer and block


class SharedSession(Session):
    """A session that all ranks of a group read together; every call is made on all of them.

    Reading leaves the memory spread over the ranks; `gather` brings it to each of them, and so do
    `fork`, `save` and with them asking. All ranks must be given the same text.

    Args:
        model: the same weights on every rank.
        tokenizer: its tokenizer.
        group: the ranks; default all. At least two.
        chunks: of a block.

    Raises:
        ValueError: no job of several ranks, less than one chunk.
    """

    def __init__(
        self,
        model: CometForCausalLM,
        tokenizer: Any = None,
        group: dist.ProcessGroup | None = None,
        chunks: int = CHUNKS,
    ) -> None:
        super().__init__(model, tokenizer)
        if not dist.is_initialized() or dist.get_world_size(group) < 2:
            raise ValueError("a shared session needs a job of several ranks: start it by torchrun")
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {chunks}")
        own = group if group is not None else dist.group.WORLD
        assert own is not None
        self._group = own
        self._place, self._ranks = dist.get_rank(own), dist.get_world_size(own)
        self._left = Neighbour(own, (self._place - 1) % self._ranks, TIMEOUT)
        self._right = Neighbour(own, (self._place + 1) % self._ranks, TIMEOUT)
        self._chunks = chunks
        self._blocks = 0  # walked since the memory was last gathered
        self._last: States = ()  # this rank's newest

    def gather(self) -> None:
        """Walk all full chunks that more text has followed, and bring the memory to every rank.

        Raises:
            PipelineError: another rank is lost.
        """
        if (rest := (len(self._open) - 1 - self._sizes.overlap) // self._new) > 0:
            self._walk(rest)
        if not self._blocks:
            return
        with answering("the gathering of the memory"):
            self._cache = replace(self._cache, layers=self._gathered())
        self._blocks, self._last = 0, ()

    def _gathered(self) -> States:
        owner, right = (self._blocks - 1) % self._ranks, self._blocks % self._ranks
        wave = self._wave(0)
        states = []
        for i in range(len(self.model.model.cells)):
            specs = wave.specs(i)
            if self._place == right:  # it was sent for a block that does not come
                tensors = self._left.fetch(specs, memory_at(i, wave.block.start))
            elif self._place == owner:
                tensors = wave.tensors_of(self._last[i])
            else:
                tensors = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in specs]
            for tensor in tensors:
                dist.broadcast(tensor, dist.get_global_rank(self._group, owner), self._group)
            states.append(wave.state_of(i, tensors))
        self._right.flush()
        return tuple(states)

    def prepare(self) -> None:
        """See `Session.prepare`; ranks bring their memory together before."""
        for _ in self.settle():
            pass
        self.gather()
        super().prepare()

    def fork(self, *, without: Collection[str] = ()) -> Self:
        """See `Session.fork`."""
        self.gather()
        return super().fork(without=without)

    def save(self, path: str | Path, **options: Any) -> None:
        """See `Session.save`: one file, written by the group's first rank."""
        self.gather()
        if self._place == 0:
            super().save(path, **options)
        with answering("the saving of the session"):
            dist.barrier(self._group)

    def _take(self, ids: Sequence[int]) -> Iterator[SessionStats]:
        self._open += ids
        while len(self._open) > self._chunks * self._new + self._sizes.overlap:
            yield self._walk(self._chunks)

    def _fold(self, size: int) -> SessionStats:
        self.gather()
        return super()._fold(size)

    def _end_text(self) -> None:
        super()._end_text()
        self.gather()

    @torch.no_grad()
    def _walk(self, chunks: int) -> SessionStats:
        """One block, by the rank whose turn it is."""
        starts = range(0, chunks * self._new, self._new)
        ids = [id_ for i in starts for id_ in self._open[i : i + self._sizes.chunk_size]]
        call = self._call(ids)
        del self._open[: chunks * self._new]
        layouts = list(call.layouts())
        if self._blocks % self._ranks == self._place:
            model, wave = self.model.model, self._wave(chunks)
            _, self._last = walk_by_layer(
                model.grid(call.max_positions),
                [model.embedded(call.text, layout) for layout in layouts],
                layouts,
                wave.incoming() if self._blocks else self._cache.layers,
                wave.outgoing(self._right),
            )
            watch = Watch(give_back=False)
            watch(layouts[-1], self._last)
            watch.end()
        self._blocks += 1
        self._cache = replace(self._cache, rows=call.rows)
        return self._folded()

    @property
    def _sizes(self) -> CometConfig:
        return self.model.config.comet_config

    @property
    def _new(self) -> int:
        """Tokens of a full chunk that were not in the one before."""
        return self._sizes.chunk_size - self._sizes.overlap

    def _call(self, ids: Sequence[int]) -> Call:
        """A call of full chunks on top of what was read."""
        sizes = self._sizes
        full = len(ids) // sizes.chunk_size
        return Call(
            text=TextBatch.of(
                self._tensor(list(ids)), None, self.model.config.vocab_size, self.model.device
            ),
            cache=self._cache,
            steps=plan_chunks([[sizes.chunk_size] * full], close_last=True),
            sizes=sizes,
            max_positions=self._cache.max_positions_under(sizes),
        )

    def _wave(self, chunks: int) -> Wave:
        """What passes this rank around so many chunks that come next."""
        sizes, cache = self._sizes, self._cache
        step = (Piece(0, sizes.chunk_size, close=True),)
        device = self.model.device
        first = ChunkLayout(sizes, cache.rows, step, cache.max_positions_under(sizes), device)
        begin = cache.chunks_folded
        return Wave(self.model.model, sizes, first, range(begin, begin + chunks), self._left)
