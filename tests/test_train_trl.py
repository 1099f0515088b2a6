"""Trainers that people have already: trl's `SFTTrainer` and transformers' `Trainer`, unmodified."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import cometlm
from cometlm.compat import ACTIVATION_CHECKPOINTING
from cometlm.core.cell import Cell
from cometlm.core.training_plan import TrainingPlan
from cometlm.train.templates import TEMPLATES
from tests.ranks import run_ranks
from tests.real import tiny_comet, tokenizer
from tests.tiny import error

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TALK = [
    {"role": "user", "content": "What did the ship carry when it left the harbour in the rain?"},
    {"role": "assistant", "content": "It carried salt, iron and two hundred letters."},
]
ROWS = {
    "messages": {"messages": [TALK, TALK[:2] * 2, TALK]},
    "prompt": {
        "prompt": ["The ship left the harbour in the rain and", "Then"] * 2,
        "completion": [" carried salt and iron over the sea.", " it came back."] * 2,
    },
    "text": {"text": ["The ship left the harbour. " * n for n in (1, 3, 5, 2)]},
}


@pytest.fixture
def model():
    return tiny_comet().float().train()


def arguments(folder, **options):
    common = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return SFTConfig(**{**common, **options})


def sft(model, data, folder, peft_config=None, **options):
    return SFTTrainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Dataset.from_dict(data),
        processing_class=copy.deepcopy(tokenizer("smollm2")),
        peft_config=peft_config,
    )


@pytest.fixture
def folds(monkeypatch):
    """How many chunks were folded, cell by cell."""
    seen = []
    fold = Cell._fold

    def counting(self, *args):
        seen.append(self)
        return fold(self, *args)

    monkeypatch.setattr(Cell, "_fold", counting)
    return seen


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


PLAIN, PACKED, BF16 = (False, False), (True, False), (False, True)
COMBINATIONS = [(form, *how) for form in ROWS for how in (PLAIN, PACKED, BF16)]
FAST = {(form, *PLAIN) for form in ROWS} | {("prompt", *PACKED), ("text", *BF16)}


@pytest.mark.parametrize(
    ("form", "packing", "bf16"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (c not in FAST)) for c in COMBINATIONS],
)
def test_sft_trainer_reads_through_the_memory(model, tmp_path, folds, form, packing, bf16):
    """A wrong `base_model` would train with no memory and a loss that looks normal."""
    before = weights(model)
    options = {"packing": packing, "max_length": 64 if packing else None, "bf16": bf16}
    trainer = sft(model, ROWS[form], tmp_path, **options)
    result = trainer.train()
    assert model.is_activation_checkpointing  # trl's default, and it means ours
    assert model.training_plan.recomputation is not None
    assert result.training_loss > 0
    assert len(folds) >= 2 * 3  # every step folds a chunk in each of three layers
    names = moved(model, before)
    for part in ("comet.readout", "comet.compression", "comet.layers.0", "cells.1.layer"):
        assert any(part in name for name in names), part


def test_the_loss_is_the_models_own(model, tmp_path):
    """SFTTrainer computes its own from the hidden states; without memory it would be another."""
    rows = {"text": ["The ship left the harbour and came back. " * 4] * 2}
    trainer = sft(model, rows, tmp_path, max_length=None, max_steps=1)
    ids = torch.tensor(trainer.train_dataset["input_ids"][:])
    with torch.no_grad():
        own = model(ids, labels=ids).loss
        size = model.config.comet_config.chunk_size
        without = cometlm.detach(copy.deepcopy(model))(ids, labels=ids).loss
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert ids.shape[1] > 3 * size
    assert abs(logged - own) < 2e-3
    assert abs(logged - without) > 2e-2


def test_activation_checkpointing_changes_no_number(tmp_path):
    losses = []
    for on in (True, False):
        model = tiny_comet().float().train()
        trainer = sft(
            model,
            ROWS["text"],
            tmp_path,
            max_steps=2,
            max_length=None,
            **{ACTIVATION_CHECKPOINTING: on},
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_assistant_only_loss_with_our_template(model, tmp_path):
    """SmolLM2's own template has no generation marks."""
    options = {"assistant_only_loss": True, "chat_template_path": str(TEMPLATES["smollm2"])}
    trainer = sft(model, ROWS["messages"], tmp_path, max_length=None, **options)
    row = trainer.train_dataset[0]
    kept = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer("smollm2").decode(kept) == TALK[1]["content"] + "<|im_end|>"
    trainer.train()


def test_our_template_renders_like_the_models_own():
    own = tokenizer("smollm2")
    for talk in (TALK, TALK * 2, [{"role": "system", "content": "Be brief."}, *TALK]):
        for head in (False, True):
            texts = [
                own.apply_chat_template(
                    talk, tokenize=False, add_generation_prompt=head, chat_template=template
                )
                for template in (None, TEMPLATES["smollm2"].read_text(encoding="utf-8"))
            ]
            assert texts[0] == texts[1]


def test_peft_config_of_ours_trains_lora_and_memory(model, tmp_path):
    adapter = cometlm.lora_config(r=2)
    trainer = sft(model, ROWS["text"], tmp_path, peft_config=adapter, max_length=None)
    named = dict(trainer.model.named_parameters())
    lora = [name for name in named if ".lora_" in name]
    assert lora
    assert not any("comet" in name for name in lora)
    before = weights(trainer.model)
    trainer.train()
    names = moved(trainer.model, before)
    assert any(".lora_A." in name for name in names)
    assert any("comet.modules_to_save" in name for name in names)
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_what_a_peft_trainer_saved_becomes_a_checkpoint(model, tmp_path):
    """As the documentation says: merged, and saved with its backbone."""
    begun = copy.deepcopy(model)
    adapter = cometlm.lora_config(r=2)
    trainer = sft(model, ROWS["text"], tmp_path, peft_config=adapter, max_length=None)
    trainer.train()
    trainer.save_model(str(tmp_path / "done"))
    ids = torch.tensor([tokenizer("smollm2").encode(ROWS["text"]["text"][2])])
    with torch.no_grad():
        wanted = trainer.model.eval()(ids).logits
        merged = PeftModel.from_pretrained(begun, str(tmp_path / "done")).merge_and_unload()
        merged._backbone.only_copy = False  # as one that a name brings back
        with pytest.warns(UserWarning, match="weights of the backbone were changed"):
            merged.save_pretrained(tmp_path / "memory")
        merged.save_pretrained(tmp_path / "mine", backbone=True)
        loaded = cometlm.CometForCausalLM.from_pretrained(tmp_path / "mine")
        assert error(loaded.eval()(ids).logits, wanted) < 1e-5


def test_a_memory_frozen_unasked_is_an_error(model, tmp_path):
    adapter = LoraConfig(target_modules=["q_proj"], r=2)
    trainer = sft(model, ROWS["text"], tmp_path, peft_config=adapter, max_length=None)
    with pytest.raises(ValueError, match=r"the memory is frozen .* cometlm\.lora_config\(\)"):
        trainer.train()
    model.training_plan = TrainingPlan(memory_frozen=True)
    trainer.train()


def test_transformers_trainer(model, tmp_path, folds):
    ids = tokenizer("smollm2")("The ship left the harbour and came back again. " * 5).input_ids
    rows = [{"input_ids": ids, "labels": ids}] * 4
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    before = weights(model)
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert folds
    assert any("comet" in name for name in moved(model, before))


def trained_in_parallel(folder):
    """The memory's weights after three steps on this rank."""
    model = tiny_comet().float().train()
    # Ranks get samples of different lengths: one of them fits into a chunk and folds nothing.
    rows = {"text": ["The ship left the harbour. " * n for n in (1, 9, 1, 9, 1, 9, 1, 9)]}
    options = {"max_length": None, "per_device_train_batch_size": 1, "max_steps": 3}
    options |= {"shuffle_dataset": False, "train_sampling_strategy": "sequential"}
    trainer = sft(model, rows, folder, **options)
    trainer.train()
    return trainer.args.process_index, model.model.comet.state_dict()


def test_data_parallel(tmp_path):
    """Two processes stay alike, also when a rank's sample folds no chunk."""
    (first, ours), (second, theirs) = run_ranks(2, trained_in_parallel, tmp_path)
    assert (first, second) == (0, 1)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert not torch.equal(ours["readout"], tiny_comet().float().model.comet.readout)


def test_transformers_trainer_evaluates(model, tmp_path):
    """It gets the loss, and nothing in place of logits, which a loss does without."""
    ids = tokenizer("smollm2")("The ship left the harbour and came back again. " * 5).input_ids
    rows = [{"input_ids": ids, "labels": ids}] * 4
    args = TrainingArguments(str(tmp_path), report_to="none", per_device_eval_batch_size=2)
    given = []

    def count(prediction):
        given.append(prediction.predictions)
        return {"given": 1.0}

    found = Trainer(model=model, args=args, eval_dataset=rows, compute_metrics=count).evaluate()
    wanted = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    assert given == [()]
