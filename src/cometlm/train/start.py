"""What a memory's weights are set to without training: its tokens' embeddings, and its gates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.memory import GlobalMemory, LayerMemoryWeights
from cometlm.train.batches import Said
from cometlm.train.config import Start
from cometlm.train.histories import read_on
from cometlm.train.stages import Gates

_ROUNDS = 10  # of Newton's method; what falls short hardly changes after six


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
    histories: Iterable[Said] = (),
) -> None:
    """Fit every gate to keep the state at chunks of hay, and to let go of it where a key is said.

    What a gate looks at, [candidate ; state], has a mean that is far longer than what differs from
    chunk to chunk, so gates that are learned from nothing soon keep the same whatever is read:
    some all of the first chunk, others nothing for long. Whether a chunk holds a key can be seen
    there all the same. A gate is a linear classifier of the two, fitted layer by layer; what is
    learned afterwards goes on from it.

    Args:
        histories: with as many rows as texts have, and fitted to as well. The texts are read by
            memories that stand somewhere in them, but for the share of `gates.fresh`; by new
            memories if there are none.

    Raises:
        ValueError: texts of less than three chunks, or without a key in a chunk that has a past.
    """
    memories = [one for one in global_memories(model, gates.first_layer) if one.gate is not None]
    own = model.config.comet_config
    model.config.comet = own.replace(chunk_size=gates.chunk_size or own.chunk_size).to_dict()
    training = model.training
    try:
        model.eval()  # dropout would be noise in what is fitted
        with _seen(memories) as seen:
            holds = _read_all(model, texts, histories, gates.fresh)
    finally:
        model.train(training)
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
        assert memory.gate is not None
        before = memory.gate[0].cpu() / gates.sharpness if gates.near else None
        fitted = _fitted(torch.cat(inputs), where, gates, before)
        memory.gate.copy_(gates.sharpness * fitted[None])


def global_memories(model: CometForCausalLM, first_layer: int = 0) -> list[GlobalMemory]:
    """The global memory's weights of each layer from `first_layer` on that has one."""
    layers = [cast("LayerMemoryWeights", one) for one in model.model.comet.layers]
    found = [one.global_memory for one in layers[first_layer:]]
    return [one for one in found if one is not None]


def _read_all(
    model: CometForCausalLM, texts: Iterable[Said], histories: Iterable[Said], fresh: float
) -> list[Tensor]:
    """Read histories, and texts from somewhere in them; whether chunks held keys, see `_holding`.

    Counted are whole chunks that found a state: an open chunk writes nothing, and a new memory has
    no state to be kept.
    """
    size = model.config.comet_config.chunk_size
    chance = random.Random(0)
    holds: list[Tensor] = []
    memories: list[CometCache] = []
    for ids, said in histories:
        shots = list(read_on(model, ids))
        memories += shots
        read = shots[-1].rows[0].tokens if shots else 0
        holds.append(_holding(model, range(size, read, size), said))
    for ids, said in texts:
        before = chance.choice(memories) if memories and chance.random() >= fresh else None
        whole = ids.shape[1] // size * size
        model.model(
            ids[:, :whole].to(model.device),
            past_key_values=before,
            use_cache=False,
            more_text=True,
        )
        holds.append(_holding(model, range(0 if before else size, whole, size), said))
    return holds


def _fitted(x: Tensor, holds: Tensor, gates: Gates, near: Tensor | None = None) -> Tensor:
    """Weights [2D] that make of x [samples, 2D] the logits wanted, or more than that.

    The loss is a squared hinge: what lies beyond its logit costs nothing, so that the fit is to
    what is hardest to tell apart. A few chunks of hay that look like a key are all that a memory
    loses, and of them a regression to the mean knows little. Each round of Newton's method is a
    ridge regression of what falls short. The ridge draws to weights `near` [2D], or to none.
    """
    x = x.float()
    wanted = torch.full_like(x[:, 0], _logit(gates.keep))
    wanted[holds == 1] = _logit(gates.keep_at_key)
    above = torch.where(holds == 1, -1.0, 1.0)
    weights = torch.zeros_like(wanted)
    for kind, share in ((0, 1 - gates.key_share), (1, gates.key_share)):
        weights[holds == kind] = share / (holds == kind).sum()
    ridge = gates.ridge * (x.square() * weights[:, None]).sum(0).mean()
    short = weights
    # Gates that are to look at nothing have nothing to tell apart.
    for _ in range(_ROUNDS if gates.keep != gates.keep_at_key else 1):
        square = ((x * short[:, None]).T @ x + ridge * torch.eye(x.shape[1])).double()
        towards = x.T @ (short * wanted) + (0 if near is None else ridge * near.float())
        fitted = torch.linalg.solve(square, towards.double()).float()
        now = weights * ((wanted - x @ fitted) * above > 0)
        if torch.equal(now, short):
            break
        short = now
    return fitted


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _holding(model: CometForCausalLM, chunks: range, said: Sequence[Sequence[range]]) -> Tensor:
    """Whether a key stands in what each sample of `_seen` saw: 1, 0, or -1 for a part of it."""
    sizes = model.config.comet_config
    kinds = []
    for begin in chunks:
        chunk = range(begin, begin + sizes.chunk_size)
        for places in said:
            found = {_share(place, chunk) for place in places}
            kind = 1 if "whole" in found else -1 if "part" in found else 0
            kinds += [kind] * sizes.readout_tokens
    return torch.tensor(kinds, dtype=torch.long)


def _share(place: range, chunk: range) -> str:
    """What of a place stands in a chunk: "whole", "part" or "none"."""
    inside = len(range(max(chunk.start, place.start), min(chunk.stop, place.stop)))
    return "none" if not inside else "whole" if inside == len(place) else "part"


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
