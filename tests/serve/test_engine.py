"""The engine: jobs by turns, hang-ups, errors, limits and the end."""

import threading

import pytest

from cometlm.serve.engine import BusyError, Engine, StoppedError
from cometlm.session.writer import Sampling, Writer
from tests.sessions import TEXT, model_of, session_of
from tests.tiny import refused


@pytest.fixture
def engine():
    made = Engine(model_of("llama"), most_running=4, most_waiting=8)
    yield made
    made.stop()


class Watched:
    """A job whose steps are written down."""

    def __init__(self, engine, steps, name, log, owner="", hold=None):
        self.name, self.log, self.steps, self.hold = name, log, steps, hold
        self.begun = threading.Event()
        self.ended, self.error, self.closed = threading.Event(), None, threading.Event()
        self.job = engine.submit(self._work(), owner, self._done)

    def _work(self):
        try:
            self.begun.set()
            for _ in range(self.steps):
                if self.hold is not None:
                    self.hold.wait(10)
                self.log.append(self.name)
                yield ()
        finally:
            self.closed.set()

    def _done(self, error):
        self.error = error
        self.ended.set()


def test_readers_take_turns_by_owner(engine):
    log, gate = [], threading.Event()
    first = Watched(engine, 1, "gate", log, hold=gate)  # the others queue up behind it
    assert first.begun.wait(10)
    jobs = [Watched(engine, 4, name, log, owner=name[0]) for name in ("a1", "a2", "b1")]
    gate.set()
    for job in [first, *jobs]:
        assert job.ended.wait(10)
        assert job.error is None
    beginning = [name for name in log if name != "gate"][:8]
    assert beginning.count("b1") == 4  # half of the steps, though a has two jobs
    assert beginning.count("a1") == beginning.count("a2") == 2


def test_a_long_read_does_not_starve_writing(engine):
    """Two tokens are written for each chunk read, by two answers."""
    log, wrote, gate = [], [], threading.Event()
    session = session_of()
    session.read(TEXT[:50])

    def write(count):
        cache, logits = session.begin_answer()
        gate.wait(10)
        writer = Writer(cache, logits, Sampling(0), most=count)
        writer.take()
        while writer.finish is None:
            yield [writer]
            writer.take()
            log.append("token")
        wrote.append(writer.ids)

    ended = [threading.Event() for _ in range(2)]
    for event in ended:
        engine.submit(write(10), "", lambda error, event=event: event.set())
    reader = Watched(engine, 200, "chunk", log, hold=gate)
    gate.set()
    assert all(event.wait(30) for event in ended)
    assert wrote == [session.continuation(10)] * 2
    during = log[log.index("token") :][: log.count("token")]
    assert during.count("chunk") <= during.count("token") / 2 + 2
    assert "chunk" in during
    reader.job.cancel()


def test_who_hangs_up_frees_the_place(engine):
    log = []
    held = [Watched(engine, 10**9, i, log) for i in range(4)]
    waiting = Watched(engine, 1, "waiting", log)
    assert not waiting.ended.wait(0.1)
    held[2].job.cancel()
    assert waiting.ended.wait(10)
    assert held[2].closed.wait(10)
    assert not held[2].ended.is_set()  # nobody is told
    for job in held:
        job.job.cancel()
    assert all(job.closed.wait(10) for job in held)
    assert engine.load.running == 0


def test_too_many_are_refused():
    engine = Engine(model_of("llama"), most_waiting=3)
    log, gate = [], threading.Event()
    jobs = [Watched(engine, 1, 0, log, hold=gate)]
    assert jobs[0].begun.wait(10)
    jobs += [Watched(engine, 1, i, log) for i in range(3)]
    with pytest.raises(BusyError) as caught:
        Watched(engine, 1, "more", log)
    assert caught.value.retry_after == 5
    jobs[1].job.cancel()  # a place in the queue
    jobs.append(Watched(engine, 1, "more", log))
    gate.set()
    assert jobs[-1].ended.wait(10)
    engine.stop()


def test_a_full_queue_keeps_nobody_else_out():
    """Each owner has a share of it; who took all of it gets no more."""
    engine = Engine(model_of("llama"), most_running=1, most_waiting=6)
    log, gate = [], threading.Event()
    jobs = [Watched(engine, 1, "gate", log, hold=gate)]
    assert jobs[0].begun.wait(10)

    def taken(owner):
        try:
            jobs.append(Watched(engine, 1, owner, log, owner=owner))
        except BusyError:
            return False
        return True

    assert [taken("a") for _ in range(7)] == [True] * 6 + [False]
    assert [taken("b") for _ in range(4)] == [True] * 3 + [False]  # half of 6
    assert [taken("c") for _ in range(3)] == [True] * 2 + [False]  # a third
    assert not taken("a")
    assert engine.load.waiting == 11 <= 6 * (1 + 1 / 2 + 1 / 3)
    gate.set()
    assert all(job.ended.wait(10) for job in jobs)
    engine.stop()


def test_places_are_given_by_turns():
    """Who came with ten requests first has no more places than who came with one then."""
    engine = Engine(model_of("llama"), most_running=2, most_waiting=20)
    log, gate = [], threading.Event()
    first = Watched(engine, 1, "gate", log, hold=gate)
    assert first.begun.wait(10)  # the engine's thread stands still
    jobs = [Watched(engine, 10, name, log, owner=name[0]) for name in ("a1", "a2", "a3", "b1")]
    gate.set()
    for job in [first, *jobs]:
        assert job.ended.wait(10)
    # Two places: one of a's and b's, which read by turns, and only then the others of a's.
    assert [name for name in log if name != "gate"][:20].count("b1") == 10
    engine.stop()


def test_an_error_ends_its_job_alone(engine):
    def fails():
        yield ()
        raise FloatingPointError("no number")

    log, errors, told = [], [], threading.Event()
    other = Watched(engine, 20, "other", log)
    engine.submit(fails(), "", lambda error: (errors.append(error), told.set()))
    assert told.wait(10)
    assert other.ended.wait(10)
    assert str(errors[0]) == "no number"
    assert log == ["other"] * 20


def test_an_error_in_a_batch_ends_its_job_alone(engine):
    session = session_of()
    session.read(TEXT[:50])
    gate, ended = threading.Event(), {}

    def write(damaged):
        cache, logits = session.begin_answer()
        writer = Writer(cache, logits, Sampling(0), most=10)
        gate.wait(10)
        yield ()
        while writer.take() is not None and writer.finish is None:
            if damaged and len(writer.ids) == 4:
                writer.past = (None, 0)
            yield [writer]
        wrote.append(writer.ids)

    wrote, events = [], [threading.Event() for _ in range(3)]

    def done(number):
        return lambda error: (ended.setdefault(number, error), events[number].set())

    for number in range(3):
        engine.submit(write(damaged=number == 1), "", done(number))
    gate.set()
    assert all(event.wait(30) for event in events)
    assert ended[0] is ended[2] is None
    assert isinstance(ended[1], AttributeError)
    assert wrote == [session.continuation(10)] * 2


def test_stopping_lets_jobs_end_or_ends_them():
    log = []
    engine = Engine(model_of("llama"))
    short, endless = Watched(engine, 3, "short", log), Watched(engine, 10**9, "long", log)
    engine.stop(grace=0.3)
    assert short.ended.is_set()
    assert short.error is None
    assert isinstance(endless.error, StoppedError)
    assert endless.closed.is_set()
    with pytest.raises(BusyError) as caught:
        Watched(engine, 1, "late", log)
    assert caught.value.retry_after is None


def test_bounds():
    with refused("most_running must be at least 1, got 0"):
        Engine(model_of("llama"), most_running=0)
