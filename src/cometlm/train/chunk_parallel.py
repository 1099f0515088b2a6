"""Ranks that share samples, within a Trainer's run: batches go in and gradients come out.

`torchrun` starts data × P ranks; those of one group of P get the same batch and read it as a wave
(`parallel.pipeline`), groups get different ones. To the Trainer they are all data parallel, so
gradients are means over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import cycle, islice
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Sampler

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.parallel.agreement import check_alike
from cometlm.parallel.mesh import CHUNK, DATA, make_mesh
from cometlm.parallel.pipeline import Pipeline, sum_gradients


def share_samples(
    model: CometForCausalLM, ranks: int, alike: Mapping[str, Any], timeout: timedelta
) -> DeviceMesh:
    """Let every group of so many ranks read its samples together, from now on.

    Args:
        ranks: P.
        alike: what all ranks of the job must have the same, by name.
        timeout: how long one waits for another.

    Returns:
        The mesh of all ranks, data × P.

    Raises:
        ValueError: no job of several ranks, a number of ranks that P does not divide, ranks that
            are not alike.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            f"chunk_parallel={ranks} and shard_weights need a job of several ranks, not of one; "
            f"run: torchrun --nproc-per-node {max(2, ranks)} --no-python cometlm train …"
        )
    check_alike(alike)
    mesh = make_mesh(ranks, model.device)
    pipeline = Pipeline(mesh[CHUNK].get_group(), timeout)
    model.training_plan = replace(model.training_plan, pipeline=pipeline)
    return mesh


def shard_over(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh again, if weights can be sharded over its ranks.

    Raises:
        ValueError: all ranks share their samples.
    """
    if mesh[DATA].size() == 1:
        ranks = mesh[CHUNK].size()
        raise ValueError(
            f"shard_weights shards over the ranks beside chunk_parallel={ranks}, and {ranks} are "
            "all that there are"
        )
    return mesh


def average_gradients(model: CometForCausalLM, mesh: DeviceMesh) -> None:
    """Turn gradients of sharded weights, means over data, into means over all ranks."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sum_gradients(trained, mesh[CHUNK].get_group())
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad.div_(mesh[CHUNK].size())


@contextmanager
def alone(model: CometForCausalLM) -> Iterator[None]:
    """Every rank reads by itself while the context is open."""
    plan = model.training_plan
    model.training_plan = replace(plan, pipeline=None)
    try:
        yield
    finally:
        model.training_plan = plan


class SharedBatches(Sampler[int]):
    """Indices of another sampler, each batch of them P times, one time for each rank of a group.

    Data parallelism deals batches to ranks in turn, so the ranks of a group get the same one. A
    last batch that is not full is filled up from the beginning.

    Args:
        sampler: indices, the same on every rank.
        batch_size: of one rank.
        times: P.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, times: int) -> None:
        self._sampler: Any = sampler
        self._batch_size = batch_size
        self._times = times

    def __iter__(self) -> Iterator[int]:
        indices = iter(self._sampler)
        first: list[int] = []
        while batch := list(islice(indices, self._batch_size)):
            first = first or batch
            batch += islice(cycle(first), self._batch_size - len(batch))
            for _ in range(self._times):
                yield from batch

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._batch_size) * self._batch_size * self._times

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the data begins; shuffles differ between them."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
