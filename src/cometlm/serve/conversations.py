"""`/v1/conversations`: a name for a conversation, and what was said in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from cometlm.serve import thread
from cometlm.serve.errors import ApiError, unsupported
from cometlm.serve.http import Owner, Serving
from cometlm.serve.items import items_of, with_own_ids
from cometlm.serve.pages import PageQuery, page_of
from cometlm.serve.schema import Body, Metadata
from cometlm.serve.service import Service
from cometlm.serve.start import find_start
from cometlm.serve.thread import Thread

router = APIRouter()

_PATH = "/v1/conversations"


class ConversationBody(Body):
    """Of `POST /v1/conversations`; `session` is our own: what the conversation goes on from."""

    items: Annotated[list[dict[str, Any]], Field(max_length=20)] | None = None
    metadata: Metadata | None = None
    session: str | None = None


class MetadataBody(Body):
    """Of `POST /v1/conversations/ID`."""

    metadata: Metadata


class ItemsBody(Body):
    """Of `POST /v1/conversations/ID/items`."""

    items: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=20)]


@router.post(_PATH)
async def create(
    request: Request, service: Serving, owner: Owner, body: ConversationBody | None = None
) -> Any:
    """Begin a conversation."""
    body = body or ConversationBody()
    items = with_own_ids(items_of(body.items or [], "items"), ())
    begun = (await find_start(service, owner, request, session=body.session)).start
    made = await thread.create(service, owner, tuple(items), body.metadata or {}, begun)
    return made.described()


@router.get(f"{_PATH}/{{name}}")
async def retrieve(name: str, service: Serving, owner: Owner) -> Any:
    """A conversation."""
    return (await _found(service, name, owner)).described()


@router.post(f"{_PATH}/{{name}}")
async def update(name: str, body: MetadataBody, service: Serving, owner: Owner) -> Any:
    """Give a conversation other metadata."""
    changed = await thread.change(
        service, name, owner, lambda now: replace(now, metadata=body.metadata)
    )
    return changed.described()


@router.delete(f"{_PATH}/{{name}}")
async def delete(name: str, service: Serving, owner: Owner) -> Any:
    """Keep a conversation no longer; its responses stay."""
    await thread.delete(service, name, owner)
    return {"id": name, "object": "conversation.deleted", "deleted": True}


@router.get(f"{_PATH}/{{name}}/items")
async def items(
    name: str, service: Serving, owner: Owner, query: Annotated[PageQuery, Query()]
) -> Any:
    """What was said, in pages."""
    return page_of((await _found(service, name, owner)).items, query)


@router.post(f"{_PATH}/{{name}}/items")
async def add(name: str, body: ItemsBody, service: Serving, owner: Owner) -> Any:
    """Say more; it waits for the next answer, and is read with it."""
    new: list[dict[str, Any]] = []

    def added(now: Thread) -> Thread:
        new[:] = with_own_ids(items_of(body.items, "items"), now.items)
        return replace(now, items=(*now.items, *new))

    await thread.change(service, name, owner, added)
    return page_of(new, PageQuery(order="asc"))


@router.get(f"{_PATH}/{{name}}/items/{{item}}")
async def item(name: str, item: str, service: Serving, owner: Owner) -> Any:
    """One of the things that were said."""
    found = await _found(service, name, owner)
    return found.items[_place(found, item)]


@router.delete(f"{_PATH}/{{name}}/items/{{item}}")
async def remove(name: str, item: str, service: Serving, owner: Owner) -> Any:
    """Take back what was not read yet."""

    def removed(now: Thread) -> Thread:
        place = _place(now, item)
        if place < now.read:
            raise unsupported(
                "item_id",
                "the model has read this item, and a memory cannot forget one; fork a session from "
                "before it instead",
            )
        return replace(now, items=(*now.items[:place], *now.items[place + 1 :]))

    return (await thread.change(service, name, owner, removed)).described()


async def _found(service: Service, name: str, owner: str) -> Thread:
    return (await thread.find(service, name, owner))[0]


def _place(found: Thread, item: str) -> int:
    for place, one in enumerate(found.items):
        if one["id"] == item:
            return place
    raise ApiError(
        f"there is no item {item!r:.80}, or it is one of the oldest, whose texts are not kept",
        status=404,
        param="item_id",
        code="not_found",
    )
