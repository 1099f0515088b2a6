"""Finding out whether a layer carries a state of its own, and whether it goes on from it exactly.

Some layers use such a state for a single token only, and begin anew in a call of several; those
are called token by token. What is exact in neither way is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cometlm.backbones.calling import LayerCall, RotaryTable
from cometlm.backbones.recurrence import OwnState, StateCache
from cometlm.backbones.watching import UnsupportedBackboneError
from cometlm.compat import CACHE

CACHES = ("cache", "past_key_values", "past_key_value", "cache_params", "layer_past", CACHE)
# What layers raise at a cache that they do not know.
_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
TIMES = 3  # a layer is tried on so many times the items that it was seen to be given


def with_state(call: LayerCall, layer: nn.Module, hidden: Tensor, table: RotaryTable) -> LayerCall:
    """A layer's call, with what is to be known of a state of its own.

    Args:
        call: `attention` is None where the layer does not attend.
        hidden: [1, n, D] that the layer was seen to be given.
        table: its rotary table of `TIMES` · n positions, [1, TIMES · n, …] each.

    Raises:
        UnsupportedBackboneError: the layer does not attend, and mixes its items in a way that is
            no such state, or that it does not go on from exactly.
    """
    hidden = torch.cat([hidden, hidden.flip(1), hidden.roll(1, dims=1)], dim=1)
    found = _keeper(call, layer, hidden, table)
    if found is not None:
        argument, name = found
        call = replace(call, cache=argument, recurrent=name, aside=True)
    if call.attention is not None:  # is tried as a whole, see `core.backbone_check`
        return call
    call, count = replace(call, aside=True), hidden.shape[1]
    ways = [(call, [count // 2 - 1, 1, count - count // 2])]
    if call.cache is not None:
        ways.append((replace(call, stepwise=True), [count]))
    why = ""
    for one, sizes in ways:
        try:
            whole = call(layer, hidden, table, None)
            if alike(_in_pieces(one, layer, hidden, table, sizes), whole):
                return one
        except _ERRORS as error:
            why = f" ({' '.join(str(error).split())[:160]})"
    if call.cache is None:
        raise UnsupportedBackboneError(
            "never calls transformers' attention interface, so it has no one set of keys and values"
        )
    raise UnsupportedBackboneError(f"does not go on from its own state as in one call{why}")


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether tensors differ by no more than other kernels, through all layers, may make."""
    theirs = theirs.to(ours.device)
    most = max(1e-5, 0.5 * math.sqrt(torch.finfo(theirs.dtype).eps))
    ours, theirs = ours.double(), theirs.double()
    return bool((ours - theirs).norm() <= most * theirs.norm())


def _keeper(
    call: LayerCall, layer: nn.Module, hidden: Tensor, table: RotaryTable
) -> tuple[str, str] | None:
    """The argument that a layer takes a cache by, and the module that keeps a state in it."""
    for argument in (name for name in call.options if name in CACHES):
        asking = replace(call, cache=argument, aside=True)
        try:
            keepers = _askers(asking, layer, hidden, table)
        except _ERRORS:  # it knows another cache, of which nothing is known here
            continue
        if keepers:
            return argument, keepers[-1]
    return None


def _askers(call: LayerCall, layer: nn.Module, hidden: Tensor, table: RotaryTable) -> Sequence[str]:
    """Names of the modules in a layer that ask a cache for a state, in order."""
    keepers: list[str] = []
    with _entered(layer) as inside:
        call(layer, hidden, table, None, StateCache({}, asked=lambda: keepers.append(inside[-1])))
    return keepers


@contextmanager
def _entered(layer: nn.Module) -> Iterator[Sequence[str]]:
    """Names of the modules in a layer that are being run, the innermost last."""
    inside: list[str] = []

    def leave(*_: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            after = module.register_forward_hook(leave, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield inside


def _in_pieces(
    call: LayerCall, layer: nn.Module, hidden: Tensor, table: RotaryTable, sizes: Sequence[int]
) -> Tensor:
    """The layer's outputs of items given to it in pieces of these sizes."""
    state: OwnState = {}
    parts, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        place = tuple(part[:, piece] for part in table)
        out, state = call.with_state(layer, hidden[:, piece], place, None, state)
        parts.append(out)
        start += size
    return torch.cat(parts, dim=1)
