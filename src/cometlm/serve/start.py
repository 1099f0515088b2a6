"""What a request goes on from: which of the names that it gives, and what Open WebUI's chats are.

In this order: `previous_response_id`, `conversation`, the field `session` or the header
`X-Session-Id`. A name that is not kept is a 404, and two that disagree are a 400. Open WebUI sends
whole chats, some of whose messages are not what it sent before (it puts what it looked up into the
last message only), so token ids do not find them. With the chat's id in a header
(`ENABLE_FORWARD_USER_INFO_HEADERS`) a chat is known again by what stood before its last answer:
its id, its system messages, how many messages there were, and the answer.
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
from cometlm.session.session import Session

WEBUI_HEADER = "x-openwebui-chat-id"


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
    service: Service, owner: str, request: Request, messages: Sequence[Mapping[str, Any]]
) -> tuple[Start, Sequence[Mapping[str, Any]]] | None:
    """What a chat of Open WebUI goes on from, and what is new; None: that is not known."""
    chat = request.headers.get(WEBUI_HEADER)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not chat or not answers:
        return None
    name = _turn_id(service, owner, chat, messages[: answers[-1] + 1])
    try:
        turn, _ = await service.known(name, owner, WEBUI_HEADER)
        assert turn.document is not None
        kept, at = await service.known(turn.document["session"], owner, WEBUI_HEADER)
    except ApiError as error:
        if isinstance(error.__cause__, NotKeptError):
            return None
        raise
    return Start.of(kept, at), messages[answers[-1] + 1 :]


async def note_webui_chat(
    service: Service,
    owner: str,
    request: Request,
    messages: Sequence[Mapping[str, Any]],
    answer: str,
    session: str,
) -> None:
    """Note which session an answer to a chat of Open WebUI has left."""
    chat = request.headers.get(WEBUI_HEADER)
    if not chat or not answer.strip():
        return
    said = [*messages, {"role": "assistant", "content": answer}]
    name = _turn_id(service, owner, chat, said)
    turn = Kept(name, owner, TURN, int(time.time()), document={"session": session})
    await service.put(turn, Session(service.model, service.tokenizer))


def _turn_id(service: Service, owner: str, chat: str, messages: Sequence[Mapping[str, Any]]) -> str:
    front = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    answer = messages[-1].get("content")
    answer = answer.strip() if isinstance(answer, str) else answer
    return service.store.ids.of("turn-", owner, json.dumps([chat, len(messages), front, answer]))
