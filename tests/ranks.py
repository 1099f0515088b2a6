"""Several gloo ranks on this machine, for tests of what they do together."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Where processes can be forked, ranks come from one that has imported this and run nothing. A rank
# that imports it itself takes seconds, and does so where a platform has no such server.
_START = "spawn" if sys.platform == "win32" else "forkserver"
_PRELOAD = [
    "cometlm",
    "cometlm.train.run",
    "cometlm.parallel.shard",
    "pytest",
    "hypothesis",
    "peft",
]


def run_ranks(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` on each of `count` ranks; what they return, in order.

    Each has the environment that `torchrun` gives, so that a Trainer takes it for a rank.

    Raises:
        AssertionError: one of them failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(_PRELOAD)
        ranks = (count, folder, work, args)
        mp.start_processes(_rank, ranks, nprocs=count, start_method=_START)
        results = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(count)]
    failures = [f"rank {rank}:\n{what}" for rank, (failed, what) in enumerate(results) if failed]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def _rank(
    rank: int, count: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    try:
        result = (False, work(*args))
    except Exception:  # noqa: BLE001 (whatever it is, the test that waits shows it)
        result = (True, traceback.format_exc())
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
