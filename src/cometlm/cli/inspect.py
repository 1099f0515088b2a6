"""`cometlm inspect SESSION | MODEL FILE`: what a memory does when it reads a text and answers."""

from __future__ import annotations

import math
import signal
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cometlm.cli import options
from cometlm.cli.console import (
    UNTRAINED,
    ReadingProgress,
    describe,
    err,
    is_untrained,
    load_for_session,
    load_quietly,
    out,
)
from cometlm.cli.interrupt import InterruptLater
from cometlm.cli.read import Texts, say
from cometlm.inspection import PARTS, Explanation, InspectedSession
from cometlm.inspection.page import PAGE, percent, sources, write
from cometlm.inspection.pictures import why_none
from cometlm.text_file import UTF8, check_encoding


def inspect(
    model: Annotated[
        str, typer.Argument(help="A saved session; or a model as for `read`, and a FILE.")
    ],
    loading: options.LoadOptions,
    file: Annotated[
        str | None, typer.Argument(help="A text file, or - for standard input.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="Ask this, and explain the answer.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", help="A folder for the page, pictures and numbers.")
    ] = Path("out/inspect"),
    encoding: options.Encoding = UTF8,
    max_new_tokens: options.MaxNewTokens = 64,
    raw: Annotated[
        bool, typer.Option("--raw", help="Put the question as it is, without chat template.")
    ] = False,
) -> None:
    """Show what a memory does: its gates, how old it is, and what an answer looked at.

    Writes one HTML page that needs nothing else, pictures (PNG) and the numbers (JSON).
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--out must be a folder, got the file {output}")
    interrupted, note = 0, ""
    if file is None:
        session = _saved(Path(model), loading)
    else:
        texts = Texts([file], check_encoding(encoding))
        loaded, tokenizer = load_quietly(model, **loading.given())
        session = InspectedSession(loaded, tokenizer)
        err.print(describe(loaded), highlight=False, soft_wrap=True)
        interrupted = _read_all(session, texts)
        if session.stats().tokens == 0:
            raise ValueError(f"{file} holds no text")
    if is_untrained(session.model):
        note = UNTRAINED
        err.print(UNTRAINED, style="yellow")
    explanation = None
    if interrupted:
        note = f"Reading was interrupted. {note}".strip()
    elif question is not None:
        template = False if raw else None
        writing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        explanation = session.explain(question, template=template, **writing)
    if lacking := why_none():
        err.print(lacking, style="yellow", highlight=False, soft_wrap=True)
    write(output, session, explanation, note)
    _print_tables(session, explanation)
    err.print(f"written {output / PAGE}", highlight=False, soft_wrap=True)
    if interrupted:
        raise typer.Exit(interrupted)


def _saved(path: Path, loading: options.LoadOptions) -> InspectedSession:
    """A session from its file, with the model that made it."""
    if not path.is_file():
        raise ValueError(f"without a FILE to read, {path} must be a saved session's file")
    if sizes := loading.sizes():
        raise ValueError(f"a saved session has its own sizes, got {', '.join(sizes)}")
    if loading.dtype is not None:
        raise ValueError(f"a saved session has its own dtype, got {loading.dtype}")
    loaded, tokenizer = load_for_session(path, None, loading.device, loading.quantization)
    err.print(describe(loaded), highlight=False, soft_wrap=True)
    return InspectedSession.load(path, loaded, tokenizer)


def _read_all(session: InspectedSession, texts: Texts) -> int:
    """Read to the end, or to a signal; then gives the exit code."""
    with ReadingProgress(texts.size) as progress, InterruptLater(say) as interrupt:
        try:
            blocks = progress.counting(texts.blocks(interrupt))
            for stats in chain(session.reading(blocks), session.finish()):
                progress.show(stats)
                if interrupt.asked:
                    break
        except KeyboardInterrupt:
            interrupt.asked = interrupt.asked or signal.SIGINT
        progress.stop()
        word = "interrupted after" if interrupt.asked else "read"
        err.print(f"{word} {progress.summary(session.stats())}", highlight=False)
    return interrupt.exit_code if interrupt.asked else 0


def _print_tables(session: InspectedSession, explanation: Explanation | None) -> None:
    """What each part of the row is, and how much it was looked at; and an answer's sources."""
    masses = session.history.mean("masses")
    reading = [math.nan] * len(PARTS) if masses is None else masses.mean((0, 1)).tolist()
    if explanation is not None:
        out.print(explanation.answer, highlight=False, soft_wrap=True)
        out.print()
    table = Table(box=None, pad_edge=False)
    table.add_column("attention on")
    table.add_column("of the text", justify="right")
    if explanation is not None:
        table.add_column("of the answer", justify="right")
    table.add_column("what it holds")
    for i, part in enumerate(PARTS):
        figures = [percent(reading[i])]
        if explanation is not None:
            figures.append(percent(float(explanation.parts.mean((0, 1, 2))[i])))
        table.add_row(part, *figures, _held(session, i))
    out.print(table, highlight=False)
    if explanation is None or not explanation.history.passages:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("chunk", "tokens", "of all attention", "of global memory", "held of it"):
        table.add_column(column, justify="right")
    for one in sources(explanation):
        shares = [percent(share) for share in (one.mass, one.looked, one.held)]
        table.add_row(one.chunks, f"{one.begin:,}–{one.end:,}", *shares)
    out.print()
    out.print(table, highlight=False)


def _held(session: InspectedSession, part: int) -> str:
    """A few words on what a part of the row holds at the end."""
    history = session.history
    if part == 0:
        slots = history.shares.shape[1]
        age = float(history.ages.mean()) if slots and history.passages else math.nan
        old = "" if math.isnan(age) else f", {age:,.0f} tokens old on average"
        return f"{slots} slots{old}"
    if part == 1:
        known = [one for one in history.entries if one is not None]
        where = f", tokens {known[0].begin:,}–{known[-1].end:,}" if known else ""
        return f"{len(history.entries)} entries{where}"
    return ""
