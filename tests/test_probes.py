"""Observers of a training step: questions to forks, and what readout tokens should say."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from cometlm.core.observer import ChunkObserver
from cometlm.core.training_plan import TrainingPlan
from cometlm.parallel.pipeline import Pipeline, sum_gradients
from cometlm.train.chunk_plans import Chunking, SentenceEnds
from cometlm.train.probes import ANSWERS, READOUT, Probe, Questions, ReadoutLabels, Together
from tests.ranks import run_ranks
from tests.tiny import FAMILIES, error, random_ids, tiny_comet

CHUNK = 12


def asked():
    """Text of two rows, and a question to each whose end is the answer."""
    ids = torch.stack([random_ids(5 * CHUNK, seed=b) for b in range(2)])
    beside = torch.stack([random_ids(9, seed=10 + b) for b in range(2)])
    labels = beside.clone()
    labels[:, :-4] = -100
    return ids, beside, labels


def questions(beside, labels, since=0):
    return Questions([Probe(beside, labels, (since,) * len(beside))])


def watched(model, observer):
    model.training_plan = replace(model.training_plan, observer=observer)
    return model


def asked_after(model, ids, beside, labels, chunks):
    """The same by hand: read some chunks, then the question with what they left."""
    read = model(ids[:, : chunks * CHUNK], use_cache=True, close_last=True).past_key_values
    return model(beside, labels=labels, past_key_values=read, use_cache=False)


@pytest.mark.parametrize(
    ("family", "since", "after"),
    [*((family, 13, [2, 3]) for family in FAMILIES), ("llama", 0, [1, 3]), ("llama", 49, [])],
)
def test_a_probe_is_a_question_to_a_fork(family, since, after):
    """After the first chunk with enough read, where the distance has doubled, and at the end."""
    ids, beside, labels = asked()
    ids = ids[:, : 4 * CHUNK + 5]  # its last chunk stays open, so nobody asks there
    model = tiny_comet(family).train()
    plain = model(ids, labels=ids).loss
    got = watched(model, questions(beside, labels, since))(ids, labels=ids)
    assert error(got.loss, plain) < 1e-9  # the text does not notice
    score = got.observed[ANSWERS]
    by_hand = [asked_after(model, ids, beside, labels, chunks) for chunks in after]
    assert int(score.count) == 8 * len(after)
    if after:
        assert error(score.mean, torch.stack([one.loss for one in by_hand]).mean()) < 1e-9
        assert int(score.num_correct) == sum(int(one.num_correct) for one in by_hand)


def test_the_end_of_the_text_is_asked():
    ids, beside, labels = asked()
    model = watched(tiny_comet("llama").train(), questions(beside, labels))
    got = model(ids, labels=ids, close_last=True).observed[ANSWERS]
    by_hand = [asked_after(model, ids, beside, labels, chunks).loss for chunks in (1, 3, 5)]
    assert error(got.mean, torch.stack(by_hand).mean()) < 1e-9


@pytest.mark.parametrize(("until", "after"), [(3, []), (CHUNK, [1]), (3 * CHUNK, [1, 3])])
def test_nobody_is_asked_for_what_holds_no_longer(until, after):
    ids, beside, labels = asked()
    rows = len(beside)
    observer = Questions([Probe(beside, labels, (0,) * rows, (10**6,) * (rows - 1) + (until,))])
    got = watched(tiny_comet("llama").train(), observer)(ids, labels=ids).observed[ANSWERS]
    assert int(got.count) == 8 * len(after)


def test_nobody_is_asked_outside_training():
    ids, beside, labels = asked()
    model = watched(tiny_comet("llama").eval(), questions(beside, labels))
    assert model(ids, labels=ids).observed is None


@pytest.mark.parametrize("every", [1, 3])
def test_gradients_are_the_plain_graphs(every):
    """Of both observers at once."""
    ids, beside, labels = asked()
    said = torch.stack([random_ids(3, seed=20 + b) for b in range(2)])
    readout = ReadoutLabels(said, [range(15, 20), range(30, 36)], otherwise=said.flip(1))
    model = tiny_comet("llama").train()
    watched(model, Together([questions(beside, labels, 13), readout]))
    found = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"every": every})
        model.zero_grad()
        out = model(ids, labels=ids)
        (out.loss + 3 * out.observed[ANSWERS].mean + 2 * out.observed[READOUT].mean).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, wanted in found[0].items():
        assert error(found[1][name], wanted) < 1e-9, name


def wave(recompute):
    """Errors of loss, answers and gradients on this rank, against one process."""
    ids, beside, labels = asked()
    model = watched(tiny_comet("llama").train(), questions(beside, labels, 13))
    found = []
    for plan in (model.training_plan, replace(model.training_plan, pipeline=Pipeline(_world()))):
        model.training_plan = plan
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        answers = out.observed[ANSWERS]
        (out.loss + 2 * answers.mean).backward()
        whole = torch.stack([out.loss.detach(), answers.mean.detach()])
        if plan.pipeline is not None:
            plan.pipeline.flush()
            sum_gradients(list(model.parameters()), _world())
            dist.all_reduce(whole)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((whole, grads, int(answers.count)))
    (loss, wanted, count), (got, grads, counted) = found
    assert count == counted
    return float(error(got, loss)), max(float(error(grads[n], wanted[n])) for n in wanted)


def _world():
    return dist.group.WORLD


def waves():
    """With the plain graph and recomputed."""
    return [wave(recompute) for recompute in (False, True)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_wave_asks_as_one_process_does(ranks):
    for found in run_ranks(ranks, waves):
        assert len(found) == 2
        for loss, gradient in found:
            assert loss < 1e-9
            assert gradient < 1e-6  # norms of float32 sum in another order


def test_rows_that_are_cut_differently_are_asked_when_all_have_read_enough():
    ids, beside, labels = asked()
    model = watched(tiny_comet("llama").train(), questions(beside, labels))
    chunking = Chunking({"ends": (SentenceEnds(range(40)), 1)})
    model.training_plan = replace(model.training_plan, chunking=chunking)
    assert model(ids, labels=ids).observed[ANSWERS].mean > 0


def test_probes_of_wrong_shapes():
    ids, beside, labels = asked()
    model = tiny_comet("llama").train()
    wide = torch.zeros(2, CHUNK + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\[2 or a multiple, 1 … 12\].* got shape \(2, 13\)"):
        watched(model, questions(wide, wide))(ids, labels=ids)
    with pytest.raises(ValueError, match=r"\[3, A\] for 3 since"):
        Probe(beside, labels, (0, 0, 0))
    watched(model, questions(beside[:1], labels[:1]))
    with pytest.raises(ValueError, match="packed documents"):
        model(ids[:1], labels=ids[:1], position_ids=torch.arange(30).repeat(2)[None])


class Nameless(ChunkObserver):
    losses = ("one",)

    def after_chunk(self, chunk):
        return {"another": chunk.score(chunk.text, torch.zeros(chunk.text.shape[:2]).long())}


def test_an_observer_returns_what_it_has_named():
    ids, _, _ = asked()
    with pytest.raises(ValueError, match="losses must name one, got another"):
        watched(tiny_comet("llama").train(), Nameless())(ids, labels=ids)


# --- what readout tokens should say -------------------------------------------------------------


def said_by_hand(model, ids, labels, begin, end):
    """Loss of readout tokens that close the chunk [begin, end) of one row."""
    read = model(ids[:, :begin], use_cache=True, close_last=True) if begin else None
    seen = []
    last = model.model.cells[-1].layer
    hook = last.register_forward_hook(lambda _module, _args, out: seen.append(out))
    text = ids[:, begin:end]
    model(text, past_key_values=read and read.past_key_values, close_last=True, use_cache=True)
    hook.remove()
    logits = model.logits(model.model.norm(seen[0][:, -labels.shape[1] :]))
    return torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")


def test_readout_tokens_are_asked_where_a_span_ends():
    """Also where a border cuts it."""
    ids, _, _ = asked()
    model = tiny_comet("llama").train()
    labels = torch.stack([random_ids(3, seed=20 + b) for b in range(2)])
    watched(model, ReadoutLabels(labels, [range(15, 20), range(20, 36)]))
    got = model(ids, labels=ids).observed[READOUT]
    first = said_by_hand(model, ids[:1], labels[:1], 12, 24)
    second = said_by_hand(model, ids[1:], labels[1:], 24, 36)
    assert error(got.mean, (first + second) / 6) < 1e-9
    with pytest.raises(ValueError, match=r"labels must be \[2, readout tokens\], got \(1, 3\)"):
        ReadoutLabels(labels[:1], [range(2), range(3)])


def test_readout_tokens_are_asked_something_else_where_a_span_does_not_stand():
    """Not where a border leaves only its beginning."""
    ids, _, _ = asked()
    model = tiny_comet("llama").train()
    labels, others = (
        torch.stack([random_ids(3, seed=seed + b) for b in range(2)]) for seed in (20, 30)
    )
    others[1, 2] = -100
    watched(model, ReadoutLabels(labels, [range(13, 20), range(35, 38)], otherwise=others))
    got = model(ids[:, :48], labels=ids[:, :48], close_last=True).observed[READOUT]
    parts = [
        said_by_hand(model, ids[row, None], said[row, None], 12 * chunk, 12 * chunk + 12)
        for row, chunk, said in (
            (0, 0, others), (0, 1, labels), (0, 2, others), (0, 3, others),
            (1, 0, others), (1, 1, others), (1, 3, labels),
        )
    ]  # fmt: skip
    assert error(got.mean, sum(parts) / 19) < 1e-9
    with pytest.raises(ValueError, match=r"otherwise must be \[2, readout tokens\], got \(1, 3\)"):
        ReadoutLabels(labels, [range(2), range(3)], otherwise=others[:1])


def test_a_training_plan_is_a_value():
    plan = TrainingPlan()
    model = tiny_comet("llama")
    model.training_plan = replace(plan, truncate_after=2)
    assert model.model.training_plan.truncate_after == 2
    assert plan.truncate_after == 0
    with pytest.raises(ValueError, match="truncate_after must be at least 0, got -1"):
        TrainingPlan(truncate_after=-1)


def open_where_a_row_ends():
    """What a wave says of questions to a row that ended before others, with an open chunk."""
    ids, beside, labels = asked()
    mask = torch.ones_like(ids)
    mask[0, CHUNK + 3 :] = 0
    model = watched(tiny_comet("llama").train(), questions(beside, labels))
    model.training_plan = replace(model.training_plan, pipeline=Pipeline(_world()))
    lengths = [[CHUNK, 3], [CHUNK] * (ids.shape[1] // CHUNK)]
    batch = {"attention_mask": mask, "labels": ids, "use_cache": False, "chunk_lengths": lengths}
    with pytest.raises(ValueError, match="close_last=True"):
        model(ids, **batch)
    return model(ids, **batch, close_last=True).observed[ANSWERS].count.item()


def test_the_wave_refuses_questions_to_open_chunks_that_stay_behind():
    assert len(set(run_ranks(2, open_where_a_row_ends))) == 1
