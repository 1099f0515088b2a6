"""A comparison as it runs: method after method, from short texts to long ones, task after task.

A cell is a method on a task at a length. Before it is run it is foreseen what it will take
(`eval.forecast`), and a cell beyond the limits is skipped. What cannot be had, a model, a package
or a task's data, leaves the others: it is noted, and they go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from cometlm.device import as_dtype, readable_bytes
from cometlm.eval.config import DEFAULT_SAMPLES, EvalConfig, Limits
from cometlm.eval.forecast import Reading, are_apart, calibrate, foresee, questions_of, readings_of
from cometlm.eval.results import Cell, Results, name_of, readable_seconds
from cometlm.eval.rows import Forecast, Rows
from cometlm.eval.runner import Answer, Place, check_fits, evaluate
from cometlm.methods import METHODS, Loader, Reader, TooLongError
from cometlm.tasks import Own, Sample, Task, make_task

_TRIES = 8  # texts that may be longer than is asked for, before a length is refused
K = TypeVar("K")
_UNREADABLE = (ValueError, OSError, ImportError, torch.OutOfMemoryError)


class Watch:
    """Is told what happens; this one says nothing of it."""

    def opening(self, method: str, model: str) -> None:
        """A method's model is about to be loaded."""

    def opened(self, method: str, reader: Reader) -> None:
        """A method is about to be measured."""

    def lacks(self, what: str, error: Exception) -> None:
        """A method, a task or a cell cannot be had."""

    def known(self, method: str, count: int) -> None:
        """So many answers of a method are known already."""

    def begins(self, cell: Cell, forecast: Forecast, left: float | None) -> None:
        """A cell is about to be read; its method has so many seconds left, if that is known."""

    def skipped(self, cell: Cell, why: str) -> None:
        """A cell would take more than the limits, or its task makes no text that is so short."""

    def answered(self, cell: Cell, answer: Answer) -> None:
        """A question was answered; the answer is kept."""


class Comparison:
    """Runs what a configuration says, and holds what was found so far.

    Args:
        config: what is compared.
        rows: keeps every answer; those that it has already are not asked for again.
        watch: is told what happens.

    Attributes:
        cells: all of them, in the order in which they are run.
        answers: of each method to each task by place, also those that were known.
        forecasts: what cells were foreseen to take.
        lacking_methods, lacking_tasks, lacking_cells: what could not be had, and why.
        lacking_data: of tasks that go on without them, likewise.
        settings: of the rows of each method and task that were looked at.

    Raises:
        ValueError: a task's option that is out of its bounds; a task without lengths.
    """

    def __init__(self, config: EvalConfig, rows: Rows, watch: Watch | None = None) -> None:
        self.config = config
        self.rows = rows
        self.watch = watch or Watch()
        self.answers: dict[tuple[str, str], dict[Place, Answer]] = {}
        self.forecasts: dict[Cell, Forecast] = {}
        self.lacking_methods: dict[str, Exception] = {}
        self.lacking_tasks: dict[str, Exception] = {}
        self.lacking_cells: dict[Cell, Exception] = {}
        self.lacking_data: dict[str, Exception] = {}
        self.settings: dict[tuple[str, str], dict[str, Any]] = {}
        self._loader: Loader | None = None
        self._tasks: dict[str, dict[str, Task]] = {}  # by model, since tokenizers differ
        self._unreadable: dict[str, OSError] = {}  # models whose tokenizers cannot be had
        self._too_short: dict[Task, dict[int, str]] = {}  # lengths of those that were tried
        self._readings: dict[str, list[Reading]] = {}
        self.cells = [cell for method in config.methods for cell in self._cells_of(method)]

    def run(self) -> None:
        """Read and ask what is not known yet.

        Raises:
            Exception: what the first thing that cannot be had raised, if nothing else was measured.
        """
        for method in self.config.methods:
            self._run_method(method)
        if not any(self.answers.values()) and not self.skipped:
            for error in self.lacking.values():
                raise error

    @property
    def skipped(self) -> dict[Cell, str]:
        """Cells that would take more than the limits, or need longer texts, and why."""
        return {cell: one.skipped for cell, one in self.forecasts.items() if one.skipped}

    @property
    def is_whole(self) -> bool:
        """Whether all that was asked for could be had, a method that refuses its model aside."""
        are_missing = [
            isinstance(error, OSError | ImportError) for error in self.lacking_methods.values()
        ]
        of_tasks = [self.lacking_tasks, self.lacking_data, self.lacking_cells]
        return not (any(are_missing) or any(of_tasks))

    @property
    def lacking(self) -> dict[str, Exception]:
        """What could not be had, as people read it, and why."""
        cells = {name_of(cell): error for cell, error in self.lacking_cells.items()}
        return {**self.lacking_methods, **self.lacking_tasks, **self.lacking_data, **cells}

    @property
    def results(self) -> Results:
        """What was found so far."""
        config = dataclasses.asdict(self.config)
        return Results(
            settings={name: value for name, value in config.items() if name != "output"},
            cells=self.cells,
            answers={name: list(own.values()) for name, own in self.answers.items()},
            forecasts=self.forecasts,
            lacking={name: str(error) for name, error in self.lacking.items()},
            uneven={
                name
                for made in self._tasks.values()
                for name, task in made.items()
                if not task.fills
            },
        )

    def model_of(self, method: str) -> str:
        """The model that a method reads with."""
        return self.config.methods[method].model or self.config.model

    # --- before anything is loaded ----------------------------------------------------------

    def _cells_of(self, method: str) -> Iterator[Cell]:
        """From short texts to long ones, so that the short ones say what the long ones take."""
        try:
            tasks = self._tasks_of(method)
        except OSError as error:  # of the model's name or its tokenizer
            self._note(self.lacking_methods, method, method, error)
            return
        lengths = {name: self._lengths(name, task) for name, task in tasks.items()}
        self._try(tasks, lengths)
        for tokens in sorted({length for own in lengths.values() for length in own}):
            for name, task in tasks.items():
                if tokens in lengths[name] and name not in self.lacking_tasks:
                    asked = self.config.samples_of(method, name, tokens)
                    most = task.num_samples
                    count = min((n for n in (asked, most) if n), default=DEFAULT_SAMPLES)
                    yield Cell(method, name, tokens, count)

    def _try(self, tasks: dict[str, Task], lengths: dict[str, list[int]]) -> None:
        """Make a short text of each task, to know before any is read what is wrong or missing."""
        for name, task in tasks.items():
            if task in self._too_short:
                continue
            try:
                self._too_short[task] = _too_short(task, lengths[name])
            except ValueError as error:
                raise ValueError(f"tasks.{name}: {error}") from error
            except (OSError, ImportError) as error:
                self._too_short[task] = {}
                self._note(self.lacking_tasks, name, name, error)

    def _lengths(self, name: str, task: Task) -> list[int]:
        has_own = self.config.tasks[name].data is not None  # whose texts have their own lengths
        lengths = [] if has_own else self.config.lengths_of(name)
        if not lengths and task.longest is not None:
            lengths = [self._longest(name)]
        if not lengths:
            raise ValueError(f"--tokens or lengths must be given for {name}: how long a text is")
        return lengths

    def _longest(self, name: str) -> int:
        """Tokens of a task's longest text as the model counts that has most of them.

        One length for all models: answers to the same question are compared.
        """
        longest = 0
        for method in self.config.methods:
            with contextlib.suppress(OSError):  # of its model; said in its turn
                task = self._tasks_of(method).get(name)
                longest = max(longest, (task and task.longest) or 0)
        return longest

    def _tasks_of(self, method: str) -> dict[str, Task]:
        """The tasks, for the tokenizer of a method's model."""
        model = self.model_of(method)
        if model in self._unreadable:
            raise self._unreadable[model]
        if model not in self._tasks:
            try:
                tokenizer = self._new_loader(method).tokenizer
            except OSError as lost:  # which may have taken long to find out
                self._unreadable[model] = lost
                raise
            made: dict[str, Task] = {}
            for name in self.config.tasks:
                try:
                    made[name] = task = self._make_task(name, tokenizer)
                    for data, error in task.lacking.items():
                        part = f"{data} of {name}"
                        self._note(self.lacking_data, part, part, error)
                except ValueError as error:
                    raise ValueError(f"tasks.{name}: {error}") from error
                except (OSError, ImportError) as error:
                    self._note(self.lacking_tasks, name, name, error)
            self._tasks[model] = made
        return self._tasks[model]

    def _make_task(self, name: str, tokenizer: Any) -> Task:
        task, seed = self.config.tasks[name], self.config.seed
        if task.data is not None:
            return Own(tokenizer, path=task.data, seed=seed)
        return make_task(task.task or name, tokenizer, split="test", seed=seed, **task.options)

    def _new_loader(self, method: str) -> Loader:
        config, own = self.config, self.config.methods[method]
        sizes = config.sizes if own.sizes is None else own.sizes
        dtype = as_dtype(config.dtype)
        return Loader(self.model_of(method), config.device, dtype, config.quantization, sizes)

    # --- methods ----------------------------------------------------------------------------

    def _run_method(self, method: str) -> None:
        cells = [cell for cell in self.cells if cell.method == method]
        if not cells:
            return
        self.watch.opening(method, self.model_of(method))
        try:
            reader = self._open(method)
        except _UNREADABLE as error:
            self._note(self.lacking_methods, method, method, error)
            return  # the others may be measured all the same
        assert self._loader is not None
        self.watch.opened(method, reader)
        self._find_known(method, cells)
        for number, cell in enumerate(cells):
            if cell.task not in self.lacking_tasks:
                self._run_cell(cell, reader, cells[number:])

    def _open(self, method: str) -> Reader:
        loader = self._new_loader(method)
        last = self._loader
        if last is not None and _loads_alike(last, loader):
            loader = last  # which has a model already
        self._loader = last = None  # two models need not fit into memory
        self._loader = loader
        own = self.config.methods[method]
        opens: Any = METHODS[own.method or method].open
        reader: Reader = opens(loader, self.config.budget_of(method), **own.options)
        return reader

    def _find_known(self, method: str, cells: Sequence[Cell]) -> None:
        """Take what is known from the rows."""
        count = 0
        for task in dict.fromkeys(cell.task for cell in cells):
            self.settings[method, task] = self._settings(method, task)
            self.answers[method, task] = {}
            count += self._take_known([cell for cell in cells if cell.task == task])
        if count:
            self.watch.known(method, count)

    def _take_known(self, cells: Sequence[Cell]) -> int:
        """Take what the rows have of cells of one method and task; how many answers that were."""
        name = cells[0].method, cells[0].task
        samples = {cell.tokens: cell.samples for cell in cells}
        new = [
            one for one in self.rows.answers(self.settings[name])
            if one.index < samples.get(one.tokens, 0)
            and one.place not in self.answers[name]
            and not one.is_retried
        ]  # fmt: skip
        self.answers[name] |= {one.place: one for one in new}
        self._readings.setdefault(cells[0].method, []).extend(readings_of(cells[0].task, new))
        return len(new)

    def _settings(self, method: str, task: str) -> dict[str, Any]:
        """All that the answers of a method to a task depend on, besides length and sample."""
        config, loader = self.config, self._loader
        assert loader is not None
        own, asked = config.methods[method], config.tasks[task]
        budget = config.budget_of(method)
        made = self._tasks_of(method)[task]
        options = {"digest": made.digest} if isinstance(made, Own) else asked.options
        settings = {
            "model": self.model_of(method),
            "sizes": loader.sizes,
            "dtype": str(loader.dtype),
            "quantization": config.quantization,
            "task": "own" if isinstance(made, Own) else asked.task or task,
            "options": options,
            "seed": config.seed,
            "budget": None if budget is None else budget.plain,
            "max_new_tokens": config.max_new_tokens,
            "method": own.method or method,
            "weights": loader.weights,
        }
        return {**settings, "method_options": own.options} if own.options else settings

    # --- cells ------------------------------------------------------------------------------

    def _run_cell(self, cell: Cell, reader: Reader, left: Sequence[Cell]) -> None:
        assert self._loader is not None
        task = self._tasks_of(cell.method)[cell.task]
        settings = self.settings[cell.method, cell.task]
        found = self.answers[cell.method, cell.task]
        self._take_known([cell])  # another task with the same settings may just have been asked
        own = [one for one in found.values() if one.tokens == cell.tokens]
        if why := self._too_short[task].get(cell.tokens, ""):
            self.forecasts[cell] = Forecast(cell.tokens, skipped=why)
            self.watch.skipped(cell, why)
            return
        try:
            forecast = self._forecast(cell, reader, task, is_begun=bool(own))
        except (ValueError, OSError, ImportError) as error:
            self._note_of_task(cell, error)
            return
        if forecast.skipped:
            self.watch.skipped(cell, forecast.skipped)
            return
        if len({one.index for one in own}) < cell.samples:
            self.watch.begins(cell, forecast, self._seconds_left(left, reader))
        new: list[Answer] = []
        limits: dict[str, Any] = {"max_new_tokens": self.config.max_new_tokens}
        limits["device"] = self._loader.device
        answers = evaluate(reader, task, [cell.tokens], cell.samples, known=found, **limits)
        while True:
            try:
                answer = next(answers, None)
            except (ValueError, OSError, ImportError) as error:
                self._note_of_task(cell, error)
                break
            if answer is None:
                break
            self.rows.append(settings, answer)
            found[answer.place] = answer
            new.append(answer)
            self.watch.answered(cell, answer)
        self._readings[cell.method] += readings_of(cell.task, new)

    def _forecast(self, cell: Cell, reader: Reader, task: Task, *, is_begun: bool) -> Forecast:
        """What a text of the cell takes, kept with the rows; the first word on it stays."""
        settings = self.settings[cell.method, cell.task]
        kept = self.rows.forecasts(settings).get(cell.tokens)
        forecast = kept or Forecast(cell.tokens)
        if not is_begun and (kept is None or kept.skipped):
            new = self._foresee(cell, reader, task)
            forecast = forecast if new.seconds is None else new
        why = "" if is_begun else _refusal(self.config.limits, forecast, cell)
        forecast = replace(forecast, skipped=why)
        if forecast != kept and (forecast.seconds is not None or kept is not None):
            self.rows.append(settings, forecast)
        self.forecasts[cell] = forecast
        return forecast

    def _foresee(self, cell: Cell, reader: Reader, task: Task) -> Forecast:
        """By what the method has read; where that is too little and there are limits, by a try."""
        assert self._loader is not None
        readings = self._readings[cell.method]
        questions = questions_of(readings, cell.task)
        if questions is None and not (readings or self.config.limits.are_given):
            return Forecast(cell.tokens)
        sample = _first_sample(task, cell.tokens)
        try:
            check_fits(reader.fork(), sample, self.config.max_new_tokens)
        except TooLongError:  # which is said at once
            return Forecast(cell.tokens)
        name = cell.task if sample.questions else ""
        if questions is None:
            questions = len(sample.questions)
        lengths = {one.tokens for one in readings if bool(one.task) == bool(name)}
        if self.config.limits.are_given and not are_apart(lengths):
            device, most = self._loader.device, self.config.max_new_tokens
            readings += calibrate(reader, cell.task, sample, device, most)
        usual = task.usual_length(cell.tokens)
        if task.longest is None:  # where a task has no more texts, it makes shorter ones
            usual = min(usual, len(sample.context))
        return foresee(readings, name, cell.tokens, questions, usual, reader.bounds)

    def _seconds_left(self, cells: Sequence[Cell], reader: Reader) -> float | None:
        """What those cells will take, all of one method; None where nothing is known of one.

        Those that the limits will skip, or whose task's data are not there, take nothing.
        """
        total = 0.0
        for cell in cells:
            if cell.task in self.lacking_tasks:
                continue
            readings = self._readings[cell.method]
            own = {
                one.index for one in self.answers[cell.method, cell.task].values()
                if one.tokens == cell.tokens
            }  # fmt: skip
            name = cell.task if any(one.task for one in readings) else ""
            usual = self._tasks_of(cell.method)[cell.task].usual_length(cell.tokens)
            asked = questions_of(readings, cell.task) or 1
            forecast = foresee(readings, name, cell.tokens, asked, usual, reader.bounds)
            if forecast.seconds is None:
                return None
            if own or not _refusal(self.config.limits, forecast, cell):
                total += forecast.seconds * (cell.samples - len(own))
        return total

    # --- what cannot be had -----------------------------------------------------------------

    def _note_of_task(self, cell: Cell, error: Exception) -> None:
        """A task whose data are not there has no more cells; other errors are the cell's own."""
        if isinstance(error, OSError | ImportError):
            self._note(self.lacking_tasks, cell.task, cell.task, error)
        else:
            self._note(self.lacking_cells, cell, name_of(cell), error)

    def _note(self, where: dict[K, Exception], key: K, name: str, error: Exception) -> None:
        if key not in where:
            where[key] = error
            self.watch.lacks(name, error)


def _first_sample(task: Task, tokens: int) -> Sample:
    """The first text of that length that the task can make.

    Raises:
        ValueError: what the first one raised, if it makes none of some.
    """
    errors = []
    for index in range(min(_TRIES, task.num_samples or _TRIES)):
        try:
            return task.sample(index, tokens)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _too_short(task: Task, lengths: Sequence[int]) -> dict[int, str]:
    """Lengths of which a task can make no text, though it can of longer ones, and why.

    Args:
        lengths: from short to long.

    Raises:
        ValueError: what the first one raised, if it makes texts of none.
    """
    errors: dict[int, ValueError] = {}
    for tokens in lengths:
        try:
            _first_sample(task, tokens)
        except ValueError as error:
            errors[tokens] = error
        else:
            return {tokens: str(error) for tokens, error in errors.items()}
    raise errors[lengths[0]]


def _refusal(limits: Limits, forecast: Forecast, cell: Cell) -> str:
    """Why a cell is not run, "" if it is."""
    if limits.hours is not None and forecast.seconds is not None:
        seconds = forecast.seconds * cell.samples
        if seconds > limits.hours * 3600:
            return f"would take {readable_seconds(seconds)}, more than {limits.hours:g} h"
    if (
        limits.nbytes is not None
        and forecast.nbytes is not None
        and forecast.nbytes > limits.nbytes
    ):
        took, most = readable_bytes(forecast.nbytes), readable_bytes(limits.nbytes)
        return f"would take {took} of memory, more than {most}"
    return ""


def _loads_alike(one: Loader, other: Loader) -> bool:
    ours, theirs = (
        (loader.source.name, loader.device, loader.dtype, loader.quantization, loader.sizes)
        for loader in (one, other)
    )
    return ours == theirs
