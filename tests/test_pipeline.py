"""The wave: what several ranks compute together is what one process computes."""

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cometlm.core.training_plan import TrainingPlan
from cometlm.parallel.blocks import balanced
from cometlm.parallel.mesh import make_mesh
from cometlm.parallel.pipeline import Pipeline, sum_gradients
from cometlm.parallel.shard import shard
from tests.ranks import run_ranks
from tests.tiny import error, random_ids, tiny_comet

CHUNK = 12
# Name: family, sizes, tokens of each row, first label.
CASES = {
    "even": ("llama", {}, [4 * CHUNK], 0),
    "uneven, an open chunk last": ("qwen3", {}, [7 * CHUNK + 5] * 2, 0),
    "fewer chunks than ranks": ("llama", {}, [CHUNK + 3], 0),
    "a single chunk": ("llama", {}, [CHUNK - 2], 0),
    "labels in the first chunk only": ("llama", {}, [5 * CHUNK], -10),
    "labels in the last chunk only": ("llama", {}, [5 * CHUNK], 5 * CHUNK - 3),
    "ragged": ("llama", {}, [6 * CHUNK + 1, 2 * CHUNK, 5], 0),
    "no global memory": ("llama", {"global_memory": False}, [5 * CHUNK], 0),
    "no memory at all": (
        "llama",
        {"global_memory": False, "temporary_memory": False},
        [5 * CHUNK],
        0,
    ),
    "no temporary memory": ("llama", {"temporary_memory": False}, [5 * CHUNK], 0),
    "entries of several ranks": ("gemma3_text", {"capacity": 14}, [6 * CHUNK], 0),
}


def batch(lengths, first):
    width = max(lengths)
    ids = torch.stack([random_ids(width, seed=b) for b in range(len(lengths))])
    mask = torch.tensor([[int(i < n) for i in range(width)] for n in lengths])
    labels = ids.masked_fill(mask == 0, -100)
    if first < 0:
        labels[:, -first:] = -100
    else:
        labels[:, :first] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def compare(name, recompute, evaluating=False, frozen=()):
    """Largest errors of loss and gradients of one case, on this rank."""
    family, sizes, lengths, first = CASES[name]
    model = tiny_comet(family, **sizes).train()
    for part, parameter in model.named_parameters():
        if part.startswith(frozen):
            parameter.requires_grad_(False)
    model.training_plan = TrainingPlan(memory_frozen=True)
    inputs = batch(lengths, first)
    alone = model(**inputs).loss
    alone.backward()
    wanted = gradients(model)
    model.zero_grad()
    if recompute:
        model.activation_checkpointing_enable()
    if evaluating:  # gradients without training, as sensitivity maps want them
        model.eval()
    group = dist.group.WORLD
    model.training_plan = replace(model.training_plan, pipeline=Pipeline(group))
    part = model(**inputs, use_cache=False).loss
    part.backward()
    model.training_plan.pipeline.flush()
    sum_gradients(list(model.parameters()), group)
    loss = part.detach()
    dist.all_reduce(loss)
    got = gradients(model)
    worst = max(error(got[n], wanted[n]) for n in wanted if wanted[n].abs().max() > 0)
    zeros = [float(got[n].abs().max()) for n in wanted if wanted[n].abs().max() == 0]
    return float(error(loss, alone.detach())), float(worst), max(zeros, default=0.0)


def compare_all():
    return {
        (name, recompute): compare(name, recompute) for name in CASES for recompute in (False, True)
    }


def compare_odd_modes():
    """Ranks do not see of each other what is trained; the memory of layer 0 wants no gradient."""
    early = ("model.embed_tokens", "model.cells.0", "model.comet.layers.0")
    early += ("model.comet.readout", "model.comet.compression")
    return {
        "evaluating": compare("even", recompute=False, evaluating=True),
        "frozen below": compare("even", recompute=False, frozen=early),
    }


def test_what_wants_no_gradient_and_what_is_not_trained():
    for results in run_ranks(2, compare_odd_modes):
        for case, (loss, gradient, _) in results.items():
            assert loss < 1e-9, case
            assert gradient < 1e-6, case


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_the_single_processs(ranks):
    for results in run_ranks(ranks, compare_all):
        for case, (loss, gradient, zeros) in results.items():
            assert loss < 1e-9, case
            assert gradient < 1e-6, case  # norms of float32 sum in another order
            assert zeros < 1e-12, case


SHARDED = {
    "even": ("llama", {}, 4 * CHUNK),
    "uneven": ("qwen3", {}, 5 * CHUNK + 5),
    "entries of several ranks": ("gemma3_text", {"capacity": 14}, 6 * CHUNK),
    "no temporary memory": ("llama", {"temporary_memory": False}, 2 * CHUNK),
}
STEPS = 10


def trained_alone(family, sizes, tokens):
    """Losses and weights of steps on two samples at a time, one process, plain descent."""
    model = tiny_comet(family, **sizes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for turn in range(STEPS):
        samples = [random_ids(tokens, seed=2 * turn + group)[None] for group in range(2)]
        loss = sum(model(ids, labels=ids).loss for ids in samples) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def trained_sharded(name, recompute):
    """Largest errors of losses and weights after ten steps on 2 × 2 ranks."""
    family, sizes, tokens = SHARDED[name]
    wanted_losses, wanted = trained_alone(family, sizes, tokens)
    mesh = make_mesh(2)
    model = tiny_comet(family, **sizes).train()
    if recompute:
        model.activation_checkpointing_enable()
    shard(model, mesh)
    model.training_plan = replace(model.training_plan, pipeline=Pipeline(mesh["chunk"].get_group()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    group, worst = mesh.get_local_rank("data"), 0.0
    for turn in range(STEPS):
        ids = random_ids(tokens, seed=2 * turn + group)[None]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.training_plan.pipeline.flush()
        sum_gradients(trained, mesh["chunk"].get_group())
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        worst = max(worst, abs(float(total) / 2 - wanted_losses[turn]))
    got = {n: p.full_tensor() for n, p in model.named_parameters()}
    return worst, max(float(error(got[n].detach(), wanted[n])) for n in wanted)


def trained_sharded_all():
    return {(name, again): trained_sharded(name, again) for name in SHARDED for again in (0, 1)}


@pytest.mark.slow
def test_ten_steps_with_sharded_weights_on_two_by_two_ranks():
    for results in run_ranks(4, trained_sharded_all):
        for case, (loss, weights) in results.items():
            assert loss < 1e-9, case
            assert weights < 1e-9, case


def too_few_chunks():
    mesh = make_mesh(2)
    model = tiny_comet("llama").train()
    shard(model, mesh)
    model.training_plan = replace(model.training_plan, pipeline=Pipeline(mesh["chunk"].get_group()))
    said = []
    for ask in (
        lambda: model(random_ids(5)[None], labels=random_ids(5)[None], use_cache=False),
        lambda: shard(model, mesh),
    ):
        try:
            ask()
        except ValueError as problem:
            said.append(str(problem))
    return said


def test_what_sharded_ranks_cannot_do():
    for said in run_ranks(2, too_few_chunks):
        assert re.search("1 chunks .*chunk_parallel=2", said[0])
        assert "sharded already" in said[1]


def refusals():
    said = []
    model = tiny_comet("llama")
    model.training_plan = replace(model.training_plan, pipeline=Pipeline(dist.group.WORLD))
    for ask in (lambda: model(random_ids(30)[None]), lambda: make_mesh(3)):
        try:
            ask()
        except ValueError as error:
            said.append(str(error))
    mesh = make_mesh(2)
    return said, mesh.mesh_dim_names, tuple(mesh.shape)


def test_what_ranks_cannot_do():
    for said, names, shape in run_ranks(2, refusals):
        assert "labels" in said[0]
        assert re.search("chunk_parallel must .*2, got 3", said[1])
        assert (names, shape) == (("data", "chunk"), (1, 2))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 6))
def test_blocks_are_as_even_as_can_be(costs, parts):
    found = balanced(costs, parts)
    assert len(found) == parts
    assert [t for block in found for t in block] == list(range(len(costs)))
    assert sum(map(bool, found)) == min(parts, len(costs))
    worst = max(sum(costs[t] for t in block) for block in found)
    assert worst == best(tuple(costs), parts)


def best(costs, parts):
    """The cheapest most expensive block, by trying everything."""
    if parts == 1 or len(costs) <= 1:
        return sum(costs)
    return min(max(sum(costs[:n]), best(costs[n:], parts - 1)) for n in range(1, len(costs) + 1))
