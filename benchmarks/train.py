"""Tokens/s and peak memory of one training step against its length, for three ways to train.

    python benchmarks/train.py [--lengths 2048 … 131072]      # the table and the picture
    python benchmarks/train.py --promises                     # growth, every-k and time ratios

SmolLM2 with LoRA and, but for `full`, its memory; one row, forward and backward, each in a process
of its own. `full` is the plain backbone with transformers' own gradient checkpointing; `plain`
keeps the whole graph of CoMeT; `recompute` keeps every chunk's border, `every` every 64th. A cell
predicted, from the two shorter ones, to need over 20 GiB, more than the machine has to spare, or
10 minutes is skipped, and recorded with its prediction. Everything is written to out/train.json as
it comes; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cometlm
from cometlm.checkpoints.atomic_write import write_whole
from cometlm.device import peak_memory, readable_bytes, reset_peak_memory
from cometlm.train.trainable import lora_config, set_trainable
from common import OUT, argument_parser, machine

SIZES = {"chunk_size": 256, "readout_tokens": 32, "stride": 8, "capacity": 64}
EVERY = 64
WAYS = ("full", "plain", "recompute", "every")
MOST_BYTES, MOST_SECONDS = 20 * 2**30, 600.0
SPARED_BYTES = 4 * 2**30  # of the machine's memory: the loaded model, and what predictions miss
Cell = dict[str, Any]


# --- one cell, in a process of its own ----------------------------------------------------------


def measure(way: str, length: int) -> Cell:
    """Seconds and peak bytes, counted from after loading, of the second of two steps or of one."""
    model = prepared(way)
    rng = torch.Generator().manual_seed(0)
    step(model, torch.randint(100, 40_000, (1, 1024), generator=rng))  # kernels are built once
    ids = torch.randint(100, 40_000, (1, length), generator=rng)
    before = resident()
    reset_peak_memory(model.device)
    start = time.perf_counter()
    step(model, ids)
    seconds = time.perf_counter() - start
    return {
        "way": way,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_bytes": peak_memory(model.device) - before,
    }


def prepared(way: str) -> Any:
    """The model, trained as `way` says."""
    if way == "full":
        from peft import get_peft_model

        model = cometlm.detach(cometlm.load("smollm2", seed=0)[0])
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = lora_config()
        config.target_modules, config.modules_to_save = names, None
        wrapped = get_peft_model(model, config)
        wrapped.enable_input_require_grads()
        wrapped.activation_checkpointing_enable()
        return wrapped.train()
    model = cometlm.load("smollm2", seed=0, **SIZES)[0]
    set_trainable(model, "lora")
    if way != "plain":
        every = EVERY if way == "every" else 1
        model.activation_checkpointing_enable({"every": every})
    return model.train()


def step(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward with the loss on the end, as on an answer."""
    labels = ids.clone()
    labels[:, :-64] = -100
    if hasattr(model, "peft_config") and not isinstance(model, cometlm.CometForCausalLM):
        out = model(ids, labels=labels[:, -64:], logits_to_keep=64, use_cache=False)
    else:
        out = model(ids, labels=labels, use_cache=False)
    out.loss.backward()
    model.zero_grad()


def resident() -> int:
    """Bytes of the process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# --- the table ----------------------------------------------------------------------------------


class Table:
    """Cells that were measured or skipped, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.cells: list[Cell] = kept.get("cells", [])
        self.promises: dict[str, Any] = kept.get("promises", {})

    def get(self, way: str, length: int, limited: bool = True) -> Cell:
        """A cell, measured now if it is missing; skipped if it is predicted to be too large."""
        for cell in self.cells:
            is_it = (cell["way"], cell["length"]) == (way, length)
            if is_it and ("skipped" not in cell or (limited and too_large(cell))):
                return cell
        predicted = self.predict(way, length)
        if limited and predicted and too_large(predicted):
            cell = {"way": way, "length": length, "skipped": True, **predicted}
        else:
            cell = in_a_process(way, length)
        self.cells = [c for c in self.cells if (c["way"], c["length"]) != (way, length)] + [cell]
        self.save()
        print(line(cell), flush=True)
        return cell

    def predict(self, way: str, length: int) -> dict[str, float] | None:
        """From the two longest shorter cells: each figure as a + b·n, full attention a·n + b·n²."""
        known = sorted(
            (c for c in self.cells if c["way"] == way and c["length"] < length),
            key=lambda c: c["length"],
        )[-2:]
        if any("skipped" in cell for cell in known):
            last = known[-1]
            grown = length / last["length"]
            by_time = grown**2 if way == "full" else grown
            return {
                "seconds": last["seconds"] * by_time,
                "peak_bytes": last["peak_bytes"] * grown,
            }
        if len(known) < 2:
            return None
        (n, m), found = (c["length"] for c in known), {}
        for figure in ("seconds", "peak_bytes"):
            one, two = (c[figure] for c in known)
            if way == "full" and figure == "seconds":  # a·n + b·n²
                b = (two / m - one / n) / (m - n)
                found[figure] = length * (two / m + b * (length - m))
            else:
                found[figure] = two + (two - one) / (m - n) * (length - m)
        return found

    def save(self) -> None:
        """Write the file."""
        sizes = {**SIZES, "every": EVERY}
        result = {"machine": machine(), "sizes": sizes, "cells": self.cells}
        result["promises"] = self.promises
        write_whole(self._path, (json.dumps(result, indent=1) + "\n").encode())


def too_large(predicted: dict[str, float]) -> bool:
    """Whether a cell is not worth running."""
    most = min(MOST_BYTES, available() - SPARED_BYTES)
    return predicted["peak_bytes"] > most or predicted["seconds"] > MOST_SECONDS


def available() -> int:
    """Bytes of the machine's memory that nobody uses."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(free) * 1024


def in_a_process(way: str, length: int) -> Cell:
    """Measure in a process of its own, so that no cell's memory counts in another's."""
    command = [sys.executable, __file__, "--cell", way, str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    cell: Cell = json.loads(done.stdout.splitlines()[-1])
    return cell


def line(cell: Cell) -> str:
    """A cell for people."""
    what = "skipped, predicted" if "skipped" in cell else "measured"
    return (
        f"{cell['way']:<10} {cell['length']:>8,} tokens  {what:<18}  {cell['seconds']:>8,.1f} s  "
        f"{cell['length'] / cell['seconds']:>6,.0f} tokens/s  {readable_bytes(cell['peak_bytes'])}"
    )


# --- what must hold -----------------------------------------------------------------------------


def border_bytes(length: int) -> int:
    """Bytes that the borders of a step hold by count: what is new at each chunk's end."""
    model = cometlm.load("smollm2", seed=0, **SIZES)[0]
    set_trainable(model, "lora")
    size = SIZES["chunk_size"]
    with torch.no_grad():
        cache = model(torch.full((1, size + 1), 100), use_cache=True).past_key_values
    one = sum(
        (0 if x.memory.state is None else x.memory.state.nbytes)
        + sum(block.nbytes for block in x.memory.entries)
        for x in cache.layers
    )
    return one * ((length - 1) // size)


def promises(table: Table, short: int, long: int) -> dict[str, Any]:
    """Growth against the count, every-k memory and time, and time against the plain graph."""
    few, many = (table.get("recompute", n, limited=False) for n in (short, long))
    few_k, many_k = (table.get("every", n, limited=False) for n in (short, long))
    plain = [c for c in table.cells if c["way"] == "plain" and "skipped" not in c]
    pairs = [(c, table.get("recompute", c["length"])) for c in plain]
    growth = many["peak_bytes"] - few["peak_bytes"]
    counted = border_bytes(long) - border_bytes(short)
    found = {
        "lengths": [short, long],
        "growth_bytes": growth,
        "counted_bytes": counted,
        "growth_over_counted": growth / counted,
        "every_k_peak_ratio": many_k["peak_bytes"] / few_k["peak_bytes"],
        "every_k_time_over_all_borders": many_k["seconds"] / many["seconds"],
        "recompute_time_over_plain": {a["length"]: b["seconds"] / a["seconds"] for a, b in pairs},
    }
    found["holds"] = {
        "growth_over_counted <= 1.15": found["growth_over_counted"] <= 1.15,
        "every_k_peak_ratio <= 1.25": found["every_k_peak_ratio"] <= 1.25,
        "every_k_time_over_all_borders <= 1.7": found["every_k_time_over_all_borders"] <= 1.7,
        "recompute_time_over_plain <= 1.45": None  # nothing was measured to hold it against
        if not pairs
        else all(ratio <= 1.45 for ratio in found["recompute_time_over_plain"].values()),
    }
    return found


def picture(table: Table, path: Path) -> None:
    """Speed and peak memory against length; what was skipped is hollow."""
    import matplotlib.pyplot as plt

    names = {
        "full": "full attention, checkpointed",
        "plain": "CoMeT, plain graph",
        "recompute": "CoMeT, recomputed",
        "every": f"CoMeT, every {EVERY}th border",
    }
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, way in enumerate(WAYS):
        cells = sorted((c for c in table.cells if c["way"] == way), key=lambda c: c["length"])
        for axes, value in (
            (speed, lambda c: c["length"] / c["seconds"]),
            (memory, lambda c: c["peak_bytes"] / 2**30),
        ):
            axes.plot([c["length"] for c in cells], [value(c) for c in cells], "-", color=f"C{i}")
            for skipped in (False, True):
                own = [c for c in cells if ("skipped" in c) == skipped]
                axes.plot(
                    [c["length"] for c in own],
                    [value(c) for c in own],
                    "o",
                    color=f"C{i}",
                    fillstyle="none" if skipped else "full",
                    label=None if skipped else names[way],
                )
    for axes, label in ((speed, "tokens/s"), (memory, "GiB above the loaded model")):
        axes.set(xscale="log", yscale="log", xlabel="tokens in the sample", ylabel=label)
        lengths = sorted({cell["length"] for cell in table.cells})
        axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    memory.axhline(MOST_BYTES / 2**30, color="grey", lw=0.8, ls=":")
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle("One training step; hollow: not run, predicted", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what is missing, print and draw."""
    parser = argument_parser(__doc__)
    lengths = [2**n for n in range(11, 18)]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--ways", nargs="+", default=WAYS[:3], choices=WAYS)
    parser.add_argument("--promises", action="store_true")
    parser.add_argument("--short", type=int, default=2**14)
    parser.add_argument("--long", type=int, default=2**17)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure(args.cell[0], int(args.cell[1]))))
        return
    OUT.mkdir(exist_ok=True)
    table = Table(OUT / "train.json")
    if args.promises:
        table.promises = promises(table, args.short, args.long)
        table.save()
        print(json.dumps(table.promises, indent=1))
    else:
        for way in args.ways:
            for length in args.lengths:
                table.get(way, length)
    picture(table, OUT / "train.png")


if __name__ == "__main__":
    main()
