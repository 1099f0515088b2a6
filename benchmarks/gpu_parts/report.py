"""One measurement after the other, each within its time and each in the file at once.

The file is written whole after every single measurement, so a run that is killed loses only what it
was at. A measurement that fails is an entry that says so, and the next one goes on.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from cometlm.checkpoints.atomic_write import write_whole
from cometlm.device import readable_bytes

Clock = Callable[[], float]
Entry = dict[str, Any]


class LostDevice(RuntimeError):
    """The device answers nothing any more; only a new process can use it again."""


class Bench(Protocol):
    """What is asked of the device between measurements."""

    def free(self) -> None:
        """Give back what nobody holds."""

    def alive(self) -> bool:
        """Whether the device still works."""


class TimeBox:
    """Seconds that some work may take, counted from now.

    Args:
        clock: seconds since some time; tests have their own.
    """

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds that are left; below 0 when it is over."""
        return self._end - self.clock()

    def share(self, part: float) -> TimeBox:
        """A box of a part of what is left."""
        return TimeBox(self.left() * part, self.clock)


class Report:
    """The file of one run.

    Args:
        path: the file.
        bench: cleans up after each measurement.
        conclude: from all entries to what follows from them.
        clock: as in `TimeBox`.

    Attributes:
        bench: as given.
        entries: each measurement by name: `status` is ok, failed, skipped or cut.
        head: what else the file says.
    """

    def __init__(
        self,
        path: Path,
        bench: Bench,
        conclude: Callable[[Mapping[str, Entry]], dict[str, Any]],
        clock: Clock = time.monotonic,
    ) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.head: dict[str, Any] = {}
        self.bench = bench
        self._conclude = conclude
        self._clock = clock
        self._began = clock()
        self._running: tuple[str, Entry] | None = None

    def go_on(self) -> None:
        """Take over what an earlier process of the run left; what it was at is not repeated."""
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        self.entries = kept.pop("measurements")
        if running := kept.pop("running", None):
            self.entries[running] = {"status": "cut", "reason": "the process ended in it"}
        self._began -= kept.pop("elapsed_seconds")
        self.head = {k: v for k, v in kept.items() if k not in ("finished", "laws", "promises")}

    def figures(self, name: str) -> Entry | None:
        """A measurement's entry if it went well."""
        entry = self.entries.get(name)
        return entry if entry is not None and entry["status"] == "ok" else None

    def measure(
        self,
        name: str,
        work: Callable[[], Entry],
        box: TimeBox,
        needs: float | None = 0.0,
        **settings: Any,
    ) -> Entry | None:
        """Run one measurement, unless it is in the file already or does not fit the time.

        Args:
            work: returns the figures.
            needs: seconds that it takes as far as one knows.
            settings: kept beside the figures.

        Returns:
            The entry, or None where there are no figures.

        Raises:
            LostDevice: it failed, and the device with it.
        """
        if name in self.entries:
            return self.figures(name)
        left, needs = box.left(), needs or 0.0
        if left <= needs:
            said = f"needs about {needs:.0f} s, and {max(0.0, left):.0f} s are left for it"
            self.skip(name, said, **settings)
            return None
        entry: Entry = {"status": "running", "settings": settings, "at_seconds": self._elapsed()}
        self._running = (name, entry)
        self.write()
        try:
            found = {"status": "ok", **work()}
        except Exception as error:  # noqa: BLE001 (nobody can debug there: the next one goes on)
            found = failure(error)
        self.bench.free()
        self._running = None
        entry |= found
        entry["took_seconds"] = self._elapsed() - entry["at_seconds"]
        self._keep(name, entry)
        if entry["status"] == "failed" and not self.bench.alive():
            raise LostDevice(f"the device was lost in {name}")
        return self.figures(name)

    def skip(self, name: str, reason: str, **settings: Any) -> None:
        """Say why a measurement was not run."""
        if name not in self.entries:
            self._keep(name, {"status": "skipped", "reason": reason, "settings": settings})

    def cut(self, reason: str) -> None:
        """Say that the run ends in the middle of a measurement."""
        if self._running is not None:
            name, entry = self._running
            self._running = None
            took = self._elapsed() - entry["at_seconds"]
            self._keep(name, {**entry, "status": "cut", "reason": reason, "took_seconds": took})

    def note(self, **values: Any) -> None:
        """Put something into the file's head."""
        self.head |= values
        self.write()

    def write(self, finished: bool = False) -> None:
        """Write the file, whole."""
        result = {
            **self.head,
            "elapsed_seconds": self._elapsed(),
            "finished": finished,
            "running": self._running[0] if self._running else None,
            **self._concluded(),
            "measurements": self.entries,
        }
        text = json.dumps(_plain(result), indent=1, allow_nan=False)
        write_whole(self.path, (text + "\n").encode())

    def _concluded(self) -> dict[str, Any]:
        """What follows from the entries; an error there must not cost the entries."""
        try:
            return self._conclude(self.entries)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            return {"conclusions": failure(error)}

    def _keep(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        self.write()
        print(f"[{self._elapsed():6.1f} s] {name:<40} {headline(entry)}", flush=True)

    def _elapsed(self) -> float:
        return self._clock() - self._began


def failure(error: BaseException) -> Entry:
    """What is known of an error, without the error: its traceback keeps tensors alive."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return {
        "status": "failed",
        "out_of_memory": isinstance(error, torch.OutOfMemoryError),
        "error": type(error).__name__,
        "message": " ".join(str(error).split())[:600],
        "where": [f"{Path(x.filename).name}:{x.lineno} {x.name}" for x in frames],
    }


def headline(entry: Entry) -> str:
    """An entry in one line, for people."""
    if entry["status"] != "ok":
        why = entry.get("reason") or f"{entry['error']}: {entry['message']}"
        return f"{entry['status']}: {why}"[:160]
    parts = []
    if "tflops" in entry:
        parts.append(f"{entry['tflops']:,.1f} TFLOP/s")
    if "bytes_per_second" in entry:
        parts.append(f"{entry['bytes_per_second'] / 1e9:,.0f} GB/s")
    if "ms_per_token" in entry:
        parts.append(f"{entry['ms_per_token']:.2f} ms/token")
    if "tokens_per_second" in entry:
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    if "share_of_peak" in entry:
        parts.append(f"{entry['share_of_peak']:.0%} of the peak")
    if "peak_bytes" in entry:
        parts.append(readable_bytes(entry["peak_bytes"]))
    return "  ".join(parts)


def _plain(value: Any) -> Any:
    """The same with None for numbers that JSON has not: NaN and the infinities."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
