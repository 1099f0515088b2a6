"""`cometlm train` stopped anywhere: it goes on, or says why it does not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import cometlm
from cometlm.train import run as running
from cometlm.train.config import LoraSettings
from cometlm.train.config_file import read_config
from cometlm.train.run import train
from cometlm.train.trainer import last_checkpoint
from tests.real import tokenizer
from tests.runs import (
    WORDS,
    as_config,
    heard,
    losses,
    quietly,
    records_run,
    settings,
    settings_of,
    start,
)

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.fixture(scope="module")
def done_once(start, tmp_path_factory):
    """Where the run of `settings` was done; only to be copied."""
    folder = tmp_path_factory.mktemp("done")
    quietly(read_config(as_config(settings_of(start, folder / "out"), folder)))
    return folder / "out"


@pytest.fixture
def done(done_once, settings, tmp_path):
    """The configuration of `settings`, and its run is done."""
    config = read_config(as_config(settings, tmp_path))
    shutil.copytree(done_once, config.output)
    return config


def test_killed_and_resumed_is_the_run_that_was_not(settings, tmp_path):
    """SIGKILL in the fourth step, then the same command again; dropout and moments are alike."""
    settings["lora"] = {"r": 2, "dropout": 0.3}
    whole = read_config(as_config(settings, tmp_path))
    quietly(whole)
    path = as_config(settings, tmp_path, output=str(tmp_path / "killed"))
    command = [sys.executable, "-m", "tests.fault", "0", "forward", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0"}
    killed = subprocess.run(
        [*command, "--device", "cpu"],
        env=environment,
        cwd=Path(__file__).parents[1],
        timeout=600,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    stopped = last_checkpoint(tmp_path / "killed")
    assert stopped == tmp_path / "killed" / "checkpoint-2"
    assert not (tmp_path / "killed" / "trainer_state.json").exists()
    said = heard(read_config(path))
    assert said[0] == f"going on from {stopped}"
    got, wanted = losses(tmp_path / "killed"), losses(whole.output)
    assert sorted(wanted) == [1, 2, 3, 4]
    assert got == wanted


def test_a_checkpoint_that_a_crash_cut_short_is_passed_over(done):
    newest, older = Path(done.output, "checkpoint-4"), Path(done.output, "checkpoint-2")
    assert last_checkpoint(done.output) == newest
    (newest / "trainer_state.json").write_text('{"epoch": 1, "glob')
    assert last_checkpoint(done.output) == older


def test_a_run_from_before_lora_could_be_left_out(settings, tmp_path):
    """Its settings name what is now the default; adapters that nobody trains do not matter."""
    del settings["lora"]
    settings["mixture"]["steps"] = 2
    config = read_config(as_config(settings, tmp_path))
    quietly(config)
    path = Path(config.output, "train.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora": asdict(LoraSettings())}))
    quietly(config)
    with pytest.raises(ValueError, match="lora: was"):
        quietly(replace(config, lora=LoraSettings(r=3)))


def test_another_configuration_is_not_resumed(done):
    with pytest.raises(ValueError, match=r"learning_rate: was 0\.001, is 0\.002"):
        quietly(replace(done, learning_rate=2e-3, seed=1))


def test_a_run_that_was_stopped_after_a_restart_goes_on_from_itself(done, settings, tmp_path):
    """And what stood there before is kept, an adapter too, where it is in nobody's way."""
    output = Path(done.output)
    second = read_config(as_config(settings, tmp_path, mode="memory", learning_rate=5e-4))
    said = heard(second, restart=True)
    assert any("earlier-1" in line for line in said)
    assert (output / "earlier-1" / "lora").is_dir()
    assert last_checkpoint(output / "earlier-1").name == "checkpoint-4"
    assert not (output / "lora").exists()
    (output / "checkpoint-4" / "trainer_state.json").unlink()  # as if stopped before
    train(second, device="cpu", log=said.append)
    assert any(line == f"going on from {output / 'checkpoint-2'}" for line in said)
    model, _ = cometlm.load(str(output), device="cpu", merge=False)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="which a restart clears"):
        quietly(read_config(as_config(settings, tmp_path, model=str(output))), restart=True)


def test_what_changes_learning_in_trl_or_recomputation_is_not_resumed(done, settings, tmp_path):
    for changes, said in (
        ({"trainer": {**settings["trainer"], "weight_decay": 0.1}}, "trainer: was"),
        ({"recompute": {"truncate_after": 2}}, "recompute: was 0, is 2"),
    ):
        with pytest.raises(ValueError, match=said):
            quietly(read_config(as_config(settings, tmp_path, **changes)))
    free = {"trainer": {**settings["trainer"], "logging_steps": 3}, "recompute": {"every": 2}}
    quietly(read_config(as_config(settings, tmp_path, **free)))
    Path(done.output, "train.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoint-4 but no train\.json"):
        quietly(done)


def test_a_run_that_is_done_stays_as_it_is(done):
    before = (Path(done.output) / "model.safetensors").read_bytes()
    said = heard(done)
    assert any("all 4 steps are done" in line for line in said)
    assert (Path(done.output) / "model.safetensors").read_bytes() == before
    assert sorted(losses(done.output)) == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_best_checkpoint_is_loaded_whole(settings, tmp_path, monkeypatch, mode):
    def worse_and_worse(trainer, *_, **__):
        return {"eval_loss": float(trainer.state.global_step)}

    monkeypatch.setattr(running.CometTrainer, "evaluate", worse_and_worse)
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": WORDS * 3}) + "\n")
    trainer = {**settings["trainer"], "max_steps": 2, "load_best_model_at_end": True}
    changes = {"evaluate": str(tmp_path / "held.jsonl"), "save_steps": 1, "mode": mode}
    rows = [{"text": WORDS * 3}] * 4
    config = records_run(settings, tmp_path, rows, **changes, trainer=trainer, learning_rate=1e-2)
    model = quietly(config).eval()
    first = Path(config.output, "checkpoint-1")
    best, _ = cometlm.load(str(first), device="cpu", dtype=model.dtype, merge=False)
    ids = torch.tensor([tokenizer("smollm2").encode(WORDS * 3)])
    for again in (False, True):
        if again:  # also where the folder stands elsewhere now
            moved = shutil.move(config.output, tmp_path / "moved")
            model = quietly(replace(config, output=str(moved))).eval()
        with torch.no_grad():
            got, wanted = model(ids).logits, best(ids).logits
        assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_a_model_without_checkpoints_is_not_written_over(done, settings, tmp_path):
    output = Path(done.output)
    before = (output / "model.safetensors").read_bytes()
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for config in (done, replace(done, learning_rate=2e-3)):
        with pytest.raises(ValueError, match="holds a model, and no checkpoint to go on from"):
            quietly(config)
    assert (output / "model.safetensors").read_bytes() == before


def test_a_run_may_have_more_steps_and_no_other_samples(done, settings, tmp_path):
    def changed(**changes):
        mixture = {**settings["mixture"], **changes}
        return read_config(as_config(settings, tmp_path, mixture=mixture))

    with pytest.raises(ValueError, match="mixture: was"):
        quietly(changed(text_share=0.25))
    quietly(changed(steps=6))
    assert sorted(losses(done.output)) == list(range(1, 7))


def test_further_steps_learn_at_the_rates_of_the_new_schedule(settings, tmp_path, monkeypatch):
    """The first of them, too; the old schedule ended at 0."""
    rates = []
    step = running.CometTrainer.training_step

    def noted(trainer, *args):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        return step(trainer, *args)

    monkeypatch.setattr(running.CometTrainer, "training_step", noted)
    for steps, place in ((2, "out"), (4, "out"), (4, "whole")):
        changes = {"mixture": {**settings["mixture"], "steps": steps}, "warmup": 0}
        output = str(tmp_path / place)
        quietly(read_config(as_config(settings, tmp_path, **changes, output=output)))
    assert len(rates) == 2 + 2 + 4
    assert rates[2:4] == rates[-2:]
