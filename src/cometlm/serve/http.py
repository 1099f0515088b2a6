"""What endpoints share: who asks, streams of events, and clients that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse

from cometlm.serve.errors import ApiError, as_api_error, unknown_field
from cometlm.serve.schema import check_text
from cometlm.serve.service import Service

T = TypeVar("T")
_log = logging.getLogger(__name__)
SESSION_HEADER = "x-session-id"
OWNER = "cometlm.owner"  # in the scope of a request


def service_of(request: Request) -> Service:
    """The service behind a request."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """Whose key came with a request (`admission.KeyCheck`); nobody's without keys."""
    owner: str = request.scope[OWNER]
    return owner


Serving = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]


def check_query(request: Request) -> None:
    """Refuse query parameters where a route declares none; the others know their own.

    Raises:
        ApiError: names one.
    """
    if not request.scope["route"].dependant.query_params:
        for name in request.query_params:
            raise unknown_field(name[:80])


async def check_form(request: Request, fields: Collection[str]) -> None:
    """Refuse other fields of a form than these, or one twice, and what is no text.

    A form may choose its charset, so that names may hold halves of characters.

    Raises:
        ApiError: names one.
    """
    seen: set[str] = set()
    for name, value in (await request.form()).multi_items():
        for text in (name, value if isinstance(value, str) else value.filename or ""):
            check_text(text)
        if name not in fields:
            raise unknown_field(name)
        if name in seen:
            raise ApiError(f"{name}: the form has more than one of it", param=name)
        seen.add(name)


def error_response(error: BaseException) -> JSONResponse:
    """An error as the answer to a request."""
    told = as_api_error(error)
    if told.status >= 500 and told is not error:
        _log.error("a request failed", exc_info=error)
    return JSONResponse(told.body(), told.status, told.headers)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when the client hangs up.

    Raises:
        ApiError: the client did, and sees nothing of it.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client hung up", status=499, code="gone")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events; an error on the way is the last of them."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except Exception as error:  # noqa: BLE001 (the status is sent already)
            told = as_api_error(error)
            if told.status >= 500 and told is not error:
                _log.error("a stream failed", exc_info=error)
            yield data(told.body())

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def data(values: Mapping[str, Any] | str, event: str | None = None) -> str:
    """One event."""
    text = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return (f"event: {event}\n" if event else "") + f"data: {text}\n\n"
