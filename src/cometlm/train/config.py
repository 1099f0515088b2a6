"""What a training run is made of: one YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

Mode = Literal["memory", "lora", "full"]
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


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """How a training step saves memory: `recompute.Recomputation`, and truncation."""

    enabled: bool = True
    every: int = 1
    offload: bool = False
    truncate_after: int = 0


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """Where samples are cut: `chunking.Chunking`. Without plans, as reading does."""

    plans: dict[str, float] = field(default_factory=lambda: {"fixed": 1.0})
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    capacities: tuple[int, ...] = ()


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
class HayShares:
    """How often keys hide in each kind of hay, relative to the others.

    Attributes:
        texts, code: running text of either.
        strewn: one of these with numbers strewn in that nobody asks to keep.
        words: random words.
        filler: the usual sentences over and over, from any word on.
        same: the filler from its first word on, so that nothing but the key varies.
    """

    texts: float = 0.0
    code: float = 0.0
    strewn: float = 0.0
    words: float = 0.0
    filler: float = 0.0
    same: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What gates are fitted to before a stage; see `start.fit_gates`.

    Attributes:
        keep: the share of the state that is kept at a chunk of hay.
        keep_at_key: the same where a key is said. With both alike, gates look at nothing.
        key_share: what chunks with a key count in the fit, of 1, however many there are. More of it
            opens a gate at keys more surely, and at hay that looks like one more often.
        chunk_size: of the texts that they are fitted to; the model's own if None.
        texts: how many; four are read at once.
        tokens: of each.
        history: tokens that memories have read before these texts, at most. A state that has read
            for long is another thing than one of a few chunks, and gates fitted to those alone
            leak and jam at it. Hay, and hay with a key, in four rows each.
        first_layer: layers below keep the gates that they have.
    """

    keep: float = 0.998
    keep_at_key: float = 0.3
    key_share: float = 0.5
    chunk_size: int | None = None
    texts: int = 144
    tokens: int = 768
    history: int = 0
    first_layer: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps on generated samples of certain lengths.

    Attributes:
        steps: optimiser steps; each takes a batch for every group of ranks that share one, times
            `trainer.gradient_accumulation_steps`.
        tokens: shortest and longest sample.
        batch_tokens: tokens of one batch, which is as many samples of one length as fit.
        learning_rate: of the backbone's adapters here; the run's own if None.
        passkey: share of batches that are passkey samples.
        repeat: share of batches in which a text is read twice, and learned the second time. Where
            an answer of six tokens teaches little, this teaches to read the memory with every
            token. All other batches are plain text.
        keys: fewest and most keys in one sample.
        depth: where the key that is asked for is hidden, between 0 (start of the text) and 1.
        distinct: fewest and most different digits in a key, 2 to 10.
        ask: "end" puts the question at the end of the text. "borders" asks it again and again on
            the way, each time of a fork of the memory that is then forgotten, and learns the text
            too: many answers for one reading, from one border away to as many as the text has.
        before_question: with "borders", most tokens of text between the border and the question. A
            session is asked anywhere in a chunk, so before the end this should come near its size;
            what fits into a chunk beside the question is taken.
        answer_weight: with "borders", what the answers' loss counts beside the text's.
        told_weight: with "borders", what it counts that readout tokens say the key, digit by digit
            and over again, at the end of the chunk that says it; 0 asks nothing of them.
        wordings: use only so many of the sentences and questions; all if None. Few of them, in
            plain hay, are learned first. Where a text has several keys, as many that name an owner
            come with them.
        hay: as in `Generated`, for these steps.
        chunks: as in the run, for these steps; the run's own if None.
        gates: set the gates before the first of these steps.
        history: tokens that memories have read when these batches begin, at most; 0 for new
            memories. A state that has read for long, and may hold another key, is another thing
            to write to than one of a few chunks. They are read without a gradient, by the weights
            as they stand, and anew at each checkpoint.
    """

    steps: int
    tokens: tuple[int, int]
    batch_tokens: int
    learning_rate: float | None = None
    passkey: float = 0.85
    repeat: float = 0.0
    keys: tuple[int, int] = (1, 1)
    depth: tuple[float, float] = (0.0, 1.0)
    distinct: tuple[int, int] = (10, 10)
    ask: Literal["end", "borders"] = "end"
    before_question: int = 8
    answer_weight: float = 1.0
    told_weight: float = 0.0
    wordings: int | None = None
    hay: HayShares | None = None
    chunks: ChunkSettings | None = None
    gates: Gates | None = None
    history: int = 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Samples made on this machine: passkeys hidden in texts, and the texts themselves.

    Attributes:
        stages: one after the other; together they are the run.
        texts: names in `data.texts`, files or directories: what is read and hidden in.
        code: the same, of program text.
        hay: how often keys hide in each kind of hay.
        digits: shortest and longest key.
    """

    stages: tuple[Stage, ...]
    texts: tuple[str, ...] = ("anarchism", "austen", "perl")
    code: tuple[str, ...] = ("transformers",)
    hay: HayShares = HayShares(texts=5.0, code=2.0, words=1.0, filler=1.0)
    digits: tuple[int, int] = (5, 5)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a built-in name, directory or hub id; of a checkpoint to train it further.
        output: the folder that the run writes to and resumes from.
        dtype: what the backbone computes in; None is what the device is fast at. Trained weights
            are kept in float32, or in float64 if that is said here.
        mode: what is trained: the memory alone, the memory and LoRA, or everything.
        comet: `CometConfig` fields, for a new memory; without any, a checkpoint or a built-in
            model goes on from the memory that it has.
        sizes: `chunk_size`, `stride`, `capacity` and `overlap` that this memory is read with from
            now on; `gate: false` takes its gates away.
        start: what the tokens of a new memory are like at first.
        records: training data, a file or a name that `data.read_records` takes; or
        generated: samples made here.
        evaluate: records to measure the loss on, as `records`.
        compile: put cells through `torch.compile`, where it works.
        learning_rate: of everything but the memory.
        memory_factor: the memory's learning rate, as a multiple of that.
        gate_factor: the gates' learning rate, as a multiple of the memory's. What a gate looks at
            has a long mean, so that each step moves all that it does at once.
        warmup: steps over which the rate rises from 0.
        max_length: longest sample in tokens; None is any. Longer ones are an error, unless
        cut: is set, which drops what is too long from their ends.
        chunk_parallel: ranks that share each sample, in a job that `torchrun` started.
        shard_weights: shard weights, gradients and the optimiser's state over the ranks that do
            not share a sample (FSDP2), instead of having all of them on each.
        trainer: further fields of trl's `SFTConfig`.
    """

    model: str
    output: str
    dtype: str | None = None
    mode: Mode = "lora"
    comet: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    start: Start = Start()
    lora: LoraSettings = LoraSettings()
    records: str | None = None
    generated: Generated | None = None
    evaluate: str | None = None
    chunks: ChunkSettings = ChunkSettings()
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
            ("lora.r", self.lora.r, 1),
            ("recompute.every", self.recompute.every, 1),
            ("recompute.truncate_after", self.recompute.truncate_after, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, own in _OURS.items():
            if name in self.trainer:
                raise ValueError(f"trainer.{name} is a field of the run itself: {own}")
        if self.generated is not None:
            _check_generated(self.generated)
        for stage in self.generated.stages if self.generated is not None else ():
            _check_stage(stage)
            if self.chunk_parallel > 1 or self.shard_weights:
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
            "stages.gates": any(stage.gates is not None for stage in stages),
        }
        for name in (name for name, is_set in clashing.items() if is_set):
            raise ValueError(f"{name} needs whole weights on each rank: not with shard_weights")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


def _check_generated(generated: Generated) -> None:
    fewest, most = generated.digits
    if not 1 <= fewest <= most:
        raise ValueError(
            f"generated.digits must be [shortest, longest], got {list(generated.digits)}"
        )
    if not generated.stages:
        raise ValueError("generated.stages must have at least one stage")
    _check_hay("generated.hay", generated.hay)


def _check_hay(name: str, hay: HayShares) -> None:
    shares = dataclasses.astuple(hay)
    if min(shares) < 0 or not sum(shares):
        raise ValueError(f"{name} must have shares of at least 0, and one of more, got {hay}")


def _check_stage(stage: Stage) -> None:
    low, high = stage.tokens
    if not 0 < low <= high:
        raise ValueError(f"stages.tokens must be [shortest, longest], got {list(stage.tokens)}")
    if stage.passkey < 0 or stage.repeat < 0 or stage.passkey + stage.repeat > 1:
        raise ValueError(
            f"stages.passkey and stages.repeat must be shares that add up to at most 1, got "
            f"{stage.passkey} and {stage.repeat}"
        )
    fewest, many = stage.keys
    if not 1 <= fewest <= many:
        raise ValueError(f"stages.keys must be [fewest, most] from 1, got {list(stage.keys)}")
    if stage.wordings is not None and stage.wordings < 1:
        raise ValueError(f"stages.wordings must be at least 1, got {stage.wordings}")
    if stage.batch_tokens < 1:
        raise ValueError(f"stages.batch_tokens must be at least 1, got {stage.batch_tokens}")
    if stage.hay is not None:
        _check_hay("stages.hay", stage.hay)
    fewest, many = stage.distinct
    if not 2 <= fewest <= many <= 10:
        raise ValueError(
            f"stages.distinct must be [fewest, most] between 2 and 10, got {list(stage.distinct)}"
        )
    least, most = stage.depth
    if not 0 <= least <= most <= 1:
        raise ValueError(
            f"stages.depth must be [least, most] between 0 and 1, got {list(stage.depth)}"
        )
    for name in ("before_question", "answer_weight", "told_weight", "history"):
        if getattr(stage, name) < 0:
            raise ValueError(f"stages.{name} must be at least 0, got {getattr(stage, name)}")
    if stage.gates is not None:
        if stage.gates.texts < 4:
            raise ValueError(f"stages.gates.texts must be at least 4, got {stage.gates.texts}")
        for name in ("history", "first_layer"):
            if getattr(stage.gates, name) < 0:
                raise ValueError(
                    f"stages.gates.{name} must be at least 0, got {getattr(stage.gates, name)}"
                )
        for name in ("keep", "keep_at_key", "key_share"):
            share = getattr(stage.gates, name)
            if not 0 < share < 1:
                raise ValueError(f"stages.gates.{name} must be between 0 and 1, got {share}")
    if stage.steps < 1:
        raise ValueError(f"stages.steps must be at least 1, got {stage.steps}")


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, with changes of the form "key=value" or "key.inner.0=value".

    Raises:
        ValueError: no YAML, an unknown field, a value of another type, an impossible one.
        OSError: the file cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold fields of a training run, got {type(values).__name__}")
    values = _unshared(values)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"a change must look like key=value, got {change!r}")
        try:
            _set(values, name.strip().split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {change!r} is not YAML: {error}") from error
    return config_of(values)


def _unshared(values: Any) -> Any:
    """A copy in which what an anchor names stands in each of its places."""
    if isinstance(values, dict):
        return {name: _unshared(value) for name, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from plain values; fields that are missing have their defaults.

    Raises:
        ValueError: as `read_config`.
    """
    config: TrainConfig = _build(TrainConfig, values, "")
    return config


def _set(values: Any, path: list[str], value: Any) -> None:
    *way, last = path
    for i, name in enumerate(way):
        if isinstance(values, list):
            values = values[_index(name, values)]
        else:
            values = values.setdefault(name, {})
        if not isinstance(values, (dict, list)):
            above = ".".join(path[: i + 1])
            raise ValueError(f"{'.'.join(path)} is no field: {above} is {values!r}")
    if isinstance(values, list):
        values[_index(last, values)] = value
    else:
        values[last] = value


def _index(name: str, values: list[Any]) -> int:
    if not name.isdecimal() or int(name) >= len(values):
        raise ValueError(f"{name!r} is no place in a list of {len(values)}")
    return int(name)


def _build(kind: Any, value: Any, path: str) -> Any:
    """`value`, as YAML has it, as the type `kind` that a field declares.

    Raises:
        ValueError: it is of another type; names the field.
    """
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast("type", kind), value, path)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (one for one in inner if one is not type(None))
        return _build(kind, value, path)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{path} must be one of {', '.join(map(str, inner))}, got {value!r}")
        return value
    if origin is tuple:
        return _build_tuple(inner, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must hold fields, got {value!r}")
        return {str(k): _build(inner[1], v, f"{path}.{k}") for k, v in value.items()}
    return _build_plain(kind, value, path)


def _build_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must hold fields, got {value!r}")
    hints = get_type_hints(kind)
    names = [one.name for one in dataclasses.fields(kind)]
    where = f"{path}." if path else ""
    for name in value:
        if name not in names:
            raise ValueError(f"unknown field {where}{name}; there are {', '.join(names)}")
    for one in dataclasses.fields(kind):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in value:
            raise ValueError(f"{where}{one.name} is missing")
    return kind(**{n: _build(hints[n], v, f"{where}{n}") for n, v in value.items()})


def _build_tuple(inner: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{path} must be a list, got {value!r}")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise ValueError(f"{path} must be a list of {len(kinds)}, got {value!r}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_build(kind, one, f"{path}.{i}") for i, (kind, one) in pairs)


def _build_plain(kind: Any, value: Any, path: str) -> Any:
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 3e-4 for text
        except ValueError:
            pass
    raise ValueError(f"{path} must be {kind.__name__}, got {value!r}")
