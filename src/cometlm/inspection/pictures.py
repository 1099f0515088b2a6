"""Pictures of an inspection, each with its title and a sentence that says how to read it.

They are narrow, so that they can be read on a telephone, and as large however long the text is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cometlm.extras import PLOT, lacks
from cometlm.inspection.attention import PARTS
from cometlm.inspection.explanation import Explanation
from cometlm.inspection.history import History, Passage
from cometlm.inspection.session import InspectedSession

COLOURS = ("#d1495b", "#edae49", "#c9ccd1", "#30638e")  # of PARTS
_WIDTH = 5.4  # inches
_MOST_ROWS = 16  # of a layer's slots
_MOST_TOKENS = 40  # of an answer
_MANY_DOTS = 2000
_STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": "medium",
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "cometlm",
}


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, without an ending.
        title: what it shows.
        how: how to read it.
        figure: matplotlib's.
    """

    name: str
    title: str
    how: str
    figure: Any

    def svg(self) -> str:
        """As an element of a page."""
        text = io.StringIO()
        with _style():
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2].strip()

    def save(self, folder: Path) -> None:
        """As a PNG."""
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)


def why_none() -> str | None:
    """What pictures lack here, and the command that brings it; None: nothing."""
    return lacks("pictures", ["matplotlib"], PLOT)


def pictures_of_reading(session: InspectedSession) -> list[Picture]:
    """What happened while the text was read; none where nobody looked on."""
    with _style():
        return _of_reading(session)


def pictures_of_answer(explanation: Explanation) -> list[Picture]:
    """Where an answer's tokens looked."""
    with _style():
        return _of_answer(explanation)


def _of_reading(session: InspectedSession) -> list[Picture]:
    history = session.history
    if history.mean("masses") is None:
        return []
    own = [_gates(history), _shares(history), _ages(history)] if history.shares.shape[1] else []
    return [*own, _attention(history)]


def _of_answer(explanation: Explanation) -> list[Picture]:
    found = [_parts_of_answer(explanation)]
    if explanation.history.passages:
        found = [_sources(explanation), _tokens(explanation), *found, _heads(explanation)]
    return found


# --- reading ------------------------------------------------------------------------------------


def _gates(history: History) -> Picture:
    passages = history.passages
    gates = torch.stack([one.gates for one in passages], dim=-1)  # [L, M, T]
    rows = _pooled(gates, _MOST_ROWS)
    layers, slots, _ = rows.shape
    figure, axes = _new(2 + 0.13 * min(layers, 40))
    mesh = _map(axes, rows.flatten(0, 1), _edges(passages), cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(*_ticks(layers, slots))
    axes.set(xlabel="chunk", ylabel="layer (each with its slots)")
    label = "share of the old state kept (gate g)"
    figure.colorbar(mesh, label=label, location="top", aspect=40)
    how = (
        "Each column is a chunk, each thin row a slot of the global memory, layer 0 on top. "
        "Yellow: the slot stayed as it was. Dark: it was overwritten with what this chunk said; so "
        "a dark column is a chunk that the memory kept. The first chunk fills all slots."
    )
    if gates.shape[1] > slots:
        how += f" A row is the mean of {-(-gates.shape[1] // slots)} slots."
    return Picture("gates", "What the gates let through", how, figure)


def _shares(history: History) -> Picture:
    shares = history.shares.mean(1)
    figure, axes = _new(1.6 + 0.09 * min(len(shares), 50))
    mesh = _map(axes, shares, _edges(history.passages), cmap="Reds", vmin=0, vmax=1)
    axes.set_yticks(*_ticks(len(shares), 1))
    axes.set(xlabel="chunk", ylabel="layer")
    label = "share of the layer's global memory that came from the chunk"
    figure.colorbar(mesh, label=label, location="top", aspect=40)
    how = (
        "Where the content of the global memory came in, when all was read. Each row adds up to 1. "
        "A dark square is a chunk that most slots of the layer still hold; a chunk that is white "
        "everywhere is gone from the global memory, whatever was in it."
    )
    return Picture("shares", "What the global memory holds at the end", how, figure)


def _ages(history: History) -> Picture:
    layers, slots = history.ages.shape
    figure, axes = _new(1.4 + 0.09 * min(layers, 50))
    known = [one for one in history.entries if one is not None]
    if known:
        span = (history.end - known[-1].end, history.end - known[0].begin)
        axes.axvspan(*span, color=COLOURS[1], alpha=0.45, lw=0, label="temporary memory")
    rows = torch.arange(layers)[:, None].expand(-1, slots)
    axes.plot(
        history.ages.flatten().tolist(),
        rows.flatten().tolist(),
        ".",
        color=COLOURS[0],
        alpha=0.5,
        markersize=4,
        label="a slot of global memory",
        rasterized=layers * slots > _MANY_DOTS,
    )
    axes.set(ylim=(layers - 0.5, -0.5), xlabel="tokens back from the end of the last chunk")
    axes.set_ylabel("layer")
    axes.set_xlim(history.end, 0)  # the end of the text on the right
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    how = (
        "Each dot is a slot; it stands at the mean age of what it holds, counted from the end of "
        "the chunks that it came from. On the right is what was read last. The temporary memory "
        "reaches back over the shaded stretch and no further: what is older is in the global "
        "memory or lost."
    )
    return Picture("ages", "How old the memory is", how, figure)


def _attention(history: History) -> Picture:
    masses = history.mean("masses")
    assert masses is not None
    figure, axes = _new(3.6 + 0.09 * min(len(masses), 50), rows=2, ratios=(2, 1))
    _stacked(axes[0], masses.mean(1))
    passages = history.passages
    over_time = torch.stack([one.masses.mean((0, 1)) for one in passages])  # [T, P]
    at = [one.first + (one.count - 1) / 2 for one in passages]
    for part in (0, 1):
        axes[1].plot(at, _percents(over_time[:, part]), ".-", color=COLOURS[part], markersize=3)
    axes[1].set(xlabel="chunk", ylabel="% of attention", ylim=(0, None), xlim=_limits(passages))
    _legend(figure)
    how = (
        "Above: of all that the text's words looked at, layer by layer, which share was memory and "
        "which their own chunk (all chunks but the first). Below: the two memories, chunk by "
        "chunk, mean over layers and heads. The first token of a chunk is shown apart, since many "
        "models attend to it where nothing else matters (an attention sink)."
    )
    return Picture("attention", "What words look at while reading", how, figure)


# --- an answer ----------------------------------------------------------------------------------


def _sources(explanation: Explanation) -> Picture:
    passages = explanation.history.passages
    temporary = explanation.traced - explanation.passages.mean(0)
    figure, axes = _new(4.2, rows=2, sharex=True)
    edges = _edges(passages)
    widths = [end - begin for begin, end in pairwise(edges)]
    centres = [begin + width / 2 for begin, width in zip(edges, widths, strict=False)]
    bars: Any = {"width": [0.8 * width for width in widths]}
    if explanation.history.shares.shape[1]:
        held = explanation.history.shares.mean((0, 1))
        looked = _normed(explanation.passages.mean(0))
        others = _normed(explanation.other_passages)
        axes[0].bar(centres, _percents(held), **bars, color="#dddddd", label="held")
        axes[0].bar(
            centres,
            _percents(looked),
            width=[0.4 * width for width in widths],
            color=COLOURS[0],
            label="the answer looked at",
        )
        axes[0].plot(
            centres,
            _percents(others),
            "_",
            color="black",
            markersize=9,
            label="other words looked at",
        )
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes[0].set_ylabel("% of global memory")
    below = _percents(explanation.passages.mean(0))
    axes[1].bar(centres, below, **bars, color=COLOURS[0])
    axes[1].bar(centres, _percents(temporary), **bars, bottom=below, color=COLOURS[1])
    top = 110 * float(explanation.traced.max())
    axes[1].set(xlabel="chunk", ylabel="% of all attention", xlim=(edges[0], edges[-1]))
    axes[1].set_ylim(0, top or 1)
    how = (
        "Above: how the global memory is made up (grey), and how that part of it is made up which "
        "the answer's words looked at (red; marks: the same for the other words of the chunk). Red "
        "higher than grey and mark: the answer picked this chunk out. Below: the same looks as a "
        "share of all attention, with the temporary memory (yellow) on top."
    )
    return Picture("sources", "Which chunks the answer leaned on", how, figure)


def _tokens(explanation: Explanation) -> Picture:
    passages = explanation.history.passages
    shown = explanation.answer_ids[:_MOST_TOKENS]
    rows = _normed(explanation.traced_by_token[: len(shown)])
    figure, axes = _new(1.5 + 0.19 * len(shown))
    mesh = _map(axes, rows, _edges(passages), cmap="Reds", vmin=0, vmax=1)
    names = [_name(explanation, token) for token in shown]
    axes.set_yticks(range(len(shown)), names, family="monospace")
    axes.set_xlabel("chunk")
    label = "share of the attention on memory"
    figure.colorbar(mesh, label=label, location="top", aspect=40)
    how = (
        "Each row is a word piece of the answer, from top to bottom; each column a chunk of the "
        "text. Of what the piece looked at in both memories, a darker square is a larger share."
    )
    if len(explanation.answer_ids) > len(shown):
        how += f" The first {len(shown)} pieces."
    return Picture("tokens", "The answer, piece by piece", how, figure)


def _parts_of_answer(explanation: Explanation) -> Picture:
    masses = explanation.parts.mean((1, 2))
    figure, axes = _new(1.4 + 0.09 * min(len(masses), 50))
    _stacked(axes, masses)
    _legend(figure)
    how = (
        "Of all that the answer's words looked at, layer by layer, which share was memory and "
        "which the open chunk, where the question and the words before it stand."
    )
    return Picture("parts", "Memory or open chunk", how, figure)


def _heads(explanation: Explanation) -> Picture:
    masses = explanation.parts.mean(2)  # [L, H, P]
    figure, axes = _new(1.6 + 0.09 * min(len(masses), 50), columns=2, sharey=True)
    for part in (0, 1):
        mesh = _map(axes[part], masses[..., part], None, cmap="Reds", vmin=0, vmax=1)
        axes[part].set(xlabel="head", title=PARTS[part])
    axes[0].set_ylabel("layer")
    figure.colorbar(mesh, ax=list(axes), label="share of the head's attention", aspect=30)
    how = (
        "Each square is one attention head, and how much of what it looked at for the answer was "
        "memory. A few dark squares are usual: most heads never look at the memory, and some look "
        "at nothing else when there is something to fetch."
    )
    return Picture("heads", "Which heads read the memory", how, figure)


# --- drawing ------------------------------------------------------------------------------------


def _style() -> Any:
    """How all pictures look, for as long as they are drawn."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _new(height: float, rows: int = 1, columns: int = 1, ratios: Any = None, **more: Any) -> Any:
    """A figure and its axes, which belong to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, height_ratios=ratios, **more)


def _map(axes: Any, values: Tensor, edges: Sequence[float] | None, **colours: Any) -> Any:
    """Values [rows, columns] as squares, the first row on top; grey where they are unknown."""
    rows, columns = values.shape
    x = [i - 0.5 for i in range(columns + 1)] if edges is None else edges
    y = [i - 0.5 for i in range(rows + 1)]
    axes.set_facecolor("#dddddd")
    mesh = axes.pcolormesh(x, y, values.numpy(), rasterized=True, **colours)
    axes.set_ylim(rows - 0.5, -0.5)
    _whole_numbers(axes.xaxis)
    if edges is None:
        _whole_numbers(axes.yaxis)
    return mesh


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _stacked(axes: Any, masses: Tensor) -> None:
    """A bar for each layer, of its parts [L, P]."""
    layers = len(masses)
    before = masses.cumsum(1) - masses
    for part, colour in enumerate(COLOURS):
        bars = {"width": _percents(masses[:, part]), "left": _percents(before[:, part])}
        axes.barh(range(layers), **bars, color=colour, height=0.85)
    axes.set(ylim=(layers - 0.5, -0.5), xlim=(0, 100), ylabel="layer", xlabel="% of attention")
    _whole_numbers(axes.yaxis)


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    shown = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, PARTS, strict=True)]
    figure.legend(handles=shown, loc="outside upper center", ncols=2, frameon=False)


def _edges(passages: Sequence[Passage]) -> list[float]:
    """Where passages begin on an axis of chunks, and where the last one ends."""
    last = passages[-1]
    return [one.first - 0.5 for one in passages] + [last.first + last.count - 0.5]


def _limits(passages: Sequence[Passage]) -> tuple[float, float]:
    edges = _edges(passages)
    return edges[0], edges[-1]


def _ticks(layers: int, rows: int) -> tuple[list[float], list[str]]:
    """Some layers' numbers, in the middle of their rows."""
    every = max(1, -(-layers // 15))
    shown = range(0, layers, every)
    return [rows * i + (rows - 1) / 2 for i in shown], [str(i) for i in shown]


def _pooled(values: Tensor, most: int) -> Tensor:
    """Means of neighbouring slots of [L, M, T], at most so many."""
    each = -(-values.shape[1] // most)
    return torch.stack([some.mean(1) for some in values.split(each, dim=1)], dim=1)


def _normed(values: Tensor) -> Tensor:
    """Shares that add up to 1 over the last axis; 0 where there is nothing."""
    return values / values.sum(-1, keepdim=True).clamp(min=1e-12)


def _percents(shares: Tensor) -> list[float]:
    found: list[float] = (100 * shares).tolist()
    return found


def _name(explanation: Explanation, token: int) -> str:
    """A token as a label: on one line, and nothing that matplotlib takes for mathematics."""
    shown: str = repr(explanation.session.tokenizer.decode([token]))[1:-1]
    return shown.replace(" ", "·").replace("$", r"\$").replace("\ufffd", "▯")
