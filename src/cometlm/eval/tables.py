"""Results as tables of a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cometlm.device import readable_bytes
from cometlm.eval.report import differences, summarize
from cometlm.eval.results import Results, name_of


def tables(results: Results, by: str | None = None) -> Iterator[RenderableType]:
    """For each task its figures, what went wrong, and how methods differ from the first one.

    Args:
        by: see `summarize`.
    """
    for task in results.tasks:
        if len(results.tasks) > 1:
            yield Text(f"\n{task}", style="bold")
        yield _figures(results, task, by)
        yield from _errors(results, task, by)
        yield from _differences(results, task, by)
    for name, why in results.lacking.items():
        yield Text(f"{name}: {why}")


def _figures(results: Results, task: str, by: str | None) -> Table:
    """A line for each method and length; one without figures where there are none."""
    lines = {name: summarize(results.answers.get((name, task), []), by) for name in results.methods}
    scores = list(dict.fromkeys(s for own in lines.values() for one in own for s in one.scores))
    table = _new_table("means and 95% intervals", scores, by, ["held", "peak", "seconds"])
    for name, own in lines.items():
        for line in own:
            group = [_group(line.group)] if by else []
            figures = [_interval(line.scores.get(score)) for score in scores]
            rest = ["–", "–", "–"]
            if line.count:
                held = [readable_bytes(count) for count in (line.nbytes, line.peak_bytes)]
                rest = [*held, f"{line.seconds:,.1f}"]
            table.add_row(name, f"{line.tokens:,}", *group, str(line.count), *figures, *rest)
        if not own:
            table.add_row(name, "–", *(["–"] if by else []), "0", *["–"] * (len(scores) + 3))
    return table


def _errors(results: Results, task: str, by: str | None) -> Iterator[Text]:
    for name in results.methods:
        for line in summarize(results.answers.get((name, task), []), by):
            if line.error:
                yield Text(f"{name}, {line.num_errors} ×: {line.error}")
    for cell in results.cells:
        forecast = results.forecasts.get(cell)
        if cell.task == task and forecast is not None and forecast.skipped:
            yield Text(f"{name_of(cell)}: skipped, {forecast.skipped}")


def _differences(results: Results, task: str, by: str | None) -> Iterator[RenderableType]:
    first, *others = results.methods
    ours = results.answers.get((first, task), [])
    rows = [
        (name, one)
        for name in others
        for one in differences(results.answers.get((name, task), []), ours, by)
    ]
    if not rows:
        return
    scores = list(dict.fromkeys(score for _, one in rows for score in one.scores))
    title = f"differences from {first} on the same questions, 95% intervals"
    table = _new_table(title, scores, by, [])
    for name, one in rows:
        group = [_group(one.group)] if by else []
        figures = [_interval(one.scores.get(score), "+") for score in scores]
        table.add_row(f"{name} − {first}", f"{one.tokens:,}", *group, str(one.count), *figures)
    yield Text()
    yield table


def _new_table(title: str, scores: list[str], by: str | None, more: list[str]) -> Table:
    """A table with a column for each score."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("method", "tokens", *([by] if by else []), "n", *scores, *more):
        justify: Literal["left", "right"] = "left" if column == "method" else "right"
        least = len("0.00–1.00") if column in scores else None
        table.add_column(column, justify=justify, no_wrap=column not in scores, min_width=least)
    return table


def _group(value: Any) -> str:
    return "–" if value is None else str(value)


def _interval(figures: tuple[float, float, float] | None, sign: Literal["", "+"] = "") -> str:
    """A mean and its interval; "+" gives figures their sign."""
    if figures is None:
        return "–"
    if not all(map(math.isfinite, figures)):  # nats of one text
        return f"{figures[0]:.2f}"
    mean, low, high = (f"{0.0 if abs(figure) < 0.005 else figure:{sign}.2f}" for figure in figures)
    return f"{mean} {low}{'…' if sign else '–'}{high}"
