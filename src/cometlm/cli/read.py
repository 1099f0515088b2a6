"""`cometlm read MODEL FILE`: stream a text of any length through a model."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import IO, Annotated

import typer

from cometlm.cli import options
from cometlm.cli.console import UNTRAINED, ReadingProgress, describe, err, load_quietly, out
from cometlm.session import Session
from cometlm.text import read_blocks


def read(
    model: options.Model,
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    next_tokens: Annotated[
        int, typer.Option("--next", min=0, help="Then write this many likeliest tokens.")
    ] = 0,
    chunk_size: options.ChunkSize = None,
    readout_tokens: options.ReadoutTokens = None,
    stride: options.Stride = None,
    capacity: options.Capacity = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Read a text with a model, chunk by chunk, in constant memory."""
    source, size = open_text(file)
    loaded, tokenizer = load_quietly(
        model,
        device,
        dtype,
        chunk_size=chunk_size,
        readout_tokens=readout_tokens,
        stride=stride,
        capacity=capacity,
    )
    err.print(describe(loaded), highlight=False)
    session = Session(loaded, tokenizer)
    with source, ReadingProgress(size) as progress:
        try:
            for stats in session.reading(progress.counting(read_blocks(source, file))):
                progress.show(stats)
            for stats in session.finish():
                progress.show(stats)
        except KeyboardInterrupt:
            err.print(f"interrupted after {progress.summary(session.stats())}", highlight=False)
            raise typer.Exit(130) from None
        summary = progress.summary(session.stats())
    if session.stats().tokens == 0:
        raise ValueError(f"{file} holds no text")
    err.print(f"read {summary}", highlight=False)
    if next_tokens:
        err.print(UNTRAINED, style="yellow")
        out.print(
            tokenizer.decode(list(session.continuation(next_tokens))), markup=False, highlight=False
        )


def open_text(name: str) -> tuple[IO[str], int | None]:
    """A file or standard input as text, and its size in bytes if that is known.

    Raises:
        OSError: the file cannot be opened.
    """
    if name == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8"), None
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{name} is a directory; name a text file")
    return path.open(encoding="utf-8"), os.stat(path).st_size
