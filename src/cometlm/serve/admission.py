"""What stands in front of every request, before anything of a body is taken: keys, rates, sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from starlette.exceptions import HTTPException

from cometlm.serve.errors import ApiError
from cometlm.serve.http import OWNER, error_response
from cometlm.serve.keys import Keys
from cometlm.serve.rates import Rates

UPLOADS = ("/v1/files", "/v1/sessions")
OPEN = ("/health",)  # without a key


class KeyCheck:
    """ASGI middleware that notes whose key came with a request, and refuses others.

    Without keys it refuses what pages of other sites send: a browser sends forms for anybody, and
    files come as forms.

    Args:
        app: what it stands in front of.
        keys: who may; None: everybody, as one owner.
        open_paths: what needs no key.
    """

    def __init__(self, app: Any, keys: Keys | None, open_paths: Collection[str] = OPEN) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or not."""
        if scope["type"] == "http":
            owner = self._owner(scope)
            refused: ApiError | None = None
            if owner is None and scope["path"] not in self._open_paths:
                refused = ApiError(
                    "no API key, or a wrong one: send Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
            elif self._keys is None and _is_of_another_site(scope):
                said = "a page of another site asks; without keys, only the server's own may"
                refused = ApiError(said, status=403, code="cross_site")
            if refused is not None:
                await error_response(refused)(scope, receive, send)
                return
            scope[OWNER] = owner
        await self._app(scope, receive, send)

    def _owner(self, scope: Any) -> str | None:
        if self._keys is None:
            return ""
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, key = given.partition(" ")
        return self._keys.owner_of(key.strip()) if scheme.lower() == "bearer" else None


def _is_of_another_site(scope: Any) -> bool:
    """Whether a browser says that another site's page sends something; links may lead here."""
    site = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
    return scope["method"] not in ("GET", "HEAD") and site not in (b"none", b"same-origin")


class HostCheck:
    """ASGI middleware that refuses requests to other names than these, whatever their port.

    Args:
        app: what it stands in front of.
        hosts: names of the server.
    """

    def __init__(self, app: Any, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or not."""
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            if re.sub(r":\d*$", "", host) not in self._hosts:
                said = f"this server is not called {host!r:.80}; without keys it answers to " + (
                    " and ".join(sorted(self._hosts)) + " only"
                )
                await error_response(ApiError(said, code="host"))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RateLimit:
    """ASGI middleware that refuses what a key may not ask for yet, and says what it has left.

    Requests that look at something or delete it are neither counted nor refused.

    Args:
        app: what it stands in front of, behind the `KeyCheck`.
        rates: what keys may ask for.
        refused: told each error.
    """

    def __init__(self, app: Any, rates: Rates, refused: Callable[[ApiError], None]) -> None:
        self._app, self._rates, self._refused = app, rates, refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or not."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            left = self._rates.admit(scope[OWNER])
        except ApiError as error:
            self._refused(error)
            await error_response(error)(scope, receive, send)
            return
        headers = [(name.encode(), value.encode()) for name, value in left.items()]

        async def telling(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self._app(scope, receive, telling)


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
        """Pass a request on, or not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._most_of_file if scope["path"] in UPLOADS else self._most
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
