"""A training step of one shape, forward and backward, which a device records once and replays.

A chunk of a small model is some ten thousand small kernels with its backward pass. Python launches
them more slowly than an accelerator runs them; replayed, they run one behind the other. Nothing
here may depend on a tensor's values, nor send one to the device; what does stands in `fill`.

The graph is autograd's own, of all chunks: no cell runs twice.

Legend: as in `train.fixed_batches`; D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.layout import Piece
from cometlm.core.plan import Call, plan_chunks
from cometlm.core.recording import Recorder
from cometlm.core.state import States, map_tensors
from cometlm.core.text_batch import TextBatch
from cometlm.core.walk import Grid, through_layers
from cometlm.train.config import StepShape
from cometlm.train.fixed_batches import FixedBatch
from cometlm.train.keep import as_backbone, backbone_hidden, divergence

REPORTED = ("loss", "text_loss", "answer_loss", "answer_accuracy", "end_accuracy", "keep_loss")


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss count beside the text's; `keep` is 0 where nothing is held."""

    answers: float
    keep: float


class FixedStep:
    """The step of one shape, on buffers that batches are copied into.

    Args:
        model: that is trained, on one device, without dropout.
        shape: of the batches.
        learned: tokens of each chunk that are learned as text.
        like: a batch of this shape.
        weights: of the parts of the loss.
        recorder: what records it; None runs it as it is.
    """

    def __init__(
        self,
        model: CometForCausalLM,
        shape: StepShape,
        learned: int,
        like: FixedBatch,
        weights: Weights,
        recorder: Recorder | None,
    ) -> None:
        self._model, self._shape, self._learned, self._weights = model, shape, learned, weights
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._batch = like.to(model.device)
        self._theirs: Tensor | None = None
        self._grids: dict[int, Grid] = {}
        self._recorder = recorder
        self._replay: Callable[[], tuple[Tensor, list[Tensor | None]]] | None = None

    def __call__(self, batch: FixedBatch) -> Tensor:
        """Forward and backward: leaves gradients in the weights.

        Returns:
            What `REPORTED` names, in the device's memory; the next step overwrites it.
        """
        self._fill(batch)
        if self._replay is None:
            self._replay = self._run
            if self._recorder is not None:
                self._replay = self._recorded(self._recorder)
        report, grads = self._replay()
        for parameter, grad in zip(self._trained, grads, strict=True):
            parameter.grad = grad
        return report

    def _recorded(self, recorder: Recorder) -> Callable[[], tuple[Tensor, list[Tensor | None]]]:
        """The step as it is to be run from now on: recorded, or as it is where that fails."""
        try:
            return recorder.recorded(self._run, self._model.device) or self._run
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what devices raise at work that cannot be recorded
            reason = " ".join(str(error).split())[:300]
            warnings.warn(f"training is not recorded, since that failed: {reason}", stacklevel=2)
            return self._run

    @torch.no_grad()
    def _fill(self, batch: FixedBatch) -> None:
        for own, new in zip(self._batch.tensors(), batch.tensors(), strict=True):
            own.copy_(new, non_blocking=True)
        if self._weights.keep:
            with as_backbone(self._model):
                theirs = self._model.logits(backbone_hidden(self._model, self._batch.kept))
            if self._theirs is None:
                self._theirs = torch.empty_like(theirs)
            self._theirs.copy_(theirs)

    # --- the recorded part ----------------------------------------------------------------------

    def _run(self) -> tuple[Tensor, list[Tensor | None]]:
        """The report, and the gradients of all trained weights."""
        text, answers, ends = self._read()
        # An answer at a row's end and one beside the row count alike.
        asked = (answers[0] + ends[0]) / (answers[2] + ends[2]).clamp(min=1)
        loss = text + self._weights.answers * asked
        keep = torch.zeros_like(text)
        if self._weights.keep:
            keep = self._kept()
            loss = loss + self._weights.keep * keep
        grads = torch.autograd.grad(loss, self._trained, allow_unused=True)
        right = [score[1] / score[2].clamp(min=1) for score in (answers, ends)]
        report = torch.stack([x.detach() for x in (loss, text, asked, *right, keep)])
        return report, list(grads)

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        """The text's mean loss, and [sum, right, count] of the answers asked and at the end."""
        shape, batch = self._shape, self._batch
        inner = self._model.model
        call, grid = self._call(batch.ids, [shape.chunks] * shape.rows)
        states: States = call.cache.layers
        text: list[Tensor] = []
        asked = batch.ids.new_zeros(3, dtype=torch.float32)
        begin = 0
        for chunk, layout in enumerate(call.layouts()):
            embedded = inner.embedded(call.text, layout)
            out, states = through_layers(grid, embedded, layout, states)
            hidden = inner.normed(out, layout.text_index)
            first = batch.learned[:, chunk, None]
            where = first + torch.arange(self._learned, device=first.device)
            labels = batch.ids.gather(1, begin + where + 1)
            text.append(self._scored(hidden, where, labels)[0])
            if chunk in shape.asks:
                wanted = batch.wanted[shape.asks.index(chunk)]
                asked = asked + self._answered(call, grid, layout.counts_after(), states, wanted)
            begin += shape.chunks[chunk]
        last = shape.tokens - shape.chunks[-1]
        # The token before says it; an answer lies in the last chunk, behind its question.
        end = self._scored(hidden, batch.said - last - 1, batch.answers)
        labels_of_text = shape.rows * len(shape.chunks) * self._learned
        return torch.stack(text).sum() / labels_of_text, asked, end

    def _answered(
        self, call: Call, grid: Grid, rows: Any, states: States, wanted: Tensor
    ) -> Tensor:
        """[sum, right, count] of questions that forks of these states are asked."""
        inner, asked = self._model.model, self._batch.asked
        times = len(asked) // len(rows)
        forks = map_tensors(states, lambda x: x.repeat(times, *[1] * (x.dim() - 1)))
        rows *= times
        text = TextBatch(asked, (0,) * len(rows), (asked.shape[1],) * len(rows))
        layout = call.layout(rows, (Piece(0, asked.shape[1], close=False),) * len(rows))
        out, _ = through_layers(grid, inner.embedded(text, layout), layout, forks)
        hidden = inner.normed(out, layout.text_index)
        return self._scored(hidden, self._batch.places - 1, wanted)

    def _kept(self) -> Tensor:
        """KL(backbone ‖ model) of the tokens that are held: their mean, in nats."""
        batch, inner = self._batch, self._model.model
        rows, width = batch.kept.shape
        call, grid = self._call(batch.kept, [(width,)] * rows)
        (layout,) = call.layouts()
        embedded = inner.embedded(call.text, layout)
        out, _ = through_layers(grid, embedded, layout, call.cache.layers)
        hidden = inner.normed(out, layout.text_index)
        assert self._theirs is not None

        def diverged(hidden: Tensor, theirs: Tensor, counted: Tensor) -> Tensor:
            return (divergence(theirs, self._model.logits(hidden)) * counted).sum()

        total = _again(diverged, hidden, self._theirs, batch.counted)
        return total / batch.counted.sum().clamp(min=1)

    def _scored(self, hidden: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """[summed loss, right, count] of labels [R, n], said at places of hidden states."""
        index = places[..., None].expand(-1, -1, hidden.shape[-1])
        return _again(self._score, hidden.gather(1, index), labels)

    def _score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self._model.logits(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        right = (logits.detach().argmax(-1) == labels).sum()
        return torch.stack([loss, right.to(loss.dtype), (labels != -100).sum().to(loss.dtype)])

    def _call(self, ids: Tensor, chunks: Sequence[Sequence[int]]) -> tuple[Call, Grid]:
        """A reading of rows from an empty memory, and the layers to read them with."""
        inner = self._model.model
        rows, width = ids.shape
        cache = inner.empty_cache(rows)
        call = Call(
            text=TextBatch(ids, (0,) * rows, (width,) * rows),
            cache=cache,
            steps=plan_chunks(chunks),
            sizes=inner.sizes_of_call(),
            max_positions=cache.max_positions_under(inner.sizes_of_call()),
            use_cache=False,
        )
        longest = call.max_positions  # rotary tables are made by the first run, and then kept
        if longest not in self._grids:
            self._grids[longest] = inner.grid(longest)
        return call, self._grids[longest]


def _again(work: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Work whose insides (logits) are made again in the backward pass; no random numbers in it."""
    made: Tensor = checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False)
    return made
