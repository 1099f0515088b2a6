"""Caches as values, their size, and budgets that change from call to call."""

import pytest
import torch

from tests.tiny import error, random_ids, tiny_comet

# --- caches ---------------------------------------------------------------------------------


def test_when_there_is_a_cache():
    model = tiny_comet("qwen3")
    ids = random_ids(20)[None]
    assert model(ids).past_key_values.tokens_read == 20
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values.tokens_read == 20
    assert model(ids, labels=ids).past_key_values is None
    assert model(ids, labels=ids, use_cache=True).past_key_values.tokens_read == 20
    model.activation_checkpointing_enable()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.tokens_read == 20
    model.eval()
    model.config.use_cache = False
    assert model(ids).past_key_values is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("first", [5, 12, 30])
@torch.no_grad()
def test_a_cache_is_a_value(family, first):
    """Continuations of one cache do not know of each other."""
    model = tiny_comet(family)
    start = random_ids(first)
    cache = model(start[None]).past_key_values
    tails = [random_ids(n, seed=n) for n in (20, 1, 33)]
    for tail in [*tails, *tails]:
        want = model(torch.cat([start, tail])[None]).logits[0, first:]
        out = model(tail[None], past_key_values=cache)
        assert error(out.logits[0], want) < 1e-6
        assert out.past_key_values.tokens_read == first + len(tail)
    assert (cache.tokens_read, cache.chunks_folded) == (first, (first - 1) // 12)


def storage_bytes(cache):
    """Bytes of all storages that a cache keeps alive, which views can make more than `nbytes`."""
    tensors = []
    for layer in cache.layers:
        tensors += [layer.memory.state, *layer.memory.entries]
        if layer.open is not None:
            tensors += [*layer.open.chunk, *(layer.open.memory or ()), *layer.open.pending]
    storages = [x.untyped_storage() for x in tensors if x is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("sizes", [{}, {"stride": 1}, {"global_memory": False}], ids=str)
@pytest.mark.parametrize("feed", [12, 3])
@torch.no_grad()
def test_cache_is_constant_once_the_memory_is_full(family, sizes, feed):
    model = tiny_comet(family, **sizes)
    cache, held, stored = None, [], []
    for t in range(20):
        for piece in random_ids(12, seed=t).split(feed):
            cache = model(piece[None], past_key_values=cache).past_key_values
        held.append(cache.nbytes)
        stored.append(storage_bytes(cache))
    assert cache.chunks_folded == 19
    assert held[0] < held[3]
    assert len(set(held[3:])) == 1
    assert len(set(stored[4:])) == 1
    closed = model(random_ids(12)[None], past_key_values=cache, close_last=True).past_key_values
    rows = (0 if sizes.get("global_memory") is False else 3) * 32
    packed = 2 * 1 * 8 if family == "llama" else 32  # one key and one value of width 8
    assert closed.nbytes == 3 * 8 * (rows + 5 * packed)


# --- budgets --------------------------------------------------------------------------------


def entries_of(cache):
    return [torch.cat(layer.memory.entries, 1) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_smaller_capacity_shrinks_the_memory_at_the_next_fold(family):
    model = tiny_comet(family)
    ids = random_ids(60)[None]
    cache = model(ids[:, :25]).past_key_values
    assert cache.rows[0].entries == 5
    out = model(ids[:, 25:30], past_key_values=cache, capacity=2)
    plain = model(ids[:, 25:30], past_key_values=cache)
    assert out.past_key_values.rows[0].entries == 5
    assert error(out.logits, plain.logits) < 1e-6
    shrunk = model(ids[:, 30:37], past_key_values=out.past_key_values, capacity=2)
    kept = model(ids[:, 30:37], past_key_values=plain.past_key_values)
    assert error(shrunk.logits[:, :6], kept.logits[:, :6]) < 1e-6  # the chunk before the fold
    assert error(shrunk.logits[:, 6], kept.logits[:, 6]) > 1e-3
    assert shrunk.past_key_values.rows[0].entries == 2
    fewer, more = entries_of(shrunk.past_key_values), entries_of(kept.past_key_values)
    for few, many in zip(fewer, more, strict=True):
        assert few.shape[1] == 2
        assert error(few, many[:, -2:]) < 1e-6
    # Back to the config's capacity: it grows again, by three a chunk.
    grown = model(ids[:, 37:50], past_key_values=shrunk.past_key_values)
    assert grown.past_key_values.rows[0].entries == 5
    assert [x.shape[1] for x in entries_of(grown.past_key_values)] == [5] * 3


@torch.no_grad()
def test_capacity_does_not_count_before_the_next_fold():
    """A large memory and then a small stride: a row longer than either budget's longest."""
    model = tiny_comet("qwen3", chunk_size=8, readout_tokens=1, stride=4, capacity=12)
    ids = random_ids(64)[None]
    cache = model(ids[:, :56], close_last=True).past_key_values
    assert cache.rows[0].entries == 12
    want = model(ids[:, 56:], past_key_values=cache, stride=1, capacity=12).logits
    got = model(ids[:, 56:], past_key_values=cache, stride=1, capacity=1).logits
    assert error(got, want) < 1e-6


@torch.no_grad()
def test_changing_the_budget_often_does_not_grow_the_tables():
    model = tiny_comet("qwen3")
    cache = None
    for t in range(30):
        budget = {"stride": 2} if t % 2 else {}
        cache = model(random_ids(5, seed=t)[None], past_key_values=cache, **budget).past_key_values
    assert cache.max_positions <= 3 + 5 + 12 + 12 + 3  # a compression token after every text token
