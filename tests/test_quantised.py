"""A quantised frozen backbone: the memory, and LoRA beside it, are trained all the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import cometlm
from cometlm.train.lora import set_trainable
from tests.real import tiny_comet, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
