"""Bodies of requests up to a size, counted while they come."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from cometlm.serve.errors import ApiError
from cometlm.serve.http import error_response

FILES = "/v1/files"


class BodyLimit:
    """ASGI middleware that refuses larger bodies, whatever their headers say.

    Args:
        app: what it stands in front of.
        most: bytes of a body.
        most_of_file: bytes of an upload.
    """

    def __init__(self, app: Any, most: int, most_of_file: int) -> None:
        self._app, self._most, self._most_of_file = app, most, most_of_file

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._most_of_file if scope["path"] == FILES else self._most
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > most:
            await error_response(_too_large(most))(scope, receive, send)
            return
        came = 0

        async def counted() -> Any:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                raise HTTPException(413, str(_too_large(most)))
            return message

        await self._app(scope, counted, send)


def _too_large(most: int) -> ApiError:
    return ApiError(f"the body must have at most {most} bytes", status=413)
