"""The state of its own that a layer carries from token to token, as a value.

Convolutions, scans and linear attention hand it to their next call by transformers' cache. Here a
`StateCache` stands in for that cache in one call of one layer: the layer takes the state out of it
and leaves a new one, and what was given stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cometlm.compat import PLAIN_RESULTS, StatesByLayer

OwnState = Mapping[str, Tensor]

_CONVOLUTION, _RECURRENT = "convolution", "recurrent"  # each has a number behind it
_LINEAR = "linear"


def _nothing() -> None:
    """Nobody wants to know."""


class StateCache(StatesByLayer):
    """Stands in for transformers' cache in one call of one layer.

    Args:
        state: what the layer left before, by name, [B, …] each; nothing before the first token.
        asked: called whenever the layer asks for a state, or leaves one.
    """

    def __init__(self, state: OwnState, asked: Callable[[], None] = _nothing) -> None:
        self._lent: dict[str, Tensor] = {}
        self._state = dict(state)
        self._asked = asked

    def after(self) -> dict[str, Tensor]:
        """What the layer has left, by name."""
        left = self._state | {name: _content(lent) for name, lent in self._lent.items()}
        return dict(sorted(left.items()))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a convolution, which the layer may overwrite."""
        return self._get(_CONVOLUTION, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """What a scan goes on from, which the layer may overwrite."""
        return self._get(_RECURRENT, state_idx)

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Inputs [B, …, n] behind those that are held; the last ones are held from now on."""
        name, whole = f"{_CONVOLUTION}.{state_idx}", conv_states
        old = self._take(name)
        size = conv_kernel_size or (conv_states if old is None else old).shape[-1]
        if old is not None:
            whole = torch.cat([old, conv_states], dim=-1)
        elif whole.shape[-1] < size:
            whole = F.pad(whole, (size - whole.shape[-1], 0))
        # A copy: a part would keep the whole of a chunk's inputs.
        self._state[name] = whole[..., -size:].clone()
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """What a scan left."""
        self._put(_RECURRENT, state_idx, recurrent_states)
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """What linear attention goes on from, as MiniMax asks for it."""
        return self._get(_LINEAR, 0)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """What linear attention left."""
        self._put(_LINEAR, 0, linear_cache)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the layer has read before."""
        self._asked()
        return bool(self._state or self._lent)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Nothing is held that could be taken back."""
        return False

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New keys and values, to which the attention function adds those before."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys and values are held elsewhere."""
        return 0

    def _get(self, kind: str, number: int) -> Tensor | None:
        self._asked()
        name = f"{kind}.{number}"
        if name not in self._lent and name in self._state:
            self._lent[name] = self._state.pop(name).clone().as_subclass(_Overwritten)
        return self._lent.get(name)

    def _put(self, kind: str, number: int, state: Tensor) -> None:
        name = f"{kind}.{number}"
        self._take(name)
        self._state[name] = state

    def _take(self, name: str) -> Tensor | None:
        """What is held under a name, which is about to be replaced."""
        self._asked()
        lent = self._lent.pop(name, None)
        return self._state.get(name) if lent is None else _content(lent)


class _Overwritten(Tensor):
    """A state that a layer may write over in place while autograd still needs what it was."""

    left: Tensor
    __torch_function__ = PLAIN_RESULTS

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Leave another state in its place."""
        self.left = source.to(self.dtype)
        return self


def _content(lent: Tensor) -> Tensor:
    """What a state that was lent to a layer holds now."""
    return getattr(lent, "left", lent).as_subclass(Tensor)
