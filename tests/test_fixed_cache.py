"""Decoding in buffers of fixed size: the same logits and the same cache as `forward`'s."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cometlm
from cometlm import CometCache
from cometlm.backbones.calling import KeyValue
from cometlm.core import fixed_cache
from cometlm.core.attention import attend_masked
from cometlm.core.fixed_cache import FixedCache
from cometlm.core.state import tensors_of
from tests import real
from tests.tiny import FAMILIES, error, examples, random_ids, tiny_comet


def read(model, ids, past=None):
    return model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)


def further(model, fixed, ids):
    """Logits of what follows, read in the buffers."""
    out = read(model, ids, fixed)
    assert out.past_key_values is fixed
    return out.logits[:, 0]


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
        assert error(further(model, fixed, ids[:, i : i + 1]), out.logits[:, 0]) < 1e-9, i
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
        assert error(further(model, fixed, ids[:, i : i + 1]), out.logits[:, 0]) < 1e-9, i


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
@examples(15)
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
        assert error(further(small, fixed, piece), out.logits[:, 0]) < 1e-9
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


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"capacity": 2},
        {"stride": 2, "capacity": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"eos_token_id": list(range(3, 40))},
        {"padded": True},
    ],
    ids=str,
)
def test_generate_writes_the_same_under_options(small, options):
    """Budgets, several samples, an end, padding that all rows share."""
    options = dict(options)
    ids = torch.stack([random_ids(31), random_ids(31, seed=1)])
    mask = torch.ones_like(ids)
    if options.pop("padded", False):
        mask[:, :4] = 0
    found = []
    for kind in (None, "static"):
        torch.manual_seed(0)
        found.append(
            small.generate(
                ids,
                attention_mask=mask,
                cache_implementation=kind,
                max_new_tokens=30,
                **{"do_sample": False, "pad_token_id": 0, **options},
            )
        )
    assert torch.equal(found[0], found[1])


def test_budgets_change_on_the_way(small):
    """As in `forward`, sizes are a call's; a step under others than the buffers' is no step."""
    ids = random_ids(60)[None]
    fixed, plain = FixedCache(small, first := read(small, ids[:, :5]).past_key_values), first
    for i in range(5, 60):
        budget = {"stride": (4, 2, 1)[i // 4 % 3], "capacity": 5 + i % 2}
        piece = ids[:, i : i + 1]
        out = small(piece, past_key_values=plain, use_cache=True, logits_to_keep=1, **budget)
        got = small(piece, past_key_values=fixed, use_cache=True, logits_to_keep=1, **budget)
        plain = out.past_key_values
        assert error(got.logits, out.logits) < 1e-9, i


@pytest.mark.parametrize("stride", [1, 30])
def test_an_open_chunk_of_calls_with_another_stride_goes_on(small, stride):
    ids = random_ids(60)[None]
    plain = small(ids[:, :30], use_cache=True, stride=stride).past_key_values
    assert plain.rows[0].items
    fixed = FixedCache(small, small(ids[:, :5], use_cache=True).past_key_values)
    fixed.take_over(plain)
    for i in range(30, 60):
        out = read(small, ids[:, i : i + 1], plain)
        plain = out.past_key_values
        assert error(further(small, fixed, ids[:, i : i + 1]), out.logits[:, 0]) < 1e-9, i


def test_a_token_of_fewer_rows_is_refused(small):
    ids = torch.stack([random_ids(5), random_ids(5, seed=1)])
    fixed = FixedCache(small, small(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="past_key_values holds 2 rows"):
        read(small, ids[:1, :1], fixed)


def test_forward_gives_what_it_is_asked_for(small):
    ids = random_ids(40)[None]
    first = read(small, ids[:, :20]).past_key_values
    fixed = FixedCache(small, first)
    wanted = small(ids[:, 20:25], past_key_values=first, use_cache=True)
    got = small(ids[:, 20:25], past_key_values=fixed)
    assert got.logits.shape == (1, 5, 96)
    assert error(got.logits, wanted.logits) < 1e-9
    assert small(ids[:, 25:], past_key_values=fixed, use_cache=False).past_key_values is None
    labelled = small(ids[:, 25:], past_key_values=fixed, labels=ids[:, 25:])
    plain = small(ids[:, 25:], past_key_values=wanted.past_key_values, labels=ids[:, 25:])
    assert error(labelled.loss, plain.loss) < 1e-9


def test_it_outlives_inference_mode(small):
    ids = random_ids(40)[None]
    with torch.inference_mode():
        fixed = FixedCache(small, read(small, ids[:, :20]).past_key_values)
        fixed.read(ids[:, 20:21])
    with torch.no_grad():
        wanted = read(small, ids[:, :30]).logits[:, 0]
        for i in range(21, 30):
            got = fixed.read(ids[:, i : i + 1])
    assert error(got, wanted) < 1e-9


def test_the_rotary_tables_of_a_recorded_step_stay(small):
    """A device that replays a step reads the memory that the step was recorded with."""
    ids = random_ids(40)[None]
    fixed = FixedCache(small, read(small, ids[:, :20]).past_key_values)
    fixed.read(ids[:, 20:21])
    tables = weakref.ref(fixed._buffers.grid.rotary[0][0])
    for capacity in range(6, 14):
        small(ids, capacity=capacity)
    assert tables() is not None


def test_a_session_answers_the_same():
    model = real.tiny_comet()
    session = cometlm.Session(model, real.tokenizer("smollm2"))
    session.read("The sea was calm that day, and the captain slept. " * 8)
    options = {"max_new_tokens": 20, "do_sample": False}
    wanted = "".join(session.ask("Who slept?", **options))
    assert "".join(session.ask("Who slept?", cache_implementation="static", **options)) == wanted


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
