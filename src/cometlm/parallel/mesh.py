"""Which ranks share one sample, and which have samples of their own.

A job of `data × chunk` ranks: those of one row of the mesh share a sample, chunk by chunk; those
of one column hold the same place in different samples, and may shard the weights between them.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cometlm.device import default_device

DATA, CHUNK = "data", "chunk"


def join_job(device: torch.device) -> tuple[int, int]:
    """Join the job that `torchrun` started this process for, if it did.

    Args:
        device: what this rank computes on.

    Returns:
        This rank, and how many there are.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    _join(device)
    return dist.get_rank(), dist.get_world_size()


def leave_job() -> None:
    """Leave the job of several ranks that this process is in, if it is in one.

    A thread of gloo's that frees what a collective worked on needs the interpreter: where that goes
    down first the process aborts, and `torchrun` then ends the other ranks, be it in a save.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(chunk_parallel: int, device: torch.device | None = None) -> DeviceMesh:
    """A mesh (data, chunk) over all ranks of a job that `torchrun` started.

    Args:
        chunk_parallel: ranks that share a sample.
        device: what the ranks compute on; default the accelerator, or the CPU.

    Raises:
        ValueError: a number of ranks that it does not divide.
    """
    device = default_device() if device is None else device
    _join(device)
    ranks = dist.get_world_size()
    if chunk_parallel < 1 or ranks % chunk_parallel:
        raise ValueError(
            f"chunk_parallel must divide the number of ranks, {ranks}, got {chunk_parallel}"
        )
    shape = (ranks // chunk_parallel, chunk_parallel)
    return init_device_mesh(device.type, shape, mesh_dim_names=(DATA, CHUNK))


def _join(device: torch.device) -> None:
    if not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device))
