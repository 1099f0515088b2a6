"""What training asks of a memory on the way: questions, and what readout tokens should say.

These are observers of a training step (`core.observer`). They depend on a chunk's place alone, so a
step that is recomputed, or shared with other ranks, has the same losses and gradients.

Legend: B batch, A tokens of a probe, M readout tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.observer import ChunkObserver, ClosedChunk, Score
from cometlm.train.chunk_plans import Chunking

ANSWERS, READOUT = "answer_loss", "readout_loss"


@dataclass(frozen=True)
class Probe:
    """A question for each row, and its answer.

    Attributes:
        ids: [B, A] the question, the answer, and filling where a row has less.
        labels: [B, A] the answer's ids where it stands, -100 elsewhere.
        since: for each row, tokens by which the answer was said, from where its memory began.
        until: for each row, tokens of the text up to which the answer is right; None: all of them.
    """

    ids: Tensor
    labels: Tensor
    since: tuple[int, ...]
    until: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rows = len(self.since)
        if self.ids.dim() != 2 or self.ids.shape != self.labels.shape or len(self.ids) != rows:
            raise ValueError(
                f"ids and labels of a probe must be [{rows}, A] for {rows} since, got shapes "
                f"{tuple(self.ids.shape)} and {tuple(self.labels.shape)}"
            )
        if self.until is not None and len(self.until) != rows:
            raise ValueError(f"until of a probe must have {rows} places, got {len(self.until)}")


class Questions(ChunkObserver):
    """Asks forks of the memory, and forgets that it asked.

    A question is asked at the first chunk's end by which every row has read its answer, again each
    time that the distance has about doubled, and at the end of the text: many answers for one
    reading, from one border away to as many as the text has. Where a row has read something that
    changes the answer, it is asked no more.

    Args:
        probes: the questions.
    """

    losses = (ANSWERS,)

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = list(probes)

    def after_chunk(self, chunk: ClosedChunk) -> Mapping[str, Score]:
        """See `ChunkObserver.after_chunk`."""
        due = [
            probe
            for probe in self._probes
            if _is_due(chunk, probe.since) and _still_holds(chunk, probe.until)
        ]
        if not due:
            return {}
        # In one pass: many small ones keep an accelerator waiting for launches.
        ids, labels = _stacked([one.ids for one in due], 0), _stacked([one.labels for one in due])
        return {ANSWERS: chunk.read(ids, labels)}


def _is_due(chunk: ClosedChunk, since: Sequence[int]) -> bool:
    """Whether the distance from a place in the text has come to 0, or doubled, or the end."""
    size = chunk.layout.config.chunk_size
    before = min(row.tokens - place for row, place in zip(chunk.layout.rows, since, strict=True))
    now = min(row.tokens - place for row, place in zip(chunk.rows, since, strict=True))
    if now < 0:
        return False
    return chunk.is_last or before < 0 or _octave(now, size) > _octave(before, size)


def _still_holds(chunk: ClosedChunk, until: Sequence[int] | None) -> bool:
    """Whether no row has read on to where its answer changes."""
    if until is None:
        return True
    return all(row.tokens <= place for row, place in zip(chunk.rows, until, strict=True))


def _octave(distance: int, size: int) -> int:
    return int(math.log2(distance / size + 1))


class ReadoutLabels(ChunkObserver):
    """Says what readout tokens should say at the end of the chunk in which a span of text ends.

    Where a border cuts that span, its beginning can only come from the memory.

    Args:
        labels: [B, M], -100 where nothing is asked of a readout token.
        spans: where each row's span begins and ends, in tokens of the text.
        otherwise: [B, M], the same for chunks that hold nothing of the span; None asks nothing of
            them there.

    Raises:
        ValueError: labels or spans of other shapes.
    """

    losses = (READOUT,)

    def __init__(
        self, labels: Tensor, spans: Sequence[range], otherwise: Tensor | None = None
    ) -> None:
        for name, given in (("labels", labels), ("otherwise", otherwise)):
            if given is not None and (given.shape != labels.shape or len(given) != len(spans)):
                raise ValueError(
                    f"{name} must be [{len(spans)}, readout tokens], got {tuple(given.shape)}"
                )
        self._labels = labels
        self._spans = list(spans)
        self._otherwise = otherwise

    def after_chunk(self, chunk: ClosedChunk) -> Mapping[str, Score]:
        """See `ChunkObserver.after_chunk`."""
        labels = self._labels_of(chunk)
        if not (labels != -100).any():
            return {}
        return {READOUT: chunk.score(chunk.readout, labels)}

    def _labels_of(self, chunk: ClosedChunk) -> Tensor:
        """Labels [B, M] of one chunk."""
        ends, apart = [], []
        steps = zip(self._spans, chunk.layout.rows, chunk.rows, chunk.layout.step, strict=True)
        for span, before, after, piece in steps:
            first, last = before.tokens - before.text, after.tokens
            ends.append(piece.close and first < span.stop <= last)
            apart.append(piece.close and (span.stop <= first or last <= span.start))
        labels = _only(self._labels, ends)
        if self._otherwise is None:
            return labels
        return torch.maximum(labels, _only(self._otherwise, apart))


class Together(ChunkObserver):
    """Several observers with losses of different names."""

    def __init__(self, observers: Sequence[ChunkObserver]) -> None:
        self._observers = list(observers)
        self.losses = tuple(name for one in self._observers for name in one.losses)

    def after_chunk(self, chunk: ClosedChunk) -> Mapping[str, Score]:
        """See `ChunkObserver.after_chunk`."""
        return {
            name: score for one in self._observers for name, score in one.after_chunk(chunk).items()
        }


@contextmanager
def asking(model: CometForCausalLM, probes: Sequence[Probe]) -> Iterator[None]:
    """Ask these questions while the context is open, beside an observer that is there."""
    plan = model.training_plan
    if probes:
        observers = [one for one in (plan.observer, Questions(probes)) if one is not None]
        # Only chunks of given lengths are closed, and their questions asked, where a text ends.
        chunking = plan.chunking or Chunking.of({"fixed": 1.0})
        model.training_plan = replace(plan, observer=Together(observers), chunking=chunking)
    try:
        yield
    finally:
        model.training_plan = plan


def _only(labels: Tensor, rows: Sequence[bool]) -> Tensor:
    """These rows of labels [B, M], and -100 in the others."""
    return labels.masked_fill(~torch.tensor(rows, device=labels.device)[:, None], -100)


def _stacked(blocks: Sequence[Tensor], filling: int = -100) -> Tensor:
    """Blocks [B, any] below each other, filled up behind to the longest."""
    width = max(block.shape[1] for block in blocks)
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filling) for x in blocks])
