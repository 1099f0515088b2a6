"""A conversation of OpenAI's API: a name for the session that it has come to, and what was said.

It is kept as one session under the conversation's id, written anew by each turn, so that it lives
as long and as safely as any other. What was read cannot be taken back; items that wait for the next
answer can. Of what was read the newest texts are kept, for people to look at: the memory, not this
list, is what the model goes on from.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cometlm.serve.errors import ApiError, as_api_error
from cometlm.serve.folder import Kept
from cometlm.serve.kept import NotKeptError
from cometlm.serve.service import Service
from cometlm.serve.trail import Trail
from cometlm.session.session import Session

KIND, PREFIX, PARAM = "conversation", "conv_", "conversation_id"
_MOST_BYTES = 4 << 20  # of texts that are kept to be looked at
_locks = [threading.Lock() for _ in range(64)]  # by a hash of the id: one change at a time

Items = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Thread:
    """What is known of a conversation.

    Attributes:
        id: its id.
        created: seconds since 1970.
        metadata: the client's.
        items: what was said, the oldest first; those behind `read` wait for the next answer.
        read: how many of the items are in the memory.
        turns: answers so far.
        last: id of the last response; None: there is none.
        trail: of what the session has read; None: not known.
        tools: see `Prompt`.
    """

    id: str
    created: int
    metadata: Mapping[str, str]
    items: Items = ()
    read: int = 0
    turns: int = 0
    last: str | None = None
    trail: Trail | None = None
    tools: str | None = None

    @property
    def waiting(self) -> Items:
        """Items that were not read yet."""
        return self.items[self.read :]

    def described(self) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.id,
            "object": "conversation",
            "created_at": self.created,
            "metadata": dict(self.metadata),
        }

    def after(
        self,
        said: Items,
        last: str | None,
        trail: Trail | None,
        tools: str | None,
        now: Thread,
    ) -> Thread:
        """The conversation when one more turn was read.

        Args:
            said: the items of the turn, but for those that waited.
            last: id of the response.
            trail: of what the session has read then.
            tools: see `Prompt`.
            now: as it is kept now; items may have been added to it.

        Raises:
            ApiError: it went on otherwise.
        """
        if now.turns != self.turns or now.items[: len(self.items)] != self.items:
            raise ApiError(
                "the conversation went on meanwhile; ask again",
                status=409,
                param="conversation",
                code="conversation_locked",
            )
        known = (*self.items, *said)
        items = (*known, *now.items[len(self.items) :])
        return replace(
            now,
            items=items,
            read=len(known),
            turns=self.turns + 1,
            last=last,
            trail=trail,
            tools=tools,
        )._shortened()

    def _shortened(self) -> Thread:
        """Without the oldest texts that were read, where all together are too long."""
        sizes = [len(json.dumps(item)) for item in self.items]
        first, excess = 0, sum(sizes) - _MOST_BYTES
        while excess > 0 and first < self.read:
            excess -= sizes[first]
            first += 1
        return replace(self, items=self.items[first:], read=self.read - first)

    def kept(self, owner: str) -> Kept:
        """As the store has it.

        The trail is in the document only: unlike others' its session changes, so nobody is led to
        it by the ids that they send.
        """
        document = {**vars(self), "items": list(self.items), "input": list(self.items[:1])}
        document["trail"] = None if self.trail is None else self.trail.to_json()
        return Kept(self.id, owner, KIND, self.created, parent=self.last, document=document)

    @classmethod
    def of(cls, kept: Kept) -> Thread:
        """What `kept` gave.

        Raises:
            ApiError: something else, which is no conversation.
        """
        if kept.kind != KIND or kept.document is None:
            raise as_api_error(NotKeptError(kept.id, was_given=False), PARAM)
        values = {name: value for name, value in kept.document.items() if name != "input"}
        trail = None if values["trail"] is None else Trail.from_json(values["trail"])
        return cls(**{**values, "items": tuple(values["items"]), "trail": trail})


async def create(
    service: Service,
    owner: str,
    items: Items,
    metadata: Mapping[str, str],
    session: Session,
) -> Thread:
    """Begin a conversation, behind a session."""
    name = service.store.ids.new(PREFIX, owner)
    made = Thread(name, int(time.time()), metadata, items)
    await service.put(made.kept(owner), session)
    return made


async def find(
    service: Service, name: str, owner: str, param: str = PARAM
) -> tuple[Thread, Session]:
    """A conversation and the session that it has come to.

    Raises:
        ApiError: there is none for this owner.
    """
    kept, session = await service.known(name, owner, param)
    return Thread.of(kept), session


async def change(
    service: Service,
    name: str,
    owner: str,
    made: Callable[[Thread], Thread],
    session: Session | None = None,
) -> Thread:
    """Change a conversation, one change at a time.

    Args:
        service: where it is kept.
        name: its id.
        owner: whose it is.
        made: the new one of the present one.
        session: that it has come to; None: it stays.

    Raises:
        ApiError: it is gone, or what `made` raises.
    """

    def changing() -> Thread:
        with _locks[hash(name) % len(_locks)]:
            kept, present = service.store.get(name, owner)
            changed = made(Thread.of(kept))
            service.store_now(changed.kept(owner), session or present)
            return changed

    try:
        return await asyncio.to_thread(changing)
    except (NotKeptError, OSError) as error:
        raise as_api_error(error, PARAM) from error
