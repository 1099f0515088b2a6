"""Gates that learn where what they look at is white."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cometlm
from cometlm.checkpoints.atomic_write import read_weights
from cometlm.checkpoints.memory import WEIGHTS
from cometlm.core.memory import GlobalMemory
from cometlm.train import gates as whitening
from cometlm.train.chunk_plans import Chunking
from cometlm.train.config import Gates
from cometlm.train.config_file import config_of, read_config
from cometlm.train.gates import (
    FILE,
    MOST_BYTES,
    Moments,
    WhitenedGates,
    Whitening,
    gates_of,
    load_whitening,
    peak_bytes,
    save_whitening,
    watched_gates,
    whitening_for,
)
from tests.rank_runs import assert_same_run, trained, trained_on
from tests.rank_runs import settings as of_ranks
from tests.runs import as_config, heard, losses, quietly, settings, start
from tests.tiny import batch_of, error, refused, tiny_comet

__all__ = ["of_ranks", "settings", "start"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
WIDTH = 24


def rows_with_a_long_mean(count, seed=0, length=30.0, spread=1.0):
    """Rows [count, WIDTH] whose cosine to each other is close to 1."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    scales = torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    noise = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64) * scales
    return length * mean / mean.norm() + spread * noise


def white(rows, shrinkage=0.05):
    moments = Moments()
    for part in rows.split(17):
        moments.add(part)
    return moments.whitening(shrinkage)


# --- P ------------------------------------------------------------------------------------------


def test_a_folded_gate_gives_the_logits_of_white_features():
    """Those of v and b: u·x stands for the 1 that a bias is multiplied with."""
    rows = rows_with_a_long_mean(500)
    how = white(rows)
    theta = torch.randn(WIDTH + 1, dtype=torch.float64)
    along = rows @ how.bias
    features = torch.cat([(rows - along[:, None] * how.mean) @ how.root, along[:, None]], dim=1)
    folded = F.linear(rows, how.to_weight(theta))[:, 0]
    assert error(folded, features @ theta) < 1e-10
    assert abs(float(along.mean()) - 1) < 1e-12
    exact = rows - (along - 1)[:, None] * how.mean  # where u·x is 1 they are v·Σ^(-1/2)(x − μ) + b
    wanted = (exact - how.mean) @ how.root @ theta[:-1] + theta[-1]
    assert error(F.linear(exact, how.to_weight(theta))[:, 0], wanted) < 1e-10


def test_features_are_white_and_the_bias_varies_least():
    rows = rows_with_a_long_mean(4000)
    how = white(rows, shrinkage=1e-9)
    assert error((rows - rows.mean(0)) @ how.root, rows - rows.mean(0)) > 0.1
    whitened = (rows - how.mean) @ how.root
    assert error(whitened.T @ whitened / len(rows), torch.eye(WIDTH).double()) < 1e-4
    varies = float((rows @ how.bias).std())
    others = torch.randn(200, WIDTH, dtype=torch.float64)
    others += torch.outer((1 - others @ how.mean) / how.mean.square().sum(), how.mean)
    assert error(others @ how.mean, torch.ones(200).double()) < 1e-9
    assert varies < float((rows @ others.T).std(0).min())
    assert varies < 0.01


def test_a_gradient_of_theta_is_autograds():
    how = white(rows_with_a_long_mean(300))
    rows = rows_with_a_long_mean(5, seed=1)
    theta = torch.randn(WIDTH + 1, dtype=torch.float64, requires_grad=True)
    weight = how.to_weight(theta).detach().requires_grad_()
    for gate in (how.to_weight(theta), weight):
        F.linear(rows, gate).sigmoid().square().sum().backward()
    assert error(how.to_theta(weight.grad), theta.grad) < 1e-10


def test_what_does_not_vary_cannot_be_whitened():
    with refused("gates.batches must show gates something that varies"):
        white(torch.ones(9, WIDTH))
    with refused("gates.batches must hold samples of two chunks"):
        Moments().whitening(0.1)


# --- learning -----------------------------------------------------------------------------------


def learned(whiten, steps=300, rate=0.02):
    """Share of two kinds of chunks that a gate tells apart after so many steps of Adam.

    Kept states (g ≈ 1) and others (g ≈ 0) differ in one direction of little variance.
    """
    rows = rows_with_a_long_mean(512)
    wanted = (torch.arange(512) % 2).double()
    rows[:, -1] += 0.05 * (2 * wanted - 1)
    gate = nn.Parameter(torch.zeros(1, WIDTH, dtype=torch.float64))
    groups = [{"params": [gate], "lr": rate}]
    gates = WhitenedGates({"a": gate}, {"a": white(rows, shrinkage=0.01)})
    descent = torch.optim.Adam(gates.stand_in(groups) if whiten else groups)
    if whiten:
        gates.watch(descent)
    for _ in range(steps):
        gate.grad = None
        F.binary_cross_entropy_with_logits(F.linear(rows, gate)[:, 0], wanted).backward()
        descent.step()
    shares = F.linear(rows, gate)[:, 0].sigmoid().detach()
    return float(shares[wanted == 1].mean() - shares[wanted == 0].mean())


def test_descent_is_blind_behind_a_long_mean_and_sees_when_it_is_white():
    assert learned(whiten=False) < 0.3
    assert learned(whiten=True) > 0.8


def test_plain_descent_is_descent_in_theta():
    """Two steps by hand; a gate without a gradient stays, and the state goes on in an optimiser."""
    rows = rows_with_a_long_mean(300)
    how = white(rows)
    gate, idle = (nn.Parameter(torch.randn(1, WIDTH, dtype=torch.float64)) for _ in range(2))
    other = nn.Parameter(torch.ones(2))
    gates = WhitenedGates({"a": gate, "b": idle}, {"a": how, "b": how})
    groups = gates.stand_in([{"params": [gate, idle, other], "lr": 0.1}])
    assert groups[0]["params"][2] is other
    descent = torch.optim.SGD(groups, momentum=0.5)
    gates.watch(descent)
    wanted, before, momentum = gate.detach().clone(), idle.detach().clone(), 0.0
    for seed in range(2):
        gate.grad = torch.randn(1, WIDTH, dtype=torch.float64)
        momentum = 0.5 * momentum + how.to_theta(gate.grad)
        wanted = wanted - 0.1 * how.to_weight(momentum)
        descent.step()
        assert error(gate, wanted) < 1e-10, seed
    assert torch.equal(idle, before)


def test_gates_start_where_states_last():
    rows = rows_with_a_long_mean(300)
    gate = nn.Parameter(torch.zeros(1, WIDTH, dtype=torch.float64))
    WhitenedGates({"a": gate}, {"a": white(rows)}).start(2.0)
    logits = F.linear(rows, gate)
    assert float(logits.detach().mean()) == pytest.approx(2.0)
    assert float(logits.detach().std()) < 0.05


# --- what gates look at -------------------------------------------------------------------------


def looked_at(model, ids, size):
    """[candidate ; state] of every layer, by reading chunk after chunk."""
    seen = {}
    norms = [(i, w.global_memory.norm) for i, w in enumerate(model.model.comet.layers)]
    candidates = {}
    hooks = [
        norm.register_forward_hook(lambda _m, _a, out, i=i: candidates.update({i: out}))
        for i, norm in norms
    ]
    cache = None
    with torch.no_grad():
        for part in ids.split(size, dim=1):
            out = model(part, past_key_values=cache, use_cache=True, close_last=True)
            for i, _ in norms:
                if cache is not None:
                    both = torch.cat([candidates[i], cache.layers[i].memory.state], dim=-1)
                    seen.setdefault(i, []).append(both.flatten(0, 1))
            cache = out.past_key_values
    for hook in hooks:
        hook.remove()
    return {i: torch.cat(rows) for i, rows in seen.items()}


def test_moments_are_of_what_gates_look_at():
    model = tiny_comet("llama")
    ids = batch_of(2, 48)
    found = whitening_for(model, [{"input_ids": ids}], Chunking.of({"fixed": 1}), 0.1)
    for i, rows in looked_at(model, ids, 12).items():
        one = found[f"model.comet.layers.{i}.global_memory.gate"]
        assert {part.dtype for part in (one.root, one.mean, one.bias)} == {torch.float32}
        assert error(one.mean, rows.mean(0)) < 1e-6
        wanted = Whitening.of(rows.mean(0), torch.cov(rows.T, correction=0), 0.1)
        assert error(one.root, wanted.root) < 1e-5
    assert found.keys() == gates_of(model).keys()
    assert all("update" not in vars(m) for m in model.modules() if isinstance(m, GlobalMemory))


def test_compiled_cells_are_looked_at_as_they_are():
    """With nothing compiled for it, and learning goes on from there."""
    torch._dynamo.reset()
    ids, graphs = batch_of(2, 48), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batches, chunking = [{"input_ids": ids}], Chunking.of({"fixed": 1})
    wanted = whitening_for(tiny_comet("llama"), batches, chunking, 0.1)
    model = tiny_comet("llama").train()
    assert model.model.compile_cells(backend=counted)
    compiled = len(graphs)
    found = whitening_for(model, batches, chunking, 0.1)
    assert len(graphs) == compiled > 0
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert error(one.root, wanted[name].root) < 1e-6
        assert error(one.bias, wanted[name].bias) < 1e-6
    model(ids, labels=ids).loss.backward()
    assert all(gate.grad.any() for gate in gates_of(model).values())


def test_room_is_what_whitening_takes_at_its_peak():
    """Products of all layers in float64, and six matrices for one root."""
    assert peak_bytes([64, 64, 64]) == (3 + 6) * 64 * 64 * 8
    assert peak_bytes([2 * 576] * 30) < MOST_BYTES  # SmolLM2
    assert peak_bytes([2 * 2048] * 16) < MOST_BYTES  # Llama-3.2-1B
    assert peak_bytes([2 * 2560] * 36) > MOST_BYTES  # Qwen3-4B


def test_moments_need_no_float64_of_the_models_device():
    """MPS has none, and an accelerator has no room for all layers' products."""
    moments = Moments()
    rows = torch.randn(5, WIDTH, requires_grad=True)

    class OnADevice(torch.Tensor):
        def double(self):
            raise TypeError("this device has no float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    moments.add(rows.as_subclass(OnADevice))
    moments.add(rows)
    how = moments.whitening(0.1)
    assert not how.root.requires_grad
    assert error(how.mean, rows.detach().double().mean(0)) < 1e-12


def test_rows_that_have_no_state_yet_are_passed_over():
    """In a ragged batch, where one row has ended before it closed a chunk."""
    model = tiny_comet("llama")
    ids = batch_of(2, 36)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with watched_gates(model) as seen:
        model(ids, attention_mask=mask)
    assert {moments.count for moments in seen.values()} == {3}  # one update of the longer row


def test_a_file_holds_it(tmp_path):
    how = {"a.gate": white(rows_with_a_long_mean(90)), "b.gate": white(rows_with_a_long_mean(80))}
    save_whitening(how, tmp_path)
    again = load_whitening(tmp_path)
    assert again.keys() == how.keys()
    assert torch.equal(again["b.gate"].root, how["b.gate"].root.float())


# --- runs ---------------------------------------------------------------------------------------


def whitened(settings, **changes):
    return {**settings, "gates": {"whiten": True, "batches": 2, **changes}}


def test_a_run_goes_on_as_one_that_never_stopped(settings, tmp_path):
    """Weights are what they always are: plain gates under their names."""
    config = read_config(as_config(whitened(settings), tmp_path))
    quietly(config)
    wanted, weights = losses(config.output), read_weights(Path(config.output) / WEIGHTS)
    plain = read_weights(Path(config.model) / WEIGHTS)
    assert {name for name in weights if ".lora_" not in name} == plain.keys()
    assert all(weights[name].shape == value.shape for name, value in plain.items())
    (Path(config.output) / "checkpoint-4" / "trainer_state.json").unlink()  # stopped after step 2
    said = heard(config)
    assert said[0].endswith("checkpoint-2")
    assert losses(config.output) == wanted
    again = read_weights(Path(config.output) / WEIGHTS)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    said = heard(config, restart=True)
    assert (Path(config.output) / "earlier-1" / FILE).exists()
    assert losses(config.output) == wanted
    (Path(config.output) / "checkpoint-4" / "trainer_state.json").unlink()
    (Path(config.output) / FILE).unlink()
    with pytest.raises(OSError, match=FILE):
        quietly(config)


def test_a_new_memory_starts_with_states_that_last(settings, start, tmp_path):
    folder = tmp_path / "plain"
    model, words = cometlm.load(str(start), device="cpu", dtype=torch.float32)
    cometlm.detach(model).save_pretrained(folder)
    words.save_pretrained(folder)
    comet = {"chunk_size": 12, "readout_tokens": 3, "stride": 4, "capacity": 5}
    options = whitened(settings, start=3.0)
    changes = {"model": str(folder), "comet": comet, "learning_rate": 1e-9}
    config = read_config(as_config(options, tmp_path, **changes))
    model = quietly(config)
    how = load_whitening(Path(config.output))
    for name, gate in gates_of(model).items():
        assert error(gate[0], 3 * how[name].bias) < 1e-5
        assert float((gate[0] @ how[name].mean).detach()) == pytest.approx(3, abs=1e-4)


@pytest.mark.slow
def test_ranks_learn_the_same_gates(of_ranks, tmp_path):
    path = as_config(whitened(of_ranks), tmp_path)
    trained(path, f"output={tmp_path / 'one'}")
    trained_on(2, path, "chunk_parallel=2", f"output={tmp_path / 'two'}")
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batches": 0}, "gates.batches must be at least 1, got 0"),
        ({"shrinkage": 0}, "gates.shrinkage must be more than 0 and at most 1, got 0"),
        ({"start": math.inf}, "gates.start must be a number, got inf"),
    ],
)
def test_settings_out_of_bounds(changes, said):
    with refused(said):
        Gates(**changes)


def test_what_cannot_be_whitened_is_refused(settings, tmp_path, monkeypatch):
    options = {**whitened(settings), "output": "x"}
    with refused("gates.whiten needs whole weights on each rank: not with shard_weights"):
        config_of({**options, "shard_weights": True})
    with refused("gates.whiten takes gradients as they are: not with trainer.fp16"):
        config_of({**options, "trainer": {"fp16": True}})
    without = read_config(as_config(whitened(settings), tmp_path, sizes={"gate": False}))
    with refused("gates.whiten needs a memory with gates"):
        quietly(without)
    monkeypatch.setattr(whitening, "MOST_BYTES", 1000)
    with refused(
        "gates.whiten makes a matrix of (2 x 32)² for each layer, which takes up to 288.0 KiB"
    ):
        quietly(read_config(as_config(whitened(settings), tmp_path)))
