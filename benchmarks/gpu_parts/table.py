"""The run for people: short tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cometlm.device import readable_bytes

Entries = Mapping[str, dict[str, Any]]


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what the file says."""
    console = console or Console(width=110)
    entries: Entries = result["measurements"]
    machine = result.get("machine", {})
    console.print(
        f"\n[bold]{machine.get('name') or machine.get('device')}[/bold], {_peaks(entries)}"
    )
    made = (_reading(entries), _kernels(entries), _writing(entries), _training(entries))
    for table in (*made, _promises(result)):
        if table.row_count:
            console.print(table)
    others = [x["status"] for x in entries.values() if x["status"] != "ok"]
    counts = ", ".join(f"{others.count(x)} {x}" for x in ("failed", "skipped", "cut"))
    console.print(f"{len(entries) - len(others)} measured, {counts}; the reasons are in the file")


def _peaks(entries: Entries) -> str:
    matrix, copy = entries.get("peak/matrix", {}), entries.get("peak/copy", {})
    parts = []
    if "tflops" in matrix:
        parts.append(f"{matrix['tflops']:,.1f} TFLOP/s of a matrix product")
    if "bytes_per_second" in copy:
        parts.append(f"{copy['bytes_per_second'] / 1e9:,.0f} GB/s of a copy")
    return ", ".join(parts) or "no peak measured"


def _reading(entries: Entries) -> Table:
    table = Table("reading", "tokens", "seconds", "tokens/s", "of the peak", "memory", "")
    for name, entry in entries.items():
        kind, *rest = name.split("/")
        if kind == "prefill":
            shape, whose, what = rest
            share = f"{entry['share_of_peak']:.0%}" if "share_of_peak" in entry else ""
            table.add_row(f"{shape} {whose}", what, *_speed(entry, share), _said(entry))
    return table


def _kernels(entries: Entries) -> Table:
    """Of one chunk: how long Python launches, how long the device works, and on what."""
    table = Table("kernels of a chunk", "number", "ms", "share")
    for name, entry in entries.items():
        if not name.startswith("kernels/") or entry["status"] != "ok":
            continue
        whole = entry["seconds_per_chunk"]

        def row(what: str, number: str, seconds: float, whole: float = whole) -> None:
            table.add_row(what[:70], number, f"{1e3 * seconds:.2f}", f"{seconds / whole:.0%}")

        row(f"{name.split('/')[1]}, profiled", "", whole)
        row("launched by Python", "", entry["launching_per_chunk"])
        row("all kernels", f"{entry['kernels_per_chunk']:,.0f}", entry["busy_per_chunk"])
        for one in entry["longest"]:
            row(one["name"], f"{one['per_chunk']:,.1f}", one["seconds_per_chunk"])
    return table


def _speed(entry: Mapping[str, Any], middle: str) -> tuple[str, ...]:
    if entry["status"] != "ok":
        return ("", "", "", "")
    rate = f"{entry['tokens_per_second']:,.0f}"
    return f"{entry['seconds']:,.2f}", rate, middle, readable_bytes(entry["peak_bytes"])


def _writing(entries: Entries) -> Table:
    table = Table("writing", "after", "rows", "way", "ms/token", "over a chunk", "memory", "")
    for name, entry in entries.items():
        kind, *rest = name.split("/")
        if kind != "decode":
            continue
        shape, after, batch, way = rest
        figures = ("", "", "")
        if entry["status"] == "ok":
            whole = entry.get("ms_per_token_whole_chunk")
            figures = (
                f"{entry['ms_per_token']:.2f}",
                "" if whole is None else f"{whole:.2f}",
                readable_bytes(entry["peak_bytes"]),
            )
        table.add_row(shape, after, batch.removeprefix("batch "), way, *figures, _said(entry))
    return table


def _training(entries: Entries) -> Table:
    table = Table("training", "step", "seconds", "tokens/s", "k", "memory", "")
    for name, entry in entries.items():
        kind, *rest = name.split("/")
        if kind == "train":
            what = " ".join(rest[1:])
            if what == "record":
                what = f"record: {entry['settings'].get('tokens', 0):,}"
            table.add_row(rest[0], what, *_speed(entry, str(entry.get("every", ""))), _said(entry))
    return table


def _promises(result: Mapping[str, Any]) -> Table:
    table = Table("promise", "figure", "holds")
    said = {True: "yes", False: "NO", None: "not measured"}
    for name, promise in result.get("promises", {}).items():
        value = promise["value"]
        table.add_row(name, "" if value is None else f"{value:,.2f}", said[promise["met"]])
    return table


def _said(entry: Mapping[str, Any]) -> str:
    if entry["status"] == "ok":
        return ""
    return "out of memory" if entry.get("out_of_memory") else str(entry["status"])
