"""What a memory is like before training, and which weights learn at which rate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cometlm
from cometlm.core.memory import GlobalMemory
from cometlm.train.config import Start
from cometlm.train.stages import Gates
from cometlm.train.start import _fitted, fit_gates, start_like
from cometlm.train.trainable import parameter_groups, set_trainable
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
        model(ids, past_key_values=read, close_last=True)
    return torch.stack([torch.stack(folds) for folds in seen.values()])


def texts_with_keys(rows=3, tokens=36):
    """Texts of three chunks; a key's place in the second chunk of the first two rows only."""
    ids = torch.stack([random_ids(tokens, seed=b) for b in range(rows)])
    return ids, [[range(14, 20)], [range(13, 18)], [range(2, 7)]]


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
        assert second[:2].max() < 0.3
        assert second[2:].min() > 0.8


def test_gates_of_memories_that_have_read_before(monkeypatch):
    """They are fitted at the states of those memories, and at the first chunk of a text too."""
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    said = [[range(2, 8)], *said[1:]]
    history = torch.stack([random_ids(5 * 12, seed=50 + b) for b in range(3)])
    with torch.no_grad():
        read = model(history[:, : 4 * 12], use_cache=True, close_last=True).past_key_values
    gates = Gates(keep=0.9, keep_at_key=0.2, history=60)
    fit_gates(model, [(ids, said)], gates, [(history, [[]] * 3)])
    seen = kept(model, ids, monkeypatch, read)
    assert seen.shape[1] == 3
    for layer in seen:
        first = layer[0].view(3, 3)  # of the text; the history's own chunks are fitted to as well
        assert first[[0, 2]].max() < 0.3
        assert first[1].min() > 0.8


@given(seed=st.integers(0, 1000))
def test_a_few_hard_samples_count_as_much_as_many_easy_ones(seed):
    """Easy ones draw a regression to their mean away from what tells the hard ones apart."""
    chance = torch.Generator().manual_seed(seed)
    holds = torch.cat([torch.zeros(1000), torch.ones(1000)]).long()
    x = torch.randn(2000, 3, generator=chance) * torch.tensor([0.1, 0.1, 0.0])
    x[:, 2] = 1.0  # in place of a bias
    x[:, 0] += torch.where(holds == 1, -1.0, 1.0)
    x[:1000:50] += torch.tensor([-2.2, 5.0, 0.0])  # hay that looks like a key but for one thing
    weights = _fitted(x, holds, Gates(keep=0.99, keep_at_key=0.01))
    keep = torch.sigmoid(x @ weights)
    assert keep[holds == 0].min() > 0.9
    assert keep[holds == 1].max() < 0.1


def test_keys_may_count_more_than_hay():
    """Where the two cannot be told apart, the share says which side is served."""
    holds = torch.cat([torch.zeros(500), torch.ones(500)]).long()
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 1.0
    x[:, 0] += torch.where(holds == 1, -0.5, 0.5)
    keep = [
        torch.sigmoid(x @ _fitted(x, holds, Gates(keep=0.99, keep_at_key=0.01, key_share=share)))
        for share in (0.1, 0.5, 0.9)
    ]
    at_keys = [float(one[holds == 1].mean()) for one in keep]
    at_hay = [float(one[holds == 0].mean()) for one in keep]
    assert at_keys[0] > at_keys[1] + 0.1 > at_keys[2] + 0.2
    assert at_hay[0] > at_hay[1] + 0.1 > at_hay[2] + 0.2


def test_sharp_gates_are_the_fitted_ones_many_times():
    ids, said = texts_with_keys()
    gates = []
    for sharpness in (1.0, 3.0):
        model = tiny_comet("llama").train()
        fit_gates(model, [(ids, said)], Gates(sharpness=sharpness))
        assert model.training
        gates.append([one.global_memory.gate for one in model.model.comet.layers])
    for once, thrice in zip(*gates, strict=True):
        torch.testing.assert_close(thrice, 3 * once)


@given(seed=st.integers(0, 1000))
def test_more_ridge_makes_fits_to_two_draws_more_alike(seed):
    """Of many features one tells a key, and a small sample finds others that seem to."""
    chance = torch.Generator().manual_seed(seed)
    holds = torch.cat([torch.zeros(60), torch.ones(60)]).long()
    alike = []
    draws = torch.randn(2, 120, 40, generator=chance)
    draws[..., 0] += torch.where(holds == 1, -3.0, 3.0)
    for ridge in (1e-4, 1.0):
        gates = Gates(keep=0.99, keep_at_key=0.01, ridge=ridge)
        one, other = (_fitted(x, holds, gates) for x in draws)
        alike.append(float(torch.cosine_similarity(one, other, dim=0)))
    assert alike[1] > alike[0]


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_gates_can_be_fitted_near_those_that_are_there(sharpness):
    """With a ridge that outweighs all texts they stay; without `near` they come to nothing."""
    ids, said = texts_with_keys()
    left = []
    for near in (False, True):
        model = tiny_comet("llama")
        gates = [one.global_memory.gate for one in model.model.comet.layers]
        with torch.no_grad():
            for gate in gates:
                gate.copy_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)))
        before = [gate.clone() for gate in gates]
        fit_gates(model, [(ids, said)], Gates(ridge=1e6, near=near, sharpness=sharpness))
        left.append(
            [(gate - was).norm() / was.norm() for gate, was in zip(gates, before, strict=True)]
        )
    assert min(left[0]) > 0.99
    assert max(left[1]) < 0.01


def test_histories_are_fitted_to_as_well():
    """Their chunks are samples like any other: here none of the texts' own counts."""
    model = tiny_comet("llama").eval()
    ids = torch.stack([random_ids(60, seed=b) for b in range(3)])
    parts = [(ids[:, :36], [[range(36)]] * 3)]  # of a key too long for one chunk
    with pytest.raises(ValueError, match=r"got 0 with and 27 without"):
        fit_gates(model, parts, Gates(history=60), [(ids, [[]] * 3)])
    fit_gates(model, parts, Gates(history=60), [(ids, [[range(14, 20)]] * 3)])


def test_some_texts_may_be_read_by_new_memories():
    """Behind a history a text's first chunk is a sample too; that of a new memory has no state."""
    model = tiny_comet("llama").eval()
    ids = torch.stack([random_ids(60, seed=b) for b in range(3)])
    hay = [(ids[:, :36], [[]] * 3)] * 4
    for fresh, samples in ((0.0, 27 + 4 * 27), (1.0, 27 + 4 * 18)):
        with pytest.raises(ValueError, match=f"got 0 with and {samples} without"):
            fit_gates(model, hay, Gates(history=60, fresh=fresh), [(ids, [[]] * 3)])


def test_a_text_may_say_several_keys():
    model = tiny_comet("llama").eval()
    ids, _ = texts_with_keys()
    said = [[range(1, 5), range(13, 17), range(25, 29)]] * 3
    with pytest.raises(ValueError, match="got 18 with and 0 without"):
        fit_gates(model, [(ids, said)], Gates())
    said = [[range(13, 17), range(20, 30)]] * 3  # the second chunk has one key and part of another
    with pytest.raises(ValueError, match="got 9 with and 0 without"):
        fit_gates(model, [(ids, said)], Gates())


def test_gates_of_lower_layers_can_be_left():
    model = tiny_comet("llama").eval()
    gates = [one.global_memory.gate for one in model.model.comet.layers]
    before = [gate.clone() for gate in gates]
    ids, said = texts_with_keys()
    fit_gates(model, [(ids, said)], Gates(first_layer=1))
    changed = [not gate.equal(own) for gate, own in zip(gates, before, strict=True)]
    assert changed == [False, *[True] * (len(gates) - 1)]


def test_gates_that_look_at_nothing(monkeypatch):
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    fit_gates(model, [(ids, said)], Gates(keep=0.9, keep_at_key=0.9))
    assert kept(model, ids, monkeypatch)[:, 0].sub(0.9).abs().max() < 0.05


def test_gates_without_anything_to_fit_to():
    model = tiny_comet("llama").eval()
    ids, said = texts_with_keys()
    with pytest.raises(ValueError, match=r"with a key and chunks without, .* got 0 with and 18"):
        fit_gates(model, [(ids, [[]] * 3)], Gates())
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
