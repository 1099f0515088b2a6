"""What a request goes on from, and what it adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cometlm.serve.answer import Answer
from cometlm.serve.folder import Kept
from cometlm.serve.tools import Calling, answered_message
from cometlm.serve.trail import Trail
from cometlm.session.chat_template import Conversation
from cometlm.session.session import Session


@dataclass(frozen=True)
class Start:
    """A session that a request names to go on from.

    Attributes:
        name: its id.
        session: it.
        trail: of what it has read; None: not known.
        tools: see `Prompt`.
    """

    name: str
    session: Session
    trail: Trail | None
    tools: str | None = None

    @classmethod
    def of(cls, kept: Kept, session: Session) -> Start:
        """The one that is kept."""
        return cls(kept.id, session, kept.trail, (kept.document or {}).get("tools"))


@dataclass(frozen=True)
class Prompt:
    """What a request goes on from, and what it adds.

    Attributes:
        start: the session to go on from.
        parent: its id; None: an empty one.
        history, question, closing: see `Order`.
        base: trail of what `start` has read, if it is known.
        conversation: a whole one that the client sent; None: it sent what is new.
        calling: how calls of tools are found in answers; None: they are not looked for.
        last: see `Order`.
        tools: digest of the tools that the model was told of, by this or before (`digest_of`).
    """

    start: Session
    parent: str | None
    history: Sequence[int]
    question: Sequence[int]
    closing: Sequence[int] | None
    base: Trail | None
    conversation: Conversation | None = None
    calling: Calling | None = None
    last: Sequence[str] = ()
    tools: str | None = None

    @property
    def new(self) -> list[int]:
        """All ids that are read."""
        return [*self.history, *self.question]

    @property
    def tokens(self) -> int:
        """All tokens that the answer is written after."""
        return self.start.stats().tokens + len(self.history) + len(self.question)

    @cached_property  # what is known of an open chunk may be given up later
    def cached(self) -> int:
        """Those of them that need not be run."""
        return self.start.num_ready(len(self.history), len(self.question))

    def trail_after(self, answer: Answer) -> Trail | None:
        """Of the ids that a client begins with who goes on from this answer."""
        if self.conversation is not None:
            try:
                ids = self.conversation.answered(answered_message(answer.text, answer.calls))
            except ValueError:  # a template that refuses such an answer later on
                ids = []
            if ids:
                return Trail.of(ids)
        return None if self.base is None else self.base.extended([*self.new, *answer.kept])
