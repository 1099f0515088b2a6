"""What a memory is like before training, and which weights learn at which rate."""

import pytest
import torch

import cometlm
from cometlm.train.config import Start
from cometlm.train.start import start_like
from cometlm.train.trainable import parameter_groups, set_trainable
from tests.real import tokenizer
from tests.tiny import tiny_comet


def test_tokens_start_like_a_text():
    model, words = cometlm.load("smollm2", device="cpu")
    start_like(model, words, Start(compression=",", readout="In short"))
    comet, embed = model.model.comet, model.model.embed_tokens.weight
    ids = words.encode("In short", add_special_tokens=False)
    assert torch.equal(comet.compression[0], embed[words.encode(",")[0]])
    for i, row in enumerate(comet.readout):
        assert torch.equal(row, embed[ids[i % len(ids)]])
    with pytest.raises(ValueError, match=r"start\.readout must be a text with tokens, got ''"):
        start_like(model, tokenizer("smollm2"), Start(readout=""))


def test_each_kind_of_weight_has_its_rate():
    model = tiny_comet("llama")
    set_trainable(model, "lora", cometlm.lora_config(r=2))
    others, memory, gates = parameter_groups(model, 1e-3, 5.0, weight_decay=0.1, gate_factor=0.2)
    assert [group["lr"] for group in (others, memory, gates)] == pytest.approx([1e-3, 5e-3, 1e-3])
    assert [group["weight_decay"] for group in (others, memory, gates)] == [0.1, 0, 0]
    assert len(gates["params"]) == 3
    assert {p.shape for p in gates["params"]} == {(1, 64)}
    counted = sum(len(group["params"]) for group in (others, memory, gates))
    assert counted == sum(p.requires_grad for p in model.parameters())
