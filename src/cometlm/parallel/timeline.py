"""A picture of simulated training steps: who works on which layer when, and who waits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cometlm.parallel.simulate import Outcome, Span

TITLES = {
    "wave": "the wave: layer by layer over blocks of chunks",
    "naive": "naive split: chunk by chunk over blocks of chunks",
    "layers": "layers split: chunks are micro-batches",
}
_COLOURS = {"forward": "Blues", "backward": "Oranges"}
_HEAD = "0.35"
_MOST_ROWS = 64  # devices that have a name each


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
    """Write the timelines of several ways to share a step, on one scale of time.

    Args:
        outcomes: each gets a field of its own.
        layers: L, for the colours.
        path: a picture file; its ending says which kind (.png, .svg, .pdf).

    Raises:
        ValueError: matplotlib is missing, or an ending that it does not know.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("a picture needs matplotlib; run: pip install matplotlib") from error
    from matplotlib.figure import Figure

    devices = 1 + max(span.device for outcome in outcomes for span in outcome.spans)
    height = 1.1 + 0.16 * min(devices, _MOST_ROWS)
    figure = Figure(figsize=(11, height * len(outcomes)), layout="constrained")
    fields = figure.subplots(len(outcomes), sharex=True, squeeze=False)[:, 0]
    maps = {kind: matplotlib.colormaps[name] for kind, name in _COLOURS.items()}
    for axes, outcome in zip(fields, outcomes, strict=True):
        for span in merged(outcome.spans):
            kind, _, layer = span.key
            shade = 0.3 + 0.6 * layer / max(1, layers - 1)
            colour = maps[kind](shade) if kind in maps else _HEAD
            extent = [(span.start, span.end - span.start)]
            axes.broken_barh(extent, (span.device - 0.45, 0.9), facecolors=colour)
        axes.set_title(
            f"{TITLES[outcome.name]} · {outcome.seconds:,.2f} s, {outcome.bubble:.0%} waiting",
            loc="left",
            fontsize=9,
        )
        axes.set(ylim=(devices - 0.5, -0.5), ylabel="device")
        axes.grid(axis="x", alpha=0.3)
    fields[-1].set_xlabel("seconds")
    figure.legend(
        handles=_legend(maps), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def _legend(maps: dict[str, Any]) -> list[Any]:
    from matplotlib.patches import Patch

    shown = [Patch(color=maps[kind](0.6), label=f"{kind}, darker by layer") for kind in maps]
    return [*shown, Patch(color=_HEAD, label="embedding, head and loss")]
