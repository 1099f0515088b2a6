"""Linear layers whose weights are kept twice: as they are, and in the order that a CPU reads.

A decode step multiplies one row with every weight. torch's product for bfloat16 on CPUs puts each
weight into oneDNN's blocked order anew in every call, which for one row takes several times as long
as the product; packed once, the same kernel gives the same numbers. For the rows of a chunk the
order costs little beside the product, so reading gains next to nothing.

Only the plain weight is ever true. A layer goes back to it by itself where its packed copy is not
known to be the same: while gradients are recorded or a graph is compiled, under autocast, on
another device or dtype, after a step, `load_state_dict`, or another weight put in its place.

Pitfalls:
    - What writes into `weight.data` (merging an adapter in place does) leaves no trace in torch's
      version counter. `PackedProducts.check` compares some numbers of each weight instead; the
      model does so whenever it reads more than one token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from cometlm.compat import packed_linear
from cometlm.device import multiplies_bfloat16

_LINEAR = packed_linear()
_COMPARED = 64  # numbers of each weight


class Packed:
    """One weight in the kernels' order, and what the weight was when it was packed."""

    def __init__(self, weight: Tensor) -> None:
        assert _LINEAR is not None
        self.weight = _LINEAR.pack(weight.detach())
        self._state = _state_of(weight)
        self._some = _some_of(weight).clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of a layer is plain."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None, as a copy."""
        return type(None), ()

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is the weight that was packed, and unchanged as far as torch knows."""
        return self._state == _state_of(weight)

    def resembles(self, weight: Tensor) -> bool:
        """Whether some numbers of it are still the same."""
        return self.is_of(weight) and torch.equal(self._some, _some_of(weight))


class PackedLinear(nn.Linear):
    """An `nn.Linear` that has a packed copy of its weight beside it, or None again."""

    packed: Packed | None

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        packed = self.packed
        if (
            packed is None
            or torch.is_grad_enabled()
            or input.dtype != torch.bfloat16
            or is_compiling()
            or torch.is_autocast_enabled("cpu")
            or not packed.is_of(self.weight)
        ):
            return super().forward(input)
        assert _LINEAR is not None
        return _LINEAR.product(input, packed.weight, self.bias)


class PackedProducts:
    """The packed layers of a model."""

    def __init__(self, layers: Iterable[PackedLinear]) -> None:
        self._layers = tuple(layers)

    @classmethod
    def of(cls, model: nn.Module, most_bytes: int | None = None) -> Self:
        """Pack every plain bfloat16 linear layer of a model that lies on a CPU with such products.

        Layers of other classes (quantised, adapted ones themselves), those whose `forward` was
        replaced (offloaded), and inference tensors stay as they are.

        Args:
            most_bytes: pack nothing where the copies would take more.
        """
        if _LINEAR is None or not multiplies_bfloat16():
            return cls([])
        found = [module for module in model.modules() if _can_be_packed(module)]
        needed = sum(layer.weight.nbytes for layer in found)
        if most_bytes is not None and needed > most_bytes:
            return cls([])
        return cls([_packed(module) for module in found])

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(x.weight.nbytes for x in self._layers if x.packed is not None)

    def check(self) -> None:
        """Forget the copies of weights that have changed."""
        for layer in self._layers:
            if layer.packed is not None and not layer.packed.resembles(layer.weight):
                layer.packed = None

    def undo(self) -> None:
        """Make the layers what they were."""
        for layer in self._layers:
            if type(layer) is PackedLinear:  # else somebody took it over
                del layer.packed
                layer.__class__ = nn.Linear  # type: ignore[assignment]


def _packed(layer: nn.Linear) -> PackedLinear:
    packed = Packed(layer.weight)
    layer.__class__ = PackedLinear
    assert isinstance(layer, PackedLinear)
    layer.packed = packed
    return layer


def _can_be_packed(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return here and type(weight.data) is Tensor and not weight.is_inference()


def _state_of(weight: Tensor) -> tuple[int, int, int]:
    return id(weight), weight.data_ptr(), weight._version


def _some_of(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // _COMPARED)]
