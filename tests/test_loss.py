"""The loss, and the logits that it leaves."""

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import batch_of, error, random_ids, tiny_comet


def plain_loss(model, rows, labels, count=None):
    """Cross-entropy of each row alone, shifted by one over its whole text."""
    total, counted = 0, 0
    for row, wanted in zip(rows, labels, strict=True):
        logits = model(row[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, wanted[1:], reduction="sum", ignore_index=-100)
        counted += int((wanted[1:] != -100).sum())
    return total / (counted if count is None else count)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.model.comet.parameters()))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("length", [2, 12, 13, 24, 25, 43])
def test_loss_is_shifted_over_the_whole_text(family, length):
    model = tiny_comet(family)
    ids = batch_of(2, length)
    want = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    got = model(ids, labels=ids).loss
    assert got.shape == ()
    assert error(got, want) < 1e-12
    with torch.no_grad():
        assert error(model(ids, labels=ids).loss, want) < 1e-12
        assert error(model(ids.int(), labels=ids.int()).loss, want) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_padded_labels(side):
    model = tiny_comet("qwen3")
    lengths = [43, 1, 12, 25]
    rows = [random_ids(n, seed=n) for n in lengths]
    labels = [random_ids(n, seed=50 + n) for n in lengths]  # not the ids: both are looked at
    for wanted in labels:
        wanted[3::5] = -100
    ids, padded = torch.full((4, 43), 7), torch.full((4, 43), 9)  # no -100 at padding
    mask = torch.zeros(4, 43, dtype=torch.long)
    for b, n in enumerate(lengths):
        where = slice(43 - n, 43) if side == "left" else slice(0, n)
        ids[b, where], padded[b, where], mask[b, where] = rows[b], labels[b], 1
    want = plain_loss(model, rows, labels)
    got = model(ids, attention_mask=mask, labels=padded).loss
    assert error(got, want) < 1e-9  # padded batches sum in another order
    for ours, theirs in zip(gradients(model, got), gradients(model, want), strict=True):
        assert error(ours, theirs) < 1e-5  # transformers' norms are float32
    for count in (7, torch.tensor(7)):
        got = model(ids, attention_mask=mask, labels=padded, num_items_in_batch=count).loss
        assert error(got, plain_loss(model, rows, labels, count=7)) < 1e-9


def test_first_label_of_a_continuation_is_not_counted():
    """Its logits were the last call's."""
    model = tiny_comet("qwen3")
    ids = random_ids(30)[None]
    whole = model(ids).logits
    cache = model(ids[:, :17]).past_key_values
    got = model(ids[:, 17:], past_key_values=cache, labels=ids[:, 17:]).loss
    assert error(got, F.cross_entropy(whole[0, 17:-1], ids[0, 18:])) < 1e-6


def test_loss_holds_the_logits_of_one_chunk():
    model = tiny_comet("qwen3")
    ids = batch_of(2, 43)
    seen, saved = [], []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    def save(x):
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        out = model(ids, labels=ids)
    assert out.logits is None
    assert seen == [24, 24, 24, 12]  # the last token of each row has no label
    assert not any(96 in shape[1:] for shape in saved)  # the vocabulary, but for the head's weight
    out.loss.backward()
    assert max(seen) == 24
    assert sum(seen) == 2 * 84
    seen.clear()
    with torch.no_grad():
        model(ids, labels=ids)
    assert seen == [24, 24, 24, 12]  # the last token of each row has no label


def test_logits_to_keep():
    model, ids = tiny_comet("qwen3"), batch_of(2, 30)
    with torch.no_grad():
        whole = model(ids).logits
        assert whole.shape == (2, 30, 96)
        assert model(ids, labels=ids).logits is None
        for keep, where in [
            (0, slice(None)),
            (1, slice(29, None)),
            (13, slice(17, None)),
            (99, slice(None)),
            (torch.tensor([0, 11, 12, 29]), torch.tensor([0, 11, 12, 29])),
        ]:
            assert error(model(ids, logits_to_keep=keep).logits, whole[:, where]) < 1e-12
            out = model(ids, labels=ids, logits_to_keep=keep)
            assert error(out.logits, whole[:, where]) < 1e-12
            assert out.loss is not None


def test_a_batch_without_a_label_may_be_counted_as_such():
    ids = batch_of(1, 9)
    labels = torch.full_like(ids, -100)
    for none in (0, torch.tensor(0)):
        assert tiny_comet("llama")(ids, labels=labels, num_items_in_batch=none).loss == 0
