"""What a request goes on from: which of the names that it gives, and what Open WebUI's chats are.

In this order: `previous_response_id`, `conversation`, the field `session` or the header
`X-Session-Id`. A name that is not kept is a 404, and two that disagree are a 400. Open WebUI sends
whole chats, some of whose messages are not what it sent before (it puts what it looked up into the
last message only), so token ids do not find them. With the chat's id in a header
(`ENABLE_FORWARD_USER_INFO_HEADERS`) a chat is known again by what stood before its last answer:
its id, its system messages, what was said up to the question before that answer, and the answer.
That question has to stand in what was sent for it, which may hold more. A chat of which this is not
so is read like any other whole chat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from cometlm.serve import thread
from cometlm.serve.errors import ApiError
from cometlm.serve.folder import TURN, Kept
from cometlm.serve.http import SESSION_HEADER
from cometlm.serve.kept import NotKeptError
from cometlm.serve.prompt import Start
from cometlm.serve.service import Service
from cometlm.serve.thread import Thread
from cometlm.serve.tools import digest_of
from cometlm.session.chat_template import content_as_text
from cometlm.session.session import Session

WEBUI_HEADER = "x-openwebui-chat-id"
_BRANCHES = 8  # questions with the same answer that are told apart at one place of a chat
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What a request goes on from.

    Attributes:
        start: the session; None: nothing yet.
        thread: the conversation that it is of; None: of none.
    """

    start: Start | None = None
    thread: Thread | None = None


async def find_start(
    service: Service,
    owner: str,
    request: Request,
    *,
    previous_response_id: str | None = None,
    conversation: str | None = None,
    session: str | None = None,
) -> Found:
    """What a request goes on from, of the names that it gives.

    Raises:
        ApiError: a name is not kept, or two of them disagree.
    """
    given = {
        "previous_response_id": previous_response_id,
        "conversation": conversation,
        "session": session,
        SESSION_HEADER: request.headers.get(SESSION_HEADER) or None,
    }
    named = {param: name for param, name in given.items() if name is not None}
    others = {param: name for param, name in named.items() if param != "conversation"}
    found: Thread | None = None
    if conversation is not None:
        found, at = await thread.find(service, conversation, owner, "conversation")
        _check_agreement(named, {conversation, found.last})
        has_read = at.stats().tokens > 0
        name = found.last or conversation  # what it went on from, for those who follow parents
        start = Start(name, at, found.trail, found.tools) if has_read else None
        return Found(start, found)
    _check_agreement(others, set(list(others.values())[:1]))
    for param, name in others.items():
        kept, at = await service.known(name, owner, param)
        if kept.kind == thread.KIND:
            return Found(Start(name, at, Thread.of(kept).trail, Thread.of(kept).tools))
        return Found(Start.of(kept, at))
    return Found()


def _check_agreement(named: Mapping[str, str], allowed: set[str | None]) -> None:
    for param, name in named.items():
        if name not in allowed:
            raise ApiError(
                f"{' and '.join(named)} name different things; give one of them", param=param
            )


async def find_webui_chat(
    service: Service,
    owner: str,
    request: Request,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Start, Sequence[Message]] | None:
    """What a chat of Open WebUI goes on from, and what is new; None: that is not known.

    Args:
        service, owner, request: as for `find_start`.
        messages: all that the client sent.
        tools: that may be called; a chat whose first message had no such ones is read anew.
    """
    chat = request.headers.get(WEBUI_HEADER)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not chat or not answers or answers[-1] == len(messages) - 1:
        return None
    turn = _Turn.of(chat, messages[: answers[-1] + 1])
    try:
        session = _chosen(await _noted(service, owner, turn.id(service, owner)), turn.question)
        if session is None:
            return None
        start = Start.of(*await service.known(session, owner, WEBUI_HEADER))
    except ApiError as error:
        if isinstance(error.__cause__, NotKeptError):
            return None
        raise
    if tools and digest_of(tools) != start.tools:
        return None
    return start, messages[answers[-1] + 1 :]


async def note_webui_chat(
    service: Service,
    owner: str,
    request: Request,
    messages: Sequence[Message],
    answer: str,
    session: str,
) -> None:
    """Note which session an answer to a chat of Open WebUI has left."""
    chat = request.headers.get(WEBUI_HEADER)
    if not chat or not answer.strip():
        return
    turn = _Turn.of(chat, [*messages, {"role": "assistant", "content": answer}])
    name = turn.id(service, owner)
    try:
        others = await _noted(service, owner, name)
    except ApiError as error:
        if not isinstance(error.__cause__, NotKeptError):
            raise
        others = []
    branches = [one for one in others if one["question"] != turn.question]
    branches = [*branches, {"question": turn.question, "session": session}][-_BRANCHES:]
    kept = Kept(name, owner, TURN, int(time.time()), document={"branches": branches})
    await service.put(kept, Session(service.model, service.tokenizer))


async def _noted(service: Service, owner: str, name: str) -> list[dict[str, str]]:
    """Questions that were answered alike at one place of a chat, each with its session."""
    kept, _ = await service.known(name, owner, WEBUI_HEADER)
    return list((kept.document or {}).get("branches", ()))


def _chosen(branches: Sequence[Mapping[str, str]], question: str) -> str | None:
    """The session of the newest branch with this question, as it is or in more that was sent."""
    same = [one for one in branches if one["question"] == question]
    found = same or [one for one in branches if question and question in one["question"]]
    return found[-1]["session"] if found else None


@dataclass(frozen=True)
class _Turn:
    """An answer in a chat of Open WebUI.

    Attributes:
        place: what tells it from others, but for its question.
        question: what was answered.
    """

    place: str
    question: str

    @classmethod
    def of(cls, chat: str, messages: Sequence[Message]) -> _Turn:
        """The turn that messages end with.

        Args:
            chat: its id.
            messages: up to and with the answer.
        """
        asked = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=0)
        front = [_said(one) for one in messages if one["role"] in ("system", "developer")]
        before = [_said(one) for one in messages[:asked]]
        place = json.dumps([chat, front, before, [_said(one) for one in messages[asked + 1 :]]])
        return cls(place, _said(messages[asked])[1])

    def id(self, service: Service, owner: str) -> str:
        """That it is kept under."""
        return service.store.ids.of("turn-", owner, self.place)


def _said(message: Message) -> tuple[str, str]:
    """Who said what, but for spaces around it."""
    return message["role"], content_as_text("messages", message.get("content") or "").strip()
