"""Training: tokens per second and peak memory of one exact step, forward and backward.

Every token but the first is a label, the loss goes back through every chunk, and each chunk is
computed again in the backward pass from the memory at its border. No optimiser takes part. With
borders every k chunks, k is about the square root of their number: that keeps the fewest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cometlm.device import peak_memory
from gpu_parts.lab import Lab
from gpu_parts.report import Entry, Report, TimeBox
from gpu_parts.scale import Scale, label

_MARGIN = 1.15  # time that a step may take beyond what shorter ones say
_RESERVE = 8.0  # seconds for what follows the record


class Way(NamedTuple):
    """How a step is done.

    Attributes:
        sparse: keep the border of every k-th chunk instead of every chunk.
        offload: keep borders in the CPU's memory.
        everything: train the backbone too, not only the memory.
    """

    sparse: bool = False
    offload: bool = False
    everything: bool = False

    @property
    def name(self) -> str:
        """For people."""
        parts = ["every k" if self.sparse else "every 1"]
        parts += ["offload"] * self.offload + ["everything"] * self.everything
        return ", ".join(parts)

    def every(self, chunks: int) -> int:
        """Chunks from one border to the next."""
        return max(2, math.isqrt(chunks)) if self.sparse else 1


_DENSE, _SPARSE, _RECORD = Way(), Way(sparse=True), Way(sparse=True, offload=True)
_OFFLOADED, _EVERYTHING = Way(offload=True), Way(everything=True)


@dataclass
class Train:
    """Everything about training one shape."""

    lab: Lab
    report: Report
    scale: Scale = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.lab.scale

    def quick(self, box: TimeBox) -> None:
        """A short step, every way."""
        for tokens in self.scale.steps_quick:
            for way in (_DENSE, _RECORD, _SPARSE, _OFFLOADED, _EVERYTHING):
                self._step(tokens, way, box)

    def long(self, box: TimeBox) -> None:
        """Longer steps."""
        middle, longest = self.scale.steps_long
        for tokens in (middle, longest):
            self._step(tokens, _DENSE, box)
        for way in (_RECORD, _EVERYTHING, _SPARSE, _OFFLOADED):
            self._step(middle, way, box)
        for way in (_RECORD, _SPARSE, _OFFLOADED, _EVERYTHING):
            self._step(longest, way, box)

    def record(self, box: TimeBox) -> None:
        """The longest step that the time allows, up to the one that is promised."""
        if self._rate(_RECORD) is None:
            self._step(self.scale.steps_quick[0], _RECORD, box)
        rate, name = self._rate(_RECORD), f"train/{self.scale.trained}/record"
        if rate is None:
            self.report.skip(name, "no shorter step went well")
            return
        size, wanted = self.scale.comet.chunk_size, self.scale.record
        fits = int(rate * (box.left() - _RESERVE * self.scale.paper) / _MARGIN)
        tokens = wanted if fits >= wanted else fits // size * size
        if tokens < 2 * size:
            self.report.skip(name, f"{max(0.0, box.left()):.0f} s are left", tokens=wanted)
            return
        settings = {"tokens": tokens, "wanted": wanted, "expected_seconds": tokens / rate}
        self.report.measure(name, lambda: self._figures(tokens, _RECORD), box, **settings)

    # --- one step ---------------------------------------------------------------------------

    def _step(self, tokens: int, way: Way, box: TimeBox) -> None:
        rate = self._rate(way)
        needs = None if rate is None else _MARGIN * tokens / rate
        name = f"train/{self.scale.trained}/{label(tokens)}/{way.name}"
        settings = {"tokens": tokens, "way": way.name, **way._asdict()}
        self.report.measure(name, lambda: self._figures(tokens, way), box, needs, **settings)

    def _rate(self, way: Way) -> float | None:
        """Tokens per second of the longest step that was done this way, else of any way."""
        begin = f"train/{self.scale.trained}/"
        done = [x for k, x in self.report.entries.items() if k.startswith(begin) and "loss" in x]
        same = [x for x in done if x["settings"].get("way") == way.name]
        if not done:
            return None
        longest = max(same or done, key=lambda x: int(x["tokens"]))
        return float(longest["tokens_per_second"])

    def _figures(self, tokens: int, way: Way) -> Entry:
        chunks = -(-tokens // self.scale.comet.chunk_size)
        every = way.every(chunks)
        model: Any = self.lab.model(self.scale.trained)
        host = torch.device("cpu")
        try:
            prepare(model, way, every)
            warm = 3 * self.scale.comet.chunk_size
            self.lab.warm(way.name, lambda: step(self.lab, model, warm))
            self.lab.count_peak()
            found: dict[str, float] = {}
            seconds = self.lab.timed(lambda: found.update(step(self.lab, model, tokens)))
            return {
                "tokens": tokens,
                "chunks": chunks,
                "every": every,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "peak_bytes": self.lab.peak(),
                "host_peak_bytes": peak_memory(host),
                "weights_bytes": self.lab.weights_bytes(model),
                **found,
            }
        finally:
            restore(model)


def prepare(model: Any, way: Way, every: int) -> None:
    """Have a model trained in this way."""
    model.requires_grad_(way.everything)
    model.model.comet.requires_grad_(True)
    model.train()
    model.activation_checkpointing_enable({"every": every}, offload=way.offload)


def restore(model: Any) -> None:
    """Have a model read again, without gradients."""
    model.zero_grad(set_to_none=True)
    model.activation_checkpointing_disable()
    model.requires_grad_(False)
    model.eval()


def step(lab: Lab, model: Any, tokens: int) -> dict[str, float]:
    """One exact step: its loss, and the size of the memory's gradient, which shows that it is one.

    Texts of one length are the same, so that ways to train can be compared by both.

    Raises:
        FloatingPointError: either is not finite.
    """
    torch.manual_seed(tokens)
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=lab.device)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [p.grad for p in model.model.comet.parameters() if p.grad is not None]
    size = torch.stack([grad.float().norm() for grad in grads]).norm()
    found = {"loss": float(loss.detach()), "gradient_norm": float(size)}
    model.zero_grad(set_to_none=True)
    for name, value in found.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} after {tokens} tokens")
    return found
