"""Rows of evaluations in a JSON Lines file, kept as they are made.

A row is what its figures depend on (`settings`) and an answer, or what a cell was foreseen to take.
Rows are only ever appended, each in one write, and one process at a time may: a run that finds its
own rows makes only those that are missing, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from cometlm.eval.runner import Answer


@dataclass(frozen=True)
class Forecast:
    """What a text of some length was foreseen to take.

    Attributes:
        tokens: of the text.
        seconds: to read it and to answer all its questions; None where nothing says.
        nbytes: at the highest point, as `Answer.peak_bytes` counts; None where nothing says.
        lengths: of the texts that were measured before.
        skipped: why it was not read, "" if it was.
    """

    tokens: int
    seconds: float | None = None
    nbytes: int | None = None
    lengths: list[int] | None = None
    skipped: str = ""


class Rows:
    """Rows of evaluations, of one run or of several.

    Args:
        path: a JSON Lines file, made if it is missing; None keeps the rows in this process.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written, or another evaluation writes to it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._rows: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._lock: FileLock | None = None
        if path is None:
            return
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: its folder is missing")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                f"{path} is being written by another evaluation; wait for it, or give this one "
                "another output"
            ) from error
        try:
            self._file = path.open("a+b")
            self._read(path)
        except BaseException:
            self.close()
            raise

    def answers(self, settings: Mapping[str, Any]) -> list[Answer]:
        """Those of the run with these settings, the last one of each place."""
        wanted = _plain(settings)
        found = (
            Answer(**row["answer"])
            for row in self._rows
            if "answer" in row and row["settings"] == wanted
        )
        return list({one.place: one for one in found}.values())

    def forecasts(self, settings: Mapping[str, Any]) -> dict[int, Forecast]:
        """Forecasts of the run with these settings by their length, the last one of each."""
        wanted = _plain(settings)
        found = (
            Forecast(**row["forecast"])
            for row in self._rows
            if "forecast" in row and row["settings"] == wanted
        )
        return {one.tokens: one for one in found}

    def num_others(self, settings: Collection[Mapping[str, Any]]) -> int:
        """How many answers are of other runs than those with these settings."""
        wanted = [_plain(one) for one in settings]
        return sum("answer" in row and row["settings"] not in wanted for row in self._rows)

    def append(self, settings: Mapping[str, Any], row: Answer | Forecast) -> None:
        """Keep an answer or a forecast, in the file before this returns.

        Args:
            settings: whatever it depends on, as JSON has it.

        Raises:
            OSError: it cannot be written.
        """
        kind = "answer" if isinstance(row, Answer) else "forecast"
        kept = {"settings": _plain(settings), kind: _plain(asdict(row))}
        self._rows.append(kept)
        if self._file is not None:
            self._file.write(json.dumps(kept, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; others may write to it."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def _read(self, path: Path) -> None:
        assert self._file is not None
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n") and _ROW.startswith(line[: len(_ROW)]):
                break  # a process was killed while it wrote
            try:
                row = json.loads(line)
                Forecast(**row["forecast"]) if "forecast" in row else Answer(**row["answer"])
                row["settings"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} must hold rows of evaluations, got {line[:60]!r}"
                ) from error
            self._rows.append(row)
            end += len(line)
        self._file.truncate(end)


_ROW = b'{"settings": '  # how each begins


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
