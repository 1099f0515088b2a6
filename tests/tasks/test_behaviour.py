"""Behaviour: answers are computed again from the text that is told, and the log alone says them."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks import make_task
from cometlm.tasks.behaviour import Behaviour
from cometlm.tasks.names import PEOPLE
from cometlm.tasks.shop import ASKED, LINES
from tests.tasks.shared import decoded
from tests.tiny import examples, refused

KINDS = ("first", "last", "count", "favourite", "returned", "instead")
BUY = {
    "train": re.compile(r"\d\d:\d\d (\w+) bought the (.+) for \d+ pounds"),
    "test": re.compile(r"customer (\w+): purchase, (.+), \d+\.00 EUR"),
}


def purchases(text, split):
    """Who bought what, in order, read off the text."""
    return BUY[split].findall(text)


def asked_of(question, people):
    (who,) = (name for name in people if f" {name}" in question.text)
    return who


@pytest.mark.parametrize("split", ["train", "test"])
@examples(20)
@given(index=st.integers(0, 1000), tokens=st.integers(1000, 2500), customers=st.integers(1, 5))
def test_samples(split, words, index, tokens, customers):
    task = Behaviour(words, split=split, customers=customers, questions=20)
    sample = task.sample(index, tokens)
    assert sample == Behaviour(words, split=split, customers=customers, questions=20).sample(
        index, tokens
    )
    assert tokens - 60 < len(sample.context) <= tokens
    text = words.decode(sample.context)
    assert text.count("\n") == sample.meta["events"]
    bought = purchases(text, split)
    by_who = {}
    for who, item in bought:
        by_who.setdefault(who, []).append(item)
    for question in sample.questions:
        kind = question.meta["kind"]
        lines = [decoded(words, sample, where) for where in question.evidence]
        assert lines
        if kind in ("first", "last", "count", "favourite"):
            own = by_who[asked_of(question, by_who)]
            things = Counter(item.partition(" ")[2] for item in own).most_common()
            wanted = {
                "first": own[0],
                "last": own[-1],
                "count": str(len(own)),
                "favourite": things[0][0],
            }
            assert wanted[kind] in question.answers
            if kind == "favourite":
                assert len(things) == 1 or things[0][1] > things[1][1]
        else:
            assert question.answers[1] in lines[-1]
        assert task.score(question, f"It was {question.answers[0]}.")["found"] == 1
        assert task.score(question, question.answers[0])["exact"] == 1


def test_what_was_taken_instead_follows_what_was_removed(words):
    task = Behaviour(words, kinds="instead", customers=1)
    question = task.sample(0, 3000).questions[0]
    removed, bought = (decoded(words, task.sample(0, 3000), where) for where in question.evidence)
    assert "cart remove" in removed
    assert "purchase" in bought
    assert question.answers[1] in bought


def test_each_question_is_of_another_customer_or_kind(words):
    questions = Behaviour(words, questions=72).sample(0, 3000).questions
    asked = [(asked_of(question, PEOPLE["test"]), question.meta["kind"]) for question in questions]
    assert len(set(asked)) == len(asked) > 10


def test_kinds_are_those_wanted(words):
    task = Behaviour(words, kinds=("count", "returned"), questions=10)
    kinds = {q.meta["kind"] for index in range(5) for q in task.sample(index, 2000).questions}
    assert kinds == {"count", "returned"}


def test_train_and_test_share_no_sentence():
    for said in (LINES, ASKED):
        train, test = (set(map(str, said[split].values())) for split in ("train", "test"))
        assert not train & test
    assert set(ASKED["train"]) == set(ASKED["test"]) == set(KINDS)


def test_bad_input(words):
    with refused("kinds must be of first, last, count, favourite, returned, instead, got 'most'"):
        make_task("behaviour", words, kinds="most")
    with refused("data must be one of shop, purchases, ratings, clicks, got 'novels'"):
        make_task("behaviour", words, data="novels")
    with refused("folder must come with a log that was kept, got here for shop"):
        make_task("behaviour", words, folder="here")
    with refused("customers must be one or two numbers in 1 … 12"):
        make_task("behaviour", words, customers=13)
    with pytest.raises(ValueError, match=r"tokens must be at least \d+, got 5"):
        make_task("behaviour", words).sample(0, 5)
