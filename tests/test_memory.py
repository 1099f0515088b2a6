"""The FIFO against lists, the memory modules against SPEC §3 written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cometlm
from cometlm import CometConfig
from cometlm.core.memory import (
    Comet,
    GlobalMemory,
    LayerMemory,
    LayerMemoryWeights,
    LowRankAdapter,
    TemporaryMemory,
    join_ragged,
    push,
    push_ragged,
)
from tests.tiny import error, scramble, tiny_backbone

WIDTH, RANK = 6, 2


def numbered(batch, first, count):
    """A block [B, count, 1] that holds which row of the stream each row is."""
    rows = torch.arange(first, first + count, dtype=torch.float64)
    return (rows + 1000 * torch.arange(batch)[:, None])[..., None]


@given(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=12), st.integers(1, 2))
def test_push_is_a_fifo(capacity, counts, batch):
    blocks, fifo, total = (), [], 0
    for count in counts:
        new = numbered(batch, total, count)
        given_blocks, copies = blocks, [block.clone() for block in (*blocks, new)]
        fifo = [*fifo, *range(total, total + count)][-capacity:]
        total += count
        blocks = push(blocks, new, capacity)
        for before, copy in zip((*given_blocks, new), copies, strict=True):
            assert torch.equal(before, copy)
        for b in range(batch):
            got = [int(x) for block in blocks for x in block[b, :, 0]]
            assert got == [1000 * b + i for i in fifo]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_push_to_a_smaller_fifo_drops_the_oldest(capacity, smaller, count):
    blocks = ()
    for first in range(0, 12, 3):
        blocks = push(blocks, numbered(1, first, 3), capacity)
    new = numbered(1, 12, count)
    fifo = [*list(range(12))[-capacity:], *range(12, 12 + count)][-smaller:]
    assert torch.cat(push(blocks, new, smaller), 1).flatten().tolist() == fifo


@st.composite
def ragged(draw):
    batch = draw(st.integers(1, 4))
    sides = []
    for _ in range(2):
        width = draw(st.integers(0, 6))
        sides.append((width, [draw(st.integers(0, width)) for _ in range(batch)]))
    return batch, *sides


@given(ragged(), st.sampled_from([(), (2,), (2, 3)]), st.sampled_from([None, 1, 2, 5, 100]))
def test_joining_rows_equals_lists(case, extra, limit):
    batch, (old_width, old_lengths), (new_width, new_lengths) = case
    extra = extra if limit is None else ()
    torch.manual_seed(0)
    old = torch.randn(batch, *extra, old_width, 3)
    new = torch.randn(batch, *extra, new_width, 3)
    copies = old.clone(), new.clone()
    want = []
    for b in range(batch):
        rows = [old[b, ..., i, :] for i in range(old_lengths[b])]
        rows += [new[b, ..., i, :] for i in range(new_lengths[b])]
        want.append(rows if limit is None else rows[-limit - b :])  # of each its own
    given_rows = (old, old_lengths, new, new_lengths)
    most = [(limit or 0) + b for b in range(batch)]
    joined = join_ragged(*given_rows) if limit is None else push_ragged(*given_rows, most)
    assert joined.shape == (batch, *extra, max(len(rows) for rows in want), 3)
    for b, rows in enumerate(want):
        for i, row in enumerate(rows):
            assert torch.equal(joined[b, ..., i, :], row)
    assert joined.isfinite().all()  # filling, too: it is masked, and nothing masks a NaN
    assert torch.equal(old, copies[0])
    assert torch.equal(new, copies[1])


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def random_module(module):
    scramble(module.double(), 0.7)
    return module


def adapted(x, adapter):
    return x + x @ adapter.down.T @ adapter.up.T


def normed(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("scale", [1.0, 1e-4])  # 1e-4: eps is as large as the mean square
@torch.no_grad()
def test_global_memory_is_the_formula(scale):
    torch.manual_seed(0)
    memory = random_module(GlobalMemory(WIDTH, RANK, gate=True))
    readout, state = random(2, 3, WIDTH) * scale, random(2, 3, WIDTH)
    candidate = normed(readout, memory.norm.weight, 2.0**-23)
    gate = 1 / (1 + torch.exp(-(torch.cat([candidate, state], -1) @ memory.gate[0])))
    mixed = gate[..., None] * state + (1 - gate[..., None]) * candidate
    assert error(memory.update(None, readout), candidate) < 1e-14
    assert error(memory.update(state, readout), mixed) < 1e-14
    assert error(memory(state), adapted(state, memory.adapter)) < 1e-14


@torch.no_grad()
def test_without_gate_the_new_state_replaces_the_old():
    torch.manual_seed(0)
    memory = random_module(GlobalMemory(WIDTH, RANK, gate=False))
    assert memory.gate is None
    readout = random(2, 3, WIDTH)
    replaced = memory.update(random(2, 3, WIDTH), readout)
    assert error(replaced, normed(readout, memory.norm.weight, 2.0**-23)) < 1e-14


@torch.no_grad()
def test_fresh_gate_mixes_evenly():
    memory = GlobalMemory(WIDTH, RANK, gate=True).double()
    readout, state = random(1, 3, WIDTH), random(1, 3, WIDTH)
    even = (state + normed(readout, 1.0, 2.0**-23)) / 2
    assert error(memory.update(state, readout), even) < 1e-14


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@torch.no_grad()
def test_temporary_memory_is_the_formula(scale):
    torch.manual_seed(0)
    memory = random_module(TemporaryMemory(WIDTH, RANK))
    compression = random(2, 4, WIDTH) * scale
    entries = adapted(normed(compression, memory.norm.weight, 1e-12), memory.adapter)
    assert error(memory(compression), entries) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_norms_are_float32_in_half_types(dtype):
    """Squares of 1e-4 vanish in float16; norms of such rows must not."""
    memory = GlobalMemory(WIDTH, RANK, gate=True).to(dtype)
    readout = (torch.full((1, 1, WIDTH), 1e-4)).to(dtype)
    want = normed(readout.double(), 1.0, 2.0**-23)
    got = memory.update(None, readout)
    assert got.dtype == dtype
    assert error(got.double(), want) < torch.finfo(dtype).eps


@torch.no_grad()
def test_adapter_starts_as_the_identity():
    adapter = LowRankAdapter(WIDTH, RANK)
    x = torch.randn(3, WIDTH)
    assert torch.equal(adapter(x), x)
    assert adapter.down.any()  # else nothing would ever reach up's gradient


def test_imitate_has_the_mean_and_spread_of_the_embeddings():
    torch.manual_seed(0)
    rows = 20_000
    comet = Comet(4, [True], CometConfig(readout_tokens=rows))
    spread, mean = torch.tensor([0.0, 0.1, 1.0, 5.0]), torch.tensor([3.0, -2.0, 0.0, 10.0])
    known = torch.randn(500, 4) * spread + mean
    comet.imitate(known)
    tolerance = 5 * known.std(0) / rows**0.5 + 1e-6
    assert ((comet.readout.mean(0) - known.mean(0)).abs() < tolerance).all()
    assert ((comet.readout.std(0) - known.std(0)).abs() < tolerance).all()
    assert ((comet.compression[0] - known.mean(0)).abs() <= 6 * known.std(0) + 1e-6).all()
    assert comet.compression[0, 0] == known[0, 0]
    assert comet.readout.requires_grad
    assert comet.readout.grad_fn is None


def test_attach_imitates_the_embeddings_as_layers_see_them():
    """Gemma scales its embeddings; C and R enter after the scaling."""
    backbone = tiny_backbone("gemma3_text")
    with torch.no_grad():
        backbone.model.embed_tokens.weight.fill_(0.25)
    model = cometlm.attach(backbone, chunk_size=8, readout_tokens=2, stride=2, capacity=2)
    want = backbone.model.embed_tokens(torch.tensor([5]))
    assert want.mean() > 1  # 0.25 scaled by sqrt(32)
    for parameter in (model.model.comet.readout, model.model.comet.compression):
        assert error(parameter, want.expand_as(parameter)) < 1e-6


@pytest.mark.parametrize("global_memory", [True, False])
@pytest.mark.parametrize("temporary_memory", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_switches_leave_parts_out(global_memory, temporary_memory, gate):
    config = CometConfig(
        readout_tokens=3,
        rank=RANK,
        global_memory=global_memory,
        temporary_memory=temporary_memory,
        gate=gate,
    )
    comet = Comet(WIDTH, [True] * 2, config)
    assert (comet.readout is not None) == global_memory
    assert (comet.compression is not None) == temporary_memory
    assert len(comet.layers) == 2
    for layer in comet.layers:
        assert isinstance(layer, LayerMemoryWeights)
        assert (layer.global_memory is not None) == global_memory
        assert (layer.temporary_memory is not None) == temporary_memory
        if global_memory:
            assert (layer.global_memory.gate is not None) == gate
    comet.imitate(torch.randn(5, WIDTH))
    adapter = 2 * WIDTH * RANK
    of_layer = global_memory * (WIDTH + 2 * WIDTH * gate + adapter)
    of_layer += temporary_memory * (WIDTH + adapter)
    added = global_memory * 3 * WIDTH + temporary_memory * WIDTH
    assert sum(p.numel() for p in comet.parameters()) == 2 * of_layer + added


def test_size_of_the_published_memory():
    """4.63M new parameters on Qwen3-4B (SPEC §5)."""
    with torch.device("meta"):
        comet = Comet(2560, [True] * 36, CometConfig())
    assert round(sum(p.numel() for p in comet.parameters()) / 1e6, 2) == 4.63


def test_layer_memory_counts_its_bytes():
    assert LayerMemory().nbytes == 0
    state = torch.zeros(2, 3, 4, dtype=torch.float32)
    entries = (torch.zeros(2, 5, 4, dtype=torch.bfloat16), torch.zeros(2, 1, 4))
    assert LayerMemory(state, entries).nbytes == 2 * 3 * 4 * 4 + 2 * 5 * 4 * 2 + 2 * 4 * 4
