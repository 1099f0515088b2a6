"""`cometlm train`: what it trains and saves, bad data, bad luck."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cometlm
from cometlm.train import run as running
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
    records_run,
    settings,
    start,
)

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.mark.parametrize("mode", ["memory", "lora", "full"])
def test_a_run_trains_what_its_mode_says_and_saves_it(settings, start, tmp_path, mode):
    mixture = {**settings["mixture"], "steps": 2}
    config = read_config(as_config(settings, tmp_path, mode=mode, mixture=mixture))
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


def test_a_mixture_counts_steps_of_the_optimiser(settings, tmp_path):
    """With two batches a step."""
    trainer = {**settings["trainer"], "gradient_accumulation_steps": 2}
    mixture = {**settings["mixture"], "steps": 3, "tokens": [60, 60], "batch_tokens": 60}
    config = read_config(as_config(settings, tmp_path, mixture=mixture, trainer=trainer))
    quietly(config)
    read = [count for _, count in losses(config.output).values()]
    assert len(read) == 3
    assert all(150 < after - before < 250 for before, after in pairwise([0, *read]))


def test_a_reporter_hears_every_step(settings, tmp_path):
    """The answers' loss beside the whole one, and it goes on where a stopped run went on."""
    reporting = {**settings["trainer"], "report_to": "tensorboard"}
    config = read_config(as_config(settings, tmp_path, trainer=reporting))
    quietly(config)
    (Path(config.output) / "checkpoint-4" / "trainer_state.json").unlink()  # stopped at step 2
    quietly(config)
    heard_of = []
    for events in sorted(Path(config.output, "runs").rglob("events.out.tfevents.*")):
        reader = EventAccumulator(str(events)).Reload()
        assert "train/num_tokens" in reader.Tags()["scalars"]
        heard_of.append({e.step: e.value for e in reader.Scalars("train/loss")})
    assert [sorted(steps) for steps in heard_of] == [[1, 2, 3, 4], [3, 4]]
    for steps in heard_of:
        for step, value in steps.items():
            assert value == pytest.approx(losses(config.output)[step][0], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_questions_on_the_way_weigh_in_the_loss(settings, tmp_path, accumulate):
    """And are logged beside it."""
    mixture = {**settings["mixture"], "tokens": [150, 200], "batch_tokens": 400, "steps": 2}
    mixture |= {"ask": "probes", "answer_weight": 2.0}
    trainer = {**settings["trainer"], "gradient_accumulation_steps": accumulate}
    changes = {"mixture": mixture, "sizes": {"chunk_size": 56}, "chunks": {}, "trainer": trainer}
    config = read_config(as_config(settings, tmp_path, **changes))
    quietly(config)
    for row in logged(config.output):
        text, answers = (float(row[name]) for name in ("text_loss", "answer_loss"))
        assert text > 0
        assert answers > 0
        assert float(row["loss"]) == pytest.approx(text + 2 * answers, rel=1e-2)


def test_a_texts_loss_may_be_left_out(settings, tmp_path):
    """Then the answers on the way are all that is learned."""
    mixture = {**settings["mixture"], "ask": "probes", "text_share": 0.0, "steps": 1}
    changes = {"mixture": mixture, "sizes": {"chunk_size": 56}, "chunks": {}}
    config = read_config(as_config(settings, tmp_path, **changes))
    quietly(config)
    (row,) = logged(config.output)
    assert float(row["loss"]) == pytest.approx(float(row["answer_loss"]), rel=1e-3)


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
    train(config, device="cpu", log=said.append)
    assert any("no sample is longer than one chunk" in line for line in said)


def test_a_warning_where_no_sample_exceeds_a_chunk(settings, tmp_path):
    said = []
    config = records_run(settings, tmp_path, [{"text": "The ship left."}] * 4)
    train(config, device="cpu", log=said.append)
    assert any("no sample is longer than one chunk (6 tokens" in line for line in said)


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path, monkeypatch):
    """Step and sample are named, and the last good checkpoint stays."""
    config = read_config(as_config(settings, tmp_path))
    place = running.CometTrainer._place_chunking

    def poison(self):
        place(self)
        if self.state.global_step == 3:
            with torch.no_grad():
                self._comet.model.comet.readout.fill_(float("nan"))

    monkeypatch.setattr(running.CometTrainer, "_place_chunking", poison)
    with pytest.raises(FloatingPointError, match=r"step 4, .* checkpoint is .*checkpoint-2"):
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
        if self.state.global_step == 3:
            self._comet.model.comet.readout.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(running.CometTrainer, "training_step", poison)
    said = r"gradient's norm is (inf|nan); step 4, .* checkpoint is .*checkpoint-2"
    with pytest.raises(FloatingPointError, match=said):
        quietly(config)
    monkeypatch.undo()
    quietly(config)
    assert sorted(losses(config.output)) == [1, 2, 3, 4]


def test_a_full_disk_while_saving_loses_nothing(settings, tmp_path, monkeypatch):
    config = read_config(as_config(settings, tmp_path))
    save = torch.save

    def full(value, path, *args, **options):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(value, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 4 cannot be written \(.*the last one is .*-2"):
        quietly(config)
    assert last_checkpoint(config.output) == Path(config.output, "checkpoint-2")
    monkeypatch.undo()
    quietly(config)
    assert sorted(losses(config.output)) == [1, 2, 3, 4]
