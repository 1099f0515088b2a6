"""`cometlm demo`: a real model finds a number in a very long text, in flat memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cometlm.cli import options
from cometlm.cli.console import (
    ReadingProgress,
    describe,
    err,
    load_quietly,
    out,
    pack_weights,
    tell_what_it_learned,
)
from cometlm.cli.read import open_bytes
from cometlm.data.corpora import corpus_files
from cometlm.device import peak_memory, readable_bytes
from cometlm.session.plain_text import PlainText
from cometlm.session.session import Session, SessionStats
from cometlm.text_file import read_blocks

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key?"
_DIGITS = 5  # of the keys that the recipe trains with
_PIECE = 2048  # characters between two looks at how far the reading is
_HEAD = 1 << 16  # bytes of a file that are looked at to know how many tokens it may have


def demo(
    loading: options.LoadOptions,
    file: Annotated[
        str | None, typer.Option(help="Read this text instead (- is standard input).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=10, help="Stop after this many tokens.")] = 300_000,
    passkey: Annotated[
        str | None, typer.Option(help="The number to hide, 5 digits. Default: a random one.")
    ] = None,
    depth: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Where: 0 is the start. Default: anywhere."),
    ] = None,
    model: Annotated[str, typer.Option(help="What reads it.")] = "smollm2",
) -> None:
    """Hide a number in a long text, let a real model read all of it, and ask for the number."""
    key = passkey or str(random.randrange(10_000, 100_000))
    _check_key(key)
    loaded, tokenizer = load_quietly(model, **loading.given())
    whole = tokens if file is None else min(tokens, _tokens_of(file, tokenizer))
    place = round(whole * (random.random() if depth is None else depth))
    out.print(describe(loaded), highlight=False, soft_wrap=True)
    tell_what_it_learned(loaded, out)
    pack_weights(loaded)
    texts, about = _texts(file)
    out.print(f"reading {about}", highlight=False, soft_wrap=True)
    session = Session(loaded, tokenizer)
    haystack = Haystack(session, texts, NEEDLE.format(key=key), place)
    tenths = _Tenths(tokens, loaded.device)
    with ReadingProgress(None) as progress:
        try:
            reading = session.reading(progress.counting(haystack))
            for stats in chain(reading, session.finish()):
                progress.show(stats)
                tenths.note(stats, progress.seconds)
                if stats.tokens >= tokens and haystack.hidden_at is not None:
                    break
            else:
                stats = session.stats()
        except KeyboardInterrupt:
            err.print(f"interrupted after {progress.summary(session.stats())}", highlight=False)
            raise typer.Exit(130) from None
        if not haystack.characters:
            raise ValueError(f"{file} holds no text")
        answer = session.ask(QUESTION, max_new_tokens=12, do_sample=False)
        seconds = progress.seconds
    answer = " ".join("".join(answer).split())
    out.print(f"read    {progress.summary(stats)}", highlight=False)
    where = " (where the text ended)" if haystack.ended else ""
    out.print(f"hidden  {key}, after {haystack.hidden_at:,} tokens{where}", highlight=False)
    out.print(f"asked   {QUESTION}")
    out.print(f"answer  {answer}", style="bold", highlight=False, soft_wrap=True)
    verdict, style = ("found", "green") if answer == key else ("not found", "red")
    peak = peak_memory(loaded.device)
    cost = "" if peak is None else f", with a peak memory of {readable_bytes(peak)}"
    out.print(f"{verdict} in {seconds:,.0f} s{cost}", style=style)


def _check_key(key: str) -> None:
    if not (key.isascii() and key.isdigit() and len(key) == _DIGITS and key[0] != "0"):
        raise ValueError(
            f"--passkey must be a number of {_DIGITS} digits, the first not 0, got {key!r}"
        )


class Haystack:
    """A text with a needle put between two of its lines, while it is read.

    Attributes:
        hidden_at: tokens read before the needle, or None as long as it is not hidden.
        ended: whether the text ended before the needle's place, which is then its end.
        characters: of the text, without the needle.
    """

    def __init__(self, session: Session, texts: Iterator[str], needle: str, place: int) -> None:
        self._session = session
        self._texts = texts
        self._needle = needle
        self._place = place
        self.hidden_at: int | None = None
        self.ended = False
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        """The text in pieces; a needle whose place is beyond the end comes last."""
        for text in self._texts:
            for start in range(0, len(text), _PIECE):
                piece = text[start : start + _PIECE]
                self.characters += len(piece)
                cut = piece.find("\n") + 1 or piece.find(" ") + 1
                if self.hidden_at is None and cut and self._read() >= self._place:
                    yield piece[:cut]
                    yield from self._hide()
                    piece = piece[cut:]
                yield piece
        if self.hidden_at is None and self.characters:
            self.ended = True
            yield from self._hide()

    def _hide(self) -> Iterator[str]:
        self.hidden_at = self._read()
        yield self._needle

    def _read(self) -> int:
        return self._session.stats().tokens


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


def _texts(file: str | None) -> tuple[Iterator[str], str]:
    """A text and what it is: the user's, or a real one that was not trained with."""
    if file is not None:
        return _file_texts([file]), file
    try:
        return _file_texts(map(str, corpus_files("bible"))), "the King James Bible"
    except OSError:  # not a Debian, or no packages to be had
        files = map(str, corpus_files("python"))
        return _file_texts(files), "the sources of Python's standard library"


def _tokens_of(file: str, tokenizer: Any) -> float:
    """About how many tokens a file has, by its beginning; what is no file has any number."""
    path = Path(file)
    if not path.is_file():
        return math.inf
    with path.open("rb") as begun:
        head = begun.read(_HEAD)
    count = len(PlainText.of(tokenizer).encode(head.decode("utf-8", errors="ignore")))
    return count * path.stat().st_size / max(1, len(head))


def _file_texts(names: Iterator[str] | list[str]) -> Iterator[str]:
    for name in names:
        with open_bytes(name) as file:
            yield from read_blocks(file, name)
