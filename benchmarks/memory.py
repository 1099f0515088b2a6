"""Peak memory after 30k and after 300k tokens: must stay within 2% (one process, one text).

    python benchmarks/memory.py [--tokens 300000]

Reads the sources of transformers with SmolLM2 and notes the process's peak at every chunk, counted
from after loading. Writes out/memory.json and the picture out/memory.png.
"""

from __future__ import annotations

import bisect
import sys
import time

import cometlm
from cometlm.device import peak_memory, readable_bytes, reset_peak_memory
from common import OUT, argument_parser, machine, program_text, write


def measure(total: int) -> list[tuple[int, int, int, float]]:
    """(tokens, bytes held, peak bytes, seconds) after every chunk."""
    model, tokenizer = cometlm.load("smollm2", seed=0)  # with the sizes that the figures are of
    session = cometlm.Session(model, tokenizer)
    reset_peak_memory(model.device)  # loading is not reading
    start, curve = time.perf_counter(), []
    for stats in session.reading(program_text()):
        seconds = time.perf_counter() - start
        curve.append((stats.tokens, stats.memory_bytes, peak_memory(model.device), seconds))
        if len(curve) % 50 == 0:
            print(f"{stats.tokens:>9,} tokens  {readable_bytes(curve[-1][2])}", file=sys.stderr)
        if stats.tokens >= total:
            return curve
    raise ValueError(f"the text ended after {curve[-1][0]} tokens, {total} are needed")


def at(curve: list[tuple[int, int, int, float]], tokens: int) -> tuple[int, int, int, float]:
    """The first point with at least that many tokens."""
    return curve[min(bisect.bisect_left([point[0] for point in curve], tokens), len(curve) - 1)]


def picture(curve: list[tuple[int, int, int, float]]) -> None:
    """Peak and held memory against tokens read."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    tokens = [point[0] / 1000 for point in curve]
    axes.plot(tokens, [point[2] / 2**20 for point in curve], label="peak of the process")
    axes.plot(tokens, [point[1] / 2**20 for point in curve], label="memory held")
    axes.set(xlabel="thousand tokens read", ylabel="MiB", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT / "memory.png", dpi=150)


def main() -> None:
    """Measure, print and draw; exit 1 if the peak grew by more than 2%."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=300_000)
    total = parser.parse_args().tokens
    curve = measure(total)
    early, late = at(curve, total // 10), curve[-1]
    grown = late[2] / early[2]
    write(
        "memory",
        {
            "machine": machine(),
            "tokens": [early[0], late[0]],
            "peak_bytes": [early[2], late[2]],
            "held_bytes": [early[1], late[1]],
            "tokens_per_second": late[0] / late[3],
            "ratio": grown,
            "holds": grown <= 1.02,
        },
    )
    picture(curve)
    sys.exit(grown > 1.02)


if __name__ == "__main__":
    main()
