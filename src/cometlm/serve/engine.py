"""One thread that owns the model and runs requests by turns.

A job is an iterator that stops at every step. It yields nothing (`()`) behind a chunk that it read,
or the writers that wait for their next token. A round of the engine gives every job that writes one
token, and one of the jobs that read one chunk, so a long document delays a chat's next token by one
chunk, however many documents are read. Jobs that read take turns by owner, so that somebody with
ten uploads does not read ten times as fast as somebody with one. So do jobs that wait for a place;
and where all places to wait are taken, an owner still has its share of them, as many as there would
be for each of those who wait. With k of these, at most 1 + 1/2 + … + 1/k times as many jobs wait.

Pitfalls:
    - Only the engine's thread runs the model. What a job calls back (`emit`) must be quick.
    - Answers are written in one call of the model, as rows of a batch that join and leave between
      two tokens. How numbers are rounded depends on the batch: in half precision a greedy answer
      may differ from the one that is written alone where two tokens are about as likely.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.session.writer import Writer, advance

Work = Iterator[Sequence[Writer]]


class BusyError(RuntimeError):
    """No job can be taken now; the message says why.

    Attributes:
        retry_after: seconds after which it is worth another try; None: never, the engine stops.
    """

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoppedError(RuntimeError):
    """The engine stopped before a job was done."""


class Job:
    """One request's work.

    Args:
        work: see `Work`; closed when the job ends.
        owner: who asks.
        done: called once, in the engine's thread, when the job has ended: with the error that
            ended it, or None. It is not called for a job that was cancelled.

    Attributes:
        queued_at, started_at: `time.monotonic`; the second is None while the job waits.
    """

    def __init__(
        self, work: Work, owner: str, done: Callable[[BaseException | None], None]
    ) -> None:
        self.owner = owner
        self.queued_at = time.monotonic()
        self.started_at: float | None = None
        self._work, self._done = work, done
        self._is_cancelled = threading.Event()
        self._writers: Sequence[Writer] = ()

    def cancel(self) -> None:
        """Nobody waits for this any more; its place is free at the engine's next step."""
        self._is_cancelled.set()


@dataclass(frozen=True)
class Load:
    """How much there is to do: jobs that have a place, and those that wait for one."""

    running: int
    waiting: int


class Engine:
    """Runs jobs on one model; see above.

    Args:
        model: nobody else runs it meanwhile.
        most_running: jobs that have a place at once.
        most_waiting: jobs that may wait for a place; more are refused, but for an owner's share.
        most_rows: jobs whose answers are written in one call of the model.
    """

    def __init__(
        self,
        model: CometForCausalLM,
        *,
        most_running: int = 16,
        most_waiting: int = 256,
        most_rows: int = 32,
    ) -> None:
        bounds = {
            "most_running": most_running,
            "most_waiting": most_waiting,
            "most_rows": most_rows,
        }
        for name, value in bounds.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model = model
        self._most_running, self._most_waiting = most_running, most_waiting
        self._most_rows = most_rows
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._last_reader = self._last_admitted = ""  # owners
        self._is_open, self._is_ending = True, False
        self._thread = threading.Thread(target=self._run, name="cometlm-engine", daemon=True)
        self._thread.start()

    # --- from any thread --------------------------------------------------------------------

    @property
    def load(self) -> Load:
        """What runs and waits now."""
        with self._changed:
            return Load(len(self._running), len(self._waiting))

    def submit(self, work: Work, owner: str, done: Callable[[BaseException | None], None]) -> Job:
        """Queue a job.

        Raises:
            BusyError: too many wait, or the engine stops.
        """
        job = Job(work, owner, done)
        with self._changed:
            if not self._is_open:
                raise BusyError("the server is stopping")
            self._drop_cancelled()
            if not self._may_wait(owner):
                raise BusyError(f"{len(self._waiting)} requests are waiting", retry_after=5)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def _may_wait(self, owner: str) -> bool:
        """Whether there is room in the queue, or this owner has less than its share of it."""
        if len(self._waiting) < self._most_waiting:
            return True
        jobs = Counter(job.owner for job in self._waiting)
        share = max(1, self._most_waiting // len({*jobs, owner}))
        return jobs[owner] < share

    def stop(self, grace: float = 0.0) -> None:
        """Take no more jobs, give those there are `grace` seconds to end, and end the rest."""
        until = time.monotonic() + grace
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not (self._running or self._waiting), until - time.monotonic()
            )
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join()

    # --- in the engine's thread -------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._waiting or self._is_ending)
                if self._is_ending:
                    break
                self._drop_cancelled()
                while self._waiting and len(self._running) < self._most_running:
                    job = self._next_of(self._waiting, self._last_admitted)
                    self._last_admitted = job.owner
                    self._waiting.remove(job)
                    job.started_at = time.monotonic()
                    self._running.append(job)
                jobs = list(self._running)
            self._round(jobs)
        with self._changed:
            left = [*self._running, *self._waiting]
        for job in left:
            self._end(job, StoppedError("the server stopped before the answer was written"))

    def _round(self, jobs: list[Job]) -> None:
        """A token for everyone who writes, then a chunk for one of those who read."""
        writing = [job for job in jobs if job._writers]
        self._write(writing)
        reading = [job for job in jobs if not job._writers and job not in writing]
        if reading:
            job = self._next_of(reading, self._last_reader)
            self._last_reader = job.owner
            self._resume(job)
            with self._changed:
                if job in self._running:  # behind the others of its owner
                    self._running.remove(job)
                    self._running.append(job)

    def _write(self, jobs: Sequence[Job]) -> None:
        """A token for each writer of these jobs, in as few calls of the model as may be."""
        going = []
        for job in jobs:
            if job._is_cancelled.is_set():
                self._end(job, None)
            else:
                going.append(job)
        for begin in range(0, len(going), self._most_rows):
            self._write_together(going[begin : begin + self._most_rows])

    def _write_together(self, jobs: Sequence[Job]) -> None:
        try:
            advance(self.model, [writer for job in jobs for writer in job._writers])
        except Exception as error:  # noqa: BLE001 (told to whoever asked)
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            for job in jobs:  # each by itself: it is the fault of one of them
                self._write_together([job])
        else:
            for job in jobs:
                self._resume(job)

    @staticmethod
    def _next_of(jobs: Sequence[Job], last: str) -> Job:
        """The first job of the owner whose turn it is after the last one's."""
        owners = sorted({job.owner for job in jobs})
        following = [owner for owner in owners if owner > last]
        owner = (following or owners)[0]
        return next(job for job in jobs if job.owner == owner)

    def _resume(self, job: Job) -> None:
        if job._is_cancelled.is_set():
            self._end(job, None)
            return
        try:
            job._writers = next(job._work)
        except StopIteration:
            self._end(job, None)
        except Exception as error:  # noqa: BLE001 (told to whoever asked)
            self._end(job, error)

    def _drop_cancelled(self) -> None:
        """Free the places of jobs that nobody waits for; the lock is held."""
        for job in [*self._waiting]:
            if job._is_cancelled.is_set():
                self._waiting.remove(job)
        for job in [*self._running]:
            if job._is_cancelled.is_set() and threading.current_thread() is self._thread:
                self._end(job, None)

    def _end(self, job: Job, error: BaseException | None) -> None:
        with self._changed:
            for jobs in (self._running, self._waiting):
                if job in jobs:
                    jobs.remove(job)
            self._changed.notify_all()
        close: Any = getattr(job._work, "close", None)
        if close is not None:
            close()
        if not job._is_cancelled.is_set():
            job._done(error)
