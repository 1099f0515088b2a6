"""How OpenMP's threads should wait: what sleeping costs alone, and gains beside another process.

    python benchmarks/waiting.py [--model smollm2] [--tokens 1000] [--new 40] [--rounds 3]

Between two parallel parts of a kernel, threads wait for the next by turning in circles. That is
quick where a core is theirs, and starves both where two processes share it. Each way to wait is
tried alone and beside a process that multiplies matrices with as many threads; reading and decoding
are timed, and ratios are those to the library's default in the same round. A run that takes longer
than --limit seconds is broken off and counts as that. Writes out/waiting.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from common import argument_parser, machine, write

# By the variables that GNU's and LLVM's libraries read when they are loaded.
WAYS: dict[str, dict[str, str]] = {
    "default": {},
    "short": {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
}
_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
MEASURE = """
import json, sys, time, torch, cometlm
name, tokens, new = sys.argv[1], *map(int, sys.argv[2:])
model, _ = cometlm.load(name, chunk_size=256, capacity=64)
model.pack_weights()
ids = torch.randint(3, 40_000, (tokens,), generator=torch.Generator().manual_seed(0))
prompt = ids[None, :200].to(model.device)
options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": new, "max_new_tokens": new}

@torch.no_grad()
def seconds(work):
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

reading = seconds(lambda: model.session().read(ids))
decoding = seconds(lambda: model.generate(prompt, **options))
print(json.dumps({"reading": reading, "decoding": decoding}))
"""
BUSY = """
import torch
a = torch.randn(512, 512)
while True:
    a = torch.nn.functional.normalize(a @ a)
"""


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1000, help="that are read")
    parser.add_argument("--new", type=int, default=40, help="that are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one run")
    args = parser.parse_args()
    sizes = (args.model, str(args.tokens), str(args.new))
    seconds: dict[str, dict[str, list[dict[str, float]]]] = {}
    for place, company in (("alone", nullcontext), ("beside", another_process)):
        found = seconds.setdefault(place, {way: [] for way in WAYS})
        for _ in range(args.rounds):
            for way, variables in WAYS.items():
                with company():
                    found[way].append(measured(variables, sizes, args.limit))
    for place, found in seconds.items():
        for part in ("reading", "decoding"):
            for way, runs in found.items():
                ratios = [a[part] / b[part] for a, b in zip(runs, found["default"], strict=True)]
                middle = statistics.median(one[part] for one in runs)
                print(
                    f"{place:<7} {part:<9} {way:<8} {middle:7.2f} s  "
                    f"{statistics.median(ratios):.2f} of the default's time "
                    f"({min(ratios):.2f} to {max(ratios):.2f})"
                )
    write("waiting", {"seconds": seconds, "limit": args.limit, "machine": machine()})


def measured(variables: dict[str, str], sizes: tuple[str, ...], limit: float) -> dict[str, float]:
    """Seconds of reading and decoding in a process that waits in one way."""
    environment = {k: v for k, v in os.environ.items() if k not in _OWN} | variables
    command = [sys.executable, "-c", MEASURE, *sizes]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"reading": limit, "decoding": limit}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def another_process() -> Iterator[None]:
    """A process that keeps all cores busy, waiting as the library does by default."""
    environment = {k: v for k, v in os.environ.items() if k not in _OWN}
    with subprocess.Popen([sys.executable, "-c", BUSY], env=environment) as busy:
        try:
            yield
        finally:
            busy.kill()


if __name__ == "__main__":
    main()
