"""What the benchmarks share: arguments, the machine, timing in turn, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cometlm.compat import cpu_abilities
from cometlm.data.corpora import corpus_files

OUT = Path("out")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the description's lines, commands among them."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    abilities = cpu_abilities()
    return {
        "cpu": abilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16_products": any(v is True for k, v in abilities.items() if "bf16" in k),
        "torch": torch.__version__,
    }


def timed_in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, A B A B …, so that a drift of the machine meets all of them."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def weights_once(model: torch.nn.Module) -> dict[str, float]:
    """The least time of a decode step: that of reading every weight once from memory."""
    rows = torch.randn(64 * 2**20)  # 256 MiB: more than caches hold
    seconds = min(timed_in_turn({"sum": rows.sum}, 5)["sum"])
    bandwidth = rows.nbytes / seconds
    held = sum(weight.nbytes for weight in model.parameters())
    return {"bandwidth_gb_per_second": bandwidth / 1e9, "bound_ms": 1000 * held / bandwidth}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Ratios pair by pair: minimum, median and maximum."""
    pairs = sorted(s / f for s, f in zip(slow, fast, strict=True))
    return {"min": pairs[0], "median": statistics.median(pairs), "max": pairs[-1]}


def program_text() -> Iterator[str]:
    """The sources of transformers, file after file: millions of tokens that are here already."""
    for path in corpus_files("transformers"):
        yield f"# {path.name}\n{path.read_text(encoding='utf-8')}\n"


def say(line: str) -> None:
    """What is being done, since it takes minutes."""
    print(line, file=sys.stderr, flush=True)


def note(line: str) -> None:
    """How far it is, in place of the last such line, beside the result."""
    print(f"\r{line}   ", end="", file=sys.stderr, flush=True)


def write(name: str, result: dict[str, Any]) -> None:
    """Print a result and keep it in out/NAME.json."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"written to {path}")
