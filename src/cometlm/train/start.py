"""What a memory's weights are set to without training: its tokens' embeddings, and its gates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from cometlm.cache import CometCache
from cometlm.causal_lm import CometForCausalLM
from cometlm.data.passkey import PasskeySample
from cometlm.memory import GlobalMemory, LayerMemoryWeights
from cometlm.train.config import Gates, Start

_RIDGE = 5e-4  # of the mean square of what gates look at: keeps what is fitted small
_HISTORY_STEP = 4  # chunks between two memories of one history
_ENOUGH = 20  # tokens of a key's sentence in a chunk, for the chunk to be one that holds a key
Said = tuple[Tensor, Sequence[range]]  # texts [B, N], and where each says its key


@torch.no_grad()
def start_like(model: CometForCausalLM, tokenizer: Any, start: Start) -> None:
    """Give compression and readout tokens the embeddings of a text's tokens.

    Raises:
        ValueError: a text without tokens.
    """
    comet, embed = model.model.comet, model.model.embed_tokens
    for name, rows in (("compression", comet.compression), ("readout", comet.readout)):
        text = getattr(start, name)
        if text is None or rows is None:
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"start.{name} must be a text with tokens, got {text!r}")
        like = torch.tensor([ids[i % len(ids)] for i in range(len(rows))])
        rows.copy_(embed(like.to(rows.device)))


@torch.no_grad()
def fit_gates(
    model: CometForCausalLM,
    texts: Iterable[Said],
    gates: Gates,
    histories: Iterable[Tensor] = (),
) -> None:
    """Fit every gate to keep the state at chunks of hay, and to let go of it where a key is said.

    What a gate looks at, [candidate ; state], has a mean that is far longer than what differs from
    chunk to chunk, so gates that are learned from nothing soon keep the same whatever is read:
    some all of the first chunk, others nothing for long. Whether a chunk holds a key can be seen
    there all the same. The fit is a weighted ridge regression of the gate's logit, layer by layer;
    what is learned afterwards goes on from it.

    Args:
        histories: [B, N] each, with as many rows as texts have. The texts are read by memories
            that stand somewhere in them; by new memories if there are none.

    Raises:
        ValueError: texts of less than three chunks, or without a key in a chunk that has a past.
    """
    layers = [cast("LayerMemoryWeights", one).global_memory for one in model.model.comet.layers]
    memories = [one for one in layers if one is not None and one.gate is not None]
    own = model.config.comet_config
    model.config.comet = own.replace(chunk_size=gates.chunk_size or own.chunk_size).to_dict()
    holds: list[Tensor] = []
    try:
        with _seen(memories) as seen:
            size = model.config.comet_config.chunk_size
            memories_before = [cache for ids in histories for cache in _read_on(model, ids)]
            for one in seen:
                one.clear()
            chance = random.Random(0)
            for ids, said in texts:
                before = chance.choice(memories_before) if memories_before else None
                whole = ids.shape[1] // size * size  # an open chunk writes nothing
                model.model(
                    ids[:, :whole].to(model.device),
                    past_key_values=before,
                    use_cache=False,
                    more_text=True,
                )
                first = size if before is None else 0  # a new memory has no state to be kept
                holds.append(_holding(model, range(first, whole, size), said))
    finally:
        model.config.comet = own.to_dict()
    if not memories:
        return
    where = torch.cat(holds)
    if not ((where == 1).any() and (where == 0).any()):
        raise ValueError(
            "gates are fitted to chunks with a key and chunks without, of texts of three chunks "
            f"and more, got {int((where == 1).sum())} with and {int((where == 0).sum())} without"
        )
    for memory, inputs in zip(memories, seen, strict=True):
        fitted = _fitted(torch.cat(inputs), where, gates)
        assert memory.gate is not None
        memory.gate.copy_(fitted[None])


def _fitted(x: Tensor, holds: Tensor, gates: Gates) -> Tensor:
    """Weights [2D] that make of x [samples, 2D] the logits wanted; solved in float64."""
    x = x.double()
    wanted = torch.full_like(x[:, 0], _logit(gates.keep))
    wanted[holds == 1] = _logit(gates.keep_at_key)
    weights = torch.zeros_like(wanted)
    for kind in (0, 1):  # both kinds count the same, however many there are
        weights[holds == kind] = 0.5 / (holds == kind).sum()
    square = (x * weights[:, None]).T @ x
    ridge = _RIDGE * square.diagonal().mean()
    return torch.linalg.solve(
        square + ridge * torch.eye(len(square), dtype=x.dtype), x.T @ (weights * wanted)
    )


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _read_on(model: CometForCausalLM, ids: Tensor) -> Iterator[CometCache]:
    """The memory of texts [B, N] on the way, every few chunks."""
    step = _HISTORY_STEP * model.config.comet_config.chunk_size
    cache = None
    for begin in range(0, ids.shape[1] - step + 1, step):
        piece = ids[:, begin : begin + step].to(model.device)
        out = model.model(piece, past_key_values=cache, use_cache=True, more_text=True)
        assert out.past_key_values is not None
        cache = out.past_key_values
        yield cache


def _holding(model: CometForCausalLM, chunks: range, said: Sequence[range]) -> Tensor:
    """Whether a key stands in what each sample of `_seen` saw: 1, 0, or -1 for a part of it."""
    sizes = model.config.comet_config
    kinds = []
    for begin in chunks:
        for place in said:
            end = begin + sizes.chunk_size
            inside = len(range(max(begin, place.start), min(end, place.stop)))
            part = -1 if inside < min(_ENOUGH, len(place)) else 1
            kinds += [part if inside else 0] * sizes.readout_tokens
    return torch.tensor(kinds)


@contextmanager
def _seen(memories: Sequence[GlobalMemory]) -> Iterator[list[list[Tensor]]]:
    """What each gate looks at while the context is open: chunk after chunk, [B · M, 2D].

    A chunk first reads its state, which makes slots of it, and then makes a candidate.
    """
    seen: list[list[Tensor]] = [[] for _ in memories]
    hooks = []
    for memory, kept in zip(memories, seen, strict=True):
        states: list[Tensor] = []

        def note_state(_: Any, args: Any, states: list[Tensor] = states) -> None:
            states[:] = args

        def note_both(
            _m: Any, _a: Any, candidate: Tensor, states: Any = states, kept: Any = kept
        ) -> None:
            if states:  # none before the first fold
                both = torch.cat([candidate, states.pop()], dim=-1)
                kept.append(both.flatten(0, 1).float().cpu())

        hooks.append(memory.register_forward_pre_hook(note_state))
        hooks.append(memory.norm.register_forward_hook(note_both))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def said_in(samples: Sequence[PasskeySample]) -> Said:
    """Texts of one length, and where each says its key."""
    return torch.tensor([sample.text for sample in samples]), [sample.said for sample in samples]
