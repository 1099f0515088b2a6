"""Weights sharded over the mesh's data dimension (FSDP2), beside a sample shared over the other.

A layer's whole block of chunks is one call (`Cell.along`), so its weights are gathered once forward
and once backward, however many chunks there are. Gradients come out averaged over the data
dimension; `sum_gradients` adds them over the chunk dimension, shard by shard.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.export import register_dataclass

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
