"""`cometlm chat MODEL`: a conversation that never runs out of context."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from cometlm.checkpoints.backbones import cache_folder
from cometlm.cli import options
from cometlm.cli.console import (
    ReadingProgress,
    describe,
    err,
    load_quietly,
    made_with,
    out,
    pack_weights,
    print_error,
    print_stream,
    tell_what_it_learned,
)
from cometlm.cli.interrupt import InterruptLater
from cometlm.cli.terminal import as_path, read_message
from cometlm.device import readable_bytes
from cometlm.session.file import check_target
from cometlm.session.session import Session
from cometlm.text_file import UTF8, check_encoding, read_blocks

HELP = """\
/save PATH   keep the session in a file
/fork        go on in a copy; /back returns to where you forked
/back        drop what came after the last /fork
/stats       what was read, and the bytes held
/read PATH   read a text file into the session
/quit        leave (also Ctrl-D); Ctrl-C ends an answer, or reading
//…          a message that begins with /"""

# What must not end a conversation, which may be in no file: a message that is no text, a full
# device, a memory that stopped being finite. The session is then as it was before.
_NO_END = (ValueError, RuntimeError, FloatingPointError)
LONGER = options.GenerationOptions(max_new_tokens=512)


def chat(
    model: options.Model,
    loading: options.LoadOptions,
    chat_template: options.ChatTemplateOptions,
    session: Annotated[
        Path | None,
        typer.Option(help="Go on from this saved session, with its sizes, dtype and quantization."),
    ] = None,
    generation: options.GenerationOptions = LONGER,
    encoding: options.Encoding = UTF8,
) -> None:
    """Talk with a model; everything said stays in a memory of constant size."""
    writing = generation.start()
    writing["chat_template_kwargs"] = chat_template.variables()
    check_encoding(encoding)
    made = {} if session is None else made_with(session)
    loaded, tokenizer = load_quietly(model, **{**made, **loading.given()})
    begun = Session.load(session, loaded, tokenizer) if session else Session(loaded, tokenizer)
    err.print(describe(loaded), highlight=False, soft_wrap=True)
    tell_what_it_learned(loaded)
    pack_weights(loaded)
    conversation = Conversation(begun, writing, chat_template.system, encoding)
    try:
        if not sys.stdin.isatty():
            conversation.run()
        else:
            err.print("type a message, or /help", highlight=False)
            with _history():
                conversation.run()
    finally:
        conversation.say_what_is_lost()


class Conversation:
    """Reads messages, answers them and obeys commands until the input ends.

    Args:
        session: what was read and said before.
        generation: options of `Session.chat`.
        system: a system message in front of the first message.
        encoding: of files that are read.
    """

    def __init__(
        self,
        session: Session,
        generation: dict[str, Any],
        system: str | None = None,
        encoding: str = UTF8,
    ) -> None:
        self._session = session
        self._forks: list[tuple[Session, int]] = []  # each with `_kept` as it was
        self._generation = generation
        self._system = system
        self._turns = session.turns  # answered before this conversation
        self._encoding = encoding
        self._kept = session.stats().tokens  # how much was read when the session was last saved

    def run(self) -> None:
        """Go on to the end of the input or /quit."""
        while True:
            try:
                line = read_message("› " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                err.print("\n/quit or Ctrl-D leaves", highlight=False)
                continue
            if line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            elif line:
                self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def say_what_is_lost(self) -> None:
        """At the end: what was read and said and is in no file."""
        lost = self._session.stats().tokens - self._kept
        if lost:
            err.print(
                f"{lost:,} tokens of this conversation are in no file: /save PATH keeps them "
                "before you leave",
                highlight=False,
                soft_wrap=True,
            )

    def _answer(self, message: str) -> None:
        system = self._system if self._session.turns == self._turns else None
        answer = self._session.chat(message, stream=True, system=system, **self._generation)
        try:
            with contextlib.closing(cast("Generator[str]", answer)) as pieces:
                print_stream(pieces)
        except KeyboardInterrupt:
            out.print()  # what was written so far stays in the session
        except _NO_END as error:
            print_error(error)

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            self._command(word, rest)
        except (*_NO_END, OSError) as error:  # a wrong path, too
            print_error(error)

    def _command(self, word: str, rest: str) -> None:
        if word == "/save":
            if not rest:
                raise ValueError("/save needs a path")
            path = as_path(rest)
            check_target(path)
            self._session.save(path)
            self._kept = self._session.stats().tokens
            err.print(f"saved {rest}", highlight=False, soft_wrap=True)
        elif word == "/fork":
            fork = self._session.fork()
            fork.release()  # many forks may wait
            self._forks.append((fork, self._kept))
            err.print(f"forked ({len(self._forks)} to go back to)", highlight=False)
        elif word == "/back":
            if not self._forks:
                raise ValueError("there is no fork to go back to")
            self._session, self._kept = self._forks.pop()
            err.print("back where you forked", highlight=False)
        elif word == "/stats":
            stats = self._session.stats()
            err.print(
                f"{stats.tokens:,} tokens, {stats.chunks:,} chunks folded, "
                f"{readable_bytes(stats.memory_bytes)} of memory held",
                highlight=False,
            )
        elif word == "/read":
            if not rest:
                raise ValueError("/read needs a path")
            self._read(as_path(rest))
        else:
            err.print(HELP, highlight=False)

    def _read(self, path: Path) -> None:
        """Read a file: all of it, what came before Ctrl-C, or nothing where there is an error."""
        work, size = self._session.fork(), os.stat(path).st_size
        with (
            path.open("rb") as file,
            ReadingProgress(size) as progress,
            InterruptLater(_say) as interrupt,
        ):
            texts = read_blocks(interrupt.listening(file), str(path), self._encoding)
            with contextlib.suppress(KeyboardInterrupt):  # a pipe that gives nothing
                for stats in work.reading(progress.counting(texts)):
                    progress.show(stats)
                    if interrupt.asked:
                        break
        self._session = work
        if interrupt.asked:
            _say("stopped; what was read of it stays")
        self._command("/stats", "")
        if interrupt.asked not in (0, signal.SIGINT):  # whoever sent it wants an end
            raise typer.Exit(interrupt.exit_code)


def _say(line: str) -> None:
    err.print(line, highlight=False)


@contextlib.contextmanager
def _history() -> Any:
    """Line editing, with the lines of earlier conversations, where the platform has it."""
    try:
        import readline
    except ImportError:
        yield
        return
    # What is pasted is then one line with line ends in it; Python turns this off.
    readline.parse_and_bind("set enable-bracketed-paste on")
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
