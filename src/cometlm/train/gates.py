"""Gates that learn by descent: their steps are taken where what they look at is white.

A gate's logit is w·x, with x = [candidate ; state] and no bias (SPEC §3). The mean μ of x is far
longer than what varies from chunk to chunk, so that every step along a gradient moves all logits
at once, and descent is blind to the difference between chunks. With the covariance Σ of x, the
same logits are those of white features and a bias,

    w·x = v·Σ^(-1/2) (x − (u·x) μ) + b (u·x),      u = Σ^(-1) μ / (μ·Σ^(-1) μ),

where u·x is 1 on average and varies as little as any linear function with that mean can: u stands
for the bias that the gate does not have. So w = P θ with θ = (v, b) and a fixed matrix P, and what
is learned is still the published, bias-less w. A step of the optimiser is taken for θ, with the
gradient Pᵀ ∂w, and w moves by P times that step. The optimiser's state is that of θ; nothing else
has to be kept but P.

Legend: D width of the model, F = 2D features of a gate, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from cometlm.checkpoints.atomic_write import read_weights, write_whole
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.memory import GlobalMemory
from cometlm.device import readable_bytes
from cometlm.train.chunk_plans import Chunking
from cometlm.train.config import Gates

FILE = "gates.safetensors"  # in a run's folder
MOST_BYTES = 3 << 30  # of the CPU's memory while whitening matrices are made
_AT_ONCE = 6  # matrices that one root takes, beside the products that it is made of


@dataclass(frozen=True)
class Whitening:
    """P of one gate, in parts.

    Attributes:
        root: Σ^(-1/2) [F, F], symmetric.
        mean: μ [F].
        bias: u [F].
    """

    root: Tensor
    mean: Tensor
    bias: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, shrinkage: float) -> Whitening:
        """From moments in float64.

        Args:
            mean: [F].
            covariance: [F, F].
            shrinkage: how much of the covariance is replaced by its mean variance times the
                identity, so that directions in which little was seen do not grow without bound.

        Raises:
            ValueError: what was seen does not vary, or has no mean.
        """
        variance = covariance.diagonal().mean()
        if not bool(variance > 0) or not bool(mean.any()):
            raise ValueError("gates.batches must show gates something that varies, got one thing")
        shrunk = (1 - shrinkage) * covariance
        shrunk.diagonal().add_(shrinkage * variance)
        values, vectors = torch.linalg.eigh(shrunk)
        inverse = (vectors / values) @ vectors.T @ mean
        root = (vectors / values.sqrt()) @ vectors.T
        return cls(root, mean, inverse / (mean @ inverse))

    def to_weight(self, theta: Tensor) -> Tensor:
        """P θ: what a gate [1, F] is, or moves by, for θ [F + 1]."""
        white = self.root @ theta[:-1]
        return (white + self.bias * (theta[-1] - white @ self.mean))[None]

    def to_theta(self, grad: Tensor) -> Tensor:
        """Pᵀ of a gate's gradient [1, F]: that of θ, [F + 1]."""
        (own,) = grad
        along = self.bias @ own
        return torch.cat([self.root @ (own - self.mean * along), along[None]])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Whitening:
        """The same on another device, in another dtype."""
        parts = (self.root, self.mean, self.bias)
        return Whitening(*(part.to(device, dtype) for part in parts))


class WhitenedGates:
    """Lets an optimiser learn gates as θ, step by step.

    The optimiser holds θ, which is 0 before each of its steps and the step after it. What a step is
    must follow from gradients alone, as with Adam or plain descent, and gates have no decay.

    Args:
        gates: their weights [1, F], by any names.
        whitening: of each.
    """

    def __init__(
        self, gates: Mapping[str, nn.Parameter], whitening: Mapping[str, Whitening]
    ) -> None:
        self._gates = list(gates.values())
        self._whitening = [
            whitening[name].to(gate.device, gate.dtype) for name, gate in gates.items()
        ]
        self._thetas = [nn.Parameter(gate.new_zeros(gate.numel() + 1)) for gate in self._gates]

    @torch.no_grad()
    def start(self, logit: float) -> None:
        """Give all gates this logit, on average, whatever is read."""
        for gate, how in zip(self._gates, self._whitening, strict=True):
            gate.copy_(logit * how.bias)

    def stand_in(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of an optimiser's parameters with θ in the place of each gate."""
        thetas = {id(gate): theta for gate, theta in zip(self._gates, self._thetas, strict=True)}
        return [
            {**group, "params": [thetas.get(id(p), p) for p in group["params"]]} for group in groups
        ]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn this optimiser's steps into steps of the gates from now on."""
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())

    @torch.no_grad()
    def _before(self) -> None:
        for gate, theta, how in zip(self._gates, self._thetas, self._whitening, strict=True):
            theta.zero_()
            theta.grad = None if gate.grad is None else how.to_theta(gate.grad)

    @torch.no_grad()
    def _after(self) -> None:
        for gate, theta, how in zip(self._gates, self._thetas, self._whitening, strict=True):
            gate.add_(how.to_weight(theta))


# --- what gates look at -------------------------------------------------------------------------


class Moments:
    """Mean and covariance of rows, added up in float64 on the CPU.

    An accelerator may lack that dtype (MPS), and has no memory to spare for a matrix of each layer.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Count rows [S, F] in."""
        wide = rows.detach().cpu().double()
        total, products = wide.sum(0), wide.T @ wide
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products.add_(products)
        self.count += len(rows)

    def whitening(self, shrinkage: float) -> Whitening:
        """From all that was added.

        Raises:
            ValueError: nothing was, or nothing that varies.
        """
        if self._sum is None or self._products is None:
            raise ValueError(
                "gates.batches must hold samples of two chunks and more, which gates look at; got "
                "none"
            )
        mean = self._sum / self.count
        covariance = self._products / self.count - torch.outer(mean, mean)
        return Whitening.of(mean, covariance, shrinkage)


def gates_of(model: CometForCausalLM) -> dict[str, nn.Parameter]:
    """The gates' weights by their names.

    Raises:
        ValueError: the memory has none.
    """
    found = {name: p for name, p in model.named_parameters() if name.endswith(".gate")}
    if not found:
        raise ValueError("gates.whiten needs a memory with gates, and this one has none")
    return found


def check_room(model: CometForCausalLM) -> None:
    """Refuse models whose whitening would take more than `MOST_BYTES` at its peak.

    Raises:
        ValueError: as it says; or the memory has no gates.
    """
    needed = peak_bytes([gate.numel() for gate in gates_of(model).values()])
    if needed > MOST_BYTES:
        raise ValueError(
            f"gates.whiten makes a matrix of (2 x {model.config.hidden_size})² for each layer, "
            f"which takes up to {readable_bytes(needed)} of the CPU's memory for this model, and "
            f"may take at most {readable_bytes(MOST_BYTES)}: set whiten: false"
        )


def peak_bytes(features: Sequence[int]) -> int:
    """The most that whitening takes at once, on the CPU.

    In float64, the products of all layers, and what one root takes. What is kept of a layer, in
    float32, is half of its products, which it takes the place of.

    Args:
        features: F of each gate.
    """
    return 8 * (sum(n**2 for n in features) + _AT_ONCE * max(features) ** 2)


def whitening_for(
    model: CometForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    chunking: Chunking,
    shrinkage: float,
    first: int = 0,
) -> dict[str, Whitening]:
    """What gates look at in some batches, each by its name, in float32 on the CPU.

    Args:
        batches: `input_ids` and maybe `attention_mask` of each.
        chunking: cuts them, as training will.
        first: the number of the first batch, by which chunk plans are drawn.

    Raises:
        ValueError: as `check_room`; no sample of two chunks.
    """
    check_room(model)
    training = model.training
    model.eval()
    try:
        # Cells that are compiled would be compiled again for what looks on.
        with watched_gates(model) as seen, torch.compiler.set_stance("force_eager"):
            for number, batch in enumerate(batches, first):
                chunking.batches = number
                _read(model, batch, chunking)
    finally:
        model.train(training)
    # One root after the other, each in the place of its moments.
    return {name: seen.pop(name).whitening(shrinkage).to("cpu", torch.float32) for name in [*seen]}


@torch.no_grad()
def _read(model: CometForCausalLM, batch: Mapping[str, Tensor], chunking: Chunking) -> None:
    """Read a batch as training would, without a loss."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    rows = (
        ids.tolist()
        if mask is None
        else [row[own.bool()].tolist() for row, own in zip(ids, mask, strict=True)]
    )
    drawn = chunking.draw(rows, model.config.comet_config.chunk_size)
    model.model(
        ids,
        mask,
        use_cache=False,
        stride=drawn.stride,
        capacity=drawn.capacity,
        chunk_lengths=drawn.chunk_lengths,
        close_last=True,
        hidden_to_keep=1,
    )


@contextmanager
def watched_gates(model: CometForCausalLM) -> Iterator[dict[str, Moments]]:
    """Moments of what each gate looks at while it is open, by the gate's name."""
    seen: dict[str, Moments] = {}
    watched = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, GlobalMemory) and module.gate is not None
    ]
    for name, module in watched:
        seen[f"{name}.gate"] = Moments()
        own = _noting(module, module.update, seen[f"{name}.gate"])
        object.__setattr__(module, "update", own)
    try:
        yield seen
    finally:
        for _, module in watched:
            object.__delattr__(module, "update")


def _noting(
    module: GlobalMemory, update: Callable[[Tensor | None, Tensor], Tensor], moments: Moments
) -> Callable[[Tensor | None, Tensor], Tensor]:
    def noting(state: Tensor | None, readout: Tensor) -> Tensor:
        if state is not None:
            both = torch.cat([module.norm(readout), state], dim=-1).flatten(0, 1)
            moments.add(both[state.flatten(0, 1).any(-1)])  # a row that has none yet has zeros
        return update(state, readout)

    return noting


# --- in a run's folder --------------------------------------------------------------------------


def save_whitening(whitening: Mapping[str, Whitening], folder: Path) -> None:
    """Write what a run whitens by, in float32; it stays the same for the whole run.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        f"{name}.{part}": getattr(one, part).to("cpu", torch.float32).contiguous()
        for name, one in whitening.items()
        for part in ("root", "mean", "bias")
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, to_bytes(tensors))


def load_whitening(folder: Path) -> dict[str, Whitening]:
    """Read what `save_whitening` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: it is not there.
    """
    tensors = read_weights(folder / FILE)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {
        name: Whitening(*(tensors[f"{name}.{part}"] for part in ("root", "mean", "bias")))
        for name in names
    }


def whitened_gates(
    model: CometForCausalLM,
    settings: Gates,
    batches: Iterable[Mapping[str, Tensor]],
    chunking: Chunking,
    folder: Path,
    going_on: bool,
) -> WhitenedGates:
    """The gates of a model, ready to be learned.

    Args:
        batches: the run's; the first `settings.batches` are looked at.
        going_on: whether the run was begun before, and its folder says how gates are whitened.

    Raises:
        ValueError, OSError: as `whitening_for`; what a run that goes on needs is not there.
    """
    if not going_on:
        first = (batch for _, batch in zip(range(settings.batches), batches, strict=False))
        save_whitening(whitening_for(model, first, chunking, settings.shrinkage), folder)
    return WhitenedGates(gates_of(model), load_whitening(folder))
