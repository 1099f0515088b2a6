"""What an output folder holds of an earlier run: whether to go on with it, or to move it away."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cometlm.checkpoints.memory import BACKBONE, LORA, WEIGHTS
from cometlm.train.config import Log, LoraSettings, TrainConfig
from cometlm.train.config_file import config_of
from cometlm.train.gates import FILE as WHITENING

SETTINGS = "train.json"
STATE = "trainer_state.json"  # the Trainer writes it last: a checkpoint that has it is whole
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


def check_same(output: Path, config: TrainConfig, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of another configuration; it may have more steps left.

    Raises:
        ValueError: names the fields that differ, with both values.
    """
    try:
        found = differing(output, config)
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
    if found:
        raise ValueError(
            f"{output} holds checkpoints of another configuration ({'; '.join(found)}); "
            "use --restart to begin anew, or another output"
        )


def check_free(output: Path) -> None:
    """Refuse to write over a model that has no checkpoint to go on from.

    Raises:
        ValueError: there is one.
    """
    if (output / WEIGHTS).exists():
        raise ValueError(
            f"{output} holds a model, and no checkpoint to go on from; use --restart to move it "
            f"to {EARLIER}-… in that folder and begin anew, or another output"
        )


def differing(output: Path, config: TrainConfig) -> list[str]:
    """Settings that decide what is learned and are others than a folder's, with both values.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: its settings are damaged.
    """
    # Through the class, so that fields that are newer than the file have their defaults.
    values = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    before, now = (
        _decisive(json.loads(json.dumps(one.to_dict()))) for one in (config_of(values), config)
    )
    return [
        f"{name}: was {before.get(name)!r}, is {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]


def set_aside(output: Path, log: Log = print) -> None:
    """Move what an earlier run left into a folder beside the new one's files, settings last.

    Raises:
        OSError: it cannot be moved.
    """
    parts = (WEIGHTS, "config.json", BACKBONE, LORA, STATE, WHITENING, SETTINGS)
    left = sorted(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    left += [output / part for part in parts]
    left = [path for path in left if path.exists()]
    if not left:
        return
    names = (output / f"{EARLIER}-{number}" for number in itertools.count(1))
    folder = next(name for name in names if not name.exists())
    folder.mkdir()
    for path in left:
        path.rename(folder / path.name)
    log(f"what {output} held is in {folder} now")


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """What steps are learned by, of a run's settings."""
    settings = {name: value for name, value in settings.items() if name not in _FREE}
    if settings["mixture"]:
        settings["mixture"] = {n: v for n, v in settings["mixture"].items() if n != "steps"}
    usual = json.loads(json.dumps(dataclasses.asdict(LoraSettings())))
    settings["lora"] = (settings["lora"] or usual) if settings["mode"] == "lora" else None
    settings["recompute"] = settings["recompute"]["truncate_after"]
    settings["trainer"] = {
        name: value
        for name, value in settings["trainer"].items()
        if not name.startswith(_FREE_OF_TRL)
    }
    return settings
