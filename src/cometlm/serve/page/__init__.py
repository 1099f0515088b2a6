"""The page at `/`: a chat in the browser, of a few files that stand beside this one.

They say nothing of anybody, so they are given without a key; what the page then asks for needs one.
Their headers let the page load these files, ask its own server, and nothing else: no other origin,
no script or style inside the markup, and no markup made of strings (trusted types).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

_FOLDER = Path(__file__).parent
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asks again each time; the ETag saves the transfer
}
# `mimetypes` would ask the system, and some say that JavaScript is plain text.
_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = [file for file in _FOLDER.iterdir() if file.suffix in _MEDIA]
_AT = {"/": _FOLDER / "index.html"} | {f"/page/{file.name}": file for file in _FILES}

PATHS = tuple(_AT)  # which need no key

router = APIRouter(include_in_schema=False)


def _give(request: Request) -> Response:
    file = _AT[request.scope["path"]]
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_MEDIA[file.suffix])


for _path in PATHS:
    router.add_api_route(_path, _give, methods=["GET", "HEAD"])
