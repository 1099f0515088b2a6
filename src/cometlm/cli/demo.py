"""`cometlm demo`: a real model reads hundreds of thousands of tokens, with flat memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer

from cometlm.cli import options
from cometlm.cli.console import UNTRAINED, ReadingProgress, describe, err, load_quietly, out
from cometlm.cli.read import open_text
from cometlm.device import peak_memory, readable_bytes
from cometlm.session import Session, SessionStats
from cometlm.text import read_blocks

_SOURCES = "transformers"  # an installed package whose sources are millions of tokens


def demo(
    file: Annotated[
        str | None, typer.Option(help="Read this text instead (- is standard input).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=10, help="Stop after this many tokens.")] = 300_000,
    model: Annotated[str, typer.Option(help="What reads it.")] = "smollm2",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Attach a memory to a real model, read a long text, and print what it held at every tenth."""
    loaded, tokenizer = load_quietly(model, device, dtype)
    out.print(describe(loaded), highlight=False)
    out.print(UNTRAINED, style="yellow")
    out.print(f"reading {file or f'the sources of the installed package {_SOURCES!r}'}")
    session = Session(loaded, tokenizer)
    tenths = _Tenths(tokens, loaded.device)
    texts = package_sources(_SOURCES) if file is None else _file_texts(file)
    with ReadingProgress(None) as progress:
        try:
            reading = session.reading(progress.counting(texts))
            for stats in chain(reading, session.finish()):
                progress.show(stats)
                tenths.note(stats, progress.seconds)
                if stats.tokens >= tokens:
                    break
            else:
                stats = session.stats()
        except KeyboardInterrupt:
            err.print(f"interrupted after {progress.summary(session.stats())}", highlight=False)
            raise typer.Exit(130) from None
    if session.stats().tokens == 0:
        raise ValueError(f"{file} holds no text")
    out.print(f"read {progress.summary(stats)}", highlight=False)
    out.print("the next 40 tokens:", style="bold")
    words = tokenizer.decode(session.continuation(40))
    out.print(words, markup=False, highlight=False)


class _Tenths:
    """A line of figures each time another tenth of the tokens has been read."""

    def __init__(self, total: int, device: torch.device) -> None:
        self._step = total / 10
        self._next = self._step
        self._device = device
        self._before = (0, 0.0)
        self._line("tokens", "tokens/s", "memory held", "peak memory")

    def note(self, stats: SessionStats, seconds: float) -> None:
        if stats.tokens < self._next:
            return
        tokens, since = self._before
        rate = (stats.tokens - tokens) / max(seconds - since, 1e-9)
        peak = peak_memory(self._device)
        self._line(
            f"{stats.tokens:,}",
            f"{rate:,.0f}",
            readable_bytes(stats.memory_bytes),
            readable_bytes(peak),
        )
        self._before = (stats.tokens, seconds)
        self._next += self._step

    def _line(self, *cells: str) -> None:
        out.print("  ".join(cell.rjust(12) for cell in cells), highlight=False)


def package_sources(package: str) -> Iterator[str]:
    """The Python sources of an installed package, file after file.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {package!r} is not installed; name a text with --file")
    for root in spec.submodule_search_locations:
        for path in sorted(Path(root).rglob("*.py")):
            yield f"# {path.relative_to(root)}\n{path.read_text(encoding='utf-8')}\n"


def _file_texts(name: str) -> Iterator[str]:
    file, _ = open_text(name)
    with file:
        yield from read_blocks(file, name)
