"""RMT: a recurrent memory alone, which each chunk replaces. CoMeT with two switches.

The Recurrent Memory Transformer (Bulatov et al., 2022, arXiv 2207.06881) is `comet` without a
temporary memory and without gates: all that passes from one segment to the next is a fixed number
of vectors, written by tokens that are learned and trained through many segments. What is not as
there:

- There memory tokens run through all layers: the last layer's outputs at the *write* tokens,
  behind the segment, are the next segment's *read* tokens, in front of it and at the first layer.
  Here each layer keeps what its own readout tokens wrote, and reads it as keys and values alone.
- There a segment's write tokens begin as the memory that it read. Here they begin as the same
  learned embeddings in each chunk, and see the memory by attention.
- There the first segment reads learned memory tokens. Here the first chunk reads none.
- What is written is normed (RMSNorm) and passes a low-rank adapter before it is read. There it is
  handed on as it is.
"""

from __future__ import annotations

from cometlm.methods.base import Budget
from cometlm.methods.comet import Comet, CometReader, check_trained
from cometlm.methods.loader import Loader


class Rmt(Comet):
    """Reads with a memory that was trained without temporary memory and without gates.

    What it holds is the global memory's size; no budget changes it, and one in bytes must have room
    for it. A memory that was trained otherwise is refused: its figures would say nothing of RMT.
    """

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> CometReader:
        """See `Method.open`."""
        check_trained(loader, "rmt", global_memory=True, temporary_memory=False, gate=False)
        return super().open(loader, budget)
