"""`cometlm import`: checkpoints of the authors' release."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cometlm import CometForCausalLM
from tests.cli.said import one_line
from tests.tiny import GOLDEN, load_golden


@pytest.fixture
def published(tmp_path):
    _, tensors, config = load_golden(GOLDEN[0])
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    save_file(weights, folder / "model.safetensors")
    return tensors


def test_import_makes_a_checkpoint(command, published):
    code, out, err = command("import", "theirs", "ours")
    assert (code, out) == (0, "")
    assert "saved ours" in err
    model = CometForCausalLM.from_pretrained("ours")
    with torch.no_grad():
        logits = model(published["input_ids"][None]).logits[0]
    assert torch.allclose(logits, published["logits"], atol=1e-4)


def test_import_overwrites_nothing(command, published):
    Path("ours").mkdir()
    Path("ours/mine").write_text("mine")
    for there in ("ours", "ours/mine"):
        code, _, err = command("import", "theirs", there)
        assert code == 1
        assert "is there already" in one_line(err)
    assert [path.name for path in Path("ours").iterdir()] == ["mine"]


DAMAGE = {
    "no folder": lambda: shutil.rmtree("theirs"),
    "no config": lambda: Path("theirs/config.json").unlink(),
    "a config that is no JSON": lambda: Path("theirs/config.json").write_text("{oops"),
    "a config that is a list": lambda: Path("theirs/config.json").write_text("[]"),
    "no weights": lambda: Path("theirs/model.safetensors").unlink(),
    "truncated weights": lambda: os.truncate("theirs/model.safetensors", 900),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_import_of_what_is_none_is_one_line(command, published, case):
    DAMAGE[case]()
    code, out, err = command("import", "theirs", "ours")
    assert (code, out) == (1, "")
    assert "theirs" in one_line(err)
    assert not Path("ours").exists()
