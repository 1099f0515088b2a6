"""Axes and places of charts."""

import math

from hypothesis import given
from hypothesis import strategies as st

from cometlm.eval.charts import (
    HEIGHT,
    WIDTH,
    Chart,
    Point,
    Series,
    bytes_axis,
    length_axis,
    log_axis,
    value_axis,
)

POSITIVE = st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=9)


@given(POSITIVE)
def test_axes_hold_their_values(values):
    axes = [
        length_axis("x", values), bytes_axis("x", values), value_axis("x", values),
        log_axis("x", values, str),
    ]  # fmt: skip
    for axis in axes:
        assert axis.low <= min(values) * (1 + 1e-9)
        assert axis.high >= max(values) * (1 - 1e-9)
        shares = [axis.share(value) for value in sorted(values)]
        assert shares == sorted(shares)
        assert all(axis.low <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks)


def test_ticks_are_round():
    ticks = bytes_axis("x", [3 * 2**20, 90 * 2**20]).ticks
    assert [math.log2(tick) % 1 for tick in ticks] == [0] * len(ticks)
    assert value_axis("x", [2.2, 3.4]).ticks == [2.0, 2.5, 3.0, 3.5]


def test_nothing_stands_where_a_logarithmic_axis_says_nothing():
    axis = bytes_axis("x", [0, 9 << 20, 40 << 20])
    assert axis.share(0) == axis.share(axis.ticks[0]) == 0
    assert [axis.readable(tick) for tick in axis.ticks] == [
        "0 B", "8 MiB", "16 MiB", "32 MiB", "64 MiB"
    ]  # fmt: skip
    assert axis.share(9 << 20) > axis.share(8 << 20) > 0
    nothing = bytes_axis("x", [0, 0])
    assert nothing.readable(nothing.ticks[0]) == "0 B"
    assert bytes_axis("x", [9 << 20, 40 << 20]).readable(8 << 20) == "8 MiB"


@given(POSITIVE)
def test_everything_is_in_the_picture(values):
    series = Series("a", 9, [Point(value, 0.5) for value in values])
    axis = length_axis("x", values)
    chart = Chart("t", [series], axis, value_axis("y", [0.5]))
    for point in series.points:
        assert 0 < chart.left(point.x, series) < WIDTH
        assert 0 < chart.top(point.y) < HEIGHT


def test_points_of_two_methods_do_not_hide_each_other():
    ours, theirs = (Series(name, i, [Point(10, 0.5)]) for i, name in enumerate("ab"))
    chart = Chart("t", [ours, theirs], length_axis("x", [10, 20]), value_axis("y", [0.5]))
    assert chart.left(10, theirs) - chart.left(10, ours) >= 2
    assert ours.marker != theirs.marker
    assert "a, b" in chart.said
