"""The report as one HTML file that needs nothing else: tables, pictures, some answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.device import readable_bytes
from cometlm.eval.charts import (
    Chart,
    Point,
    Series,
    bytes_axis,
    length_axis,
    log_axis,
    marker_of,
    readable_count,
    share_axis,
    value_axis,
)
from cometlm.eval.forecast import readings_of
from cometlm.eval.metrics import NATS, mean_interval
from cometlm.eval.results import Cell, Results, machine, mean_of_tasks, readable_seconds
from cometlm.eval.runner import Answer
from cometlm.tasks.story import DECILES

TEMPLATE = "report.html.jinja"
_NAMED = 4  # methods or tasks at most that a title has room for
_SHOWN = 10  # answers of each kind
_DISTANCES = 125, 4  # tokens of the nearest kind; how many times further each next one goes
_HEADER = ("model", "sizes", "dtype", "quantization", "budget", "seed", "max_new_tokens")


@dataclass(frozen=True)
class Square:
    """A square of a table with shades: a mean and its interval, or why there is none."""

    mean: float | None = None
    low: float = 0.0
    high: float = 0.0
    count: int = 0
    note: str = ""

    @property
    def shade(self) -> int:
        """Its shade in percent, of a mean between 0 and 1."""
        return 0 if self.mean is None or self.note == NATS else round(100 * self.mean)


@dataclass(frozen=True)
class Heatmap:
    """Means of one method's score on a task, by depth and by length."""

    method: str
    lengths: list[int]
    rows: list[tuple[str, list[Square]]]


def write_page(path: Path, results: Results) -> None:
    """Write the report.

    Raises:
        OSError: the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["finite"] = math.isfinite
    environment.filters |= {
        "bytes": readable_bytes,
        "count": readable_count,
        "seconds": readable_seconds,
        "figure": _figure,
    }
    settings = results.settings
    text = environment.get_template(TEMPLATE).render(
        results=results,
        title=_title(results),
        header={name: settings[name] for name in _HEADER if settings.get(name) not in (None, {})},
        machine=machine(),
        markers=[(name, i, marker_of(i)) for i, name in enumerate(results.methods)],
        overviews=list(_overviews(results)),
        charts={name: [chart for chart in charts if chart] for name, charts in _charts(results)},
        heatmaps={task: maps for task in results.tasks if (maps := _heatmaps(results, task))},
        differences={task: own for task in results.tasks if (own := _differences(results, task))},
        foreseen=list(_foreseen(results)),
        skipped=[
            (cell, results.forecasts[cell])
            for cell in results.cells
            if cell in results.forecasts and results.forecasts[cell].skipped
        ],
        samples={name: _samples(results, name) for name in results.methods},
        nats=NATS,
        has_open=any(line.open_nbytes for line in results.lines.values()),
    )
    write_whole(path, text.encode())


def _title(results: Results) -> str:
    names = [
        ", ".join(names) if len(names) <= _NAMED else f"{len(names)} {kind}"
        for kind, names in (("methods", results.methods), ("tasks", results.tasks))
    ]
    return f"{results.settings['model']}: {' on '.join(names)}"


# --- tables -------------------------------------------------------------------------------------


def _overviews(results: Results) -> Iterator[dict[str, Any]]:
    """For each length, a table of tasks and methods."""
    cells = {(cell.task, cell.method, cell.tokens): cell for cell in results.cells}
    for tokens in results.lengths:
        rows = []
        for task in results.tasks:
            own = [cells.get((task, method, tokens)) for method in results.methods]
            if any(own):
                score = results.main_score(task)
                rows.append((task, score, [_square(results, cell, score) for cell in own]))
        shares = [task for task, score, _ in rows if score not in ("", NATS)]
        means = [
            Square(mean_of_tasks(results, method, tokens), note="not measured on all")
            for method in results.methods
        ]
        yield {"tokens": tokens, "rows": rows, "means": means if len(shares) > 1 else []}


def _square(results: Results, cell: Cell | None, score: str) -> Square:
    if cell is None:
        return Square()
    forecast, line = results.forecasts.get(cell), results.lines.get(cell)
    if line is not None and score in line.scores:
        note = NATS if score == NATS else ""
        return Square(*line.scores[score], count=line.count, note=note)
    if forecast is not None and forecast.skipped:
        return Square(note=f"skipped: {forecast.skipped}")
    return Square(note=line.error if line is not None else "not measured")


def _heatmaps(results: Results, task: str) -> list[Heatmap]:
    """By decile of the depth, where answers say it."""
    score = results.main_score(task)
    lengths = sorted({cell.tokens for cell in results.cells if cell.task == task})
    maps = []
    for method in results.methods:
        own = [
            one
            for one in results.answers.get((method, task), [])
            if score in one.scores and "decile" in one.meta
        ]
        if own and score != NATS:
            maps.append(Heatmap(method, lengths, list(_by_depth(own, lengths, score))))
    return maps


def _by_depth(
    answers: Sequence[Answer], lengths: Sequence[int], score: str
) -> Iterator[tuple[str, list[Square]]]:
    for decile in range(DECILES):
        squares = []
        for length in lengths:
            values = [
                one.scores[score]
                for one in answers
                if one.tokens == length and one.meta["decile"] == decile
            ]
            mean = statistics.fmean(values) if values else None
            squares.append(Square(mean, count=len(values)))
        yield f"{decile * 100 // DECILES}–{(decile + 1) * 100 // DECILES}%", squares


def _differences(results: Results, task: str) -> list[tuple[str, int, int, Sequence[float]]]:
    """Method, length, how many questions, and the difference of the main score."""
    score = results.main_score(task)
    return [
        (method, one.tokens, one.count, one.scores[score])
        for method, own in results.differences(task).items()
        for one in own
        if score in one.scores
    ]


def _foreseen(results: Results) -> Iterator[dict[str, Any]]:
    """What was foreseen beside what was measured, of cells with both."""
    for cell in results.cells:
        forecast, took = results.forecasts.get(cell), results.took(cell)
        if forecast is not None and forecast.seconds is not None and took is not None:
            seconds, peak, texts = took
            yield {
                "cell": cell,
                "lengths": forecast.lengths,
                "foreseen": forecast.seconds * texts,
                "seconds": seconds,
                "foreseen_bytes": forecast.nbytes,
                "bytes": peak,
            }


def _samples(results: Results, method: str) -> dict[str, list[tuple[str, Answer]]]:
    """Some answers that are right, and some that are not, of all tasks in turn."""
    kinds: dict[str, list[list[tuple[str, Answer]]]] = {"wrong": [], "right": []}
    for task in results.tasks:
        score = results.main_score(task)
        own = [
            one
            for one in results.answers.get((method, task), [])
            if score in one.scores and one.question
        ]
        kinds["wrong"].append([(task, one) for one in own if one.scores[score] < 0.5])
        kinds["right"].append([(task, one) for one in own if one.scores[score] >= 0.5])
    return {kind: _in_turn(own)[:_SHOWN] for kind, own in kinds.items()}


def _in_turn(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """The first of each, then the second of each, and so on."""
    numbered = [(i, n, one) for n, own in enumerate(lists) for i, one in enumerate(own)]
    return [one for _, _, one in sorted(numbered, key=lambda item: item[:2])]


# --- pictures -----------------------------------------------------------------------------------


def _charts(results: Results) -> Iterator[tuple[str, list[Chart | None]]]:
    yield "length", [_by_length(results, task) for task in results.tasks]
    yield "distance", [_by_distance(results, task) for task in results.tasks]
    yield "held", [_by_bytes(results, tokens) for tokens in results.lengths]
    yield "cost", [_seconds(results), _peaks(results)]


def _series(results: Results, points: Mapping[str, Sequence[Point]]) -> list[Series]:
    return [
        Series(name, number, points[name])
        for number, name in enumerate(results.methods)
        if points.get(name)
    ]


def _xs(series: Sequence[Series]) -> list[float]:
    return [point.x for one in series for point in one.points]


def _ys(series: Sequence[Series]) -> list[float]:
    return [point.y for one in series for point in one.points]


def _by_length(results: Results, task: str) -> Chart | None:
    """A task's main score, where there are several lengths."""
    score = results.main_score(task)
    points: dict[str, list[Point]] = {}
    for cell, line in results.lines.items():
        if cell.task == task and score in line.scores:
            mean, low, high = line.scores[score]
            note = ", ".join(filter(None, (f"n = {line.count}", results.shorter(cell))))
            point = Point(cell.tokens, mean, note=note)
            if math.isfinite(high):  # nats of one text have no bounds
                point = Point(cell.tokens, mean, low, high, note)
            points.setdefault(cell.method, []).append(point)
    series = _series(results, points)
    if len(set(_xs(series))) < 2:
        return None
    y = value_axis("nats per token", _ys(series)) if score == NATS else share_axis(score)
    return Chart(task, series, length_axis("tokens", _xs(series)), y)


def _by_distance(results: Results, task: str) -> Chart | None:
    """A task's main score by how far back stands what a question asks for, over all lengths."""
    score = results.main_score(task)
    points: dict[str, list[Point]] = {}
    for method in results.methods:
        kinds: dict[int, dict[Any, list[float]]] = {}
        for one in results.answers.get((method, task), []):
            if score in one.scores and "distance" in one.meta:
                texts = kinds.setdefault(_kind_of(one.meta["distance"]), {})
                texts.setdefault((one.tokens, one.index), []).append(one.scores[score])
        for most, texts in sorted(kinds.items()):
            n = sum(map(len, texts.values()))
            point = Point(most, *mean_interval(list(texts.values())), note=f"n = {n}")
            points.setdefault(method, []).append(point)
    series = _series(results, points)
    if len(set(_xs(series))) < 2 or score == NATS:
        return None
    return Chart(
        task, series, length_axis("distance up to, tokens", _xs(series)), share_axis(score)
    )


def _kind_of(distance: int) -> int:
    """The greatest distance of those that a distance is counted with."""
    most, times = _DISTANCES
    while distance > most:
        most *= times
    return most


def _by_bytes(results: Results, tokens: int) -> Chart | None:
    """The mean of tasks by the bytes that were held at most, at one length."""
    points: dict[str, list[Point]] = {}
    for method in results.methods:
        mean = mean_of_tasks(results, method, tokens)
        held = [
            line.nbytes
            for cell, line in results.lines.items()
            if (cell.method, cell.tokens) == (method, tokens)
        ]
        if mean is not None and held:
            points[method] = [Point(max(held), mean, note=readable_bytes(max(held)))]
    series = _series(results, points)
    if len(series) < 2:
        return None
    title = f"{tokens:,} tokens"
    x = bytes_axis("bytes held", _xs(series))
    return Chart(title, series, x, share_axis("mean of tasks"), has_lines=False)


def _seconds(results: Results) -> Chart | None:
    """Seconds of a text with its questions, by length, the mean of all tasks."""
    points: dict[str, list[Point]] = {}
    for method, tokens, readings in _readings(results):
        seconds = statistics.fmean(one.seconds for one in readings)
        points.setdefault(method, []).append(Point(tokens, seconds, note=f"{len(readings)} texts"))
    series = _series(results, points)
    if not series:
        return None
    y = log_axis("seconds", _ys(series), readable_seconds)
    return Chart("Time of a text with its questions", series, length_axis("tokens", _xs(series)), y)


def _peaks(results: Results) -> Chart | None:
    """Bytes at the highest point, by length."""
    points: dict[str, list[Point]] = {}
    for method, tokens, readings in _readings(results):
        peaks = [one.peak_bytes for one in readings if one.peak_bytes]
        if peaks:
            points.setdefault(method, []).append(Point(tokens, max(peaks)))
    series = _series(results, points)
    if not series:
        return None
    y = bytes_axis("bytes", _ys(series))
    return Chart("Memory at the highest point", series, length_axis("tokens", _xs(series)), y)


def _readings(results: Results) -> Iterator[tuple[str, int, list[Any]]]:
    """What texts took, by method and length."""
    for method in results.methods:
        for tokens in results.lengths:
            found = [
                one
                for cell in results.cells
                if (cell.method, cell.tokens) == (method, tokens)
                for one in readings_of(cell.task, results.of(cell))
            ]
            if found:
                yield method, tokens, found


def _figure(value: float | None, sign: str = "") -> str:
    """A score with two digits; nothing is a dash."""
    if value is None:
        return "–"
    return f"{0.0 if abs(value) < 0.005 else value:{sign}.2f}".replace("-", "−")
