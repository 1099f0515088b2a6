"""Which backbone a checkpoint names: the one that its memory was read beside, wherever it goes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import cometlm
from cometlm import CometForCausalLM
from cometlm.checkpoints import memory
from cometlm.checkpoints.source import CARRIED
from tests.checkpoints import attached, logits
from tests.tiny import error, tiny_backbone


@pytest.fixture
def model(named):
    return attached(named)


@pytest.fixture
def other(named, tmp_path):
    """A backbone of the same shape with other weights."""
    config = AutoModelForCausalLM.from_pretrained(named).config
    backbone = tiny_backbone("llama", seed=1, vocab_size=config.vocab_size).float()
    backbone.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def again(model, folder):
    """The model as it is loaded from where it was saved."""
    model.save_pretrained(folder)
    return CometForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("as_model", [False, True])
def test_another_backbone_that_was_given_is_named(model, other, tmp_path, as_model):
    model.save_pretrained(tmp_path / "first")
    given = AutoModelForCausalLM.from_pretrained(other) if as_model else other
    changed = CometForCausalLM.from_pretrained(tmp_path / "first", backbone=given)
    assert error(logits(changed), logits(model)) > 1e-2
    loaded = again(changed, tmp_path / "second")
    assert loaded.config.backbone == other
    assert torch.equal(logits(loaded), logits(changed))


def test_a_backbone_that_was_taken_out_of_the_checkpoint_is_found(model, tmp_path):
    model.save_pretrained(tmp_path / "first", backbone=True)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "first", subfolder="backbone")
    loaded = CometForCausalLM.from_pretrained(tmp_path / "first", backbone=own)
    assert torch.equal(logits(again(loaded, tmp_path / "second")), logits(model))


def test_a_backbone_that_came_along_goes_along_where_its_folder_goes(model, tmp_path):
    model.save_pretrained(tmp_path / "first", backbone=True)
    loaded = again(CometForCausalLM.from_pretrained(tmp_path / "first"), tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    assert torch.equal(logits(CometForCausalLM.from_pretrained(tmp_path / "moved")), logits(model))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_backbone_that_came_from_the_hub_is_found(named, model, tmp_path, monkeypatch, by_name):
    """What is saved of it on this machine names the copy that was downloaded."""
    cache, revision = tmp_path / "cache", "0" * 40
    repository = cache / "models--me--it"
    model.save_pretrained(repository / "snapshots" / revision, backbone=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    if by_name:
        for file in named.glob("tokenizer*"):
            shutil.copy(file, repository / "snapshots" / revision)
        monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache), raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        loaded, _ = cometlm.load("me/it", device="cpu", dtype=torch.float32)
    else:
        options = {"cache_dir": str(cache), "local_files_only": True}
        loaded = CometForCausalLM.from_pretrained("me/it", **options)
    assert torch.equal(logits(again(loaded, tmp_path / "saved")), logits(model))


def test_a_push_takes_the_backbone_along_or_says_that_it_does_not(model, tmp_path, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, *args, **options):
            return False

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(memory, "HfApi", Api)
    here = "by a folder of this machine, .*: push with backbone=True"
    with pytest.warns(UserWarning, match=here):
        model.push_to_hub("named")
    model.save_pretrained(tmp_path / "first", backbone=True)
    first = CometForCausalLM.from_pretrained(tmp_path / "first")
    first.push_to_hub("whole")
    first._backbone.is_quantized = True  # whose weights no checkpoint can hold
    with pytest.warns(UserWarning, match=here):
        first.push_to_hub("quantised")
    shutil.rmtree(tmp_path / "first")
    there = CometForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(there), logits(model))
    assert CARRIED in (tmp_path / "whole" / "config.json").read_text()
