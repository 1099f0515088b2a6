"""What one request does with the model: read what is new and write answers, or read a document."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from cometlm.sequences import num_shared
from cometlm.serve.engine import Work
from cometlm.serve.errors import ApiError
from cometlm.serve.tools import ToolCall
from cometlm.serve.transcript import Transcript
from cometlm.session.session import Session
from cometlm.session.writer import Finish, Likely, Sampling, Writer
from cometlm.text_file import read_blocks

_MARK = 8  # chunks that are worth a mark
_SAY_EVERY = 0.5  # seconds between two words on how far a document was read


@dataclass(frozen=True)
class Order:
    """What is to be read and written.

    Attributes:
        start: the session to go on from; it stays as it is.
        history: token ids that come first.
        question: ids that no chunk border cuts.
        closing: ids that end a turn; None: this is no chat.
        sampling: how tokens are chosen.
        most: tokens that each answer has at most.
        stops: ids that end an answer.
        stop: strings that do.
        count: how many answers.
        shown, last: see `Transcript`.
    """

    start: Session
    history: Sequence[int]
    question: Sequence[int]
    closing: Sequence[int] | None
    sampling: Sampling
    most: int
    stops: Collection[int] = ()
    stop: Sequence[str] = ()
    count: int = 1
    shown: Collection[int] = ()
    last: Sequence[str] = ()


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer, and how likely its tokens were, if that is noted."""

    index: int
    text: str
    likely: Sequence[Likely] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        index: which of several.
        text: without a stop string, and without calls once these were found.
        finish: why it ended.
        ids: that were written.
        session: after it.
        kept: ids that the session read as the answer, and what ends a turn.
        calls: of tools.
        likely: of the tokens of its text, if it is noted.
    """

    index: int
    text: str
    finish: Finish
    ids: Sequence[int]
    session: Session
    kept: Sequence[int]
    calls: Sequence[ToolCall] = ()
    likely: Sequence[Likely] = ()

    @property
    def tokens(self) -> int:
        """How many were written."""
        return len(self.ids)

    @property
    def reason(self) -> str:
        """Why it ended, as OpenAI's chats say it."""
        return "tool_calls" if self.calls and self.finish == "stop" else self.finish


@dataclass(frozen=True)
class Mark:
    """A place on the way through a long prompt, which others may begin with.

    Attributes:
        tokens: how many of the order's ids were read.
        session: there.
    """

    tokens: int
    session: Session


@dataclass(frozen=True)
class Used:
    """Tokens that were read, or one for each answer that is written."""

    tokens: int


class _Choice:
    """One of several answers while it is written."""

    def __init__(self, index: int, order: Order, writer: Writer) -> None:
        self.index, self.writer = index, writer
        self.transcript = Transcript(order.start.tokenizer, order.stop, order.shown, order.last)
        self._stops, self._told = order.stops, 0

    def take(self) -> str:
        """A token; the text that it makes certain."""
        token = self.writer.take()
        assert token is not None
        text = "" if token in self._stops else self.transcript.add(token)
        if self.transcript.is_stopped:
            self.writer.stop()
        return text if self.writer.finish is None else text + self.transcript.finish()

    def piece(self, text: str) -> Piece | None:
        """A text with the tokens that were written for it; at the end also those without text."""
        likely: Sequence[Likely] = ()
        if self.writer.likely and (text or self.writer.finish is not None):
            likely = self.likely[self._told :]
            self._told += len(likely)
        return Piece(self.index, text, likely) if text or likely else None

    @property
    def likely(self) -> Sequence[Likely]:
        """Of the tokens of the text: without what ended it."""
        if not self.writer.likely:
            return ()
        ids = self.writer.ids
        kept = num_shared(self.transcript.kept_ids(), ids)
        return self.writer.likely[: kept - (kept > 0 and ids[kept - 1] in self._stops)]


def answering(order: Order, emit: Callable[[Piece | Answer | Mark | Used], None]) -> Work:
    """The work of an `engine.Job`: pieces of text while they are written, then whole answers.

    Of a long prompt it also gives marks. What it reads is known to whoever ordered it, and is not
    told as used.
    """
    order.start.prepare()  # for others that go on from there, too
    yield ()
    session = order.start.fork()
    yield from _read(session, order, emit)
    cache, logits = session.begin_answer()
    yield ()
    suppressed = session.model.config.suppressed_tokens
    choices = [
        _Choice(
            index,
            order,
            Writer(
                cache,
                logits,
                order.sampling,
                stops=order.stops,
                most=order.most,
                suppressed=suppressed,
                stream=index,
            ),
        )
        for index in range(order.count)
    ]
    going = choices
    while going:
        emit(Used(len(going)))
        for choice in going:
            piece = choice.piece(choice.take())
            if piece is not None:
                emit(piece)
        going = [choice for choice in going if choice.writer.finish is None]
        if going:
            yield [choice.writer for choice in going]
    for choice in choices:
        after, kept = session.fork(), choice.transcript.kept_ids()
        after.take_over(choice.writer.past, choice.writer.ids)
        if order.closing is None:
            yield from _chunks(after.reading(kept))
        else:
            yield from _chunks(after.ending_turn(kept, order.closing, order.stops))
            kept = after.ended_turn(kept, order.closing, order.stops)
        finish = choice.writer.finish
        assert finish is not None
        emit(
            Answer(
                choice.index,
                choice.transcript.text,
                finish,
                choice.writer.ids,
                after,
                kept,
                likely=choice.likely,
            )
        )


def _read(session: Session, order: Order, emit: Callable[[Mark], None]) -> Work:
    """Read a prompt; marks at the doubles of some chunks, and at the end of a long one."""
    size = session.model.config.comet_config.chunk_size
    ids, question = list(order.history), list(order.question)
    if len(question) > size:  # cut in any case
        ids, question = ids + question, []
    begin, border = 0, _MARK * size
    while begin < len(ids):
        yield from _chunks(session.reading(ids[begin:border]))
        begin = min(border, len(ids))
        if begin == border:
            emit(Mark(begin, session.fork()))
            border *= 2
    yield from _chunks(session.asking_in_one_chunk(question))
    if len(ids) >= _MARK * size and len(ids) + len(question) > border // 2:
        emit(Mark(len(ids) + len(question), session.fork()))


@dataclass(frozen=True)
class Progress:
    """How far a document was read.

    Attributes:
        tokens: of the session, so far.
        session: it, once the document is read; None: it goes on.
        bytes_read: of the document, about.
    """

    tokens: int
    session: Session | None = None
    bytes_read: int = 0


def reading(
    start: Session, document: IO[bytes], name: str, emit: Callable[[Progress | Used], None]
) -> Work:
    """The work of an `engine.Job` that reads a document into a session of its own.

    Args:
        start: what it is read behind; it stays as it is.
        document: the text.
        name: what errors call it.
        emit: told how far it was read.

    Raises:
        ApiError: it is no text in UTF-8, or empty.
    """
    session, told = start.fork(), time.monotonic()
    before, most = start.stats().tokens, 0
    counted = before
    try:
        for steps in (session.reading(read_blocks(document, name)), session.finish()):
            for stats in steps:
                emit(Used(stats.tokens - counted))
                counted = stats.tokens
                if time.monotonic() - told > _SAY_EVERY:
                    told = time.monotonic()
                    # Text is taken in windows, and run in chunks: of what is taken, what was run.
                    taken = max(1, session.stats().tokens - before)
                    share = max(0, stats.tokens - before) / taken
                    most = max(most, int(document.tell() * share))
                    emit(Progress(stats.tokens, bytes_read=most))
                yield ()
    except ValueError as error:
        raise ApiError(str(error), param="file") from error
    if session.stats() == start.stats():
        raise ApiError(f"{name} is empty", param="file")
    tokens = session.stats().tokens
    emit(Used(tokens - counted))  # what was known only at its end
    emit(Progress(tokens, session))


def settling(start: Session, emit: Callable[[Progress | Used], None]) -> Work:
    """The work of an `engine.Job` that runs what a session holds unread: the end of its text."""
    session = start.fork()
    emit(Used(session.open_tokens))
    yield from _chunks(session.finish())
    emit(Progress(session.stats().tokens, session))


def _chunks(steps: Iterator[object]) -> Work:
    """A step of the engine for each chunk."""
    for _ in steps:
        yield ()
