"""Weights sharded over the mesh's data dimension (FSDP2), beside a sample shared over the other.

A layer's whole block of chunks is one call (`Cell.along`), so its weights are gathered once forward
and once backward, however many chunks there are. Gradients come out averaged over the data
dimension; `sum_gradients` adds them over the chunk dimension, shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.export import register_dataclass
from torch.optim import Optimizer

from cometlm.causal_lm import CometForCausalLM
from cometlm.grid import LayerState, OpenChunk
from cometlm.memory import LayerMemory
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


def gathered(model: CometForCausalLM, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Whole weights of a sharded model on the CPU, for a checkpoint; every rank has to call it.

    Args:
        wanted: whether a weight of this name is.

    Returns:
        As `state_dict()`; weights that are tied are one tensor.
    """
    whole: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if wanted(name):
            if id(value) not in whole:
                whole[id(value)] = _whole(value.detach()).cpu()
            weights[name] = whole[id(value)]
    return weights


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` of whole tensors, for a checkpoint; every rank has to call it."""
    kept: dict[str, Any] = optimizer.state_dict()
    state = {
        number: {name: _whole(value) for name, value in own.items()}
        for number, own in kept["state"].items()
    }
    return {**kept, "state": state}


def shard_state(optimizer: Optimizer) -> None:
    """Shard what an optimiser was given of whole tensors, as its parameters are."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    mesh, placements = parameter.device_mesh, parameter.placements
                    state[name] = distribute_tensor(value, mesh, placements)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
