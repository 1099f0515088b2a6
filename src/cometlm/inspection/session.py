"""A session that looks on while it reads, and explains its answers.

It reads and answers exactly as a `Session` does, a little slower: each chunk's attention weights
are formed once more, beside the kernel that does not. What it keeps of them does not grow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.state import States
from cometlm.inspection.attention import LayerAttention, watching
from cometlm.inspection.explanation import Explanation, Tally
from cometlm.inspection.history import History, SeenChunk, TokenLog
from cometlm.session.session import Session, SessionStats


class InspectedSession(Session):
    """Reads one text, and knows what its memory is made of.

    Args:
        model, tokenizer: as for `Session`; the cells are not compiled.

    Attributes:
        history: what the memory is made of.
        latest: the chunk that was folded last, if it was folded here.
    """

    def __init__(self, model: CometForCausalLM, tokenizer: Any = None) -> None:
        super().__init__(model, tokenizer)
        layers = len(model.model.layers_with_memory)
        self.history = History.empty(layers, model.config.comet_config.global_slots)
        self.latest: SeenChunk | None = None
        self._log = TokenLog()

    @classmethod
    def load(
        cls, path: str | Path, model: CometForCausalLM, tokenizer: Any = None, **options: Any
    ) -> Self:
        """Go on from a saved session, which does not know its history.

        Raises:
            ValueError, OSError: as `Session.load`.
        """
        session = super().load(path, model, tokenizer, **options)
        (row,) = session._cache.rows
        heads = int(model.config.backbone_config.num_attention_heads)
        sizes = model.config.comet_config
        layers = len(model.model.layers_with_memory)
        session.history = History.unseen(layers, heads, row, sizes)
        session._log = TokenLog(session.history.end)
        return session

    def fork(self, *, without: Collection[str] = ()) -> Self:
        """See `Session.fork`."""
        fork = super().fork(without=without)
        fork._log = self._log.fork()
        return fork

    def token_ids(self, begin: int, end: int) -> list[int]:
        """Ids of text tokens that were folded here, of those between begin and end."""
        return self._log.ids(begin, end)

    def norms(self) -> Tensor:
        """Length of each global slot's state, per square root of its width [L, M]."""
        states = [layer.memory.state for layer in self._cache.layers]
        found = [s[0].float().square().mean(-1).sqrt().cpu() for s in states if s is not None]
        return torch.stack(found) if found else self.history.ages[:, :0]

    @torch.no_grad()
    def explain(
        self,
        prompt: str,
        *,
        answer: str | None = None,
        template: bool | None = None,
        **generation: Any,
    ) -> Explanation:
        """Ask as `ask` does, and see where the answer's tokens looked; the session stays as it is.

        The attention is that of the tokens that *say* the answer: the end of the question, which
        says its first token, and the answer's tokens but the last.

        Args:
            prompt: the question.
            answer: explain these words and not what the model says.
            template: as for `ask`.
            generation: as for `ask`.

        Returns:
            What is known of the answer's tokens, up to the end of the chunk that it begins in.

        Raises:
            ValueError: as `ask`; an answer without tokens.
        """
        asked = self._asked(prompt, template)
        written: list[int] = []
        if answer is None:
            for _ in asked._written(written, generation, stream=False):
                pass
        else:
            asked._end_text()
            written = asked._plain.encode(answer)
        if not written:
            raise ValueError("an answer must have tokens, got none")
        room = 1 + self.model.config.comet_config.chunk_size - len(asked._open)
        explained = _without_specials(written, self.tokenizer)[:room]
        tally = Tally(asked.history, len(explained))
        with watching(self.model, tally):
            self.model.model(
                self._tensor([*asked._open, *explained[:-1]]),
                past_key_values=asked._cache,
                use_cache=True,
                hidden_to_keep=1,
            )
        return Explanation(
            question=prompt,
            answer=asked._decode(written) if answer is None else answer,
            answer_ids=tuple(explained),
            num_answer_tokens=len(_without_specials(written, self.tokenizer)),
            open_ids=tuple(asked._open),
            history=asked.history,
            session=asked,
            **tally.found(),
        )

    @torch.no_grad()
    def _fold(self, size: int) -> SessionStats:
        ids, before = self._open[:size], self._cache.layers
        again = self.model.config.comet_config.overlap if self.history.chunks else 0
        masses: list[Tensor] = []

        def see(layer: int, attention: LayerAttention) -> None:
            text = attention.layout.text_index[0].to(attention.query.device)
            masses.append(attention.parts(attention.mean_weights(text)).float().cpu())

        with watching(self.model, see), _candidates(self.model) as candidates:
            stats = super()._fold(size)
        begin = self.history.end - again
        gates = self._gates(before, candidates)
        self.latest = SeenChunk(begin, begin + size, gates, torch.stack(masses))
        self.history = self.history.after(self.latest, self.model.config.comet_config)
        self._log.append(ids[again:])
        return stats

    def _gates(self, before: States, candidates: Sequence[Tensor]) -> Tensor:
        """Share of the old state that each slot has kept [L, M]."""
        if not self.model.config.comet_config.global_memory:
            return torch.zeros(len(self.model.model.layers_with_memory), 0)
        gates = []
        for i, candidate in zip(self.model.model.layers_with_memory, candidates, strict=True):
            weights: Any = self.model.model.comet.layers[i]
            old = before[i].memory.state
            kept = torch.zeros(1, candidate.shape[1], 1)
            if old is not None:
                kept = weights.global_memory.share_kept(old, candidate).float().cpu()
            gates.append(kept[0, :, 0])
        return torch.stack(gates)


@contextmanager
def _candidates(model: CometForCausalLM) -> Iterator[list[Tensor]]:
    """What the readout tokens of each layer would write, as the layers come to it."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for weights in model.model.comet.layers:
            memory: Any = weights.global_memory
            if memory is not None:
                hook = memory.norm.register_forward_hook(
                    lambda module, given, candidate: found.append(candidate)
                )
                stack.callback(hook.remove)
        yield found


def _without_specials(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Ids without the special tokens at their end, unless there are no others."""
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    end = len(ids)
    while end and ids[end - 1] in special:
        end -= 1
    return list(ids[: end or 1])
