"""The passkey benchmark: what is hidden, what is forked."""

import pytest

import passkey
from cometlm.session.session import Session
from cometlm.tasks.passkey import Passkey
from passkey import DECILES, Trial, sample_of, trials_of
from tests.real import tiny_comet, tokenizer

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


@pytest.fixture(scope="module")
def model():
    return tiny_comet().float()


@pytest.fixture
def task(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 60)
    (tmp_path / "b.txt").write_text(PROSE[::-1] * 60)
    names = [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    return Passkey(tokenizer("smollm2"), corpora=names, samples_per_text=DECILES)


def test_a_forked_trial_is_the_trial_read_whole(task, model, monkeypatch):
    """Reading what stands before a number only once changes no answer."""
    stats = []
    ask = passkey.said

    def note(session, question, without=()):
        if not without:
            stats.append(session.stats())
        return ask(session, question, without)

    monkeypatch.setattr(passkey, "said", note)
    trials = list(trials_of(model, task, 150, 1, range(DECILES), jitter=30))
    assert sorted(trial.decile for trial in trials) == list(range(DECILES))
    assert all(trial.decile / 10 <= trial.depth < (trial.decile + 1) / 10 for trial in trials)
    lengths = set()
    for trial, found in zip(trials, stats, strict=True):
        sample = sample_of(task, 150, 1, trial.decile, jitter=30)
        whole = Session(model, task.tokenizer)
        whole.read(sample.context)
        assert whole.stats() == found
        assert ask(whole, sample.questions[0]) == trial.answers["whole"]
        assert trial.key in task.tokenizer.decode(sample.context)
        assert trial.haystack.endswith("b.txt")
        lengths.add(len(sample.context))
        assert 120 <= len(sample.context) <= 150
    assert len(lengths) > 3


def test_hits_and_digits():
    trial = Trial(1, 0, "x", 0, 0.0, "12345", {"whole": "12345", "without_global": "1294"})
    assert trial.hit()
    assert not trial.hit("without_global")
    assert (trial.digits(), trial.digits("without_global")) == (1.0, 0.6)
