"""Eight answers at once beside one alone: tokens a second."""

from __future__ import annotations

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving_parts.servers import Server
from serving_parts.streams import chat

TOKENS = 64


def measure(server: Server, rows: int = 8, rounds: int = 5) -> dict[str, Any]:
    """In turn, so that a drift of the machine meets both."""
    draw, alone, together = random.Random(3), list[float](), list[float]()
    _rate(server, 1, draw)
    for _ in range(rounds):
        alone.append(_rate(server, 1, draw))
        together.append(_rate(server, rows, draw))
    ratios = [b / a for a, b in zip(alone, together, strict=True)]
    return {
        "tokens a second, one answer": statistics.median(alone),
        f"tokens a second, {rows} answers": statistics.median(together),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _rate(server: Server, rows: int, draw: random.Random) -> float:
    """Tokens a second after the first of each answer, of so many at once."""

    def one(number: int) -> tuple[float, float, int]:
        prompt = f"Write a long story about the number {number}, with many characters."
        seen = chat(server, [{"role": "user", "content": prompt}], TOKENS)
        end = time.perf_counter()
        return end - sum(seen.gaps), end, len(seen.gaps)

    with ThreadPoolExecutor(rows) as pool:
        ran = list(pool.map(one, [draw.randrange(10**6) for _ in range(rows)]))
    begin, end = min(run[0] for run in ran), max(run[1] for run in ran)
    return sum(run[2] for run in ran) / (end - begin)
