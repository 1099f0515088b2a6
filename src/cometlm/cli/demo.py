"""`cometlm demo`: what a real model finds again in a very long text, in flat memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

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
from cometlm.tasks.facts import MOST, Facts
from cometlm.tasks.scoring import found
from cometlm.text_file import read_blocks

PASSKEY = "The pass key is {key}. Remember it. {key} is the pass key."
ASKED = "What is the pass key?"
_DIGITS = 5  # of the keys that the recipe trains with
_PIECE = 2048  # characters between two looks at how far the reading is
_HEAD = 1 << 16  # bytes of a file that are looked at to know how many tokens it may have


def demo(
    loading: options.LoadOptions,
    file: Annotated[
        str | None, typer.Option(help="Read this text instead (- is standard input).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=10, help="Stop after this many tokens.")] = 300_000,
    facts: Annotated[
        int, typer.Option(min=0, max=MOST, help="Facts to hide beside, and to ask for.")
    ] = 0,
    passkey: Annotated[
        str | None, typer.Option(help="The number to hide, 5 digits. Default: a random one.")
    ] = None,
    depth: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Where the number is: 0 is the start. Default: anywhere."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="What reads it.")] = "smollm2-passkey",
) -> None:
    """Hide a number in a long text, let a real model read all of it, and ask for the number."""
    key = passkey or str(random.randrange(10_000, 100_000))
    _check_key(key)
    loaded, tokenizer = load_quietly(model, **loading.given())
    whole = tokens if file is None else min(tokens, _tokens_of(file, tokenizer))
    needles = _needles(tokenizer, key, depth, facts, whole)
    out.print(describe(loaded), highlight=False, soft_wrap=True)
    tell_what_it_learned(loaded, out)
    pack_weights(loaded)
    texts, about = _texts(file)
    out.print(f"reading {about}", highlight=False, soft_wrap=True)
    session = Session(loaded, tokenizer)
    haystack = Haystack(session, texts, needles, tokens)
    with ReadingProgress(None) as progress:
        try:
            stats = _read(haystack, session, progress, tokens)
        except KeyboardInterrupt:
            err.print(f"interrupted after {progress.summary(session.stats())}", highlight=False)
            raise typer.Exit(130) from None
        if not haystack.characters:
            raise ValueError(f"{file} holds no text")
        read = progress.seconds
        out.print(f"read {progress.summary(stats)}", highlight=False)
        right = sum(_ask(session, needle) for needle in haystack.hidden)
        asked = progress.seconds - read
    peak = peak_memory(loaded.device)
    cost = "" if peak is None else f", with a peak memory of {readable_bytes(peak)}"
    out.print(
        f"\nfound {right} of {len(needles)}: {read:,.0f} s to read, {asked:,.0f} s to ask{cost}",
        style="green" if right else "red",
        highlight=False,
    )


def _read(
    haystack: Haystack, session: Session, progress: ReadingProgress, tokens: int
) -> SessionStats:
    """Read until there is enough and all is hidden, or to the text's end."""
    tenths = _Tenths(tokens, session.model.device)
    for stats in chain(session.reading(progress.counting(haystack)), session.finish()):
        progress.show(stats)
        tenths.note(stats, progress.seconds)
        if stats.tokens >= tokens and not haystack.missing:
            return stats
    return session.stats()


def _ask(session: Session, needle: Needle) -> bool:
    """Ask for one thing, show what was said, and say whether it is right."""
    answer = session.ask(needle.question, max_new_tokens=16, do_sample=False)
    said = " ".join("".join(answer).split())
    right = bool(found(said, needle.answers))
    where = f"after {needle.hidden_at:,} tokens" + (", at the end" if needle.is_last else "")
    out.print(f"\nhidden  {needle.sentence} ({where})", highlight=False, soft_wrap=True)
    out.print(f"asked   {needle.question}", highlight=False, soft_wrap=True)
    out.print("answer ", Text(said, "bold"), verdict(right), highlight=False, soft_wrap=True)
    return right


def verdict(right: bool) -> Text:
    """What is said of an answer."""
    return Text("(found)", "green") if right else Text("(not found)", "red")


def _check_key(key: str) -> None:
    if not (key.isascii() and key.isdigit() and len(key) == _DIGITS and key[0] != "0"):
        raise ValueError(
            f"--passkey must be a number of {_DIGITS} digits, the first not 0, got {key!r}"
        )


@dataclass
class Needle:
    """A sentence to hide, and what is asked for it.

    Attributes:
        place: tokens after which it belongs.
        hidden_at: tokens read before it, or None as long as it is not hidden.
        is_last: whether the text ended before its place.
    """

    sentence: str
    question: str
    answers: Sequence[str]
    place: float
    hidden_at: int | None = None
    is_last: bool = False


def _needles(
    tokenizer: Any, key: str, depth: float | None, facts: int, whole: float
) -> list[Needle]:
    """The number and the facts, in the order of their places."""
    depth = random.random() if depth is None else depth
    needles = [Needle(PASSKEY.format(key=key), ASKED, [key], whole * depth)]
    drawn = Facts(tokenizer, changes=0.0).sentences(random.randrange(2**31), facts)
    needles.extend(
        Needle(sentence, question.text, question.answers, whole * random.random())
        for sentence, question in drawn
    )
    return sorted(needles, key=lambda needle: needle.place)


class Haystack:
    """A text with needles put between its lines, while it is read, until there is enough.

    It ends by itself, since a session takes text in windows of some thousand tokens: what stopped
    reading from outside would leave needles a chunk and more behind.

    Attributes:
        hidden: needles that are hidden by now.
        missing: those that are not.
        characters: of the text, without the needles.
    """

    def __init__(
        self, session: Session, texts: Iterator[str], needles: Sequence[Needle], tokens: int
    ) -> None:
        self._session = session
        self._texts, self._tokens = texts, tokens
        self.hidden: list[Needle] = []
        self.missing = list(needles)
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        """The text in pieces; needles whose place is beyond the end come last."""
        for text in self._texts:
            for start in range(0, len(text), _PIECE):
                piece = text[start : start + _PIECE]
                self.characters += len(piece)
                while (cut := _line_end(piece)) and self._is_due():
                    yield piece[:cut]
                    yield self._hide()
                    piece = piece[cut:]
                yield piece
                if not self.missing and self._read() >= self._tokens:
                    return
        while self.missing and self.characters:
            self.missing[0].is_last = True
            yield self._hide()

    def _hide(self) -> str:
        needle = self.missing.pop(0)
        needle.hidden_at = self._read()
        self.hidden.append(needle)
        return f"\n{needle.sentence}\n"

    def _is_due(self) -> bool:
        return bool(self.missing) and self._read() >= self.missing[0].place

    def _read(self) -> int:
        return self._session.stats().tokens


def _line_end(piece: str) -> int:
    """Behind the first line, or the first word where there is no end of one, or 0."""
    return piece.find("\n") + 1 or piece.find(" ") + 1


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
