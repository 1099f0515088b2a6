"""A name is resolved once, into what everything else asks: `Source`."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, LlamaForCausalLM

import cometlm
from cometlm.checkpoints import source as sources
from cometlm.checkpoints.backbones import BUILT_IN, bits_of
from cometlm.checkpoints.source import Source, kind_of
from cometlm.cli import console
from cometlm.config import CometConfig, sizes_for
from cometlm.session.file import read_document
from cometlm.train.config import TrainConfig
from cometlm.train.run import train
from tests import real
from tests.checkpoints import SIZES, attached


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone and a tokenizer."""
    return real.save_backbone(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(folder):
    path = folder.parent / "checkpoint"
    attached(folder).save_pretrained(path)
    return path


@pytest.fixture
def asked(monkeypatch):
    """Names that transformers is asked for a config of."""
    names = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", names.append)
    return names


# --- what a source knows ------------------------------------------------------------------------


def test_a_backbone_in_a_folder(folder):
    source = Source.resolve(folder)
    assert (source.name, source.kind, source.location) == (str(folder), "folder", str(folder))
    assert not source.is_checkpoint
    assert not source.has_memory
    assert source.backbone is source
    assert source.backbone_config.hidden_size == 32
    assert source.memory_config(chunk_size=9) is None
    assert source.comet_config() == sizes_for(source.backbone_config, {})  # it has 256 positions
    assert source.comet_config().chunk_size == 64
    assert source.comet_config(chunk_size=9, seed=3) == CometConfig(chunk_size=9)
    assert type(source.load_backbone()) is LlamaForCausalLM
    assert source.load_tokenizer()("a")["input_ids"] == real.tokenizer("smollm2")("a")["input_ids"]


def test_a_checkpoint_and_the_backbone_it_names(folder, checkpoint):
    source = Source.resolve(str(checkpoint))
    assert source.is_checkpoint
    assert source.has_memory
    assert source.memory_location == str(checkpoint)
    assert source.comet_config() == CometConfig(**SIZES)
    assert source.backbone_config.model_type == "llama"
    assert source.backbone.name == str(folder)
    assert source.backbone is source.backbone
    assert type(source.load_backbone(dtype=torch.float32)) is LlamaForCausalLM
    assert len(source.load_tokenizer()) == len(real.tokenizer("smollm2"))


def test_a_built_in_model_comes_with_the_memory_that_ships():
    source = Source.resolve("smollm2")
    assert (source.name, source.kind) == ("smollm2", "built-in")
    assert not source.is_checkpoint
    assert source.has_memory
    assert Path(source.memory_location, "model.safetensors").exists()
    assert source.comet_config().chunk_size == 2048
    assert source.comet_config(seed=0).chunk_size == BUILT_IN["smollm2"].sizes["chunk_size"]


def test_a_checkpoint_that_carries_its_backbone(folder, tmp_path):
    attached(folder).save_pretrained(tmp_path / "whole", backbone=True)
    source = Source.resolve(tmp_path / "whole")
    assert type(source.load_backbone()) is LlamaForCausalLM
    assert source.backbone_config.hidden_size == 32
    with pytest.raises(OSError, match="whole holds no tokenizer"):
        source.load_tokenizer()
    with pytest.raises(ValueError, match="whole carries its backbone"):
        _ = source.backbone


def test_other_sizes_leave_the_source_as_it_is(checkpoint):
    source = Source.resolve(checkpoint)
    assert source.memory_config(chunk_size=20, gate=False).comet["chunk_size"] == 20
    assert source.comet_config() == CometConfig(**SIZES)
    assert source.comet_config(chunk_size=20).chunk_size == 20
    for wrong in ({"rank": 9}, {"seed": 0}):
        with pytest.raises(ValueError, match=r"only chunk_size, .*overlap may be others") as caught:
            source.comet_config(**wrong)
        assert str(wrong) in str(caught.value)


# --- once ---------------------------------------------------------------------------------------


@pytest.fixture
def resolved(monkeypatch):
    """Names that are resolved, in order."""
    names = []
    monkeypatch.setattr(sources, "kind_of", lambda name: names.append(name) or kind_of(name))
    return names


def test_load_resolves_each_name_once(folder, checkpoint, resolved):
    cometlm.load(str(checkpoint), device="cpu")
    assert resolved == [str(checkpoint), str(folder)]
    cometlm.load("smollm2", device="cpu")
    assert resolved[2:] == ["smollm2"]


def test_a_run_resolves_its_model_once(folder, tmp_path, resolved):
    settings = {"model": str(folder), "output": str(tmp_path / "out"), "records": "none.jsonl"}
    with pytest.raises((ValueError, OSError), match="none"):
        train(TrainConfig(**settings, sizes=SIZES), device="cpu", log=lambda line: None)
    assert resolved == [str(folder)]


def test_load_takes_a_source(folder, checkpoint):
    model, _ = cometlm.load(Source.resolve(checkpoint), device="cpu", dtype=torch.float32)
    again, _ = cometlm.load(str(checkpoint), device="cpu", dtype=torch.float32)
    assert model.config.name_or_path == again.config.name_or_path == str(checkpoint)
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    new, _ = cometlm.load(Source.resolve(folder), device="cpu", seed=4, **SIZES)
    assert new.config.comet_config == CometConfig(**SIZES)


def test_a_source_is_resolved_to_itself(folder):
    source = Source.resolve(folder)
    assert Source.resolve(source) is source


def test_sizes_are_refused_before_weights_are_loaded(folder, monkeypatch):
    monkeypatch.setattr(Source, "load_backbone", None)
    with pytest.raises(ValueError, match=r"overlap .*less than chunk_size=12, got 12"):
        cometlm.load(str(folder), device="cpu", **SIZES, overlap=12)


@pytest.mark.parametrize(
    ("sizes", "overlap"),
    [
        ({}, 512),
        ({"capacity": 64}, 512),
        ({"chunk_size": 4096}, 512),
        ({"chunk_size": 96}, 24),
        ({"chunk_size": 3}, 0),
        ({"chunk_size": 96, "overlap": 90}, 90),
    ],
)
def test_the_overlap_of_another_chunk_size_is_at_most_a_quarter_of_it(sizes, overlap):
    config = Source.resolve("smollm2").memory_config(**sizes)
    assert config.comet_config.overlap == overlap


def test_a_dtype_by_its_name(folder):
    assert (
        cometlm.load(str(folder), device="cpu", **SIZES, dtype="float64")[0].dtype == torch.float64
    )
    with pytest.raises(ValueError, match=r"floating-point dtype .*, got 'foo'"):
        cometlm.load(str(folder), device="cpu", **SIZES, dtype="foo")


# --- names that lead nowhere --------------------------------------------------------------------


def test_kinds_of_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "mine"):
        Path(name).mkdir()
    named = {name: kind_of(name) for name in ("smollm2", "mine", "somebody/model", "", "x" * 5000)}
    assert list(named.values()) == ["built-in", "folder", "hub", "hub", "hub"]


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "a/b/c", "two words", ""])
def test_the_hub_is_not_asked_for_what_cannot_be_there(name, asked):
    with pytest.raises(OSError, match="cannot be a hub id") as caught:
        Source.resolve(name)
    assert repr(name) in str(caught.value)
    assert asked == []


def test_a_file_and_an_empty_folder_are_named(tmp_path, asked):
    (tmp_path / "text.txt").touch()
    with pytest.raises(OSError, match=r"text\.txt' is a file"):
        Source.resolve(tmp_path / "text.txt")
    with pytest.raises(OSError, match=r"holds no config\.json"):
        Source.resolve(tmp_path)
    assert asked == []


def test_a_name_with_a_slip_hints_at_the_right_one(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="did you mean smollm2"):
        Source.resolve("smolm2")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RepositoryNotFoundError, "has none of that name"),
        (GatedRepoError, "accepted its terms"),
        (huggingface_hub.errors.LocalEntryNotFoundError, "cannot be reached"),
        (RuntimeError, "in three\nlines of words"),
    ],
)
def test_what_the_hub_answers_is_told(monkeypatch, kind, words):
    def refuse(name, **_):
        try:
            raise kind.__new__(kind)
        except kind as error:
            raise OSError("in three\nlines of words") from error

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(OSError, match=words) as caught:
        Source.resolve("somebody/model")
    assert "somebody/model" in str(caught.value)


def test_a_backbone_that_is_gone_or_none_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "gone")
    attached(tmp_path / "gone").save_pretrained(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(OSError, match=r"checkpoint names is missing: .*gone"):
        cometlm.load(str(tmp_path / "checkpoint"), device="cpu")
    with pytest.raises(ValueError, match="checkpoint names no backbone"):
        sources.resolve_backbone("checkpoint", "")


def test_a_checkpoint_is_no_backbone_of_another(checkpoint):
    with pytest.raises(ValueError, match="backbone must be a model without memory") as caught:
        cometlm.CometForCausalLM.from_pretrained(checkpoint, backbone=str(checkpoint))
    assert repr(str(checkpoint)) in str(caught.value)


# --- sessions name their model ------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "8bit"])
def test_a_session_knows_how_its_backbone_was_quantised(folder, tmp_path, quantization):
    where = {"device": "cpu", "dtype": torch.float32}
    model, tokenizer = cometlm.load(str(folder), quantization=quantization, **where, **SIZES)
    assert bits_of(model._backbone) == quantization
    session = model.session(tokenizer)
    session.read("The lamp went out. " * 9)
    session.save(tmp_path / "s")
    assert read_document(tmp_path / "s")["model"].get("quantization") == quantization
    again, _ = console.load_for_session(tmp_path / "s", None, "cpu")
    kept = cometlm.Session.load(tmp_path / "s", again, tokenizer)
    assert kept.stats() == session.stats()
