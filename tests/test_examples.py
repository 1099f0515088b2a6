"""The scripts in `examples/`, each run as a user runs it, with a tiny random model."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cometlm
from tests import real

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
TRAIN = {"attach_and_train", "sft_lora"}  # they take a backbone, `--steps` and `--out`


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny backbone, and of a checkpoint: a tiny random memory with its backbone."""
    folder = tmp_path_factory.mktemp("models")
    backbone = real.save_backbone(folder / "backbone")
    real.tiny_comet().float().save_pretrained(folder / "checkpoint", backbone=True)
    real.tokenizer("smollm2").save_pretrained(folder / "checkpoint")
    return {"backbone": backbone, "checkpoint": folder / "checkpoint"}


def run(script, folder, *arguments):
    paths = os.pathsep.join([str(Path(cometlm.__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script, models, tmp_path):
    if script.stem in TRAIN:
        out = tmp_path / "trained"
        said = run(script, tmp_path, "--model", models["backbone"], "--steps", 2, "--out", out)
        assert "train_loss" in said
        assert (out / "model.safetensors").exists()
    elif script.stem == "read_and_ask":
        file = ("--file", textwrap.__file__)
        said = run(script, tmp_path, "--model", models["checkpoint"], *file)
        assert "tokens read" in said
    else:
        said = run(script, tmp_path, "--model", models["checkpoint"])
    if script.stem == "fork_and_save":
        assert "loaded:  True" in said
    if script.stem == "sft_lora":  # what it leaves can be read
        model, _ = cometlm.load(str(tmp_path / "trained"), device="cpu")
        assert model.config.comet_config.chunk_size == 64
    assert said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_examples_are_short_and_listed(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    assert f"({script.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
