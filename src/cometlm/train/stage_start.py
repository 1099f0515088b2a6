"""What comes before a step: gates fitted, memories read that batches begin with, moments lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from transformers import TrainerCallback, TrainerState

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.checkpoints.fingerprint import fingerprint
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.train.batches import GeneratedBatches, Said
from cometlm.train.config import Say, TrainConfig
from cometlm.train.histories import Histories
from cometlm.train.stages import Gates
from cometlm.train.start import fit_gates, global_memories

_TOLD_EVERY = 50_000  # tokens; a minute or so on two cores
FITTED = "gates-{}.safetensors"  # in the output, until the run is done


class StageStart:
    """Called before each step, with its number.

    Memories are read again wherever a checkpoint may be, so that a run that goes on from there has
    the same ones. Fitted gates are kept in a file until the run is done: a stage's first checkpoint
    may be far, and fitting takes long.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: CometForCausalLM,
        batches: GeneratedBatches,
        histories: Histories,
        say: Say,
    ) -> None:
        self._config = config
        self._model = model
        self._batches = batches
        self._histories = histories
        self._say = say

    def __call__(self, step: int) -> None:
        """Do what the step needs."""
        stage = self._batches.stage(step)
        for memory in global_memories(self._model):
            memory.gate_flips = stage.gate_flips
        begins = step == 0 or self._batches.stage(step - 1) is not stage
        if stage.gates is not None and begins:
            self._set_gates(step, stage.gates)
        at_checkpoint = step % self._config.save_steps == 0 or not self._histories
        if begins or (stage.history and at_checkpoint):
            if stage.history:
                self._say(f"reading {stage.history:,} tokens that step {step + 1} begins behind")
            texts = self._batches.histories(step, stage.history)
            self._histories.read(self._model, [ids for ids, _ in texts])

    def _set_gates(self, step: int, gates: Gates) -> None:
        """Fit the gates, or take what that came to before the run was stopped."""
        path = Path(self._config.output) / FITTED.format(step)
        origin = self._origin()
        if self._take_gates(path, origin):
            self._say(f"taking the gates that were fitted for step {step + 1}")
            return
        self._say(f"fitting the gates to {gates.texts} texts, before step {step + 1}")
        past = self._telling(self._batches.histories(step, gates.history), "histories")
        texts = self._telling(self._batches.hidden_keys(step), "texts with keys")
        fit_gates(self._model, texts, gates, past)
        self._keep_gates(path, origin)

    def _keep_gates(self, path: Path, origin: str) -> None:
        """Write what was fitted; the run needs it only if it is stopped, so it goes on without."""
        fitted = {name: gate.cpu().contiguous() for name, gate in self._gates().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_bytes(fitted, {"origin": origin}))  # the same by every rank
        except OSError as error:
            self._say(
                f"the fitted gates cannot be kept ({error}); a run that is stopped before its next "
                "checkpoint fits them again"
            )

    def _take_gates(self, path: Path, origin: str) -> bool:
        """Set all gates to what a file holds, or none of them."""
        gates = self._gates()
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("origin") != origin:
                    return False
                kept = {name: file.get_tensor(name) for name in gates}
        except (FileNotFoundError, SafetensorError):
            return False
        for name, gate in gates.items():
            gate.copy_(kept[name])
        return True

    def _gates(self) -> dict[str, torch.Tensor]:
        comet = self._model.model.comet
        return {n: p.detach() for n, p in comet.named_parameters() if n.endswith(".gate")}

    def _origin(self) -> str:
        """Digest of the settings, sizes and weights that gates are fitted with."""
        settings = self._config.to_dict()
        what = {name: settings[name] for name in ("seed", "generated")}
        sizes = self._model.config.comet_config.to_dict()
        weights = fingerprint(self._model.named_parameters())
        return hashlib.sha256(json.dumps([what, sizes, weights]).encode()).hexdigest()

    def _telling(self, texts: Iterator[Said], what: str) -> Iterator[Said]:
        """The same texts; says on the way how many tokens of them were read."""
        read = told = 0
        for text in texts:
            yield text
            read += text[0].numel()
            if read - told >= _TOLD_EVERY:
                told = read
                self._say(f"{read:,} tokens of {what} read")


class FreshOptimizer(TrainerCallback):
    """Empties the optimiser's state before the stages that ask for it."""

    def __init__(self, batches: GeneratedBatches) -> None:
        self._batches = batches

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **others: Any) -> None:
        """Called by the trainer, with its `optimizer`."""
        if self._batches.optimizer_start(state.global_step) == state.global_step:
            others["optimizer"].state.clear()


def forget_gates(output: Path) -> None:
    """Remove what was kept of fitted gates, which the trained memory holds."""
    for path in output.glob(FITTED.format("*")):
        path.unlink()
