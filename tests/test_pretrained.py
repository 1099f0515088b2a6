"""Checkpoints: the memory only, the backbone by name, and back to the same numbers."""

import json
import shutil
import warnings
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import cometlm
from cometlm import CometForCausalLM, CometModelConfig
from cometlm.checkpoints import memory as pretrained
from cometlm.checkpoints.card import model_card
from cometlm.checkpoints.weights import memory_weights
from tests import real
from tests.checkpoints import IDS, SIZES, attached, logits
from tests.tiny import random_ids, tiny_backbone


@pytest.fixture
def model(named):
    return attached(named)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# --- what is written ----------------------------------------------------------------------------


def test_a_checkpoint_holds_the_memory_only(model, saved):
    files = {path.name for path in saved.iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    weights = load_file(saved / "model.safetensors")
    own = {f"model.comet.{name}": w for name, w in model.model.comet.named_parameters()}
    assert weights.keys() == own.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, own[name])


def test_the_config_names_the_backbone_and_the_sizes(named, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "cometlm"
    assert config["architectures"] == ["CometForCausalLM"]
    assert config["backbone"] == str(named)
    assert config["comet"] == cometlm.CometConfig(**SIZES).to_dict()


def test_saving_leaves_the_model_as_it_was(model, tmp_path):
    before, config = logits(model), model.config.to_dict()
    for backbone in (False, True):
        model.save_pretrained(tmp_path / str(backbone), backbone=backbone)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", is_main_process=False)
    assert not (tmp_path / "checkpoint").exists()


def test_a_given_state_dict_is_saved(model, tmp_path):
    state = {name: weight + 1 for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "checkpoint", state_dict=state)
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(torch.equal(weight, state[name]) for name, weight in weights.items())
    assert all(name.startswith("model.comet.") for name in weights)


def test_the_model_card_says_what_it_is(named, saved):
    card = (saved / "README.md").read_text()
    assert str(named) in card
    for field, value in SIZES.items():
        assert f"| `{field}` | {value} |" in card
    assert card.startswith("---\nlibrary_name: cometlm\n")


def test_the_card_names_a_backbone_of_the_hub(model):
    model.config.backbone = "someone/tiny"
    assert "\nbase_model: someone/tiny\n" in model_card(model)


def test_a_card_that_is_there_stays(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


# --- and read back ------------------------------------------------------------------------------

LOADERS = {
    "CometForCausalLM": CometForCausalLM.from_pretrained,
    "CometForCausalLM, with a Path": lambda name: CometForCausalLM.from_pretrained(Path(name)),
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "load": lambda name: cometlm.load(name, device="cpu", dtype=torch.float32)[0],
}


@pytest.mark.parametrize("loader", LOADERS)
def test_loading_gives_the_same_logits(model, saved, loader):
    loaded = LOADERS[loader](str(saved))
    assert type(loaded) is CometForCausalLM
    assert not loaded.training
    assert loaded.config.name_or_path == str(saved)
    assert torch.equal(logits(loaded), logits(model))


def test_saving_again_writes_the_same(saved, tmp_path):
    CometForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_auto_config_knows_a_checkpoint(named, saved):
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, CometModelConfig)
    assert config.comet_config == cometlm.CometConfig(**SIZES)
    assert config.backbone == str(named)


@pytest.mark.parametrize("switch", ["global_memory", "temporary_memory", "gate"])
def test_a_memory_with_a_part_switched_off(named, tmp_path, switch):
    model = attached(named, **{switch: False})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(CometForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_load_gives_the_backbone_s_tokenizer(named, saved):
    _, tokenizer = cometlm.load(str(saved), device="cpu")
    text = "The lamp went out."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(named)(text)["input_ids"]


def test_load_prefers_the_checkpoint_s_own_tokenizer(saved):
    real.tokenizer("smollm2").save_pretrained(saved)
    _, tokenizer = cometlm.load(str(saved), device="cpu")
    assert len(tokenizer) == len(real.tokenizer("smollm2"))


def dtypes(model):
    memory = {p.dtype for p in model.model.comet.parameters()}
    return memory, {p.dtype for name, p in model.named_parameters() if ".comet." not in name}


def test_the_memory_follows_a_wider_dtype(saved):
    loaded = CometForCausalLM.from_pretrained(saved, dtype=torch.float64)
    assert dtypes(loaded) == ({torch.float64}, {torch.float64})


def test_a_memory_trained_in_float32_is_not_rounded(saved, tmp_path):
    loaded = CometForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert dtypes(loaded) == ({torch.float32}, {torch.bfloat16})
    assert torch.isfinite(logits(loaded)).all()
    loaded.model.comet.bfloat16()
    loaded.save_pretrained(tmp_path / "half")
    again = CometForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert dtypes(again) == ({torch.bfloat16}, {torch.bfloat16})


def test_a_backbone_object_takes_the_place_of_the_named_one(named, model, saved):
    shutil.copytree(named, saved.parent / "unused")
    backbone = AutoModelForCausalLM.from_pretrained(named)
    loaded = CometForCausalLM.from_pretrained(saved, backbone=backbone)
    assert loaded.model.embed_tokens is backbone.get_input_embeddings()
    assert torch.equal(logits(loaded), logits(model))


def test_a_backbone_path_takes_the_place_of_the_named_one(saved, tmp_path):
    """A backbone with other weights, and its own tokens come out."""
    other = tiny_backbone("llama", seed=9, vocab_size=len(real.tokenizer("like gemma"))).float()
    other.save_pretrained(tmp_path / "other")
    loaded = CometForCausalLM.from_pretrained(saved, backbone=tmp_path / "other")
    want = CometForCausalLM.from_pretrained(saved, backbone=other)
    assert torch.equal(logits(loaded), logits(want))
    assert not torch.equal(logits(loaded), logits(CometForCausalLM.from_pretrained(saved)))


def test_a_checkpoint_with_its_backbone_needs_nothing_else(tmp_path):
    tokenizer = real.tokenizer("like gemma")
    backbone = tiny_backbone("qwen3", vocab_size=len(tokenizer)).float()
    backbone.save_pretrained(tmp_path / "tiny")
    model = attached(tmp_path / "tiny")
    model.save_pretrained(tmp_path / "checkpoint", backbone=True)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    want = logits(model)
    shutil.rmtree(tmp_path / "tiny")
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    name = str(tmp_path / "moved")
    for loader in LOADERS.values():
        assert torch.equal(logits(loader(name)), want)
    assert len(cometlm.load(name, device="cpu")[1]) == len(tokenizer)


def test_a_saved_backbone_is_a_plain_model(model, tmp_path):
    model.save_pretrained(tmp_path, backbone=True)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    want = AutoModelForCausalLM.from_pretrained(model.config.backbone)
    assert torch.equal(backbone(IDS).logits, want(IDS).logits)


def test_a_checkpoint_with_its_backbone_can_be_saved_again(model, tmp_path):
    model.save_pretrained(tmp_path / "first", backbone=True)
    CometForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(
        tmp_path / "second", backbone=True
    )
    loaded = CometForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(loaded), logits(model))


def test_a_memory_saved_again_without_its_backbone_finds_it(model, tmp_path):
    """Fine-tune a self-contained checkpoint, and save the memory only."""
    model.save_pretrained(tmp_path / "first", backbone=True)
    CometForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(loaded), logits(model))


def test_suppressed_tokens_survive(model, tmp_path):
    model.config.suppressed_tokens = [5, 95]
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert loaded.config.suppressed_tokens == [5, 95]


def test_the_generation_config_survives(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 4
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.generation_config.pad_token_id == 4


# --- what does not fit --------------------------------------------------------------------------


def rewritten(saved, change):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")


NORM = "model.comet.layers.1.global_memory.norm.weight"
MISFITS = {
    "missing": (lambda weights: weights.pop(NORM), f"lacks weight {NORM}"),
    "left over": (
        lambda weights: weights.update({"model.comet.extra": torch.zeros(3)}),
        "unknown weight model.comet.extra",
    ),
    "another shape": (
        lambda weights: weights.update({NORM: torch.zeros(31)}),
        rf"{NORM} is \[31\], expected \[32\]",
    ),
    "a shape that broadcasts": (
        lambda weights: weights.update({NORM: torch.zeros(1)}),
        rf"{NORM} is \[1\], expected \[32\]",
    ),
    "nothing": (dict.clear, "lacks weight model.comet"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_refused_by_name(saved, case):
    change, message = MISFITS[case]
    rewritten(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        CometForCausalLM.from_pretrained(saved)
    assert str(saved) in str(caught.value)


def test_a_damaged_weight_file_is_refused(saved):
    (saved / "model.safetensors").write_bytes(b"oops")
    with pytest.raises((ValueError, OSError), match="checkpoint"):
        CometForCausalLM.from_pretrained(saved)


def test_a_backbone_that_was_made_of_a_config_is_saved(tmp_path):
    """No name brings it back."""
    model = cometlm.attach(tiny_backbone("llama"), **SIZES)
    model.save_pretrained(tmp_path)
    loaded = CometForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    model.detached()
    cometlm.attach(model._backbone, **SIZES).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "backbone").is_dir()


def test_a_checkpoint_that_names_no_backbone(tmp_path):
    """As those of backbones without a name did that were saved before."""
    model = cometlm.attach(tiny_backbone("llama"), **SIZES)
    model._backbone.only_copy = False
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no backbone .*give backbone="):
        CometForCausalLM.from_pretrained(tmp_path)
    loaded = CometForCausalLM.from_pretrained(tmp_path, backbone=tiny_backbone("llama"))
    assert torch.equal(logits(loaded), logits(model))
    assert "(not named)" in (tmp_path / "README.md").read_text()


def test_unknown_options_are_refused(saved):
    for options in ({"no_such_option": 3}, {"load_in_8bit": True}, {"stride": 4}):
        with pytest.raises(ValueError, match=f"does not take {next(iter(options))}"):
            CometForCausalLM.from_pretrained(saved, **options)


def test_a_checkpoint_is_read_with_other_sizes_that_change_no_weight(saved):
    model, _ = cometlm.load(str(saved), device="cpu", stride=8, chunk_size=24)
    sizes = model.config.comet_config
    assert (sizes.stride, sizes.chunk_size) == (8, 24)
    for wrong in ({"readout_tokens": 9}, {"seed": 1}):
        with pytest.raises(ValueError, match=r"only chunk_size, .*overlap may be others"):
            cometlm.load(str(saved), device="cpu", **wrong)


def test_a_missing_checkpoint_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        CometForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_a_missing_backbone_is_an_oserror_that_names_it(named, model, tmp_path):
    model.config.backbone = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(OSError, match="gone"):
        CometForCausalLM.from_pretrained(tmp_path / "checkpoint")


def test_a_full_disk_leaves_the_old_weights(model, saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.comet.readout.add_(1)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert not list(saved.glob(".*"))


# --- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub with no network: notes what would be uploaded."""
    state = SimpleNamespace(has_card=False, token=None, repo=None, files={}, options={})

    class Api:
        def __init__(self, token=None):
            state.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            state.private = private
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo_id, filename, revision=None):
            assert filename == "README.md"
            return state.has_card

        def upload_folder(
            self, *, repo_id, folder_path, ignore_patterns=None, delete_patterns=(), **options
        ):
            state.repo, state.options = repo_id, options
            kept = ignore_patterns or []
            gone = [name for name in state.files for one in delete_patterns if fnmatch(name, one)]
            state.files = {name: data for name, data in state.files.items() if name not in gone}
            state.files |= {
                str(path.relative_to(folder_path)): path.read_bytes()
                for path in sorted(Path(folder_path).rglob("*"))
                if path.is_file() and path.name not in kept
            }
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(pretrained, "HfApi", Api)
    return state


def test_push_to_hub_uploads_a_checkpoint_with_a_card(model, saved, hub):
    commit = model.push_to_hub("tiny-comet", token="secret", private=True, commit_message="first")
    assert commit == "https://hub/me/tiny-comet/commit/1"
    assert (hub.repo, hub.token, hub.private) == ("me/tiny-comet", "secret", True)
    assert hub.options["commit_message"] == "first"
    assert hub.files.keys() == {path.name for path in saved.iterdir()}
    assert hub.files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert b"A CoMeT memory" in hub.files["README.md"]


def test_push_to_hub_leaves_a_card_that_is_there(model, hub):
    hub.has_card = True
    model.push_to_hub("tiny-comet")
    assert "README.md" not in hub.files
    assert "model.safetensors" in hub.files


def test_push_to_hub_takes_an_adapter_away_that_was_there(named, hub):
    model = attached(named)
    model.add_adapter(cometlm.lora_config(2))
    model.push_to_hub("tiny-comet")
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} <= hub.files.keys()
    attached(named).push_to_hub("tiny-comet")
    assert not [name for name in hub.files if name.startswith("lora")]
    assert "model.safetensors" in hub.files


def test_push_to_hub_with_the_backbone(model, hub):
    model.push_to_hub("tiny-comet", backbone=True)
    assert "backbone/model.safetensors" in hub.files


def test_saving_may_push(model, tmp_path, hub):
    model.save_pretrained(tmp_path / "my-memory", push_to_hub=True)
    assert hub.repo == "me/my-memory"
    assert (tmp_path / "my-memory" / "config.json").exists()
    model.save_pretrained(tmp_path / "my-memory", push_to_hub=True, repo_id="other")
    assert hub.repo == "me/other"


# --- training -----------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = random_ids(30, seed=index)
        return {"input_ids": ids, "labels": ids}


def trainer_of(model, folder, train="model.comet."):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.comet.") or train in name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    return Trainer(model=model, args=arguments, train_dataset=Texts())


def test_the_trainer_resumes_to_the_same_weights(named, tmp_path):
    whole = attached(named)
    begun = memory_weights(whole.state_dict())
    begun = {name: weight.clone() for name, weight in begun.items()}
    trainer_of(whole, tmp_path / "run").train()
    want = memory_weights(whole.state_dict())
    assert any(not torch.equal(weight, begun[name]) for name, weight in want.items())

    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "config.json", "optimizer.pt"} <= files
    halfway = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert halfway.keys() == want.keys()

    resumed = attached(named)
    trainer_of(resumed, tmp_path / "again").train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    ours = memory_weights(resumed.state_dict())
    for name, weight in want.items():
        assert torch.equal(ours[name], weight), name
        assert not torch.equal(halfway[name], weight) or not weight.any(), name
    resumed.eval()
    assert torch.equal(logits(resumed), logits(whole.eval()))


def test_a_trainer_that_cannot_save_what_it_trained_says_so(named, tmp_path):
    model = attached(named)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "begun")
    trainer = trainer_of(model, tmp_path / "run", train="0.layer.mlp")
    with pytest.warns(UserWarning, match=r"[36] weights of the backbone were changed \(model\."):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "whole", backbone=True)


def test_what_the_trainer_saved_loads(named, tmp_path):
    model = attached(named)
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "done"))
    want = logits(model.eval())
    for folder in (tmp_path / "done", tmp_path / "run" / "checkpoint-4"):
        assert torch.equal(logits(CometForCausalLM.from_pretrained(folder)), want)
