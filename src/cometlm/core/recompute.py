"""Exact backpropagation through any number of chunks, with the activations of one.

Each span of chunks is one node of the autograd graph. Forward it runs without a graph and keeps
its *border*: the memory that went in. Backward it runs again from the border, now with a graph,
and hands its gradients on. Memories share their tensors (the FIFO is a tuple of blocks), so what a
border adds is only what is new: each layer's state and one chunk's entries.

Parameters go into one node that all spans hang on. Spans sum their gradients beside the graph, and
that node hands the sums on when the last of them is done: a parameter's hooks fire once a backward
pass, also for a parameter that no chunk used, which is what data-parallel training counts on. As
inputs of every span they would cost each chunk as many edges and records of autograd's.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from cometlm.compat import backward_pass
from cometlm.core.layout import ChunkLayout
from cometlm.core.state import States, map_tensors, tensors_of, with_tensors

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
    run = _Run(read, _Sums(parameters), finished, _Vault() if how.offload else None)
    token = _Join.apply(run.sums, *parameters)
    kept: list[Tensor] = []
    for place, span in enumerate(_spans(layouts, how.every, truncate)):
        if truncate and _folds(span[0]) % truncate == 0:
            states = map_tensors(states, Tensor.detach)
        work = _Work(run, place, span, states)
        border = tensors_of(states)
        outs = _Span.apply(work, token, *border)
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


class _Sums:
    """Sums of parameters' gradients over the spans that one backward pass has done so far."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self._pass = self._place = _NONE
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    def begin(self, place: int) -> None:
        """Say that a span is about to run; what a pass left that broke off is forgotten.

        Args:
            place: the span's among all; a pass runs them from the last one back.
        """
        if backward_pass() is None and place >= self._place:
            self._forget()
        self._place = place

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one span's gradients, one for each parameter."""
        self._look_at_pass()
        for i, (old, new) in enumerate(zip(self._sums, grads, strict=True)):
            if new is not None:
                self._sums[i] = new.clone() if old is None else old.add_(new)

    def take(self) -> list[Tensor | None]:
        """The sums, which are handed on once."""
        self._look_at_pass()
        sums = self._sums
        self._forget()
        self._pass = self._place = _NONE
        return sums

    def _look_at_pass(self) -> None:
        """Forget what a pass left that broke off, or that did not want parameters' gradients."""
        now = backward_pass()
        if now is not None and now != self._pass:
            self._forget()
            self._pass = now

    def _forget(self) -> None:
        self._sums = [None] * len(self.parameters)


class _Join(torch.autograd.Function):
    """The node that all spans hang on: parameters in, an empty tensor out."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *parameters: Tensor) -> Tensor:
        ctx.sums = sums
        return parameters[0].new_empty(0) if parameters else torch.empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.take()


@dataclass
class _Run:
    """What the spans of one call share."""

    read: Read
    sums: _Sums
    finished: Finished
    vault: _Vault | None
    surroundings: _Surroundings | None = None
    structure: States = ()

    def structure_of(self, states: States) -> States:
        """States without their tensors; from chunk to chunk mostly the same object."""
        found = map_tensors(states, lambda _: _PLACE)
        if found != self.structure:
            self.structure = found
        return self.structure

    def look_round(self, border: Sequence[Tensor]) -> _Surroundings:
        """What surrounds a span; as long as nothing changes all of them hold the same object."""
        now = _Surroundings.of(border, self.sums.parameters)
        if self.surroundings is None or not now.same(self.surroundings):
            self.surroundings = now
        return self.surroundings


@dataclass
class _Work:
    """What one span does, apart from the tensors that autograd sees."""

    shared: _Run
    place: int
    layouts: Sequence[ChunkLayout]
    before: States  # only its structure is used; holding the tensors would keep them alive
    after: States = ()
    sources: list[int | None] = field(default_factory=list)  # which border tensor, or None: new

    def __post_init__(self) -> None:
        self.before = self.shared.structure_of(self.before)

    def run(self, border: Sequence[Tensor]) -> list[Tensor]:
        """Kept outputs of all steps, then the tensors of the states after them that are new."""
        states = with_tensors(self.before, border)
        read, parameters = self.shared.read, self.shared.sums.parameters
        layouts = [layout.shared() for layout in self.layouts]
        if not torch.is_grad_enabled():
            kept, states = read_on(read, layouts, states, self.shared.finished, 0)
            self.layouts = [layout.bare() for layout in self.layouts]
        elif len(self.layouts) == 1:
            kept, states = read_on(read, layouts, states, _nothing, 0)
        else:
            one = Recomputation(every=1)
            args = (parameters, one, _nothing, 0)
            kept, states = read_recomputed(read, layouts, states, *args)
        given = {id(tensor): i for i, tensor in enumerate(border)}
        after = tensors_of(states)
        self.sources = [given.get(id(tensor)) for tensor in after]
        self.after = self.shared.structure_of(states)
        new = [x for x, source in zip(after, self.sources, strict=True) if source is None]
        return kept + (new if torch.is_grad_enabled() else _side_by_side(new))

    def assemble(self, border: Sequence[Tensor], new: Sequence[Tensor]) -> States:
        """The states after the span, made of what came in and what is new."""
        following = iter(new)
        tensors = [next(following) if i is None else border[i] for i in self.sources]
        return with_tensors(self.after, tensors)


class _Span(torch.autograd.Function):
    """A span of steps as one node: `_Join`'s token and the border in, outputs and memory out."""

    @staticmethod
    def forward(ctx: Any, work: _Work, token: Tensor, *border: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.work = work
        ctx.surroundings = work.shared.look_round(border)
        ctx.devices = [x.device for x in border]
        vault = work.shared.vault
        ctx.save_for_backward(*(border if vault is None else map(vault.put, border)))
        return tuple(work.run(border))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        sums = work.shared.sums
        sums.begin(work.place)
        border = [
            x.detach().to(device, non_blocking=True).requires_grad_(need)
            for x, device, need in zip(
                ctx.saved_tensors, ctx.devices, ctx.needs_input_grad[2:], strict=True
            )
        ]
        with torch.enable_grad(), ctx.surroundings.restored():
            outs = work.run(border)
        pairs = [
            (out, grad)
            for out, grad in zip(outs, grads, strict=True)
            if grad is not None and out.requires_grad
        ]
        wanted = [x for x in border if x.requires_grad]
        got: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and (wanted or sums.parameters):
            ends, given = zip(*pairs, strict=True)
            both = (*wanted, *sums.parameters)
            got = torch.autograd.grad(ends, both, given, allow_unused=True)
            sums.add(got[len(wanted) :])
        following = iter(got)
        token = torch.empty(0) if not sums.parameters else sums.parameters[0].new_empty(0)
        return None, token, *(next(following) if x.requires_grad else None for x in border)


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
        # One tensor for each device: torch looks at the state of a device once for each tensor.
        tensors = {x.device: x for x in (*border, *parameters)}
        devices, states = get_device_states(*tensors.values())
        types = sorted({"cpu", *(device.type for device in tensors)})
        cached = torch.is_autocast_cache_enabled()
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached)
            for kind in types
        )
        return cls(torch.get_rng_state(), devices, states, types[-1], autocast)

    def same(self, other: _Surroundings) -> bool:
        """Whether a run in these is a run in the other's."""
        if (self.devices, self.device_type) != (other.devices, other.device_type):
            return False
        mine, others = ([x.random, *x.device_random] for x in (self, other))
        return self.autocast == other.autocast and all(map(torch.equal, mine, others))

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
        # Neither way waits: both copies are work of the stream that makes and reads the tensor.
        pin = torch.accelerator.is_available()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
        copy.copy_(tensor.detach(), non_blocking=True)
        self._held[key] = (weakref.ref(tensor, lambda _: self._forget(key)), copy)
        return copy

    def _forget(self, key: int) -> None:
        self._held.pop(key, None)


_ALIGNED = 64  # bytes
_NONE = -1  # no pass, no place


def _side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in one block of memory per device and dtype.

    A border outlives the activations that it was made among. Left there, tensor by tensor, it would
    keep what they free from being used again.
    """
    blocks: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for x in tensors:
        blocks.setdefault((x.device, x.dtype), []).append(x)
    copies: dict[int, Tensor] = {}
    for (device, dtype), parts in blocks.items():
        step = max(1, _ALIGNED // dtype.itemsize)
        starts = list(accumulate((-(-x.numel() // step) * step for x in parts), initial=0))
        block = torch.empty(starts[-1], device=device, dtype=dtype)
        for x, start in zip(parts, starts, strict=False):
            copies[id(x)] = block[start : start + x.numel()].view(x.shape).copy_(x)
    return [copies[id(x)] for x in tensors]


# Stands for a tensor where only structure counts; one number, so that == says it is itself (the
# fields of dataclasses are compared one by one from Python 3.13 on, and not by identity first).
_PLACE = torch.zeros(())


def _folds(layout: ChunkLayout) -> int:
    """Chunks folded before this step, of the row that has folded most."""
    return max(row.folds for row in layout.rows)


def _nothing(layout: ChunkLayout, states: States) -> None:
    """After a second run there is nothing left to check."""
