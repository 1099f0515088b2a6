"""A conversation of OpenAI's API: a name for the session that it has come to, and what was said.

It is kept as one session under the conversation's id, written anew by each turn, so that it lives
as long and as safely as any other. What was read cannot be taken back; items that wait for the next
answer can. Of what was read the newest texts are kept, for people to look at: the memory, not this
list, is what the model goes on from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cometlm.serve.errors import ApiError, as_api_error
from cometlm.serve.folder import Kept
from cometlm.serve.kept import NotKeptError
from cometlm.serve.objects import ChangedError
from cometlm.serve.prompt import Start
from cometlm.serve.service import Service
from cometlm.serve.trail import Trail
from cometlm.session.session import Session

T = TypeVar("T")

KIND, PREFIX, PARAM = "conversation", "conv_", "conversation_id"
_MOST_BYTES = 4 << 20  # of texts that are kept to be looked at
_answering: set[tuple[str, str]] = set()  # conversations that wait, with their owners
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
            raise _locked("the conversation went on meanwhile; ask again")
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
    def of(cls, kept: Kept, param: str = PARAM) -> Thread:
        """What `kept` gave; `param`: what the client calls its id.

        Raises:
            ApiError: something else, which is no conversation.
        """
        if kept.kind != KIND or kept.document is None:
            said = f"{kept.id} is no conversation but a {kept.kind}; name it as session"
            raise ApiError(
                f"{said} or previous_response_id", status=404, param=param, code="not_found"
            )
        values = {name: value for name, value in kept.document.items() if name != "input"}
        trail = None if values["trail"] is None else Trail.from_json(values["trail"])
        return cls(**{**values, "items": tuple(values["items"]), "trail": trail})


@contextlib.contextmanager
def turn(name: str, owner: str) -> Iterator[None]:
    """While a conversation waits for an answer: no other one begins.

    Only in this process: of two servers' answers, the one that ends second is refused
    (`Thread.after`). It also ends when it is forgotten, as every generator does.

    Args:
        name: of the conversation.
        owner: whose it is.

    Raises:
        ApiError: it waits for another answer.
    """
    at = (name, owner)
    if at in _answering:
        raise _locked("the conversation waits for another answer; ask again when that is there")
    _answering.add(at)
    try:
        yield
    finally:
        _answering.discard(at)


def _locked(message: str) -> ApiError:
    code = "conversation_locked"  # OpenAI's, which sends it with 400; clients try again after 409
    return ApiError(message, status=409, param="conversation", code=code, retry_after=1)


async def create(
    service: Service,
    owner: str,
    items: Items,
    metadata: Mapping[str, str],
    start: Start | None,
) -> Thread:
    """Begin a conversation, behind a session if there is one."""
    name = service.store.ids.new(PREFIX, owner)
    made = Thread(name, int(time.time()), metadata, items)
    session = Session(service.model, service.tokenizer)
    if start is not None:
        session, made = start.session, replace(made, trail=start.trail, tools=start.tools)
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
    return Thread.of(kept, param), session


async def change(
    service: Service,
    name: str,
    owner: str,
    made: Callable[[Thread], Thread],
    session: Session | None = None,
) -> Thread:
    """Change a conversation, one change at a time, also of several servers.

    Args:
        service: where it is kept.
        name: its id.
        owner: whose it is.
        made: the new one of the present one.
        session: that it has come to; None: it stays.

    Raises:
        ApiError: it is gone, or what `made` raises.
    """

    def changed(version: str | None) -> Thread:
        kept, present = service.store.get(name, owner)
        new = made(Thread.of(kept))
        service.store_now(new.kept(owner), session or present, version)
        return new

    return await _alone(service, name, changed)


async def delete(service: Service, name: str, owner: str) -> None:
    """Keep a conversation no longer; nobody who is changing it brings it back.

    Raises:
        ApiError: there is none for this owner.
    """

    def deleted(_: str | None) -> None:
        kept, _session = service.store.get(name, owner)
        Thread.of(kept)
        service.store.delete(name, owner)

    await _alone(service, name, deleted)


async def _alone(service: Service, name: str, work: Callable[[str | None], T]) -> T:
    """What `work` gives while nobody else changes a conversation; it is given the version."""

    def working() -> T:
        with _locks[hash(name) % len(_locks)], service.store.changing(name) as version:
            return work(version)

    try:
        return await asyncio.to_thread(working)
    except ChangedError as error:
        raise _locked("another server changes the conversation; ask again") from error
    except (NotKeptError, OSError) as error:
        raise as_api_error(error, PARAM) from error
