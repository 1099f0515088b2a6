"""A long chat: what a late turn costs beside an early one."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from serving_parts.servers import Server
from serving_parts.streams import Streamed, chat, sentence

ANSWER = 12  # tokens
EARLY = (5, 15)


def measure(server: Server, turns: int) -> dict[str, Any]:
    """A chat whose session is named, and one whose client sends all of it each time."""
    return {
        "turns": turns,
        "session named": _told(named(server, turns)),
        "history sent": _told(resent(server, turns)),
    }


def named(server: Server, turns: int) -> list[Streamed]:
    """Each turn names the answer before it and sends what is new."""
    draw, seen = random.Random(1), list[Streamed]()
    for _ in range(turns):
        more = {"session": seen[-1].name} if seen else {}
        message = {"role": "user", "content": sentence(draw)}
        seen.append(chat(server, [message], ANSWER, **more))
    return seen


def resent(
    server: Server, turns: int, tell: Callable[[int], object] = lambda turn: None
) -> list[Streamed]:
    """Each turn sends the whole conversation, as most clients do."""
    draw, messages, seen = random.Random(2), list[dict[str, str]](), list[Streamed]()
    for turn in range(turns):
        messages.append({"role": "user", "content": sentence(draw)})
        seen.append(chat(server, messages, ANSWER))
        messages.append({"role": "assistant", "content": seen[-1].text})
        tell(turn)
    return seen


def _told(seen: list[Streamed]) -> dict[str, Any]:
    first = [one.first for one in seen]
    early, late = first[EARLY[0] - 1 : EARLY[1]], first[-11:]
    cached = [after.cached_tokens / before.tokens for before, after in pairwise(seen)]
    return {
        "tokens of the last prompt": seen[-1].prompt_tokens,
        "median seconds to the first token, turns 5 to 15": statistics.median(early),
        "median seconds to the first token, the last eleven": statistics.median(late),
        "median seconds that the client took to make a request, the last eleven": statistics.median(
            one.made for one in seen[-11:]
        ),
        "ratio": statistics.median(late) / statistics.median(early),
        "cached share of what came before, last turn": cached[-1],
        "cached share of what came before, least from turn 100 on": min(cached[98:], default=None),
        "seconds to the first token": first,
    }
