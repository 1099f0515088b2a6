"""Passkeys: exact lengths, numbers where they belong, and nothing of the training in the test."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks.base import turn_ids
from cometlm.tasks.passkey import TEMPLATES, Passkey
from cometlm.tasks.story import CORPORA_OF
from tests.real import tokenizer
from tests.tiny import refused

PROSE = "The ship left the harbour in the rain. It carried salt, iron and two hundred letters.\n"


@pytest.fixture(scope="module")
def words():
    return tokenizer("smollm2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two corpora."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(PROSE * 100)
    (folder / "b.txt").write_text("Ein Fluß, ein Café. " * 100)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("split", ["train", "test"])
@given(
    tokens=st.integers(200, 600),
    index=st.integers(0, 1000),
    keys=st.integers(1, 3),
    questions=st.integers(1, 3),
)
def test_samples(split, words, texts, tokens, index, keys, questions):
    options = {"digits": (4, 6), "keys": (1, keys), "questions": questions, "corpora": texts}
    task = Passkey(words, split=split, **options)
    sample = task.sample(index, tokens)
    assert sample == Passkey(words, split=split, **options).sample(index, tokens)
    assert sample != task.sample(index + 1, tokens)
    assert len(sample.context) == tokens
    assert 1 <= len(sample.questions) <= questions
    assert sample.meta["haystack"] == texts[index % 2]
    assert sample.meta["decile"] == min(9, int(sample.meta["depth"] * 10))
    for question in sample.questions:
        (key,), (where,) = question.answers, question.evidence
        assert 4 <= len(key) <= 6
        assert key in words.decode(sample.context[where.start : where.stop])
        assert key not in question.text
        assert "{" not in question.text
        assert question.after is None
        asked, answer = turn_ids(words, question.text, key)
        assert words.decode(asked).endswith("<|im_start|>assistant\n")
        assert words.decode(answer) == key + "<|im_end|>"


@given(depth=st.floats(0, 1), index=st.integers(0, 100))
def test_a_number_stands_where_its_depth_says(words, texts, depth, index):
    sample = Passkey(words, depth=depth, corpora=texts[0]).sample(index, 700)
    (where,) = sample.questions[0].evidence
    assert sample.meta["depth"] == depth
    assert where.start / 700 == pytest.approx(depth, abs=0.06)


def test_samples_of_one_text_hide_their_numbers_in_its_parts(words, texts):
    task = Passkey(words, corpora=texts, samples_per_text=10)
    samples = [task.sample(index, 500) for index in range(20)]
    assert [sample.meta["decile"] for sample in samples] == [*range(10), *range(10)]
    assert [sample.meta["haystack"] for sample in samples] == [texts[0]] * 10 + [texts[1]] * 10
    first, last = samples[0], samples[9]
    begin, stop = (s.questions[0].evidence[0] for s in (first, last))
    shared = stop.start - len(begin)  # of the text before the second number
    after = first.context[begin.stop : begin.stop + shared - begin.start]
    assert last.context[: begin.start] == first.context[: begin.start]
    assert last.context[begin.start : shared] == after


def test_train_and_test_share_nothing():
    for name in ("hidden", "asked", "owners", "whats"):
        ours, theirs = (getattr(TEMPLATES[split], name) for split in ("train", "test"))
        assert not set(ours) & set(theirs)
        assert len(set(ours)) == len(ours)
    assert not set(CORPORA_OF["train"]) & set(CORPORA_OF["test"])
    train = TEMPLATES["train"]
    said = " ".join(itertools.chain(train.hidden, train.asked, train.whats)).lower()
    for new in ("magic", "pin", "combination", "wall", "door", "hidden in"):
        assert new not in said


def test_every_template_says_the_number_and_every_owner_can_be_asked_for():
    for templates in TEMPLATES.values():
        assert all("{key}" in sentence for sentence in templates.hidden)
        for sentences in (templates.hidden, templates.asked):
            assert {"{owner}" in sentence for sentence in sentences} == {True, False}


def test_score(words):
    task = Passkey(words)
    question = Passkey(words, corpora=__file__).sample(0, 300).questions[0]
    key = question.answers[0]
    wrong = key[:-1] + str((int(key[-1]) + 1) % 10)
    for said, exact, found, digits in (
        (f" {key}.\n", 1, 1, 1),
        (f"The number is {key}.", 0, 1, 1),
        (wrong, 0, 0, 0.8),
        (f"{key} or {wrong}", 0, 0, 1),
        (key + "0", 0, 0, 1),
        ("", 0, 0, 0),
    ):
        want = {"exact": exact, "found": found, "digits": digits}
        assert task.score(question, said) == want, said


def test_too_few_tokens_say_how_many_are_needed(words, texts):
    task = Passkey(words, corpora=texts)
    with pytest.raises(ValueError, match=r"tokens must be at least (\d+), got 3") as caught:
        task.sample(0, 3)
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert len(task.sample(0, least).context) == least


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("digits", 0, "1 … 100"),
        ("keys", [3, 2], "in order"),
        ("questions", 0, "at least 1"),
        ("samples_per_text", 0, "at least 1"),
        ("depth", 1.5, "0 … 1"),
    ],
)
def test_options_out_of_bounds(words, option, value, bound):
    with pytest.raises(ValueError, match=rf"{option} .*{bound}.*got"):
        make_task("passkey", words, **{option: value})


def test_unknown_tasks_and_options(words):
    with refused("unknown task 'riddle'; there are passkey, facts"):
        make_task("riddle", words)
    with refused("did you mean passkey?"):
        make_task("pass-key", words)
    with refused("got colour"):
        make_task("passkey", words, colour="red")
    with refused("split must be one of train, test, got 'dev'"):
        make_task("passkey", words, split="dev")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("digits", "x"),
        ("digits", [1, 2, 3]),
        ("keys", True),
        ("keys", 1.5),
        ("depth", "deep"),
        ("questions", 2.5),
        ("samples_per_text", "2"),
    ],
)
def test_values_of_another_type_are_named(words, option, value):
    """They come from a command line or a file."""
    with pytest.raises(ValueError, match=rf"^{option} must .* got {re.escape(repr(value))}$"):
        make_task("passkey", words, **{option: value})
