"""Which device and dtype to use where the user names none, and what memory was used there."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cometlm.compat import cpu_abilities

_CLEAR_REFS = Path("/proc/self/clear_refs")


def default_device() -> torch.device:
    """The machine's accelerator, or the CPU; of several accelerators a rank's own (`torchrun`)."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return found
    return torch.device(found.type, int(rank) % torch.accelerator.device_count())


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for the work that is under way there."""
    # MPS copies later from where the tensor was, which may be freed by then.
    return x.to(device, non_blocking=device.type != "mps")


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, which this machine has; None and "auto" are the default one.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    if name is None or str(name) == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:  # whose message lists thirty kinds
        raise ValueError(_not_here(name)) from error
    try:
        torch.empty(1, device=device)  # the one question that every kind of device answers
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{_not_here(name)} ({why})") from error
    if device.type == "meta":
        raise ValueError(f"{_not_here(name)} (which holds no data)")
    return device


def _not_here(name: str | torch.device) -> str:
    return (
        f"device must be one that torch {torch.__version__} finds here, "
        f"{' or '.join(_devices())}, got {str(name)!r}"
    )


def _devices() -> list[str]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ["cpu"]
    return ["cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]


def as_dtype(name: str | None) -> torch.dtype | None:
    """A dtype by its torch name.

    Raises:
        ValueError: a name that is not a floating-point dtype.
    """
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype like bfloat16, got {name!r}")
    return dtype


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but float32 on a CPU without bfloat16 products.

    Such a CPU still runs bfloat16, by emulation that is hundreds of times slower than float32.
    """
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return any(has is True for name, has in cpu_abilities().items() if "bf16" in name)


def available_memory() -> int | None:
    """Bytes of the machine that programs may still take without swapping; None if it is not told.

    A container's own limit is not looked at.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def peak_memory(device: torch.device) -> int | None:
    """Bytes in use at the highest point so far: of the process on a CPU, else of the device.

    Returns:
        None where Python cannot say: on a CPU under Windows.
    """
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here on, where the platform can (not on macOS or Windows)."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # Linux: the resident high-water mark falls to what is resident


def return_freed_memory(device: torch.device) -> None:
    """Give what was freed back to the system, where the C library can (glibc).

    A chunk's activations come and go between small allocations that stay (a tokenizer's cache,
    memories), so the heap gets holes that no activation fits into any more, and a process that
    reads for hours creeps. It takes about a millisecond.
    """
    if device.type == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def readable_bytes(count: float | None) -> str:
    """`count` bytes with a unit: 1536 is 1.5 KiB; None is unknown."""
    if count is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
