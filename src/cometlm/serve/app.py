"""The web application: routes, errors in OpenAI's form, limits, and who may."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cometlm import __version__
from cometlm.serve import chat, conversations, files, responses, sessions
from cometlm.serve.access_log import AccessLog
from cometlm.serve.admission import OPEN, BodyLimit, HostCheck, KeyCheck, RateLimit
from cometlm.serve.errors import INVALID, ApiError
from cometlm.serve.http import Owner, Serving, check_query, error_response
from cometlm.serve.keys import Keys
from cometlm.serve.page import PATHS
from cometlm.serve.page import router as page
from cometlm.serve.schema import TOO_DEEP, ErrorBody, first_error
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
    app.add_middleware(RateLimit, rates=service.rates, refused=service.metrics.failed)
    open_paths = (*OPEN, *PATHS) if with_page else OPEN
    app.add_middleware(KeyCheck, keys=keys, open_paths=open_paths)
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)
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
    for path, endpoint in (("/v1/models", _models), ("/v1/models/{name:path}", _model)):
        app.add_api_route(path, endpoint, methods=["GET"], dependencies=known)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    return app


async def _tell(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        error = _of_fields(error, request.headers.get("content-type"))
    elif isinstance(error, HTTPException):
        said = _of_body(error.__cause__) or str(error.detail)
        error = ApiError(said, status=error.status_code, kind=INVALID)
    return error_response(error)


def _of_fields(error: RequestValidationError, content_type: str | None) -> ApiError:
    """The first field that is wrong, or what is wrong with the body as a whole."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        said = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}"
        return ApiError(said, code="json_invalid")
    if isinstance(error.body, bytes) and first["loc"] == ("body",):
        return ApiError(
            "the body must come with the header Content-Type: application/json, got "
            f"{content_type or 'none'!r:.80}"
        )
    return first_error([{**first, "loc": first["loc"][1:]}])  # behind body, query or path


def _of_body(error: BaseException | None) -> str | None:
    """Why a body could not be parsed, where it is not that it is no JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"the body is not {error.encoding} text: {error.reason} at byte {error.start}"
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, ValueError):
        most = sys.get_int_max_str_digits()
        return f"the body has a number of too many digits: at most {most} are read"
    return None


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
