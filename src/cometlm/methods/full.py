"""Full attention: the plain backbone with its KV cache, which grows with every token."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cometlm.compat import CACHE
from cometlm.core.foreseen import Foreseen, foreseen
from cometlm.methods.base import Budget, Method, Reader, TooLongError, generation_options
from cometlm.methods.loader import Loader, max_positions

_AT_A_TIME = 512  # tokens of a forward pass
_APPENDING = (DynamicLayer, DynamicSlidingWindowLayer)


class Full(Method):
    """Holds keys and values of all that was read; an error when its positions run out.

    The text, the question and the answer together stay within the budget.
    """

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> CacheReader:
        """See `Method.open`."""
        model = loader.backbone()
        return CacheReader(model, loader.tokenizer, token_limit(model, budget))


class CacheReader(Reader):
    """A backbone and its KV cache.

    The last token that was read waits outside the cache, so that what follows it can be computed
    at any time.

    Args:
        model: the backbone.
        tokenizer: its tokenizer.
        limit: most tokens of the text, the question and the answer; None is any number.

    Attributes:
        piece: most tokens of one forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, limit: int | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limit = limit
        self.piece = _AT_A_TIME
        self._cache = DynamicCache(config=model.config)
        self._cached: list[int] = []  # ids whose keys and values are held
        self._waiting: list[int] = []  # those behind them

    def read(self, ids: Sequence[int]) -> None:
        """See `Reader.read`."""
        self.check_room(len(ids))
        self._waiting += ids
        while len(self._waiting) > 1:
            piece = self._waiting[: min(self.piece, len(self._waiting) - 1)]
            self._forward(piece, logits_to_keep=1)
            del self._waiting[: len(piece)]

    def fork(self) -> CacheReader:
        """See `Reader.fork`; keys and values are shared until more is read."""
        fork = copy.copy(self)
        fork._cache = forked(self._cache)
        fork._cached, fork._waiting = list(self._cached), list(self._waiting)
        return fork

    def answer(self, ids: Sequence[int] = (), **generation: Any) -> str:
        """See `Reader.answer`."""
        options = generation_options(generation)
        asked = self.fork()
        asked.check_room(len(ids) + options["max_new_tokens"])
        asked.read_question(ids)
        asked._check_begun()
        prompt = asked._tensor([*asked._cached, *asked._waiting])
        if self.model.generation_config.pad_token_id is None:  # one row has no padding
            options.setdefault("pad_token_id", 0)
        model: Any = self.model
        out: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **{CACHE: asked._cache},
            **asked._positions_of_prompt(),
            **options,
        )
        new = out[0, prompt.shape[1] :].tolist()
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def foresee(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.foresee`."""
        return self.fork().read_foreseen(ids)

    def read_foreseen(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `Reader.read_foreseen`."""
        self._check_begun()
        self.check_room(len(ids))
        found: list[Foreseen] = []
        for begin in range(0, len(ids), self.piece):
            piece = list(ids[begin : begin + self.piece])
            logits = self._forward([*self._waiting, *piece[:-1]], logits_to_keep=0)
            self._waiting = piece[-1:]
            found += foreseen(logits[0], piece)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(x.nbytes for layer in self._cache.layers for x in _tensors(vars(layer)))

    # --- inside -----------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, ids: list[int], logits_to_keep: int) -> Tensor:
        """Read ids into the cache; logits [1, n, vocabulary] of the last n, 0 is all."""
        out = self.model(
            self._tensor(ids),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{CACHE: self._cache},
            **self._positions(len(ids)),
        )
        self._cached += ids
        logits: Tensor = out.logits
        return logits

    def _positions(self, count: int) -> dict[str, Tensor]:
        """`position_ids` [1, count] of the next tokens, where they do not just count the cache."""
        return {}

    def _positions_of_prompt(self) -> dict[str, Tensor]:
        """`position_ids` of what is in the cache and what waits, likewise."""
        return {}

    def check_room(self, tokens: int) -> None:
        """See `Reader.check_room`."""
        wanted = len(self._cached) + len(self._waiting) + tokens
        if self.limit is not None and wanted > self.limit:
            raise TooLongError(
                f"tokens of text, question and answer must be at most {self.limit}, got {wanted}"
            )

    def _check_begun(self) -> None:
        if not self._waiting:
            raise ValueError("ids must hold at least 1 token before anything follows, got none")

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.model.device)


def token_limit(
    model: PreTrainedModel, budget: Budget | None, most: int | None = None
) -> int | None:
    """Tokens that a backbone may see at once: what the budget allows and the positions hold.

    Args:
        most: instead of the model's positions.

    Returns:
        None where nothing says.

    Raises:
        ValueError: the budget is smaller than one token.
    """
    bounds = [max_positions(model) if most is None else most]
    if budget is not None:
        in_bytes = budget.unit == "bytes"
        bounds.append(budget.tokens(bytes_per_token(model) if in_bytes else 1))
    return min((bound for bound in bounds if bound is not None), default=None)


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values, found by reading one.

    Layers whose window has filled hold no more than that, so a text may hold fewer bytes.
    """
    reader = CacheReader(model, None)
    reader.read([0, 0])  # the last one waits
    return reader.nbytes


def forked(cache: DynamicCache) -> DynamicCache:
    """A cache that goes its own way; layers that only append share their tensors with it."""
    fork = copy.copy(cache)
    fork.layers = [
        # Appending makes new tensors; layers of other kinds may write into theirs.
        copy.copy(layer) if type(layer) in _APPENDING else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return fork


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (x for one in value.values() for x in _tensors(one))
    elif isinstance(value, list | tuple):
        yield from (x for one in value for x in _tensors(one))
