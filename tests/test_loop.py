"""The loop without trl: the same steps, stopped and gone on, in small files."""

import json

import pytest
import torch

import cometlm
import recipe as gpu_recipe
from cometlm.checkpoints.atomic_write import read_weights
from cometlm.train import gates
from cometlm.train import loop as plain
from cometlm.train.config_file import config_of
from cometlm.train.loop import PROGRESS, save_split, train_for
from tests.runs import logged, quietly, settings, start
from tests.tiny import error, refused

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.fixture
def options(settings):
    """Questions on the way, a kept backbone, four steps."""
    (text,) = settings["mixture"]["options"]["passkey"]["corpora"]
    mixture = {**settings["mixture"], "tokens": [150, 200], "batch_tokens": 400, "ask": "probes"}
    keep = {"tokens": 30, "prose_share": 1.0, "corpora": [text]}
    changes = {"mixture": mixture, "sizes": {"chunk_size": 56}, "keep": keep, "trainer": {}}
    return {**settings, **changes}


def looped(options, **changes):
    """What a loop says of each step."""
    said = []
    config = config_of({**options, **changes})
    train_for(config, 5, device="cpu", log=said.append)
    return [line for line in said if line.startswith("step")]


def figures(line):
    words = line.split()
    return {name: float(value) for name, value in zip(words[2:-3:2], words[3:-2:2], strict=True)}


def test_its_steps_are_those_of_a_run(options, tmp_path):
    """Of losses and weights."""
    lines = looped(options, output=str(tmp_path / "loop"))
    config = config_of(
        {**options, "trainer": {"logging_steps": 1, "disable_tqdm": True}, "output": str(tmp_path)}
    )
    quietly(config)
    assert len(lines) == 4
    for line, row in zip(lines, logged(tmp_path), strict=True):
        ours = figures(line)
        for name in ("loss", "text_loss", "answer_loss", "keep_loss"):
            assert ours[name] == pytest.approx(float(row[name]), rel=2e-3), name
        assert ours["norm"] == pytest.approx(float(row["grad_norm"]), rel=2e-2)
    ids = torch.arange(5, 90)[None]
    models = [
        cometlm.load(str(f), device="cpu")[0] for f in (tmp_path / "loop" / "step-4", tmp_path)
    ]
    with torch.no_grad():
        assert error(models[0](ids).logits, models[1](ids).logits) < 1e-3


@pytest.mark.parametrize(("whiten", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_it_goes_on_where_it_was_stopped(options, tmp_path, whiten, dropout):
    """After a crash, or because its time is over; whitened gates alone begin anew."""
    options["gates"] = {"whiten": whiten, "batches": 1}
    if dropout:
        options |= {"mode": "lora", "lora": {"r": 2, "dropout": dropout}}
    whole = looped(options, output=str(tmp_path / "whole"))
    config = config_of({**options, "output": str(tmp_path / "parts")})

    def crash(line):
        if line.startswith("step 3"):
            raise OSError("the machine is gone")

    with pytest.raises(OSError, match="gone"):
        train_for(config, 5, device="cpu", log=crash)
    assert json.loads((tmp_path / "parts" / PROGRESS).read_text())["steps"] == 2
    assert train_for(config, 0, device="cpu", log=lambda line: None) == 2
    lines = looped(options, output=str(tmp_path / "parts"))
    assert [line.split()[1] for line in lines] == ["3", "4"]
    assert figures(lines[0])["loss"] == figures(whole[2])["loss"]
    if not whiten:
        assert figures(lines[1]) == figures(whole[3])
        weights = [
            read_weights(tmp_path / f / "step-4" / "model.safetensors") for f in ("whole", "parts")
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "progress.json", "step-4", "train.json",
    ]  # fmt: skip
    with refused("holds a run with other settings (seed: was 0, is 1)"):
        looped(options, output=str(tmp_path / "parts"), seed=1)


def test_a_run_that_is_over_is_left_as_it_is(options, tmp_path):
    options |= {"gates": {"whiten": True, "batches": 3}, "output": str(tmp_path)}
    looped(options)
    saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = []
    assert train_for(config_of(options), 5, device="cpu", log=said.append) == 4
    assert said == ["all 4 steps are done"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == saved


def test_gates_look_at_as_many_batches_near_the_end(options, tmp_path, monkeypatch):
    """Cut as training cuts them: chunk plans are drawn by the numbers of their batches."""
    numbers = []
    read = gates._read

    def noted(model, batch, chunking):
        numbers.append(chunking.batches)
        read(model, batch, chunking)

    monkeypatch.setattr(gates, "_read", noted)
    config = config_of(
        {**options, "gates": {"whiten": True, "batches": 3}, "output": str(tmp_path)}
    )

    def stop(line):
        if line.startswith("saved"):
            raise OSError("the machine is gone")

    with pytest.raises(OSError, match="gone"):
        train_for(config, 5, device="cpu", log=stop)
    assert train_for(config, 5, device="cpu", log=lambda line: None) == 4
    assert numbers == [0, 1, 2, 1, 2, 3]


def test_a_checkpoint_holds_everything_once_in_small_files(options, tmp_path):
    looped(options, output=str(tmp_path))
    place = tmp_path / "step-4"
    sizes = {
        str(path.relative_to(place)): path.stat().st_size for path in place.rglob("*.safetensors")
    }
    assert sizes.keys() == {
        "model.safetensors", "lora/adapter_model.safetensors", "moments-00.safetensors",
    }  # fmt: skip
    held = {name: read_weights(place / name) for name in sizes}
    memory, adapter = held["model.safetensors"], held["lora/adapter_model.safetensors"]
    assert all(".comet." in name for name in memory)
    assert all(".lora_" in name for name in adapter)
    room = 40_000  # for the names
    for name, weights in held.items():
        assert sizes[name] < sum(w.nbytes for w in weights.values()) + room
    trained = sum(w.nbytes for w in [*memory.values(), *adapter.values()])
    assert sizes["moments-00.safetensors"] < 2 * trained + room


def test_moments_are_split_into_small_files(tmp_path):
    tensors = {f"w{n}": torch.randn(n, 100) for n in (2, 3, 4, 1, 5)}
    paths = save_split(tensors, tmp_path, largest=2100)
    assert len(paths) == 3
    assert max(path.stat().st_size for path in paths) < 2100 + 600
    found = {}
    for path in paths:
        found |= read_weights(path)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    with refused("w5 takes 2.0 KiB, and a file may have at most 2.0 KiB"):
        save_split(tensors, tmp_path, largest=1999)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "full", "keep": None}, "mode full is not for a loop without trl"),
        ({"records": "a.jsonl", "mixture": None}, "records is not for a loop without trl"),
        ({"trainer": {"packing": True}}, "trainer.packing is not for a loop without trl"),
        ({"chunk_parallel": 2}, "chunk_parallel is not for a loop without trl"),
    ],
)
def test_what_it_does_not_have_is_refused(options, tmp_path, changes, said):
    with refused(said):
        looped(options, **{"output": str(tmp_path), **changes})


@pytest.fixture
def fixed(options):
    """The same task in batches of two shapes."""
    (text,) = options["keep"]["corpora"]
    shapes = [
        {"rows": 2, "chunks": [80, 80]},
        {"rows": 2, "chunks": [80, 80, 80], "since": 1},
    ]
    sizes = {"questions": 1, "width": 64, "answer": 10, "learned": 20, "corpora": [text]}
    kept = {"kept": 2, "kept_width": 24}
    changes = {"sizes": {"chunk_size": 80}, "fixed": {"shapes": shapes, **sizes, **kept}}
    return {**options, **changes, "gates": {"whiten": True, "batches": 2}}


def test_batches_of_fixed_shapes_go_on_as_if_they_had_not_stopped(fixed, tmp_path):
    """All but white gates, whose moments begin anew."""
    fixed = {**fixed, "gates": {}}
    whole = looped(fixed, output=str(tmp_path / "whole"))
    assert len(whole) == 4
    assert figures(whole[0]).keys() >= {"loss", "text_loss", "end_accuracy", "keep_loss"}
    assert len({figures(line)["loss"] for line in whole}) == 4
    again = {**fixed, "output": str(tmp_path / "parts")}
    parts = [stopped(again, 2), looped(again)]
    numbers = [figures(line) for line in [*parts[0], *parts[1]]]
    for ours, line in zip(numbers, whole, strict=True):
        wanted = figures(line)
        for name in ("loss", "answer_loss", "keep_loss", "norm"):
            assert ours[name] == pytest.approx(wanted[name], rel=2e-3, abs=2e-3), name


def stopped(options, steps):
    """What a loop says that is ended after some steps."""
    said = []
    learn = plain._Loop.learn

    def learned(self):
        if self.step == steps:
            raise KeyboardInterrupt
        learn(self)
        self.save()

    config = config_of(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain._Loop, "learn", learned)
        with pytest.raises(KeyboardInterrupt):
            train_for(config, 5, device="cpu", log=said.append)
    return [line for line in said if line.startswith("step")]


def test_white_gates_learn_with_batches_of_fixed_shapes(fixed, tmp_path):
    lines = looped(fixed, output=str(tmp_path / "out"))
    assert len(lines) == 4
    model, _ = cometlm.load(str(tmp_path / "out" / "step-4"), device="cpu")
    found = gates.gates_of(model)
    assert found
    assert all(gate.any() for gate in found.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compile": True}, "compile is not for steps that are recorded"),
        ({"keep": {"behind": 9}}, "keep.behind is not for steps that are recorded"),
        ({"lora": {"r": 2, "dropout": 0.1}}, "lora.dropout is not for steps that are recorded"),
        ({"recompute": {"every": 2}}, "recompute.every is not for steps that are recorded"),
        ({"mixture": None, "records": "x.jsonl"}, "fixed makes batches of a mixture"),
    ],
)
def test_what_steps_of_fixed_shapes_have_not(fixed, changes, said):
    with refused(said):
        config_of({**fixed, **changes})


def test_every_step_needs_a_shape(fixed):
    fixed["fixed"]["shapes"][0]["until"] = 1
    fixed["fixed"]["shapes"][1]["since"] = 3
    with refused("fixed.shapes must have one for every step, got none for 1"):
        config_of(fixed)


def test_trl_has_no_batches_of_fixed_shapes(fixed):
    with refused("fixed is for a recipe that gpu/run.sh trains"):
        quietly(config_of(fixed))


def test_a_loss_that_is_not_finite_ends_it_before_it_is_saved(options, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "keep_loss", lambda model, rows: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="step 1"):
        looped(options, output=str(tmp_path))
    assert not (tmp_path / PROGRESS).exists()


def test_the_script_trains_a_recipe(options, tmp_path, capfd):
    """What is wrong is one line."""
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(options))
    out = tmp_path / "out"
    common = [str(path), "--device", "cpu", "--out", str(out), "--workers", "1"]
    assert gpu_recipe.main([*common, "--set", "mixture.steps=2"]) == 0
    said = capfd.readouterr().out
    assert "tokens/s" in said
    assert f"saved {out}/step-2" in said
    assert "2 steps are done" in said
    model, _ = cometlm.load(str(out / "step-2"), device="cpu")
    assert model.config.comet_config.chunk_size == 56
    assert model.config.trained_for == "the tasks passkey in texts of up to 200 tokens"
    assert gpu_recipe.main([*common, "--set", "mixture.steps=3"]) == 0
    assert f"saved {out}/step-3 " in capfd.readouterr().out
    assert gpu_recipe.main([*common, "--set", "mixture.batch_tokens=300"]) == 1
    assert "other settings (mixture: was" in capfd.readouterr().err
