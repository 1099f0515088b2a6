"""A session: one text read by one model, however it comes in.

The session owns its state: the memory at the last chunk border, and the open chunk as token ids.
The open chunk is run only when its logits are wanted, so every chunk goes through the layers once
and however the text was cut makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor

from cometlm.cache import CometCache
from cometlm.model import CometForCausalLM
from cometlm.text import TokenStream, read_blocks


@dataclass(frozen=True)
class SessionStats:
    """What a session has done and holds.

    Attributes:
        tokens: tokens read.
        chunks: chunks folded into memory.
        memory_bytes: bytes of memory held for them.
    """

    tokens: int
    chunks: int
    memory_bytes: int


class Session:
    """Reads text of any length with one model, in constant memory."""

    def __init__(self, model: CometForCausalLM, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._stream = TokenStream(tokenizer)
        self._cache: CometCache = model.model.empty_cache()
        self._open: list[int] = []

    def read(self, source: str | IO[str] | Iterable[str]) -> None:
        """Read text: a string, an open text file, or an iterable of strings.

        Raises:
            ValueError: a file that is not text.
            FloatingPointError: a memory stopped being finite; what was read before is kept.
        """
        for _ in self.reading(source):
            pass

    def reading(self, source: str | IO[str] | Iterable[str]) -> Iterator[SessionStats]:
        """Like `read`, giving the stats after every chunk."""
        for text in _texts(source):
            yield from self._take(self._stream.feed(text))

    def finish(self) -> Iterator[SessionStats]:
        """Say that the text ends here: its last tokens need no more to be known."""
        yield from self._take(self._stream.finish())

    def stats(self) -> SessionStats:
        """Tokens read, chunks folded and bytes held so far."""
        cache = self._cache
        tokens = cache.tokens_read + len(self._open)
        return SessionStats(tokens, cache.chunks_folded, cache.nbytes)

    @torch.no_grad()
    def continuation(self, count: int) -> Iterator[int]:
        """The `count` likeliest next tokens, one after another; the session stays as it is.

        Raises:
            ValueError: nothing was read yet.
        """
        if not self._open:
            raise ValueError("nothing was read yet, so there is nothing to go on from")
        cache, ids = self._cache, self._open
        for _ in range(count):
            out = self.model(
                self._tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            logits = out.logits[0, -1]
            logits[self.model.config.suppressed_tokens or []] = -torch.inf
            cache, ids = out.past_key_values, [int(logits.argmax())]
            yield ids[0]

    @torch.no_grad()
    def _take(self, ids: list[int]) -> Iterator[SessionStats]:
        """Add tokens; run every chunk that more text has followed."""
        size = self.model.config.comet_config.chunk_size
        self._open += ids
        while len(self._open) > size:
            out = self.model.model(
                self._tensor(self._open[:size]),
                past_key_values=self._cache,
                use_cache=True,
                more_text=True,
            )
            self._cache, self._open = out.past_key_values, self._open[size:]
            cache = self._cache
            yield SessionStats(cache.tokens_read, cache.chunks_folded, cache.nbytes)

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)


def _texts(source: str | IO[str] | Iterable[str]) -> Iterable[str]:
    if isinstance(source, str):
        return [source]
    if hasattr(source, "read"):
        return read_blocks(cast("IO[str]", source), getattr(source, "name", "the file"))
    return source
