"""Passages: what is packed stands whole, once, and where it is said to stand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.tasks.passages import pack
from tests.tiny import examples

LENGTHS = st.lists(st.integers(1, 9), max_size=12)


@examples(100)
@given(wanted=LENGTHS, others=LENGTHS, room=st.integers(0, 40), misses=st.integers(0, 3))
def test_pack(wanted, others, room, misses):
    made = [[number] * length for number, length in enumerate([*wanted, *others])]
    tokens = sum(wanted) + room
    told, rest = made[: len(wanted)], made[len(wanted) :]
    context, places, count = pack(random.Random(0), told, iter(rest), tokens, misses)
    assert len(context) <= tokens
    assert [context[place.start : place.stop] for place in places] == told
    assert all(context.count(ids[0]) in (0, len(ids)) for ids in made)
    assert len(set(context)) == count
    if count < len(made):  # it is full, but for what may be passed over
        assert tokens - len(context) < max(others)


def test_those_that_are_too_long_are_passed_over():
    others = [[1] * 9, [2] * 9, [3]]
    assert pack(random.Random(0), [[0]], others, 3)[2] == 1
    assert pack(random.Random(0), [[0]], others, 3, misses=2)[2] == 2


def test_what_is_wanted_must_fit():
    with pytest.raises(ValueError, match="tokens must be at least 3, got 2"):
        pack(random.Random(0), [[0, 0], [1]], [], 2)
