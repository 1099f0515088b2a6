"""`cometlm train`: runs that stop anywhere and go on, bad data, bad luck."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

import cometlm
from cometlm.train import run as running
from cometlm.train import stage_start
from cometlm.train.config import TrainConfig
from cometlm.train.config_file import read_config
from cometlm.train.lora import set_trainable
from cometlm.train.run import train
from cometlm.train.trainer import last_checkpoint
from tests.real import tiny_comet, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")

RECIPES = Path(__file__).parent.parent / "recipes"
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


def test_lora_settings_are_not_for_a_model_with_adapters(settings, start, tmp_path):
    model, words = cometlm.load(str(start), device="cpu")
    set_trainable(model, "lora", cometlm.lora_config(r=2))
    model.save_pretrained(tmp_path / "adapted", backbone=True)
    words.save_pretrained(tmp_path / "adapted")
    adapted = as_config(settings, tmp_path, model=str(tmp_path / "adapted"))
    with pytest.raises(ValueError, match=r"lora is for new adapters, and model .*adapted goes on"):
        quietly(read_config(adapted))


def test_killed_and_resumed_is_the_run_that_was_not(settings, tmp_path):
    """SIGKILL in the middle, then the same command again; dropout draws as it would have."""
    settings["lora"] = {"r": 2, "dropout": 0.3}
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


def test_a_run_that_was_stopped_after_a_restart_goes_on_from_itself(settings, tmp_path):
    """And what stood there before is kept, an adapter too, where it is in nobody's way."""
    first = read_config(as_config(settings, tmp_path, mode="lora"))
    quietly(first)
    output = Path(first.output)
    second = read_config(as_config(settings, tmp_path, mode="memory", learning_rate=5e-4))
    said = []
    train(second, device="cpu", say=said.append, restart=True)
    assert any("earlier-1" in line for line in said)
    assert (output / "earlier-1" / "lora").is_dir()
    assert last_checkpoint(output / "earlier-1").name == "checkpoint-8"
    assert not (output / "lora").exists()
    (output / "checkpoint-8" / "trainer_state.json").unlink()  # as if stopped before
    train(second, device="cpu", say=said.append)
    assert any(line == f"going on from {output / 'checkpoint-6'}" for line in said)
    model, _ = cometlm.load(str(output), device="cpu", merge=False)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="which a restart clears"):
        quietly(read_config(as_config(settings, tmp_path, model=str(output))), restart=True)


def test_what_changes_learning_in_trl_or_recomputation_is_not_resumed(settings, tmp_path):
    config = read_config(as_config(settings, tmp_path))
    quietly(config)
    for changes, said in (
        ({"trainer": {**settings["trainer"], "weight_decay": 0.1}}, "trainer: was"),
        ({"recompute": {"truncate_after": 2}}, "recompute: was 0, is 2"),
    ):
        with pytest.raises(ValueError, match=said):
            quietly(read_config(as_config(settings, tmp_path, **changes)))
    free = {"trainer": {**settings["trainer"], "logging_steps": 3}, "recompute": {"every": 2}}
    quietly(read_config(as_config(settings, tmp_path, **free)))
    Path(config.output, "train.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoint-8 but no train\.json"):
        quietly(config)


def test_a_run_that_is_done_stays_as_it_is(settings, tmp_path):
    rows = [{"text": WORDS * n} for n in (2, 3, 4, 5)]
    config = records_run(settings, tmp_path, rows)
    quietly(config)
    before = (Path(config.output) / "model.safetensors").read_bytes()
    said = []
    train(config, device="cpu", say=said.append)
    assert any("all 2 steps are done" in line for line in said)
    assert (Path(config.output) / "model.safetensors").read_bytes() == before
    assert sorted(losses(config.output)) == [1, 2]


def test_stages_count_steps_of_the_optimiser(settings, tmp_path):
    """With two batches a step, data, rates and plans change stage together."""
    trainer = {**settings["trainer"], "gradient_accumulation_steps": 2}
    first = {"steps": 2, "tokens": [20, 20], "batch_tokens": 20, "passkey": 0.0}
    first["learning_rate"] = 1e-3
    second = {**first, "tokens": [30, 30], "learning_rate": 5e-4}
    generated = {**settings["generated"], "stages": [first, second]}
    changes = {"generated": generated, "trainer": trainer, "learning_rate": 1e-3, "warmup": 0}
    config = read_config(as_config(settings, tmp_path, **changes))
    quietly(config)
    assert [count for _, count in losses(config.output).values()] == [40, 80, 140, 200]
    state = json.loads((Path(config.output) / "trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "loss" in row]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])


def test_questions_on_the_way_and_fitted_gates_in_a_run(settings, tmp_path, monkeypatch):
    """Their losses are logged and weigh in the sum; gates are set once, before their stage."""
    asked = {"steps": 1, "tokens": [150, 200], "batch_tokens": 400, "passkey": 1.0}
    asked |= {"ask": "borders", "answer_weight": 2.0, "told_weight": 0.5}
    gates = {"texts": 4, "tokens": 200, "keep": 0.9, "keep_at_key": 0.1}
    changes = {
        "generated": {
            **settings["generated"],
            "stages": [asked, {**asked, "gates": gates}],
            "digits": [3, 3],  # as many as there are readout tokens to say them
        },
        "sizes": {"chunk_size": 48},
        "chunks": {},
        "save_steps": 1,
    }
    config = read_config(as_config(settings, tmp_path, **changes))
    said = []
    monkeypatch.setattr(stage_start, "_TOLD_EVERY", 800)
    model = train(config, device="cpu", say=said.append)
    assert "800 tokens of texts with keys read" in said
    assert [line for line in said if line.startswith("fitting")] == [
        "fitting the gates to 4 texts, before step 2"
    ]
    state = json.loads((Path(config.output) / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    for row in rows:
        parts = [float(row[name]) for name in ("text_loss", "answer_loss", "told_loss")]
        assert all(part > 0 for part in parts)
        assert float(row["loss"]) == pytest.approx(parts[0] + 2 * parts[1] + parts[2] / 2, rel=1e-2)
    first, _ = cometlm.load(f"{config.output}/checkpoint-1", device="cpu", merge=False)
    gate = "model.comet.layers.0.global_memory.gate"
    change = (model.get_parameter(gate) - first.get_parameter(gate)).abs().max()
    assert change > 10 * config.learning_rate * config.memory_factor  # no step of Adam's


def test_gates_are_not_fitted_again_after_a_stop(settings, tmp_path, monkeypatch):
    """Before the first checkpoint; and other settings fit others."""
    gates = {"texts": 4, "tokens": 200, "keep": 0.9, "keep_at_key": 0.1}
    stage = {**settings["generated"]["stages"][0], "gates": gates}
    changes = {"generated": {**settings["generated"], "stages": [stage]}, "save_steps": 9}
    changes |= {"sizes": {"chunk_size": 48}, "chunks": {}}
    whole = read_config(as_config(settings, tmp_path, **changes))
    quietly(whole)
    config = replace(whole, output=str(tmp_path / "stopped"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage_start.Histories, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            quietly(config)
    assert last_checkpoint(config.output) is None
    assert Path(config.output, "gates-0.safetensors").exists()
    said = []
    train(config, device="cpu", say=said.append)
    assert "taking the gates that were fitted for step 1" in said
    assert losses(config.output) == losses(whole.output)
    assert not Path(config.output, "gates-0.safetensors").exists()


@pytest.mark.parametrize("damage", ["another origin", "no file of gates"])
def test_gates_of_another_run_are_not_taken(settings, tmp_path, damage):
    gates = {"texts": 4, "tokens": 200}
    stage = {**settings["generated"]["stages"][0], "gates": gates, "steps": 1}
    changes = {"generated": {**settings["generated"], "stages": [stage]}}
    changes |= {"sizes": {"chunk_size": 48}, "chunks": {}}
    config = read_config(as_config(settings, tmp_path, **changes))
    data = b"" if "no file" in damage else save({"x": torch.zeros(1)}, {"origin": "elsewhere"})
    Path(config.output).mkdir()
    Path(config.output, "gates-0.safetensors").write_bytes(data)
    said = []
    train(config, device="cpu", say=said.append)
    assert "fitting the gates to 4 texts, before step 1" in said


def test_a_stage_that_is_too_short_is_known_before_the_run(settings, tmp_path):
    stages = [*settings["generated"]["stages"], {"steps": 1, "tokens": [9, 200]}]
    stages[-1] |= {"batch_tokens": 200, "passkey": 0.1}
    generated = {**settings["generated"], "stages": stages}
    with pytest.raises(ValueError, match=r"generated\.stages\.2: tokens must be at least"):
        quietly(read_config(as_config(settings, tmp_path, generated=generated)))
    assert last_checkpoint(settings["output"]) is None


def test_comet_is_for_new_memories(settings, start, tmp_path):
    """Which start as they are told to, also without any."""
    with pytest.raises(ValueError, match="is a checkpoint and has its memory: comet is for new"):
        quietly(read_config(as_config(settings, tmp_path, comet={"chunk_size": 12})))
    tokenizer("smollm2").save_pretrained(start / "backbone")
    plain = {"model": str(start / "backbone"), "start": {"readout": "the"}, "mode": "memory"}
    stages = [{**settings["generated"]["stages"][0], "steps": 1}]
    changes = {"generated": {**settings["generated"], "stages": stages}, **plain}
    changes["sizes"] = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5}
    seen = []
    own = running.start_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "start_like", lambda *args: seen.append(args[2]) or own(*args))
        model = quietly(read_config(as_config(settings, tmp_path, **changes)))
    assert [one.readout for one in seen] == ["the"]
    assert model.config.comet_config.chunk_size == 12


def test_records_to_evaluate_are_evaluated(settings, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": WORDS * 3}) + "\n")
    changes = {"evaluate": str(tmp_path / "held.jsonl"), "save_steps": 1}
    config = records_run(settings, tmp_path, [{"text": WORDS * 3}] * 4, **changes)
    quietly(config)
    state = json.loads((Path(config.output) / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [1, 2]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_best_checkpoint_is_loaded_whole(settings, tmp_path, monkeypatch, mode):
    def worse_and_worse(trainer, *_, **__):
        return {"eval_loss": float(trainer.state.global_step)}

    monkeypatch.setattr(running.CometTrainer, "evaluate", worse_and_worse)
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": WORDS * 3}) + "\n")
    trainer = {**settings["trainer"], "max_steps": 3, "load_best_model_at_end": True}
    changes = {"evaluate": str(tmp_path / "held.jsonl"), "save_steps": 1, "mode": mode}
    rows = [{"text": WORDS * 3}] * 4
    config = records_run(settings, tmp_path, rows, **changes, trainer=trainer, learning_rate=1e-2)
    model = quietly(config).eval()
    first = Path(config.output, "checkpoint-1")
    best, _ = cometlm.load(str(first), device="cpu", dtype=model.dtype, merge=False)
    ids = torch.tensor([tokenizer("smollm2").encode(WORDS * 3)])
    with torch.no_grad():
        got, wanted = model(ids).logits, best(ids).logits
    assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


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


def test_packed_documents_are_read_apart(settings, tmp_path):
    """The loss of a packed row is that of its documents, each with a new memory."""
    rows = [{"text": WORDS * n} for n in (1, 2, 1)]
    options = {**settings["trainer"], "max_steps": 1, "packing": True}
    options["per_device_train_batch_size"] = 1
    changes = {"max_length": 400, "cut": True, "chunks": {"sizes": [6]}}
    config = records_run(settings, tmp_path, rows, trainer=options, **changes)
    model, words = cometlm.load(config.model, device="cpu", dtype=torch.float32)
    set_trainable(model, "memory")
    trainer = running.make_trainer(config, model, words)
    (batch,) = trainer.get_train_dataloader()
    packed = trainer.compute_loss(model, dict(batch), return_outputs=False)
    own = [torch.tensor([[*words.encode(row["text"]), words.eos_token_id]]) for row in rows]
    assert batch["input_ids"].shape[1] == sum(ids.shape[1] for ids in own)
    learned = torch.tensor([ids.shape[1] - 1.0 for ids in own])
    apart = torch.stack([model(ids, labels=ids).loss for ids in own])
    torch.testing.assert_close(packed, (apart * learned).sum() / learned.sum())


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
        ({"recompute": {"every": 0}}, "recompute.every must be at least 1, got 0"),
        ({"recompute": {"truncate_after": -1}}, "recompute.truncate_after must be at least 0"),
        ({"lora": {"r": 0}}, "lora.r must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be more than 0, got nan"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        (
            {"trainer": {"lr_scheduler_type": "linear"}},
            "trainer.lr_scheduler_type is for records: stages have a learning_rate each",
        ),
        ({"trainer": {"max_length": 9}}, "trainer.max_length is a field of the run itself"),
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
    with pytest.raises(ValueError, match="the value of 'model=@x' is not YAML"):
        read_config(path, ["model=@x"])
    with pytest.raises(ValueError, match=r"seed\.x is no field: seed is "):
        read_config(path, ["seed=1", "seed.x=1"])


def test_a_change_does_not_reach_what_shares_its_anchor(settings, tmp_path):
    plain = {name: value for name, value in settings.items() if name != "generated"}
    path = as_config(plain, tmp_path, output=str(tmp_path / "out"))
    stage = "steps: 1, tokens: [20, 30], batch_tokens: 40"
    path.write_text(
        path.read_text()
        + f"generated:\n  stages:\n  - {{{stage}, hay: &hay {{texts: 1}}}}\n"
        + f"  - {{{stage}, hay: *hay}}\n"
    )
    first, second = read_config(path, ["generated.stages.0.hay.texts=3"]).generated.stages
    assert (first.hay.texts, second.hay.texts) == (3, 1)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(path):
    config = read_config(path)
    assert config.generated.stages


def test_a_plan_or_a_trainer_field_that_does_not_exist(settings, tmp_path):
    with pytest.raises(ValueError, match="unknown chunk plan 'fix'"):
        quietly(read_config(as_config(settings, tmp_path, chunks={"plans": {"fix": 1}})))
    with pytest.raises(ValueError, match=r"trainer\.max_step is no field"):
        quietly(read_config(as_config(settings, tmp_path, trainer={"max_step": 1})))


def test_long_samples_are_cut_only_if_told_to(settings, tmp_path):
    rows = [{"text": WORDS * n} for n in (1, 3, 4)]
    config = records_run(settings, tmp_path, rows, max_length=50)
    with pytest.raises(
        ValueError, match=r"2 of 3 samples of .* are longer than max_length=50 .*cut: true"
    ):
        quietly(config)
    said = []
    train(
        records_run(settings, tmp_path, rows, max_length=50, cut=True),
        device="cpu",
        say=said.append,
    )
    assert any(line.startswith("2 of 3 samples end at max_length=50") for line in said)


def test_packed_rows_are_cut_only_if_told_to(settings, tmp_path):
    """And documents are what is held against a chunk, not the rows."""
    rows = [{"text": "The ship left."}] * 8
    trainer = {**settings["trainer"], "max_steps": 2, "packing": True}
    with pytest.raises(ValueError, match=r"trainer\.packing fills rows of max_length tokens"):
        quietly(records_run(settings, tmp_path, rows, max_length=50, trainer=trainer))
    said = []
    config = records_run(settings, tmp_path, rows, max_length=50, cut=True, trainer=trainer)
    train(config, device="cpu", say=said.append)
    assert any("no sample is longer than one chunk" in line for line in said)


def test_a_warning_where_no_sample_exceeds_a_chunk(settings, tmp_path):
    said = []
    config = records_run(settings, tmp_path, [{"text": "The ship left."}] * 4)
    train(config, device="cpu", say=said.append)
    assert any("no sample is longer than one chunk (6 tokens" in line for line in said)


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


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_checkpoint(
    settings, tmp_path, monkeypatch
):
    """The loss says nothing; the weights would be lost in this step, and saved."""
    config = read_config(as_config(settings, tmp_path))
    own = running.CometTrainer.training_step

    def poison(self, *args):
        loss = own(self, *args)
        if self.state.global_step == 5:
            self._comet.model.comet.readout.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(running.CometTrainer, "training_step", poison)
    said = r"gradient's norm is (inf|nan); step 6, .* checkpoint is .*checkpoint-4"
    with pytest.raises(FloatingPointError, match=said):
        quietly(config)
    monkeypatch.undo()
    quietly(config)
    assert sorted(losses(config.output)) == list(range(1, 9))


def test_a_full_disk_while_saving_loses_nothing(settings, tmp_path, monkeypatch):
    config = read_config(as_config(settings, tmp_path))
    save = torch.save

    def full(value, path, *args, **options):
        if "checkpoint-6" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 6 cannot be written \(.*the last one is .*-4"):
        quietly(config)
    assert last_checkpoint(config.output) == Path(config.output, "checkpoint-4")
    monkeypatch.undo()
    quietly(config)
    assert sorted(losses(config.output)) == list(range(1, 9))


def test_configurations_survive_json():
    config = TrainConfig(model="m", output="o", records="r")
    assert json.loads(json.dumps(config.to_dict()))["chunks"]["plans"] == {"fixed": 1.0}
