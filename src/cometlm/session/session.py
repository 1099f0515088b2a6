"""A session: one text read by one model, however it comes in; it can be asked, forked and saved.

The session owns its state: the memory at the last chunk border, and the open chunk as token ids,
which begins with the overlap that was in the chunk before.
Every chunk goes through the layers once, when it is full and more has followed, so however the text
was cut makes no difference, to the last bit. The price is that asking runs the open chunk again.

Footguns:
    - The end of what was read as text waits for what follows it, since its tokens may still
      change. Asking looks at all of it.
    - Token ids and chat turns end the text before them: its last tokens are then settled. A chat
      turn may also end the open chunk before its time, so that its question stays whole.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from cometlm.core.cache import CometCache
from cometlm.core.causal_lm import CometForCausalLM
from cometlm.core.foreseen import Foreseen, foreseen
from cometlm.session import file as session_file
from cometlm.session.chat_template import Turn, render_turn
from cometlm.session.text_stream import streamed
from cometlm.session.token_stream import TokenStream, cut_blocks, read_blocks

Ids = Sequence[int] | Tensor
Source = str | Ids | IO[str] | Iterable[str | Ids]

_IDS_AT_A_TIME = 65536  # taken from a tensor
_LOGITS_AT_A_TIME = 256  # positions: a vocabulary is wide
_NEW_TOKENS = 256  # written where the caller sets no length
_ANSWER_SHARE = 8  # a question has room for an eighth of a chunk behind it


@dataclass(frozen=True)
class SessionStats:
    """What a session has done and holds.

    Attributes:
        tokens: tokens read.
        chunks: chunks folded into memory.
        memory_bytes: bytes of memory held for them.
    """

    tokens: int
    chunks: int
    memory_bytes: int


class Session:
    """Reads text of any length with one model, in constant memory.

    Args:
        model: the model; sessions share it and never change it.
        tokenizer: its tokenizer; without one, only token ids can be read.

    Attributes:
        characters: characters of text read, also before saving and loading; so what was interrupted
            knows where to go on in its source. Set it to 0 where a new source begins.
    """

    def __init__(self, model: CometForCausalLM, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._stream = TokenStream(tokenizer) if tokenizer is not None else None
        self._cache: CometCache = model.model.empty_cache()
        self._open: list[int] = []
        self._turns = 0
        self._kept_stream: dict[str, Any] | None = None
        self.characters = 0

    # --- reading ----------------------------------------------------------------------------

    def read(self, source: Source) -> None:
        """Read text or token ids: one of either, an open text file, or an iterable of either.

        Raises:
            ValueError: a file that is not text, ids outside the vocabulary, text without a
                tokenizer.
            FloatingPointError: a memory stopped being finite; what was read before is kept.
        """
        for _ in self.reading(source):
            pass

    def reading(self, source: Source) -> Iterator[SessionStats]:
        """Like `read`, giving the stats after every chunk."""
        for piece in _pieces(source):
            if isinstance(piece, str):
                piece.encode()  # refuse what is no text before anything changes
                ids = self._text_stream().feed(piece)
                self.characters += len(piece)
                yield from self._take(ids)
            elif piece:
                self._check(piece)
                yield from self.finish()
                if self._stream is not None:
                    self._stream.skip_prefix()
                yield from self._take(piece)

    def ask_in_one_chunk(self, question: Sequence[int]) -> None:
        """Read a question whose answer comes next: no chunk border cuts it.

        Where the open chunk has no room for it and for the beginning of an answer, an eighth of a
        chunk, that chunk ends here. A question that fits into no chunk is read as any text.

        Args:
            question: token ids.

        Raises:
            ValueError, FloatingPointError: as `read`.
        """
        self._check(question)
        self._end_text()
        sizes = self.model.config.comet_config
        wanted = len(question) + sizes.chunk_size // _ANSWER_SHARE
        fits = sizes.overlap + wanted <= sizes.chunk_size
        full = len(self._open) + wanted > sizes.chunk_size
        if question and self._open and fits and full:
            self._fold(len(self._open))
        self.read(question)

    def finish(self) -> Iterator[SessionStats]:
        """Say that the text ends here: its last tokens need not wait for more."""
        yield from self._take(self._stream.finish() if self._stream is not None else [])

    def settle(self) -> Iterator[SessionStats]:
        """Run every chunk whose tokens are known, so that asking and loading need not.

        `read` collects some pages of text before it tokenises; this does not wait for them, and
        changes nothing else.
        """
        yield from self._take(self._stream.settle() if self._stream is not None else [])

    def stats(self) -> SessionStats:
        """Tokens read, chunks folded and bytes held so far.

        The end of the text, whose tokens may still change, counts with the tokens that it has now.
        """
        cache = self._cache
        waiting = copy.copy(self._stream).finish() if self._stream is not None else ()
        again = cache.chunks_folded * self.model.config.comet_config.overlap
        tokens = cache.tokens_read + len(self._open) - again + len(waiting)
        return SessionStats(tokens, cache.chunks_folded, cache.nbytes)

    # --- writing ----------------------------------------------------------------------------

    def ask(
        self, prompt: str, *, stream: bool = False, template: bool | None = None, **generation: Any
    ) -> str | Iterator[str]:
        """Answer a question about what was read; the session stays as it was.

        Args:
            prompt: the question.
            stream: give the answer piece by piece while it is written.
            template: put the prompt into the tokenizer's chat template; no chunk border cuts it
                then, see `ask_in_one_chunk`. Default: if it has one.
            generation: options of transformers' `generate`; 256 new tokens unless they say.

        Returns:
            The answer, or an iterator over its pieces.

        Raises:
            ValueError: nothing was read and the prompt is empty, an option that `generate` does
                not know or that makes more than one answer.
        """
        if template is None:
            template = bool(getattr(self.tokenizer, "chat_template", None))
        fork = self.fork()
        if template:
            fork.ask_in_one_chunk(fork._ids_of(fork._turn(prompt).opening))
        else:
            fork.read(prompt)
        pieces = fork._written([], generation, stream)
        return pieces if stream else "".join(pieces)

    def chat(self, message: str, *, stream: bool = False, **generation: Any) -> str | Iterator[str]:
        """Like `ask`, but the message and its answer stay in the session.

        If a streamed answer is broken off, by its reader or by an error, what was written so far
        stays; if nothing was, the session is as it was before the message.

        Raises:
            ValueError: as `ask`; also a tokenizer without a chat template.
        """
        pieces = self._chatting(message, generation, stream)
        return pieces if stream else "".join(pieces)

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
        self._end_text()
        if not self._open:
            raise ValueError("nothing was read: there is nothing that ids could follow")
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

    def fork(self, *, without: Collection[str] = ()) -> Session:
        """A session that goes its own way from here; nothing is copied but the open chunk's ids.

        Args:
            without: parts of the memory that the fork does not have, "global" or "temporary": to
                see which of them something is remembered by. The open chunk stays.

        Raises:
            ValueError: another part.
        """
        fork = copy.copy(self)
        fork._cache = self._cache.without(without)
        fork._stream = copy.copy(self._stream)
        fork._open = list(self._open)
        return fork

    # --- keeping ----------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to a file of the same size whatever was read.

        The file appears whole or not at all; an older one of that name survives any crash.

        Raises:
            OSError: the file cannot be written.
        """
        stream = self._stream.state() if self._stream is not None else self._kept_stream
        kept = session_file.SessionState(
            self._cache, tuple(self._open), self._turns, self.characters, stream
        )
        session_file.save(path, kept, self.model)

    @classmethod
    def load(cls, path: str | Path, model: CometForCausalLM, tokenizer: Any = None) -> Session:
        """Go on from a saved session.

        Raises:
            ValueError: the file is no session, damaged, or of another model; the message says
                which.
            OSError: the file cannot be read.
        """
        kept = session_file.load(path, model)
        session = cls(model, tokenizer)
        session._cache, session._open = kept.cache, list(kept.open)
        session._turns, session.characters = kept.turns, kept.characters
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

    def _end_text(self) -> None:
        """The text ends here; no more than one chunk is open then."""
        for _ in self.finish():
            pass

    def _take(self, ids: Sequence[int]) -> Iterator[SessionStats]:
        """Add tokens; run every chunk that more text has followed."""
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
        self._cache = out.past_key_values.restarted()
        del self._open[: size - self.model.config.comet_config.overlap], out
        return self._folded()

    def _folded(self) -> SessionStats:
        """What is in the memory; what was read again counts once."""
        cache, overlap = self._cache, self.model.config.comet_config.overlap
        again = overlap * (cache.chunks_folded - 1)
        return SessionStats(cache.tokens_read - again, cache.chunks_folded, cache.nbytes)

    def _chatting(self, message: str, generation: dict[str, Any], stream: bool) -> Iterator[str]:
        turn = self._turn(message)
        work = self.fork()
        work.ask_in_one_chunk(work._ids_of(turn.opening))
        answer: list[int] = []
        try:
            yield from work._written(answer, generation, stream)
        finally:
            if answer:
                closing = work._ids_of(turn.closing)
                repeated = bool(closing) and answer[-1] == closing[0]
                work.read([*answer, *closing[repeated:]])
                work._turns += 1
                self.__dict__.update(work.__dict__)

    def _written(self, ids: list[int], generation: dict[str, Any], stream: bool) -> Iterator[str]:
        """Go on from what was read: the text piece by piece, and its token ids into `ids`."""
        self._end_text()
        if not self._open:
            raise ValueError("nothing was read and the prompt is empty: there is nothing to go on")
        options = _generation_options(generation, self.model, self.tokenizer)
        prompt = self._tensor(self._open).to(self.model.device)
        model: Any = self.model  # transformers' own annotations want its models only

        def run(**more: Any) -> Tensor:
            out: Tensor = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=self._cache,
                **options,
                **more,
            )
            return out

        if stream:
            yield from streamed(run, self.tokenizer, ids)
        else:
            ids.extend(run()[0, prompt.shape[1] :].tolist())
            yield "" if self.tokenizer is None else self._decode(ids)

    def _turn(self, message: str) -> Turn:
        first = self._turns == 0
        return render_turn(self.tokenizer, message, first, began=self.stats().tokens > 0)

    def _text_stream(self) -> TokenStream:
        if self._stream is None:
            raise ValueError("this session has no tokenizer; give it one, or read token ids")
        return self._stream

    def _ids_of(self, text: str) -> list[int]:
        """Ids of text that stands for itself, special tokens written out."""
        text.encode()  # refuse what is no text
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _check(self, ids: Sequence[int]) -> None:
        vocabulary = self.model.config.vocab_size
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"token ids must lie in 0 … {vocabulary - 1}, got {token}")

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids])


def _pieces(source: Source) -> Iterator[str | list[int]]:
    """Text in blocks and token ids in lists, in their order."""
    if isinstance(source, str):
        yield from cut_blocks(source)
    elif isinstance(source, Tensor):
        for block in source.flatten().split(_IDS_AT_A_TIME):
            yield [int(token) for token in block.tolist()]
    elif hasattr(source, "read"):
        yield from read_blocks(cast("IO[str]", source), str(getattr(source, "name", "the file")))
    elif isinstance(source, Sequence) and source and all(isinstance(x, int) for x in source):
        yield [int(cast("int", token)) for token in source]
    else:
        for item in source:
            if isinstance(item, int):
                yield [item]
            else:
                yield from _pieces(item)


def _generation_options(
    given: dict[str, Any], model: CometForCausalLM, tokenizer: Any
) -> dict[str, Any]:
    """Options for `generate`: one answer, of bounded length."""
    for name, only in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        for source in (given.get(name), getattr(given.get("generation_config"), name, None)):
            if source is not None and source != only:
                raise ValueError(f"{name}={source!r}: a session writes one answer, as text")
    options = dict(given)
    bounded = ("max_new_tokens", "max_length", "generation_config")
    if not any(name in options for name in bounded):
        options["max_new_tokens"] = _NEW_TOKENS
    if model.generation_config.pad_token_id is None and "pad_token_id" not in options:
        known = None if tokenizer is None else tokenizer.pad_token_id
        options["pad_token_id"] = known if known is not None else 0
    return options
