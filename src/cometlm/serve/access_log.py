"""A line of JSON for each request: when, whose, what, how it ended, tokens and seconds.

Nothing that was said stands in it: neither bodies nor query strings, and of a path the route's
pattern, not the ids in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import Request

from cometlm.serve.http import OWNER

_USED = "cometlm.used"  # in the scope of a request
_KEY = 12  # letters of an owner, which is a hash of a key


def note_used(request: Request, *, tokens: int, cached: int) -> None:
    """Note what a request has used.

    Args:
        request: it.
        tokens: of its prompt and its answers.
        cached: those of them that were in a memory already.
    """
    request.scope[_USED] = {"tokens": tokens, "cached_tokens": cached}


class AccessLog:
    """ASGI middleware that writes the lines.

    Args:
        app: what it stands in front of.
        write: takes a line.
    """

    def __init__(self, app: Any, write: Callable[[str], None]) -> None:
        self._app, self._write = app, write

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, and write a line when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client hung up before there was an answer

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            self._write(json.dumps(_line(scope, status, time.monotonic() - began)))


def _line(scope: Any, status: int, seconds: float) -> dict[str, Any]:
    used = scope.get(_USED) or {"tokens": None, "cached_tokens": None}
    owner = scope.get(OWNER)
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "key": owner[:_KEY] if owner else None,
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        **used,
        "seconds": round(seconds, 4),
    }
