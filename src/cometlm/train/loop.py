"""A mixture trained for some minutes, with torch and peft alone: for a machine that is only lent.

The same model, batches, losses and learning rates as `train.run`, in a plain loop that stops in
time and leaves what a next one goes on from, in small files: a checkpoint whose adapter is in
`lora/` alone, and the optimiser's moments. It needs neither trl, datasets nor accelerate.

What differs: gates are whitened anew each time, by what they look at then, and their moments begin
anew with that; a run that goes on is otherwise the one that did not stop.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from cometlm.checkpoints.atomic_write import read_weights, write_whole
from cometlm.checkpoints.memory import check_can_save, save_model
from cometlm.config import position_limit
from cometlm.core.recording import Recorder
from cometlm.device import readable_bytes
from cometlm.train.config import Log, StepShape, TrainConfig
from cometlm.train.fixed_batches import FixedBatch, FixedBatches
from cometlm.train.fixed_step import REPORTED, FixedStep, Weights
from cometlm.train.gates import WhitenedGates, gates_of, whitening_for
from cometlm.train.keep import KEEP, KeepBatches, answers_for, keep_loss
from cometlm.train.mixture import MixtureBatches, collate, probes_of
from cometlm.train.prepare import Prepared, chunking_of, prepare, restore
from cometlm.train.probes import ANSWERS, asking
from cometlm.train.resume import SETTINGS, differing
from cometlm.train.trainable import parameter_groups

PROGRESS = "progress.json"  # says which step's folder is whole; written after it
MOMENTS = "moments-{:02}.safetensors"
LARGEST = 15 << 20  # bytes of a file of moments: some transfers take no more than 16 MiB
_SPARE = 10.0  # seconds to save in
_RECENT = 50  # steps, the slowest of which says how long a further one may take
_TRL = "trainer.max_grad_norm"
_CLIP = 1.5


def train_for(
    config: TrainConfig,
    minutes: float,
    *,
    device: str | None = None,
    workers: int = 0,
    log: Log = print,
) -> int:
    """Train until the time or the steps are over, going on from what the output folder holds.

    Args:
        minutes: for all of it, loading and saving included.
        workers: processes that make batches ahead; 0 makes them in between.
        log: called with a line for each step, and with what is written.

    Returns:
        Steps done so far, of `config.mixture.steps`.

    Raises:
        ValueError: settings that this loop does not have, or others than those of the folder.
        FloatingPointError: a loss or gradient is not finite; nothing was saved since the last time.
        OSError: something cannot be read or written.
    """
    end = time.monotonic() + 60 * minutes - _SPARE
    _check(config)
    assert config.mixture is not None
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    progress = _progress(folder, config)
    done = int(progress.get("steps", 0))
    if done >= config.mixture.steps:
        log(f"all {done} steps are done")
        return done
    prepared = prepare(config, device=device, going_on=done > 0, log=log)
    check_can_save(prepared.model, backbone=False)
    if done:
        restore(prepared.model, _place(folder, done), whole=False)
        log(f"going on after step {done}")
    loop = _Loop(config, prepared, done, workers, log)
    while loop.step < config.mixture.steps and time.monotonic() + loop.foreseen < end:
        loop.learn()
    loop.save()
    return loop.step


class _Loop:
    """One stretch of a run."""

    def __init__(
        self, config: TrainConfig, prepared: Prepared, done: int, workers: int, log: Log
    ) -> None:
        mixture = config.mixture
        assert mixture is not None
        self.config, self.model, self.tokenizer = config, prepared.model, prepared.tokenizer
        self.step, self.tokens = done, 0
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._saved: int | None = None
        self._log, self._folder, self._weight = log, Path(config.output), mixture.answer_weight
        self._batches = MixtureBatches(mixture, self.tokenizer, config.seed)
        self._batches.check(self.model.config.comet_config.chunk_size)
        self._keep = self._keeping()
        self._chunking = chunking_of(config.chunks, self.tokenizer, config.seed)
        self._fixed: FixedBatches | None = None
        self._steps: dict[StepShape, FixedStep] = {}
        self._recorder = Recorder(warm_ups=1)
        if config.fixed is not None:
            args = (mixture, config.fixed, self.tokenizer, self._keep, config.seed)
            self._fixed = FixedBatches(*args)
        self.optimizer = self._new_optimizer(prepared.is_new)
        self._load_moments()
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, config.warmup, mixture.steps, last_epoch=done - 1
        )
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.train()
        recompute = config.recompute
        if recompute.enabled and self._fixed is None:
            options = {"every": recompute.every, "truncate_after": recompute.truncate_after}
            self.model.activation_checkpointing_enable(options, offload=recompute.offload)
        self._coming = iter(
            DataLoader(
                self._fixed or self._batches,  # type: ignore[arg-type]  # what a dataset needs
                batch_size=1,
                sampler=range(done, len(self._batches)),
                collate_fn=collate if self._fixed is None else _only,
                num_workers=workers,
            )
        )

    @property
    def foreseen(self) -> float:
        """Seconds that a further step may take."""
        return max(self._seconds, default=0.0)

    # --- one step -----------------------------------------------------------------------------

    def learn(self) -> None:
        """One batch forward and backward, and a step of the optimiser."""
        start = time.monotonic()
        batch = next(self._coming)
        if isinstance(batch, FixedBatch):
            read, parts = batch.ids.numel(), self._fixed_step(batch)
        else:
            read = batch["input_ids"].numel()
            # What dropout draws depends on the step, not on where this stretch of the run began.
            torch.manual_seed(self.config.seed + self.step)
            loss, parts = self._loss(batch)
            loss.backward()
        clip = float(self.config.trainer.get("max_grad_norm", _CLIP))
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, clip))
        if not math.isfinite(norm) or not math.isfinite(parts["loss"]):
            raise FloatingPointError(
                f"the loss is {parts['loss']} and the gradient's norm {norm}; step {self.step + 1}"
            )
        self.optimizer.step()
        self.schedule.step()
        self.model.zero_grad()
        seconds = time.monotonic() - start
        self.step += 1
        self.tokens += read
        self._seconds.append(seconds)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in parts.items())
        self._log(f"step {self.step}  {shown}  norm {norm:.2f}  {read / seconds:,.0f} tokens/s")
        if self.step % self.config.save_steps == 0:
            self.save()

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The whole loss of a batch, and its parts for the log."""
        self._chunking.batches = self.step
        self.model.training_plan = replace(self.model.training_plan, chunking=self._chunking)
        probes = probes_of(batch)
        inputs: dict[str, Any] = {**batch, **({"close_last": True} if probes else {})}
        with asking(self.model, probes):
            out = self.model(**inputs, use_cache=False)
        loss, parts = out.loss, {"text_loss": out.loss}
        if out.observed:
            score = out.observed[ANSWERS]
            loss = loss + self._weight * score.mean
            parts |= {ANSWERS: score.mean, "answer_accuracy": score.accuracy}
        if self._keep is not None and self.config.keep is not None:
            parts[KEEP] = keep_loss(self.model, self._keep[self.step])
            loss = loss + self.config.keep.weight * parts[KEEP]
        return loss, {n: float(x.detach()) for n, x in {"loss": loss, **parts}.items()}

    def _fixed_step(self, batch: FixedBatch) -> dict[str, float]:
        """Leaves gradients, as `_loss` and a backward pass; the parts of the loss for the log."""
        assert self._fixed is not None
        assert self.config.fixed is not None
        shape = self._fixed.shape(self.step)
        if shape not in self._steps:
            keep = self.config.keep.weight if self.config.keep is not None else 0.0
            weights = Weights(self._weight, keep)
            args = (self.config.fixed.learned, batch, weights, self._recorder)
            self._steps[shape] = FixedStep(self.model, shape, *args)
        return dict(zip(REPORTED, self._steps[shape](batch).tolist(), strict=True))

    # --- what it begins with ------------------------------------------------------------------

    def _keeping(self) -> KeepBatches | None:
        settings = self.config.keep
        if settings is None:
            return None
        args = (self.model, self.tokenizer, settings, self._batches.questions, self._folder)
        answered = answers_for(*args, self._log)
        longest = self.model.config.comet_config.chunk_size
        if self.config.fixed is not None:
            longest = min(longest, self.config.fixed.kept_width)
        seed, positions = self.config.seed, position_limit(self.model._backbone.config)
        return KeepBatches(settings, self.tokenizer, answered, longest, seed, positions)

    def _new_optimizer(self, is_new: bool) -> AdamW:
        config = self.config
        groups = parameter_groups(
            self.model,
            config.learning_rate,
            config.memory_factor,
            gate_factor=config.gate_factor,
        )
        fused = self.model.device.type != "cpu"
        if not config.gates.whiten:
            return AdamW(groups, betas=(0.9, 0.999), fused=fused)
        # The batches ahead; as many at a run's end, where they are those that were learned last.
        last = min(self.step + config.gates.batches, len(self._batches))
        first = max(0, last - config.gates.batches)
        seen = (self._looked_at(number) for number in range(first, last))
        args = (self.model, seen, self._chunking, config.gates.shrinkage)
        whitening = whitening_for(*args, first=first)
        gates = WhitenedGates(gates_of(self.model), whitening)
        if is_new and not self.step:
            gates.start(config.gates.start)
        optimizer = AdamW(gates.stand_in(groups), betas=(0.9, 0.999), fused=fused)
        gates.watch(optimizer)
        return optimizer

    def _looked_at(self, number: int) -> dict[str, Tensor]:
        """A batch that gates are whitened by."""
        if self._fixed is None:
            return collate([self._batches[number]])
        return {"input_ids": self._fixed.long_ids(number)}

    # --- what it leaves -----------------------------------------------------------------------

    def save(self) -> None:
        """Write weights and moments, then how far it came, and say what each file takes."""
        if self._saved == self.step:
            return
        place = _place(self._folder, self.step)
        save_model(self.model, place, adapter_twice=False)
        self.tokenizer.save_pretrained(place)
        written = save_split(self._moments(), place)
        write_whole(self._folder / SETTINGS, json.dumps(self.config.to_dict(), indent=2).encode())
        progress = {"steps": self.step, "moments": len(written)}
        write_whole(self._folder / PROGRESS, json.dumps(progress).encode())
        for other in self._folder.glob(_place(Path(), "*").name):  # now that nothing names it
            if other != place:
                shutil.rmtree(other)
        sizes = ", ".join(
            f"{file.relative_to(place)} {readable_bytes(file.stat().st_size)}"
            for file in sorted(place.rglob("*.safetensors"))
        )
        self._saved = self.step
        self._log(f"saved {place} ({self.tokens:,} tokens this time): {sizes}")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights whose moments are kept, by name."""
        whitened = gates_of(self.model) if self.config.gates.whiten else {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in whitened:
                yield name, parameter

    def _moments(self) -> dict[str, Tensor]:
        kept = {}
        for name, parameter in self._named():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                kept[f"{name}/{part}"] = value.detach().cpu().contiguous()
        return kept

    def _load_moments(self) -> None:
        """Those of the stretch before; gates that are whitened begin anew."""
        count = _read_progress(self._folder).get("moments", 0) if self.step else 0
        kept: dict[str, Tensor] = {}
        for number in range(count):
            kept |= read_weights(_place(self._folder, self.step) / MOMENTS.format(number))
        for name, parameter in self._named():
            own = {n.rpartition("/")[2]: x for n, x in kept.items() if n.rpartition("/")[0] == name}
            if own:
                # The step is counted on the CPU unless the optimiser is a fused one.
                there = self.optimizer.defaults["fused"]
                self.optimizer.state[parameter] = {
                    part: x.to(parameter.device) if x.dim() or there else x
                    for part, x in own.items()
                }
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])


def save_split(tensors: dict[str, Tensor], folder: Path, largest: int = LARGEST) -> list[Path]:
    """Write tensors into as many files as it takes for none to be larger than this.

    Raises:
        ValueError: one tensor is larger.
        OSError: a file cannot be written.
    """
    files: list[dict[str, Tensor]] = []
    left = 0
    for name, value in tensors.items():
        if value.nbytes > largest:
            raise ValueError(
                f"{name} takes {readable_bytes(value.nbytes)}, and a file may have at most "
                f"{readable_bytes(largest)}"
            )
        if value.nbytes > left or not files:
            files.append({})
            left = largest
        files[-1][name] = value
        left -= value.nbytes
    paths = [folder / MOMENTS.format(number) for number in range(len(files))]
    for path, part in zip(paths, files, strict=True):
        write_whole(path, to_bytes(part))
    return paths


def _only(batches: list[FixedBatch]) -> FixedBatch:
    (batch,) = batches
    return batch


def _check(config: TrainConfig) -> None:
    """Refuse settings that this loop does not have.

    Raises:
        ValueError: names one.
    """
    unknown = {f"trainer.{name}" for name in config.trainer} - {_TRL}
    clashing = {
        "records": config.records is not None,
        "mode full": config.mode == "full",
        "chunk_parallel": config.chunk_parallel > 1,
        "shard_weights": config.shard_weights,
        **dict.fromkeys(sorted(unknown), True),
    }
    for name in (name for name, is_set in clashing.items() if is_set):
        raise ValueError(
            f"{name} is not for a loop without trl: leave it out, or use cometlm train"
        )


def _progress(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """How far an earlier stretch came.

    Raises:
        ValueError: it had other settings; names them.
    """
    progress = _read_progress(folder)
    if progress and (others := differing(folder, config)):
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(others)}): use them, or another "
            "output"
        )
    return progress


def _place(folder: Path, step: int | str) -> Path:
    """Where a run's weights and moments after a step are."""
    return folder / f"step-{step}"


def _read_progress(folder: Path) -> dict[str, Any]:
    path = folder / PROGRESS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
