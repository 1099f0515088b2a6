"""A quantised frozen backbone: the memory, and LoRA beside it, are trained all the same."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import cometlm
from cometlm import extras
from cometlm.checkpoints import backbones as loading
from cometlm.checkpoints.memory import check_can_save
from cometlm.cli.console import load_quietly
from cometlm.model_loader import QuantizationWarning
from cometlm.train.config_file import read_config
from cometlm.train.trainable import set_trainable
from tests.real import tiny_comet, tokenizer
from tests.runs import as_config, losses, quietly, settings, start
from tests.tiny import SMALL, error, tiny_backbone

__all__ = ["settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone")
    cometlm.detach(tiny_comet("llama")).float().save_pretrained(path)
    return path


@pytest.fixture(params=["4bit", "8bit"])
def model(request, folder):
    config = BitsAndBytesConfig(**{f"load_in_{request.param}": True})
    backbone = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    return cometlm.attach(backbone, chunk_size=12, readout_tokens=3, stride=4, capacity=5, rank=2)


@pytest.mark.parametrize("mode", ["memory", "lora"])
def test_what_is_trained_learns_and_the_rest_stays(model, mode):
    set_trainable(model, mode)
    model.activation_checkpointing_enable()
    model.train()
    ids = torch.tensor([tokenizer("smollm2").encode("The ship left the harbour. " * 6)])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all(".comet." in name or ".lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= trained.keys()
    assert any(".readout" in name for name in moved)
    assert any(".lora_" in name for name in moved) == (mode == "lora")


def test_everything_of_it_cannot_be_trained(model):
    with pytest.raises(ValueError, match="mode full cannot train a quantised backbone"):
        set_trainable(model, "full")


def test_reading_does_not_change_what_is_trained_or_saved(model, tmp_path):
    """As histories, fitted gates and evaluations read; and sessions belong to exact weights."""
    set_trainable(model, "lora")
    ids = torch.tensor([tokenizer("smollm2").encode("The ship left the harbour. " * 6)])
    trained = [p for p in model.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = torch.autograd.grad(model.train()(ids, labels=ids).loss, trained)
    with torch.no_grad():
        model.eval()(ids)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    got = torch.autograd.grad(model.train()(ids, labels=ids).loss, trained)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="a quantised backbone is not written"):
        model.save_pretrained(tmp_path, backbone=True)
    check_can_save(model, backbone=False)
    model.config.backbone = str(resized(tmp_path / "resized"))
    for backbone in (False, True):
        with pytest.raises(ValueError, match="save the backbone before it is quantised"):
            check_can_save(model, backbone)


def resized(path):
    """Where the backbone has another vocabulary, as one that was resized after loading."""
    tiny_backbone("llama", vocab_size=99).save_pretrained(path)
    return path


def test_a_backbone_that_is_quantised_already_stays_so(model, tmp_path):
    cometlm.detach(model).save_pretrained(tmp_path)
    tokenizer("smollm2").save_pretrained(tmp_path)
    again, _ = cometlm.load(str(tmp_path), device="cpu", dtype=torch.float32, **SMALL)
    assert quantised_weights(again)
    assert again._backbone.is_quantized


@pytest.fixture
def wide(settings, tmp_path):
    """A run that begins with a backbone of 64 wide, which is a block of 4-bit weights."""
    widths = {"vocab_size": len(tokenizer("smollm2")), "hidden_size": 64, "intermediate_size": 128}
    begin = cometlm.attach(tiny_backbone("llama", **widths), **SMALL).float()
    begin.save_pretrained(tmp_path / "wide", backbone=True)
    tokenizer("smollm2").save_pretrained(tmp_path / "wide")
    shorter = {"mixture": {**settings["mixture"], "steps": 4}, "save_steps": 1}
    return {**settings, **shorter, "model": str(tmp_path / "wide")}


def quantised_weights(model):
    """Names of the weights that are integers now, packed or not."""
    return {n for n, p in model.named_parameters() if not p.dtype.is_floating_point}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_says_it_in_its_configuration(wide, tmp_path, bits, capsys):
    config = read_config(as_config(wide, tmp_path, quantization=bits, dtype="float32"))
    quietly(config)
    wanted_losses = losses(config.output)
    (Path(config.output) / "checkpoint-4" / "trainer_state.json").unlink()  # stopped at step 3
    model = quietly(config)
    assert losses(config.output) == wanted_losses
    projections = {name for name in quantised_weights(model) if "proj" in name}
    assert projections
    assert not [name for name in quantised_weights(model) if ".comet." in name]
    ids = torch.tensor([tokenizer("smollm2").encode("The ship left the harbour. " * 6)])
    where = {"device": "cpu", "dtype": torch.float32}
    again, _ = cometlm.load(config.output, quantization=bits, **where)
    assert quantised_weights(again) == quantised_weights(model)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        assert error(again(ids).logits, wanted) < 1e-4
        with pytest.warns(QuantizationWarning, match="was trained beside a quantised backbone"):
            plain, _ = cometlm.load(config.output, **where)
        assert error(plain(ids).logits, wanted) > 1e-3
    load_quietly(config.output, device="cpu")
    assert "was trained beside a quantised backbone" in capsys.readouterr().err
    with pytest.raises(ValueError, match="quantization: was"):
        quietly(replace(config, quantization=None))


def test_a_message_of_each_product_is_said_once(caplog):
    loading.quantization_of("8bit", torch.bfloat16)
    products = logging.getLogger("bitsandbytes.autograd._functions")
    for said in ("cast to float16", "cast to float16", "another thing"):
        products.warning(said)
    assert caplog.messages == ["cast to float16", "another thing"]


def test_what_cannot_be_quantised_says_why(settings, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"mode full .*quantization 8bit"):
        read_config(as_config(settings, tmp_path, quantization="8bit", mode="full", lora=None))
    with pytest.raises(ValueError, match="quantization must be one of 4bit, 8bit, got '2bit'"):
        cometlm.load("smollm2", quantization="2bit")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install accelerate bitsandbytes"):
        quietly(read_config(as_config(settings, tmp_path, quantization="4bit")))
