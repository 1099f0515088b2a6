"""Packed rows: several documents in one row, each with a memory of its own."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.tiny import error, random_ids, tiny_comet

LENGTHS = (30, 5, 13, 24)


@pytest.fixture(scope="module")
def model():
    """Not to be changed."""
    return tiny_comet("qwen3")


def documents():
    return [random_ids(length, seed=i) for i, length in enumerate(LENGTHS)]


def packed(*, labels=True):
    """What trl's collator makes of them."""
    rows = [{"input_ids": d.tolist(), "labels": d.tolist()} for d in documents()]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    if not labels:
        del batch["labels"]
    return batch


def test_hidden_states_are_those_of_the_documents(model):
    with torch.no_grad():
        got = model.model(**packed(labels=False)).last_hidden_state
        wanted = [model.model(d[None]).last_hidden_state for d in documents()]
    assert error(got, torch.cat(wanted, dim=1)) < 1e-9


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens_q"])
def test_either_way_of_saying_it(model, given):
    batch = packed(labels=False)
    with torch.no_grad():
        wanted = model(**batch).logits
        got = model(batch["input_ids"], **{given: batch[given]}).logits
    assert error(got, wanted) < 1e-12


@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_gradients(recomputed):
    model = tiny_comet("llama").train()
    if recomputed:
        model.activation_checkpointing_enable()
    results = []
    for together in (True, False):
        model.zero_grad()
        if together:
            loss = model(**packed(), num_items_in_batch=1).loss
        else:
            rows = documents()
            loss = sum(model(d[None], labels=d[None], num_items_in_batch=1).loss for d in rows)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    assert error(results[0][0], results[1][0]) < 1e-9
    for name, wanted in results[1][1].items():
        assert error(results[0][1][name], wanted) < 1e-9, name


def test_positions_of_one_document_change_nothing(model):
    ids = torch.stack([random_ids(30), random_ids(30, seed=1)])
    with torch.no_grad():
        wanted = model(ids).logits
        places = torch.arange(30)[None]
        assert error(model(ids, position_ids=places.expand(2, -1)).logits, wanted) < 1e-12
        assert error(model(ids[:1], position_ids=places).logits, wanted[:1]) < 1e-9
        mask = torch.ones_like(ids)
        same = model(ids, attention_mask=mask, position_ids=torch.zeros_like(ids)).logits
        assert error(same, wanted) < 1e-12


def test_refusals(model):
    ids = random_ids(10)[None]
    with pytest.raises(ValueError, match="position_ids must count up from 0"):
        model(ids, position_ids=torch.arange(10)[None] * 2)
    with pytest.raises(ValueError, match="documents must fill one row of 10 tokens"):
        model(ids, position_ids=torch.arange(10)[None] + 1)
    with pytest.raises(ValueError, match="position_ids must count up from 0"):
        model(ids.expand(2, -1), position_ids=torch.tensor([[*range(5), *range(5)]] * 2))
    with pytest.raises(ValueError, match="documents must fill one row"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    two = torch.tensor([[*range(5), *range(5)]])
    for more in ({"chunk_lengths": [[5, 5]]}, {"close_last": True}):
        with pytest.raises(ValueError, match=f"does not take {next(iter(more))} with packed"):
            model(ids, position_ids=two, **more)
    with torch.no_grad():
        cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="does not take position_ids or cu_seq_lens_q with past"):
        model(ids, past_key_values=cache, position_ids=torch.arange(10)[None])
