"""The report as one HTML file that needs nothing else: tables, heatmaps, some answers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.device import readable_bytes
from cometlm.eval.metrics import NATS
from cometlm.eval.report import Line, differences, summarize
from cometlm.eval.runner import Answer

TEMPLATE = "report.html.jinja"
_SHOWN = 10  # answers of each kind
_PREFERRED = ("found", "exact", "f1")  # of several scores, the one that pictures show


@dataclass(frozen=True)
class Cell:
    """A square of a heatmap: the mean of so many answers, None where there are none."""

    mean: float | None
    count: int

    @property
    def shade(self) -> str:
        """Its colour, from red over yellow to green."""
        return "#eee" if self.mean is None else f"hsl({120 * self.mean:.0f} 60% 75%)"


@dataclass(frozen=True)
class Heatmap:
    """Means of one method's score, by a field of `meta` and by length."""

    method: str
    lengths: list[int]
    rows: list[tuple[str, list[Cell]]]


def write_page(
    path: Path, settings: Mapping[str, Any], found: Mapping[str, Sequence[Answer]]
) -> None:
    """Write the report.

    Args:
        settings: what was measured, shown as it is.
        found: each method's answers.

    Raises:
        OSError: the file cannot be written.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["bytes"] = readable_bytes
    lines = {name: summarize(answers) for name, answers in found.items()}
    scores = list(dict.fromkeys(s for own in lines.values() for one in own for s in one.scores))
    main = next((name for name in _PREFERRED if name in scores), scores[0] if scores else "")
    first = next(iter(found), "")
    text = environment.get_template(TEMPLATE).render(
        settings={name: value for name, value in settings.items() if value not in (None, {})},
        scores=scores,
        main=main,
        lines=lines,
        bars=_bars(lines, main),
        first=first,
        differences={
            name: differences(found[name], found[first]) for name in found if name != first
        },
        heatmaps=[_heatmap(name, answers, main) for name, answers in found.items()],
        samples={name: _samples(answers, main) for name, answers in found.items()},
    )
    write_whole(path, text.encode())


def _bars(lines: Mapping[str, Sequence[Line]], score: str) -> list[dict[str, Any]]:
    """A bar for each method and length: its share of the longest bar, and what it stands for."""
    figures = [
        (name, line, line.scores[score]) for name, own in lines.items() for line in own
        if score in line.scores
    ]  # fmt: skip
    most = max((mean for _, _, (mean, _, _) in figures), default=1.0) if score == NATS else 1.0
    return [
        {
            "method": name,
            "tokens": line.tokens,
            "mean": mean,
            "width": 100 * mean / (most or 1.0),
            "nbytes": line.nbytes,
        }
        for name, line, (mean, _, _) in figures
    ]


def _heatmap(method: str, answers: Sequence[Answer], score: str) -> Heatmap | None:
    """By decile of the depth, where answers say it; None where they do not."""
    own = [one for one in answers if score in one.scores and "decile" in one.meta]
    if not own or score == NATS:
        return None
    lengths = sorted({one.tokens for one in own})
    rows = []
    for decile in range(10):
        cells = []
        for length in lengths:
            values = [
                one.scores[score]
                for one in own
                if one.tokens == length and one.meta["decile"] == decile
            ]
            cells.append(Cell(statistics.fmean(values) if values else None, len(values)))
        rows.append((f"{decile * 10}–{decile * 10 + 10}%", cells))
    return Heatmap(method, lengths, rows)


def _samples(answers: Sequence[Answer], score: str) -> dict[str, list[Answer]]:
    """Some answers that are right, and some that are not."""
    scored = [one for one in answers if score in one.scores and one.question]
    kinds = {
        "wrong": [one for one in scored if one.scores[score] < 0.5],
        "right": [one for one in scored if one.scores[score] >= 0.5],
    }
    return {name: own[:_SHOWN] for name, own in kinds.items()}
