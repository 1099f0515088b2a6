"""Tensors that go to another rank, and their gradients that come back: nodes of autograd's graph.

`send` and `receive` work without a graph too. With one, each `send` leaves a token that `join` ties
to the loss, so that its backward pass, in which it waits for the gradient, is run whatever the loss
is made of; and `join` ties what was received, so that its gradient is sent even where it is zero.

Autograd runs the nodes that were made last first. So the backward pass goes through layers in
reverse order on every rank, and each waits only for what the other has been sending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class PipelineError(RuntimeError):
    """A rank waited in vain for another; says which, and for what."""


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another rank does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def reason(error: RuntimeError) -> str:
    """What such an error says, without advice."""
    return " ".join(str(error).split()).partition(". ")[0][:200]


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Name a call of all ranks in the error of a rank that is left alone in it.

    Raises:
        PipelineError: instead of what torch.distributed says.
    """
    try:
        yield
    except PipelineError:
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        rank = dist.get_rank()
        others = [str(one) for one in range(dist.get_world_size()) if one != rank]
        which = f"rank {others[0]}" if len(others) == 1 else f"one of ranks {', '.join(others)}"
        raise PipelineError(f"rank {rank} lost {which} in {what}: {reason(error)}") from error


class TensorSpec(NamedTuple):
    """What a tensor that is to come looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Neighbour:
    """The way to one other rank and back.

    Args:
        group: the ranks that share a sample.
        place: the other's place in it.
        timeout: how long to wait for a message.
    """

    def __init__(self, group: dist.ProcessGroup, place: int, timeout: timedelta) -> None:
        self._group = group
        self._rank = dist.get_global_rank(group, place)
        self._timeout = timeout
        self._under_way: list[tuple[dist.Work, Tensor, str]] = []

    def post(self, tensors: Sequence[Tensor], what: str) -> None:
        """Begin to send; `what` names it in errors."""
        while self._under_way and self._under_way[0][0].is_completed():
            self._finish(*self._under_way.pop(0)[::2])
        for x in tensors:
            held = x.detach().contiguous()  # kept until it has been sent
            work = self._begin(dist.isend, held, what)
            self._under_way.append((work, held, what))

    def fetch(self, specs: Sequence[TensorSpec], what: str) -> list[Tensor]:
        """Wait for tensors that the other posts, in the same order.

        Raises:
            PipelineError: they do not come.
        """
        got = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in specs]
        works = [self._begin(dist.irecv, x, what) for x in got]
        for work in works:
            self._finish(work, what)
        return got

    def flush(self) -> None:
        """Wait until everything posted has been sent.

        Raises:
            PipelineError: the other does not take it.
        """
        while self._under_way:
            work, _, what = self._under_way.pop(0)
            self._finish(work, what)

    def _begin(self, start: Any, tensor: Tensor, what: str) -> dist.Work:
        try:
            work: dist.Work = start(tensor, self._rank, group=self._group)
        except RuntimeError as error:
            raise self._lost(what, error) from error
        return work

    def _finish(self, work: dist.Work, what: str) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def _lost(self, what: str, error: RuntimeError) -> PipelineError:
        return PipelineError(
            f"rank {dist.get_rank()} lost rank {self._rank} at {what}, after "
            f"{self._timeout.total_seconds():.0f} s at most: {reason(error)}"
        )


def send(neighbour: Neighbour, tensors: Sequence[Tensor], what: str) -> Tensor | None:
    """Post tensors; returns a token for `join` where their gradients are to come back.

    They come back wherever gradients are on, also of tensors that want none: the other rank cannot
    see which do.
    """
    if not torch.is_grad_enabled() or not tensors:
        neighbour.post(tensors, what)
        return None
    anchor = torch.zeros((), requires_grad=True)
    token: Tensor = _Send.apply(neighbour, what, anchor, *tensors)
    return token


def receive(neighbour: Neighbour, specs: Sequence[TensorSpec], what: str) -> tuple[Tensor, ...]:
    """Wait for tensors; where gradients are on, theirs are sent back."""
    if not torch.is_grad_enabled() or not specs:
        return tuple(neighbour.fetch(specs, what))
    anchor = torch.zeros((), requires_grad=True)
    got: tuple[Tensor, ...] = _Receive.apply(neighbour, what, list(specs), anchor)
    return got


def join(value: Tensor, ties: Sequence[Tensor], reached: Sequence[Tensor] = ()) -> Tensor:
    """`value`, whose backward pass also runs those of `ties`, without a gradient for them.

    Args:
        value: what the backward pass begins at.
        ties: tokens of `send`, and what was received.
        reached: parameters that get a gradient in any case, of zeros if there is nothing else; all
            ranks then agree which have one, as data parallelism wants it.
    """
    if not torch.is_grad_enabled() or not (ties or reached):
        return value
    joined: Tensor = _Tie.apply(value, len(reached), *reached, *ties)
    return joined


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neighbour: Neighbour, what: str, anchor: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.neighbour, ctx.what = neighbour, what
        ctx.specs = [TensorSpec(tuple(x.shape), x.dtype, x.device) for x in tensors]
        neighbour.post(tensors, what)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.neighbour.fetch(ctx.specs, f"the gradient of {ctx.what}")


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neighbour: Neighbour, what: str, specs: list[TensorSpec], anchor: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.neighbour, ctx.what = neighbour, what
        return tuple(neighbour.fetch(specs, what))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.neighbour.post(grads, f"the gradient of {ctx.what}")
        return None, None, None, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, reached: int, *tensors: Tensor) -> Tensor:
        ctx.specs = [TensorSpec(tuple(x.shape), x.dtype, x.device) for x in tensors[:reached]]
        ctx.ties = len(tensors) - reached
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nothing = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in ctx.specs]
        return grad, None, *nothing, *[None] * ctx.ties
