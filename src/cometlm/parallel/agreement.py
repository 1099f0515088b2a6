"""What all ranks of a job must have alike, found out before any of them computes."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

LIBRARIES = ("cometlm", "torch", "transformers")


def check_alike(own: Mapping[str, Any]) -> None:
    """Compare settings and library versions between all ranks; a collective call.

    Args:
        own: what must be the same everywhere, by name; values that pickle and compare.

    Raises:
        ValueError: on every rank alike; names what differs, the ranks, and both values.
    """
    mine = {**own, "python": platform.python_version()}
    mine |= {f"the version of {name}": version(name) for name in LIBRARIES}
    theirs: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    differing = [
        f"{name}: rank 0 has {theirs[0].get(name)!r}, rank {rank} has {other.get(name)!r}"
        for rank, other in enumerate(theirs)
        for name in {**theirs[0], **other}
        if theirs[0].get(name) != other.get(name)
    ]
    if differing:
        raise ValueError(f"the ranks of this job are not alike ({'; '.join(differing)})")
