"""An inspection as a folder: one HTML page that needs nothing else, pictures, and the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.device import readable_bytes
from cometlm.inspection.attention import PARTS
from cometlm.inspection.explanation import Explanation
from cometlm.inspection.numbers import numbers
from cometlm.inspection.pictures import (
    COLOURS,
    Picture,
    pictures_of_answer,
    pictures_of_reading,
    why_none,
)
from cometlm.inspection.session import InspectedSession

PAGE, NUMBERS = "index.html", "inspection.json"
_TEMPLATE = "page.html.jinja"
_SOURCES = 3  # chunks whose text is shown
_HEADS = 8
_MOST_TOKENS = 600  # of a passage's text, at its beginning and at its end each


@dataclass(frozen=True)
class Source:
    """A passage that an answer leaned on.

    Attributes:
        chunks: its number, or first and last.
        begin, end: its text tokens.
        held: its share of what global memory held; None without one.
        looked: its share of what the answer looked at in global memory; None without one.
        mass: its share of all attention, through both memories.
        text: what it said, or as much as is known of it.
    """

    chunks: str
    begin: int
    end: int
    held: float | None
    looked: float | None
    mass: float
    text: str


@dataclass(frozen=True)
class Piece:
    """Some text and how much it was looked at: `shade` 0 … 1 of the most, `mass` of all."""

    text: str
    shade: float
    mass: float


def sources(explanation: Explanation, most: int = _SOURCES) -> list[Source]:
    """The passages that an answer leaned on most, the first one most of all."""
    history = explanation.history
    looked = explanation.passages.mean(0)
    total = float(looked.sum())
    held = history.shares.mean((0, 1)) if history.shares.shape[1] else None
    found = []
    for i in explanation.traced.argsort(descending=True)[:most].tolist():
        one = history.passages[i]
        last = one.first + one.count - 1
        found.append(
            Source(
                chunks=str(one.first) if one.count == 1 else f"{one.first}–{last}",
                begin=one.begin,
                end=one.end,
                held=None if held is None else float(held[i]),
                looked=None if held is None else float(looked[i]) / (total or 1.0),
                mass=float(explanation.traced[i]),
                text=_text_of(explanation.session, one.begin, one.end),
            )
        )
    return found


def write(
    folder: Path, session: InspectedSession, explanation: Explanation | None, note: str = ""
) -> None:
    """Write page, numbers and, where matplotlib is installed, pictures into a folder.

    Args:
        folder: made if it is not there; files of these names are replaced.
        note: stands on top of the page.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lacking = why_none()
    reading = [] if lacking else pictures_of_reading(session)
    answer = pictures_of_answer(explanation) if explanation and not lacking else []
    for picture in [*reading, *answer]:
        picture.save(folder)
    found = json.dumps(numbers(session, explanation), separators=(",", ":"))
    write_whole(folder / NUMBERS, found.encode())
    page = _rendered(session, explanation, {"reading": reading, "answer": answer}, lacking, note)
    write_whole(folder / PAGE, page.encode())


def _rendered(
    session: InspectedSession,
    explanation: Explanation | None,
    pictures: dict[str, list[Picture]],
    lacking: str | None,
    note: str,
) -> str:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["bytes"] = readable_bytes
    environment.filters["percent"] = percent
    shown = {name: [(one, one.svg()) for one in some] for name, some in pictures.items()}
    answer: dict[str, Any] = {}
    if explanation is not None:
        answer = {
            "asked": explanation,
            "parts": list(
                zip(
                    PARTS,
                    COLOURS,
                    explanation.parts.mean((0, 1, 2)).tolist(),
                    explanation.other_parts.mean((0, 1)).tolist(),
                    strict=True,
                )
            ),
            "sources": sources(explanation),
            "heads": _top_heads(explanation),
            "entries": _entry_pieces(explanation),
            "open": _open_pieces(explanation),
        }
    return environment.get_template(_TEMPLATE).render(
        model=session.model.config.backbone or "a model",
        sizes=session.model.config.comet_config,
        stats=session.stats(),
        history=session.history,
        unseen=not all(one.is_seen for one in session.history.passages),
        layers=_per_layer(session),
        pictures=shown,
        lacking=lacking,
        note=note,
        **answer,
    )


def percent(share: float | None) -> str:
    """A share as people read it; None and NaN are unknown."""
    if share is None or share != share:
        return "unknown"
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def _per_layer(session: InspectedSession) -> list[dict[str, float]]:
    """A row of numbers for each layer: mean gate, mean age, norm, attention on memory."""
    history = session.history
    gates, masses = history.mean("gates"), history.mean("masses")
    if gates is None or masses is None:
        return []
    means = (gates.mean(1), history.ages.mean(1), session.norms().mean(1), masses.mean(1))
    rows = zip(*means, strict=False)
    return [
        {
            "gate": float(gate),
            "age": float(age),
            "norm": float(norm),
            "global": float(mass[0]),
            "temporary": float(mass[1]),
        }
        for gate, age, norm, mass in rows
    ]


def _top_heads(explanation: Explanation) -> list[dict[str, Any]]:
    """Heads that looked most at global memory, and the passage that they looked at."""
    masses = explanation.parts.mean(2)[..., 0]  # [L, H]
    if not explanation.history.passages or not explanation.history.shares.shape[1]:
        return []
    found = []
    for place in masses.flatten().argsort(descending=True)[:_HEADS].tolist():
        layer, head = divmod(place, masses.shape[1])
        traced = explanation.passages_by_head[layer, head]
        best = int(traced.argmax())
        one = explanation.history.passages[best]
        total = float(traced.sum())
        share = float(traced[best]) / (total or 1.0)
        mass = float(masses[layer, head])
        found.append({"layer": layer, "head": head, "mass": mass, "passage": one, "share": share})
    return found


# --- text ---------------------------------------------------------------------------------------


def _text_of(session: InspectedSession, begin: int, end: int) -> str:
    """Text of a passage; of a long one its beginning and its end."""

    def text(begin: int, end: int) -> str:
        found: str = session.tokenizer.decode(session.token_ids(begin, end))
        return found.strip("\ufffd")  # characters that a border cuts

    if end - begin <= 2 * _MOST_TOKENS:
        return text(begin, end)
    ends = text(begin, begin + _MOST_TOKENS), text(end - _MOST_TOKENS, end)
    return "\n[…]\n".join(ends) if any(ends) else ""


def _entry_pieces(explanation: Explanation) -> list[Piece]:
    """The text behind temporary memory, shaded by how much its entries were looked at."""
    groups, masses = [], []
    for entry, mass in zip(explanation.history.entries, explanation.entries.mean(0), strict=True):
        ids = [] if entry is None else explanation.session.token_ids(entry.begin, entry.end)
        if ids:
            groups.append(ids)
            masses.append(float(mass))
    return _pieces(explanation, groups, masses)


def _open_pieces(explanation: Explanation) -> list[Piece]:
    """The open chunk's text, shaded; the first token takes the shade of none."""
    ids = [*explanation.open_ids, *explanation.answer_ids[:-1]]
    return _pieces(explanation, [[one] for one in ids], explanation.chunk.mean(0).tolist())


def _pieces(
    explanation: Explanation, groups: Sequence[list[int]], masses: Sequence[float]
) -> list[Piece]:
    """Groups of tokens as text; the shade is of the most, the very first token left aside."""
    most = max(masses[1:], default=0.0) or 1.0
    texts = _decoded(explanation.session.tokenizer, groups)
    return [
        Piece(text, min(1.0, mass / most), mass) for text, mass in zip(texts, masses, strict=True)
    ]


def _decoded(tokenizer: Any, groups: Sequence[list[int]]) -> Iterator[str]:
    """Text of each group of tokens where it stands: what it adds to the text before it.

    A character whose bytes are in two groups is the second one's; what is left of one that began in
    front of the first group is left out.
    """
    before: list[int] = []  # from a border of characters on
    new: list[int] = []
    shown = ""  # of both
    for ids in groups:
        new = [*new, *ids]
        text: str = tokenizer.decode([*before, *new])
        is_whole = text.startswith(shown) and not text.endswith("\ufffd")
        added = text[len(shown) :] if is_whole else ""
        yield added if before else added.lstrip("\ufffd")
        if is_whole:
            before, new = new, []
            shown = tokenizer.decode(before)
