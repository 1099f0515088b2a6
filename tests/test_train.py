"""`cometlm train`: runs that stop anywhere and go on, bad data, bad luck."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import cometlm
from cometlm.train import run as running
from cometlm.train.config import TrainConfig, read_config
from cometlm.train.lora import set_trainable
from cometlm.train.run import train
from cometlm.train.trainer import last_checkpoint
from tests.real import tiny_comet, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")

WORDS = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters. "


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny model that has a memory, its backbone and SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    tiny_comet().float().save_pretrained(folder, backbone=True)
    tokenizer("smollm2").save_pretrained(folder)
    (folder / "text.txt").write_text(WORDS * 200)
    return folder


@pytest.fixture
def settings(start, tmp_path):
    """A run of eight steps on generated samples in two stages."""
    stage = {"steps": 4, "tokens": [90, 110], "batch_tokens": 240, "passkey": 0.5}
    return {
        "model": str(start),
        "output": str(tmp_path / "out"),
        "mode": "lora",
        "lora": {"r": 2},
        "learning_rate": 1e-3,
        "save_steps": 2,
        "chunks": {"plans": {"random": 1, "fixed": 1}, "sizes": [6, 12]},
        "generated": {
            "texts": [str(start / "text.txt")],
            "code": [],
            "stages": [stage, {**stage, "learning_rate": 5e-4}],
        },
        "trainer": {"logging_steps": 1, "disable_tqdm": True},
    }


def as_config(settings, folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def quietly(config, **options):
    return train(config, device="cpu", say=lambda _: None, **options)


def losses(folder):
    """What each step logged: its loss, and how many tokens had been read."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    return {row["step"]: (row["loss"], row["num_tokens"]) for row in rows}


def records_run(settings, folder, rows, **changes):
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {name: value for name, value in settings.items() if name != "generated"}
    more = {"trainer": {**settings["trainer"], "max_steps": 2}}
    return read_config(as_config(plain, folder, records=str(data), **{**more, **changes}))


# --- the whole way ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "lora", "full"])
def test_a_run_trains_what_its_mode_says_and_saves_it(settings, start, tmp_path, mode):
    config = read_config(as_config(settings, tmp_path, mode=mode))
    before = dict(cometlm.load(str(start), device="cpu", dtype=torch.float32)[0].named_parameters())
    trained = quietly(config).eval()
    saved, _ = cometlm.load(config.output, device="cpu", dtype=trained.dtype, merge=False)
    for name, parameter in trained.named_parameters():
        if ".lora_" in name:  # trained in float32, and loaded in the backbone's dtype
            parameter.data = parameter.data.to(trained.dtype)
    ids = torch.tensor([tokenizer("smollm2").encode(WORDS * 3)])
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, trained(ids).logits)
    moved = {
        n
        for n, p in trained.named_parameters()
        if n in before and (p != before[n].to(p.dtype)).any()
    }
    comet = {name for name in before if ".comet." in name}
    assert moved & comet
    assert (moved <= comet) == (mode == "memory" or mode == "lora")
    assert any(".lora_" in name for name, _ in trained.named_parameters()) == (mode == "lora")


def test_killed_and_resumed_is_the_run_that_was_not(settings, tmp_path):
    """SIGKILL in the middle; then the same command again."""
    whole = read_config(as_config(settings, tmp_path))
    quietly(whole)
    path = as_config(settings, tmp_path, output=str(tmp_path / "killed"))
    command = [sys.executable, "-c", "from cometlm.cli.main import run; run()", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--device", "cpu"], env=environment)
    deadline = time.monotonic() + 120
    while last_checkpoint(tmp_path / "killed") is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = last_checkpoint(tmp_path / "killed")
    assert stopped is not None
    assert not (tmp_path / "killed" / "trainer_state.json").exists()
    said = []
    train(read_config(path), device="cpu", say=said.append)
    assert said[0].startswith("going on from ")
    got, wanted = losses(tmp_path / "killed"), losses(whole.output)
    assert sorted(wanted) == list(range(1, 9))
    assert got == wanted


def test_a_checkpoint_that_a_crash_cut_short_is_passed_over(settings, tmp_path):
    config = read_config(as_config(settings, tmp_path))
    quietly(config)
    newest, older = Path(config.output, "checkpoint-8"), Path(config.output, "checkpoint-6")
    assert last_checkpoint(config.output) == newest
    (newest / "trainer_state.json").write_text('{"epoch": 1, "glob')
    assert last_checkpoint(config.output) == older


def test_another_configuration_is_not_resumed(settings, tmp_path):
    config = read_config(as_config(settings, tmp_path))
    quietly(config)
    changed = read_config(as_config(settings, tmp_path, learning_rate=2e-3, seed=1))
    with pytest.raises(ValueError, match=r"learning_rate: was 0\.001, is 0\.002"):
        quietly(changed)
    quietly(changed, restart=True)


def test_stages_that_have_not_begun_may_change(settings, tmp_path):
    config = read_config(as_config(settings, tmp_path))
    quietly(config)
    (Path(config.output) / "checkpoint-8" / "trainer_state.json").unlink()  # stopped at step 6
    stages = settings["generated"]["stages"]

    def changed(first, last):
        generated = {**settings["generated"], "stages": [first, *last]}
        return read_config(as_config(settings, tmp_path, generated=generated))

    with pytest.raises(ValueError, match="generated: was"):
        quietly(changed({**stages[0], "passkey": 0.25}, stages[1:]))
    longer = [{**stages[1], "steps": 3}, {**stages[1], "steps": 2, "passkey": 1.0}]
    quietly(changed(stages[0], longer))
    assert sorted(losses(config.output)) == list(range(1, 10))


def test_records_are_trained_with_the_assistants_words_only(settings, tmp_path):
    talk = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "Salt."}]
    rows = [{"uniq_id": i, "messages": json.dumps(talk)} for i in range(4)]
    config = records_run(settings, tmp_path, rows)
    model, words = cometlm.load(config.model, device="cpu", dtype=torch.float32)
    set_trainable(model, "memory")
    own = words.chat_template
    trainer = running.make_trainer(config, model, words)
    row = trainer.train_dataset[0]
    assert words.decode([i for i in row["labels"] if i != -100]) == "Salt.<|im_end|>"
    assert words.chat_template == own
    trainer.train()


# --- bad data and bad luck ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learnin_rate": 1}, "unknown field learnin_rate; there are model, output"),
        ({"mode": "all"}, "mode must be one of memory, lora, full, got 'all'"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"learning_rate": 0}, "learning_rate must be more than 0, got 0.0"),
        ({"records": "x"}, "either records or generated"),
        ({"generated": None}, "either records or generated"),
        ({"generated": {"stages": [{"steps": 1}]}}, "generated.stages.0.tokens is missing"),
        ({"lora": {"r": 1.5}}, "lora.r must be int, got 1.5"),
        ({"chunks": {"sizes": 3}}, "chunks.sizes must be a list, got 3"),
    ],
    ids=str,
)
def test_bad_configurations_name_the_field(settings, tmp_path, changes, said):
    with pytest.raises(ValueError, match="(?s).*" + said.replace(".", r"\.")):
        read_config(as_config(settings, tmp_path, **changes))


def test_changes_on_the_command_line(settings, tmp_path):
    path = as_config(settings, tmp_path)
    changes = ["learning_rate=3e-4", "generated.stages.1.steps=7", "lora.dropout=0.1"]
    config = read_config(path, changes)
    assert (config.learning_rate, config.lora.dropout) == (3e-4, 0.1)
    assert [stage.steps for stage in config.generated.stages] == [4, 7]
    with pytest.raises(ValueError, match="must look like key=value, got 'seed'"):
        read_config(path, ["seed"])


def test_a_plan_or_a_trainer_field_that_does_not_exist(settings, tmp_path):
    with pytest.raises(ValueError, match="unknown chunk plan 'fix'"):
        quietly(read_config(as_config(settings, tmp_path, chunks={"plans": {"fix": 1}})))
    with pytest.raises(ValueError, match=r"trainer\.max_step is no field"):
        quietly(read_config(as_config(settings, tmp_path, trainer={"max_step": 1})))


def test_long_samples_are_cut_only_if_told_to(settings, tmp_path):
    rows = [{"text": WORDS * n} for n in (1, 3, 4)]
    config = records_run(settings, tmp_path, rows, max_length=50)
    with pytest.raises(
        ValueError, match=r"2 of 3 samples are longer than max_length=50 .*cut: true"
    ):
        quietly(config)
    quietly(records_run(settings, tmp_path, rows, max_length=50, cut=True))


def test_a_warning_where_no_sample_exceeds_a_chunk(settings, tmp_path):
    said = []
    config = records_run(settings, tmp_path, [{"text": "The ship left."}] * 4)
    train(config, device="cpu", say=said.append)
    assert any("no sample is longer than one chunk (12 tokens" in line for line in said)


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path, monkeypatch):
    """Step and sample are named, and the last good checkpoint stays."""
    config = read_config(as_config(settings, tmp_path))
    place = running.CometTrainer._place_plans

    def poison(self):
        place(self)
        if self.state.global_step == 5:
            with torch.no_grad():
                self._comet.model.comet.readout.fill_(float("nan"))

    monkeypatch.setattr(running.CometTrainer, "_place_plans", poison)
    with pytest.raises(FloatingPointError, match=r"step 6, .* checkpoint is .*checkpoint-4"):
        quietly(config)
    monkeypatch.undo()
    model, _ = cometlm.load(str(last_checkpoint(config.output)), device="cpu")
    assert all(p.isfinite().all() for p in model.parameters())
    quietly(config)  # and goes on from there


def test_a_full_disk_while_saving_loses_nothing(settings, tmp_path, monkeypatch):
    config = read_config(as_config(settings, tmp_path))
    save = torch.save

    def full(value, path, *args, **options):
        if "checkpoint-6" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises((OSError, RuntimeError), match="No space left"):
        quietly(config)
    assert last_checkpoint(config.output) == Path(config.output, "checkpoint-4")
    monkeypatch.undo()
    quietly(config)
    assert sorted(losses(config.output)) == list(range(1, 9))


def test_configurations_survive_json():
    config = TrainConfig(model="m", output="o", records="r")
    assert json.loads(json.dumps(config.to_dict()))["chunks"]["plans"] == {"fixed": 1.0}
