"""The curve of a training run: loss and share of right tokens step after step.

    python benchmarks/curve.py out/smollm2 [--output out/smollm2.png]

Reads the newest whole checkpoint of the run. Faint: each logged mean; strong: their running median.
Dotted lines are where a stage of the recipe ends; the loss there jumps since the task got harder.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from cometlm.train.trainer import STATE, last_checkpoint
from common import OUT, argument_parser

PLAIN = {"loss": "loss", "mean_token_accuracy": "right answer tokens"}
SHOWN = {  # of runs that ask on the way
    "answer_loss": "loss of answers",
    "answers_right": "right answer tokens",
    "text_loss": "loss of the text",
}
NEAR = 4  # logged values on each side that a median is taken of


def logged(run: Path) -> list[dict[str, Any]]:
    """What a run logged of its training steps, in order."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        raise SystemExit(f"{run} holds no whole checkpoint")
    history = json.loads((checkpoint / STATE).read_text())["log_history"]
    return [row for row in history if "loss" in row]


def stage_ends(run: Path) -> list[int]:
    """The last step of each stage but the last, if the run had stages."""
    generated = json.loads((run / "train.json").read_text())["generated"] or {"stages": []}
    steps = [stage["steps"] for stage in generated["stages"]]
    return [sum(steps[: i + 1]) for i in range(len(steps) - 1)]


def median(values: list[float]) -> list[float]:
    """The running median of values."""
    near = [values[max(0, i - NEAR) : i + NEAR + 1] for i in range(len(values))]
    return [statistics.median(part) for part in near]


def picture(run: Path, path: Path) -> None:
    """Both curves, one below the other."""
    import matplotlib.pyplot as plt

    rows = logged(run)
    steps = [row["step"] for row in rows]
    shown = SHOWN if all(name in row for name in SHOWN for row in rows) else PLAIN
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, 2.5 * len(shown)), sharex=True, layout="constrained"
    )
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        values = [float(row[name]) for row in rows]
        axes.plot(steps, values, color="C0", alpha=0.3, lw=0.8)
        axes.plot(steps, median(values), color="C0")
        axes.set(ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        for end in stage_ends(run):
            axes.axvline(end, color="grey", lw=0.6, ls=":")
    panels[-1].set(xlabel="steps")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draw one run."""
    parser = argument_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    path = args.output or OUT / f"{args.run.name}.png"
    picture(args.run, path)
    print(path)


if __name__ == "__main__":
    main()
