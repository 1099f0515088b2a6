"""Keys: every value that is asked for is told where it says; some of them score their share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks.keys import ASKED, FORMS, TOLD, Keys
from tests.tasks.shared import decoded
from tests.tiny import examples, refused

forms = st.sampled_from(FORMS)


@pytest.mark.parametrize("split", ["train", "test"])
@examples(25)
@given(
    index=st.integers(0, 1000),
    keys=st.integers(1, 6),
    values=st.integers(1, 3),
    queries=st.integers(1, 3),
    key_form=forms,
    value_form=forms,
)
def test_samples(split, words, prose, index, keys, values, queries, key_form, value_form):
    options = {"keys": (queries, max(keys, queries)), "values": values, "queries": queries}
    options |= {"key_form": key_form, "value_form": value_form, "corpora": prose}
    task = Keys(words, split=split, **options)
    sample = task.sample(index, 1200)
    assert sample == Keys(words, split=split, **options).sample(index, 1200)
    assert len(sample.context) == 1200
    (question,) = sample.questions
    parts = question.answers[0].split(", ")
    assert len(set(parts)) == len(parts) == len(question.evidence) == queries * values
    sentences = [decoded(words, sample, where) for where in question.evidence]
    assert all(part in sentence for part, sentence in zip(parts, sentences, strict=True))
    text = words.decode(sample.context)
    assert all(text.count(part) == 1 for part in parts)
    assert task.score(question, question.answers[0]) == {"exact": 1, "found": 1}
    backwards = ", ".join(reversed(parts))
    assert task.score(question, f"{backwards}.")["found"] == 1
    assert task.score(question, parts[0])["found"] == pytest.approx(1 / len(parts))
    assert task.score(question, "")["found"] == 0


def test_values_are_listed_in_the_order_of_the_text(words, prose):
    question = Keys(words, values=4, corpora=prose).sample(0, 800).questions[0]
    starts = [where.start for where in question.evidence]
    assert starts == sorted(starts)


def test_what_does_not_fit_is_not_told(words, prose):
    task = Keys(words, keys=(1, 100), corpora=prose)
    assert max(task.sample(index, 200).meta["keys"] for index in range(10)) < 20
    with pytest.raises(ValueError, match=r"tokens must be at least \d+, got 5"):
        task.sample(0, 5)


def test_train_and_test_share_nothing():
    for templates in (TOLD, ASKED):
        assert not set(templates["train"]) & set(templates["test"])


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("keys", 0, "1 … 256"),
        ("values", 17, "1 … 16"),
        ("queries", 5, "5 … 256, in order, got 4"),
        ("key_form", "emoji", "words, numbers, uuids"),
        ("value_form", 3, "words, numbers, uuids"),
    ],
)
def test_options_out_of_bounds(words, option, value, bound):
    with refused(bound):
        make_task("keys", words, **{option: value})
