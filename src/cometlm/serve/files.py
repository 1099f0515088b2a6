"""`/v1/files`: a text of any size becomes a session, to be asked as often as one likes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile

from cometlm.serve.answer import Progress
from cometlm.serve.errors import ApiError
from cometlm.serve.folder import Kept
from cometlm.serve.http import Owner, Serving, check_form, data, event_stream, unless_gone
from cometlm.serve.run import Run
from cometlm.serve.service import Service
from cometlm.serve.start import find_start
from cometlm.session.session import Session

router = APIRouter()

_KIND, _PREFIX = "file", "file-"
_FIELDS = {"file", "purpose", "session", "stream"}


@router.post("/v1/files")
async def create(
    request: Request,
    service: Serving,
    owner: Owner,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form(max_length=64)] = "user_data",
    session: Annotated[str | None, Form()] = None,
    stream: Annotated[bool, Form()] = False,
) -> Any:
    """Read a text, behind a session or from the beginning, and keep what is then in memory."""
    await check_form(request, _FIELDS)
    begun = (await find_start(service, owner, request, session=session)).start
    name = service.store.ids.new(_PREFIX, owner)
    created = int(time.time())
    about = {
        "id": name,
        "object": "file",
        "bytes": file.size,
        "created_at": created,
        "filename": file.filename,
        "purpose": purpose,
        "status": "processed",
    }
    start, parent, tools = Session(service.model, service.tokenizer), None, None
    if begun is not None:
        start, parent, tools = begun.session, begun.name, begun.tools
    run = service.read(start, file.file, repr(file.filename)[:80], owner)
    document = None if tools is None else {"tools": tools}
    kept = Kept(name, owner, _KIND, created, parent=parent, document=document)
    events = _reading(service, run, kept, about)
    if stream:
        return event_stream(_told(events))
    return await unless_gone(request, _last(events))


@router.get("/v1/files", include_in_schema=False)
async def listing() -> Any:
    """Of OpenAI's files, but not here."""
    said = "files are sessions here: GET /v1/sessions lists them"
    raise ApiError(said, status=404, code="unsupported")


@router.get("/v1/files/{name}/content", include_in_schema=False)
async def content(name: str) -> Any:
    """Of OpenAI's files, but not here."""
    said = (
        "the text of a file is not kept, only what the model remembers of it: "
        f"GET /v1/sessions/{name:.80}/content downloads that as a session file"
    )
    raise ApiError(said, status=404, code="unsupported")


@router.get("/v1/files/{name}")
async def retrieve(name: str, service: Serving, owner: Owner) -> Any:
    """What is known of a text that was read."""
    return await _about(service, name, owner)


@router.delete("/v1/files/{name}")
async def delete(name: str, service: Serving, owner: Owner) -> Any:
    """Keep what was read no longer; conversations that went on from it stay."""
    await _about(service, name, owner)
    await asyncio.to_thread(service.store.delete, name, owner)
    return {"id": name, "object": "file", "deleted": True}


async def _about(service: Service, name: str, owner: str) -> dict[str, Any]:
    document = await service.document(name, owner, _KIND, "file_id")
    return {field: value for field, value in document.items() if field != "tools"}


async def _reading(
    service: Service, run: Run, kept: Kept, about: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """How far it was read, at times; at the end, what is kept."""
    async for event in run.events():
        assert isinstance(event, Progress)
        if event.session is None:
            said = {"tokens": event.tokens, "bytes_read": event.bytes_read, "bytes": about["bytes"]}
            yield {"type": "file.progress", "id": kept.id, **said}
            continue
        done = {**about, "tokens": event.tokens}
        await service.put(replace(kept, document={**done, **(kept.document or {})}), event.session)
        yield {"type": "file.processed", "file": done}


async def _told(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    async for event in events:
        yield data(event, event=event["type"])


async def _last(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    file: dict[str, Any] | None = None
    async for event in events:
        file = event.get("file", file)
    if file is None:
        raise ApiError("the file was not read", status=500)
    return file
