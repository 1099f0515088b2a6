"""What a memory is like before training, and which weights learn at which rate."""

import pytest
import torch

import cometlm
from cometlm.memory import GlobalMemory
from cometlm.train.config import Gates, Start
from cometlm.train.lora import parameter_groups, set_trainable
from cometlm.train.start import fit_gates, start_like
from tests.real import tokenizer
from tests.tiny import random_ids, tiny_comet


def kept(model, ids, monkeypatch, read=None):
    """What each layer's gate keeps at each fold, [layers, folds, B · M]."""
    seen = {}
    own = GlobalMemory.update

    def noting(self, state, readout):
        if state is not None:
            both = torch.cat([self.norm(readout), state], dim=-1)
            seen.setdefault(id(self), []).append(torch.sigmoid(both @ self.gate[0]).flatten())
        return own(self, state, readout)

    monkeypatch.setattr(GlobalMemory, "update", noting)
    with torch.no_grad():
        model(ids, past_key_values=read, more_text=True)
    return torch.stack([torch.stack(folds) for folds in seen.values()])


def texts_with_keys(rows=3, tokens=36):
    """Texts of three chunks; a key's place in the second chunk of the first two rows only."""
    ids = torch.stack([random_ids(tokens, seed=b) for b in range(rows)])
    return ids, [range(14, 20), range(13, 18), range(2, 7)]


def test_gates_let_go_where_a_key_is_said(monkeypatch):
    """So few texts leave a gate enough freedom to be fitted exactly, until gates change states."""
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    before = model.config.comet_config
    fit_gates(model, [(ids, said)], Gates(keep=0.9, keep_at_key=0.2))
    assert model.config.comet_config == before
    for weights in model.model.comet.layers:
        memory = weights.global_memory
        assert not memory._forward_pre_hooks
        assert not memory.norm._forward_hooks
    for layer in kept(model, ids, monkeypatch):
        second = layer[0].view(3, 3)
        assert second[:2].sub(0.2).abs().max() < 0.1
        assert second[2:].sub(0.9).abs().max() < 0.1


def test_gates_of_memories_that_have_read_before(monkeypatch):
    """They are fitted at the states of those memories, and at the first chunk of a text too."""
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    said = [range(2, 8), *said[1:]]
    history = torch.stack([random_ids(5 * 12, seed=50 + b) for b in range(3)])
    with torch.no_grad():
        read = model(history[:, : 4 * 12], use_cache=True, more_text=True).past_key_values
    fit_gates(model, [(ids, said)], Gates(keep=0.9, keep_at_key=0.2, history=60), [history])
    seen = kept(model, ids, monkeypatch, read)
    assert seen.shape[1] == 3
    for layer in seen:
        first = layer[0].view(3, 3)
        assert first[[0, 2]].sub(0.2).abs().max() < 0.1
        assert first[1].sub(0.9).abs().max() < 0.1


def test_gates_that_look_at_nothing(monkeypatch):
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    fit_gates(model, [(ids, said)], Gates(keep=0.9, keep_at_key=0.9))
    assert kept(model, ids, monkeypatch)[:, 0].sub(0.9).abs().max() < 0.05


def test_gates_without_anything_to_fit_to():
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    with pytest.raises(ValueError, match=r"with a key and chunks without, .* got 0 with and 18"):
        fit_gates(model, [(ids, [range(0)] * 3)], Gates())
    fit_gates(tiny_comet("llama", gate=False).eval(), [(ids, said)], Gates())


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
