"""The device, the models on it, and how time and memory are taken there."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cometlm
from cometlm.compat import cpu_abilities
from cometlm.device import peak_memory, reset_peak_memory
from gpu_parts.scale import Scale


class Lab:
    """One model at a time on one device, with or without its memory attached.

    Args:
        device: where everything lives; nothing is made on the CPU first.

    Attributes:
        states: caches after some text, by name; they go with the model.
    """

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device = device
        self.scale = scale
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.states: dict[str, cometlm.CometCache] = {}
        self._shape: str | None = None
        self._backbone: PreTrainedModel | None = None
        self._model: cometlm.CometForCausalLM | None = None
        self._warm: set[str] = set()

    # --- models -----------------------------------------------------------------------------

    def model(self, shape: str) -> cometlm.CometForCausalLM:
        """The shape with a memory attached; another shape is dropped for it."""
        backbone = self._loaded(shape)
        if self._model is None:
            self._model = cometlm.attach(backbone, self.scale.comet)
        return self._model

    def backbone(self, shape: str) -> PreTrainedModel:
        """The shape by itself, as transformers runs it."""
        backbone = self._loaded(shape)
        self.detach()
        return backbone

    def detach(self) -> None:
        """Take the memory off; the next `model` gets the same memory anew."""
        if self._model is not None:
            cometlm.detach(self._model)
            self._model = None

    def drop(self) -> None:
        """Forget the model and every state of it."""
        self._shape = self._backbone = self._model = None
        self.states.clear()
        self._warm.clear()
        self.free()

    def _loaded(self, shape: str) -> PreTrainedModel:
        if self._backbone is None or self._shape != shape:
            self.drop()
            torch.manual_seed(0)
            with self.device:  # parameters are made and drawn there
                made = AutoModelForCausalLM.from_config(self.scale.config(shape), dtype=self.dtype)
            self._backbone = made.requires_grad_(False).eval()
            self._shape = shape
        return self._backbone

    def weights_bytes(self, model: torch.nn.Module) -> int:
        """Bytes of all weights."""
        return sum(p.nbytes for p in model.parameters())

    def ids(self, batch: int, tokens: int, shape: str) -> Tensor:
        """Random token ids [batch, tokens]."""
        return torch.randint(
            self.scale.config(shape).vocab_size, (batch, tokens), device=self.device
        )

    # --- time and memory --------------------------------------------------------------------

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds until the device has done what a call asks of it."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def warm(self, name: str, call: Callable[[], object]) -> None:
        """Run something once for each model: kernels are chosen and built in the first call."""
        if name not in self._warm:
            call()
            self.wait()
            self._warm.add(name)

    def count_peak(self) -> None:
        """Let `peak` count from here on."""
        self.free()
        reset_peak_memory(self.device)

    def peak(self) -> int:
        """The most bytes in use since: on the device, or of the process where that is the CPU."""
        return peak_memory(self.device)

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.device.type != "cpu":
            # After some errors the device refuses even that; `alive` finds out.
            with contextlib.suppress(RuntimeError):
                torch.accelerator.empty_cache()

    def alive(self) -> bool:
        """Whether the device still works."""
        try:
            return bool(torch.ones(2, device=self.device).sum().item() == 2)
        except RuntimeError:
            return False

    # --- the device itself ------------------------------------------------------------------

    def machine(self) -> dict[str, Any]:
        """What figures depend on."""
        found: dict[str, Any] = {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cometlm": cometlm.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        if self.device.type == "cpu":
            return found | {"name": cpu_abilities().get("cpu_name", platform.processor())}
        module = torch.get_device_module(self.device)
        with contextlib.suppress(AttributeError, RuntimeError):
            properties = module.get_device_properties(self.device)
            found |= {"name": properties.name, "memory_bytes": properties.total_memory}
        return found | {"driver": _driver()}

    def matrix_peak(self) -> dict[str, Any]:
        """Operations per second of a large square product in the models' dtype."""
        size, products, rounds = self.scale.product, 20, 5
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply() -> None:
            for _ in range(products):
                torch.mm(a, b, out=out)

        multiply()
        rates = [2 * size**3 * products / self.timed(multiply) for _ in range(rounds)]
        best = max(rates)
        return {"flops": best, "tflops": best / 1e12, "median_flops": statistics.median(rates)}

    def bandwidth(self) -> dict[str, Any]:
        """Bytes per second that a copy reads and writes."""
        source = torch.ones(self.scale.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        fastest = min(self.timed(lambda: target.copy_(source)) for _ in range(5))
        return {"bytes_per_second": 2 * self.scale.copied / fastest}


def _driver() -> str | None:
    """The driver's version, where the vendor's tool is at hand."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [
        tool,
        "--query-gpu=driver_version,power.limit,clocks.max.sm",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Break off Python code that takes longer, such as a compiler.

    Raises:
        TimeoutError: in the middle of the code. Only where signals are there and in the main
            thread; elsewhere nothing is broken off.
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"broken off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
