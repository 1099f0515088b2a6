"""Asides, read from forks of the memory and forgotten, and what readout tokens are to say."""

import pytest
import torch

from cometlm.train.chunk_plans import Chunking
from tests.tiny import FAMILIES, error, random_ids, tiny_comet

CHUNK = 12


@pytest.fixture
def asked():
    """Text of two rows, and an aside to each of which the end is scored."""
    ids = torch.stack([random_ids(5 * CHUNK, seed=b) for b in range(2)])
    beside = torch.stack([random_ids(9, seed=10 + b) for b in range(2)])
    labels = beside.clone()
    labels[:, :-4] = -100
    return ids, beside, labels


def loss_of(model, ids, beside, labels, since=0, **inputs):
    first = torch.full((len(ids),), since)
    return model(
        ids, labels=ids, aside_ids=beside, aside_labels=labels, aside_since=first, **inputs
    )


def asked_after(model, ids, beside, labels, chunks):
    """The same by hand: read some chunks, then the aside with what they left."""
    read = model(ids[:, : chunks * CHUNK], use_cache=True, more_text=True).past_key_values
    return model(beside, labels=labels, past_key_values=read, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("since", "after"), [(0, [1, 2, 4, 5]), (13, [2, 3, 5]), (49, [5])])
def test_an_aside_is_a_question_to_a_fork(asked, family, since, after):
    """After the first, second, fourth … chunk that ends with enough read, and after the last."""
    ids, beside, labels = asked
    model = tiny_comet(family).eval()
    got = loss_of(model, ids, beside, labels, since)
    by_hand = [asked_after(model, ids, beside, labels, chunks) for chunks in after]
    assert error(got.aside_loss, torch.stack([one.loss for one in by_hand]).mean()) < 1e-9
    right = sum(int(one.right) for one in by_hand)
    assert float(got.aside_right) == pytest.approx(right / (8 * len(after)))
    assert error(got.loss, model(ids, labels=ids).loss) < 1e-9  # the text does not notice


def test_places_are_those_of_the_calls_own_text(asked):
    """A memory that has read before is asked, and told, where a new one would be."""
    ids, beside, labels = asked
    model = tiny_comet("llama").eval()
    said = torch.stack([random_ids(3, seed=20 + b) for b in range(2)])

    def read(start, since, until, **more):
        ends = {"told_labels": said, "told_until": torch.tensor(until) - start}
        return loss_of(model, ids[:, start:], beside, labels, since - start, **ends, **more)

    whole = read(0, since=3 * CHUNK - 5, until=[30, 40])
    before = model(ids[:, : 2 * CHUNK], use_cache=True, more_text=True).past_key_values
    rest = read(2 * CHUNK, since=3 * CHUNK - 5, until=[30, 40], past_key_values=before)
    assert error(rest.told_loss, whole.told_loss) < 1e-9
    third, last = (asked_after(model, ids, beside, labels, chunks).loss for chunks in (3, 5))
    fourth = asked_after(model, ids, beside, labels, 4).loss
    assert error(rest.aside_loss, (third + fourth + last) / 3) < 1e-9


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_the_plain_graphs(asked, every):
    model = tiny_comet("llama").train()
    found = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"every": every})
        model.zero_grad()
        out = loss_of(model, *asked, since=13)
        (out.loss + 3 * out.aside_loss).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, wanted in found[0].items():
        assert error(found[1][name], wanted) < 1e-9, name


def test_rows_that_are_cut_differently_are_asked_when_all_have_read_enough(asked):
    ids, beside, labels = asked
    model = tiny_comet("llama").train()
    model.model.chunking = Chunking.of({"sentence_ends": 1}, ends=range(40))
    out = loss_of(model, ids, beside, labels)
    assert out.aside_loss > 0


def test_asides_of_wrong_shapes(asked):
    ids, beside, labels = asked
    model = tiny_comet("llama")
    wide = torch.zeros(2, CHUNK + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"one chunk of chunk_size=12, got 13 tokens"):
        loss_of(model, ids, wide, wide)
    with pytest.raises(ValueError, match=r"an aside to 2 rows needs .* got \[\(1, 9\)"):
        loss_of(model, ids, beside[:1], labels[:1])
    with pytest.raises(ValueError, match="aside_ids and aside_labels need each other"):
        model(ids, labels=ids, aside_ids=beside)
    with pytest.raises(ValueError, match="aside_ids and told_labels need labels"):
        model(ids, aside_ids=beside, aside_labels=labels)
    with pytest.raises(ValueError, match="told_labels and told_until need each other"):
        model(ids, labels=ids, told_labels=torch.zeros(2, 3, dtype=torch.long))
    positions = torch.arange(30).repeat(2)[None]
    with pytest.raises(ValueError, match="packed documents"):
        loss_of(model, ids[:1], beside[:1], labels[:1], position_ids=positions)


# --- what readout tokens are to say -------------------------------------------------------------


def told_by_hand(model, ids, labels, begin, end):
    """Loss of readout tokens that close the chunk [begin, end) of one row."""
    read = model(ids[:, :begin], use_cache=True, more_text=True) if begin else None
    seen = []
    last = model.model.cells[-1].layer
    hook = last.register_forward_hook(lambda _module, _args, out: seen.append(out))
    text = ids[:, begin:end]
    model(text, past_key_values=read and read.past_key_values, more_text=True, use_cache=True)
    hook.remove()
    logits = model.logits(model.model.norm(seen[0][:, -labels.shape[1] :]))
    return torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")


def test_readout_tokens_are_asked_where_their_part_stands(asked):
    """At the end of the chunk that it ends in, also where a border cuts it."""
    ids, _, _ = asked
    model = tiny_comet("llama").eval()
    labels = torch.stack([random_ids(3, seed=20 + b) for b in range(2)])
    until = torch.tensor([20, 36])
    got = model(ids, labels=ids, told_labels=labels, told_until=until)
    first = told_by_hand(model, ids[:1], labels[:1], 12, 24)
    second = told_by_hand(model, ids[1:], labels[1:], 24, 36)
    assert error(got.told_loss, (first + second) / 6) < 1e-9
    assert error(got.loss, model(ids, labels=ids).loss) < 1e-12
    with pytest.raises(ValueError, match=r"3 readout tokens and 2 rows need .* got \[\(1, 3\)"):
        model(ids, labels=ids, told_labels=labels[:1], told_until=until)
    got = model(ids, labels=ids, told_labels=labels, told_until=torch.tensor([20, 25]))
    assert error(got.told_loss, (first + second) / 6) < 1e-9


def test_readout_tokens_are_asked_something_else_where_their_part_does_not_stand(asked):
    """Not where a border leaves only its beginning."""
    ids, _, _ = asked
    model = tiny_comet("llama").eval()
    labels, others = (
        torch.stack([random_ids(3, seed=seed + b) for b in range(2)]) for seed in (20, 30)
    )
    others[1, 2] = -100
    places = {"told_until": torch.tensor([20, 38]), "told_since": torch.tensor([13, 35])}
    given = {"told_labels": labels, "told_otherwise": others, **places}
    got = model(ids[:, :48], labels=ids[:, :48], more_text=True, **given)
    parts = [
        told_by_hand(model, ids[row, None], said[row, None], 12 * chunk, 12 * chunk + 12)
        for row, chunk, said in (
            (0, 0, others), (0, 1, labels), (0, 2, others), (0, 3, others),
            (1, 0, others), (1, 1, others), (1, 3, labels),
        )
    ]  # fmt: skip
    assert error(got.told_loss, sum(parts) / 19) < 1e-9
    with pytest.raises(ValueError, match="told_since and told_otherwise need each other, and"):
        model(ids, labels=ids, told_labels=labels, told_until=labels[:, 0], told_otherwise=others)
    with pytest.raises(ValueError, match=r"3 readout tokens and 2 rows need .*\(2, 3\), .* \(1, 3"):
        model(ids, labels=ids, **{**given, "told_otherwise": others[:1]})


def test_what_else_is_asked_has_its_place_in_the_calls_own_text(asked):
    ids, _, _ = asked
    model = tiny_comet("llama").eval()
    said = {f"told_{name}": random_ids(6).view(2, 3) for name in ("labels", "otherwise")}

    def told(start, end, past=None):
        places = {"told_since": torch.tensor([27, 36]), "told_until": torch.tensor([30, 40])}
        places = {name: place - start for name, place in places.items()}
        text = ids[:, start:end]
        common = {"past_key_values": past, "use_cache": True, "more_text": True}
        out = model(text, labels=text, **common, **said, **places)
        return out.told_loss, out.past_key_values

    whole, _ = told(0, 48)
    first, past = told(0, 24)
    rest, _ = told(24, 48, past)
    assert error((first + rest) / 2, whole) < 1e-9


@pytest.mark.parametrize("every", [1, 3])
def test_what_is_told_is_learned_recomputed_too(asked, every):
    ids, _, _ = asked
    model = tiny_comet("llama").train()
    labels = torch.stack([random_ids(3, seed=20 + b) for b in range(2)])
    told = {"told_labels": labels, "told_until": torch.tensor([20, 36])}
    told |= {"told_since": torch.tensor([15, 30]), "told_otherwise": labels.flip(1)}
    found = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"every": every})
        model.zero_grad()
        out = model(ids, labels=ids, **told)
        (out.loss + 2 * out.told_loss).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, wanted in found[0].items():
        assert error(found[1][name], wanted) < 1e-9, name
