"""`cometlm read MODEL FILE …`: stream a text of any length through a model, and keep a session."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from cometlm.cli import options
from cometlm.cli.console import (
    UNTRAINED,
    ReadingProgress,
    describe,
    err,
    is_untrained,
    load_quietly,
    made_with,
    out,
)
from cometlm.cli.interrupt import InterruptLater
from cometlm.parallel.mesh import join_job
from cometlm.parallel.reading import SharedSession
from cometlm.session.file import check_target
from cometlm.session.session import Session
from cometlm.text_file import UTF8, check_encoding, read_blocks

_SAVE_EVERY = 300  # seconds
_SAVE_EVERY_BLOCKS = 500  # where ranks have to agree
_STDIN = "-"


def read(
    model: options.Model,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Text files, read in this order as one text; - is standard input.",
        ),
    ],
    loading: options.LoadOptions,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Keep the session here: at the end, when stopped, and every 5 minutes; SIGKILL "
            "loses what was read since."
        ),
    ] = None,
    session: Annotated[
        Path | None, typer.Option(help="Go on from this saved session with a new text.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where --save stopped in this same text.")
    ] = False,
    encoding: options.Encoding = UTF8,
    special: options.Special = False,
    next_tokens: Annotated[
        int, typer.Option("--next", min=0, help="Then write this many likeliest tokens.")
    ] = 0,
) -> None:
    """Read a text with a model, chunk by chunk, in constant memory.

    Ctrl-C, SIGTERM and SIGHUP end it with the chunk that is being read; --save keeps what was read.

    Under `torchrun --no-python` all ranks read it together, and one writes the session.
    """
    begin = _beginning(save, session, resume)
    texts = Texts(files, check_encoding(encoding))
    if save is not None:
        _check_save(save, files)
    made = {} if begin is None else made_with(begin)
    loaded, tokenizer = load_quietly(model, **{**made, **loading.given()})
    rank, ranks = join_job(loaded.device)
    err.quiet = out.quiet = rank > 0  # one rank of a job is enough to hear
    err.print(describe(loaded), highlight=False, soft_wrap=True)
    kind, read_all = (Session, _read_all) if ranks == 1 else (SharedSession, _read_together)
    reader = kind.load(begin, loaded, tokenizer) if begin else kind(loaded, tokenizer)
    if not resume:
        reader.characters = 0
    stopped = read_all(reader, texts, special, save, begin is not None and begin == save)
    if stopped:
        raise typer.Exit(stopped)
    if reader.stats().tokens == 0:
        raise ValueError(f"{texts.name} holds no text")
    if next_tokens:
        if is_untrained(loaded):
            err.print(UNTRAINED, style="yellow")
        text = tokenizer.decode(reader.continuation(next_tokens))
        out.print(text, highlight=False, soft_wrap=True)


class Texts:
    """Text files that are read one behind the other, as one text.

    Args:
        files: their names; "-" is standard input.
        encoding: of all.

    Attributes:
        name: what errors call them together.
        size: bytes of all of them, if that is known.

    Raises:
        OSError: one cannot be opened.
        ValueError: one is a directory.
    """

    def __init__(self, files: Sequence[str], encoding: str) -> None:
        self._files, self._encoding = files, encoding
        self.name = files[0] if len(files) == 1 else f"what {', '.join(files)} hold together"
        sizes = []
        for name in files:
            if name != _STDIN:
                with open_bytes(name) as file:
                    status = os.fstat(file.fileno())
                    sizes.append(status.st_size if stat.S_ISREG(status.st_mode) else None)
        known = [size for size in sizes if size is not None]
        self.size = sum(known) if len(known) == len(files) else None

    def blocks(self, interrupt: InterruptLater | None = None) -> Iterator[str]:
        """Their text; a line that ends with a file ends there.

        Raises:
            ValueError: one is not text.
            KeyboardInterrupt: a signal came while nothing did.
        """
        last = ""
        for name in self._files:
            if last and not last.endswith("\n"):
                yield "\n"
            with open_bytes(name) as file:
                listened = file if interrupt is None else interrupt.listening(file)
                for block in read_blocks(listened, name, self._encoding):
                    last = block
                    yield block


class _Keeper:
    """Saves a session from time to time; one save that fails is no reason to stop reading.

    Args:
        reader: what is saved.
        save: where to; None: nowhere.
        goes_on: from what stands there. Another session there is replaced by a whole reading only,
            or by one that was stopped or took long; not by one that failed.
    """

    def __init__(self, reader: Session, save: Path | None, goes_on: bool) -> None:
        self._reader, self._save = reader, save
        self._is_anothers = save is not None and save.exists() and not goes_on
        self._last = time.monotonic()

    def passing(self, blocks: Iterator[str]) -> Iterator[str]:
        """Pass text on; a text that comes slowly is kept between two chunks, too."""
        for block in blocks:
            yield block
            self.keep_if_due()

    def keep_if_due(self) -> None:
        if self._save is None or time.monotonic() - self._last <= _SAVE_EVERY:
            return
        try:
            self._reader.save(self._save)
            self._is_anothers = False
        except OSError as error:
            err.print(
                f"{self._save} could not be saved ({error}); reading goes on, and so do tries",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
        self._last = time.monotonic()

    def keep(self, failed: bool = False) -> None:
        """Save what was read, if there is a place for it; beside another session if this failed."""
        if self._save is None or not self._reader.stats().tokens:
            return
        beside = failed and self._is_anothers
        target = _part_of(self._save) if beside else self._save
        self._reader.save(target)
        rest = f"; {self._save} is as it was" if beside else ""
        with contextlib.suppress(OSError):
            err.print(f"saved {target}{rest}", highlight=False, soft_wrap=True)


def _part_of(save: Path) -> Path:
    """Where a reading that is not whole is kept while another session stands at its place."""
    return save.with_name(f"{save.name}.part")


def _read_all(
    reader: Session, texts: Texts, special: bool, save: Path | None, goes_on: bool
) -> int:
    """Read to the end or to a signal; keep what was read whatever happens.

    Returns:
        The exit code of a read that was stopped, or 0.
    """
    keeper, failed = _Keeper(reader, save, goes_on), True
    progress = ReadingProgress(texts.size, reader.stats().tokens)
    with progress, InterruptLater(say) as interrupt:
        try:
            blocks = reader.unread(texts.blocks(interrupt), name=texts.name)
            counted = keeper.passing(progress.counting(blocks))
            ending = reader.finish if save is None else reader.settle  # a kept text may go on
            for stats in chain(reader.reading(counted, special=special), ending()):
                progress.show(stats)
                if interrupt.asked:
                    break
                keeper.keep_if_due()
            failed = False
        except KeyboardInterrupt:
            interrupt.asked, failed = interrupt.asked or signal.SIGINT, False
        finally:
            with contextlib.suppress(OSError):  # a terminal that is closed
                progress.stop()
                if reader.stats().tokens:
                    word = "interrupted after" if interrupt.asked else "read"
                    err.print(f"{word} {progress.summary(reader.stats())}", highlight=False)
            keeper.keep(failed)
    return interrupt.exit_code if interrupt.asked else 0


def say(line: str) -> None:
    """A line for a person, on standard error."""
    err.print(line, highlight=False)


def _read_together(
    reader: Session, texts: Texts, special: bool, save: Path | None, goes_on: bool
) -> int:
    """Read to the end with other ranks; all of them save when they have read as much.

    Ctrl-C reaches each rank somewhere else, so it ends the job; `--resume` goes on from the last
    time that it was saved. Until all is read, that is beside another session at this place.
    """
    is_anothers = save is not None and save.exists() and not goes_on
    on_the_way = _part_of(save) if save is not None and is_anothers else save
    kept_beside = False
    with ReadingProgress(texts.size, reader.stats().tokens) as progress:
        blocks = progress.counting(reader.unread(texts.blocks(), name=texts.name))
        ending = reader.finish if save is None else reader.settle
        reading = reader.reading(blocks, special=special)
        for number, stats in enumerate(chain(reading, ending()), start=1):
            progress.show(stats)
            if on_the_way is not None and number % _SAVE_EVERY_BLOCKS == 0:
                reader.save(on_the_way)
                if is_anothers and not kept_beside:
                    say(f"kept in {on_the_way} until all is read; {save} is as it was")
                    kept_beside = True
        if save is not None:
            reader.save(save)
            if kept_beside:  # one of an earlier reading stays
                _part_of(save).unlink(missing_ok=True)
    err.print(f"read {progress.summary(reader.stats())}", highlight=False)
    if save is not None:
        err.print(f"saved {save}", highlight=False, soft_wrap=True)
    return 0


def open_bytes(name: str) -> IO[bytes] | Any:
    """A file, or standard input, as bytes.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is a directory.
    """
    if name == _STDIN:
        return contextlib.nullcontext(sys.stdin.buffer)
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{name} is a directory; name a text file")
    return path.open("rb")


def _beginning(save: Path | None, session: Path | None, resume: bool) -> Path | None:
    """The session file to start from."""
    if resume and save is None:
        raise ValueError("--resume needs --save: the session that was being kept")
    if resume and session is not None:
        raise ValueError("--resume goes on from --save; leave out --session")
    return save if resume else session


def _check_save(save: Path, files: Sequence[str]) -> None:
    """Say now, not after an hour, that a session cannot be kept there, or should not."""
    for name in files:
        if name != _STDIN and save.exists() and os.path.samefile(save, name):
            raise ValueError(f"--save {save} is the text that is to be read; name another file")
    try:
        check_target(save)
    except ValueError as error:
        raise ValueError(f"--save {error}") from error
