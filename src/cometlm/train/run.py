"""A training run from its configuration to a checkpoint: what `cometlm train` does."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig

from cometlm.by_name import has_memory, load
from cometlm.causal_lm import CometForCausalLM
from cometlm.chunking import Chunking
from cometlm.data.records import read_records
from cometlm.device import as_dtype
from cometlm.files import write_whole
from cometlm.loading import BUILT_IN
from cometlm.parallel.p2p import PipelineError
from cometlm.pretrained import BACKBONE, LORA, WEIGHTS
from cometlm.train.batches import GeneratedBatches, Said, chunking_of, collate
from cometlm.train.config import TrainConfig, config_of
from cometlm.train.histories import Histories
from cometlm.train.lora import lora_config, set_trainable
from cometlm.train.start import fit_gates, start_like
from cometlm.train.templates import generation_template
from cometlm.train.trainer import STATE, CometTrainer, last_checkpoint, steps_done

SETTINGS = "train.json"
EARLIER = "earlier"  # folders in the output for what stood there before a restart
# What may differ between a run and its resumption without changing what is learned, or with the
# same batches on another number of ranks, or more of them.
_FREE = {"output", "save_steps", "compile", "chunk_parallel", "shard_weights", "evaluate"}
_FREE_OF_TRL = (
    "logging_", "log_", "report_to", "run_name", "disable_tqdm", "project", "trackio_",
    "save_", "push_to_hub", "hub_", "eval_", "per_device_eval_", "include_", "load_best_model",
    "metric_for_best", "greater_is_better", "ddp_", "dataloader_", "use_cpu", "torch_empty_cache",
    "gradient_accumulation_steps", "per_device_train_", "max_steps", "num_train_epochs",
)  # fmt: skip

_TOLD_EVERY = 50_000  # tokens; a minute or so on two cores

Say = Callable[[str], None]
BeforeStep = Callable[[int], None]


def train(
    config: TrainConfig, *, device: str | None = None, restart: bool = False, say: Say = print
) -> CometForCausalLM:
    """Train, going on from the last checkpoint in `config.output` if there is one.

    Args:
        restart: begin anew; what `config.output` holds of another run moves to a folder in it.
        say: called with what a person should know.

    Returns:
        The trained model, which is saved in `config.output`.

    Raises:
        ValueError: data that cannot be trained on, or checkpoints of another configuration.
        FloatingPointError: the loss or its gradient is not finite.
        OSError: something cannot be read or written.
    """
    output = Path(config.output)
    if restart and Path(config.model).resolve().is_relative_to(output.resolve()):
        raise ValueError(f"model {config.model} lies in output {output}, which a restart clears")
    checkpoint = None if restart else last_checkpoint(output)
    if checkpoint is not None:
        check_same(output, config, checkpoint)
        say(f"going on from {checkpoint}")
    is_new = bool(config.comet) or not has_memory(config.model)
    if config.comet and config.model not in BUILT_IN and has_memory(config.model):
        raise ValueError(
            f"model {config.model} is a checkpoint and has its memory: comet is for new ones; say "
            "in sizes what this one is to be read with"
        )
    sizes = {**config.comet, **config.sizes, **({"seed": config.seed} if is_new else {})}
    merge = config.mode == "full"  # an adapter is trained on, or becomes a part of the whole
    model, tokenizer = load(
        config.model, device=device, dtype=as_dtype(config.dtype), merge=merge, **sizes
    )
    if is_new and checkpoint is None:
        start_like(model, tokenizer, config.start)
    lora = config.lora
    adapters = lora_config(lora.r, lora.alpha, lora.dropout, lora.modules)
    torch.manual_seed(config.seed)
    set_trainable(model, config.mode, adapters)
    say(describe_trained(model))
    if config.compile:
        model.model.train().compile_cells()
    try:
        trainer = make_trainer(config, model, tokenizer, say)
    except (RuntimeError, ImportError) as error:  # trl and its reporters: something is missing
        if isinstance(error, PipelineError):
            raise
        raise ValueError(f"the trainer cannot be made: {error}") from error
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        if restart:
            set_aside(output, say)
        write_whole(output / SETTINGS, json.dumps(config.to_dict(), indent=2).encode())
    if checkpoint is not None and 0 < trainer.args.max_steps <= steps_done(checkpoint):
        say(f"all {trainer.args.max_steps} steps are done")
        trainer.take(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / "trainer_state.json"))
    return model


def make_trainer(
    config: TrainConfig, model: CometForCausalLM, tokenizer: Any, say: Say = print
) -> CometTrainer:
    """The trainer of a run, ready to start."""
    common: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "memory_factor": config.memory_factor,
        "gate_factor": config.gate_factor,
        "chunk_parallel": config.chunk_parallel,
        "shard_weights": config.shard_weights,
        "alike": {"the configuration": config.to_dict()},
    }
    if config.generated is not None:
        sizes, stages = model.config.comet_config, config.generated.stages
        arguments = _arguments(config, model.device, steps=sum(stage.steps for stage in stages))
        groups = max(1, arguments.world_size // config.chunk_parallel)
        per_step = arguments.gradient_accumulation_steps * groups
        batches = GeneratedBatches(config.generated, tokenizer, config.seed, sizes, per_step)
        batches.check()
        _warn_of_single_chunks(max(stage.tokens[1] for stage in stages), config, model, say)
        histories = Histories(config.seed)
        return CometTrainer(
            **common,
            args=arguments,
            train_dataset=_as_dataset(batches),
            data_collator=collate,
            chunking=_stage_chunking(config, batches, tokenizer),
            rates=_stage_rates(config, batches),
            before_step=_stage_start(config, model, batches, histories, say),
            memories=histories.of,
            in_order=True,
            whole=config.mode == "full",
        )
    assert config.records is not None
    chunking = chunking_of(config.chunks, tokenizer, config.seed)
    records = read_records(config.records)
    arguments = _arguments(config, model.device)
    if "messages" in records.column_names and "assistant_only_loss" not in config.trainer:
        arguments.assistant_only_loss = True
    with _marked(tokenizer):
        trainer = CometTrainer(
            **common,
            args=arguments,
            train_dataset=records,
            eval_dataset=read_records(config.evaluate) if config.evaluate else None,
            chunking=lambda step: chunking,
            whole=config.mode == "full",
        )
    _check_lengths(trainer.train_dataset, config, model, say)
    if config.cut and not arguments.packing:
        _tell_cuts(trainer.train_dataset, config, len(records), say)
    if trainer.eval_dataset is not None:
        _check_lengths(trainer.eval_dataset, config)
    _check_shared(trainer.train_dataset, config, model.config.comet_config.chunk_size)
    return trainer


def check_same(output: Path, config: TrainConfig, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of another configuration.

    Stages that have not begun, and the steps that one has left, may be others.

    Raises:
        ValueError: names the fields that differ, with both values.
    """
    try:
        # Through the class, so that fields that are newer than the file have their defaults.
        values = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
        before = json.loads(json.dumps(config_of(values).to_dict()))
    except FileNotFoundError as error:
        raise ValueError(
            f"{output} holds {checkpoint.name} but no {SETTINGS} of a run to go on with; use "
            "--restart to begin anew, or another output"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{output / SETTINGS} cannot be compared with this configuration ({error}); use "
            "--restart to begin anew, or another output"
        ) from error
    now = json.loads(json.dumps(config.to_dict()))
    done = steps_done(checkpoint)
    before, now = _decisive(before, done), _decisive(now, done)
    differing = [
        f"{name}: was {before.get(name)!r}, is {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    if differing:
        raise ValueError(
            f"{output} holds checkpoints of another configuration ({'; '.join(differing)}); "
            "use --restart to begin anew, or another output"
        )


def set_aside(output: Path, say: Say = print) -> None:
    """Move what an earlier run left into a folder beside the new one's files, settings last.

    Raises:
        OSError: it cannot be moved.
    """
    parts = (WEIGHTS, "config.json", BACKBONE, LORA, STATE, SETTINGS)
    left = [*sorted(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")), *(output / part for part in parts)]
    left = [path for path in left if path.exists()]
    if not left:
        return
    names = (output / f"{EARLIER}-{number}" for number in itertools.count(1))
    folder = next(name for name in names if not name.exists())
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)
    say(f"what {output} held is in {folder} now")


def _decisive(settings: dict[str, Any], done: int) -> dict[str, Any]:
    """What the first `done` steps were learned by, of a run's settings."""
    stages = _begun(settings["generated"]["stages"], done) if settings["generated"] else []
    # Where batches begin behind a history, that is read again at each checkpoint.
    free = _FREE - {"save_steps"} if any(stage["history"] for stage in stages) else _FREE
    settings = {name: value for name, value in settings.items() if name not in free}
    if settings["generated"]:
        settings["generated"] = {**settings["generated"], "stages": stages}
    settings["recompute"] = settings["recompute"]["truncate_after"]
    settings["trainer"] = {
        name: value
        for name, value in settings["trainer"].items()
        if not name.startswith(_FREE_OF_TRL)
    }
    return settings


def _begun(stages: list[dict[str, Any]], done: int) -> list[dict[str, Any]]:
    """The stages of the first `done` steps, the last of them as far as it went."""
    begun = []
    for stage in stages:
        if done <= 0:
            break
        begun.append({**stage, "steps": min(stage["steps"], done)})
        done -= stage["steps"]
    return begun


def describe_trained(model: CometForCausalLM) -> str:
    """How many weights are trained, and where."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    memory = sum(p.numel() for name, p in named if ".comet." in name)
    others = sum(p.numel() for name, p in named if ".comet." not in name)
    return f"training {memory:,} weights of the memory and {others:,} of the backbone"


def _arguments(config: TrainConfig, device: torch.device, steps: int | None = None) -> SFTConfig:
    """Configuration of trl; `config.trainer` has the last word.

    Raises:
        ValueError: a field that trl does not have or take, or a device that it would not use.
    """
    if device.index and int(os.environ.get("WORLD_SIZE", "1")) == 1:  # a rank has its own
        raise ValueError(
            f"training takes the first device that the process sees: hide the others from it, got "
            f"device={device}"
        )
    recompute = config.recompute
    options: dict[str, Any] = {
        "output_dir": config.output,
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.5,
        "per_device_train_batch_size": 1,
        "max_length": config.max_length if config.cut else None,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        # The frozen backbone is in its own dtype already, and what is trained in float32.
        "bf16": config.mode == "full" and device.type != "cpu",
        "use_cpu": device.type == "cpu",
        "activation_checkpointing": recompute.enabled,
        "activation_checkpointing_kwargs": {
            "every": recompute.every,
            "offload": recompute.offload,
            "truncate_after": recompute.truncate_after,
        },
    }
    if config.evaluate is not None:
        options |= {"eval_strategy": "steps", "eval_steps": config.save_steps}
    if steps is not None:
        options |= {
            "max_steps": steps,
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "dataloader_pin_memory": False,
        }
    for name in config.trainer:
        if name not in SFTConfig.__dataclass_fields__:
            raise ValueError(f"trainer.{name} is no field of trl's SFTConfig")
    if config.trainer.get("packing") and not (config.max_length and config.cut):
        raise ValueError(
            "trainer.packing fills rows of max_length tokens and cuts what is longer: set "
            "max_length, and cut: true"
        )
    arguments = SFTConfig(**{**options, **config.trainer})
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one model is one stream of memory: ranks, not threads, share work
    return arguments


@contextlib.contextmanager
def _marked(tokenizer: Any) -> Iterator[None]:
    """While samples are tokenised, a template that marks the assistant's words, if there is one."""
    own = tokenizer.chat_template
    tokenizer.chat_template = generation_template(tokenizer) or own
    try:
        yield
    finally:
        tokenizer.chat_template = own


def _as_dataset(batches: GeneratedBatches) -> Dataset:
    """Batches as the kind of dataset that trl takes; each is made when it is asked for."""

    def make(columns: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = [batches[number] for number in columns["batch"]]
        names = dict.fromkeys(name for one in made for name in one)
        return {name: [one.get(name) for one in made] for name in names}

    return Dataset.from_dict({"batch": list(range(len(batches)))}).with_transform(make)


def _stage_start(
    config: TrainConfig,
    model: CometForCausalLM,
    batches: GeneratedBatches,
    histories: Histories,
    say: Say,
) -> BeforeStep:
    """What comes before a step: a stage's gates are fitted, and the memories read it begins with.

    Those are read again wherever a checkpoint may be, so that a run that goes on from there has the
    same ones.
    """

    def start(step: int) -> None:
        stage = batches.stage(step)
        begins = step == 0 or batches.stage(step - 1) is not stage
        if (gates := stage.gates) is not None and begins:
            say(f"fitting the gates to {gates.texts} texts, before step {step + 1}")
            past = _telling(batches.histories(step, gates.history), "histories", say)
            texts = _telling(batches.hidden_keys(step), "texts with keys", say)
            fit_gates(model, texts, gates, past)
        at_checkpoint = step % config.save_steps == 0 or not histories
        if begins or (stage.history and at_checkpoint):
            if stage.history:
                say(f"reading {stage.history:,} tokens that step {step + 1} begins behind")
            histories.read(model, [ids for ids, _ in batches.histories(step, stage.history)])

    return start


def _telling(texts: Iterator[Said], what: str, say: Say) -> Iterator[Said]:
    """The same texts; says on the way how many tokens of them were read."""
    read = told = 0
    for text in texts:
        yield text
        read += text[0].numel()
        if read - told >= _TOLD_EVERY:
            told = read
            say(f"{read:,} tokens of {what} read")


def _stage_chunking(
    config: TrainConfig, batches: GeneratedBatches, tokenizer: Any
) -> Callable[[int], Chunking]:
    """From a step to the chunk plans of its stage."""
    made: dict[int, Chunking] = {}

    def chunking(step: int) -> Chunking:
        stage = batches.stage(step)
        if id(stage) not in made:
            settings = stage.chunks or config.chunks
            made[id(stage)] = chunking_of(settings, tokenizer, config.seed)
        return made[id(stage)]

    return chunking


def _stage_rates(config: TrainConfig, batches: GeneratedBatches) -> Callable[[int], float]:
    """From a step to its stage's learning rate, as a share of the run's; warmed up at first."""

    def share(step: int) -> float:
        rate = batches.stage(step).learning_rate or config.learning_rate
        return min(1.0, (step + 1) / max(1, config.warmup)) * rate / config.learning_rate

    return share


def _check_shared(dataset: Any, config: TrainConfig, chunk_size: int) -> None:
    """Refuse samples that not every rank has a chunk of, where all are needed.

    Raises:
        ValueError: says how many.
    """
    ranks = config.chunk_parallel
    short = sum(-(-len(ids) // chunk_size) < ranks for ids in dataset["input_ids"])
    if config.shard_weights and short:
        raise ValueError(
            f"{short} of {len(dataset)} samples have fewer chunks of {chunk_size} tokens than "
            f"chunk_parallel={ranks}; with shard_weights every rank needs one"
        )


def _lengths(dataset: Any) -> list[int]:
    """Tokens of each sample, also where several were packed into a row."""
    if "seq_lengths" in dataset.column_names:
        return [length for row in dataset["seq_lengths"] for length in row]
    return [len(ids) for ids in dataset["input_ids"]]


def _check_lengths(
    dataset: Any,
    config: TrainConfig,
    model: CometForCausalLM | None = None,
    say: Say = print,
) -> None:
    """Refuse what would be cut unasked, and warn where there is nothing to remember.

    Args:
        model: what is trained on it; None if nothing is.

    Raises:
        ValueError: no samples, or samples longer than `max_length`.
    """
    lengths = _lengths(dataset)
    source = config.evaluate if model is None else config.records
    if not lengths:
        raise ValueError(f"{source} has no sample with a token to learn from")
    limit = config.max_length
    if limit is not None and not config.cut:
        longer = sum(length > limit for length in lengths)
        if longer:
            raise ValueError(
                f"{longer} of {len(lengths)} samples of {source} are longer than "
                f"max_length={limit} (the longest has {max(lengths):,} tokens); set cut: true to "
                "cut their ends off"
            )
    if model is not None:
        _warn_of_single_chunks(max(lengths), config, model, say)


def _warn_of_single_chunks(
    longest: int, config: TrainConfig, model: CometForCausalLM, say: Say
) -> None:
    """Warn where there is nothing to remember, for samples of at most `longest` tokens."""
    own = (model.config.comet_config.chunk_size,)
    stages = config.generated.stages if config.generated is not None else (config,)
    size = min(min((one.chunks or config.chunks).sizes or own) for one in stages)
    if longest <= size:
        say(
            f"warning: no sample is longer than one chunk ({size} tokens; the longest has "
            f"{longest}), so the memory is never read and learns nothing"
        )


def _tell_cuts(dataset: Any, config: TrainConfig, records: int, say: Say) -> None:
    """Say how many samples lost their ends, and how many all that was to be learned."""
    cut = sum(length == config.max_length for length in _lengths(dataset))
    if cut or len(dataset) < records:
        say(
            f"{cut} of {records} samples end at max_length={config.max_length}, and "
            f"{records - len(dataset)} had nothing to learn before it and are left out"
        )
