"""`cometlm train`: what it trains and saves, bad data, bad luck."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cometlm
from cometlm.train import run as running
from cometlm.train import stage_start
from cometlm.train.config_file import read_config
from cometlm.train.run import train
from cometlm.train.trainable import set_trainable
from cometlm.train.trainer import last_checkpoint
from tests.real import tokenizer
from tests.runs import (
    WORDS,
    as_config,
    heard,
    logged,
    losses,
    quietly,
    rates,
    records_run,
    settings,
    start,
)

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


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
    card = (Path(config.output) / "README.md").read_text()
    assert "# A CoMeT memory for" in card  # not trl's, of a whole model
    assert ("a LoRA adapter" in card) == (mode == "lora")
    assert ("and its backbone" in card) == (mode == "full")


def test_lora_settings_are_not_for_a_model_with_adapters(settings, start, tmp_path):
    model, words = cometlm.load(str(start), device="cpu")
    set_trainable(model, "lora", cometlm.lora_config(r=2))
    model.save_pretrained(tmp_path / "adapted", backbone=True)
    words.save_pretrained(tmp_path / "adapted")
    adapted = as_config(settings, tmp_path, model=str(tmp_path / "adapted"))
    with pytest.raises(ValueError, match=r"lora is for new adapters, and model .*adapted goes on"):
        quietly(read_config(adapted))


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
    assert rates(config.output) == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])


def test_a_stage_may_begin_with_a_fresh_optimiser(settings, tmp_path):
    """It has counted no steps before, and warms up again."""
    first = {"steps": 4, "tokens": [30, 30], "batch_tokens": 30, "passkey": 0.0}
    second = {**first, "steps": 3, "learning_rate": 1e-3, "fresh_optimizer": True}
    settings["generated"]["stages"] = [first, second]
    changes = {"learning_rate": 1e-2, "warmup": 2, "save_steps": 4}
    config = read_config(as_config(settings, tmp_path, **changes))
    quietly(config)
    assert rates(config.output) == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 5e-4, 1e-3, 1e-3])
    for done, counted in ((4, 4), (7, 3)):
        kept = torch.load(Path(config.output, f"checkpoint-{done}", "optimizer.pt"))
        assert {int(moments["step"]) for moments in kept["state"].values()} == {counted}


def test_gates_flip_in_the_stages_that_say_so(settings, tmp_path):
    quietly(read_config(as_config(settings, tmp_path, output=str(tmp_path / "plain"))))
    settings["generated"]["stages"][1]["gate_flips"] = 0.5
    model = quietly(read_config(as_config(settings, tmp_path)))
    assert all(layer.global_memory.gate_flips == 0 for layer in model.model.comet.layers)
    plain, flipped = losses(tmp_path / "plain"), losses(tmp_path / "out")
    assert [plain[step] == flipped[step] for step in (1, 2, 3, 4)] == [True] * 4
    assert any(plain[step] != flipped[step] for step in (5, 6, 7, 8))


def test_a_reporter_hears_every_step(settings, tmp_path):
    """The answers' loss beside the whole one, and it goes on where a stopped run went on."""
    reporting = {**settings["trainer"], "report_to": "tensorboard"}
    config = read_config(as_config(settings, tmp_path, trainer=reporting))
    quietly(config)
    (Path(config.output) / "checkpoint-8" / "trainer_state.json").unlink()  # stopped at step 6
    quietly(config)
    heard_of = []
    for events in sorted(Path(config.output, "runs").rglob("events.out.tfevents.*")):
        reader = EventAccumulator(str(events)).Reload()
        assert "train/num_tokens" in reader.Tags()["scalars"]
        heard_of.append({e.step: e.value for e in reader.Scalars("train/loss")})
    assert [sorted(steps) for steps in heard_of] == [list(range(1, 9)), [7, 8]]
    for steps in heard_of:
        for step, value in steps.items():
            assert value == pytest.approx(losses(config.output)[step][0], rel=1e-6)


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
    for row in logged(config.output):
        parts = [float(row[name]) for name in ("text_loss", "answer_loss", "told_loss")]
        assert all(part > 0 for part in parts)
        assert float(row["loss"]) == pytest.approx(parts[0] + 2 * parts[1] + parts[2] / 2, rel=1e-2)
    first, _ = cometlm.load(f"{config.output}/checkpoint-1", device="cpu", merge=False)
    gate = "model.comet.layers.0.global_memory.gate"
    change = (model.get_parameter(gate) - first.get_parameter(gate)).abs().max()
    assert change > 10 * config.learning_rate * config.memory_factor  # no step of Adam's


def test_records_to_evaluate_are_evaluated(settings, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": WORDS * 3}) + "\n")
    changes = {"evaluate": str(tmp_path / "held.jsonl"), "save_steps": 1}
    config = records_run(settings, tmp_path, [{"text": WORDS * 3}] * 4, **changes)
    quietly(config)
    state = json.loads((Path(config.output) / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [1, 2]


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


def test_long_samples_are_cut_only_if_told_to(settings, tmp_path):
    rows = [{"text": WORDS * n} for n in (1, 3, 4)]
    config = records_run(settings, tmp_path, rows, max_length=50)
    with pytest.raises(
        ValueError, match=r"2 of 3 samples of .* are longer than max_length=50 .*cut: true"
    ):
        quietly(config)
    said = heard(records_run(settings, tmp_path, rows, max_length=50, cut=True))
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
