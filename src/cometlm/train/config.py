"""What a training run is made of, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cometlm.checkpoints.backbones import Bits
from cometlm.tasks import TASKS
from cometlm.tasks.story import CORPORA_OF
from cometlm.train.chunk_plans import PLANS

Mode = Literal["memory", "lora", "full"]
Log = Callable[[str], None]  # hears what a person should know of a run
TASK_QUESTIONS = "tasks"  # among the prompts of `Keep`
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
        for name in self.modules:
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(
                    f"lora.modules must be names or patterns of them, got {name!r}: {error}"
                ) from error


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """How a training step saves memory: `recompute.Recomputation`, and truncation."""

    enabled: bool = True
    every: int = 1
    offload: bool = False
    truncate_after: int = 0


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """Where samples are cut: `chunk_plans.Chunking`. Without plans, as reading does.

    Attributes:
        plans: names in `PLANS`, and how often each is drawn.
        sizes: longest chunks to draw from; the model's own if empty.
        strides: to draw from; the model's own if empty.
        capacities: to draw from; the model's own if empty.
    """

    plans: dict[str, float] = field(default_factory=lambda: {"fixed": 1.0})
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    capacities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.plans:
            PLANS.find(name)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Samples of tasks, drawn by chance: a run's training data instead of records.

    Attributes:
        tasks: names in `TASKS`, and how often each is drawn.
        options: of each task, by its name.
        steps: optimiser steps; each takes a batch for every group of ranks that share one, times
            `trainer.gradient_accumulation_steps`.
        tokens: shortest and longest context; each octave between them is as likely as any.
        grow: steps over which the longest context grows from the shortest to what `tokens` says.
        batch_tokens: tokens of one batch, which is as many samples of one length as fit.
        ask: "end" asks questions at the end of the text. "probes" asks them on the way, each time
            of a fork of the memory that is then forgotten: many answers for one reading.
        text_share: share of each context that is learned as text beside the answers; a context
            without questions is learned whole.
        answer_weight: with "probes", what the answers' loss counts beside the text's.
    """

    tasks: dict[str, float]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int
    tokens: tuple[int, int]
    grow: int = 0
    batch_tokens: int
    ask: Literal["end", "probes"] = "end"
    text_share: float = 0.0
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in self.tasks.items():
            TASKS.find(name)
            if weight < 0:
                raise ValueError(f"mixture.tasks.{name} must be at least 0, got {weight}")
        if not sum(self.tasks.values()):
            raise ValueError(f"mixture.tasks needs one of more than 0, got {self.tasks}")
        if unknown := set(self.options) - set(self.tasks):
            raise ValueError(
                f"mixture.options must be of the tasks {', '.join(self.tasks)}, got "
                f"{', '.join(sorted(unknown))}"
            )
        shortest, longest = self.tokens
        if not 0 < shortest <= longest:
            raise ValueError(f"mixture.tokens must be [shortest, longest], got {list(self.tokens)}")
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixture.{name} must be at least 1, got {getattr(self, name)}")
        if self.grow < 0:
            raise ValueError(f"mixture.grow must be at least 0, got {self.grow}")
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"mixture.text_share must lie in 0 … 1, got {self.text_share}")
        if self.answer_weight < 0:
            raise ValueError(f"mixture.answer_weight must be at least 0, got {self.answer_weight}")


@dataclass(frozen=True, kw_only=True)
class Keep:
    """A slice of every batch that keeps the language of the backbone; see `train.keep`.

    Attributes:
        weight: what a nat of divergence from the backbone counts beside a nat of the loss.
        tokens: of each batch that are held to the backbone.
        prose_share: how many of them are running text; the others are answers to prompts.
        behind: tokens at most in front of each row of running text, in chunks of their own: of
            these the model has its memory alone, where the backbone sees them; 0: none.
        corpora: where running text comes from.
        prompts: "everyday", "knowledge", "faq", "tasks" (the questions of the run's tasks, which
            nothing answers here) and files of your own, a prompt a line.
        answer_tokens: tokens of an answer at most.
    """

    weight: float = 1.0
    tokens: int = 512
    prose_share: float = 0.5
    behind: int = 0
    corpora: tuple[str, ...] = CORPORA_OF["train"]
    prompts: tuple[str, ...] = ("everyday", "knowledge", "faq", TASK_QUESTIONS)
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"keep.weight must be more than 0, got {self.weight}")
        for name in ("tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"keep.{name} must be at least 1, got {getattr(self, name)}")
        if self.behind < 0:
            raise ValueError(f"keep.behind must be at least 0, got {self.behind}")
        if self.behind and not self.prose_share:
            raise ValueError(f"keep.behind must be 0 without running text, got {self.behind}")
        if not 0 <= self.prose_share <= 1:
            raise ValueError(f"keep.prose_share must lie in 0 … 1, got {self.prose_share}")
        if self.prose_share > 0 and not self.corpora:
            raise ValueError(f"keep.corpora must name one for prose_share={self.prose_share}")
        if self.prose_share < 1 and not self.prompts:
            raise ValueError(f"keep.prompts must name some for prose_share={self.prose_share}")


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A shape of batches.

    Attributes:
        rows: of a batch.
        chunks: tokens of each of a row's chunks; the last one stays open.
        since: the first step that has such a batch.
        until: the first step that has none any more; None: none.
    """

    rows: int
    chunks: tuple[int, ...]
    since: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"fixed.shapes.rows must be at least 1, got {self.rows}")
        if len(self.chunks) < 2:
            raise ValueError(
                f"fixed.shapes.chunks must be two or more, since questions are asked where one "
                f"ends, got {list(self.chunks)}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return sum(self.chunks)

    @property
    def asks(self) -> tuple[int, ...]:
        """Chunks at whose ends questions are asked: the last that is closed, and one halfway."""
        last = len(self.chunks) - 2
        return tuple(sorted({last // 2, last}))

    def holds(self, step: int) -> bool:
        """Whether a step may have such a batch."""
        return self.since <= step and (self.until is None or step < self.until)


@dataclass(frozen=True, kw_only=True)
class FixedShapes:
    """Batches of a few fixed shapes, whose steps a device records once and replays.

    Where launching is what limits a step, as on accelerators with small models, this is many times
    as fast. Only for `train.loop`; see `train.fixed_batches` for what a batch is.

    Attributes:
        shapes: each step's is drawn of those that hold for it.
        questions: of each row, asked beside it.
        width: tokens of a question with its answer at most.
        answer: tokens of an answer at most.
        learned: tokens of each chunk that are learned as text.
        corpora: where the text comes from that fills rows up.
        kept: rows that are held to the backbone, of
        kept_width: tokens.
    """

    shapes: tuple[StepShape, ...]
    questions: int = 4
    width: int = 112
    answer: int = 48
    learned: int = 256
    corpora: tuple[str, ...] = CORPORA_OF["train"]
    kept: int = 16
    kept_width: int = 256

    def at(self, step: int) -> list[StepShape]:
        """The shapes that a step's batch may have."""
        return [shape for shape in self.shapes if shape.holds(step)]

    def __post_init__(self) -> None:
        for name in ("questions", "width", "answer", "learned", "kept", "kept_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"fixed.{name} must be at least 1, got {getattr(self, name)}")
        if not self.shapes:
            raise ValueError("fixed.shapes must name one at least, got none")
        if not self.corpora:
            raise ValueError("fixed.corpora must name one at least, got none")
        shortest = min(min(shape.chunks) for shape in self.shapes)
        for name in ("learned", "width"):
            if getattr(self, name) >= shortest:
                raise ValueError(
                    f"fixed.{name} must be less than the shortest chunk of fixed.shapes, "
                    f"{shortest}, got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class Gates:
    """How gates learn; see `train.gates`.

    Attributes:
        whiten: take their steps where what they look at is white. Without that they only learn a
            share that is the same whatever is read.
        batches: of the run that are looked at for this, before the first step.
        shrinkage: share of the covariance that is replaced by its mean variance.
        start: with `whiten`, the logit that a new memory's gates begin with; at 2 a state keeps 88%
            of itself in each chunk.
    """

    whiten: bool = False
    batches: int = 8
    shrinkage: float = 0.02
    start: float = 2.0

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"gates.batches must be at least 1, got {self.batches}")
        if not 0 < self.shrinkage <= 1:
            raise ValueError(
                f"gates.shrinkage must be more than 0 and at most 1, got {self.shrinkage}"
            )
        if not math.isfinite(self.start):
            raise ValueError(f"gates.start must be a number, got {self.start}")


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
        mixture: samples of tasks.
        evaluate: records to measure the loss on, as `records`; not with `mixture`.
        special: control tokens that are written in records, such as `<|im_end|>`, count as such:
            for texts that a chat template rendered already. Else they are text.
        keep: what holds the model to its backbone within a chunk; None: nothing does.
        gates: how gates learn.
        fixed: batches of fixed shapes, which take the place of the mixture's lengths and sizes and
            of `chunks`; only for `train.loop`.
        chunks: where samples are cut.
        recompute: how a training step saves memory.
        compile: put cells through `torch.compile`, where it works.
        trained_for: what checkpoints say that the memory learned, as a part of a sentence; None
            names the mixture's tasks, or the records.
        seed: of a new memory, adapters, a mixture's samples, chunk plans and the order of records.
        learning_rate: of everything but the memory.
        memory_factor: the memory's learning rate, as a multiple of that.
        gate_factor: the gates' learning rate, as a multiple of the memory's.
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
    mixture: Mixture | None = None
    evaluate: str | None = None
    special: bool = False
    keep: Keep | None = None
    gates: Gates = Gates()
    fixed: FixedShapes | None = None
    chunks: ChunkSettings = field(default_factory=ChunkSettings)
    recompute: Recompute = Recompute()
    compile: bool = False
    trained_for: str | None = None
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
        if (self.records is None) == (self.mixture is None):
            raise ValueError("a run needs either records or a mixture, and not both")
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
        if self.keep is not None and self.mode == "full":
            raise ValueError(
                "keep holds the model to its frozen backbone, which mode full trains: use mode "
                "memory or lora"
            )
        if self.gates.whiten and self.trainer.get("fp16"):
            raise ValueError("gates.whiten takes gradients as they are: not with trainer.fp16")
        for name, own in _OURS.items():
            if name in self.trainer:
                raise ValueError(f"trainer.{name} is a field of the run itself: {own}")
        if self.fixed is not None:
            self._check_fixed(self.fixed)
        if self.mixture is not None and self.evaluate is not None:
            raise ValueError("evaluate measures records: not with a mixture")
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

    def _check_fixed(self, fixed: FixedShapes) -> None:
        if self.mixture is None:
            raise ValueError("fixed makes batches of a mixture: not with records")
        clashing = {
            "compile": self.compile,
            "keep.behind": self.keep is not None and self.keep.behind > 0,
            "lora.dropout": self.lora is not None and self.lora.dropout > 0,
            "recompute.every": self.recompute.every > 1,
            "recompute.offload": self.recompute.offload,
            "recompute.truncate_after": self.recompute.truncate_after > 0,
        }
        for name in (name for name, is_set in clashing.items() if is_set):
            raise ValueError(f"{name} is not for steps that are recorded: leave it out, or fixed")
        for step in range(self.mixture.steps):
            if not fixed.at(step):
                raise ValueError(f"fixed.shapes must have one for every step, got none for {step}")

    def _check_sharded(self) -> None:
        probes = self.mixture is not None and self.mixture.ask == "probes"
        clashing = {
            "evaluate": self.evaluate is not None,
            "compile": self.compile,
            "quantization": self.quantization is not None,
            "keep": self.keep is not None,
            "gates.whiten": self.gates.whiten,
            'mixture.ask "probes"': probes,
        }
        for name in (name for name, is_set in clashing.items() if is_set):
            raise ValueError(f"{name} needs whole weights on each rank: not with shard_weights")

    @property
    def purpose(self) -> str:
        """What the memory is trained for, as a part of a sentence."""
        if self.trained_for is not None:
            return self.trained_for
        if self.mixture is None:
            return f"what {self.records} asks"
        tasks = ", ".join(name for name, weight in self.mixture.tasks.items() if weight)
        longest = self.mixture.tokens[1]
        if self.fixed is not None:
            longest = max(shape.tokens for shape in self.fixed.shapes)
        return f"the tasks {tasks} in texts of up to {longest:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)
