"""The web application: routes, errors in OpenAI's form, limits, and who may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cometlm import __version__
from cometlm.serve import chat, conversations, files, responses, sessions
from cometlm.serve.access_log import AccessLog
from cometlm.serve.admission import OPEN, BodyLimit, KeyCheck, RateLimit
from cometlm.serve.errors import INVALID, ApiError, unknown_field
from cometlm.serve.http import Owner, Serving, check_query, error_response
from cometlm.serve.keys import Keys
from cometlm.serve.page import PATHS
from cometlm.serve.page import router as page
from cometlm.serve.schema import ErrorBody
from cometlm.serve.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def create_app(
    service: Service,
    *,
    keys: Keys | None = None,
    hosts: Sequence[str] | None = None,
    most_bytes: int = 64 << 20,
    most_file_bytes: int = 4 << 30,
    grace: float = 10.0,
    with_page: bool = True,
    log: Callable[[str], None] | None = None,
) -> FastAPI:
    """The application that serves one model.

    Args:
        service: the model; it is stopped with the application.
        keys: who may; None: everybody, as one owner.
        hosts: names that requests may be sent to. Without keys they should be those of the
            machine itself: else a web page in somebody's browser could ask under its own name.
        most_bytes: of a body.
        most_file_bytes: of an upload.
        grace: seconds that running requests have when the server stops.
        with_page: whether there is a page to chat with at `/`.
        log: takes a line of JSON for each request; see `access_log`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.stop, grace)

    app = FastAPI(
        title="cometlm",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "An error."}},
    )
    app.state.service = service
    # The last one stands in front.
    app.add_middleware(BodyLimit, most=most_bytes, most_of_file=most_file_bytes)
    app.add_middleware(
        RateLimit,
        rates=service.rates,
        refused=lambda code: service.metrics.failed.labels(code).inc(),
    )
    open_paths = (*OPEN, *PATHS) if with_page else OPEN
    app.add_middleware(KeyCheck, keys=keys, open_paths=open_paths)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    if log is not None:
        app.add_middleware(AccessLog, write=log)
    for kind in (RequestValidationError, HTTPException, ApiError, Exception):
        app.add_exception_handler(kind, _tell)
    known = [Depends(check_query)]
    for one in (chat, conversations, files, responses, sessions):
        app.include_router(one.router, dependencies=known)
    if with_page:
        app.include_router(page)
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/metrics", _metrics, methods=["GET"])
    app.add_api_route("/v1/models", _models, methods=["GET"], dependencies=known)
    app.add_api_route("/v1/models/{name:path}", _model, methods=["GET"], dependencies=known)
    return app


async def _tell(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = _of_fields(error)
    elif isinstance(error, HTTPException):
        error = ApiError(str(error.detail), status=error.status_code, kind=INVALID)
    return error_response(error)


def _of_fields(error: RequestValidationError) -> ApiError:
    """The first field that is wrong."""
    first: dict[str, Any] = error.errors()[0]
    # A union names its members; the field stands before them.
    path = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return ApiError("the body is not JSON", code="json_invalid")
    if first["type"] == "extra_forbidden":
        return unknown_field(".".join(map(str, path)))
    param = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path)[1:]
    return ApiError(f"{param or 'the body'}: {first['msg']}", param=param or None)


async def _health(service: Serving) -> dict[str, str]:
    return {"status": "ok"}


async def _metrics(service: Serving, owner: Owner) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _described(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.began,
        "owned_by": "cometlm",
    }


async def _models(service: Serving, owner: Owner) -> dict[str, Any]:
    return {"object": "list", "data": [_described(service)]}


async def _model(name: str, service: Serving, owner: Owner) -> dict[str, Any]:
    service.check_model(name)
    return _described(service)
