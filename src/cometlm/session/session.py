"""A session: one text read by one model, however it comes in; it can be asked, forked and saved.

The session owns its state: the memory at the last chunk border, and the open chunk as token ids,
which begins with the overlap that was in the chunk before.
Every chunk goes through the layers once, when it is full and more has followed, so however the text
was cut makes no difference to the memory, to the last bit. The price is that asking runs the open
chunk beside that. What it made of it is kept (`session.open_chunk`), for the next answer to go on
from; `release` gives it up.

Pitfalls:
    - The end of what was read as text waits for what follows it, since its tokens may still
      change. Asking looks at all of it.
    - Token ids and chat turns end the text before them: its last tokens are then settled. A chat
      turn may also end the open chunk before its time, so that its question stays whole.
    - Text is only text: `<|im_end|>` in a document ends no turn. What a chat template rendered
      already is read with `special=True`.

Threads may share a session: one `read` waits for another, and what is asked meanwhile looks at what
was read up to then. While `chat` writes an answer, nothing else may be read.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from cometlm.compat import CACHE
from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.foreseen import Foreseen, foreseen
from cometlm.session import file as session_file
from cometlm.session.chat_template import (
    PLAIN,
    ChatOptions,
    Message,
    Turn,
    check_text,
    render_turn,
)
from cometlm.session.open_chunk import OpenChunk
from cometlm.session.options import generation_options, stop_ids, template_variables
from cometlm.session.place import Place
from cometlm.session.plain_text import PlainText
from cometlm.session.sources import Source, pieces
from cometlm.session.text_stream import streamed
from cometlm.session.token_stream import TokenStream
from cometlm.text_file import UTF8

_LOGITS_AT_A_TIME = 256  # positions: a vocabulary is wide
_WORTH_RUNNING = 64  # tokens of an open chunk: with fewer, one call with the question is quicker
_ANSWER_SHARE = 8  # a question has room for an eighth of a chunk behind it


@dataclass(frozen=True)
class SessionStats:
    """What a session has done and holds.

    Attributes:
        tokens: tokens read.
        chunks: chunks folded into memory.
        memory_bytes: bytes of memory held for them.
        open_bytes: bytes held beside it, of the open chunk as far as an answer has run it.
    """

    tokens: int
    chunks: int
    memory_bytes: int
    open_bytes: int = field(default=0, compare=False)  # says nothing of what was read


class Session:
    """Reads text of any length with one model, in constant memory.

    Args:
        model: the model; sessions share it and never change it.
        tokenizer: its tokenizer; without one, only token ids can be read.

    Raises:
        ValueError: a tokenizer that cannot stream.
    """

    def __init__(self, model: CometForCausalLM, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        vocabulary = model.config.vocab_size
        self._stream = TokenStream(tokenizer, vocabulary) if tokenizer is not None else None
        self._cache: CometCache = model.model.empty_cache()
        self._open: list[int] = []
        self._run: OpenChunk | None = None
        self._turns = 0
        self._kept_stream: dict[str, Any] | None = None
        self._text_place = Place()
        self._new_locks()

    @property
    def characters(self) -> int:
        """Characters of text read, also before saving and loading.

        So what was interrupted knows where to go on in its source (`unread`). Set it to 0 where a
        new source begins.
        """
        return self._text_place.characters

    @characters.setter
    def characters(self, count: int) -> None:
        self._text_place = Place(count)

    @property
    def open_tokens(self) -> int:
        """Tokens of the open chunk; its overlap and waiting text count."""
        with self._state:
            return self.stats().tokens - self._only_in_memory(self._cache)

    @property
    def turns(self) -> int:
        """Messages of `chat` that were answered, also before saving and loading."""
        return self._turns

    # --- reading ----------------------------------------------------------------------------

    def read(self, source: Source, *, special: bool = False, encoding: str = UTF8) -> None:
        """Read text or token ids.

        Args:
            source: text, or bytes of it; a path (`pathlib.Path`) or an open file; token ids as a
                sequence, an array or a tensor, or as a tokenizer gives them for one text; or an
                iterable of these.
            special: control tokens that are written in the text, such as `<|im_end|>`, count as
                such: for conversations that a chat template rendered already. Else they are text.
            encoding: of bytes, and of files that were not opened as text.

        Raises:
            ValueError: something else, a file that is not text, ids outside the vocabulary, text
                without a tokenizer.
            OSError: a file cannot be read.
            RuntimeError: `chat` is writing an answer.
            FloatingPointError: a memory stopped being finite; what was read before is kept.
        """
        with self._reads:
            for _ in self.reading(source, special=special, encoding=encoding):
                pass

    def reading(
        self, source: Source, *, special: bool = False, encoding: str = UTF8
    ) -> Iterator[SessionStats]:
        """Like `read`, giving the stats after every chunk."""
        for piece in pieces(source, encoding):
            yield from self._stepwise(self._taking(piece, special))

    def unread(
        self, source: Source, *, encoding: str = UTF8, name: str = "the source"
    ) -> Iterator[str]:
        """The part of a text that was not read yet: what stands behind `characters` of it.

        Args:
            source: the text from its beginning, as `read` takes it.
            encoding: as `read`.
            name: what errors call it.

        Raises:
            ValueError: another text, or a shorter one.
        """
        blocks = (block for block in pieces(source, encoding) if isinstance(block, str))
        return self._text_place.behind(blocks, name)

    def ask_in_one_chunk(self, question: Sequence[int]) -> None:
        """Read a question whose answer comes next: no chunk border cuts it.

        Where the open chunk has no room for it and for the beginning of an answer, an eighth of a
        chunk, that chunk ends earlier: what was read last stays in the open one as it is, half a
        chunk of it if there is room. A question that fits into no chunk is read as any text.

        Args:
            question: token ids.

        Raises:
            ValueError, FloatingPointError: as `read`.
        """
        with self._reads:
            for _ in self.asking_in_one_chunk(question):
                pass

    def asking_in_one_chunk(self, question: Sequence[int]) -> Iterator[SessionStats]:
        """Like `ask_in_one_chunk`, giving the stats after every chunk."""
        self._check(question)
        yield from self.finish()
        yield from self._stepwise(self._making_room(len(question)))
        yield from self.reading(list(question))

    def finish(self) -> Iterator[SessionStats]:
        """Say that the text ends here: its last tokens need not wait for more."""
        yield from self._stepwise(self._finishing())

    def settle(self) -> Iterator[SessionStats]:
        """Run every chunk whose tokens are known, so that asking and loading need not.

        `read` collects some pages of text before it tokenises; this does not wait for them, and
        changes nothing else.
        """
        yield from self._stepwise(self._settling())

    def stats(self) -> SessionStats:
        """Tokens read, chunks folded and bytes held so far.

        The end of the text, whose tokens may still change, counts with the tokens that it has now.
        """
        with self._state:
            cache, read, run = self._cache, len(self._open), self._run
            stream = copy.copy(self._stream)
        waiting = stream.finish() if stream is not None else ()
        tokens = self._only_in_memory(cache) + read + len(waiting)
        open_bytes = 0 if run is None else run.nbytes
        return SessionStats(tokens, cache.chunks_folded, cache.nbytes, open_bytes)

    # --- the open chunk ---------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self) -> None:
        """Run the open chunk now, so that answers of this session and its forks need not.

        `ask` does so by itself. Text whose tokens may still change is left out; of what can no
        longer, chunks that are full are run first, as by `settle`.
        """
        work = self._settling()
        while True:  # between two chunks others may look at the session
            with self._state:
                # What chat() has written so far is in a fork, which will replace this session.
                if self._is_answering or next(work, None) is None:
                    break
        with self._state:
            memory, ids = self._cache, tuple(self._open)
            known, begin = self._run, self._num_ready(ids)
        if len(ids) - begin < _WORTH_RUNNING:
            return
        run = self._ran(memory, ids, known if begin else None)
        with self._state:
            if self._cache is memory:
                self._run = run

    def release(self) -> None:
        """Give up what was run of the open chunk: the next answer runs it again."""
        with self._state:
            self._run = None

    def take_over(self, past: tuple[CometCache, int], answer: Sequence[int]) -> None:
        """Keep what writing has run, so that going on from the answer need not run it again.

        Args:
            past: the model's cache after `answer` or some of it, and which of its rows it is.
            answer: ids that were written from what `begin_answer` gave.
        """
        run = OpenChunk.after(self._cache, [*self._open, *answer], past)
        if run is not None:
            self._run = run

    def num_ready(self, text: int, question: int) -> int:
        """Tokens read that an answer needs not run again, where more is read in front of it.

        Args:
            text: tokens read before the question.
            question: its tokens, which stand in one chunk if they can; see `ask_in_one_chunk`.
        """
        with self._state:
            ready, in_memory = self._num_ready(self._open), self._only_in_memory(self._cache)
            waiting = self.stats().tokens - in_memory + text
        size = self.model.config.comet_config.chunk_size
        if waiting + (question + size // _ANSWER_SHARE if question else 0) > size:
            return in_memory  # the chunk ends before
        return in_memory + ready

    # --- writing ----------------------------------------------------------------------------

    def ask(
        self,
        prompt: str | Sequence[Message],
        *,
        stream: bool = False,
        template: bool | None = None,
        special: bool = False,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> str | Iterator[str]:
        """Answer a question about what was read; the session stays as it was.

        Args:
            prompt: the question, or messages that end with it: mappings with a role and content.
            stream: give the answer piece by piece while it is written.
            template: put the prompt into the tokenizer's chat template; no chunk border cuts it
                then, see `ask_in_one_chunk`. Default: if it has one.
            special: control tokens that are written in the prompt count as such; see `read`.
            system: a system message in front of the prompt.
            tools: what the model may call, as the chat template takes them; for the first message
                of a session.
            chat_template_kwargs: variables of the chat template, such as `enable_thinking`. Those
                that the template names may also be given by themselves.
            generation: options of transformers' `generate`; 256 new tokens unless they say.

        Returns:
            The answer, or an iterator over its pieces.

        Raises:
            ValueError: nothing was read and the prompt is empty, a message that the chat template
                refuses or drops, an option that `generate` does not know or that makes more than
                one answer.
        """
        named, options = template_variables(self.tokenizer, generation)
        chat = ChatOptions(tools, {**named, **(chat_template_kwargs or {})}, special)
        if prompt:
            self.prepare()
        fork = self._asked(_with_system(prompt, system), template, chat)
        pieces = fork._written([], options, stream)
        return pieces if stream else "".join(pieces)

    def chat(
        self,
        message: str | Sequence[Message],
        *,
        stream: bool = False,
        special: bool = False,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> str | Iterator[str]:
        """Like `ask`, but the message and its answer stay in the session.

        If a streamed answer is broken off, by its reader or by an error, what was written so far
        stays; if nothing was, or that is broken off too, the session is as it was before the
        message. Nothing else can be read until a streamed answer ends or is closed.

        Raises:
            ValueError: as `ask`; also a tokenizer without a chat template.
            RuntimeError: another answer is being written.
        """
        named, rest = template_variables(self.tokenizer, generation)
        options = ChatOptions(tools, {**named, **(chat_template_kwargs or {})}, special)
        answer = self._chatting(_with_system(message, system), options, rest, stream)
        return answer if stream else "".join(answer)

    @torch.no_grad()
    def continuation(self, count: int) -> list[int]:
        """The `count` likeliest next tokens, greedily; the session stays as it is.

        Raises:
            ValueError: nothing was read yet.
        """
        fork = self.fork()
        written: list[int] = []
        greedy = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "max_new_tokens": count}
        for _ in fork._written(written, greedy, stream=False):
            pass
        return written

    def loglikelihood(self, ids: Sequence[int]) -> list[float]:
        """Log-probability, in nats, of each of these ids coming next; the session stays as it is.

        Raises:
            ValueError: nothing was read yet; otherwise as `read`.
        """
        return [token.loglikelihood for token in self.fork().read_foreseen(ids)]

    @torch.no_grad()
    def read_foreseen(self, ids: Sequence[int]) -> list[Foreseen]:
        """Read token ids, and say of each how likely it was to come next.

        Each chunk of them is run twice or three times: to see what is likely, and to be read.

        Raises:
            ValueError: nothing was read yet; otherwise as `read`.
        """
        self._check(ids)
        with self._reads:
            self._end_text()
            if not self._open:
                raise ValueError("nothing was read: there is nothing that ids could follow")
            return self._foreseen(ids)

    def fork(self, *, without: Collection[str] = ()) -> Self:
        """A session that goes its own way from here; nothing is copied but the open chunk's ids.

        Args:
            without: parts of the memory that the fork does not have, "global" or "temporary": to
                see which of them something is remembered by. The open chunk stays.

        Raises:
            ValueError: another part.
        """
        with self._state:
            fork = object.__new__(type(self))
            fork.__dict__.update(self.__dict__)
            fork._cache = self._cache.without(without)
            fork._stream = copy.copy(self._stream)
            fork._open = list(self._open)
            fork._text_place = self._text_place.fork()
        fork._new_locks()
        return fork

    def __copy__(self) -> Self:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session is kept by save() and copied by fork()")

    # --- writing token by token -------------------------------------------------------------

    def render_turn(
        self,
        message: str | Sequence[Message],
        options: ChatOptions = PLAIN,
    ) -> Turn:
        """A message in the chat template, as it would be read next, and what ends its answer.

        Raises:
            ValueError: as `ask`.
        """
        return self._turn(message, options)

    @torch.no_grad()
    def begin_answer(self) -> tuple[CometCache, Tensor]:
        """Run the open chunk: what to go on from, and the logits [V] of the token that is next.

        The text ends here, as in `finish`; nothing else changes. `session.writer.Writer` goes on
        from there.

        Raises:
            ValueError: nothing was read.
        """
        self._end_text()
        if not self._open:
            raise ValueError("nothing was read and the prompt is empty: there is nothing to go on")
        ids = tuple(self._open)
        known = self._run if self._num_ready(ids) else None
        self._run = run = self._ran(self._cache, ids, known)
        assert run.logits is not None
        return run.cache, run.logits

    def ending_turn(
        self, answer: Sequence[int], closing: Sequence[int], stops: Collection[int]
    ) -> Iterator[SessionStats]:
        """Read the answer to a chat turn and what ends it, giving the stats after every chunk.

        Args:
            answer: token ids, as they were written.
            closing: what the chat template writes behind an answer (`Turn.closing_ids`).
            stops: ids that end generation; a control token of them stands there once, or not at
                all where the template writes another.
        """
        yield from self.reading(self.ended_turn(answer, closing, stops))
        self._turns += 1

    def ended_turn(
        self, answer: Sequence[int], closing: Sequence[int], stops: Collection[int]
    ) -> list[int]:
        """The ids that `ending_turn` reads."""
        return _ended(answer, closing, set(stops) & set(self._plain.control.values()))

    # --- keeping ----------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        *,
        notes: Mapping[str, Any] | None = None,
        made_by: Mapping[str, str] | None = None,
    ) -> None:
        """Write the session to a file of the same size whatever was read.

        The file appears whole or not at all; an older one of that name survives any crash.

        Args:
            path: where to.
            notes: JSON values that the file holds beside it; `session.file.read_notes` has them.
            made_by: `session.identity.identity` of the model, for those who save often: it looks at
                all weights.

        Raises:
            OSError: the file cannot be written.
        """
        with self._state:
            stream = self._stream.state() if self._stream is not None else self._kept_stream
            kept = session_file.SessionState(
                cache=self._cache,
                open=tuple(self._open),
                turns=self._turns,
                characters=self.characters,
                digest=self._text_place.digest,
                stream=stream,
            )
        session_file.save(path, kept, self.model, notes=notes, made_by=made_by)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: CometForCausalLM,
        tokenizer: Any = None,
        *,
        made_by: Mapping[str, str] | None = None,
    ) -> Self:
        """Go on from a saved session.

        Args:
            path: of `save`.
            model: that made it.
            tokenizer: its tokenizer.
            made_by: as `save`.

        Raises:
            ValueError: the file is no session, damaged, or of another model; the message says
                which.
            OSError: the file cannot be read.
        """
        kept = session_file.load(path, model, made_by=made_by)
        session = cls(model, tokenizer)
        session._cache, session._open = kept.cache, list(kept.open)
        session._turns, session._text_place = kept.turns, Place(kept.characters, kept.digest)
        session._kept_stream = kept.stream
        if session._stream is not None:
            if kept.stream is not None:
                session._stream.restore(kept.stream)
            elif session.stats().tokens:
                session._stream.skip_prefix()
        elif kept.stream is not None and kept.stream["text"]:
            raise ValueError(f"{path} was read with a tokenizer; give it to load() as well")
        return session

    # --- inside -----------------------------------------------------------------------------

    def _new_locks(self) -> None:
        self._reads = threading.RLock()  # whose text is being read
        self._state = threading.RLock()  # held while what was read is changed or copied
        self._is_answering = False

    def _only_in_memory(self, cache: CometCache) -> int:
        """Tokens that were read and are not in the open chunk."""
        return cache.tokens_read - cache.chunks_folded * self.model.config.comet_config.overlap

    def _stepwise(self, work: Iterator[SessionStats]) -> Iterator[SessionStats]:
        """Pass stats on; between two of them others may look at the session."""
        while True:
            with self._state:
                if self._is_answering:
                    raise RuntimeError(
                        "chat() is writing an answer in this session: end or close it first, or "
                        "fork the session"
                    )
                stats = next(work, None)
            if stats is None:
                return
            yield stats

    def _taking(self, piece: str | list[int], special: bool) -> Iterator[SessionStats]:
        """Take one piece of a source."""
        if isinstance(piece, str):
            encoded = check_text("what is read", piece)  # before anything changes
            ids = self._text_stream().feed(piece, special)
            self._text_place.add(len(piece), encoded)
            yield from self._take(ids)
        elif piece:
            self._check(piece)
            yield from self._finishing()
            if self._stream is not None:
                self._stream.skip_prefix()
            yield from self._take(piece)

    def _finishing(self) -> Iterator[SessionStats]:
        yield from self._take(self._stream.finish() if self._stream is not None else [])

    def _making_room(self, question: int) -> Iterator[SessionStats]:
        """End the open chunk where a question of so many tokens would be cut; see above."""
        self._end_text()  # ranks that read together hold more than the open chunk until then
        sizes = self.model.config.comet_config
        room = sizes.chunk_size - question - sizes.chunk_size // _ANSWER_SHARE
        if question and sizes.overlap <= room < len(self._open):
            stays = max(sizes.overlap, min(room, sizes.chunk_size // 2))
            if len(self._open) == sizes.chunk_size:  # which ends where text goes on, too
                stays = sizes.overlap
            yield self._fold(len(self._open) - stays + sizes.overlap)

    def _settling(self) -> Iterator[SessionStats]:
        yield from self._take(self._stream.settle() if self._stream is not None else [])

    def _end_text(self) -> None:
        """The text ends here; no more than one chunk is open then."""
        for _ in self.finish():
            pass

    def _foreseen(self, ids: Sequence[int]) -> list[Foreseen]:
        """See `read_foreseen`; something was read, and no text is waiting."""
        size = self.model.config.comet_config.chunk_size
        found: list[Foreseen] = []
        while len(found) < len(ids):
            # What a chunk has room for; behind a full one, the token that closes it.
            piece = list(ids[len(found) :][: max(1, size - len(self._open))])
            out = self.model.model(
                self._tensor([*self._open, *piece[:-1]]),
                past_key_values=self._cache,
                use_cache=True,
                hidden_to_keep=len(piece),
            )
            hidden = out.last_hidden_state[:, -len(piece) :].split(_LOGITS_AT_A_TIME, dim=1)
            for begin, part in zip(range(0, len(piece), _LOGITS_AT_A_TIME), hidden, strict=True):
                found += foreseen(self.model.logits(part)[0], piece[begin:][: part.shape[1]])
            self.read(piece)
        return found

    def _take(self, ids: Sequence[int]) -> Iterator[SessionStats]:
        """Add tokens; fold every chunk that more text has followed."""
        size = self.model.config.comet_config.chunk_size
        self._open += ids
        while len(self._open) > size:
            yield self._fold(size)

    @torch.no_grad()
    def _fold(self, size: int) -> SessionStats:
        """Run the first `size` open tokens, more than the overlap, as a chunk."""
        out = self.model.model(
            self._tensor(self._open[:size]),
            past_key_values=self._cache,
            use_cache=True,
            chunk_lengths=[[size]],
            close_last=True,
            hidden_to_keep=1,
        )
        self._cache, self._run = out.past_key_values.restarted(), None
        del self._open[: size - self.model.config.comet_config.overlap], out
        return self._folded()

    def _folded(self) -> SessionStats:
        """What is in the memory; what was read again counts once."""
        cache, overlap = self._cache, self.model.config.comet_config.overlap
        again = overlap * (cache.chunks_folded - 1)
        return SessionStats(cache.tokens_read - again, cache.chunks_folded, cache.nbytes)

    def _num_ready(self, ids: Sequence[int]) -> int:
        """How many of the open chunk's ids were run."""
        return 0 if self._run is None else self._run.num_ready(self._cache, ids)

    def _ran(self, memory: CometCache, ids: tuple[int, ...], known: OpenChunk | None) -> OpenChunk:
        """All of an open chunk run, of which a part may be known."""
        begin = 0 if known is None else len(known.ids)
        if known is not None and begin == len(ids):
            return known
        out = self.model(
            self._tensor(ids[begin:]),
            past_key_values=memory if known is None else known.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return OpenChunk(memory, ids, out.past_key_values.restarted(), out.logits[0, -1])

    def _asked(
        self,
        prompt: str | Sequence[Message],
        template: bool | None = None,
        options: ChatOptions = PLAIN,
    ) -> Self:
        """A fork that has read a prompt; see `ask`."""
        if template is None:
            template = bool(getattr(self.tokenizer, "chat_template", None))
        fork = self.fork()
        if template:
            fork.ask_in_one_chunk(fork._turn(prompt, options, answered=False).opening_ids)
            return fork
        if options.tools or not isinstance(prompt, str):
            what = "tools" if options.tools else f"a {type(prompt).__name__} as prompt"
            raise ValueError(f"without a chat template the prompt must be text alone, got {what}")
        fork.read(prompt, special=options.special)
        return fork

    def _chatting(
        self,
        message: str | Sequence[Message],
        options: ChatOptions,
        generation: dict[str, Any],
        stream: bool,
    ) -> Iterator[str]:
        answer: list[int] = []
        with self._reads, self._state:
            if self._is_answering:
                raise RuntimeError("chat() is writing another answer: end or close it first")
            turn = self._turn(message, options)
            work = self.fork()
            self._is_answering = True
        try:
            work.ask_in_one_chunk(turn.opening_ids)
            yield from work._written(answer, generation, stream)
        finally:
            try:
                if answer:
                    stops = stop_ids(generation, self.model)
                    for _ in work.ending_turn(answer, turn.closing_ids, stops):
                        pass
                    with self._state:
                        self._become(work)
            finally:
                self._is_answering = False

    def _become(self, other: Session) -> None:
        """Take over what another session has read."""
        own = ("_reads", "_state", "_is_answering")
        self.__dict__.update({k: v for k, v in other.__dict__.items() if k not in own})

    def _written(self, ids: list[int], generation: dict[str, Any], stream: bool) -> Iterator[str]:
        """Go on from what was read: the text piece by piece, and its token ids into `ids`."""
        self._end_text()
        if not self._open:
            raise ValueError("nothing was read and the prompt is empty: there is nothing to go on")
        options = generation_options(generation, self.model, self.tokenizer)
        stopping = list(options.pop("stopping_criteria", None) or ())
        prompt = self._tensor(self._open).to(self.model.device)
        # At least the last token is run, which gives the logits of the first that is written.
        ready = min(self._num_ready(self._open), len(self._open) - 1)
        past = self._cache
        if self._run is not None and len(self._run.ids) == ready:
            past = self._run.cache.ahead_by(ready)
        model: Any = self.model  # transformers' own annotations want its models only

        def run(stopping_criteria: Sequence[Any] = (), **more: Any) -> Tensor:
            criteria = StoppingCriteriaList([*stopping, *stopping_criteria])
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=past,
                stopping_criteria=criteria,
                **options | {"return_dict_in_generate": True},
                **more,
            )
            sequences: Tensor = out.sequences
            cache = getattr(out, CACHE)
            if (
                isinstance(cache, CometCache) and len(cache.rows) == 1
            ):  # of beams, none in particular
                self.take_over((cache, 0), sequences[0, prompt.shape[1] :].tolist())
            return sequences

        if stream:
            yield from streamed(run, self.tokenizer, ids)
        else:
            ids.extend(run()[0, prompt.shape[1] :].tolist())
            yield "" if self.tokenizer is None else self._decode(ids)

    def _turn(
        self,
        prompt: str | Sequence[Message],
        options: ChatOptions = PLAIN,
        answered: bool = True,
    ) -> Turn:
        first, began = self._turns == 0, self.stats().tokens > 0
        return render_turn(self.tokenizer, prompt, first, began, options, answered)

    def _text_stream(self) -> TokenStream:
        if self._stream is None:
            raise ValueError("this session has no tokenizer; give it one, or read token ids")
        return self._stream

    @property
    def _plain(self) -> PlainText:
        return PlainText.of(self.tokenizer)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _check(self, ids: Sequence[int]) -> None:
        vocabulary = self.model.config.vocab_size
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"token ids must lie in 0 … {vocabulary - 1}, got {token}")

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)])


def _with_system(prompt: Any, system: str | None) -> Any:
    """A prompt behind a system message."""
    if system is None:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *prompt]


def _ended(answer: Sequence[int], closing: Sequence[int], stops: Collection[int]) -> list[int]:
    """An answer's ids as they stand in a conversation: with the template's closing, once.

    Args:
        answer: ids as they were written.
        closing: ids of what the chat template writes behind an answer.
        stops: control tokens that end generation. One of them that the template does not write
            there is left out.
    """
    for shared in range(min(len(answer), len(closing)), 0, -1):
        if list(answer[-shared:]) == list(closing[:shared]):
            return [*answer, *closing[shared:]]
    said = answer[:-1] if closing and answer and answer[-1] in stops else answer
    return [*said, *closing]
