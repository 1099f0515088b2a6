"""What an accelerator makes of it: reading, writing and training, in one run of minutes.

    python benchmarks/gpu.py --device DEVICE --out FILE.json [--minutes 9]
    python benchmarks/gpu.py --parts record --minutes 9      # the time for one long training step
    python benchmarks/gpu.py --tiny                          # a rehearsal in seconds, on any device

Random weights of Qwen3-4B's and Qwen3-0.6B's shapes, made on the device; the paper's sizes. Needs
torch, transformers and this package, and no network. Each part has a quick and a long half, and the
quick halves come first, so that a run cut short says something of each. The file is written whole
after every measurement: what failed, what was skipped for want of time and why is in it. If the
device is lost in a measurement, a new process goes on after it.

What is measured: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from cometlm.device import default_device
from gpu_parts.decode import Decode
from gpu_parts.lab import Lab
from gpu_parts.laws import conclusions
from gpu_parts.prefill import COUNTED, Prefill
from gpu_parts.report import Clock, LostDevice, Report, TimeBox
from gpu_parts.scale import FULL, TINY
from gpu_parts.table import show
from gpu_parts.train import Train

PARTS = ("prefill", "decode", "train", "record")
_GRACE = 25.0  # seconds that a measurement may run over before the run is ended


class Half(NamedTuple):
    """Half of a part.

    Attributes:
        weight: its share of the time, against the weights of the halves that are still to come.
    """

    part: str
    run: Callable[[TimeBox], None]
    weight: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parsed(given)
    gc.freeze()  # collecting, which follows each measurement, passes over what was imported
    box = TimeBox(60 * args.minutes)
    report = new_report(args, Lab(args.device, args.scale), box.clock)
    watchdog = threading.Timer(box.left() + _GRACE, end_now, (report,))
    watchdog.daemon = True
    watchdog.start()
    try:
        run(args, report, box)
    except LostDevice as error:
        # What this process has of the device is beyond repair.
        print(f"{error}; a new process goes on", file=sys.stderr, flush=True)
        left = str(max(0.0, box.left() / 60))
        os.execv(sys.executable, [sys.executable, __file__, *given, "--minutes", left, "--go-on"])
    watchdog.cancel()
    show(json.loads(report.path.read_text(encoding="utf-8")))
    print(f"written to {report.path}")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, each as what it stands for."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", type=torch.device, help="default: an accelerator, else CPU")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--parts", default=",".join(PARTS), help="train has record in it")
    parser.add_argument("--shapes", default="4B", help="that are read and written with: 4B,0.6B")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and lengths")
    parser.add_argument("--go-on", action="store_true", help="measure only what --out has not yet")
    args = parser.parse_args(arguments)
    args.device = args.device or default_device()
    args.scale = TINY if args.tiny else FULL
    args.parts = args.parts.split(",")
    args.shapes = args.shapes.split(",")
    for name, known in (("parts", PARTS), ("shapes", tuple(args.scale.shapes))):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name} are {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.minutes < 0:
        parser.error(f"--minutes must be at least 0, got {args.minutes}")
    return args


def new_report(args: argparse.Namespace, lab: Lab, clock: Clock) -> Report:
    """The report on the device and the run, with what an earlier process has measured."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.out, lab, lambda x: conclusions(x, args.scale, args.shapes), clock)
    if args.go_on and args.out.exists():
        report.go_on()
        return report
    report.note(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        minutes=args.minutes,
        parts=args.parts,
        tiny=args.tiny,
        machine=lab.machine(),
        sizes=args.scale.comet.to_dict(),
        shapes=args.scale.shapes,
        weights="random, made on the device",
        counted=COUNTED,
    )
    return report


def run(args: argparse.Namespace, report: Report, box: TimeBox) -> None:
    """All halves, each within its share of the time that is left."""
    lab = report.bench
    assert isinstance(lab, Lab)
    report.measure("peak/matrix", lab.matrix_peak, box, size=args.scale.product)
    report.measure("peak/copy", lab.bandwidth, box, bytes=args.scale.copied)
    waiting = [half for half in halves(args, lab, report) if half.part in args.parts]
    while waiting:
        share = waiting[0].weight / sum(half.weight for half in waiting)
        waiting.pop(0).run(box.share(share))
    lab.drop()
    report.write(finished=True)


def halves(args: argparse.Namespace, lab: Lab, report: Report) -> list[Half]:
    """Every half in its order: the quick ones first."""
    reading = [Prefill(lab, report, shape) for shape in args.shapes]
    writing = [Decode(lab, report, shape) for shape in args.shapes]
    training = Train(lab, report)
    record = "record" if "train" not in args.parts else "train"
    return [
        *(Half("prefill", x.quick, 2) for x in reading),
        *(Half("decode", x.quick, 2) for x in writing),
        Half("train", training.quick, 2),
        *(Half("prefill", x.long, 4) for x in reading),
        *(Half("decode", x.long, 3) for x in writing),
        Half("train", training.long, 5),
        Half(record, training.record, 7),
    ]


def end_now(report: Report) -> None:
    """End a run whose time is over in the middle of a measurement, which nothing else can stop."""
    try:
        report.cut("the time was over")
        show(json.loads(report.path.read_text(encoding="utf-8")))
        print(f"written to {report.path}", flush=True)
    finally:
        os._exit(0)  # the file is whole, and says what was cut


if __name__ == "__main__":
    main()
