"""Training runs of tiny models, for tests of what they do."""

import json
from pathlib import Path

import pytest
import yaml

from cometlm.train.config_file import read_config
from cometlm.train.run import train
from tests.real import tiny_comet, tokenizer

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
    """A run of four steps on samples of a task, with a checkpoint after each second."""
    return settings_of(start, tmp_path / "out")


def settings_of(start, output):
    """The same in another folder, for runs that several tests share."""
    return {
        "model": str(start),
        "output": str(output),
        "mode": "lora",
        "lora": {"r": 2},
        "learning_rate": 1e-3,
        "save_steps": 2,
        "chunks": {"plans": {"random": 1, "fixed": 1}, "sizes": [6, 12]},
        "mixture": {
            "tasks": {"passkey": 1.0},
            "options": {"passkey": {"corpora": [str(start / "text.txt")]}},
            "steps": 4,
            "tokens": [60, 80],
            "batch_tokens": 240,
            "text_share": 0.5,
        },
        "trainer": {"logging_steps": 1, "disable_tqdm": True},
    }


def as_config(settings, folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}))
    return path


def quietly(config, **options):
    return train(config, device="cpu", log=lambda _: None, **options)


def heard(config, **options):
    """What a run says."""
    said = []
    train(config, device="cpu", log=said.append, **options)
    return said


def logged(folder):
    """A row for each step."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def losses(folder):
    """What each step logged: its loss, and how many tokens had been read."""
    return {row["step"]: (row["loss"], row["num_tokens"]) for row in logged(folder)}


def rates(folder):
    return [row["learning_rate"] for row in logged(folder)]


def records_run(settings, folder, rows, **changes):
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {name: value for name, value in settings.items() if name != "mixture"}
    more = {"trainer": {**settings["trainer"], "max_steps": 2}}
    return read_config(as_config(plain, folder, records=str(data), **{**more, **changes}))
