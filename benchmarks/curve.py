"""The curve of a training run: loss and share of right tokens step after step.

    python benchmarks/curve.py out/smollm2 [--output out/smollm2.png]
    python benchmarks/curve.py out/first out/second    # runs that went on from one another

Reads the newest whole checkpoint of each run. Faint: each logged mean; strong: their running
median. Dotted lines are where a stage of the recipe ends; the loss there jumps since the task got
harder.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from cometlm.train.trainer import STATE, last_checkpoint
from common import OUT, argument_parser

PLAIN = {"loss": "loss", "mean_token_accuracy": "right tokens"}
ON_THE_WAY = {  # of runs that ask on the way
    "answer_loss": "loss of answers",
    "answers_right": "right answer tokens",
    "text_loss": "loss of the text",
    "told_loss": "loss of what\nreadout tokens say",
}
NEAR = 4  # logged values on each side that a median is taken of


def logged(run: Path) -> tuple[list[dict[str, Any]], int]:
    """What a run logged of its training steps, in order, and how many steps those were."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        raise SystemExit(f"{run} holds no whole checkpoint")
    state = json.loads((checkpoint / STATE).read_text())
    return [row for row in state["log_history"] if "loss" in row], state["global_step"]


def stage_ends(run: Path, steps: int) -> list[int]:
    """The last step of each stage that ended before the run's last step, if it had stages."""
    generated = json.loads((run / "train.json").read_text())["generated"] or {"stages": []}
    ends = accumulate(stage["steps"] for stage in generated["stages"])
    return [end for end in ends if end < steps]


def one_after_the_other(runs: Sequence[Path]) -> tuple[list[dict[str, Any]], list[int]]:
    """What several runs logged, as one, and where their stages end."""
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    before = 0
    for run in runs:
        own, steps = logged(run)
        rows += [row | {"step": row["step"] + before} for row in own]
        ends += [before + end for end in stage_ends(run, steps)]
        before += steps
        ends.append(before)
    return rows, ends[:-1]


def median(values: list[float]) -> list[float]:
    """The running median of values."""
    near = [values[max(0, i - NEAR) : i + NEAR + 1] for i in range(len(values))]
    return [statistics.median(part) for part in near]


def picture(runs: Sequence[Path], path: Path) -> None:
    """The curves, one below the other."""
    import matplotlib.pyplot as plt

    rows, ends = one_after_the_other(runs)
    found = {name for row in rows for name in row}
    shown = {name: label for name, label in ON_THE_WAY.items() if name in found} or PLAIN
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, 2.5 * len(shown)), sharex=True, layout="constrained"
    )
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        # Batches without a key have no answers.
        values = [float(row[name]) for row in rows if name in row]
        steps = [row["step"] for row in rows if name in row]
        axes.plot(steps, values, color="C0", alpha=0.3, lw=0.8)
        axes.plot(steps, median(values), color="C0")
        axes.set(ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        for end in ends:
            axes.axvline(end, color="grey", lw=0.6, ls=":")
    panels[-1].set(xlabel="steps")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draw one run, or several as one."""
    parser = argument_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    path = args.output or OUT / f"{args.runs[-1].name}.png"
    picture(args.runs, path)
    print(path)


if __name__ == "__main__":
    main()
