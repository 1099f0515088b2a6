"""What one cell costs: measured on the machine at hand, or counted for a speed that is stated.

Both are of a full chunk that reads a full memory, which is what all but the first chunks are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cometlm.config import CometConfig
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.cell import Cell
from cometlm.core.layout import ChunkLayout, Piece
from cometlm.core.memory import LayerMemoryWeights
from cometlm.core.state import LayerState, tensors_of
from cometlm.core.walk import Grid
from cometlm.planner.flops import LayerSizes, chunk_cost
from cometlm.planner.simulate import Costs

_ADAM = 2  # moments of every trained weight, in float32
_SEED = 0
T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """How much of a model is trained, which decides what its weights take.

    Attributes:
        dtype_bytes: of one weight as it computes.
        trained: share of the weights that have a gradient, a float32 copy and Adam's moments; a
            backbone that is frozen takes that much less time in the backward pass too.
        shards: devices that share the weights of one layer (FSDP); 1 is replicated.
    """

    dtype_bytes: float = 2
    trained: float = 1.0
    shards: int = 1

    def of(self, count: float) -> float:
        """Bytes that so many weights take on one device."""
        each = self.dtype_bytes + self.trained * (self.dtype_bytes + 4 + 4 * _ADAM)
        return count * each / self.shards


_KEPT = Weights()


def counted(config: Any, sizes: CometConfig, speed: float, weights: Weights = _KEPT) -> Costs:
    """Costs by counting multiplications, for devices that reach a stated speed.

    Args:
        config: of the backbone.
        sizes: of the memory.
        speed: floating-point operations a second that a device really reaches (a multiplication
            and an addition are two).
        weights: how they are kept.

    Raises:
        ValueError: a speed that is not more than 0.
    """
    if speed <= 0:
        raise ValueError(f"speed must be more than 0 operations a second, got {speed}")
    width, dtype = config.hidden_size, weights.dtype_bytes
    entry = LayerSizes.of(config).entry
    forward = 2 * chunk_cost(config, sizes).fast / speed
    head = 2 * sizes.chunk_size * width * config.vocab_size / speed
    return Costs(
        forward=forward,
        backward=(1 + weights.trained) * forward,  # of what comes in, and of the weights
        head=3 * head,
        # A memory is trained in float32, and so is its state.
        memory_bytes=sizes.global_slots * width * max(4, dtype)
        + sizes.temporary_slots * entry * dtype,
        hidden_bytes=sizes.chunk_items * width * dtype,
        kept_bytes=_kept_by_count(config, sizes) * dtype,
        weight_bytes=weights.of(_layer_weights(config)),
    )


def measured(
    model: CometForCausalLM,
    weights: Weights = _KEPT,
    repeats: int = 3,
    labelled: int | None = None,
) -> Costs:
    """Costs on this machine: each layer's cell is run forward and backward, and so is the head.

    Args:
        model: as it is trained: what wants gradients here gets them.
        weights: how they are kept; `dtype_bytes` is the model's own.
        repeats: passes over the layers, of which the median counts.
        labelled: tokens of each chunk that have a label; all if None.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    bench = _Bench(model, labelled)
    bench.run()  # kernels are built once
    runs = [bench.run() for _ in range(repeats)]
    forward, backward, head = (statistics.median(part) for part in zip(*runs, strict=True))
    config = model.config.backbone_config
    own = replace(weights, dtype_bytes=_bytes_of_weight(model))
    return Costs(
        forward=forward,
        backward=backward,
        head=head,
        memory_bytes=bench.memory_bytes,
        hidden_bytes=bench.hidden.nbytes,
        kept_bytes=bench.kept_bytes(),
        weight_bytes=own.of(_layer_weights(config)),
    )


class _Bench:
    """One full chunk before a full memory, in front of every layer."""

    def __init__(self, model: CometForCausalLM, labelled: int | None) -> None:
        self.model = model
        sizes = model.config.comet_config
        rng = torch.Generator().manual_seed(_SEED)
        chunks = 1 + -(-sizes.temporary_slots // max(1, sizes.compression_tokens(sizes.chunk_size)))
        ids = torch.randint(
            model.config.vocab_size, (1, chunks * sizes.chunk_size), generator=rng
        ).to(model.device)
        with torch.no_grad():
            out = model.model(ids, use_cache=True, close_last=True, hidden_to_keep=1)
        cache = out.past_key_values
        step = (Piece(0, sizes.chunk_size, close=True),)
        max_positions = cache.max_positions_under(sizes)
        self.layout = ChunkLayout(sizes, cache.rows, step, max_positions, model.device)
        self.grid: Grid = model.model.grid(max_positions)
        self.cells = cast("Sequence[Cell]", self.grid.cells)
        self.states: Sequence[LayerState] = cache.layers
        width = (1, self.layout.items[0], model.config.hidden_size)
        self.hidden = torch.randn(width, generator=rng).to(model.device, model.dtype)
        self.first = model.model.layers_with_memory[0]
        self.memory_bytes = sum(x.nbytes for x in tensors_of((self.states[self.first],)))
        self.text = ids[:, : sizes.chunk_size]
        self.labelled = sizes.chunk_size if labelled is None else labelled

    def run(self) -> tuple[float, float, float]:
        """Seconds of a cell's forward pass, of its backward pass, and of the head."""
        forward = backward = 0.0
        count = len(self.cells)
        for i in range(count):
            outs, seconds = self._timed(partial(self._cell, i))
            forward += seconds
            backward += self._timed(partial(self._back, outs))[1]
        return forward / count, backward / count, self._timed(self._head)[1]

    def kept_bytes(self) -> float:
        """What autograd keeps of the first cell with a memory, weights left out."""
        kept: dict[int, int] = {}
        own = {p.data_ptr() for p in self.model.parameters()}

        def note(x: Tensor) -> Tensor:
            if x.data_ptr() not in own:
                kept[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = self._cell(self.first)
        del out
        return float(sum(kept.values()))

    def _cell(self, i: int) -> list[Tensor]:
        """Outputs of layer i, of inputs that want a gradient as they do between layers."""
        hidden = self.hidden.detach().requires_grad_()
        weights: LayerMemoryWeights = self.grid.weights[i]
        out, after = self.cells[i](
            hidden, self.states[i], self.layout, self.grid.rotary[i], weights
        )
        return [out, *tensors_of((after,))]

    def _back(self, outs: list[Tensor]) -> None:
        reached = [x for x in outs if x.requires_grad]
        torch.autograd.backward(reached, [torch.ones_like(x) for x in reached])
        self.model.zero_grad()

    def _head(self) -> None:
        model, count = self.model, self.labelled
        norm: nn.Module = model.model.norm
        hidden = norm(model.model.embedded_text(self.text).detach().requires_grad_())
        logits = model.logits(hidden[:, :count]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), self.text[:, :count].flatten())
        loss.backward()
        model.zero_grad()

    def _timed(self, call: Callable[[], T]) -> tuple[T, float]:
        _wait(self.model.device)
        start = time.perf_counter()
        result = call()
        _wait(self.model.device)
        return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until a device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _layer_weights(config: Any) -> int:
    """Weights of one layer (dense MLP of three matrices, or all of its experts)."""
    layer = LayerSizes.of(config)
    attention = layer.width * (2 * layer.query + layer.key_value)
    return attention + 3 * layer.width * layer.inner_weights


def _bytes_of_weight(model: CometForCausalLM) -> float:
    """Bytes of a layer's weight, on average where the backbone is quantised."""
    if not getattr(model._backbone, "is_quantized", False):
        return model.dtype.itemsize
    layer = model.model.cells[model.model.layers_with_memory[0]].layer
    held = sum(weight.nbytes for weight in layer.parameters())
    return held / _layer_weights(model.config.backbone_config)


def _kept_by_count(config: Any, sizes: CometConfig) -> int:
    """Numbers that autograd keeps of a cell: inputs of its products, norms and activations."""
    layer = LayerSizes.of(config)
    # Two norms and their inputs, queries before and after rotation, attention's output, and of the
    # MLP gate, up, activation and product.
    per_item = 4 * layer.width + 3 * layer.query + layer.key_value + 4 * layer.inner
    return sizes.chunk_items * per_item + sizes.memory_rows * 2 * layer.key_value
