"""Results as tables of a terminal, which fit its width: nothing is cut off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from cometlm.device import readable_bytes
from cometlm.eval.report import differences, summarize
from cometlm.eval.results import Results, name_of


class Grid:
    """A table that wraps its figures where there is too little room, and goes on below itself.

    Args:
        title: above it.
        keys: columns that say what a row is; they stand in each part.
        scores: columns of figures with an interval, which are the first ones to wrap.
        others: columns behind them.
    """

    def __init__(
        self, title: str, keys: Sequence[str], scores: Sequence[str], others: Sequence[str] = ()
    ) -> None:
        self.title = title
        self._keys = len(keys)
        self._scores = range(len(keys), len(keys) + len(scores))
        self._rows: list[Sequence[str]] = [[*keys, *scores, *others]]

    def add_row(self, *cells: str) -> None:
        """Add a row, with a cell for each column."""
        assert len(cells) == len(self._rows[0])
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """See rich's console protocol."""
        columns = list(zip(*self._rows, strict=True))
        least = [_longest_word(column) for column in columns]
        whole = [max(map(cell_len, column)) for column in columns]
        some = [least[i] if i in self._scores else width for i, width in enumerate(whole)]
        every, room = list(range(len(columns))), options.max_width
        for widths in (whole, some):
            if _width_of(widths) <= room:
                yield self._part(every, widths)
                return
        keys, rest = every[: self._keys], every[self._keys :]
        while rest:
            count = len(rest)
            while count > 1 and _width_of([least[i] for i in keys + rest[:count]]) > room:
                count -= 1
            yield self._part(keys + rest[:count], least)
            rest = rest[count:]

    def _part(self, numbers: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(
            title=self.title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0)
        )
        head, *rows = self._rows
        for i in numbers:
            justify: Literal["left", "right"] = "left" if i == 0 else "right"
            table.add_column(head[i], justify=justify, width=widths[i], overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in numbers))
        return table


def _longest_word(column: Sequence[str]) -> int:
    """How wide a column must be to break no word."""
    return max(cell_len(word) for cell in column for word in cell.split() or [""])


def _width_of(columns: Sequence[int]) -> int:
    """Of columns with a space between each two."""
    return sum(columns) + len(columns) - 1


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
    for name, why in results.shorter_texts.items():
        yield Text(f"{name}: {why}")
    for name, why in results.lacking.items():
        yield Text(f"{name}: {why}")


def _figures(results: Results, task: str, by: str | None) -> Grid:
    """A line for each method and length; one without figures where there are none."""
    lines = {name: summarize(results.answers.get((name, task), []), by) for name in results.methods}
    scores = list(dict.fromkeys(s for own in lines.values() for one in own for s in one.scores))
    has_open = any(one.open_nbytes for own in lines.values() for one in own)
    others = ["held", *(["open"] if has_open else []), "peak", "seconds"]
    table = Grid("means and 95% intervals", _keys(by), scores, others)
    for name, own in lines.items():
        for line in own:
            group = [_group(line.group)] if by else []
            figures = [_interval(line.scores.get(score)) for score in scores]
            rest = ["–"] * len(others)
            if line.count:
                opened = [line.open_nbytes] if has_open else []
                held = map(readable_bytes, [line.nbytes, *opened, line.peak_bytes])
                rest = [*held, f"{line.seconds:,.1f}"]
            table.add_row(name, f"{line.tokens:,}", *group, str(line.count), *figures, *rest)
        if not own:
            table.add_row(name, "–", *(["–"] if by else []), "0", *["–"] * len(scores + others))
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
    table = Grid(title, _keys(by), scores)
    for name, one in rows:
        group = [_group(one.group)] if by else []
        figures = [_interval(one.scores.get(score), "+") for score in scores]
        table.add_row(f"{name} − {first}", f"{one.tokens:,}", *group, str(one.count), *figures)
    yield Text()
    yield table


def _keys(by: str | None) -> list[str]:
    return ["method", "tokens", *([by] if by else []), "n"]


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
