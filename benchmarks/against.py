"""Is this tree as fast as another commit? Reading and decoding, in pairs of processes.

    python benchmarks/against.py REVISION [--transformers 5.23.0] [--model smollm2] [--pairs 4]
                                 [--tokens 4000] [--new 80] [--chunk-size 256] [--capacity 64]

Each pair runs the other commit's sources and these, one after the other, in this environment, or
the other commit beside another transformers, which pip fetches into a folder for the while;
which comes first changes from pair to pair, since a machine's speed drifts, and of some rounds
the fastest counts, since a machine has other things to do. What is printed, and
written to out/against.json, is what share of the other's time these take: the median of the pairs'
ratios, and all of them. 1.00 is alike. Beside them stand the machine's bounds: the time in which
memory gives all weights once, which a token cannot be written in less than, and the share of the
rate of a large matrix product at which reading runs the weights' products. Weights are packed where
a tree can. With one thread (OMP_NUM_THREADS=1) the process's own time counts, which other work on
the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cometlm
from common import argument_parser, machine, weights_once, write
from prefill import matrix_peak

ROOT = Path(__file__).parents[1]
MEASURE = """
import json, sys, time, torch, cometlm
name, tokens, new, rounds, size, capacity = sys.argv[1], *map(int, sys.argv[2:])
model, _ = cometlm.load(name, chunk_size=size, capacity=capacity)
if hasattr(model, "pack_weights"):  # as the command line does
    model.pack_weights()
clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
ids = torch.randint(3, 40_000, (tokens,), generator=torch.Generator().manual_seed(0))
prompt = ids[None, :200].to(model.device)
options = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": new, "max_new_tokens": new}

@torch.no_grad()
def seconds(work):
    found = []
    for _ in range(1 + rounds):
        start = clock()
        work()
        found.append(clock() - start)
    return min(found[1:])

reading = seconds(lambda: model.session().read(ids))
decoding = seconds(lambda: model.generate(prompt, **options))
print(json.dumps({"reading": reading, "decoding": decoding}))
"""


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("revision", help="a commit or a tag to compare with")
    parser.add_argument("--transformers", metavar="VERSION", help="for the other commit")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4000, help="that are read")
    parser.add_argument("--new", type=int, default=80, help="that are written")
    parser.add_argument("--rounds", type=int, default=4, help="of which the fastest counts")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--capacity", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree, packages = Path(folder) / "tree", Path(folder) / "packages"
        if args.transformers:
            install(f"transformers=={args.transformers}", packages)
        git("worktree", "add", "--detach", str(tree), args.revision)
        try:
            other = Tree(tree, packages)
            pairs = [measured_pair(other, args, number) for number in range(args.pairs)]
        finally:
            git("worktree", "remove", "--force", str(tree))
    ratios = {
        name: sorted(ours[name] / theirs[name] for theirs, ours in pairs)
        for name in ("reading", "decoding")
    }
    for name, values in ratios.items():
        shown = " ".join(f"{value:.3f}" for value in values)
        print(
            f"{name:<9}takes {statistics.median(values):.3f} of {args.revision}'s time  ({shown})"
        )
    ours = {name: statistics.median(mine[name] for _, mine in pairs) for name in ratios}
    beside = bounds(args, ours)
    print(
        f"a token is written in {beside['token_ms']:.1f} ms; all weights once from memory take "
        f"{beside['bound_ms']:.1f} ms\nreading runs at {beside['share_of_peak']:.2f} of the "
        f"matrix peak, {beside['peak_gflops']:.0f} GFLOP/s"
    )
    write(
        "against",
        {
            "revision": args.revision,
            "ratios": ratios,
            "seconds": pairs,
            "bounds": beside,
            "machine": machine(),
        },
    )


def bounds(args: argparse.Namespace, seconds: dict[str, float]) -> dict[str, float]:
    """What this machine could do, beside what was measured of this tree."""
    model, _ = cometlm.load(args.model)
    peak = matrix_peak(model.device, model.dtype)
    # Of layers alone: reading asks the head for a token at the end of a chunk at most.
    products = sum(x.numel() for x in model.model.cells.parameters() if x.dim() == 2)
    rate = 2 * products * args.tokens / seconds["reading"]
    return {
        **weights_once(model),
        "token_ms": 1000 * seconds["decoding"] / args.new,
        "peak_gflops": peak / 1e9,
        "share_of_peak": rate / peak,
    }


class Tree(NamedTuple):
    """Sources, and packages that go before the environment's."""

    path: Path
    packages: Path | None = None


def measured_pair(
    other: Tree, args: argparse.Namespace, number: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the other sources and of these."""
    trees = [other, Tree(ROOT)]
    found = {tree: measured(tree, args) for tree in (trees if number % 2 else trees[::-1])}
    return found[trees[0]], found[trees[1]]


def measured(tree: Tree, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one tree's sources, in a process of its own."""
    sizes = map(str, (args.tokens, args.new, args.rounds, args.chunk_size, args.capacity))
    command = [sys.executable, "-c", MEASURE, args.model, *sizes]
    places = [tree.path / "src", *([tree.packages] if tree.packages else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run(
        command, env=environment, cwd=tree.path, stdout=subprocess.PIPE, check=True
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def install(package: str, folder: Path) -> None:
    """Fetch one package, without what it depends on, into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), package], check=True)


def git(*arguments: str) -> None:
    """Run git in this tree."""
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    main()
