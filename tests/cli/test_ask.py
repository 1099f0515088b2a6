"""`cometlm ask`: answers from a kept session, which finds its model by itself."""

import json
from pathlib import Path

import pytest
import torch

from cometlm import load
from cometlm.cli import console
from tests.cli.said import GREEDY, TEXT, kept, new_session, one_line

SMALL = {"chunk_size": 20, "readout_tokens": 3, "stride": 4, "capacity": 5}
pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.fixture
def saved(command, model):
    new_session(model, TEXT[:700]).save("s")
    return "s"


def test_ask_answers_and_changes_nothing(command, loads, model, saved):
    before = Path(saved).read_bytes()
    want = kept(saved, model).ask("Which ship?", max_new_tokens=9, **GREEDY)
    for _ in range(2):
        code, out, err = command("ask", saved, "Which ship?", "--max-new-tokens", "9")
        assert (code, out) == (0, want + "\n")
        assert "untrained" in err
    assert Path(saved).read_bytes() == before
    name, options = loads[0]
    assert name == "tiny"
    assert options["dtype"] == torch.float64
    assert options["chunk_size"] == 12
    assert options["capacity"] == 5


def test_ask_says_what_the_memory_was_trained_for(command, model, saved, monkeypatch):
    monkeypatch.setattr(model.config, "name_or_path", "a checkpoint")
    monkeypatch.setattr(model.config, "trained_for", "names of ships")
    code, _, err = command("ask", saved, "Which ship?", "--max-new-tokens", "2")
    assert code == 0
    assert "The memory was trained for names of ships.\n" in err
    assert "untrained" not in err


def test_ask_raw_goes_on_from_the_prompt(command, model, saved):
    want = kept(saved, model).ask("Which", template=False, max_new_tokens=9, **GREEDY)
    assert command("ask", saved, "Which", "--raw", "--max-new-tokens", "9")[:2] == (0, want + "\n")
    piped = command("ask", saved, "-", "--raw", "--max-new-tokens", "9", stdin="Which")
    assert piped[:2] == (0, want + "\n")


def test_ask_samples_the_same_with_a_seed(command, saved):
    options = ["--temperature", "1.5", "--top-p", "0.95", "--max-new-tokens", "9"]
    answers = [
        command("ask", saved, "Why?", *options, "--seed", seed)[:2] for seed in ("7", "7", "8")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_ask_with_the_model_named(command, loads, saved):
    assert command("ask", saved, "Why?", "--model", "moved", "--max-new-tokens", "2")[0] == 0
    assert loads[0][0] == "moved"


def test_ask_a_session_that_does_not_know_its_model(command, loads, monkeypatch, model):
    monkeypatch.setattr(model.config, "backbone", "")
    new_session(model, TEXT[:300]).save("s")
    code, _, err = command("ask", "s", "Why?")
    assert code == 1
    assert "give it with --model" in one_line(err)
    assert not loads


def test_a_folder_named_like_a_built_in_model_is_not_taken_for_it(
    command, loads, monkeypatch, model
):
    monkeypatch.setattr(model.config, "backbone", "smollm2")
    Path("smollm2").mkdir()
    new_session(model, TEXT[:300]).save("s")
    assert command("ask", "s", "Why?", "--max-new-tokens", "2")[0] == 0
    assert loads[0][0] == "smollm2"


def test_ask_what_is_no_session(command, loads, text_file, tmp_path):
    for name in ("nowhere", str(text_file), str(tmp_path)):
        code, out, err = command("ask", name, "Why?")
        assert (code, out) == (1, "")
        assert name in one_line(err)
    assert not loads


def test_ask_a_session_with_sizes_that_are_none(command, saved):
    """A hostile file: one line, whatever it says of its model."""
    for sizes in ("{oops", "[1]", '{"chunk_size": "12"}', '{"device": "cuda"}', '{"name": 1}'):
        raw = Path(saved).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        document = json.loads(header["__metadata__"]["cometlm"])
        document["model"]["sizes"] = sizes
        header["__metadata__"]["cometlm"] = json.dumps(document)
        new = json.dumps(header).encode()
        Path("hostile").write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
        code, out, err = command("ask", "hostile", "Why?")
        assert (code, out) == (1, ""), sizes
        assert "hostile" in one_line(err), sizes


def test_a_session_finds_its_model_from_another_folder(
    command, monkeypatch, on_disk, text_file, tmp_path
):
    """Read with a relative path, sizes and a dtype; asked from elsewhere with nothing but it."""
    monkeypatch.setattr(console, "load", load)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    options = [*sizes, "--dtype", "float64", "--device", "cpu"]
    code, _, err = command("read", "tiny-model", "text.txt", "--save", "s", *options)
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = command("ask", "../s", "Why?", "--max-new-tokens", "5", "--device", "cpu")
    assert code == 0, err
    assert out.strip()
    backbone, _ = load(str(on_disk), device="cpu", dtype=torch.float64, **SMALL)
    want = new_session(backbone, TEXT).ask("Why?", max_new_tokens=5, **GREEDY)
    assert out == want + "\n"


def test_a_session_of_a_checkpoint_finds_it(command, monkeypatch, on_disk, text_file, tmp_path):
    monkeypatch.setattr(console, "load", load)
    made, _ = load(str(on_disk), device="cpu", **SMALL)
    made.save_pretrained("trained")
    code, _, err = command("read", "trained", "text.txt", "--save", "s", "--device", "cpu")
    assert code == 0, err
    code, out, err = command("ask", "s", "Why?", "--max-new-tokens", "5", "--device", "cpu")
    assert code == 0, err
    assert out.strip()
    assert "untrained" not in err


def test_a_damaged_checkpoint_is_one_line(command, monkeypatch, on_disk, text_file):
    monkeypatch.setattr(console, "load", load)
    made, _ = load(str(on_disk), device="cpu", **SMALL)
    made.save_pretrained("trained")
    weights = Path("trained/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-5])
    code, _, err = command("read", "trained", "text.txt", "--device", "cpu")
    assert code == 1
    assert "trained" in one_line(err)
