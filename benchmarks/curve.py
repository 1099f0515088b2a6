"""The curve of a training run: its losses and the share of right tokens, step after step.

    python benchmarks/curve.py out/smollm2 [--output out/smollm2.png]
    python benchmarks/curve.py out/first out/second    # runs that went on from one another

Reads the newest whole checkpoint of each run. Faint: each logged value; strong: their running
median. Dotted lines are where the next run begins.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cometlm.train.trainer import STATE, last_checkpoint
from common import OUT, argument_parser

LABELS = {
    "loss": "loss",
    "text_loss": "loss of the text",
    "answer_loss": "loss of answers",
    "answer_accuracy": "right answer tokens",
    "mean_token_accuracy": "right tokens",
    "eval_loss": "loss of records held out",
}
NEAR = 4  # logged values on each side that a median is taken of


def logged(run: Path) -> tuple[list[dict[str, Any]], int]:
    """What a run logged of its steps, in order, and how many steps those were."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        raise SystemExit(f"{run} holds no whole checkpoint")
    state = json.loads((checkpoint / STATE).read_text())
    return state["log_history"], state["global_step"]


def one_after_the_other(runs: Sequence[Path]) -> tuple[list[dict[str, Any]], list[int]]:
    """What several runs logged, as one, and the last step of each but the last."""
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    before = 0
    for run in runs:
        own, steps = logged(run)
        rows += [row | {"step": row["step"] + before} for row in own]
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
    shown = {name: label for name, label in LABELS.items() if name in found}
    if not shown:
        raise SystemExit("the runs have logged no loss yet: see trainer.logging_steps")
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, 2 * len(shown)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, (name, label) in zip(panels[:, 0], shown.items(), strict=True):
        # Batches without a question have no answers.
        values = [float(row[name]) for row in rows if name in row]
        steps = [row["step"] for row in rows if name in row]
        axes.plot(steps, values, color="C0", alpha=0.3, lw=0.8)
        axes.plot(steps, median(values), color="C0")
        axes.set(ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        for end in ends:
            axes.axvline(end, color="grey", lw=0.6, ls=":")
    panels[-1, 0].set(xlabel="steps")
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
