"""Training runs on several ranks and on one, for tests of whether they are the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cometlm.checkpoints.atomic_write import read_weights
from cometlm.checkpoints.memory import WEIGHTS
from cometlm.train.config_file import read_config
from cometlm.train.run import train
from tests.ranks import run_ranks
from tests.real import tiny_comet, tokenizer
from tests.runs import WORDS
from tests.tiny import error

STEPS = 4  # and a checkpoint after half of them


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of a few steps; plain descent, so that a difference in gradients is one in weights.

    In float64: this random model's gradients in float32 are right to 1e-3 at best, in one process.
    """
    folder = tmp_path_factory.mktemp("start")
    tiny_comet().float().save_pretrained(folder, backbone=True)
    tokenizer("smollm2").save_pretrained(folder)
    (folder / "text.txt").write_text(WORDS * 200)
    return {
        "model": str(folder),
        "dtype": "float64",
        "mode": "full",
        "learning_rate": 0.002,
        "memory_factor": 1.0,
        "save_steps": STEPS // 2,
        "chunks": {"plans": {"random": 1, "fixed": 1}, "sizes": [6, 12]},
        "mixture": {
            "tasks": {"passkey": 1.0},
            "options": {"passkey": {"corpora": [str(folder / "text.txt")]}},
            "steps": STEPS,
            "tokens": [60, 80],
            "batch_tokens": 240,
            "text_share": 0.5,
        },
        "trainer": {
            "logging_steps": 1,
            "disable_tqdm": True,
            "optim": "sgd",
            "max_grad_norm": 1.0,
            "save_total_limit": 4,
            "use_cpu": True,
        },
    }


def trained(path, *changes):
    """Train as a configuration and changes say; what the run says."""
    said = []
    train(read_config(path, changes), device="cpu", log=said.append)
    return said


def trained_on(ranks, path, *changes):
    """The same on several ranks; what each says."""
    return run_ranks(ranks, trained, path, *changes)


def stop_at_half(folder):
    """Leave what a run leaves that is stopped after its first checkpoint."""
    for late in (f"checkpoint-{STEPS}", WEIGHTS, "trainer_state.json"):
        path = Path(folder, late)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def figures(folder):
    """What each step logged."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    names = ("loss", "mean_token_accuracy", "num_tokens", "grad_norm")
    return [[float(row[name]) for name in names] for row in rows]


def assert_same_run(ours, theirs):
    assert len(figures(ours)) == len(figures(theirs)) == STEPS
    for got, wanted in zip(figures(ours), figures(theirs), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)
    got, wanted = (read_weights(Path(folder) / WEIGHTS) for folder in (ours, theirs))
    for name, weight in wanted.items():
        assert error(got[name], weight) < 1e-6, name
