"""Answers written one token at a time, those of several sessions as rows of one batch.

`Session.ask` leaves writing to transformers' `generate`, which runs until an answer ends. Who
writes many answers at once, as a server does, takes `Writer` instead: greedily both write the same.
Answers begin and end when they like; `advance` runs those that go on.

    cache, logits = session.begin_answer()
    writer = Writer(cache, logits, Sampling(temperature=0), stops={eos}, most=100)
    while writer.take() is not None:
        advance(session.model, [writer])
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation import SuppressTokensLogitsProcessor

from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM

Finish = Literal["stop", "length"]

_COLDEST = 1e-6  # logits divided by less may leave float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy, and so is less than 1e-6; above it, sampling.
        top_p: sample from the likeliest that make up this.
        seed: sample the same again; None: another time otherwise.
        likely: how many of the likeliest tokens are noted at each place; None: nothing is noted.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    likely: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1, got {self.top_p}")


@dataclass(frozen=True)
class Likely:
    """How likely the model found a token, whatever it was sampled with.

    Attributes:
        token: its id.
        logprob: of it, in nats.
        top: ids of the likeliest tokens there, the likeliest first, and their own.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: Tensor, token: int, count: int) -> Likely:
        """Out of the model's logits [V]."""
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(count)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return cls(token, float(logprobs[token]), tuple(pairs))


class Writer:
    """One answer while it is written.

    Args:
        cache: what the answer goes on from.
        logits: [V], of its first token.
        sampling: how tokens are chosen.
        stops: ids that end it; the last of `ids` may be one of them.
        most: tokens that it has at most, at least 1.
        suppressed: ids that are never written.
        stream: which of several answers with the same seed this is.

    Attributes:
        ids: what was written.
        likely: of each of them, if it is noted.
        finish: why it ended; None while it goes on.
        past: the model's cache after all of `ids` but the last, and which of its rows this is.
    """

    def __init__(
        self,
        cache: CometCache,
        logits: Tensor,
        sampling: Sampling,
        *,
        stops: Collection[int] = (),
        most: int,
        suppressed: Sequence[int] | None = None,
        stream: int = 0,
    ) -> None:
        if most < 1:
            raise ValueError(f"an answer must have room for at least 1 token, got {most}")
        self.past = (cache, 0)
        self.ids: list[int] = []
        self.likely: list[Likely] = []
        self._noted = sampling.likely
        self.finish: Finish | None = None
        self._logits: Tensor | None = logits
        self._stops, self._most = frozenset(stops), most
        self._is_greedy = sampling.temperature < _COLDEST
        self._processors = LogitsProcessorList()
        if suppressed:
            self._processors.append(SuppressTokensLogitsProcessor(suppressed, str(logits.device)))
        if not self._is_greedy:
            if sampling.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
            # On the CPU: the same numbers wherever the model is.
            self._random = torch.Generator()
            seed = int.from_bytes(os.urandom(8)) if sampling.seed is None else sampling.seed
            self._random.manual_seed((seed + stream) % 2**63)

    def take(self) -> int | None:
        """Choose the next token; None where the answer has ended."""
        if self.finish is not None:
            return None
        assert self._logits is not None, "advance() runs the model between two tokens"
        token = self._chosen(self._logits)
        if self._noted is not None:
            self.likely.append(Likely.of(self._logits, token, self._noted))
        self._logits = None
        self.ids.append(token)
        if token in self._stops:
            self.finish = "stop"
        elif len(self.ids) >= self._most:
            self.finish = "length"
        return token

    def stop(self) -> None:
        """End the answer here: a stop string came."""
        self.finish = "stop"

    def go_on(self, past: tuple[CometCache, int], logits: Tensor) -> None:
        """Take what the model made of the last token."""
        self.past, self._logits = past, logits

    def _chosen(self, logits: Tensor) -> int:
        none: Any = torch.empty((1, 0), dtype=torch.long)  # ids before it; no processor here looks
        scores = self._processors(none, logits[None].float())
        if self._is_greedy:
            return int(scores.argmax(-1))
        shares = scores.softmax(-1).cpu()
        return int(torch.multinomial(shares, 1, generator=self._random))


@torch.no_grad()
def advance(model: CometForCausalLM, writers: Sequence[Writer]) -> None:
    """Run the last token of several answers, none of which has ended, in one call of the model.

    They may stand at different places of different texts. What a row is given does not depend on
    the others, but for how numbers are rounded. Whatever happens, no writer changes before the
    model has run.
    """
    if not writers:
        return
    out = model(
        torch.tensor([writer.ids[-1:] for writer in writers]),
        past_key_values=_joined([writer.past for writer in writers]),
        use_cache=True,
        logits_to_keep=1,
    )
    for row, writer in enumerate(writers):
        writer.go_on((out.past_key_values, row), out.logits[row, -1])


def _joined(pasts: Sequence[tuple[CometCache, int]]) -> CometCache:
    """One cache of these rows, in their order; rows that are one already stay so."""
    groups: list[tuple[CometCache, list[int]]] = []
    for cache, row in pasts:
        if groups and groups[-1][0] is cache:
            groups[-1][1].append(row)
        else:
            groups.append((cache, [row]))
    return CometCache.join([cache.select(rows) for cache, rows in groups])
