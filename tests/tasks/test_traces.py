"""Traces: what the next step needs was given out once, where the evidence says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks.traces import NOISE, STEPS, Traces
from tests.tasks.shared import decoded
from tests.tiny import examples, refused


@pytest.mark.parametrize("split", ["train", "test"])
@examples(20)
@given(
    index=st.integers(0, 1000),
    tokens=st.integers(200, 2000),
    noise=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_samples(split, words, index, tokens, noise):
    task = Traces(words, split=split, questions=20, noise=noise)
    sample = task.sample(index, tokens)
    assert sample == Traces(words, split=split, questions=20, noise=noise).sample(index, tokens)
    assert tokens - 120 < len(sample.context) <= tokens
    assert sample.questions
    text = words.decode(sample.context)
    for question in sample.questions:
        (where,) = question.evidence
        value = question.meta["value"]
        assert value in decoded(words, sample, where)
        assert value not in question.text
        assert text.count(value) == 1
        (answer,) = question.answers
        assert task.score(question, answer) == {"exact": 1, "found": 1}
        assert task.score(question, "I do not know.") == {"exact": 0, "found": 0}


def test_every_kind_comes_up(words):
    for split in STEPS:
        task = Traces(words, split=split, questions=50)
        kinds = {question.meta["kind"] for question in task.sample(0, 2000).questions}
        assert kinds == set(STEPS[split])


def test_train_and_test_share_nothing():
    assert not set(STEPS["train"]) & set(STEPS["test"])
    assert not set(NOISE["train"]) & set(NOISE["test"])
    said = [{s for step in STEPS[split].values() for s in (step.text, step.asked, step.next)}
            for split in ("train", "test")]  # fmt: skip
    assert not said[0] & said[1]


def test_bad_input(words):
    with refused("noise must lie in 0 … 1, got 2"):
        make_task("traces", words, noise=2)
    with pytest.raises(ValueError, match=r"tokens must be at least \d+, got 5"):
        make_task("traces", words).sample(0, 5)
