"""trl's `SFTTrainer` with what a memory needs: its learning rate, chunk plans, safe checkpoints.

An unmodified `SFTTrainer` or `transformers.Trainer` trains a model with memory too. This one adds:
a loss that never holds more logits than one chunk's, a learning rate for the memory, chunk plans
that a resumed run draws again, a stop at the first loss that is not finite, and checkpoints of
everything that was trained.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from cometlm.checkpoints.memory import check_can_save
from cometlm.checkpoints.weights import saved_names
from cometlm.compat import leave_to_itself
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.parallel.p2p import PipelineError, answering
from cometlm.parallel.shard import clip_gradients, gathered, gathered_state, shard, shard_state
from cometlm.train.chunk_parallel import (
    SharedBatches,
    alone,
    average_gradients,
    shard_over,
    share_samples,
)
from cometlm.train.chunk_plans import Chunking
from cometlm.train.gates import WhitenedGates
from cometlm.train.keep import KEEP, KeepBatches, keep_loss
from cometlm.train.mixture import probes_of
from cometlm.train.prepare import restore
from cometlm.train.probes import ANSWERS, asking
from cometlm.train.resume import STATE
from cometlm.train.trainable import parameter_groups


class CometTrainer(SFTTrainer):
    """`SFTTrainer` for a model with memory.

    Args:
        memory_factor: the memory's learning rate as a multiple of the others'.
        gate_factor: the gates' learning rate as a multiple of the memory's.
        chunking: where samples are cut, or None for the model's own plan.
        answer_weight: what the answers' loss counts beside the text's, where batches have probes.
        keep: rows that hold the model to its backbone, a batch for each batch that is learned.
        keep_weight: what their loss counts beside the text's.
        in_order: take the samples in their order.
        whole: save the backbone too, since it is trained.
        chunk_parallel: ranks that share each sample (`torchrun`), see `train.chunk_parallel`.
        shard_weights: shard weights, gradients and the optimiser's state over the others (FSDP2).
        alike: what all ranks must have the same, by name.
        others: `SFTTrainer`'s own.

    Attributes:
        gates: how gates learn; None: as all else does. To be set before `train`.
    """

    def __init__(
        self,
        *,
        memory_factor: float = 5.0,
        gate_factor: float = 1.0,
        chunking: Chunking | None = None,
        answer_weight: float = 1.0,
        keep: KeepBatches | None = None,
        keep_weight: float = 1.0,
        in_order: bool = False,
        whole: bool = False,
        chunk_parallel: int = 1,
        shard_weights: bool = False,
        alike: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self._factors = (memory_factor, gate_factor)
        self._chunking = chunking
        self._answer_weight = answer_weight
        self._keep, self._keep_weight = keep, keep_weight
        self.gates: WhitenedGates | None = None
        self._in_order = in_order
        self._whole = whole
        self._micro_steps = (-1, 0)  # the step, and how many of its batches came before this one
        self._sharing = chunk_parallel
        self._sharded = shard_weights
        self._inputs: dict[str, Any] = {}  # of the last batch, to name it
        self._gathered: dict[str, Tensor] | None = None
        super().__init__(**others)
        check_can_save(self._comet, whole)
        self._mesh: DeviceMesh | None = None
        if chunk_parallel > 1 or shard_weights:
            timeout = timedelta(seconds=self.args.ddp_timeout)
            self._mesh = share_samples(self._comet, chunk_parallel, alike or {}, timeout)
        if shard_weights and self._mesh is not None:
            shard_over(self._mesh)

    @property
    def _comet(self) -> CometForCausalLM:
        return cast("CometForCausalLM", self.accelerator.unwrap_model(self.model))

    # --- optimisation -----------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser that `args` names, with a learning rate of its own for the memory."""
        if self.optimizer is None:
            if self._sharded and self._mesh is not None:
                shard(self._comet, self._mesh)
                leave_to_itself(self)
            model = cast("PreTrainedModel", self.model if model is None else model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            memory, gate = self._factors
            groups = parameter_groups(model, rate, memory, decay, gate)
            if self.gates is not None:
                groups = self.gates.stand_in(groups)
            self.optimizer = kind(groups, **options)
            if self.gates is not None:
                self.gates.watch(self.optimizer)
        return cast("torch.optim.Optimizer", self.optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = cast("Any", train_dataset or self.train_dataset)
        sampler: Sampler[Any] | None
        if self._in_order:
            sampler = SequentialSampler(dataset)
        elif self._sharing > 1:  # all ranks must draw alike, also after a resume
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            sampler = SeedableRandomSampler(dataset, data_seed=seed)
        else:
            sampler = super()._get_train_sampler(train_dataset)
        if self._sharing > 1:
            assert sampler is not None
            return SharedBatches(sampler, self.args.per_device_train_batch_size, self._sharing)
        return sampler

    def train(self, *args: Any, **options: Any) -> Any:
        """See `Trainer.train`.

        Raises:
            FloatingPointError: a loss or gradient is not finite; the weights have not moved then.
            PipelineError: another rank does not answer; names it, the cell and the step.
        """
        chunking = self._comet.training_plan.chunking
        try:
            with answering("a call of all ranks") if self._mesh else nullcontext():
                return super().train(*args, **options)
        except PipelineError as error:
            saved = last_checkpoint(self.args.output_dir)
            where = f"step {self.state.global_step + 1}, the last checkpoint is {saved or 'none'}"
            raise PipelineError(f"{error}; {where}") from error
        finally:
            self._plan(chunking=chunking)

    # --- one step ---------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """One batch forward and backward, cut as its number says.

        Raises:
            FloatingPointError: the loss is not finite; names the step and the sample.
        """
        self._inputs = inputs
        step = self.state.global_step
        self._micro_steps = (step, self._micro_steps[1] + 1 if self._micro_steps[0] == step else 0)
        self._place_chunking()
        try:
            loss = cast("Tensor", super().training_step(model, inputs, *args))
            value = float(loss.detach())
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._where()}") from error
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}; {self._where()}")
        if self._sharded and self._mesh is not None and self.accelerator.sync_gradients:
            average_gradients(self._comet, self._mesh)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """See `Trainer._clip_grad_norm`."""
        if not self._sharded:
            return super()._clip_grad_norm(model)
        return clip_gradients(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> Any:
        """The gradient's norm, before the optimiser's step.

        Raises:
            FloatingPointError: it is not finite; a scaler for float16 deals with that itself.
        """
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}; {self._where()}")
        return norm

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Nothing waits for the last batch of a step: each one's gradients are summed at once."""
        yield

    def _place_chunking(self) -> None:
        """Draw as a run would that came here without a stop."""
        if self._chunking is None:
            return
        self._chunking.batches = self._batch
        self._plan(chunking=self._chunking)

    def _plan(self, **changes: Any) -> None:
        """Change the model's training plan."""
        self._comet.training_plan = replace(self._comet.training_plan, **changes)

    @property
    def _batch(self) -> int:
        """The number of the batch that is learned now, over all groups."""
        step, seen = self._micro_steps
        group = self.accelerator.process_index // self._sharing
        return (step * self.args.gradient_accumulation_steps + seen) * self._groups + group

    @property
    def _groups(self) -> int:
        """How many samples are read at once."""
        return int(self.accelerator.num_processes) // self._sharing

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, which holds one chunk's logits, and its accuracy for the log."""
        mode = "train" if model.training else "eval"
        inputs = dict(inputs)
        probes = probes_of(inputs)
        if probes:
            inputs["close_last"] = True  # so that they are asked at the end of the text too
        together = nullcontext() if mode == "train" else alone(self._comet)
        with together, asking(self._comet, probes):
            out = model(**{**inputs, "use_cache": False}, num_items_in_batch=num_items_in_batch)
        loss = out.loss
        sharing = self._sharing if mode == "train" else 1
        # Each rank of a group has a part of the loss, and all count the labels of the whole; the
        # gradients' mean over all ranks is to be their sum over a group.
        loss = loss * sharing
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged over these
        # A text's loss is a part of the whole step's then; others are means of their batch.
        is_shared = mode == "train" and num_items_in_batch is not None
        # At the end of an epoch a step may have fewer batches than others.
        shares = self.current_gradient_accumulation_steps if is_shared else 1
        kept = self._kept() if mode == "train" else None
        if kept is not None or (probes and out.observed):
            self._metrics[mode]["text_loss"].append(float(loss.detach()) * shares)
        if kept is not None:
            self._metrics[mode][KEEP].append(float(kept.detach()))
            loss = loss + self._keep_weight * kept / shares
        if probes and out.observed:
            for name, score in out.observed.items():
                self._metrics[mode][name].append(float(score.mean.detach()) * sharing)
                weight = self._answer_weight if name == ANSWERS else 1.0
                loss = loss + weight * score.mean * sharing / shares
            if ANSWERS in out.observed:
                accuracy = float(out.observed[ANSWERS].accuracy.detach()) * sharing
                self._metrics[mode]["answer_accuracy"].append(accuracy)
        counted = (inputs["labels"][:, 1:] != -100).sum()
        num_correct, counted = self.accelerator.gather_for_metrics(
            torch.stack([out.num_correct.to(counted.device) * sharing, counted])[None]
        ).sum(0)
        self._metrics[mode]["mean_token_accuracy"].append(float(num_correct) / max(1, int(counted)))
        if mode == "train":
            read = self.accelerator.gather_for_metrics(
                torch.tensor([inputs["input_ids"].numel()], device=loss.device)
            )
            self._total_train_tokens += int(read.sum()) // sharing
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return (loss, out) if return_outputs else loss

    def _kept(self) -> Tensor | None:
        """How far the model is from its backbone; ranks of a group all say the same."""
        if self._keep is None:
            return None
        with alone(self._comet):
            return keep_loss(self._comet, self._keep[self._batch])

    def _where(self) -> str:
        """The step and the beginnings of the batch's samples, for a person to find them by."""
        ids = self._inputs["input_ids"]
        (rows, width), saved = ids.shape, last_checkpoint(self.args.output_dir)
        texts = "; ".join(repr(text) for text in self._tokenizer.batch_decode(ids[:, :24]))
        return (
            f"step {self.state.global_step + 1}, a batch of {rows} × {width} tokens that begin "
            f"{texts}; the last checkpoint is {saved or 'none'}"
        )

    # --- checkpoints ------------------------------------------------------------------------

    def save_model(self, *args: Any, **options: Any) -> None:
        """See `Trainer.save_model`; of sharded weights, the first rank saves whole ones."""
        if self._sharded:
            saved = saved_names(self._comet, self._whole)
            self._gathered = gathered(self._comet, saved.__contains__, keep=self.args.should_save)
        super().save_model(*args, **options)
        self._gathered = None

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None of trl's, which shows how to load a whole model: the memory comes with its own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        state_dict = self._gathered if state_dict is None else state_dict
        self._comet.save_pretrained(folder, state_dict=state_dict, backbone=self._whole)
        self._tokenizer.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = gathered_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self._load_sharded(checkpoint)
        if checkpoint is not None:
            self._follow_schedule()

    def _load_sharded(self, checkpoint: str) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), "cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(shard_state(self.optimizer, state))
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _follow_schedule(self) -> None:
        """Have the next step learn at this run's rate; the checkpoint's is of its own last step."""
        schedule: Any = self.lr_scheduler
        if self.optimizer is None or not isinstance(schedule, LambdaLR):
            return  # others know no rate but the one before
        rates = [
            base * share(schedule.last_epoch)
            for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """See `Trainer._save_checkpoint`.

        Raises:
            OSError: it cannot be written; says which checkpoint is the last one.
        """
        self.state.num_input_tokens_seen = int(self._total_train_tokens)
        try:
            super()._save_checkpoint(*args, **options)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
            if self._mesh is not None and not isinstance(error, OSError):
                raise  # of a lost rank, which is named above
            saved = last_checkpoint(self.args.output_dir)
            raise OSError(
                f"the checkpoint of step {self.state.global_step} cannot be written ({error}); the "
                f"last one is {saved or 'none'}"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self._comet, resume_from_checkpoint, whole=self._whole)
        self._total_train_tokens = tokens_seen(Path(resume_from_checkpoint))

    def take(self, checkpoint: Path) -> None:
        """Be where a run that ended with a checkpoint is, without a further step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            best = checkpoint.parent / Path(self.state.best_model_checkpoint).name
            if best.is_dir():  # wherever the run stands now
                self.state.best_model_checkpoint = str(best)
                self._load_best_model()

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        restore(self._comet, self.state.best_model_checkpoint, whole=self._whole)


def last_checkpoint(output: str | Path | None) -> Path | None:
    """The newest whole checkpoint of a run; one that a crash cut short is passed over."""
    found: list[tuple[int, Path]] = []
    for folder in Path(output or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        with contextlib.suppress(OSError, ValueError):
            found.append((steps_done(folder), folder))
    return max(found)[1] if found else None


def steps_done(checkpoint: Path) -> int:
    """Optimiser steps of a whole checkpoint.

    Raises:
        OSError, ValueError: it is not whole.
    """
    return int(_state(checkpoint)["global_step"])


def tokens_seen(checkpoint: Path) -> int:
    """Tokens that a run had trained on at a checkpoint."""
    return int(_state(checkpoint)["num_input_tokens_seen"])


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state
