"""What `cometlm serve` promises, measured through OpenAI's client against a process of its own.

    python benchmarks/serving.py turns [--turns 200]     # a late turn beside an early one
    python benchmarks/serving.py together                # eight answers at once beside one
    python benchmarks/serving.py load [--clients 32] [--minutes 5]   # is any answer another's?
    python benchmarks/serving.py beside [--turns 100]    # `transformers serve`, drawn

Each writes out/serving-NAME.json. `--model` is SmolLM2 with the memory that ships unless another is
named; other options, such as `--chunk-size 512`, are those of `cometlm serve`. Needs
`pip install -e '.[serve,dev]'`; `beside` also `pip install 'transformers[serving]'`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import OUT, argument_parser, machine, write
from serving_parts import beside, load, together, turns
from serving_parts.servers import ours, running, theirs

WHAT = ("turns", "together", "load", "beside")
_TURNS = {"turns": 200, "beside": 100}  # unless said
_LEAST = {"turns": turns.EARLY[1] + 1, "beside": 2}  # else there is nothing to compare


def main() -> None:
    """Measure one thing."""
    args = _parsed()
    with tempfile.TemporaryDirectory() as folder:
        result = _measure(args, Path(folder))
    told = {"machine": machine(), "model": args.model, "options": args.options}
    write(f"serving-{args.what}", {**told, **result})


def _parsed() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, help="200, at least 16; 100 with beside, at least 2")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.0)
    args, options = parser.parse_known_args()
    args.options = options
    if args.turns is None:
        args.turns = _TURNS.get(args.what, 0)
    if args.turns < (least := _LEAST.get(args.what, 0)):
        parser.error(f"--turns must be at least {least} here, got {args.turns}")
    if args.clients < 1 or not args.minutes > 0:
        parser.error("--clients must be at least 1, and --minutes more than 0")
    return args


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    store, log = folder / "store", folder / "log"
    own = ["--dtype", "float32", "--max-running", "16"] if args.what == "load" else []
    with running(ours(args.model, store, log, [*own, *args.options])) as server:
        if args.what == "turns":
            measured = turns.measure(server, args.turns)
            return measured | {"bytes of a session's file": _sizes(store)}
        if args.what == "together":
            return together.measure(server)
        if args.what == "load":
            return load.measure(server, args.clients, args.minutes)
        beside.save_backbone(args.model, folder / "backbone")
        with running(theirs(folder / "backbone", log)) as other:
            both = {"cometlm serve": server, "transformers serve": other}
            return beside.measure(both, args.turns, OUT / "serving-beside.png")


def _sizes(store: Path) -> dict[str, int]:
    """Smallest and largest of the sessions that answers left, the first ones aside."""
    files = sorted(store.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    sizes = [path.stat().st_size for path in files[15:]]
    return {"least": min(sizes), "most": max(sizes)}


if __name__ == "__main__":
    main()
