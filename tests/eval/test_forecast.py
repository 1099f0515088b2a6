"""Laws of what texts take, and what they foresee."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometlm.eval.forecast import Reading, foresee, law, questions_of, readings_of
from cometlm.eval.runner import Answer
from cometlm.methods.base import Bounds

LENGTHS = [500, 1500, 4000]
FACTORS = st.floats(1e-4, 1e-2)


@given(a=st.floats(0, 5), b=FACTORS)
def test_a_linear_law_is_found(a, b):
    found = law([(n, a + b * n) for n in LENGTHS], is_quadratic=False)
    assert found(128_000) == pytest.approx(a + b * 128_000, rel=0.1)


@given(b=FACTORS, c=st.floats(1e-7, 1e-5))
def test_a_quadratic_law_is_found(b, c):
    points = [(n, b * n + c * n * n) for n in LENGTHS]
    assert law(points, True)(32_000) == pytest.approx(b * 32_000 + c * 32_000**2, rel=0.3)


@given(st.lists(st.tuples(st.integers(1, 10**5), st.floats(0, 1e4)), min_size=1, max_size=9))
def test_laws_neither_shrink_nor_go_below_nothing(points):
    found = law(points, is_quadratic=True)
    values = [found(n) for n in (1, 10, 1000, 10**6)]
    assert values == sorted(values)
    assert values[0] >= 0


def test_noise_of_a_constant_memory_is_no_square():
    """5% in short readings would be hours at a million tokens, if they could be a square's."""
    points = [(500, 0.5), (1500, 1.575)]
    assert law(points, False)(10**6) < 1100
    assert law(points, True)(10**6) > 10_000


def test_of_one_length_it_is_in_proportion():
    assert law([(100, 1.0), (100, 3.0)], True)(1000) == pytest.approx(15, rel=0.4)


def reading(tokens, seconds, nbytes, task="a", questions=2, peak=None):
    peak = None if peak is None else peak + nbytes
    return Reading(task, tokens, questions, seconds, 0.5 * questions, nbytes, peak)


def test_of_lengths_much_alike_it_is_in_proportion():
    """Of texts of 4,000 tokens, more or less, 32,000 were foreseen to take what these took."""
    lengths = [3869, 3913, 3993, 3998, 4000]
    readings = [
        reading(n, 160 - 5 * (i % 2), 1000 + i, questions=0, peak=0) for i, n in enumerate(lengths)
    ]
    found = foresee(readings, "a", 32_000, 0)
    assert found.seconds == pytest.approx(8 * 160, rel=0.1)
    assert found.nbytes == pytest.approx(8 * 1004, rel=0.1)


def test_bytes_follow_what_is_held():
    growing = [reading(n, n / 1000, 100 * n, peak=10_000) for n in (100, 200)]
    found = foresee(growing, "a", 1000, 2)
    assert found.nbytes == 10_000 + 100 * 1000
    assert found.lengths == [100, 200]
    assert found.seconds == pytest.approx(1.0 + 2 * 0.5, rel=0.01)
    constant = [reading(n, n / 1000, 5000, peak=10_000) for n in (100, 200)]
    assert foresee(constant, "a", 10**6, 1).nbytes == 15_000


def test_answers_of_another_task_take_what_they_took():
    readings = [reading(100, 0.1, 10), reading(200, 0.2, 10)]
    readings.append(Reading("b", 200, 1, 0.2, 9.0, 10, None))
    assert foresee(readings, "b", 200, 1).seconds == pytest.approx(9.2, rel=0.2)
    assert foresee(readings, "a", 200, 2).seconds == pytest.approx(1.2, rel=0.05)
    assert foresee(readings, "a", 200, 1).nbytes is None
    assert (questions_of(readings, "a"), questions_of(readings, "c")) == (2, None)


def test_answers_take_what_they_read():
    """Nothing of a text beyond the tokens that are kept, or that have room in a prompt."""

    def took(tokens):
        read = min(tokens, 2000)
        return Reading("a", tokens, 2, 1e-6 * tokens, read / 1000, 100 * read, 9000 + 100 * read)

    short = [took(500), took(1500)]
    for readings in (short, [*short, took(4000)], [took(4000)], [took(4000), took(9000)]):
        found = foresee(readings, "a", 128_000, 2, bounds=Bounds(asked=2000, held=2000))
        assert found.seconds == pytest.approx(0.128 + 2.0, rel=0.02)
        assert found.nbytes == 9000 + 100 * 2000
    unbounded = foresee(short, "a", 128_000, 2)
    assert unbounded.seconds > 100
    assert unbounded.nbytes == 9000 + 100 * 128_000
    within = foresee(short, "a", 1800, 2, bounds=Bounds(asked=2000, held=2000))
    assert within.seconds == pytest.approx(1.8, rel=0.02)


@pytest.mark.parametrize("overlap", [0, 250])
def test_a_chunk_is_run_when_more_follows(overlap):
    """Reading runs those that are full, an answer the rest; before that, nothing is held."""

    def took(tokens, questions=1):
        full = max(0, (tokens - overlap - 1) // 1000)
        answers = questions * (0.1 + (tokens - 1000 * full) / 1000)
        held = 300 * bool(full)
        return Reading("a", tokens, questions, full or 1e-5, answers, held, 600 + held)

    bounds = Bounds(held=1001 + overlap, chunk=1000, overlap=overlap)
    for readings in ([took(500), took(1900)], [took(700, 2), took(1200), took(3500, 2)]):
        for tokens in (700, 1900, 50_400, 128_200):
            found = foresee(readings, "a", tokens, 2, bounds=bounds)
            assert found.seconds == pytest.approx(took(tokens, 2).seconds, rel=0.15)
        assert found.nbytes == 900
    short = foresee([took(300), took(900)], "a", 20_500, 1, bounds=bounds)
    assert short.seconds == pytest.approx(took(20_500).seconds, rel=0.2)


@given(full=st.integers(2000, 10_000), each=st.floats(1e-9, 1e-3))
def test_behind_a_full_window_reading_goes_straight_on(full, each):
    """A token looks at those that are held."""

    def took(tokens):
        read = min(tokens, full)
        looked = read * read / 2 + (tokens - read) * read
        seconds = 1e-3 * tokens + each * looked
        return Reading("a", tokens, 0, seconds, 0.0, 100 * read, None)

    found = foresee([took(500), took(1500)], "a", 128_000, 0, bounds=Bounds(held=full))
    assert found.seconds == pytest.approx(took(128_000).read_seconds, rel=0.1)


def test_texts_that_are_only_foreseen_say_nothing_of_others():
    readings = readings_of("continue", [Answer(9, 0, 0, "", [], scores={"nats": 1.0})])
    assert readings[0].task == ""
    assert foresee(readings, "a", 100, 1).seconds is None
    assert foresee(readings, "", 100, 0).seconds is not None


def test_seconds_are_of_the_usual_text_and_bytes_of_the_longest():
    growing = [reading(n, n / 1000, 100 * n, peak=10_000) for n in (100, 200)]
    found = foresee(growing, "a", 1000, 2, usual=400.0)
    assert found.tokens == 1000
    assert found.nbytes == 10_000 + 100 * 1000
    assert found.seconds == pytest.approx(0.4 + 2 * 0.5, rel=0.01)


def test_readings_have_the_length_of_their_text():
    short = Answer(1000, 0, 0, "?", ["x"], scores={"exact": 0.0}, read=40, digest="a")
    older = Answer(1000, 1, 0, "?", ["x"], scores={"exact": 0.0})
    assert [one.tokens for one in readings_of("a", [short, older])] == [40, 1000]


def test_an_open_chunk_does_not_grow_with_the_text():
    def held(tokens, opened):
        return Answer(
            tokens, 0, 0, "?", ["x"], nbytes=500 + opened, open_nbytes=opened, peak_bytes=90_000,
            read_seconds=tokens / 1000,
        )  # fmt: skip

    readings = readings_of("a", [held(512, 5000)]) + readings_of("a", [held(1000, 10_000)])
    assert foresee(readings, "a", 10**6, 1).nbytes == 90_000
    assert foresee(readings, "a", 10**6, 0).seconds == pytest.approx(1000, rel=0.01)


def test_questions_about_one_text_are_one_reading():
    def answer(index, number, read, error=""):
        return Answer(
            50, index, number, "?", ["x"], nbytes=7, read_seconds=read, answer_seconds=1.0,
            peak_bytes=number, scores={"exact": 0.0}, error=error,
        )  # fmt: skip

    answers = [answer(0, 0, 2.0), answer(0, 1, 3.0), answer(1, 0, 2.0), answer(2, 0, 1.0, "long")]
    first, second = readings_of("a", answers)
    assert (first.questions, first.seconds, first.peak_bytes) == (2, 3.0 + 2.0, 1)
    assert second.seconds == 3.0
