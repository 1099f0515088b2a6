"""A picture of simulated training steps: who works on which layer when, and who waits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cometlm.extras import PLOT, lacks
from cometlm.planner.simulate import Key, Outcome, Span

NAMES = {"wave": "the wave", "naive": "naive split", "layers": "layers split"}
_ABOUT = {
    "wave": "layer by layer over blocks of chunks",
    "naive": "chunk by chunk over blocks of chunks",
    "layers": "chunks are micro-batches",
}
_COLOURS = {"forward": "Blues", "backward": "Oranges"}
_HEAD = (0.35, 0.35, 0.35, 1.0)
_MOST_ROWS = 64  # devices that have a name each


def check_can_draw() -> None:
    """Refuse a picture before the work whose picture it is.

    Raises:
        ValueError: matplotlib is missing.
    """
    if message := lacks("a picture", ["matplotlib"], PLOT):
        raise ValueError(message)


def merged(spans: Sequence[Span]) -> list[Span]:
    """Spans of one device, kind and layer that follow each other without a pause, as one."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.device, span.start)):
        if found and _goes_on(found[-1], span):
            before = found.pop()
            span = Span(before.key, before.device, before.start, span.end)
        found.append(span)
    return found


def _goes_on(before: Span, span: Span) -> bool:
    same = [(one.device, one.key[0], one.key[2]) for one in (before, span)]
    return same[0] == same[1] and span.start - before.end <= 1e-9 * span.end


def draw(outcomes: Sequence[Outcome], layers: int, path: Path) -> None:
    """Write the timelines of several ways to share a step, each on its own scale of time.

    Args:
        outcomes: each gets a field of its own.
        layers: L, for the colours.
        path: a picture file; its ending says which kind (.png, .svg, .pdf).

    Raises:
        ValueError: matplotlib is missing, or an ending that it does not know.
        OSError: the file cannot be written.
    """
    check_can_draw()
    import matplotlib
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    devices = 1 + max(span.device for outcome in outcomes for span in outcome.spans)
    height = 1.1 + 0.16 * min(devices, _MOST_ROWS)
    figure = Figure(figsize=(11, height * len(outcomes)), layout="constrained")
    fields = figure.subplots(len(outcomes), squeeze=False)[:, 0]
    maps = {kind: matplotlib.colormaps[name] for kind, name in _COLOURS.items()}
    for axes, outcome in zip(fields, outcomes, strict=True):
        spans = merged(outcome.spans)
        colours = [_colour(maps, span.key, layers) for span in spans]
        bars = PolyCollection(  # one for all: there may be a million
            [_corners(span) for span in spans], facecolors=colours, linewidths=0, rasterized=True
        )
        axes.add_collection(bars)
        about = f"{NAMES[outcome.name]}, {_ABOUT[outcome.name]}"
        title = f"{about}: {outcome.seconds:,.2f} s, {outcome.bubble:.0%} waiting"
        axes.set_title(title, loc="left", fontsize=9)
        axes.set(xlim=(0, outcome.seconds), ylim=(devices - 0.5, -0.5), ylabel="device")
        axes.grid(axis="x", alpha=0.3)
    fields[-1].set_xlabel("seconds")
    figure.legend(
        handles=_legend(maps), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def _corners(span: Span) -> list[tuple[float, float]]:
    top, bottom = span.device - 0.45, span.device + 0.45
    return [(span.start, top), (span.end, top), (span.end, bottom), (span.start, bottom)]


def _colour(maps: dict[str, Any], key: Key, layers: int) -> tuple[float, ...]:
    kind, _, layer = key
    shade = 0.3 + 0.6 * layer / max(1, layers - 1)
    colour: tuple[float, ...] = maps[kind](shade) if kind in maps else _HEAD
    return colour


def _legend(maps: dict[str, Any]) -> list[Any]:
    from matplotlib.patches import Patch

    shown = [Patch(color=maps[kind](0.6), label=f"{kind}, darker by layer") for kind in maps]
    return [*shown, Patch(color=_HEAD, label="embedding, head and loss")]
