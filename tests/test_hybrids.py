"""Backbones some of whose layers carry a state of their own, which goes on as a value."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version

import cometlm
from cometlm.core.cache import CometCache
from cometlm.core.state import tensors_of
from cometlm.core.training_plan import TrainingPlan
from cometlm.inspection import InspectedSession
from cometlm.parallel.pipeline import Pipeline, sum_gradients
from cometlm.session.session import Session
from tests.any_backbone import Wide, tiny
from tests.ranks import run_ranks
from tests.tiny import SMALL, error, random_ids, refused, scramble

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="layers hand their states on otherwise",
)
KINDS = {
    "lfm2": "convolutions",
    "qwen3_next": "linear attention",
    "jamba": "scans that go on by one token only",
    "falcon_h1": "scans beside attention",
}


def model_of(model_type, **sizes):
    model = cometlm.attach(tiny(model_type), **SMALL | sizes)
    scramble(model.model.comet, 0.5)
    return model


def parameters_of(model):
    """Gradients by name; zeros where there is none."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_a_cache_is_a_value_of_constant_size(model_type):
    model = model_of(model_type)
    caches = [model(random_ids(120)[None], use_cache=True).past_key_values]
    held = [x.clone() for x in tensors_of(caches[0].layers)]
    for count in (1, 1, 20, 98):  # single tokens are written over in place by some layers
        out = model(random_ids(count)[None], past_key_values=caches[-1], use_cache=True)
        caches.append(out.past_key_values)
    assert all(map(torch.equal, tensors_of(caches[0].layers), held))
    assert caches[-1].nbytes == caches[0].nbytes
    with_state = [i for i, cell in enumerate(model.model.cells) if cell.call.cache is not None]
    assert [i for i, layer in enumerate(caches[0].layers) if layer.own] == with_state != []


def test_layers_that_do_not_attend_have_no_memory():
    model = model_of("qwen3_next")
    attending = model.model.layers_with_memory
    assert 0 < len(attending) < len(model.model.cells)
    with_weights = [i for i, x in enumerate(model.model.comet.layers) if list(x.parameters())]
    assert with_weights == attending
    closed = {"chunk_lengths": [[12, 12, 7]], "close_last": True}
    cache = model(random_ids(31)[None], use_cache=True, **closed).past_key_values
    bare = cache.without(["global", "temporary"])
    for layer, less in zip(cache.layers, bare.layers, strict=True):
        assert less.own == layer.own
        assert less.memory.state is None


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_rows_go_on_as_alone(model_type):
    """Ragged steps; and rows that come and go."""
    model = model_of(model_type)
    with Wide():
        lengths = [1, 12, 13, 30, 43]
        caches = [
            model(random_ids(n, seed=n)[None], use_cache=True).past_key_values for n in lengths
        ]
        joined = CometCache.join(caches)
        for step in range(9):
            ids = random_ids(len(lengths), seed=step)[:, None]
            out = model(ids, past_key_values=joined, use_cache=True)
            joined = out.past_key_values
            for row, cache in enumerate(caches):
                alone = model(ids[row : row + 1], past_key_values=cache, use_cache=True)
                assert error(out.logits[row], alone.logits[0]) < 1e-7
                caches[row] = alone.past_key_values
        for row, cache in enumerate(caches):
            ours = model(random_ids(20)[None], past_key_values=joined.select([row]))
            alone = model(random_ids(20)[None], past_key_values=cache)
            assert error(ours.logits, alone.logits) < 1e-7


@pytest.mark.parametrize("model_type", ["jamba", "falcon_h1"])
def test_gradients_through_single_tokens_in_float32(model_type):
    """Layers write over a state of float32 that autograd still needs."""
    model = model_of(model_type).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = random_ids(25)[None]
    model(ids).logits.square().mean().backward()
    wanted = parameters_of(model)
    model.float().zero_grad()
    cache, parts = None, []
    for piece in ids.split([9, 1, 1, 1, 13], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.cat(parts, dim=1).square().mean().backward()
    got = parameters_of(model)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        assert float((got[name] - grad).abs().max()) < 1e-3 * largest, name


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_a_session_is_saved_and_forked(model_type, tmp_path):
    model = model_of(model_type)
    session = Session(model)
    session.read(random_ids(75).tolist())
    fork = session.fork()
    session.save(tmp_path / "a.session")
    again = Session.load(tmp_path / "a.session", model)
    session.read(random_ids(60, seed=1).tolist())
    for other in (fork, again):
        other.read(random_ids(60, seed=1).tolist())
        pairs = zip(tensors_of(session._cache.layers), tensors_of(other._cache.layers), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert other.continuation(5) == session.continuation(5)


@torch.no_grad()
def test_a_session_file_of_another_state_is_refused(tmp_path):
    sessions = []
    for model_type in ("lfm2", "qwen3_next"):
        session = Session(model_of(model_type))
        session.read(random_ids(40).tolist())
        session.save(tmp_path / model_type)
        sessions.append(session)
    with refused("is a session of another model"):
        Session.load(tmp_path / "lfm2", sessions[1].model)
    (tmp_path / "lfm2").unlink()
    layer = next(x for x in sessions[0]._cache.layers if x.own)
    (name,) = layer.own
    layer.own[name] = layer.own[name][..., :1]
    sessions[0].save(tmp_path / "lfm2")
    with refused(f"{name}' is F64"):
        Session.load(tmp_path / "lfm2", sessions[0].model)


@torch.no_grad()
def test_looking_on_counts_layers_that_attend():
    model = model_of("lfm2")
    session = InspectedSession(model)
    session.read(random_ids(60).tolist())
    layers = len(model.model.layers_with_memory)
    assert session.latest.gates.shape[0] == session.norms().shape[0] == layers
    assert session.history.shares.shape[0] == layers


def read_together():
    """Largest errors of loss and gradients on this rank, by type."""
    found = {}
    group = dist.group.WORLD
    for model_type in ("lfm2", "falcon_h1"):
        model = model_of(model_type).train()
        ids = random_ids(70)[None]
        with Wide():
            alone = model(ids, labels=ids).loss
            alone.backward()
            wanted = parameters_of(model)
            model.zero_grad()
            model.training_plan = replace(TrainingPlan(), pipeline=Pipeline(group))
            part = model(ids, labels=ids, use_cache=False).loss
            part.backward()
        model.training_plan.pipeline.flush()
        sum_gradients(list(model.parameters()), group)
        got = parameters_of(model)
        loss = part.detach()
        dist.all_reduce(loss)
        worst = max(error(got[n], x) for n, x in wanted.items() if x.abs().max() > 1e-12)
        found[model_type] = (error(loss, alone.detach()), worst)
    return found


def test_ranks_that_share_a_sample():
    for results in run_ranks(2, read_together):
        for model_type, (loss, gradient) in results.items():
            assert loss < 1e-7, model_type
            assert gradient < 1e-6, model_type
