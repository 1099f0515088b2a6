"""Weights sharded over the mesh's data dimension (FSDP2), beside a sample shared over the other.

A layer's whole block of chunks is one call (`Cell.along`), so its weights are gathered once forward
and once backward, however many chunks there are. Gradients come out averaged over the data
dimension; `sum_gradients` adds them over the chunk dimension, shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.export import register_dataclass
from torch.optim import Optimizer

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.memory import LayerMemory
from cometlm.core.state import LayerState, OpenChunk
from cometlm.parallel.mesh import DATA

# FSDP gathers and frees weights by hooks on the tensors that enter and leave a call, so it has to
# find those inside a state.
for _kind in (LayerMemory, OpenChunk, LayerState):
    register_dataclass(_kind)


def shard(model: CometForCausalLM, mesh: DeviceMesh) -> None:
    """Shard a model's weights: each layer's on their own, all others together.

    Make the optimiser afterwards: parameters become `DTensor`s.

    Args:
        model: on the mesh's device, on every rank the same.
        mesh: from `make_mesh`.

    Raises:
        ValueError: it is sharded already.
    """
    if isinstance(model, FSDPModule):
        raise ValueError("the model's weights are sharded already")
    for cell in model.model.cells:
        fully_shard(cell, mesh=mesh[DATA])
        register_fsdp_forward_method(cell, "along")
    fully_shard(model, mesh=mesh[DATA])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradients of sharded weights by the norm of all of them, and return that.

    torch's own clipping does this since 2.11. Before (2.9), the norm is left in parts, one on each
    rank, and what it is divided by is not quite the whole.
    """
    found = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    nn.utils.clip_grads_with_norm_(found, max_norm, norm)
    return norm


def gathered(
    model: CometForCausalLM, wanted: Callable[[str], bool], *, keep: bool = True
) -> dict[str, Tensor]:
    """Whole weights of a sharded model on the CPU, for a checkpoint; every rank has to call it.

    Args:
        wanted: whether a weight of this name is.
        keep: False on a rank that only takes part.

    Returns:
        As `state_dict()`; weights that are tied are one tensor.
    """
    whole: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if wanted(name):
            if id(value) not in whole:
                whole[id(value)] = _whole(value.detach(), keep)
            weights[name] = whole[id(value)]
    return weights


def gathered_state(optimizer: Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """`optimizer.state_dict()` of whole tensors on the CPU; every rank has to call it.

    Args:
        keep: False on a rank that only takes part.
    """
    kept: dict[str, Any] = optimizer.state_dict()
    state = {
        number: {name: _whole(value, keep) for name, value in own.items()}
        for number, own in kept["state"].items()
    }
    return {**kept, "state": state}


def shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What `gathered_state` gave, sharded as the optimiser's parameters are, one after the other.

    Args:
        state: its tensors on the CPU; for `optimizer.load_state_dict`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    sharded = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        own = sharded.get(number, {})
        sharded[number] = {name: _like(value, parameter) for name, value in own.items()}
    return {**state, "state": {number: own for number, own in sharded.items() if own}}


def _whole(value: Any, keep: bool) -> Any:
    """The whole tensor on the CPU, or where it is not kept an empty one."""
    if not isinstance(value, Tensor):
        return value
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.cpu() if keep else full.new_empty(0, device="cpu")


def _like(value: Any, parameter: Tensor) -> Any:
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor)):
        return value
    if value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements)
