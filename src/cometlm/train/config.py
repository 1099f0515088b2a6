"""What a training run is made of, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cometlm.checkpoints.backbones import Bits
from cometlm.train.stages import ChunkSettings, Generated, Stage

Mode = Literal["memory", "lora", "full"]
Say = Callable[[str], None]  # hears what a person should know of a run
# Fields of trl's that a run has itself.
_OURS = {
    "output_dir": "output",
    "learning_rate": "learning_rate",
    "max_length": "max_length, with cut",
    "save_steps": "save_steps",
    "seed": "seed",
    "warmup_steps": "warmup",
}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters beside the memory; see `lora_config`."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """How a training step saves memory: `recompute.Recomputation`, and truncation."""

    enabled: bool = True
    every: int = 1
    offload: bool = False
    truncate_after: int = 0


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a new memory's tokens are like before training; each is a text, repeated as needed.

    A backbone reads on best where these are tokens that it knows: marks that end a phrase gather
    what stood before them already.

    Attributes:
        compression: what compression tokens are like.
        readout: what readout tokens are like.
    """

    compression: str | None = None
    readout: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a built-in name, directory or hub id; of a checkpoint to train it further.
        output: the folder that the run writes to and resumes from.
        dtype: what the backbone computes in; None is what the device is fast at. Trained weights
            are kept in float32, or in float64 if that is said here.
        quantization: "4bit" or "8bit" to keep a frozen backbone so, by bitsandbytes; whoever reads
            with the memory has to load the backbone in the same way.
        mode: what is trained: the memory alone, the memory and LoRA, or everything.
        comet: `CometConfig` fields, for a new memory; without any, a checkpoint or a built-in
            model goes on from the memory that it has.
        sizes: `chunk_size`, `stride`, `capacity` and `overlap` that this memory is read with from
            now on; `gate: false` takes its gates away.
        start: what the tokens of a new memory are like at first.
        lora: the adapters that mode "lora" adds to a model without any; one that has some goes on
            with them as they are, and takes none here.
        records: training data, a file or a name that `data.read_records` takes; or
        generated: samples made here.
        evaluate: records to measure the loss on, as `records`; not with `generated`.
        chunks: where samples are cut.
        recompute: how a training step saves memory.
        compile: put cells through `torch.compile`, where it works.
        seed: of a new memory, adapters, generated samples, chunk plans and the order of records.
        learning_rate: of everything but the memory.
        memory_factor: the memory's learning rate, as a multiple of that.
        gate_factor: the gates' learning rate, as a multiple of the memory's. What a gate looks at
            has a long mean, so that each step moves all that it does at once.
        warmup: steps over which the rate of a new optimiser rises from 0.
        max_length: longest sample in tokens; None is any. Longer ones are an error, unless
        cut: is set, which drops what is too long from their ends.
        save_steps: optimiser's steps between two checkpoints, and between evaluations.
        chunk_parallel: ranks that share each sample, in a job that `torchrun` started.
        shard_weights: shard weights, gradients and the optimiser's state over the ranks that do
            not share a sample (FSDP2), instead of having all of them on each.
        trainer: further fields of trl's `SFTConfig`.
    """

    model: str
    output: str
    dtype: str | None = None
    quantization: Bits | None = None
    mode: Mode = "lora"
    comet: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    start: Start = Start()
    lora: LoraSettings | None = None
    records: str | None = None
    generated: Generated | None = None
    evaluate: str | None = None
    chunks: ChunkSettings = field(default_factory=ChunkSettings)
    recompute: Recompute = Recompute()
    compile: bool = False
    seed: int = 0
    learning_rate: float = 5e-5
    memory_factor: float = 5.0
    gate_factor: float = 1.0
    warmup: int = 10
    max_length: int | None = None
    cut: bool = False
    save_steps: int = 50
    chunk_parallel: int = 1
    shard_weights: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.records is None) == (self.generated is None):
            raise ValueError("a run needs either records or generated, and not both")
        if self.comet and self.sizes:
            raise ValueError("comet gives a new memory all of its sizes; leave sizes out")
        for name in ("learning_rate", "memory_factor", "gate_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        for name, value, least in (
            ("chunk_parallel", self.chunk_parallel, 1),
            ("save_steps", self.save_steps, 1),
            ("warmup", self.warmup, 0),
            ("max_length", self.max_length, 1),
            ("recompute.every", self.recompute.every, 1),
            ("recompute.truncate_after", self.recompute.truncate_after, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.quantization and self.mode == "full":
            raise ValueError(
                f"mode full trains the backbone, which quantization {self.quantization} freezes: "
                "use mode memory or lora"
            )
        for name, own in _OURS.items():
            if name in self.trainer:
                raise ValueError(f"trainer.{name} is a field of the run itself: {own}")
        if self.generated is not None:
            if self.evaluate is not None:
                raise ValueError("evaluate measures records: not with generated samples")
            for name in (name for name in self.trainer if name.startswith("lr_scheduler")):
                raise ValueError(f"trainer.{name} is for records: stages have a learning_rate each")
        if self.chunk_parallel > 1 or self.shard_weights:
            for stage in self.generated.stages if self.generated is not None else ():
                self._check_shared(stage)
        recompute = self.recompute
        one_device = recompute.every > 1 or recompute.offload or recompute.truncate_after > 0
        if (self.chunk_parallel > 1 or self.shard_weights) and one_device:
            raise ValueError(
                "recompute.every, offload and truncate_after are for one device that reads a "
                f"sample alone: not with chunk_parallel={self.chunk_parallel}, "
                f"shard_weights={self.shard_weights}"
            )
        if self.shard_weights:
            self._check_sharded()

    def _check_shared(self, stage: Stage) -> None:
        shared = f"chunk_parallel={self.chunk_parallel}, shard_weights={self.shard_weights}"
        if stage.ask == "borders":
            raise ValueError(
                'stages.ask: "borders" reads from forks of the memory, which is not done with '
                f'{shared}: use "end"'
            )
        if stage.history:
            raise ValueError(
                f"stages.history begins with memories that one device has read, not with {shared}"
            )

    def _check_sharded(self) -> None:
        stages = self.generated.stages if self.generated is not None else ()
        clashing = {
            "evaluate": self.evaluate is not None,
            "compile": self.compile,
            "quantization": self.quantization is not None,
            "stages.gates": any(stage.gates is not None for stage in stages),
        }
        for name in (name for name, is_set in clashing.items() if is_set):
            raise ValueError(f"{name} needs whole weights on each rank: not with shard_weights")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)
