"""A training run from its configuration to a checkpoint: what `cometlm train` does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.compat import ACTIVATION_CHECKPOINTING
from cometlm.config import position_limit
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.data.records import read_records
from cometlm.parallel.p2p import PipelineError
from cometlm.train.arguments import typed
from cometlm.train.chunk_parallel import alone
from cometlm.train.config import Log, TrainConfig
from cometlm.train.gates import WhitenedGates, whitened_gates
from cometlm.train.keep import KeepBatches, answers_for
from cometlm.train.lengths import (
    check_enough_chunks,
    check_lengths,
    tell_cuts,
    warn_of_single_chunks,
)
from cometlm.train.mixture import MixtureBatches, collate
from cometlm.train.prepare import chunking_of, prepare
from cometlm.train.resume import SETTINGS, check_free, check_same, set_aside
from cometlm.train.samples import Samples
from cometlm.train.trainer import CometTrainer, last_checkpoint, steps_done


def train(
    config: TrainConfig, *, device: str | None = None, restart: bool = False, log: Log = print
) -> CometForCausalLM:
    """Train, going on from the last checkpoint in `config.output` if there is one.

    Args:
        restart: begin anew; what `config.output` holds of another run moves to a folder in it.
        log: called with what a person should know.

    Returns:
        The trained model, which is saved in `config.output`.

    Raises:
        ValueError: data that cannot be trained on, an output with checkpoints of another
            configuration or with a model and none, or batches of fixed shapes, which only
            `train.loop` has.
        FloatingPointError: the loss or its gradient is not finite.
        OSError: something cannot be read or written.
    """
    if config.fixed is not None:
        raise ValueError("fixed is for a recipe that gpu/run.sh trains (docs/gpu.md): leave it out")
    output = Path(config.output)
    if restart and Path(config.model).resolve().is_relative_to(output.resolve()):
        raise ValueError(f"model {config.model} lies in output {output}, which a restart clears")
    checkpoint = None if restart else last_checkpoint(output)
    if checkpoint is not None:
        check_same(output, config, checkpoint)
        log(f"going on from {checkpoint}")
    elif not restart:
        check_free(output)
    going_on = checkpoint is not None
    model, tokenizer, is_new = prepare(config, device=device, going_on=going_on, log=log)
    try:
        trainer = make_trainer(config, model, tokenizer, log)
    except (RuntimeError, ImportError) as error:  # trl and its reporters: something is missing
        if isinstance(error, PipelineError):
            raise
        raise ValueError(f"the trainer cannot be made: {error}") from error
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        if restart:
            set_aside(output, log)
        write_whole(output / SETTINGS, json.dumps(config.to_dict(), indent=2).encode())
    if checkpoint is not None and 0 < trainer.args.max_steps <= steps_done(checkpoint):
        log(f"all {trainer.args.max_steps} steps are done")
        trainer.take(checkpoint)
    else:
        if config.gates.whiten:
            trainer.gates = _whitened(config, trainer, model, tokenizer, going_on)
            if is_new and not going_on:
                trainer.gates.start(config.gates.start)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output / "trainer_state.json"))
    return model


def make_trainer(
    config: TrainConfig, model: CometForCausalLM, tokenizer: Any, log: Log = print
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
    chunking = chunking_of(config.chunks, tokenizer, config.seed)
    common |= {"chunking": chunking, "whole": config.mode == "full"}
    if config.mixture is not None:
        mixture = config.mixture
        arguments = _arguments(config, model.device, steps=mixture.steps)
        groups = max(1, arguments.world_size // config.chunk_parallel)
        per_step = arguments.gradient_accumulation_steps * groups
        batches = MixtureBatches(mixture, tokenizer, config.seed, per_step)
        if not 0 < arguments.max_steps <= mixture.steps:
            raise ValueError(
                f"trainer.max_steps must lie in 1 … mixture.steps={mixture.steps}, got "
                f"{arguments.max_steps}: there are no more batches"
            )
        batches.check(model.config.comet_config.chunk_size)
        common |= _keeping(config, model, tokenizer, arguments, batches.questions, log)
        warn_of_single_chunks(mixture.tokens[1], config, model, log)
        return CometTrainer(
            **common,
            args=arguments,
            train_dataset=_as_dataset(batches),
            data_collator=collate,
            answer_weight=mixture.answer_weight,
            in_order=True,
        )
    assert config.records is not None
    records = read_records(config.records)
    arguments = _arguments(config, model.device)
    common |= _keeping(config, model, tokenizer, arguments, list, log)
    samples = Samples(tokenizer, arguments, special=config.special)
    learned = bool(config.trainer.get("assistant_only_loss", True))  # of a conversation
    measured = read_records(config.evaluate) if config.evaluate else None
    trainer = CometTrainer(
        **common,
        args=arguments,
        train_dataset=samples.of(records, str(config.records), learned),
        eval_dataset=measured and samples.of(measured, str(config.evaluate), learned),
    )
    check_lengths(trainer.train_dataset, config, model, log)
    if config.cut and not arguments.packing:
        tell_cuts(trainer.train_dataset, config, len(records), log)
    if trainer.eval_dataset is not None:
        check_lengths(trainer.eval_dataset, config)
    check_enough_chunks(trainer.train_dataset, config, model.config.comet_config.chunk_size)
    return trainer


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
        ACTIVATION_CHECKPOINTING: recompute.enabled,
        f"{ACTIVATION_CHECKPOINTING}_kwargs": {
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
    chosen = typed(config.trainer)
    if config.trainer.get("packing") and not (config.max_length and config.cut):
        raise ValueError(
            "trainer.packing fills rows of max_length tokens and cuts what is longer: set "
            "max_length, and cut: true"
        )
    try:
        arguments = SFTConfig(**{**options, **chosen})
    except TypeError as error:  # of fields that are more than numbers
        raise ValueError(f"trainer has a value that trl cannot take: {error}") from error
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one model is one stream of memory: ranks, not threads, share work
    return arguments


def _as_dataset(batches: MixtureBatches) -> Dataset:
    """Batches as the kind of dataset that trl takes; each is made when it is asked for."""

    def make(columns: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = [batches[number] for number in columns["batch"]]
        names = dict.fromkeys(name for one in made for name in one)
        return {name: [one.get(name) for one in made] for name in names}

    return Dataset.from_dict({"batch": list(range(len(batches)))}).with_transform(make)


def _keeping(
    config: TrainConfig,
    model: CometForCausalLM,
    tokenizer: Any,
    arguments: SFTConfig,
    questions: Callable[[], list[str]],
    log: Log,
) -> dict[str, Any]:
    """What holds the model to its backbone, as arguments of the trainer.

    Args:
        questions: gives those of the run's tasks.
    """
    settings = config.keep
    if settings is None:
        return {}
    with arguments.main_process_first(local=False, desc="the backbone's answers"):
        folder = Path(config.output)
        answered = answers_for(model, tokenizer, settings, questions, folder, log)
    longest = model.config.comet_config.chunk_size
    positions = position_limit(model._backbone.config)
    batches = KeepBatches(settings, tokenizer, answered, longest, config.seed, positions)
    return {"keep": batches, "keep_weight": settings.weight}


def _whitened(
    config: TrainConfig,
    trainer: CometTrainer,
    model: CometForCausalLM,
    tokenizer: Any,
    going_on: bool,
) -> WhitenedGates:
    """Gates that learn where all is white; the first rank looks, and all read its file."""
    dataset: Any = trainer.train_dataset
    batches = (trainer.data_collator([dataset[number]]) for number in range(len(dataset)))
    chunking = chunking_of(config.chunks, tokenizer, config.seed)
    with trainer.args.main_process_first(local=False, desc="what gates look at"), alone(model):
        known = going_on or not trainer.is_world_process_zero()
        folder = Path(config.output)
        return whitened_gates(model, config.gates, batches, chunking, folder, known)
