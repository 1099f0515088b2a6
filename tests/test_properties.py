"""One text, many ways to feed it: pieces = one call = batch = layer by layer = reference."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.core.cache import CometCache
from cometlm.core.layout import take
from cometlm.core.plan import Call, plan_full_chunks
from cometlm.core.reference import reference_logits
from cometlm.core.text_batch import TextBatch
from cometlm.core.walk import walk_by_layer
from tests.tiny import FAMILIES, error, examples, random_ids, tiny_comet

# transformers' norms and rotary angles are float32 even in float64 models.
CLOSE = 1e-6


@st.composite
def models(draw):
    sizes = {
        "chunk_size": draw(st.integers(1, 14)),
        "readout_tokens": draw(st.integers(1, 4)),
        "stride": draw(st.integers(1, 6)),
        "capacity": draw(st.integers(1, 9)),
        "global_memory": draw(st.booleans()),
        "temporary_memory": draw(st.booleans()),
        "gate": draw(st.booleans()),
    }
    return tiny_comet(draw(st.sampled_from(sorted(FAMILIES))), draw(st.integers(0, 50)), **sizes)


def cut(data, length):
    """Random sizes that add up to `length`."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, length - sum(sizes))))
    return sizes


@examples(25)
@given(models(), st.integers(1, 40), st.data())
@torch.no_grad()
def test_pieces_equal_one_call_equal_reference(model, length, data):
    ids = random_ids(length, seed=data.draw(st.integers(0, 99)))
    whole = model(ids[None]).logits[0]
    assert error(whole, reference_logits(model, ids)) < CLOSE
    cache, parts = None, []
    for piece in ids.split(cut(data, length)):
        more = data.draw(st.booleans())
        out = model(piece[None], past_key_values=cache, close_last=more and len(parts) > 0)
        cache = out.past_key_values
        parts.append(out.logits[0])
    # `close_last` closes a full chunk early, which no later text can tell.
    assert error(torch.cat(parts), whole) < CLOSE
    assert cache.rows[0].tokens == length


@examples(25)
@given(models(), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
@torch.no_grad()
def test_ragged_batch_equals_rows_alone(model, lengths, data):
    width = max(lengths)
    rows = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
    ids = torch.full((len(rows), width), 7)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        start = data.draw(st.integers(0, width - len(row)))
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = row, 1
    logits = model(ids, attention_mask=mask).logits
    for b, row in enumerate(rows):
        assert error(logits[b][mask[b].bool()], model(row[None]).logits[0]) < CLOSE


@examples(25)
@given(models(), st.integers(1, 3), st.data())
@torch.no_grad()
def test_ragged_pieces_equal_rows_alone(model, batch, data):
    """Rows of a batch that get different amounts of text in every call, maybe under other sizes."""
    texts = [random_ids(60, seed=i) for i in range(batch)]
    used, got, cache, alone = [0] * batch, [[] for _ in range(batch)], None, [None] * batch
    changed = False
    for _ in range(data.draw(st.integers(1, 5))):
        sizes = [data.draw(st.integers(0, 12)) for _ in range(batch)]
        width = max(sizes)
        if width == 0:
            continue
        left = data.draw(st.booleans())
        ids, mask = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width)
        for b, n in enumerate(sizes):
            where = slice(width - n, width) if left else slice(0, n)
            ids[b, where], mask[b, where] = texts[b][used[b] : used[b] + n], 1
            used[b] += n
        budget = {
            "stride": data.draw(st.sampled_from([None, 1, 3, 20])),
            "capacity": data.draw(st.sampled_from([None, 2])),
        }
        changed = changed or any(budget.values())
        out = model(ids, attention_mask=mask, past_key_values=cache, **budget)
        cache = out.past_key_values
        for b, n in enumerate(sizes):
            got[b].append(out.logits[b][mask[b].bool()])
            if n:
                new = texts[b][None, used[b] - n : used[b]]
                own = model(new, past_key_values=alone[b], **budget)
                alone[b] = own.past_key_values
                assert error(got[b][-1], own.logits[0]) < CLOSE
    for b, n in enumerate(used):
        if n and not changed:
            want = model(texts[b][None, :n]).logits[0]
            assert error(torch.cat(got[b]), want) < CLOSE


@examples(20)
@given(models(), st.integers(2, 40), st.integers(1, 2), st.booleans())
def test_layer_by_layer_equals_chunk_by_chunk(model, length, batch, again):
    """Both walks of the grid give the same numbers and the same gradients."""
    ids = torch.stack([random_ids(length, seed=b) for b in range(batch)])
    inner = model.model
    sizes = inner.config.comet_config
    cache = CometCache.empty(len(inner.cells), batch, sizes)
    text = TextBatch.of(ids, None, 96, ids.device)
    steps = plan_full_chunks(cache.rows, text.lengths, sizes.chunk_size)
    call = Call(text, cache, steps, sizes, cache.max_positions, use_cache=False)
    layouts = list(call.layouts())
    hidden = [inner.embedded(text, layout) for layout in layouts]
    grid = inner.grid(cache.max_positions)
    outputs, _ = walk_by_layer(grid, hidden, layouts, cache.layers, recompute=again)
    texts = [take(out, one.text_index) for out, one in zip(outputs, layouts, strict=True)]
    by_layer = inner.norm(torch.cat(texts, 1))
    by_chunk = inner(ids).last_hidden_state
    assert error(by_layer, by_chunk) < 1e-12
    parameters = [p for p in inner.parameters() if p.requires_grad]
    got = torch.autograd.grad(by_layer.square().sum(), parameters, allow_unused=True)
    want = torch.autograd.grad(by_chunk.square().sum(), parameters, allow_unused=True)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs.abs().max() > 0:
            assert error(ours, theirs) < 1e-6  # float32 norms sum in another order


@examples(20)
@given(models(), st.integers(1, 40), st.integers(1, 6), st.integers(1, 9))
@torch.no_grad()
def test_budget_per_call_equals_reference(model, length, stride, capacity):
    ids = random_ids(length)
    logits = model(ids[None], stride=stride, capacity=capacity).logits[0]
    want = reference_logits(model, ids, stride=stride, capacity=capacity)
    assert error(logits, want) < CLOSE


@examples(12)
@given(models(), st.lists(st.integers(1, 30), min_size=2, max_size=3))
def test_gradients_of_a_ragged_batch_equal_rows_alone(model, lengths):
    rows = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
    width = max(lengths)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, 1
    parameters = [*model.model.comet.parameters(), model.model.norm.weight]

    def gradients(total):
        return torch.autograd.grad(total, parameters, allow_unused=True)

    labels = ids.masked_fill(mask == 0, -100)
    got = gradients(
        model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss
        + model(ids, attention_mask=mask).logits[mask.bool()].square().sum()
    )
    want = gradients(
        sum(
            model(row[None], labels=row[None], num_items_in_batch=1).loss
            + model(row[None]).logits.square().sum()
            for row in rows
        )
    )
    for ours, theirs in zip(got, want, strict=True):
        reference = torch.zeros(()) if theirs is None else theirs
        if reference.abs().max() < 1e-12:
            assert ours is None or ours.abs().max() < 1e-9
        else:
            assert error(ours, theirs) < 1e-5
