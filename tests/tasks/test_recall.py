"""Recall: what was told of somebody, or a passage, to be said again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks.recall import AGAIN, ASKED, TOLD, Recall
from cometlm.tasks.scoring import words_in_order
from cometlm.train.config import Mixture
from cometlm.train.mixture import MixtureBatches
from tests.tasks.shared import decoded, pattern
from tests.tiny import examples, refused


@pytest.fixture(scope="session")
def varied(tmp_path_factory):
    """Text in which no six words stand twice."""
    path = tmp_path_factory.mktemp("varied") / "varied.txt"
    path.write_text(
        "\n".join(f"Ship {n} left port {n * 7} with {n + 3} letters." for n in range(500))
    )
    return str(path)


@pytest.mark.parametrize("split", ["train", "test"])
@examples(25)
@given(index=st.integers(0, 1000), people=st.integers(1, 4), sentences=st.integers(1, 4))
def test_what_was_said_stands_in_the_text(split, words, prose, index, people, sentences):
    options = {"said": 1.0, "people": people, "sentences": sentences, "corpora": prose}
    task = Recall(words, split=split, **options)
    sample = task.sample(index, 900)
    assert sample == Recall(words, split=split, **options).sample(index, 900)
    assert len(sample.context) == 900
    assert len(sample.questions) == people
    for question in sample.questions:
        (answer,) = question.answers
        told = [decoded(words, sample, where) for where in question.evidence]
        assert answer == " ".join(told)
        assert len(told) == sentences
        (name,) = {match["name"] for one in told for match in [_told(one, split)]}
        assert name in question.text
        assert [w.start for w in question.evidence] == sorted(w.start for w in question.evidence)
        assert question.meta["asked"] == "said"


def _told(sentence, split):
    (found,) = [match for one in TOLD[split] if (match := pattern(one).fullmatch(sentence))]
    return found


@pytest.mark.parametrize("split", ["train", "test"])
@examples(25)
@given(index=st.integers(0, 1000), passage=st.integers(60, 200), opening=st.integers(3, 8))
def test_a_passage_is_read_back(split, words, varied, index, passage, opening):
    options = {"said": 0.0, "passage": passage, "opening": opening, "corpora": varied}
    sample = Recall(words, split=split, **options).sample(index, 700)
    assert len(sample.context) == 700
    assert len(sample.questions) == 2
    text = " ".join(words.decode(sample.context).split())
    for question in sample.questions:
        (answer,) = question.answers
        (where,) = question.evidence
        assert len(where) == passage
        assert answer in " ".join(decoded(words, sample, where).split())
        begins = " ".join(answer.split()[:opening])
        assert begins in question.text
        assert text.count(begins) == 1
        assert str(len(answer.split())) in question.text
        assert len(answer.split()) == question.meta["words"] > opening


def test_answers_are_scored_by_their_words_in_order(words, prose):
    task = make_task("recall", words, said=1.0, sentences=2, corpora=prose)
    question = task.sample(0, 400).questions[0]
    (answer,) = question.answers
    assert task.score(question, answer) == {"exact": 1, "in_order": 1, "f1": 1}
    half = " ".join(answer.split()[: len(answer.split()) // 2])
    assert task.score(question, half)["in_order"] == pytest.approx(0.5, abs=0.1)
    assert task.score(question, "") == {"exact": 0, "in_order": 0, "f1": 0}


@pytest.mark.parametrize(
    ("said", "answer", "share"),
    [
        ("a b c", "a b c", 1),
        ("C, b. A", "a b c", 1 / 3),
        ("a x b y c", "a b c d", 3 / 4),
        ("b a b a", "a b a", 1),
        ("", "a", 0),
        ("a", "", 0),
    ],
)
def test_words_in_order(said, answer, share):
    assert words_in_order(said, [answer, "nothing else"]) == pytest.approx(share)


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), min_size=1))
def test_more_words_never_lose_any(ours, theirs):
    share = words_in_order(" ".join(ours), [" ".join(theirs)])
    assert 0 <= share <= 1
    assert words_in_order(" ".join([*ours, "a"]), [" ".join(theirs)]) >= share
    assert words_in_order(" ".join([*ours, *theirs]), [" ".join(theirs)]) == 1


@pytest.mark.parametrize("ask", ["end", "probes"])
def test_it_is_learned_in_both_ways(words, varied, ask):
    mixture = Mixture(
        tasks={"recall": 1.0},
        options={"recall": {"corpora": varied}},
        steps=1,
        tokens=(200, 200),
        batch_tokens=800,
        ask=ask,
    )
    batches = MixtureBatches(mixture, words, 0)
    batches.check(256)
    name = "probe_labels" if ask == "probes" else "labels"
    assert batches[0][name]


def test_train_and_test_share_nothing():
    for templates in (TOLD, ASKED, AGAIN):
        assert not set(templates["train"]) & set(templates["test"])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("said", 2, "said must lie in 0 … 1"),
        ("people", 17, "people must be one or two numbers in 1 … 16"),
        ("sentences", 9, "sentences must be one or two numbers in 1 … 8"),
        ("passages", 0, "passages must be one or two numbers in 1 … 16"),
        ("passage", 0, "passage must be one or two numbers in 1 … 4096"),
        ("opening", 0, "opening must be one or two numbers in 1 … 4096"),
    ],
)
def test_options_out_of_bounds(words, option, value, said):
    with refused(said):
        make_task("recall", words, **{option: value})


def test_a_text_that_is_too_short(words, varied):
    task = make_task("recall", words, said=0.0, passage=50, corpora=varied)
    with refused("tokens must be at least 50, got 40"):
        task.sample(0, 40)
