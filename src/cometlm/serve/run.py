"""A request that is worked on: what the engine's thread says of it, as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from cometlm.serve.answer import Answer, Piece, Progress
from cometlm.serve.engine import Job
from cometlm.serve.errors import as_api_error
from cometlm.serve.metrics import Metrics
from cometlm.serve.prompt import Prompt
from cometlm.serve.tools import CallFilter
from cometlm.session.writer import Likely

_SEEN = 1024  # tokens of a prompt that say how its answer begins


@dataclass(frozen=True)
class Ended:
    """The work has ended, with an error or not."""

    error: BaseException | None


class Run:
    """A request that is worked on; leave it with `cancel` or at its end."""

    def __init__(
        self,
        job: Job,
        events: asyncio.Queue[Any],
        metrics: Metrics,
        prompt: Prompt | None = None,
    ) -> None:
        self._job, self._events, self._metrics = job, events, metrics
        self._prompt = prompt

    async def pieces(self) -> AsyncIterator[Piece | Answer]:
        """Pieces of text, then each answer.

        Raises:
            ApiError: it could not be written.
        """
        prompt = self._prompt
        if prompt is None or prompt.calling is None:
            async for event in self.events():
                yield event
            return
        tokenizer, filters = prompt.start.tokenizer, dict[int, CallFilter]()
        before = tokenizer.decode(prompt.new[-_SEEN:]) if prompt.calling.is_described else ""
        held: dict[int, list[Likely]] = {}
        async for event in self.events():
            sieve = filters.setdefault(event.index, CallFilter(prompt.calling))
            if isinstance(event, Piece):
                held.setdefault(event.index, []).extend(event.likely)
                if text := sieve.feed(event.text):
                    yield replace(event, text=text, likely=held.pop(event.index))
                continue
            rest, said, calls = sieve.finish(event.text, event.ids, before)
            likely = held.pop(event.index, [])
            if rest or likely:
                yield Piece(event.index, rest, likely)
            yield replace(event, text=said, calls=calls)

    async def events(self) -> AsyncIterator[Any]:
        """What the work says: see `pieces`; of a document, its `Progress`.

        Raises:
            ApiError: it ended with an error.
        """
        first: float | None = None
        metrics, asked = self._metrics, self._job.queued_at
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Ended):
                    if event.error is not None:
                        error = as_api_error(event.error)
                        metrics.failed(error)
                        raise error from event.error
                    break
                if first is None and not isinstance(event, Progress):
                    first = time.monotonic()
                    metrics.first_token.observe(first - asked)
                    metrics.queue_time.observe((self._job.started_at or asked) - asked)
                if isinstance(event, Answer) and first is not None:
                    metrics.generation_tokens.inc(event.tokens)
                    metrics.finished(event.finish)
                    spent = (time.monotonic() - first) / max(1, event.tokens - 1)
                    metrics.per_token.observe(spent)
                yield event
            metrics.whole_time.observe(time.monotonic() - asked)
        finally:
            self.cancel()

    async def answers(self) -> list[Answer]:
        """All answers.

        Raises:
            ApiError: they could not be written.
        """
        return [event async for event in self.pieces() if isinstance(event, Answer)]

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._job.cancel()
