"""Attention weights and gates beside the naive CoMeT's, which forms them plainly."""

from contextlib import contextmanager

import pytest
import torch

import cometlm
from cometlm.core import reference
from cometlm.core.attention import NAME
from cometlm.inspection import InspectedSession
from cometlm.inspection import attention as module
from cometlm.inspection.attention import watching
from tests.any_backbone import tiny
from tests.tiny import FAMILIES, SMALL, error, random_ids, scramble, tiny_comet

COUNT = 31  # of chunks of 12: two full ones and a rest


@contextmanager
def eager(model):
    """Weights [H, S, S] of each layer's plain softmax, as the naive model runs them."""
    found, config = [], model._backbone.config
    hooks = [
        cell.attention.register_forward_hook(lambda m, given, out: found.append(out[1][0]))
        for cell in model.model.cells
    ]
    config._attn_implementation = "eager"
    try:
        yield found
    finally:
        config._attn_implementation = NAME
        for hook in hooks:
            hook.remove()


def watched(model, ids):
    """(attention, its weights of all items) of each chunk's layers, as they are run."""
    found = []

    def see(layer, attention):
        assert layer == len(found) % len(model.model.cells)
        found.append((attention, attention.weights(torch.arange(attention.query.shape[1]))))

    with torch.no_grad(), watching(model, see):
        model.model(ids[None], close_last=True, chunk_lengths=[[12, 12, 7]])
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_the_references_softmax(family):
    check_weights(tiny_comet(family))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "gpt_oss", "stablelm"])
def test_weights_of_a_backbone_without_a_row(model_type):
    """With softcaps, with sinks, and of layers that are told aside."""
    model = cometlm.attach(tiny(model_type), **SMALL)
    scramble(model.model.comet, 0.5)
    check_weights(model, sums_to_one=model_type != "gpt_oss")


def check_weights(model, sums_to_one=True):
    ids = random_ids(COUNT)
    with torch.no_grad(), eager(model) as plain:
        reference.reference_hidden(model, ids)
    ours = watched(model, ids)
    assert len(ours) == len(plain) == 3 * len(model.model.cells)
    for (attention, weights), want in zip(ours, plain, strict=True):
        assert error(weights, want[:, attention.memory_slots :]) < 1e-5  # a softmax in float32
        if sums_to_one:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("switch", ["global_memory", "temporary_memory"])
def test_parts_are_sums_of_the_references_softmax(switch):
    for sizes in ({}, {switch: False}):
        model, ids = tiny_comet("qwen3", **sizes), random_ids(COUNT)
        with torch.no_grad(), eager(model) as plain:
            reference.reference_hidden(model, ids)
        for (attention, weights), want in zip(watched(model, ids), plain, strict=True):
            first, memory = attention.global_slots, attention.memory_slots
            own = want[:, memory:]
            parts = [own[..., :first], own[..., first:memory], own[..., memory : memory + 1]]
            wanted = torch.stack([x.sum(-1) for x in (*parts, own[..., memory + 1 :])], dim=-1)
            assert error(attention.parts(weights), wanted) < 1e-5
            assert first == (model.config.comet_config.global_slots if memory else 0)


def test_means_are_formed_in_pieces(monkeypatch):
    model = tiny_comet("llama")
    attention, weights = watched(model, random_ids(COUNT))[-1]
    items = torch.tensor([0, 2, 3, 5, 6])
    monkeypatch.setattr(module, "_MOST_WEIGHTS", 2 * weights[:, 0].numel())
    torch.testing.assert_close(attention.mean_weights(items), weights[:, items].mean(1))


@pytest.mark.parametrize("gate", [True, False])
def test_gates_are_the_references(gate, monkeypatch):
    found, plain = [], reference._gate

    def noted(memory, state, readout):
        if state is None or memory.gate is None:
            found.append(torch.zeros(len(readout)))
        else:
            both = torch.cat([memory.norm(readout), state], dim=-1)
            found.append((1 / (1 + torch.exp(-(both @ memory.gate.T))))[:, 0])
        return plain(memory, state, readout)

    model, ids = tiny_comet("llama", gate=gate), random_ids(37)
    monkeypatch.setattr(reference, "_gate", noted)
    with torch.no_grad():
        reference.reference_hidden(model, ids[:36])
    session = InspectedSession(model)
    gates = [session.latest.gates for _ in session.reading(ids)]
    assert len(gates) == 3
    want = torch.stack(found).unflatten(0, (3, -1))
    torch.testing.assert_close(torch.stack(gates), want.float(), rtol=1e-5, atol=1e-6)
    assert (want[1:] > 0).all() == gate


def test_nothing_is_left_of_a_watch():
    model = tiny_comet("llama")
    seen = []
    with pytest.raises(ZeroDivisionError), watching(model, lambda *call: seen.append(call)):
        raise ZeroDivisionError
    assert model._backbone.config._attn_implementation == NAME
    model(random_ids(5)[None])
    assert seen == []
