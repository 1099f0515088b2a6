"""An inspection as plain JSON values."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cometlm.inspection.attention import PARTS
from cometlm.inspection.explanation import Explanation
from cometlm.inspection.history import Passage
from cometlm.inspection.session import InspectedSession


def numbers(session: InspectedSession, explanation: Explanation | None = None) -> dict[str, Any]:
    """All that is known, under the names of the classes' fields.

    Tensors are nested lists, rounded to four digits; null is unknown. `axes` names their axes.
    """
    history = session.history
    stats = session.stats()
    found: dict[str, Any] = {
        "backbone": session.model.config.backbone,
        "sizes": session.model.config.comet_config.to_dict(),
        "tokens": stats.tokens,
        "chunks": stats.chunks,
        "memory_bytes": stats.memory_bytes,
        "parts": list(PARTS),
        "axes": dict(_AXES),
        "passages": [_passage(one) for one in history.passages],
        "shares": plain(history.shares),
        "ages": plain(history.ages),
        "norms": plain(session.norms()),
        "entries": [one and [one.chunk, one.begin, one.end] for one in history.entries],
    }
    if explanation is not None:
        tensors = ("parts", "passages", "passages_by_head", "entries", "chunk", "other_parts")
        found["answer"] = {
            "question": explanation.question,
            "answer": explanation.answer,
            "answer_ids": list(explanation.answer_ids),
            "num_answer_tokens": explanation.num_answer_tokens,
            "open_ids": list(explanation.open_ids),
            "passages_at_question": [_passage(one) for one in explanation.history.passages],
            **{name: plain(getattr(explanation, name)) for name in tensors},
            "other_passages": plain(explanation.other_passages),
            "traced": plain(explanation.traced),
        }
    return found


_AXES = {
    "passages.gates": "layer, slot",
    "passages.masses": "layer, head, part",
    "shares": "layer, slot, passage",
    "ages": "layer, slot",
    "norms": "layer, slot",
    "entries": "entry; then chunk, first token, end",
    "answer.parts": "layer, head, token of the answer, part",
    "answer.passages": "token of the answer, passage",
    "answer.passages_by_head": "layer, head, passage",
    "answer.entries": "token of the answer, entry",
    "answer.chunk": "token of the answer, text token of the open chunk",
    "answer.other_parts": "layer, head, part",
    "answer.other_passages": "passage",
    "answer.traced": "passage",
}


def _passage(passage: Passage) -> dict[str, Any]:
    return {
        "first": passage.first,
        "count": passage.count,
        "begin": passage.begin,
        "end": passage.end,
        "gates": plain(passage.gates),
        "masses": plain(passage.masses),
    }


def plain(values: Tensor | list[Any] | float) -> Any:
    """Nested lists of numbers with four digits; None for what is not finite."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [plain(one) for one in values]
    return float(f"{values:.4g}") if math.isfinite(values) else None
