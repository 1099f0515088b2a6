"""What a comparison found, as one value, and as `results.json` has it.

The file holds nothing that depends on when a run was stopped and gone on with, apart from what was
measured in seconds and in bytes at the highest point.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from cometlm import __version__
from cometlm.checkpoints.atomic_write import write_whole
from cometlm.eval.forecast import readings_of
from cometlm.eval.metrics import NATS
from cometlm.eval.report import Difference, Line, differences, summarize
from cometlm.eval.rows import Forecast
from cometlm.eval.runner import Answer

_PREFERRED = ("judged", "found", "f1", "exact")  # of several scores, the one that pictures show


@dataclass(frozen=True)
class Cell:
    """A method on a task at a length.

    Attributes:
        method, task: by their names in the comparison.
        tokens: of a text.
        samples: how many texts.
    """

    method: str
    task: str
    tokens: int
    samples: int


def name_of(cell: Cell) -> str:
    """A cell as people read it."""
    return f"{cell.method} on {cell.task}, {cell.tokens:,} tokens"


@dataclass(frozen=True)
class Results:
    """What a comparison found.

    Attributes:
        settings: what was compared, as plain values.
        cells: all of them, in the order in which they are run.
        answers: of each method to each task.
        forecasts: what cells were foreseen to take.
        lacking: what could not be had, and why.
        uneven: tasks whose texts are not meant to have as many tokens as are asked for.
    """

    settings: Mapping[str, Any]
    cells: Sequence[Cell]
    answers: Mapping[tuple[str, str], Sequence[Answer]]
    forecasts: Mapping[Cell, Forecast]
    lacking: Mapping[str, str]
    uneven: Collection[str] = ()

    @cached_property
    def methods(self) -> list[str]:
        """Those with cells, in order."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @cached_property
    def tasks(self) -> list[str]:
        """Those with cells, in order."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @cached_property
    def lengths(self) -> list[int]:
        """All lengths, from short to long."""
        return sorted({cell.tokens for cell in self.cells})

    @cached_property
    def lines(self) -> dict[Cell, Line]:
        """Figures of all cells of which there are some."""
        found = {}
        for cell in self.cells:
            for line in summarize(self.of(cell)):
                found[cell] = line
        return found

    def of(self, cell: Cell) -> list[Answer]:
        """A cell's answers, in the order of its texts and their questions."""
        found = self.answers.get((cell.method, cell.task), [])
        own = [answer for answer in found if answer.tokens == cell.tokens]
        return sorted(own, key=lambda answer: answer.place)

    def shorter(self, cell: Cell) -> str:
        """What is to be said of texts that are shorter than was asked for; "" if nothing."""
        line = self.lines.get(cell)
        return "" if line is None or cell.task in self.uneven else line.shorter

    @cached_property
    def shorter_texts(self) -> dict[str, str]:
        """The same of all cells, said once of methods whose texts have the same lengths."""
        found: dict[tuple[str, int, str], list[str]] = {}
        for cell in self.cells:
            if why := self.shorter(cell):
                found.setdefault((cell.task, cell.tokens, why), []).append(cell.method)
        return {
            f"{', '.join(methods)} on {task}, {tokens:,} tokens": why
            for (task, tokens, why), methods in found.items()
        }

    def main_score(self, task: str) -> str:
        """Of a task's scores, the one to show where there is room for one; "" if it has none."""
        scores = dict.fromkeys(
            score
            for (_, own), answers in self.answers.items()
            for answer in answers
            if own == task
            for score in answer.scores
        )
        return next((name for name in (*_PREFERRED, *scores) if name in scores), "")

    def differences(self, task: str) -> dict[str, list[Difference]]:
        """How much better each other method is than the first one."""
        first, *others = self.methods
        ours = self.answers.get((first, task), [])
        found = {
            name: differences(_ordered(self.answers.get((name, task), [])), ours) for name in others
        }
        return {name: own for name, own in found.items() if own}

    def took(self, cell: Cell) -> tuple[float, int | None, int] | None:
        """Seconds of all texts of a cell, bytes at the highest point, and how many texts."""
        readings = readings_of(cell.task, self.of(cell))
        if not readings:
            return None
        peaks = [one.peak_bytes for one in readings if one.peak_bytes is not None]
        return sum(one.seconds for one in readings), max(peaks, default=None), len(readings)


def _ordered(answers: Iterable[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda answer: answer.place)


def readable_seconds(seconds: float) -> str:
    """Seconds with a unit: 120 is 2.0 min."""
    for most, unit, size in ((90.0, "s", 1), (90 * 60.0, "min", 60)):
        if seconds < most:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds / 3600:.1f} h"


# --- as a file ----------------------------------------------------------------------------------


def write_results(path: Path, results: Results) -> None:
    """Write `results.json`.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(as_plain(results), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text.encode() + b"\n")


def changed_settings(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Settings that a file of results was not made with; all of them if it holds something else.

    Args:
        path: of `write_results`; it may be missing, and nothing has changed then.
        settings: see `Results`.
    """
    if not path.exists():
        return []
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        kept = {}
    plain = json.loads(json.dumps(settings))
    return [name for name in plain if name not in kept or kept[name] != plain[name]]


def as_plain(results: Results) -> dict[str, Any]:
    """Results as JSON has them."""
    return {
        "settings": results.settings,
        "machine": machine(),
        "cells": [_plain_cell(results, cell) for cell in results.cells],
        "differences": [
            {"task": task, "method": name, "from": results.methods[0], **_plain_figures(one)}
            for task in results.tasks
            for name, own in results.differences(task).items()
            for one in own
        ],
        "lacking": dict(results.lacking),
    }


def machine() -> dict[str, Any]:
    """What figures of time depend on, besides what else the machine does."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": None if device is None else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cometlm": __version__,
    }


def _plain_cell(results: Results, cell: Cell) -> dict[str, Any]:
    line, forecast = results.lines.get(cell), results.forecasts.get(cell)
    answers = [answer for answer in results.of(cell) if not answer.error]
    plain: dict[str, Any] = asdict(cell)
    plain["texts"] = len({answer.index for answer in answers})
    if line is not None:
        plain |= _plain_figures(line)
        plain |= {"bytes": line.nbytes, "open_bytes": line.open_nbytes}
        plain["peak_bytes"] = line.peak_bytes
        plain |= {"read_seconds": line.read_seconds, "answer_seconds": line.answer_seconds}
        plain["read"] = line.read
        plain["shorter"] = results.shorter(cell)
        plain["errors"] = {"count": line.num_errors, "first": line.error}
    plain["skipped"] = "" if forecast is None else forecast.skipped
    plain["foreseen"] = _plain_forecast(results, cell, forecast)
    return plain


def _plain_figures(line: Line | Difference) -> dict[str, Any]:
    scores = {
        name: {"mean": _finite(mean), "low": _finite(low), "high": _finite(high)}
        for name, (mean, low, high) in line.scores.items()
    }
    return {"tokens": line.tokens, "n": line.count, "scores": scores}


def _finite(value: float) -> float | None:
    """A figure; None where JSON has no number for it: a bound where nothing bounds, a NaN."""
    return value if math.isfinite(value) else None


def _plain_forecast(
    results: Results, cell: Cell, forecast: Forecast | None
) -> dict[str, Any] | None:
    """What was foreseen beside what was measured; ratios are measured by foreseen."""
    if forecast is None or forecast.seconds is None:
        return None
    took = results.took(cell)
    seconds, peak, texts = took or (None, None, cell.samples)
    foreseen = forecast.seconds * texts
    plain = {
        "from_lengths": forecast.lengths,
        "texts": texts,
        "seconds": {"foreseen": foreseen, "measured": seconds, "ratio": _ratio(seconds, foreseen)},
    }
    if forecast.nbytes is not None:
        ratio = _ratio(peak, forecast.nbytes)
        plain["memory"] = {"foreseen": forecast.nbytes, "measured": peak, "ratio": ratio}
    return plain


def _ratio(measured: float | None, foreseen: float) -> float | None:
    return None if measured is None or not foreseen else round(measured / foreseen, 3)


def mean_of_tasks(results: Results, method: str, tokens: int) -> float | None:
    """The mean of a method's main scores at a length, over tasks whose score is a share.

    None unless it was measured on all of them.
    """
    tasks = [task for task in results.tasks if results.main_score(task) not in ("", NATS)]
    at_length = {cell.task for cell in results.cells if cell.tokens == tokens}
    found = []
    for cell, line in results.lines.items():
        if (cell.method, cell.tokens) == (method, tokens) and cell.task in tasks:
            score = line.scores.get(results.main_score(cell.task))
            found += [] if score is None else [score[0]]
    wanted = len(at_length.intersection(tasks))
    return statistics.fmean(found) if found and len(found) == wanted else None
