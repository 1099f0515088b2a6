"""`/v1/sessions`: what is kept for a key: listed, taken home, brought back, forked and deleted."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Query, Request, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from cometlm.serve.answer import Progress
from cometlm.serve.errors import ApiError, as_api_error
from cometlm.serve.folder import Kept
from cometlm.serve.http import Owner, Serving, check_form, unless_gone
from cometlm.serve.kept import Listed, NotKeptError
from cometlm.serve.pages import PageQuery, page_of
from cometlm.serve.run import Run
from cometlm.serve.schema import Body
from cometlm.serve.service import Service
from cometlm.serve.upload import load_upload
from cometlm.session.session import Session

router = APIRouter()

_KIND, _PREFIX, _PARAM = "session", "sess_", "session_id"


class SessionObject(BaseModel):
    """What is said of a session."""

    id: str
    object: Literal["session"] = "session"
    created_at: int
    expires_at: int | None = Field(description="Seconds since 1970; null: never.")
    tokens: int | None = Field(description="That it has read; null where that is not known.")
    bytes: int = Field(description="Of its file, or in memory where there is no folder.")
    parent: str | None = Field(description="The id that it went on from.")
    title: str | None = Field(description="A file's name, or first words where these are kept.")


class SessionList(BaseModel):
    """A page of sessions."""

    object: Literal["list"] = "list"
    data: list[SessionObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class SessionDeleted(BaseModel):
    """A session that is kept no longer."""

    id: str
    object: Literal["session"] = "session"
    deleted: bool = True


class ForkBody(Body):
    """Of `POST /v1/sessions/ID/fork`: nothing is asked beside the path."""


@router.get("/v1/sessions", response_model=SessionList)
async def listing(service: Serving, owner: Owner, query: Annotated[PageQuery, Query()]) -> Any:
    """What is kept for a key."""
    every = await asyncio.to_thread(service.store.all_of, owner)
    return page_of([_described(one) for one in every], query)


@router.post("/v1/sessions", response_model=SessionObject)
async def create(
    request: Request, service: Serving, owner: Owner, file: Annotated[UploadFile, File()]
) -> Any:
    """Bring a session file; it has to be of this model, and is of this key from now on."""
    await check_form(request, {"file"})
    try:
        session = await asyncio.to_thread(
            lambda: load_upload(file.file, service.model, service.tokenizer, service.made_by)
        )
    except ValueError as error:
        raise ApiError(f"file: {error}", param="file") from error
    settled = await unless_gone(request, _settled(service.settle(session, owner)))
    document = {"title": file.filename} if file.filename else None
    return await _keep(service, _new(service, owner, document=document), settled)


@router.get("/v1/sessions/{name}", response_model=SessionObject)
async def retrieve(name: str, service: Serving, owner: Owner) -> Any:
    """What is known of a session."""
    return _described(await _listed(service, name, owner))


@router.get("/v1/sessions/{name}/content", response_class=FileResponse)
async def content(name: str, service: Serving, owner: Owner) -> FileResponse:
    """The session file: without what was said, and of this model only."""
    _, session = await service.known(name, owner, _PARAM)
    folder = tempfile.TemporaryDirectory(prefix="cometlm-")
    path = os.path.join(folder.name, f"{name}.safetensors")
    try:
        await asyncio.to_thread(lambda: session.save(path, made_by=service.made_by))
    except OSError as error:
        folder.cleanup()
        raise as_api_error(error) from error
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=f"{name}.safetensors",
        background=BackgroundTask(folder.cleanup),
    )


@router.post("/v1/sessions/{name}/fork", response_model=SessionObject)
async def fork(name: str, service: Serving, owner: Owner, body: ForkBody | None = None) -> Any:
    """The same session under another id, which stays when this one goes."""
    kept, session = await service.known(name, owner, _PARAM)
    document = {"title": kept.title, "tools": (kept.document or {}).get("tools")}
    document = {field: value for field, value in document.items() if value is not None}
    made = _new(service, owner, document=document or None, parent=name, trail=kept.trail)
    return await _keep(service, made, session)


@router.delete("/v1/sessions/{name}", response_model=SessionDeleted)
async def delete(name: str, service: Serving, owner: Owner) -> Any:
    """Keep a session no longer; those that went on from it stay."""
    await _listed(service, name, owner)
    try:
        await asyncio.to_thread(service.store.delete, name, owner)
    except NotKeptError as error:
        raise as_api_error(error, _PARAM) from error
    return SessionDeleted(id=name)


def _new(service: Service, owner: str, **known: Any) -> Kept:
    name = service.store.ids.new(_PREFIX, owner)
    return Kept(name, owner, _KIND, int(time.time()), **known)


async def _keep(service: Service, kept: Kept, session: Session) -> dict[str, Any]:
    await service.put(kept, session)
    return _described(await _listed(service, kept.id, kept.owner))


async def _listed(service: Service, name: str, owner: str) -> Listed:
    try:
        return await asyncio.to_thread(service.store.listed, name, owner)
    except (NotKeptError, OSError) as error:
        raise as_api_error(error, _PARAM) from error


async def _settled(run: Run) -> Session:
    async for event in run.events():
        if isinstance(event, Progress) and event.session is not None:
            return event.session
    raise ApiError("the session was not read", status=500)


def _described(one: Listed) -> dict[str, Any]:
    return {
        "id": one.id,
        "object": "session",
        "created_at": one.created,
        "expires_at": None if one.expires is None else int(one.expires),
        "tokens": one.tokens,
        "bytes": one.nbytes,
        "parent": one.parent,
        "title": one.title,
    }
