"""Transformer-XL: the last tokens, one entry each, and no other memory. CoMeT with two switches.

Transformer-XL (Dai et al., 2019, arXiv 1901.02860) is `comet` without a global memory at stride 1:
each layer keeps a queue with one entry for each of the last `capacity` tokens. What is not as
there:

- There layer i keeps the hidden states that went *into* it at the tokens themselves. Here an entry
  comes from an extra token behind each token: the layer's *output* there, normed (RMSNorm) and
  through a low-rank adapter. A row of n tokens is therefore 2n items long.
- So what is kept of a layer is read by the same layer, and can be passed on without end. There it
  sinks by a layer with each segment, so that L layers see L segments back.
- There gradients end at the queue. Here they go through it, unless a run says
  `recompute: {truncate_after: 1}`.
- There positions are relative, learned by their own projections. Here they are the backbone's, over
  the row as it is: an entry takes one position and a token of the chunk two.
"""

from __future__ import annotations

from cometlm.methods.base import Budget
from cometlm.methods.comet import Comet, CometReader, check_trained
from cometlm.methods.loader import Loader
from cometlm.session.session import Session


class Xl(Comet):
    """Reads with a memory that was trained without global memory at stride 1.

    It holds the last tokens: as many as its capacity, as a budget in tokens, or as fit into one in
    bytes. A memory that was trained otherwise is refused: its figures would say nothing of
    Transformer-XL.
    """

    @classmethod
    def open(cls, loader: Loader, budget: Budget | None = None) -> CometReader:
        """See `Method.open`."""
        check_trained(loader, "xl", global_memory=False, temporary_memory=True, stride=1)
        if budget is None or budget.unit == "bytes":
            return super().open(loader, budget)
        capacity = loader.sizes.get("capacity", budget.amount)
        if capacity > budget.amount:
            raise ValueError(
                f"budget of xl must be at least capacity={capacity}, got {budget.amount}"
            )
        return CometReader(Session(loader.with_memory(capacity=capacity), loader.tokenizer))
