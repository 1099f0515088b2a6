"""Text while it is written: transformers' `generate` in a thread, its pieces as an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class _StopWhenAsked(StoppingCriteria):
    """Ends generation at the next token once `asked` is set."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class _Recorder(TextIteratorStreamer):
    """Keeps the ids of the text that it passes on."""

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ids = ids
        self._prompt_came = False

    def put(self, value: Any) -> None:
        """Take the prompt, then token after token."""
        if self._prompt_came:
            self._ids.extend(value.flatten().tolist())
        self._prompt_came = True
        super().put(value)


def streamed(run: Callable[..., object], tokenizer: Any, ids: list[int]) -> Iterator[str]:
    """Pieces of the text that `run(streamer=…, stopping_criteria=…)` generates.

    When the caller stops listening, generation ends at its next token. An error in `run` is raised
    here. Whatever happens, `ids` gets the ids of what was written.
    """
    streamer = _Recorder(tokenizer, ids)
    stop = _StopWhenAsked()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(streamer=streamer, stopping_criteria=StoppingCriteriaList([stop]))
        except BaseException as error:  # noqa: BLE001 (handed to the caller's thread)
            errors.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.asked.set()
        thread.join()
    if errors:
        raise errors[0]
