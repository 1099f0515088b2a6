"""What is compared: methods, tasks, lengths, and where results go, as one value.

`read_config` takes it from a YAML file; the one-task command makes one of its options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cometlm.checkpoints.backbones import Bits
from cometlm.device import as_dtype
from cometlm.fields import build, read_fields
from cometlm.methods import Budget, check_options
from cometlm.tasks import TASKS

Shared = Literal["shared"]
SHARED: Shared = "shared"
DEFAULT_SAMPLES = 20
Counts = int | dict[int, int]  # of texts: of every length, or by length


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A way to read.

    Attributes:
        method: one of `METHODS`; "" is the name that it stands under.
        model: another one than the comparison's.
        sizes: of the memory, in place of the comparison's.
        budget: what may be held; "shared" is the comparison's, None is none.
        options: what else the method's `open` takes.
        samples: texts of each length at most, for a method that is slow.
    """

    method: str = ""
    model: str | None = None
    sizes: dict[str, Any] | None = None
    budget: int | str | None = SHARED
    options: dict[str, Any] = field(default_factory=dict)
    samples: Counts | None = None


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked.

    Attributes:
        task: one of `TASKS`; "" is the name that it stands under.
        data: JSON lines of one's own, in the place of a task.
        options: of the task.
        lengths, samples: in place of the comparison's.
    """

    task: str = ""
    data: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    samples: Counts | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a cell, a method on a task at a length, may take; None is any amount.

    Attributes:
        hours: of all its texts together.
        memory: of the device, or of the process on a CPU: "20GiB".
    """

    hours: float | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise ValueError(f"limits.hours must be more than 0, and a number, got {self.hours}")
        if self.memory is not None and self._memory().unit != "bytes":
            raise ValueError(f"limits.memory must be bytes like 20GiB, got {self.memory!r}")

    @property
    def are_given(self) -> bool:
        """Whether there is one."""
        return self.hours is not None or self.memory is not None

    @property
    def nbytes(self) -> int | None:
        """The memory in bytes."""
        return None if self.memory is None else self._memory().amount

    def _memory(self) -> Budget:
        try:
            return Budget.parse(str(self.memory))
        except ValueError as error:
            raise ValueError(
                f"limits.memory must be bytes like 20GiB, got {self.memory!r}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A comparison: every method on every task at every length.

    Attributes:
        model: a built-in name, a directory or a hub id.
        tasks: by the names that they have in the report.
        methods: likewise; the others are compared with the first one.
        sizes: of the memory.
        device, dtype, quantization: see `cometlm.load`.
        budget: what each method may hold, in tokens or in bytes; None is what it holds by itself.
        lengths: of texts, in tokens; none given: the lengths of `samples`.
        samples: texts of each length, or of every length its own number. Default: 20, or all that a
            task of fixed texts has.
        seed: of what the tasks draw.
        max_new_tokens: of an answer; None: what the right one takes, and 16 more.
        output: folder of rows, results and the report.
        limits: what a cell may take.

    Raises:
        ValueError: an impossible value; names the field.
    """

    model: str
    tasks: dict[str, TaskConfig]
    methods: dict[str, MethodConfig] = field(default_factory=lambda: {"comet": MethodConfig()})
    sizes: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    quantization: Bits | None = None
    budget: int | str | None = None
    lengths: tuple[int, ...] = ()
    samples: Counts | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    output: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        as_dtype(self.dtype)
        for name, value in (("tasks", self.tasks), ("methods", self.methods)):
            if not value:
                raise ValueError(f"{name} must be at least 1, got none")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        _check_counts("", self.lengths, self.samples)
        _parse_budget("budget", self.budget)
        for name, method in self.methods.items():
            _checked(f"methods.{name}", check_options, method.method or name, method.options)
            _check_counts(f"methods.{name}.", (), method.samples)
            if method.budget != SHARED:
                _parse_budget(f"methods.{name}.budget", method.budget)
        for name, task in self.tasks.items():
            self._check_task(name, task)

    def _check_task(self, name: str, task: TaskConfig) -> None:
        _check_counts(f"tasks.{name}.", task.lengths, task.samples)
        counts = self.samples if task.samples is None else task.samples
        for length in self.lengths_of(name):
            if isinstance(counts, dict) and length not in counts:
                raise ValueError(
                    f"samples of tasks.{name} must say how many texts of {length} tokens there are"
                )
        if task.data is None:
            _checked(f"tasks.{name}", TASKS.find, task.task or name)
            return
        for field_, value in (("task", task.task), ("options", task.options)):
            if value:
                raise ValueError(f"tasks.{name}.{field_} does not go with data, got {value!r}")

    def budget_of(self, method: str) -> Budget | None:
        """What a method of the comparison may hold."""
        own = self.methods[method].budget
        return _parse_budget("budget", self.budget if own == SHARED else own)

    def lengths_of(self, task: str) -> list[int]:
        """Lengths of the texts of a task, from short to long; none where none are said."""
        own = self.tasks[task]
        counts = own.samples if own.samples is not None else self.samples
        given = own.lengths or self.lengths or (list(counts) if isinstance(counts, dict) else [])
        return sorted(set(given))

    def samples_of(self, method: str, task: str, tokens: int) -> int | None:
        """Texts of a length that a method reads of a task; None where nothing says."""
        own = self.tasks[task].samples
        count = _count(self.samples if own is None else own, tokens)
        most = _count(self.methods[method].samples, tokens)
        return min((n for n in (count, most) if n is not None), default=None)


def read_config(path: str | Path, changes: Sequence[str] = ()) -> EvalConfig:
    """Read a YAML file, with changes of the form "key=value" or "key.inner.0=value".

    Raises:
        ValueError: no YAML, an unknown field, a value of another type, an impossible one.
        OSError: the file cannot be read.
    """
    return config_of(read_fields(path, changes, _whole))


def config_of(values: Mapping[str, Any]) -> EvalConfig:
    """A comparison from plain values; a list of names stands for methods or tasks as they are.

    Raises:
        ValueError: as `read_config`.
    """
    return build(EvalConfig, _whole(values))


def _whole(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the fields of methods and tasks of which the names alone are given."""
    return {name: _by_name(name, value) for name, value in values.items()}


def _by_name(name: str, value: Any) -> Any:
    """Names as a mapping, with nothing more to say of those that are only named."""
    if name not in ("methods", "tasks"):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return {one: {} for one in value}
    if isinstance(value, Mapping):
        return {one: {} if fields is None else fields for one, fields in value.items()}
    return value


def _checked(where: str, check: Callable[..., Any], *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_counts(where: str, lengths: Sequence[int], samples: Counts | None) -> None:
    counts = samples if isinstance(samples, dict) else {}
    for length in [*lengths, *counts]:
        if length < 1:
            raise ValueError(f"{where}lengths must be at least 1, got {length}")
    numbers = list(counts.values()) if counts else [] if samples is None else [samples]
    for number in numbers:
        if isinstance(number, int) and number < 1:
            raise ValueError(f"{where}samples must be at least 1, got {number}")


def _count(counts: Counts | None, tokens: int) -> int | None:
    return counts.get(tokens) if isinstance(counts, dict) else counts


def _parse_budget(where: str, budget: int | str | None) -> Budget | None:
    try:
        return None if budget is None else Budget.parse(str(budget))
    except ValueError as error:
        raise ValueError(f"{where}{str(error).removeprefix('budget')}") from error
