"""One streamed answer, with the times of its tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from serving_parts.servers import Server

WORDS = (
    *("bridge", "captain", "coffee", "compass", "engine", "forest", "garden", "harbour", "island"),
    *("kitchen", "lantern", "letter", "market", "meadow", "mountain", "paper", "river", "station"),
)


@dataclass
class Streamed:
    """What a client saw.

    Attributes:
        text: the answer.
        made: seconds that the client took to make the request.
        first: seconds from when it left to the first text, or to the end of an empty answer.
        gaps: seconds between one text and the next.
        name: the answer's id.
        prompt_tokens: of the whole conversation before the answer.
        tokens: with the answer.
        cached_tokens: of them, those that were not run again.
        end: why it ended.
    """

    text: str = ""
    made: float = float("nan")
    first: float = float("nan")
    gaps: list[float] = field(default_factory=list)
    name: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    end: str | None = None


def chat(server: Server, messages: list[dict[str, str]], tokens: int, **more: Any) -> Streamed:
    """Stream one greedy answer to its end."""
    seen, begin, last = Streamed(), time.perf_counter(), 0.0

    def sending(request: Any) -> None:
        nonlocal begin
        now = time.perf_counter()
        seen.made, begin = now - begin, now

    events = server.client(sending).chat.completions.create(
        model=server.model,
        messages=messages,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=more,
    )
    for event, text in texts(events):
        now = time.perf_counter()
        if text and not seen.text:
            seen.first = now - begin
        elif text:
            seen.gaps.append(now - last)
        last = now if text else last
        seen.text += text
        seen.name = event.id or seen.name
        if event.choices and event.choices[0].finish_reason:
            seen.end = event.choices[0].finish_reason
            seen.first = seen.first if seen.text else now - begin
        if usage := event.usage:
            seen.prompt_tokens, seen.tokens = usage.prompt_tokens, usage.total_tokens
            if details := usage.prompt_tokens_details:
                seen.cached_tokens = details.cached_tokens or 0
    return seen


def texts(events: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Each event with the text that it brings."""
    for event in events:
        yield event, (event.choices[0].delta.content or "") if event.choices else ""


def sentence(draw: random.Random) -> str:
    """Something to say, of about twenty tokens, that was hardly said before."""
    a, b, c, d = draw.sample(sorted(set(WORDS)), 4)
    return (
        f"The {a} is {draw.randrange(1000)} steps from the {b}, behind the {c}. Where is the {d}?"
    )
