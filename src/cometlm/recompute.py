"""Exact backpropagation through any number of chunks, with the activations of one.

Each span of chunks is one node of the autograd graph. Forward it runs without a graph and keeps
its *border*: the memory that went in. Backward it runs again from the border, now with a graph,
and hands its gradients on. Memories share their tensors (the FIFO is a tuple of blocks), so what a
border adds is only what is new: each layer's state and one chunk's entries.

Parameters go into every node as inputs, so autograd sums their gradients and a parameter's hooks
fire once a backward pass, also for a parameter that no chunk used: what data-parallel training
counts on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from cometlm.grid import States, map_tensors, tensors_of, with_tensors
from cometlm.layout import ChunkLayout

# One step: what is kept of its output (a tensor), and the states after it.
Read = Callable[[ChunkLayout, States], tuple[Tensor, States]]
Finished = Callable[[ChunkLayout, States], None]


@dataclass(frozen=True)
class Recomputation:
    """What is kept of the forward pass of a training step.

    Args:
        every: keep the border of every so many chunks, and replay from it. 1 costs one more
            forward pass, more cost two.
        offload: keep borders in the CPU's memory; nothing changes where the device is the CPU.

    Raises:
        ValueError: `every` is below 1.
    """

    every: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 chunk, got {self.every}")


def read_on(
    read: Read, layouts: Iterable[ChunkLayout], states: States, finished: Finished, truncate: int
) -> tuple[list[Tensor], States]:
    """Read step after step, with autograd's own graph if it is on.

    Args:
        finished: called after each step.
        truncate: cut the graph after every so many chunks; 0 never.
    """
    kept = []
    for layout in layouts:
        if truncate and _folds(layout) % truncate == 0:
            states = map_tensors(states, Tensor.detach)
        out, states = read(layout, states)
        finished(layout, states)
        kept.append(out)
    return kept, states


def read_recomputed(
    read: Read,
    layouts: Iterable[ChunkLayout],
    states: States,
    parameters: Sequence[nn.Parameter],
    how: Recomputation,
    finished: Finished,
    truncate: int,
) -> tuple[list[Tensor], States]:
    """The same numbers and gradients as `read_on`, holding the graph of one chunk at a time.

    Args:
        parameters: every parameter that `read` uses and that wants a gradient.
        finished: called after each step, in the forward pass only.
    """
    vault = _Vault() if how.offload else None
    kept: list[Tensor] = []
    for span in _spans(layouts, how.every, truncate):
        if truncate and _folds(span[0]) % truncate == 0:
            states = map_tensors(states, Tensor.detach)
        work = _Work(read, span, states, parameters, finished, vault)
        border = tensors_of(states)
        outs = _Span.apply(work, *border, *parameters)
        kept.extend(outs[: len(span)])
        states = work.assemble(border, outs[len(span) :])
    return kept, states


def _spans(
    layouts: Iterable[ChunkLayout], every: int, truncate: int
) -> Iterator[Sequence[ChunkLayout]]:
    """Runs of `every` steps; where the graph is to be cut, a new run begins."""
    span: list[ChunkLayout] = []
    for layout in layouts:
        cut = truncate and _folds(layout) % truncate == 0
        if span and (cut or len(span) == every):
            yield span
            span = []
        span.append(layout)
    yield span


@dataclass
class _Work:
    """What one span does, apart from the tensors that autograd sees."""

    read: Read
    layouts: Sequence[ChunkLayout]
    before: States  # only its structure is used; holding the tensors would keep them alive
    parameters: Sequence[nn.Parameter]
    finished: Finished
    vault: _Vault | None
    after: States = ()
    sources: list[int | None] = field(default_factory=list)  # which border tensor, or None: new

    def __post_init__(self) -> None:
        self.before = map_tensors(self.before, _structure)

    def run(self, border: Sequence[Tensor]) -> list[Tensor]:
        """Kept outputs of all steps, then the tensors of the states after them that are new."""
        states = with_tensors(self.before, border)
        if not torch.is_grad_enabled():
            kept, states = read_on(self.read, self.layouts, states, self.finished, 0)
        elif len(self.layouts) == 1:
            kept, states = read_on(self.read, self.layouts, states, _nothing, 0)
        else:
            one = Recomputation(every=1)
            args = (self.parameters, one, _nothing, 0)
            kept, states = read_recomputed(self.read, self.layouts, states, *args)
        given = {id(tensor): i for i, tensor in enumerate(border)}
        after = tensors_of(states)
        self.sources = [given.get(id(tensor)) for tensor in after]
        self.after = map_tensors(states, _structure)
        new = [x for x, source in zip(after, self.sources, strict=True) if source is None]
        return kept + new

    def assemble(self, border: Sequence[Tensor], new: Sequence[Tensor]) -> States:
        """The states after the span, made of what came in and what is new."""
        following = iter(new)
        tensors = [next(following) if i is None else border[i] for i in self.sources]
        return with_tensors(self.after, tensors)


class _Span(torch.autograd.Function):
    """A span of steps as one node: border and parameters in, outputs and new memory out."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> tuple[Tensor, ...]:
        border = tensors[: len(tensors) - len(work.parameters)]
        ctx.set_materialize_grads(False)
        ctx.work = work
        ctx.surroundings = _Surroundings.of(border, work.parameters)
        ctx.devices = [x.device for x in border]
        vault = work.vault
        ctx.save_for_backward(*(border if vault is None else map(vault.put, border)))
        return tuple(work.run(border))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        needed = ctx.needs_input_grad[1 : 1 + len(ctx.devices)]
        border = [
            x.detach().to(device).requires_grad_(need)
            for x, device, need in zip(ctx.saved_tensors, ctx.devices, needed, strict=True)
        ]
        with torch.enable_grad(), ctx.surroundings.restored():
            outs = work.run(border)
        pairs = [
            (out, grad)
            for out, grad in zip(outs, grads, strict=True)
            if grad is not None and out.requires_grad
        ]
        wanted = [x for x in border if x.requires_grad] + list(work.parameters)
        got: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            ends, given = zip(*pairs, strict=True)
            got = torch.autograd.grad(ends, wanted, given, allow_unused=True)
        following = iter(got)
        return None, *(next(following) if x.requires_grad else None for x in border), *following


@dataclass(frozen=True)
class _Surroundings:
    """What a second run needs to be the same as the first: random numbers and autocast."""

    random: Tensor
    devices: list[int]
    device_random: list[Tensor]
    device_type: str
    autocast: tuple[tuple[str, bool, torch.dtype, bool], ...]

    @classmethod
    def of(cls, border: Sequence[Tensor], parameters: Sequence[Tensor]) -> _Surroundings:
        tensors = [*border, *parameters]
        devices, states = get_device_states(*tensors)
        types = sorted({"cpu", *(x.device.type for x in tensors)})
        cached = torch.is_autocast_cache_enabled()
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached)
            for kind in types
        )
        return cls(torch.get_rng_state(), devices, states, types[-1], autocast)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(self.devices, device_type=self._random_device)
            )
            torch.set_rng_state(self.random)
            if self.devices:
                set_device_states(self.devices, self.device_random, device_type=self.device_type)
            for kind, enabled, dtype, cached in self.autocast:
                cast = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=cached)
                stack.enter_context(cast)
            yield

    @property
    def _random_device(self) -> str:
        """`fork_rng` wants an accelerator's name even where there is nothing of it to fork."""
        return self.device_type if self.devices else "cpu"


class _Vault:
    """Copies of border tensors on the CPU, one for each however many borders hold it."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def put(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        key = id(tensor)
        held = self._held.get(key)
        if held is not None and held[0]() is tensor:
            return held[1]
        copy = tensor.detach().to("cpu")
        self._held[key] = (weakref.ref(tensor, lambda _: self._forget(key)), copy)
        return copy

    def _forget(self, key: int) -> None:
        self._held.pop(key, None)


_PLACE = torch.empty(0)


def _structure(_: Tensor) -> Tensor:
    """A stand-in for a tensor, where only the structure around it counts."""
    return _PLACE


def _folds(layout: ChunkLayout) -> int:
    """Chunks folded before this step, of the row that has folded most."""
    return max(row.folds for row in layout.rows)


def _nothing(layout: ChunkLayout, states: States) -> None:
    """After a second run there is nothing left to check."""
