"""Decoding in buffers of fixed size: the same logits and the same cache as `forward`'s."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cometlm import CometCache, fixed_cache
from cometlm.attention import KeyValue, attend_masked
from cometlm.fixed_cache import FixedCache
from cometlm.grid import tensors_of
from tests.tiny import FAMILIES, error, random_ids, tiny_comet


def read(model, ids, past=None):
    return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_give_what_forward_gives(family, batch):
    """Over two chunk borders, with windows, rests and both kinds of entries."""
    model = tiny_comet(family, chunk_size=10)
    ids = torch.stack([random_ids(60, seed=i) for i in range(batch)])
    first = read(model, ids[:, :25]).past_key_values
    fixed, plain = FixedCache(model, first), first
    for i in range(25, 55):
        out = read(model, ids[:, i : i + 1], plain)
        plain = out.past_key_values
        assert error(fixed.read(ids[:, i : i + 1]), out.logits[:, 0]) < 1e-9, i
        assert fixed.get_seq_length() == plain.get_seq_length()
    value = fixed.value()
    assert value.rows == plain.rows
    again = read(model, ids[:, 55:], value).logits
    assert error(again, read(model, ids[:, 55:], plain).logits) < 1e-9


@pytest.mark.parametrize(
    "switch", [{"global_memory": False}, {"temporary_memory": False}, {"stride": 1}], ids=str
)
def test_parts_of_the_memory_switched_off(switch):
    model = tiny_comet("llama", **switch)
    ids = random_ids(50)[None]
    plain = read(model, ids[:, :5]).past_key_values
    fixed = FixedCache(model, plain)
    for i in range(5, 50):
        out = read(model, ids[:, i : i + 1], plain)
        plain = out.past_key_values
        assert error(fixed.read(ids[:, i : i + 1]), out.logits[:, 0]) < 1e-9, i


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
@settings(max_examples=25)
def test_pieces_and_values_in_between(small, pieces, data):
    """A value is never changed by what comes after it."""
    ids = random_ids(200)[None]
    fixed, plain, at, kept = FixedCache(small, read(small, ids[:, :7]).past_key_values), None, 7, []
    plain = fixed.value()
    for n in pieces:
        piece = ids[:, at : at + n]
        at += n
        out = read(small, piece, plain)
        plain = out.past_key_values
        assert error(fixed.read(piece), out.logits[:, 0]) < 1e-9
        if data.draw(st.booleans()):
            value = fixed.value()
            kept.append((value, [x.clone() for x in tensors_of(value.layers)]))
            assert value.rows == plain.rows
    for value, tensors in kept:
        for now, then in zip(tensors_of(value.layers), tensors, strict=True):
            assert torch.equal(now, then)


def test_generate_writes_the_same(small):
    ids = random_ids(31)[None]
    options = {"max_new_tokens": 40, "do_sample": False}
    wanted = small.generate(ids, **options)
    out = small.generate(
        ids, cache_implementation="static", return_dict_in_generate=True, **options
    )
    assert torch.equal(out.sequences, wanted)
    past = getattr(out, "cache", None) or out.past_key_values
    assert isinstance(past, FixedCache)
    assert isinstance(past.value(), CometCache)
    more = small.generate(wanted[:, -1:], past_key_values=past, **options)
    assert torch.equal(
        more, small.generate(wanted[:, -1:], past_key_values=past.value(), **options)
    )
    both = small.generate(
        ids, cache_implementation="static", num_return_sequences=2, do_sample=True, max_new_tokens=9
    )
    assert both.shape == (2, 40)


def test_what_it_cannot_do_is_refused(small):
    ids = random_ids(20)[None]
    with pytest.raises(ValueError, match="num_beams must be 1, got 2"):
        small.generate(ids, cache_implementation="static", num_beams=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="must be None or 'static', got 'dynamic'"):
        small.generate(ids, cache_implementation="dynamic", max_new_tokens=3)
    two = torch.cat([ids, ids])
    mask = torch.ones_like(two)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="at the same place"):
        small.generate(two, attention_mask=mask, cache_implementation="static", max_new_tokens=3)


def test_work_that_cannot_be_recorded_goes_on_unrecorded(small, monkeypatch):
    def fail(work, buffers):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(fixed_cache, "_recorded", fail)
    ids = random_ids(40)[None]
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = small.generate(ids, **options)
    with pytest.warns(UserWarning, match="not recorded.*not permitted") as caught:
        got = small.generate(ids, cache_implementation="static", **options)
    assert torch.equal(got, wanted)
    assert len(caught) == 1


@pytest.mark.parametrize("items", [1, 2, 17])
@pytest.mark.parametrize("rows", [1, 3])
def test_masked_attention_without_grouping_kernels(items, rows):
    """What devices take whose fused kernels know a mask or groups, but not both."""
    torch.manual_seed(0)
    make = lambda heads, n: torch.randn(3, heads, n, 4, dtype=torch.float64)  # noqa: E731
    query, row = make(6, items), KeyValue(make(2, 20), make(2, 20))
    mask = torch.rand(rows, 1, items, 20) > 0.3
    mask[..., 0] = True
    for seen in (mask, mask[0, 0]):
        want = attend_masked(query, row, seen, 0.3, grouped=True)
        assert error(attend_masked(query, row, seen, 0.3, grouped=False), want) < 1e-12
