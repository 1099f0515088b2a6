"""Where an answer's tokens looked: at which part of the row, and at which passages of the text.

Attention says where a layer looked, not what it used: a value that is looked at may be small, and
what was read in a lower layer may be passed on by words in between. Compare with what the other
tokens of the chunk looked at, which is given beside it.

Legend: L layers, H heads, A tokens of the answer, T passages, E entries, n text tokens of the open
chunk, P parts of the row (`attention.PARTS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cometlm.inspection.attention import LayerAttention
from cometlm.inspection.history import History

if TYPE_CHECKING:
    from cometlm.inspection.session import InspectedSession


@dataclass(frozen=True)
class Explanation:
    """An answer, and where its tokens looked. Masses are shares of all attention.

    Attributes:
        question: what was asked.
        answer: what was said.
        answer_ids: the tokens that are explained, A of them.
        num_answer_tokens: how many there are, special ones at the end not counted.
        open_ids: text of the open chunk that the answer begins in, the question last.
        history: of the memory that the answer was read from.
        session: the fork that was asked.
        parts: mass on each part of the row [L, H, A, P].
        passages: mass on global memory, traced to passages by what its slots hold: means over
            layers and heads [A, T].
        passages_by_head: the same, means over the answer [L, H, T].
        entries: mass on each entry of temporary memory [A, E], means over layers and heads.
        chunk: mass on each text token of the open chunk [A, n + A − 1], the answer's last.
        other_parts, other_passages: as `parts` [L, H, P] and `passages` [T], means over the text
            and the question of the open chunk.
    """

    question: str
    answer: str
    answer_ids: tuple[int, ...]
    num_answer_tokens: int
    open_ids: tuple[int, ...]
    history: History
    session: InspectedSession
    parts: Tensor
    passages: Tensor
    passages_by_head: Tensor
    entries: Tensor
    chunk: Tensor
    other_parts: Tensor
    other_passages: Tensor

    @property
    def traced_by_token(self) -> Tensor:
        """Mass on memory of both kinds, traced to passages [A, T]."""
        found = self.passages.clone()
        for entry, mass in zip(self.history.entries, self.entries.unbind(1), strict=True):
            if entry is not None:
                found[:, self.history.passage_of(entry)] += mass
        return found

    @property
    def traced(self) -> Tensor:
        """The same, means over all tokens [T]."""
        return self.traced_by_token.mean(0)


class Tally:
    """Adds up, layer by layer, where the last text tokens of a step look.

    Args:
        history: of the memory that is read.
        answer: how many tokens say the answer, A.
    """

    def __init__(self, history: History, answer: int) -> None:
        self._history = history
        self._answer = answer
        self._layers: list[dict[str, Tensor]] = []

    def __call__(self, layer: int, attention: LayerAttention) -> None:
        """Take in one layer; see `watching`."""
        text = attention.layout.text_index[0].to(attention.query.device)
        others, saying = text[: -self._answer], text[-self._answer :]
        weights = attention.weights(saying)  # [H, A, S]
        # The first token of a text says an answer without a question: then there are no others.
        beside = attention.mean_weights(others if len(others) else saying)
        first, memory = attention.global_slots, attention.memory_slots
        shares = self._history.shares[layer, :first].to(weights)
        traced = weights[..., :first] @ shares
        self._layers.append(
            {
                "parts": attention.parts(weights),
                "passages": traced.mean(0),
                "passages_by_head": traced.mean(1),
                "entries": weights[..., first:memory].mean(0),
                "chunk": weights[..., memory + text].mean(0),
                "other_parts": attention.parts(beside),
                "other_passages": (beside[:, :first] @ shares).mean(0),
            }
        )

    def found(self) -> dict[str, Any]:
        """The fields of `Explanation` of these names."""
        stacked = {
            name: torch.stack([layer[name].float().cpu() for layer in self._layers])
            for name in self._layers[0]
        }
        each = ("parts", "passages_by_head", "other_parts")
        return {name: x if name in each else x.mean(0) for name, x in stacked.items()}
