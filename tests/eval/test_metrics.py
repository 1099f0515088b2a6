"""Intervals and scores."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.eval.metrics import Z, bootstrap, difference_interval, interval, mean_interval
from cometlm.tasks.scoring import exact, f1

SHARES = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1, max_size=20)


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
    with pytest.raises(ValueError, match="total must be at least 1, got 0"):
        interval(0, 0)


@given(SHARES)
def test_means(texts):
    mean, low, high = mean_interval(texts)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    assert mean_interval(texts) == (mean, low, high)


@given(SHARES)
def test_differences(texts):
    mean, low, high = difference_interval(texts)
    assert -1 <= low <= mean <= high <= 1
    turned = difference_interval([[-value for value in text] for text in texts])
    assert turned == pytest.approx((-mean, -high, -low), abs=1e-9)


def test_means_of_hits_have_wilsons_interval():
    assert mean_interval([[1.0], [0.0], [1.0]]) == (pytest.approx(2 / 3), *interval(2, 3))
    # Of all hits the bootstrap would say 1 … 1; questions about one text are one trial.
    assert mean_interval([[1.0, 1.0], [1.0, 1.0]]) == (1, *interval(2, 2))
    with pytest.raises(ValueError, match="values must be at least 1"):
        mean_interval([])


def test_a_bootstrap_is_that_of_a_normal_distribution_where_there_are_many():
    rng = random.Random(0)
    values = [rng.random() for _ in range(400)]
    low, high = bootstrap([[value] for value in values])
    spread = Z * statistics.stdev(values) / 20
    mean = statistics.fmean(values)
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.004)


def test_questions_about_one_text_say_less_than_those_about_many():
    apart = bootstrap([[i % 2] for i in range(40)])
    together = bootstrap([[i % 2] * 10 for i in range(4)])
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_equal_differences_of_few_texts_leave_room_for_others():
    mean, low, high = difference_interval([[0.0], [0.0]])
    assert mean == 0
    assert high == -low == interval(0, 2)[1]
    assert difference_interval([[1.0]])[1:] == (pytest.approx(1 - interval(0, 1)[1]), 1.0)


def test_one_text_says_nothing_of_a_difference_without_bounds():
    assert difference_interval([[0.3]], math.inf) == (0.3, -math.inf, math.inf)
    mean, low, high = difference_interval([[0.3], [0.5]], math.inf)
    assert (mean, low, high) == pytest.approx((0.4, 0.3, 0.5))


@pytest.mark.parametrize(
    ("said", "answers", "is_exact", "best"),
    [
        ("The Harbour.", ["the harbour"], 1, 1),
        ("harbour", ["the harbour", "a harbour"], 0, 2 / 3),
        ("to the old harbour", ["the new harbour"], 0, 4 / 7),
        ("the the", ["the"], 0, 2 / 3),
        ("", ["x"], 0, 0),
        ("", [""], 1, 1),
        (" 12345\n", ["99999", "12345"], 1, 1),
        ("x", [], 0, 0),
    ],
)
def test_scores(said, answers, is_exact, best):
    assert exact(said, answers) == is_exact
    assert f1(said, answers) == pytest.approx(best)


@given(st.text(), st.text())
def test_scores_are_symmetric_and_bounded(one, other):
    assert f1(one, [other]) == f1(other, [one])
    assert 0 <= exact(one, [other]) <= f1(one, [other]) <= 1
