"""Reading whole chunks with a full memory, which are all the same work: recorded and replayed.

A chunk of a text of any length is then one launch instead of thousands (docs/gpu.md). Memory stays
a value: what goes in is copied into the recording's own tensors, what is new is copied out of them.

Pitfalls:
    - A recording goes on with the adapters and the autocast that it was made with; weights that are
      changed in place are seen, and for weights that have moved a new one is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cometlm.core.layout import ChunkLayout
from cometlm.core.recording import Recorder
from cometlm.core.state import States, map_tensors, tensors_of, with_tensors

# From ids [B, n] and states before a chunk to its outputs [B, I, D] and the states after.
Work = Callable[[Tensor, States], tuple[Tensor, States]]

_MOST = 4  # recordings: one for each batch and sizes that a process reads with


class RecordedChunks:
    """Recordings of a model's chunks, made when they are wanted.

    Args:
        recorder: what records; a test's own.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or Recorder()
        self._recordings: dict[Any, _Recording | None] = {}

    def __deepcopy__(self, memo: Any) -> RecordedChunks:
        """Of a copied model nothing was recorded yet."""
        return RecordedChunks()

    def takes(self, layout: ChunkLayout) -> bool:
        """Whether a step is a whole chunk that meets a full memory."""
        row, piece = layout.rows[0], layout.step[0]
        full = row.entries == layout.config.temporary_slots and row.folds > 0
        whole = row.items == 0 and piece.close and piece.text == layout.config.chunk_size
        return layout.uniform and full and whole

    def read(
        self,
        layout: ChunkLayout,
        ids: Tensor,
        states: States,
        work: Work,
        weights: Iterable[nn.Parameter],
    ) -> tuple[Tensor, States]:
        """What `work` gives for a chunk that `takes` takes, recorded where that can be.

        Args:
            layout: of the chunk.
            ids: [B, n] of the chunk.
            states: every layer's, before it.
            work: reads a chunk like this one.
            weights: that it uses.
        """
        key = _key(layout, ids, states, weights)
        if key not in self._recordings and len(self._recordings) < _MOST:
            self._recordings[key] = self._recorded(ids, states, work)
        recording = self._recordings.get(key)
        return work(ids, states) if recording is None else recording.replay(ids, states)

    def _recorded(self, ids: Tensor, states: States, work: Work) -> _Recording | None:
        try:
            return _Recording.of(self._recorder, ids, states, work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what devices raise at work that cannot be recorded
            reason = " ".join(str(error).split())[:300]
            warnings.warn(f"chunks are not recorded, since that failed: {reason}", stacklevel=2)
            return None


def _key(
    layout: ChunkLayout, ids: Tensor, states: States, weights: Iterable[nn.Parameter]
) -> tuple[Any, ...]:
    """What a recording is bound to."""
    shapes = tuple((x.shape, x.dtype, x.device) for x in tensors_of(states))
    places = tuple(weight.data_ptr() for weight in weights)
    return layout.config, layout.max_positions, ids.shape, shapes, places


@dataclass(frozen=True)
class _Recording:
    """One chunk's work, on tensors of its own.

    Attributes:
        ids, before: what it reads.
        replayed: does the work; its outputs, and the states after it.
    """

    ids: Tensor
    before: States
    replayed: Callable[[], tuple[Tensor, States]]

    @classmethod
    def of(cls, recorder: Recorder, ids: Tensor, states: States, work: Work) -> _Recording | None:
        """Record work; None on a device that records nothing."""
        # They are written to later, outside of the inference mode that may be on now.
        with torch.inference_mode(False), torch.no_grad():
            own_ids, before = ids.clone(), map_tensors(states, torch.clone)
        replayed = recorder.recorded(lambda: work(own_ids, before), ids.device)
        return None if replayed is None else cls(own_ids, before, replayed)

    @torch.no_grad()
    def replay(self, ids: Tensor, states: States) -> tuple[Tensor, States]:
        """The outputs, which the next replay overwrites, and the states after, as values."""
        given, own = tensors_of(states), tensors_of(self.before)
        self.ids.copy_(ids)
        torch._foreach_copy_(own, given)
        out, after = self.replayed()
        same = {id(x): y for x, y in zip(own, given, strict=True)}  # what the chunk leaves as it is
        values = [same.get(id(x)) for x in tensors_of(after)]
        made = [
            x.clone() if y is None else y for x, y in zip(tensors_of(after), values, strict=True)
        ]
        return out, with_tensors(after, made)
