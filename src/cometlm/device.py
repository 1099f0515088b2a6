"""Which device and dtype to use where the user names none, and what memory was used there."""

from __future__ import annotations

import resource
import sys

import torch


def default_device() -> torch.device:
    """The machine's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but float32 on a CPU without bfloat16 products.

    Such a CPU still runs bfloat16, by emulation that is hundreds of times slower than float32.
    """
    if device.type != "cpu":
        return torch.bfloat16
    abilities = torch.cpu.get_capabilities()
    native = any(has is True for name, has in abilities.items() if "bf16" in name)
    return torch.bfloat16 if native else torch.float32


def peak_memory(device: torch.device) -> int:
    """Bytes in use at the highest point so far: of the process on a CPU, else of the device."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def readable_bytes(count: float) -> str:
    """`count` bytes with a unit: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
