"""Work of a device that is recorded once and replayed, so that Python launches nothing any more.

What is recorded must be the same work on the same memory each time: no look at a tensor's values,
nothing sent from the CPU, and what it reads is written in place.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from cometlm.compat import new_graph

T = TypeVar("T")

# Recording is a state of the process: one at a time, on one stream for each device, since each
# stream that products run on gets a workspace for good.
_RECORDING = threading.Lock()


class Recorder:
    """Records pieces of work that share their memory: a replay overwrites what others left.

    Args:
        warm_ups: runs before recording: kernels are chosen and workspaces made in the first ones.
    """

    def __init__(self, warm_ups: int = 2) -> None:
        self._warm_ups = warm_ups
        self._pool: Any = None

    def recorded(
        self, work: Callable[[], T], device: torch.device, reset: Callable[[], None] | None = None
    ) -> Callable[[], T] | None:
        """Work that a device replays; None on a device that records nothing.

        Args:
            work: gives tensors, which every replay overwrites.
            reset: called after each run that only warms up.

        Raises:
            RuntimeError: work that cannot be recorded.
            torch.OutOfMemoryError: it does not fit.
        """
        graph = new_graph(device, self._pool)
        if graph is None:
            return None
        with _RECORDING, on_a_stream_of_its_own(device):
            for _ in range(self._warm_ups):
                work()
                if reset is not None:
                    reset()
            torch.accelerator.synchronize(device)
            gc.collect()  # what a collection frees in the middle of a recording would break it off
            torch.accelerator.memory.empty_cache()  # recordings have memory of their own
            graph.begin()
            try:
                left = work()
            finally:
                graph.end()
        self._pool = graph.pool()

        def replay() -> T:
            graph.replay()
            return left

        return replay


@functools.cache
def _stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device=device)


@contextlib.contextmanager
def on_a_stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Let work run on another stream, after what the current one has begun, before what follows."""
    index = torch.accelerator.current_device_index()
    here, own = torch.accelerator.current_stream(device), _stream(device)
    own.wait_stream(here)
    torch.accelerator.set_stream(own)  # which makes its device the current one
    try:
        yield
    finally:
        torch.accelerator.set_stream(here)
        torch.accelerator.set_device_index(index)
        here.wait_stream(own)
