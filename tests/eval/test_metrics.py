"""Intervals and scores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.eval.metrics import interval, mean_interval
from cometlm.tasks.scoring import exact, f1

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=50)


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
def test_means(values):
    mean, low, high = mean_interval(values)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1


def test_means_of_hits_have_wilsons_interval():
    assert mean_interval([1.0, 0.0, 1.0]) == (pytest.approx(2 / 3), *interval(2, 3))
    with pytest.raises(ValueError, match="values must be at least 1"):
        mean_interval([])


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
