"""Measuring with passkeys: what is hidden, what is forked, what is silenced."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cometlm.eval.passkey import PasskeyTest, Trial, _shared, interval, said
from cometlm.session.session import Session
from tests.real import tiny_comet, tokenizer

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


@pytest.fixture(scope="module")
def model():
    return tiny_comet().float()


@pytest.fixture
def test(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 60)
    (tmp_path / "b.txt").write_text(PROSE[::-1] * 60)
    return PasskeyTest(
        150, texts=2, deciles=(0, 4, 9), hay=(f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")
    )


def test_every_cell_once_and_resumed_the_same(test, model, words):
    trials = list(test.run(model, words))
    assert [trial.cell for trial in trials] == test.cells()
    assert all(trial.decile / 10 <= trial.depth < (trial.decile + 1) / 10 for trial in trials)
    assert [trial.hay[-5] for trial in trials] == list("aaabbb")
    half = frozenset(trial.cell for trial in trials[::2])
    assert list(test.run(model, words, skip=half)) == trials[1::2]
    assert Trial(**trials[0].to_dict()) == trials[0]


def test_a_forked_trial_is_the_trial_read_whole(test, model, words, monkeypatch):
    """Reading what stands before a key only once changes no answer.

    Texts differ in length, so keys do not stand in the order of their depths.
    """
    test = dataclasses.replace(test, deciles=tuple(range(10)), jitter=40)
    samples = []
    ask = said

    def note(session, sample, without=()):
        if not without:
            samples.append((session.stats(), sample))
        return ask(session, sample, without)

    monkeypatch.setattr("cometlm.eval.passkey.said", note)
    trials = list(test.run(model, words))
    for trial, (stats, sample) in zip(trials, samples, strict=True):
        whole = Session(model, words)
        whole.read(sample.text)
        assert whole.stats() == stats
        assert ask(whole, sample) == trial.answers["whole"]
        assert trial.length * 3 // 4 <= len(sample.input_ids) <= trial.length
        assert trial.key in words.decode(sample.text)
    places = {
        trial.cell: sample.said.start for trial, (_, sample) in zip(trials, samples, strict=True)
    }
    assert [places[cell] for cell in test.cells()] != [places[trial.cell] for trial in trials]


def test_hits_and_digits():
    trial = Trial(1, 0, "x", 0, 0.0, "12345", {"whole": "12345", "without_global": "1294"})
    assert trial.hit()
    assert not trial.hit("without_global")
    assert (trial.digits(), trial.digits("without_global")) == (1.0, 0.6)


@given(total=st.integers(1, 200), share=st.floats(0, 1))
def test_intervals_hold_the_share_and_shrink(total, share):
    hits = round(total * share)
    low, high = interval(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    wide, narrow = interval(hits, total), interval(hits * 10, total * 10)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_intervals_as_published():
    """Wilson's interval of 38 in 40, and of 40 in 40."""
    assert interval(38, 40) == pytest.approx((0.8350, 0.9862), abs=1e-4)
    assert interval(40, 40) == pytest.approx((0.9124, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="total must be at least 1"):
        interval(0, 0)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_beginnings(one, other):
    count = _shared(one, other)
    assert one[:count] == other[:count]
    assert one[count : count + 1] != other[count : count + 1] or count == len(one) == len(other)


# --- silencing ----------------------------------------------------------------------------------


def hidden(session, ids):
    model = session.model
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=session._cache, use_cache=True).logits


@pytest.mark.parametrize("part", ["global", "temporary"])
def test_a_silenced_half_is_as_if_it_had_never_been(model, part):
    """Nothing of it reaches the next chunk: another text would give the same numbers."""
    chance = random.Random(0)
    session = Session(model)
    session.read([chance.randrange(100) for _ in range(40)])
    fork = session.fork(without=[part])
    assert session.stats().tokens == fork.stats().tokens
    asked = [7, 8, 9]
    assert not torch.equal(hidden(session, asked), hidden(fork, asked))
    layers = fork._cache.layers
    assert all((x.memory.state is None) == (part == "global") for x in layers)
    assert all((not x.memory.entries) == (part == "temporary") for x in layers)
    both = session.fork(without=["global", "temporary"])
    torch.testing.assert_close(hidden(both, asked), hidden(Session(model), asked))
    fork.read([chance.randrange(100) for _ in range(40)])  # and it reads on
    assert fork.stats().tokens == 80


def test_silencing_refusals(model):
    session = Session(model)
    with pytest.raises(ValueError, match="a part must be one of global, temporary, got 'local'"):
        session.fork(without=["local"])
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a chunk is open"):
        cache.without(["global"])
