"""The simulated training step: closed forms where there are some, and the order of things."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.planner.simulate import WAYS, Costs, Job, Link, simulate
from tests.tiny import examples

COSTS = Costs(forward=1.0, backward=2.0, memory_bytes=8.0, hidden_bytes=4.0, kept_bytes=50.0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("ranks", "block", "layers"), [(1, 3, 5), (2, 1, 30), (4, 2, 6), (16, 4, 36)]
)
def test_closed_forms_without_transfer(ranks, block, layers, recompute):
    """SPEC §6: P·L units for the naive split, L + P − 1 for the wave; a unit is a block's layer."""
    job = Job(chunks=ranks * block, layers=layers, devices=ranks, recompute=recompute)
    unit = block * (3 + recompute)
    wave, naive = (simulate(name, job, COSTS) for name in ("wave", "naive"))
    assert wave.seconds == pytest.approx(unit * (layers + ranks - 1))
    assert naive.seconds == pytest.approx(unit * layers * ranks)
    assert wave.bubble == pytest.approx(1 - layers / (layers + ranks - 1))
    assert naive.bubble == pytest.approx(1 - 1 / ranks)


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 3), (2, 7), (4, 8)])
def test_closed_form_of_layers_split_between_devices(ranks, chunks):
    job = Job(chunks=chunks, layers=3 * ranks, devices=ranks, recompute=False)
    got = simulate("layers", job, COSTS)
    assert got.seconds == pytest.approx(3 * 3 * (chunks + ranks - 1))


def test_what_travels():
    job = Job(chunks=6, layers=5, devices=3)
    for name, bytes_ in (
        ("wave", 2 * 5 * 2 * 8),
        ("naive", 2 * 5 * 2 * 8),
        ("layers", 2 * 6 * 2 * 4),
    ):
        assert simulate(name, job, COSTS).sent == bytes_


def test_a_slow_link_is_hidden_behind_the_next_layer_until_it_is_too_slow():
    job = Job(chunks=8, layers=20, devices=2)
    free = simulate("wave", job, COSTS).seconds
    fast = simulate("wave", job, COSTS, Link(bandwidth=8.0, latency=0.5)).seconds
    slow = simulate("wave", job, COSTS, Link(bandwidth=1.0)).seconds
    assert free < fast < free + 2 * 2.01  # one message and its latency each way, and no more
    assert slow > free + 20 * 4  # 8 seconds a message, where the work of a layer takes 4


def test_peak_memory():
    job = Job(chunks=8, layers=6, devices=4)
    costs = Costs(1, 2, memory_bytes=8, hidden_bytes=4, kept_bytes=50, weight_bytes=1000)
    assert simulate("wave", job, costs).peak == 6 * (1000 + 2 * 12) + 50
    assert simulate("layers", job, costs).peak == 2 * (1000 + 8 * 12) + 50
    plain = Job(chunks=8, layers=6, devices=4, recompute=False)
    assert simulate("wave", plain, costs).peak == 6 * (1000 + 2 * 50)


@examples(40)
@given(
    st.sampled_from(sorted(WAYS)),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 5),
    st.booleans(),
    st.floats(0, 3),
)
def test_nothing_begins_before_what_it_needs(name, chunks, layers, devices, recompute, latency):
    job = Job(chunks, layers, devices, recompute)
    got = simulate(name, job, COSTS, Link(bandwidth=10.0, latency=latency))
    spans = {span.key: span for span in got.spans}
    tasks = {task.key: task for task in WAYS[name](job, COSTS)}
    assert spans.keys() == tasks.keys()
    assert len(spans) == 2 * chunks * layers + chunks
    for key, task in tasks.items():
        for needed, size in task.needs:
            other = spans[needed]
            wait = 0.0 if other.device == task.device else size / 10.0 + latency
            assert spans[key].start >= other.end + wait - 1e-9
    for device in range(devices):
        own = sorted((s for s in got.spans if s.device == device), key=lambda s: s.start)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(own))
    assert 0 <= got.bubble < 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Job(0, 1, 1), "chunks must be at least 1, got 0"),
        (lambda: Costs(0, 1), "forward must be more than 0 seconds"),
        (lambda: Costs(1, -1), "backward must be at least 0, got -1"),
        (lambda: Link(bandwidth=0), "bandwidth must be more than 0 bytes/s, got 0"),
        (lambda: Link(latency=-1), "latency must be at least 0 seconds, got -1"),
        (lambda: simulate("ring", Job(1, 1, 1), COSTS), "one of wave, naive, layers, got 'ring'"),
    ],
)
def test_impossible_numbers(make, said):
    with pytest.raises(ValueError, match=said):
        make()
