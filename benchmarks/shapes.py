"""Does a last chunk of a length never seen cost more than one seen before, or than one padded?

    python benchmarks/shapes.py [--lengths 12] [--threads 2]

A sample of one whole chunk and a last one: its first call with that length in the process (kernels
are built for it), the same call again, and the call with the last chunk padded to a multiple of
64, a shape that is warm. Read is the forward pass alone, trained forward and backward with LoRA and
memory, recomputed. Bucketing gains where the padded call is faster than the first.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import cometlm
from cometlm.train.trainable import set_trainable
from common import argument_parser, machine, write

CHUNK, BUCKET = 256, 64


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reading(model: Any, ids: torch.Tensor) -> None:
    """The forward pass."""
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)


def training(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward with labels on the end."""
    labels = ids.clone()
    labels[:, :-8] = -100
    model(ids, labels=labels, use_cache=False).loss.backward()
    model.zero_grad()


def compare(
    step: Callable[[Any, torch.Tensor], None], model: Any, lasts: list[int]
) -> dict[str, float]:
    """Median ratios to the repeated call, over last chunks of some lengths."""
    ids = torch.randint(100, 40_000, (1, 2 * CHUNK))
    for warm in range(BUCKET, CHUNK + 1, BUCKET):
        step(model, ids[:, : CHUNK + warm])
    first, padded, once = [], [], []
    for last in lasts:
        exact = ids[:, : CHUNK + last]
        whole = ids[:, : CHUNK + -(-last // BUCKET) * BUCKET]
        new, again, bucket = (seconds(lambda x=x: step(model, x)) for x in (exact, exact, whole))
        first.append(new / again)
        padded.append(bucket / again)
        once.append(new - again)
    return {
        "first_over_again": statistics.median(first),
        "padded_over_again": statistics.median(padded),
        "first_minus_again_seconds": statistics.median(once),
    }


def main() -> None:
    """Compare, print and keep."""
    parser = argument_parser(__doc__)
    parser.add_argument("--lengths", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = random.Random(0)
    odd = [n for n in range(9, CHUNK) if n % BUCKET]
    read, trained = (rng.sample(odd, args.lengths) for _ in range(2))
    model = cometlm.load("smollm2", seed=0, chunk_size=CHUNK, readout_tokens=16, capacity=64)[0]
    result: dict[str, Any] = {"machine": machine(), "read": compare(reading, model, read)}
    set_trainable(model.train(), "lora")
    model.activation_checkpointing_enable({})
    result["trained"] = compare(training, model, trained)
    write("shapes", result)


if __name__ == "__main__":
    main()
