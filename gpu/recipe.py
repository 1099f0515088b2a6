"""Train a recipe for some minutes on a machine that is only lent, and say what to carry back.

    python gpu/recipe.py [recipes/answers-gpu.yaml] [--minutes 8] [--device DEVICE] [--out FOLDER]

`--set key=value` changes a field. The same command goes on from what is in the folder: carry it
there and back. Needs torch, transformers, peft and what the recipe's tasks need, and no network
(docs/gpu.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cometlm.train.config_file import read_config
from cometlm.train.loop import train_for

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "answers-gpu.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Train a recipe for some minutes.")
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--device", help="default: an accelerator, else the CPU")
    parser.add_argument("--out", type=Path, default=Path("out/train"))
    parser.add_argument("--workers", type=int, default=8, help="processes that make batches")
    parser.add_argument("--set", action="append", default=[], help="change a field: key=value")
    options = parser.parse_args(arguments)
    if torch.accelerator.is_available():
        torch.set_float32_matmul_precision("high")  # trained weights are in float32
    try:
        config = read_config(options.recipe, [f"output={options.out}", *options.set])
        steps = train_for(
            config, options.minutes, device=options.device, workers=options.workers, log=_say
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"gpu/recipe.py: {error}", file=sys.stderr)
        return 1
    _say(f"{steps} steps are done; the same command goes on with what {options.out} holds")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
