"""What `forward` refuses, dtypes, and memories that are not finite."""

import re

import pytest
import torch
from transformers import DynamicCache

import cometlm
from tests.tiny import (
    SMALL,
    batch_of,
    error,
    random_ids,
    refused,
    scramble,
    tiny_backbone,
    tiny_comet,
)

# --- bad input ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Not to be changed."""
    return tiny_comet("qwen3")


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (3,), (1, 2, 3)], ids=str)
def test_ids_must_be_a_batch_of_tokens(model, shape):
    ids = torch.ones(shape, dtype=torch.long)
    said = f"input_ids must be [batch, tokens] with at least one of each, got shape {shape}"
    with refused(said):
        model(ids)
    with refused(said):
        model(ids, labels=ids)


@pytest.mark.parametrize("bad", [-1, -100, 96, 5000])
def test_ids_must_be_in_the_vocabulary(model, bad):
    ids = random_ids(20)[None]
    ids[0, 13] = bad
    with refused(f"input_ids must lie in 0 … 95 (the vocabulary), got {bad}"):
        model(ids)


def test_ids_under_padding_may_be_anything(model):
    ids, mask = random_ids(20)[None], torch.ones(1, 20)
    ids[0, :3], mask[0, :3] = -100, 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits[:, 3:]
        assert error(got, model(ids[:, 3:]).logits) < 1e-12


def test_labels_must_have_the_shape_of_ids(model):
    with refused("labels have shape (1, 9) but input_ids (1, 10); they must be the same"):
        model(random_ids(10)[None], labels=random_ids(9)[None])


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (3, 10), (10,), (2, 1, 1, 10)], ids=str)
def test_mask_must_have_the_shape_of_ids(model, shape):
    with refused(
        "attention_mask must be [2, 10] like input_ids (or longer, with the past in front), "
        f"got shape {shape}"
    ):
        model(batch_of(2, 10), attention_mask=torch.ones(shape))


def test_mask_must_not_have_holes(model):
    mask = torch.ones(2, 10)
    mask[1, 4] = 0
    with refused(
        "attention_mask has a hole in row 1: ones must be contiguous, with padding on the left or "
        "on the right"
    ):
        model(batch_of(2, 10), attention_mask=mask)


def test_mask_must_have_ones(model):
    with refused("attention_mask has no ones: there is no text to read"):
        model(batch_of(2, 10), attention_mask=torch.zeros(2, 10))


@pytest.mark.parametrize("other", [2, 0.5, -1])
def test_mask_must_be_of_ones_and_zeros(model, other):
    mask = torch.ones(2, 10)
    mask[1, 4] = other
    with refused(f"attention_mask must be of ones and zeros, got {float(other)} in row 1"):
        model(batch_of(2, 10), attention_mask=mask)


def test_ids_must_be_whole_numbers(model):
    ids = random_ids(10)[None]
    for bad in (ids.float(), ids.bool(), ids.to(torch.uint8)):
        with refused(f"input_ids must be int64 or int32, got {bad.dtype}"):
            model(bad)
    with refused("input_ids must be a tensor [batch, tokens], got list"):
        model(ids.tolist())


@pytest.mark.parametrize("bad", [-1, -5, 96, 5000])
def test_labels_must_be_in_the_vocabulary(model, bad):
    ids = random_ids(10)[None]
    labels = ids.clone()
    labels[0, 4] = bad
    with refused(f"labels must lie in 0 … 95 (the vocabulary) or be -100, got {bad}"):
        model(ids, labels=labels)
    with refused("labels must be whole numbers, got torch.float32"):
        model(ids, labels=ids.float())


def test_labels_may_be_shifted_already(model):
    ids = random_ids(40)[None]
    shifted = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    with torch.no_grad():
        want = model(ids, labels=ids).loss
        assert torch.equal(model(ids, shift_labels=shifted).loss, want)
        assert torch.equal(model(ids, labels=ids * 0, shift_labels=shifted).loss, want)
    with refused("shift_labels have shape (1, 39) but input_ids (1, 40); they must be the same"):
        model(ids, shift_labels=shifted[:, 1:])


def test_logits_to_keep_must_not_be_negative(model):
    with refused("logits_to_keep must be at least 0, got -1"):
        model(random_ids(10)[None], logits_to_keep=-1)


def test_cache_must_be_this_models(model):
    ids = random_ids(10)[None]
    with refused("past_key_values must be a CometCache that this model returned, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with torch.no_grad():
        cache = model(ids).past_key_values
    with refused(
        "past_key_values holds 1 rows and 3 layers, but input_ids has 2 rows and the model 3 layers"
    ):
        model(batch_of(2, 10), past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_type_ids", torch.ones(1, 10)), ("output_attentions", True), ("chunk_sizes", 8)],
)
def test_unknown_arguments_are_refused_not_ignored(model, name, value):
    shown = name if isinstance(value, torch.Tensor) else f"{name}={value!r}"
    with refused(f"forward() does not take {shown}"):
        model(random_ids(10)[None], **{name: value})


def test_what_transformers_always_passes_is_taken(model):
    ids = random_ids(10)[None]
    with torch.no_grad():
        out = model(ids, return_dict=True, output_attentions=False, position_ids=None)
        assert torch.equal(out.logits, model(ids).logits)


def test_a_chunk_size_of_one_call_is_that_of_a_model_made_with_it():
    ids = random_ids(50)[None]
    model, other = tiny_comet("llama"), tiny_comet("llama", chunk_size=8)
    with torch.no_grad():
        got = model(ids, chunk_size=8, use_cache=True)
        wanted = other(ids, use_cache=True)
    assert error(got.logits, wanted.logits) < 1e-12
    assert model.config.comet_config.chunk_size == 12
    # The open chunk holds two tokens: it may go on under another size, but not a smaller one.
    with refused("chunk_size must be at least the open chunk's 2 tokens, got 1"):
        model(ids, past_key_values=got.past_key_values, chunk_size=1, stride=1)
    written = model.generate(ids, chunk_size=8, max_new_tokens=20, do_sample=False)
    assert torch.equal(written, other.generate(ids, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"capacity": -3}, "capacity must be at least 1, got -3"),
        ({"stride": 2.0}, "stride must be an integer of at least 1, got 2.0"),
        ({"capacity": True}, "capacity must be an integer of at least 1, got True"),
        ({"chunk_size": "16"}, "chunk_size must be an integer of at least 1, got '16'"),
    ],
    ids=str,
)
def test_bad_budgets(model, budget, said):
    with refused(said):
        model(random_ids(10)[None], **budget)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"stride": 1}, "chunk 125 + compression tokens 125 + readout 3 = 261 positions"),
        ({"capacity": 110}, "temporary memory 110 + chunk 125 + compression tokens 16"),
    ],
    ids=str,
)
def test_budgets_that_exceed_the_positions(budget, said):
    model = tiny_comet("qwen3", chunk_size=125, stride=8)
    ids = random_ids(10)[None]
    with refused(said) as raised:
        model(ids, **budget)
    assert "max_position_embeddings=256" in str(raised.value)
    model(ids, stride=4, capacity=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_other_dtypes(family, dtype):
    model = cometlm.attach(tiny_backbone(family).to(dtype), **SMALL)
    scramble(model.model.comet, 0.5)
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids, mask = batch_of(2, 43), torch.ones(2, 43)
    mask[1, :20] = 0
    for given in (None, mask):
        out = model(ids, attention_mask=given, labels=ids, logits_to_keep=0)
        assert out.logits.dtype == dtype
        assert out.logits.isfinite().all()
        assert out.loss.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.model.comet.parameters())
    with torch.no_grad():
        cache = model(ids).past_key_values
        step = model(ids[:, :1], past_key_values=cache)
    assert step.logits.dtype == dtype
    assert step.logits.isfinite().all()


# --- NaN ------------------------------------------------------------------------------------

ONLY_TEMPORARY, ONLY_GLOBAL = {"global_memory": False}, {"temporary_memory": False}


@pytest.mark.parametrize("family", ["qwen3", "llama"])  # llama packs its entries
@pytest.mark.parametrize(
    ("weight", "value", "sizes", "chunk"),
    [
        ("global_memory.norm.weight", torch.nan, {}, 0),
        ("global_memory.norm.weight", torch.inf, ONLY_GLOBAL, 0),
        ("global_memory.gate", torch.nan, {}, 1),  # the first fold has no gate
        # Through the slots of the next chunk.
        ("global_memory.adapter.up", torch.nan, {}, 1),
        ("temporary_memory.norm.weight", torch.inf, {}, 0),
        ("temporary_memory.adapter.down", torch.nan, ONLY_TEMPORARY, 0),
    ],
)
@torch.no_grad()
def test_memory_that_is_not_finite_names_layer_and_chunk(family, weight, value, sizes, chunk):
    model = tiny_comet(family, **sizes)
    broken = model.model.comet.layers[1].get_parameter(weight)
    healthy = broken.clone()
    broken.flatten()[0] = value
    said = f"the memory of layer 1 is not finite (NaN or infinite) after chunk {chunk};"
    with pytest.raises(FloatingPointError, match=re.escape(said)):
        model(random_ids(43)[None])
    broken.copy_(healthy)
    model(random_ids(43)[None])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@torch.no_grad()
def test_an_error_leaves_the_cache_as_it_was(family):
    model = tiny_comet(family)
    ids = random_ids(60)[None]
    cache = model(ids[:, :30]).past_key_values  # two chunks folded, six tokens in the third
    want = model(ids[:, 30:], past_key_values=cache)
    weight = model.model.comet.layers[1].global_memory.norm.weight
    healthy = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"layer 1 .* after chunk 2"):
        model(ids[:, 30:], past_key_values=cache)
    weight.copy_(healthy)
    again = model(ids[:, 30:], past_key_values=cache)
    assert torch.equal(again.logits, want.logits)
    assert cache.rows[0].tokens == 30


def test_a_calls_chunks_may_be_shorter_than_a_sessions_overlap():
    """Only sessions read twice."""
    ids = batch_of(1, 30)
    plain, overlapping = (tiny_comet("llama", overlap=overlap) for overlap in (0, 8))
    got = overlapping(ids, chunk_size=6).logits
    assert torch.equal(got, plain(ids, chunk_size=6).logits)
    with refused("chunk_size must be at least 1, got 0"):
        overlapping(ids, chunk_size=0)


def test_a_backbone_without_a_memory_trains():
    """Full attention, cut into chunks or not, is what memories are compared with."""
    model = tiny_comet("llama", global_memory=False, temporary_memory=False).train()
    ids = random_ids(40)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
