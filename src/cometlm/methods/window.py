"""Attention sinks and a sliding window: the first tokens and the last ones stay in the KV cache.

It follows StreamingLLM, with which a backbone writes on fluently without end. What is not as there:

- Tokens are read in pieces of a quarter of the budget and the window slides after each piece, so a
  token sees up to a quarter more than the budget. An answer is written without sliding.
- There, tokens have their place in the cache for position. Here the window's tokens keep their
  positions in the text, and the sinks are moved right in front of them by computing them again.
  Rotary attention sees distances only, so the numbers are the same up to rounding. Backbones
  without rotary positions are refused. Rotary scalings that depend on the length see the whole
  text's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cometlm.compat import CACHE
from cometlm.methods.base import Bounds, Budget, Method
from cometlm.methods.full import CacheReader, token_limit
from cometlm.methods.loader import Loader, max_positions

SINKS = 4
_PIECES = 4
_DEFAULT = 1024  # where neither the budget nor the model says


class Window(Method):
    """Keeps the first four tokens and the last ones."""

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> WindowReader:
        """See `Method.open`; the sinks and the window fill the budget.

        A budget of None is half of the model's positions, since a piece, a question and an answer
        stand behind the window.
        """
        model = loader.backbone()
        positions = max_positions(model)
        most = None if positions is None else max(SINKS + 1, positions // 2)
        return WindowReader(model, loader.tokenizer, token_limit(model, budget, most) or _DEFAULT)


class WindowReader(CacheReader):
    """A backbone and the part of its KV cache that slides along.

    Args:
        model: the backbone, with rotary positions.
        tokenizer: its tokenizer.
        held: tokens whose keys and values are held, the sinks among them.

    Raises:
        ValueError: another backbone, or a budget that has no room behind the sinks.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, held: int) -> None:
        super().__init__(model, tokenizer)
        if not getattr(model.config.get_text_config(), "rope_parameters", None):
            raise ValueError(
                f"a window needs rotary positions, which {model.config.model_type} does not have"
            )
        if held <= SINKS:
            raise ValueError(f"budget of a window must be more than {SINKS}, got {held}")
        self._cache = DynamicCache()  # layers that slide by themselves would forget the sinks
        self.piece = min(self.piece, max(1, held // _PIECES))
        self._held = held
        self._position = 0  # of the next token

    @property
    def bounds(self) -> Bounds:
        """See `Reader.bounds`: the window with its sinks."""
        return Bounds(asked=self._held, held=self._held)

    def _forward(self, ids: list[int], logits_to_keep: int) -> Tensor:
        logits = super()._forward(ids, logits_to_keep)
        self._position += len(ids)
        self._slide()
        return logits

    def _positions(self, count: int) -> dict[str, Tensor]:
        places = torch.arange(self._position, self._position + count, device=self.model.device)
        return {"position_ids": places[None]}

    def _positions_of_prompt(self) -> dict[str, Tensor]:
        waiting = self._positions(len(self._waiting))["position_ids"]
        # What is in the cache has its positions; of these only the number counts.
        return {"position_ids": torch.nn.functional.pad(waiting, (len(self._cached), 0))}

    @torch.no_grad()
    def _slide(self) -> None:
        """Forget what is between the sinks and the window, and move the sinks to the window."""
        surplus = len(self._cached) - self._held
        if surplus <= 0:
            return
        del self._cached[SINKS : SINKS + surplus]
        first = self._position - (self._held - SINKS)  # of the window
        sinks = DynamicCache()
        places = torch.arange(first - SINKS, first, device=self.model.device)
        ids = self._tensor(self._cached[:SINKS])
        self.model(ids, use_cache=True, position_ids=places[None], **{CACHE: sinks})
        kept = self._held - SINKS
        layers: Any = zip(self._cache.layers, sinks.layers, strict=True)
        for layer, moved in layers:
            layer.keys = torch.cat([moved.keys, layer.keys[:, :, -kept:]], dim=2)
            layer.values = torch.cat([moved.values, layer.values[:, :, -kept:]], dim=2)
