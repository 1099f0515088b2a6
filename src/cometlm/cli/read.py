"""`cometlm read MODEL FILE`: stream a text of any length through a model, and keep the session."""

from __future__ import annotations

import io
import os
import sys
import time
from itertools import chain
from pathlib import Path
from typing import IO, Annotated

import typer

from cometlm.cli import options
from cometlm.cli.console import (
    UNTRAINED,
    InterruptLater,
    ReadingProgress,
    describe,
    err,
    is_untrained,
    load_quietly,
    out,
)
from cometlm.parallel.mesh import join_job
from cometlm.parallel.reading import SharedSession
from cometlm.session.session import Session
from cometlm.session.text_file import read_blocks

_SAVE_EVERY = 300  # seconds
_SAVE_EVERY_BLOCKS = 500  # where ranks have to agree


def read(
    model: options.Model,
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")],
    loading: options.LoadOptions,
    save: Annotated[
        Path | None,
        typer.Option(help="Keep the session here: at the end, on Ctrl-C, and every 5 minutes."),
    ] = None,
    session: Annotated[
        Path | None, typer.Option(help="Go on from this saved session with a new text.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where --save stopped in this same text.")
    ] = False,
    next_tokens: Annotated[
        int, typer.Option("--next", min=0, help="Then write this many likeliest tokens.")
    ] = 0,
) -> None:
    """Read a text with a model, chunk by chunk, in constant memory.

    Under `torchrun --no-python` all ranks read it together, and one writes the session.
    """
    begin = _beginning(save, session, resume)
    _check_writable(save)
    source, size = open_text(file)
    loaded, tokenizer = load_quietly(model, **loading.given())
    rank, ranks = join_job(loaded.device)
    err.quiet = out.quiet = rank > 0  # one rank of a job is enough to hear
    err.print(describe(loaded), highlight=False, soft_wrap=True)
    kind, read_all = (Session, _read_all) if ranks == 1 else (SharedSession, _read_together)
    reader = kind.load(begin, loaded, tokenizer) if begin else kind(loaded, tokenizer)
    with source:
        if resume:
            _skip(source, reader.characters, file)
        else:
            reader.characters = 0
        interrupted = read_all(reader, source, file, size, save)
    if reader.stats().tokens == 0:
        raise ValueError(f"{file} holds no text")
    if interrupted:
        raise typer.Exit(130)
    if next_tokens:
        if is_untrained(loaded):
            err.print(UNTRAINED, style="yellow")
        text = tokenizer.decode(reader.continuation(next_tokens))
        out.print(text, highlight=False, soft_wrap=True)


def _read_all(
    reader: Session, source: IO[str], name: str, size: int | None, save: Path | None
) -> bool:
    """Read to the end or to Ctrl-C, which is True; keep what was read whatever happens."""
    saved = time.monotonic()
    with ReadingProgress(size, reader.stats().tokens) as progress, InterruptLater() as interrupt:
        try:
            texts = progress.counting(read_blocks(source, name))
            ending = reader.finish if save is None else reader.settle  # a kept text may go on
            for stats in chain(reader.reading(texts), ending()):
                progress.show(stats)
                if interrupt.asked:
                    break
                if save is not None and time.monotonic() - saved > _SAVE_EVERY:
                    reader.save(save)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            interrupt.asked = True
        finally:
            progress.stop()
            if reader.stats().tokens:
                word = "interrupted after" if interrupt.asked else "read"
                err.print(f"{word} {progress.summary(reader.stats())}", highlight=False)
                if save is not None:
                    reader.save(save)
                    err.print(f"saved {save}", highlight=False, soft_wrap=True)
    return interrupt.asked


def _read_together(
    reader: Session, source: IO[str], name: str, size: int | None, save: Path | None
) -> bool:
    """Read to the end with other ranks; all of them save when they have read as much.

    Ctrl-C reaches each rank somewhere else, so it ends the job; `--resume` goes on from the last
    time that it was saved.
    """
    with ReadingProgress(size, reader.stats().tokens) as progress:
        texts = progress.counting(read_blocks(source, name))
        ending = reader.finish if save is None else reader.settle
        for number, stats in enumerate(chain(reader.reading(texts), ending()), start=1):
            progress.show(stats)
            if save is not None and number % _SAVE_EVERY_BLOCKS == 0:
                reader.save(save)
        if save is not None:
            reader.save(save)
    err.print(f"read {progress.summary(reader.stats())}", highlight=False)
    if save is not None:
        err.print(f"saved {save}", highlight=False, soft_wrap=True)
    return False


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


def _beginning(save: Path | None, session: Path | None, resume: bool) -> Path | None:
    """The session file to start from."""
    if resume and save is None:
        raise ValueError("--resume needs --save: the session that was being kept")
    if resume and session is not None:
        raise ValueError("--resume goes on from --save; leave out --session")
    return save if resume else session


def _check_writable(save: Path | None) -> None:
    """Say now, not after an hour, that a session cannot be kept there."""
    if save is None:
        return
    if save.is_dir():
        raise ValueError(f"--save {save} is a directory; name a file")
    if not os.access(save.parent, os.W_OK):
        raise ValueError(f"--save {save}: its folder is missing or cannot be written to")


def _skip(source: IO[str], characters: int, name: str) -> None:
    while characters:
        block = source.read(min(characters, 1 << 20))
        if not block:
            raise ValueError(f"{name} is shorter than what the session has read; is it that text?")
        characters -= len(block)
