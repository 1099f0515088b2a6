"""The wave: one sample's chunks on several ranks, each walked layer by layer (SPEC §6).

Each rank owns a block of consecutive chunks. Layer i's memory is received just before layer i is
walked and sent on as soon as it is there, while the next layer is already being worked on. The
backward pass is the same wave in reverse. Losses are parts of one sum: add them over the ranks of
the group, and the gradients too (`sum_gradients`).

Legend: B batch, M readout tokens, D width, E width of an entry, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from cometlm.backbones.recurrence import OwnState
from cometlm.config import CometConfig
from cometlm.core.cell import Cell
from cometlm.core.layout import ChunkLayout
from cometlm.core.memory import LayerMemory
from cometlm.core.state import LayerState, States
from cometlm.core.walk import walk_by_layer
from cometlm.parallel.blocks import balanced
from cometlm.parallel.p2p import Neighbour, TensorSpec, answering, join, receive, send

if TYPE_CHECKING:
    from cometlm.core.model import CometModel
    from cometlm.core.plan import Call

TIMEOUT = timedelta(minutes=10)


@dataclass
class Wave:
    """What passes a rank in one call: each layer's memory as soon as it is there.

    Attributes:
        sizes: of the memory in this call.
        first: the first layout of this rank's block.
        block: its chunks, counted from the beginning of the text.
        left: where memory comes from.
        ties: what the loss has to be joined with.
    """

    model: CometModel
    sizes: CometConfig
    first: ChunkLayout
    block: range
    left: Neighbour | None
    ties: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._grid = self.model.grid(self.first.max_positions)
        self._own: dict[int, OwnState] = {}

    def incoming(self) -> Iterator[LayerState]:
        """Each layer's memory before the block, when its turn comes."""
        assert self.left is not None
        for i in range(len(self.model.cells)):
            got = receive(self.left, self.specs(i), memory_at(i, self.block.start))
            self.ties.extend(got)
            yield self.state_of(i, got)

    def outgoing(self, right: Neighbour | None) -> Callable[[LayerState], LayerState]:
        """What sends each layer's memory on, one after the other."""
        assert right is not None
        numbers = iter(range(len(self.model.cells)))

        def leave(after: LayerState) -> LayerState:
            what = memory_at(next(numbers), self.block.stop)
            token = send(right, self.tensors_of(after), what)
            if token is not None:
                self.ties.append(token)
            return after

        return leave

    @staticmethod
    def tensors_of(after: LayerState) -> list[Tensor]:
        """What travels of a layer's memory."""
        memory = after.memory
        tensors = [] if memory.state is None else [memory.state]
        tensors += [torch.cat(memory.entries, dim=1)] if memory.entries else []
        return tensors + list(after.own.values())

    def state_of(self, i: int, tensors: Sequence[Tensor]) -> LayerState:
        """Layer i's memory of what has travelled."""
        parts, names = list(tensors), list(self.own_like(i))
        own = dict(zip(names, parts[len(parts) - len(names) :], strict=True))
        parts = parts[: len(parts) - len(names)]
        state = parts.pop(0) if self._grid.weights[i].global_memory is not None else None
        return LayerState(LayerMemory(state, tuple(parts)), own=own)

    def own_like(self, i: int) -> OwnState:
        """A state of layer i's own, in shape and dtype."""
        if i not in self._own:
            width, rotary = int(self.model.config.hidden_size), self._grid.rotary[i]
            place, cell = rotary[0].device, self._grid.cells[i]
            item = torch.zeros(len(self.first.rows), 1, width, device=place, dtype=self.model.dtype)
            self._own[i] = cell.own_like(item, rotary)
        return self._own[i]

    def specs(self, i: int) -> list[TensorSpec]:
        """What travels of layer i's memory before the block."""
        cell, weights = self._grid.cells[i], self._grid.weights[i]
        first, sizes = self.first, self.sizes
        batch, width = len(first.rows), int(self.model.config.hidden_size)
        memory = weights.global_memory
        specs = []
        if memory is not None:
            norm = memory.norm.weight
            specs.append(TensorSpec((batch, sizes.readout_tokens, width), norm.dtype, norm.device))
        if first.temporary_width and weights.temporary_memory is not None:
            shape = (batch, first.temporary_width, cell.entry_width)
            place = next(cell.parameters()).device
            specs.append(TensorSpec(shape, self.model.dtype, place))
        own = self.own_like(i).values()
        return specs + [TensorSpec(tuple(x.shape), x.dtype, x.device) for x in own]


class Pipeline:
    """One rank's part in reading samples together; `TrainingPlan.pipeline`.

    Args:
        group: the ranks that share a sample.
        timeout: how long to wait for another rank.

    Attributes:
        passing: how memory goes from rank to rank.
    """

    passing: type[Wave] = Wave

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta = TIMEOUT) -> None:
        self.group = group
        self.place, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._left = Neighbour(group, self.place - 1, timeout) if self.place else None
        last = self.place + 1 == self.ranks
        self._right = None if last else Neighbour(group, self.place + 1, timeout)

    def read(self, model: CometModel, call: Call) -> tuple[list[Tensor], States]:
        """This rank's block of a call.

        Returns:
            One score, the sum over the block's steps, and all layers' states after the block.

        Raises:
            ValueError: a call that wants hidden states or a cache; sharded weights with fewer
                chunks than ranks, or with an observer; an observer, and a row that ends before
                others with an open chunk.
            PipelineError: another rank is lost.
        """
        if call.scored is None or call.use_cache:
            raise ValueError(
                "ranks that share a sample each see a block of it: they take labels, return the "
                "loss, no hidden states and no cache (use_cache=False)"
            )
        sharded = any(isinstance(cell, FSDPModule) for cell in model.cells)
        if sharded and call.observer is not None:
            raise ValueError(
                "an observer's probes are passes that not every rank makes, which sharded weights "
                "need: train it without shard_weights"
            )
        if sharded and any(cell.call.cache is not None for cell in _cells(model)):
            raise ValueError(
                "layers with a state of their own (convolutions, scans, linear attention) cannot "
                "be sharded where ranks share a sample: train without shard_weights, or without "
                "chunk_parallel"
            )
        self.flush()  # what the last call sent is there, or this says who is lost
        layouts = list(call.layouts())
        last = [row for layout in layouts[1:][-1:] for row in layout.rows]
        if call.observer is not None and any(row.items for row in last):
            raise ValueError(
                "an observer needs rows whose chunks are closed where they end, since open ones do "
                "not travel: give chunk_lengths and close_last=True"
            )
        block, onward = self._block(layouts, sharded)
        reads_on = bool(block) and block.start > 0
        first = layouts[block.start if block else 0]
        wave = self.passing(model, call.sizes, first, block, self._left)
        hidden = [model.embedded(call.text, layouts[t]) for t in block]
        mine = [layouts[t] for t in block]
        mine = _without_ended(mine) if reads_on else mine
        by_layer: list[Sequence[LayerState]] = []
        recompute = model.training_plan.recomputation is not None and torch.is_grad_enabled()
        outs, states = walk_by_layer(
            model.grid(call.max_positions),
            hidden,
            mine,
            wave.incoming() if reads_on else call.cache.layers,
            wave.outgoing(self._right) if onward else _stays,
            recompute=recompute,
            note=_forget if call.observer is None else by_layer.append,
        )
        borders: Sequence[States] = list(zip(*by_layer, strict=True)) or [()] * len(mine)
        scores = []
        for layout, out, border in zip(mine, outs, borders, strict=True):
            args = (call, layout, out, border)
            again = recompute and call.observer is not None  # probes are forward passes too
            scores.append(
                checkpoint(model.kept, *args, use_reentrant=False) if again else model.kept(*args)
            )
        wide = torch.promote_types(model.dtype, torch.float32)
        names = call.observer.losses if call.observer else ()
        nothing = torch.zeros(
            2 + 3 * len(names), dtype=wide, device=model.device, requires_grad=True
        )
        total = torch.stack(scores).sum(0) if scores else nothing
        reached = _trained([*model.parameters(), *call.scored.parameters])
        total = join(total, wave.ties, reached)
        return [self._counted_by_all(total) if names else total], states

    def _counted_by_all(self, total: Tensor) -> Tensor:
        """The same with the counts of all ranks: what they add up to is a mean then."""
        counts = total.detach()[4::3].clone()
        with answering("the counts of all ranks"):
            dist.all_reduce(counts, group=self.group)
        places = torch.arange(4, len(total), 3, device=total.device)
        return total.index_copy(0, places, counts)

    def flush(self) -> None:
        """Wait until all that this rank sent has arrived."""
        for neighbour in (self._left, self._right):
            if neighbour is not None:
                neighbour.flush()

    def _block(self, layouts: Sequence[ChunkLayout], sharded: bool) -> tuple[range, bool]:
        """This rank's steps, and whether the next rank has any."""
        # What a step costs: its items go through the layer, its memory is attended to only.
        costs = [max(one.items) + max(one.items) * one.memory_width / 4096 for one in layouts]
        places = balanced(costs, self.ranks)
        if len(layouts) < self.ranks and sharded:
            raise ValueError(
                f"with sharded weights every rank needs a chunk: {len(layouts)} chunks are too few "
                f"for chunk_parallel={self.ranks}"
            )
        following = places[self.place + 1] if self.place + 1 < self.ranks else range(0)
        return places[self.place], len(following) > 0


def _cells(model: CometModel) -> Sequence[Cell]:
    return cast("Sequence[Cell]", model.cells)


def memory_at(layer: int, chunk: int) -> str:
    """The cell that waits for a message, for errors."""
    return f"the memory for layer {layer}, chunk {chunk}"


def _without_ended(layouts: Sequence[ChunkLayout]) -> list[ChunkLayout]:
    """A block's layouts without open chunks of rows that ended before it: those do not travel."""
    ended = [row.items > 0 for row in layouts[0].rows]

    def cleared(layout: ChunkLayout) -> ChunkLayout:
        rows = tuple(
            replace(row, text=0, items=0) if over else row
            for row, over in zip(layout.rows, ended, strict=True)
        )
        return replace(layout, rows=rows, tables={})

    return [cleared(layout) for layout in layouts]


def _trained(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What is trained, once each; a layer whose weights are sharded is reached by its chunks."""
    found = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    return list(dict.fromkeys(found))


def _stays(state: LayerState) -> LayerState:
    """The last block's memory goes nowhere."""
    return state


def _forget(states: Sequence[LayerState]) -> None:
    """Nobody asks for the memory inside a block."""


def sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add gradients over the ranks that share a sample; a parameter without one counts as zeros.

    Sharded gradients are added shard by shard.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        dist.all_reduce(local, group=group)
