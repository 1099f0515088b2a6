"""Chunk plans: what each promises, what is drawn, and what training reads with them."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.core.plan import plan_chunks
from cometlm.core.training_plan import TrainingPlan
from cometlm.train.chunk_plans import PAPER, PLANS, Chunking, Fixed, SentenceEnds, sentence_ends
from tests.real import tokenizer
from tests.tiny import error, random_ids, tiny_comet

ENDS = (7, 11)


def made(name):
    return SentenceEnds(ENDS) if name == "sentence_ends" else PLANS[name]()


@pytest.mark.parametrize("name", PLANS)
@given(length=st.integers(1, 300), size=st.integers(1, 40), seed=st.integers(0, 999))
def test_lengths_fit_and_add_up(name, length, size, seed):
    ids = random.Random(seed).choices(range(20), k=length)
    cut = made(name).cut(ids, size, random.Random(seed))
    assert sum(cut) == length
    assert all(1 <= one <= size for one in cut)
    assert made(name).cut(ids, size, random.Random(seed)) == cut


@given(length=st.integers(1, 200), size=st.integers(1, 30))
def test_fixed_right_aligned_and_uniform(length, size):
    ids, rng = [0] * length, random.Random(length)
    fixed = PLANS["fixed"]().cut(ids, size, rng)
    assert all(one == size for one in fixed[:-1])
    assert PLANS["right_aligned"]().cut(ids, size, rng) == fixed[::-1]
    uniform = PLANS["uniform"]().cut(ids, size, rng)
    assert max(uniform) - min(uniform) <= 1


@given(st.lists(st.sampled_from([1, 2, 3, *ENDS]), min_size=1, max_size=120))
def test_sentence_ends(ids):
    size, start = 12, 0
    for length in SentenceEnds(ENDS).cut(ids, size, random.Random(0))[:-1]:
        late = [p for p in range(start + 4, start + size + 1) if ids[p - 1] in ENDS]
        assert length == (late[-1] - start if late else size)
        start += length


def test_ends_of_a_tokenizer():
    words = tokenizer("smollm2")
    ends = sentence_ends(words)
    for text in (".", "\n", "?", "<|im_end|>"):
        assert words.convert_tokens_to_ids(words.tokenize(text))[-1] in ends
    assert words.convert_tokens_to_ids(words.tokenize(" ship"))[0] not in ends


# --- drawing ------------------------------------------------------------------------------------


def paper(seed):
    """The paper's plans, with ends of sentences that are known here."""
    chunking = Chunking.of(PAPER, seed=seed)
    chunking.plans["sentence_ends"] = (SentenceEnds(ENDS), PAPER["sentence_ends"])
    return chunking


def plan_named(name):
    """A plan by its name, with ends of sentences that are known here."""
    return SentenceEnds(ENDS) if name == "sentence_ends" else PLANS[name]()


def drawn(chunking, count=50):
    rows = [list(range(100)), list(range(40))]
    return [chunking.draw(rows, 16).chunk_lengths for _ in range(count)]


def test_draws_depend_on_the_seed_and_the_number_of_batches_alone():
    first = drawn(paper(1))
    random.seed(5)
    torch.manual_seed(5)
    assert drawn(paper(1)) == first
    assert drawn(paper(2)) != first
    later = paper(1)
    later.batches = 20
    assert drawn(later, 30) == first[20:]


def test_plans_come_up_as_often_as_they_weigh():
    chunking = Chunking.of({"fixed": 3, "right_aligned": 1, "random": 0})
    full = [cuts[0] == Fixed().cut(range(100), 16, random) for cuts in drawn(chunking, 400)]
    assert 0.68 < sum(full) / 400 < 0.82


def test_rows_of_one_length_are_cut_alike():
    chunking = Chunking.of({"random": 1})
    for _ in range(20):
        one, other = chunking.draw([list(range(90)), list(range(90, 180))], 16).chunk_lengths
        assert one == other


def test_budgets_and_sizes():
    chunking = Chunking.of({"fixed": 1})
    chunking.sizes, chunking.strides, chunking.capacities = (4, 8), (2, 4), (3, 5)
    seen = [chunking.draw([[0] * 64], 8) for _ in range(60)]
    assert {max(one.chunk_lengths[0]) for one in seen} == {4, 8}
    assert {one.stride for one in seen} == {2, 4}
    assert {one.capacity for one in seen} == {3, 5}
    assert max(Chunking.of({"fixed": 1}).draw([[0] * 64], 8).chunk_lengths[0]) == 8


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"fix": 1}, "unknown chunk plan 'fix'; there are fixed"),
        ({"fixed": -1}, "the weight of plan 'fixed' must be at least 0, got -1"),
        ({"fixed": 0}, "at least one plan needs a weight above 0"),
    ],
    ids=str,
)
def test_bad_weights(weights, said):
    with pytest.raises(ValueError, match=said):
        Chunking.of(weights)


# --- training with them -------------------------------------------------------------------------


def by_hand(model, row, cut, labels):
    """Loss of one row whose chunks are closed where `cut` says: fed chunk by chunk."""
    cache, hidden, place = None, [], 0
    for i, length in enumerate(cut):
        size = {**model.config.comet, "chunk_size": length}
        own, model.config.comet = model.config.comet, size
        more = i + 1 < len(cut)
        piece = row[None, place : place + length]
        out = model.model(piece, past_key_values=cache, use_cache=True, close_last=more)
        model.config.comet = own
        cache = out.past_key_values
        hidden.append(out.last_hidden_state)
        place += length
    logits = model.logits(torch.cat(hidden, dim=1))[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_training_reads_chunks_as_they_are_cut(name, recomputed):
    model = tiny_comet("qwen3").train()
    if recomputed:
        model.activation_checkpointing_enable()
    model.training_plan = TrainingPlan(chunking=Chunking({name: (plan_named(name), 1)}))
    ids = torch.stack([random_ids(50, seed=b) for b in range(2)])
    mask = torch.ones(2, 50)
    mask[1, 31:] = 0
    rows = [ids[0].tolist(), ids[1, :31].tolist()]
    cuts = Chunking({name: (plan_named(name), 1)}).draw(rows, 12).chunk_lengths
    got = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=1).loss
    model.eval()
    with torch.no_grad():
        wanted = by_hand(model, ids[0], cuts[0], ids[0])
        wanted += by_hand(model, ids[1, :31], cuts[1], ids[1, :31])
    assert error(got, wanted) < 1e-9
    assert model.training_plan.chunking.batches == 1  # drawn once, though chunks run twice
    got.backward()
    assert model.training_plan.chunking.batches == 1


def test_a_drawn_budget_is_read_with():
    model = tiny_comet("qwen3").train()
    model.training_plan = TrainingPlan(chunking=Chunking.of({"fixed": 1}))
    chunking = model.training_plan.chunking
    chunking.strides, chunking.capacities = (2,), (9,)
    ids = random_ids(50)[None]
    got = model(ids, labels=ids).loss
    model.eval()
    with torch.no_grad():
        assert error(got, model(ids, labels=ids, stride=2, capacity=9).loss) < 1e-9
        assert error(got, model(ids, labels=ids).loss) > 1e-6


def test_reading_is_not_touched():
    """Evaluation and a given cache read in full chunks."""
    model = tiny_comet("qwen3")
    ids = random_ids(50)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        cache = model(ids[:, :9]).past_key_values
        model.training_plan = TrainingPlan(chunking=Chunking.of({"random": 1}))
        assert error(model(ids).logits, wanted) < 1e-12
    got = model.train()(ids[:, 9:], past_key_values=cache).logits
    assert error(got, wanted[:, 9:]) < 1e-9


def test_steps_of_cuts():
    steps = plan_chunks([[3, 2], [4]])
    assert [[(p.start, p.text, p.close) for p in step] for step in steps] == [
        [(0, 3, True), (0, 4, False)],
        [(3, 2, False), (4, 0, False)],
    ]


def test_a_caller_may_cut_the_text():
    """The cuts of a call are those of training, and a part that is closed is another chunk."""
    model = tiny_comet("llama")
    ids = torch.arange(2, 13)[None]
    cuts = [[5, 2, 4]]
    with torch.no_grad():
        got = model(ids, chunk_lengths=cuts).logits
        cache = None
        for piece, more in zip(ids.split(cuts[0], dim=1), (True, True, False), strict=True):
            lengths = [[piece.shape[1]]]
            out = model(piece, past_key_values=cache, chunk_lengths=lengths, close_last=more)
            cache = out.past_key_values
            torch.testing.assert_close(out.logits, got[:, : piece.shape[1]], rtol=0, atol=1e-9)
            got = got[:, piece.shape[1] :]
    assert cache.chunks_folded == 2


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([[5, 5]], r"chunk_lengths must add up to the tokens of each row, \[11\]"),
        ([[11], [11]], "chunk_lengths must add up"),
        ([[6, 0, 5]], "chunk_lengths must lie in 1 … chunk_size=6, got 0"),
        ([[7, 4]], "got 7"),
    ],
)
def test_cuts_of_other_rows_are_refused(cuts, message):
    model = tiny_comet("llama")
    model.config.comet = model.config.comet_config.replace(chunk_size=6).to_dict()
    with pytest.raises(ValueError, match=message):
        model(torch.arange(2, 13)[None], chunk_lengths=cuts)


def test_cuts_need_a_closed_chunk():
    model = tiny_comet("llama")
    cache = model(torch.arange(2, 5)[None]).past_key_values
    with pytest.raises(ValueError, match="row 0 has one"):
        model(torch.arange(2, 5)[None], past_key_values=cache, chunk_lengths=[[3]])
