"""`cometlm chat MODEL`: a conversation that never runs out of context."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cometlm.checkpoints.backbones import cache_folder
from cometlm.cli import options
from cometlm.cli.console import (
    UNTRAINED,
    describe,
    err,
    is_untrained,
    load_quietly,
    out,
    print_error,
    print_stream,
)
from cometlm.cli.terminal import as_path
from cometlm.device import readable_bytes
from cometlm.session.session import Session

HELP = """\
/save PATH   keep the session in a file
/fork        go on in a copy; /back returns to where you forked
/back        drop what came after the last /fork
/stats       what was read, and the bytes held
/read PATH   read a text file into the session
/quit        leave (also Ctrl-D); Ctrl-C ends an answer"""

LONGER = options.GenerationOptions(max_new_tokens=512)


def chat(
    model: options.Model,
    loading: options.LoadOptions,
    session: Annotated[Path | None, typer.Option(help="Go on from this saved session.")] = None,
    generation: options.GenerationOptions = LONGER,
) -> None:
    """Talk with a model; everything said stays in a memory of constant size."""
    writing = generation.start()
    loaded, tokenizer = load_quietly(model, **loading.given())
    begun = Session.load(session, loaded, tokenizer) if session else Session(loaded, tokenizer)
    err.print(describe(loaded), highlight=False, soft_wrap=True)
    if is_untrained(loaded):
        err.print(UNTRAINED, style="yellow")
    conversation = Conversation(begun, writing)
    if not sys.stdin.isatty():
        conversation.run()
        return
    err.print("type a message, or /help", highlight=False)
    with _history():
        conversation.run()


class Conversation:
    """Reads lines, answers messages and obeys commands until the input ends."""

    def __init__(self, session: Session, generation: dict[str, Any]) -> None:
        self._session = session
        self._forks: list[Session] = []
        self._generation = generation

    def run(self) -> None:
        """Go on to the end of the input or /quit."""
        while True:
            try:
                line = input("› " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                err.print("\n/quit or Ctrl-D leaves", highlight=False)
                continue
            if line == "/quit":
                return
            if line:
                self._obey(line) if line.startswith("/") else self._answer(line)

    def _answer(self, message: str) -> None:
        try:
            print_stream(self._session.chat(message, stream=True, **self._generation))
        except KeyboardInterrupt:
            out.print()  # what was written so far stays in the session
        except ValueError as error:  # a message that is no text must not end the conversation
            print_error(error)

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            self._command(word, rest)
        except (ValueError, OSError) as error:  # a wrong path must not end the conversation
            print_error(error)

    def _command(self, word: str, rest: str) -> None:
        if word == "/save":
            if not rest:
                raise ValueError("/save needs a path")
            self._session.save(as_path(rest))
            err.print(f"saved {rest}", highlight=False, soft_wrap=True)
        elif word == "/fork":
            self._forks.append(self._session.fork())
            err.print(f"forked ({len(self._forks)} to go back to)", highlight=False)
        elif word == "/back":
            if not self._forks:
                raise ValueError("there is no fork to go back to")
            self._session = self._forks.pop()
            err.print("back where you forked", highlight=False)
        elif word == "/stats":
            stats = self._session.stats()
            err.print(
                f"{stats.tokens:,} tokens, {stats.chunks:,} chunks folded, "
                f"{readable_bytes(stats.memory_bytes)} of memory held",
                highlight=False,
            )
        elif word == "/read":
            with as_path(rest).open(encoding="utf-8") as file:
                self._session.read(file)
            self._command("/stats", "")
        else:
            err.print(HELP, highlight=False)


@contextlib.contextmanager
def _history() -> Any:
    """Line editing, with the lines of earlier conversations, where the platform has it."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(cache_folder() / "chat_history")
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path = cache_folder() / "chat_history"
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
