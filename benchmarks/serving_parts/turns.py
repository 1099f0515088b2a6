"""A long chat: what a late turn costs beside an early one.

A processor's speed drifts by more than what is looked for, so the two are taken by turns: when the
long chat has its last eleven turns before it, another begins, and each of its turns 5 to 15 is
followed by one of the long one.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Any

from serving_parts.servers import Server
from serving_parts.streams import Streamed, chat, sentence

ANSWER = 12  # tokens
EARLY = (5, 15)
LATE = EARLY[1] - EARLY[0] + 1  # turns that are compared with these

Chat = Callable[[Server, int], Iterator[Streamed]]


def measure(server: Server, turns: int) -> dict[str, Any]:
    """Chats whose session is named, and chats whose client sends all of it each time."""
    ways = {"session named": named, "history sent": resent}
    return {"turns": turns} | {name: _compared(way, server, turns) for name, way in ways.items()}


def named(server: Server, seed: int) -> Iterator[Streamed]:
    """Each turn names the answer before it and sends what is new."""
    draw, more = random.Random(seed), dict[str, str]()
    while True:
        message = {"role": "user", "content": sentence(draw)}
        seen = chat(server, [message], ANSWER, **more)
        more = {"session": seen.name}
        yield seen


def resent(server: Server, seed: int) -> Iterator[Streamed]:
    """Each turn sends the whole conversation, as most clients do."""
    draw, messages = random.Random(seed), list[dict[str, str]]()
    while True:
        messages.append({"role": "user", "content": sentence(draw)})
        seen = chat(server, messages, ANSWER)
        messages.append({"role": "assistant", "content": seen.text})
        yield seen


def _compared(way: Chat, server: Server, turns: int) -> dict[str, Any]:
    long, young = way(server, 1), way(server, 2)
    before = list(islice(long, turns - LATE))
    for _ in range(EARLY[0] - 1):
        next(young)
    pairs = [(next(young), next(long)) for _ in range(LATE)]
    return _told([early for early, _ in pairs], [*before, *(late for _, late in pairs)])


def _told(early: list[Streamed], seen: list[Streamed]) -> dict[str, Any]:
    late = seen[-LATE:]
    medians = [statistics.median(one.first for one in some) for some in (early, late)]
    cached = [after.cached_tokens / before.tokens for before, after in pairwise(seen)]
    return {
        "tokens of the last prompt": seen[-1].prompt_tokens,
        "median seconds to the first token, turns 5 to 15 of another": medians[0],
        "median seconds to the first token, the last eleven": medians[1],
        "median seconds that the client took to make a request, the last eleven": statistics.median(
            one.made for one in late
        ),
        "ratio": medians[1] / medians[0],
        "cached share of what came before, last turn": cached[-1],
        "cached share of what came before, least from turn 100 on": min(cached[98:], default=None),
        "seconds to the first token, turns 5 to 15 of another": [one.first for one in early],
        "seconds to the first token": [one.first for one in seen],
    }
