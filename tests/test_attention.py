"""The two parts against plain attention in float64: outputs and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.backbones.calling import KeyValue
from cometlm.core import attention
from cometlm.core.attention import (
    attend_in_blocks,
    attend_one_part,
    attend_single,
    attend_two_part,
)
from tests.tiny import error, random_ids, tiny_comet


def plain(query, memory, chunk, visible, scale):
    """Softmax attention written out; `visible` [I, S] covers the chunk."""
    groups = query.shape[1] // chunk.key.shape[1]
    key = torch.cat([memory.key, chunk.key], 2).repeat_interleave(groups, 1)
    value = torch.cat([memory.value, chunk.value], 2).repeat_interleave(groups, 1)
    seen = torch.ones(query.shape[2], memory.key.shape[2], dtype=torch.bool)
    scores = (query @ key.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~torch.cat([seen, visible], 1), -torch.inf)
    return scores.softmax(-1) @ value


@st.composite
def cases(draw):
    new = draw(st.integers(1, 9))
    before = draw(st.integers(0, 6))
    window = draw(st.sampled_from([None, 1, 3]))
    return {
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.sampled_from([(1, 1), (4, 2), (6, 3), (4, 1)])),
        "width": draw(st.sampled_from([4, 8])),
        "slots": draw(st.integers(1, 7)),
        "new": new,
        "before": before,
        "window": window,
        "spread": draw(st.sampled_from([0.1, 1.0, 20.0])),
        "seed": draw(st.integers(0, 999)),
    }


@given(cases())
@pytest.mark.parametrize("attend", [attend_two_part, attend_one_part])
def test_equals_plain_attention(attend, case):
    torch.manual_seed(case["seed"])
    heads, key_heads = case["heads"]
    new, before = case["new"], case["before"]

    def random(count, length):
        shape = (case["batch"], count, length, case["width"])
        return (torch.randn(shape, dtype=torch.float64) * case["spread"]).requires_grad_()

    query = random(heads, new)
    memory = KeyValue(random(key_heads, case["slots"]), random(key_heads, case["slots"]))
    chunk = KeyValue(random(key_heads, before + new), random(key_heads, before + new))
    leaves = [query, *memory, *chunk]
    distance = torch.arange(before, before + new)[:, None] - torch.arange(before + new)
    visible = distance >= 0
    if case["window"] is not None:
        visible &= distance < case["window"]
    causal = before == 0 and case["window"] is None
    mask = None if causal else visible
    if mask is not None and attend is attend_one_part:
        mask = torch.cat([torch.ones(new, case["slots"], dtype=torch.bool), mask], 1)

    weights = torch.randn(case["batch"], heads, new, case["width"], dtype=torch.float64)
    ours = attend(query, memory, chunk, mask, causal, 0.3)
    theirs = plain(query, memory, chunk, visible, 0.3)
    assert error(ours, theirs) < 1e-12
    got = torch.autograd.grad((ours * weights).sum(), leaves)
    want = torch.autograd.grad((theirs * weights).sum(), leaves)
    scale = max(float(w.abs().max()) for w in want)
    # A saturated softmax leaves gradients that are all rounding: weights exp(score − lse) are
    # right to eps × score, and what they multiply cancels.
    size = max(float(leaf.detach().abs().max()) for leaf in leaves)
    score = 0.3 * case["width"] * size**2
    rounding = torch.finfo(torch.float64).eps * score * case["width"] * size * size
    for ours, theirs in zip(got, want, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-11 * scale + rounding


def test_gradcheck():
    torch.manual_seed(0)
    make = lambda n: torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, mk, mv, k, v = make(5), make(3), make(3), make(5), make(5)

    def call(query, mk, mv, k, v):
        return attend_two_part(query, KeyValue(mk, mv), KeyValue(k, v), None, True, None)

    assert torch.autograd.gradcheck(call, (query, mk, mv, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_and_single(dtype):
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    memory = KeyValue(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    chunk = KeyValue(key, torch.randn(1, 2, 6, 8))
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    want = plain(query, memory, chunk, visible, 0.3)
    low = lambda pair: KeyValue(*(x.to(dtype) for x in pair))  # noqa: E731
    got = attend_two_part(query.to(dtype), low(memory), low(chunk), None, True, 0.3)
    assert got.dtype == dtype
    assert error(got.float(), want) < 4 * torch.finfo(dtype).eps


def random_parts(dtype, heads, new, before, slots, batch=2, width=8):
    """Query, memory (None without slots) and chunk, random."""
    torch.manual_seed(0)
    count, key_heads = heads
    random = lambda h, n: torch.randn(batch, h, n, width).to(dtype)  # noqa: E731
    memory = KeyValue(random(key_heads, slots), random(key_heads, slots)) if slots else None
    chunk = KeyValue(*(random(key_heads, before + new) for _ in "kv"))
    return random(count, new), memory, chunk


def written_out(query, memory, chunk, scale):
    """`plain` in float64, under the causal flag from the last items back."""
    empty = KeyValue(*(x[:, :, :0] for x in chunk))
    wide = [KeyValue(*(x.double() for x in pair)) for pair in (memory or empty, chunk)]
    new, slots = query.shape[2], chunk.key.shape[2]
    visible = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)
    return plain(query.double(), *wide, visible, scale)


@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_single_item(dtype, heads, slots):
    parts = random_parts(dtype, heads, 1, 6, slots)
    limit = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert error(attend_single(*parts, 0.3).double(), written_out(*parts, 0.3)) < limit


@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("new", [2, 4, 11])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_of_items(dtype, heads, new, before, slots, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK_ITEMS", 4)
    attention._causal_bias.cache_clear()
    parts = random_parts(dtype, heads, new, before, slots)
    with torch.no_grad():
        got = attend_in_blocks(*parts, 0.3)
    attention._causal_bias.cache_clear()
    limit = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    assert error(got.double(), written_out(*parts, 0.3)) < limit


@pytest.mark.parametrize("slots", [16, 200])
def test_blocks_round_about_as_the_kernel_does(slots):
    parts = random_parts(torch.bfloat16, (6, 2), 150, 0, slots, width=64)
    want = written_out(*parts, 0.125)
    with torch.no_grad():
        blocks = attend_in_blocks(*parts, 0.125).double() - want
        kernel = attend_two_part(*parts, None, True, 0.125).double() - want
    assert blocks.norm() < 2 * kernel.norm()


@pytest.mark.parametrize("new", [1, 9])
def test_a_model_in_bfloat16_reads_about_as_exactly_as_while_it_learns(new, monkeypatch):
    """A memory and an open chunk, whose last items come in a call of their own."""
    exact = tiny_comet("llama")
    model = tiny_comet("llama").to(torch.bfloat16)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    monkeypatch.setattr(attention, "_BFLOAT16_PRODUCTS", True)
    ids = random_ids(24 + 2 + new)[None]
    want = exact(ids).logits[:, -new:].detach()
    off = {}
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            past = model(ids[:, :-new], use_cache=True).past_key_values
            got = model(ids[:, -new:], past_key_values=past).logits
        off[learning] = float((got.detach().double() - want).norm() / want.norm())
    assert off[False] < 1.5 * off[True]


@pytest.mark.parametrize("cut", [5, 17])  # inside the first chunk; behind a memory
def test_dropout_of_weights_in_an_open_chunk(cut):
    """Its rows are kept up to a round number, and nothing is drawn for those."""
    model, ids = tiny_comet("llama").train(), random_ids(20)[None]
    for cell in model.model.cells:
        cell.layer.self_attn.attention_dropout = 1e-12  # next to none: the numbers stay
    with torch.no_grad():
        begun = model(ids[:, :cut], use_cache=True).past_key_values
        more = model(ids[:, cut:], past_key_values=begun, use_cache=True).logits
        assert error(more, model.eval()(ids).logits[:, cut:]) < 1e-9
