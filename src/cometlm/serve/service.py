"""What all endpoints share: what a request goes on from, running it, and keeping what comes out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import IO, Any

from cometlm.core.causal_lm import CometForCausalLM
from cometlm.serve.answer import Answer, Mark, Order, Used, answering, reading, settling
from cometlm.serve.engine import Engine, Work
from cometlm.serve.errors import ApiError, as_api_error, unsupported
from cometlm.serve.folder import Kept
from cometlm.serve.kept import NotKeptError, SessionStore
from cometlm.serve.metrics import Metrics, TokenClock
from cometlm.serve.prompt import Prompt, Start
from cometlm.serve.rates import Rates
from cometlm.serve.run import Ended, Run
from cometlm.serve.tools import Calling, digest_of, template_messages
from cometlm.serve.trail import Trail
from cometlm.session.chat_template import ChatOptions, Conversation, Message, UntakenError
from cometlm.session.file import full_bytes
from cometlm.session.identity import identity
from cometlm.session.options import stop_ids
from cometlm.session.plain_text import PlainText, prefix_ids
from cometlm.session.session import Session
from cometlm.session.writer import Sampling


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        most_tokens: that an answer may have.
        usual_tokens: that a chat's answer has at most where the request says nothing.
        most_answers: `n`.
    """

    most_tokens: int = 32768
    usual_tokens: int = 1024
    most_answers: int = 16


@dataclass(frozen=True)
class Writing:
    """How a request wants its answers."""

    sampling: Sampling
    most: int
    stop: tuple[str, ...] = ()
    count: int = 1
    keeps: bool = True  # what was read and said


class Service:
    """One model that is served.

    Args:
        model: nobody else runs it.
        tokenizer: its tokenizer.
        name: what clients call it.
        store: keeps sessions.
        limits: what requests may ask for.
        rates: what keys may ask for in a minute.
        engine: options of the engine.

    Raises:
        ValueError: the store is too small for a single session.
    """

    def __init__(
        self,
        model: CometForCausalLM,
        tokenizer: Any,
        name: str,
        store: SessionStore,
        limits: Limits | None = None,
        rates: Rates | None = None,
        **engine: int,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.store, self.limits = store, limits or Limits()
        self.rates = rates or Rates()
        store.check_holds(full_bytes(model))
        self.engine = Engine(model, **engine)
        self.metrics = Metrics(self.engine, store, name)
        self.began = int(time.time())

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is here.

        Raises:
            ApiError: it is another.
        """
        if name != self.name:
            raise ApiError(
                f"the model {name!r} is not served here; {self.name!r} is",
                status=404,
                param="model",
                code="model_not_found",
            )

    def most_tokens(self, asked: int | None, usual: int, param: str) -> int:
        """Tokens that an answer may have.

        Raises:
            ApiError: more than is allowed.
        """
        if asked is not None and asked > self.limits.most_tokens:
            most = self.limits.most_tokens
            raise ApiError(f"{param} must be at most {most}, got {asked}", param=param)
        return min(usual, self.limits.most_tokens) if asked is None else asked

    # --- what a request goes on from --------------------------------------------------------

    async def chat(
        self,
        messages: Sequence[Message],
        owner: str,
        *,
        start: Start | None = None,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        only_one_call: bool = False,
        param: str = "messages",
    ) -> Prompt:
        """The prompt of a chat.

        Args:
            messages: the new ones behind a session, or a whole conversation.
            owner: who asks.
            start: what to go on from.
            variables: of the chat template.
            tools: that may be called, in the form of OpenAI's chats.
            only_one_call: an answer ends behind its first call.
            param: what the client calls the messages.

        Raises:
            ApiError: messages that the template refuses; calls whose end cannot be seen.
        """
        options = ChatOptions(tools or None, dict(variables or {}))

        def made() -> Prompt:
            given = template_messages(messages)
            if start is None:
                return self._whole(given, owner, options)
            return self._new(given, start, options)

        try:
            calling = Calling(self.tokenizer, tools) if tools else None
        except ValueError as error:
            raise unsupported("tools", str(error)) from error
        last: tuple[str, ...] = ()
        if calling is not None and only_one_call:
            if calling.end is None:
                raise unsupported(
                    "parallel_tool_calls", "nothing shows where a call of this model ends"
                )
            last = (calling.end,)
        try:
            return replace(await asyncio.to_thread(made), calling=calling, last=last)
        except UntakenError as error:
            given = "tools" if error.given == "tools" else f"chat_template_kwargs.{error.given}"
            raise unsupported(given, str(error)) from error
        except ValueError as error:
            raise ApiError(str(error), param=param) from error

    async def text(self, prompt: str | Sequence[int], owner: str, start: Start | None) -> Prompt:
        """The prompt of a text that is gone on with.

        Raises:
            ApiError: ids that the model lacks; nothing to go on from.
        """
        try:
            return await asyncio.to_thread(self._raw, prompt, owner, start)
        except ValueError as error:
            raise ApiError(str(error), param="prompt") from error

    def _new(self, messages: Sequence[Message], start: Start, options: ChatOptions) -> Prompt:
        if any(message.get("role") == "assistant" for message in messages):
            raise ValueError("with a session, send only what was said after its answer")
        tools = digest_of(options.tools)
        if tools is not None and tools == start.tools:  # the model was told of them before
            options = replace(options, tools=None)
        turn = start.session.render_turn(messages, options)
        return Prompt(
            start.session,
            start.name,
            (),
            turn.opening_ids,
            turn.closing_ids,
            start.trail,
            tools=tools or start.tools,
        )

    def _whole(self, messages: Sequence[Message], owner: str, options: ChatOptions) -> Prompt:
        conversation = Conversation(self.tokenizer, messages, options)
        parent, start, base = self._known(conversation.ids, owner)
        read, turn = base.length, max(base.length, conversation.last_turn)
        return Prompt(
            start,
            parent,
            conversation.ids[read:turn],
            conversation.ids[turn:],
            conversation.closing_ids,
            base,
            conversation,
            tools=digest_of(options.tools),
        )

    def _raw(self, prompt: str | Sequence[int], owner: str, start: Start | None) -> Prompt:
        ids = PlainText.of(self.tokenizer).encode(prompt) if isinstance(prompt, str) else prompt
        vocabulary = self.model.config.vocab_size
        if any(not 0 <= token < vocabulary for token in ids):
            raise ValueError(f"token ids must lie in 0 … {vocabulary - 1}")
        if start is not None:
            return Prompt(start.session, start.name, ids, (), None, start.trail, tools=start.tools)
        ids = [*prefix_ids(self.tokenizer), *ids] if isinstance(prompt, str) else list(ids)
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to go on from")
        parent, session, base = self._known(ids, owner)
        return Prompt(session, parent, ids[base.length :], (), None, base)

    def _known(self, ids: Sequence[int], owner: str) -> tuple[str | None, Session, Trail]:
        """A session that has read most of what these ids begin with, its id, and its trail."""
        found = self.store.longest(ids, owner)
        if found is None or found[0].trail is None:
            return None, Session(self.model, self.tokenizer), Trail()
        return found[0].id, found[1], found[0].trail

    async def known(self, name: str, owner: str, param: str) -> tuple[Kept, Session]:
        """A session that is kept, to be forked, and what is known of it.

        Args:
            name: its id.
            owner: who asks.
            param: what the client calls the id.

        Raises:
            ApiError: there is none for this owner.
        """
        try:
            return await asyncio.to_thread(self.store.get, name, owner)
        except (NotKeptError, OSError) as error:
            raise as_api_error(error, param) from error

    async def document(self, name: str, owner: str, kind: str, param: str) -> dict[str, Any]:
        """What is kept beside a session of a kind.

        Args:
            name: its id.
            owner: who asks.
            kind: see `Kept`.
            param: what the client calls the id.

        Raises:
            ApiError: there is none for this owner.
        """
        kept, _ = await self.known(name, owner, param)
        if kept.kind != kind or kept.document is None:
            raise as_api_error(NotKeptError(name, was_given=False), param)
        return kept.document

    # --- running and keeping ----------------------------------------------------------------

    def run(self, prompt: Prompt, writing: Writing, owner: str) -> Run:
        """Begin to answer.

        Raises:
            ApiError: there is no place.
        """
        order = Order(
            prompt.start,
            prompt.history,
            prompt.question,
            prompt.closing,
            writing.sampling,
            writing.most,
            stops=stop_ids({}, self.model),
            stop=writing.stop,
            count=writing.count,
            shown=self._shown(prompt, writing),
            last=prompt.last,
        )
        loop = asyncio.get_running_loop()

        def mark(found: Mark) -> None:
            loop.run_in_executor(None, self._mark, prompt, owner, found)

        def work(emit: Callable[[Any], None]) -> Work:
            def say(event: Any) -> None:
                if not isinstance(event, Mark):
                    emit(event)
                elif writing.keeps and prompt.base is not None:
                    loop.call_soon_threadsafe(mark, event)

            return answering(order, say)

        run = self._start(work, owner, prompt)
        self.rates.charge(owner, prompt.tokens - prompt.cached)
        self.metrics.prompt_tokens.inc(prompt.tokens)
        self.metrics.cached_tokens.inc(prompt.cached)
        return run

    def _shown(self, prompt: Prompt, writing: Writing) -> frozenset[int]:
        """Special tokens that stay in an answer's text: of calls, and of what ends answers."""
        plain = PlainText.of(self.tokenizer)
        awaited = "\n".join(writing.stop)
        ends = {
            plain.control[text] for text in plain.special & plain.control.keys() if text in awaited
        }
        return frozenset(ends | (set() if prompt.calling is None else prompt.calling.shown))

    def _mark(self, prompt: Prompt, owner: str, mark: Mark) -> None:
        """Hold a place in a prompt in memory, for others that begin so."""
        assert prompt.base is not None
        trail = prompt.base.extended(prompt.new[: mark.tokens])
        name = self.store.ids.new("mark-", owner)
        expires = self.store.expiry()
        kept = Kept(name, owner, "mark", int(time.time()), expires, prompt.parent, trail)
        self.store.hold(kept, mark.session)

    def read(self, start: Session, document: IO[bytes], name: str, owner: str) -> Run:
        """Begin to read a document, which errors call `name`.

        Raises:
            ApiError: there is no place.
        """
        return self._start(lambda emit: reading(start, document, name, emit), owner)

    def settle(self, session: Session, owner: str) -> Run:
        """Begin to run what a session has not run yet of what it read.

        Raises:
            ApiError: there is no place.
        """
        return self._start(lambda emit: settling(session, emit), owner)

    @cached_property
    def made_by(self) -> dict[str, str]:
        """The model's identity, of which session files tell whether they are of this model."""
        return identity(self.model)

    def _start(
        self,
        work: Callable[[Callable[[Any], None]], Work],
        owner: str,
        prompt: Prompt | None = None,
    ) -> Run:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        clock = TokenClock(self.metrics.inter_token)

        def emit(event: Any) -> None:
            if isinstance(event, Used):
                self.rates.charge(owner, event.tokens)
                if prompt is not None:  # of what is read for it nothing is told
                    clock.tick(event.tokens)
                return
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so have its clients
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            job = self.engine.submit(work(emit), owner, lambda error: emit(Ended(error)))
        except RuntimeError as error:
            refused = as_api_error(error)
            self.metrics.failed(refused)
            raise refused from error
        return Run(job, events, self.metrics, prompt)

    async def keep(self, kept: Kept, prompt: Prompt, answer: Answer) -> None:
        """Keep the session that an answer left, under an id; when this returns, it is whole.

        Args:
            kept: without parent, trail and tools, which are found here.
            prompt: what was answered.
            answer: to it.

        Raises:
            ApiError: the store cannot take it.
        """
        trail = await asyncio.to_thread(prompt.trail_after, answer)
        document = kept.document
        if prompt.tools is not None:
            document = {**(document or {}), "tools": prompt.tools}
        lasting = replace(kept, parent=prompt.parent, trail=trail, document=document)
        await self.put(lasting, answer.session)

    async def put(self, kept: Kept, session: Session) -> None:
        """Keep a session under an id, until it expires; when this returns, it is whole.

        Raises:
            ApiError: the store cannot take it.
        """
        try:
            await asyncio.to_thread(self.store_now, kept, session)
        except OSError as error:
            raise as_api_error(error) from error

    def store_now(self, kept: Kept, session: Session, replacing: str | None = None) -> None:
        """What `put` does, in this thread; `replacing`: see `SessionStore.put`.

        Raises:
            OSError: the store cannot take it.
        """
        tokens = session.stats().tokens
        lasting = replace(kept, expires=self.store.expiry(), tokens=tokens)
        self.store.put(lasting, session, replacing)

    def stop(self, grace: float = 0.0) -> None:
        """Take no more requests, and end."""
        self.engine.stop(grace)
