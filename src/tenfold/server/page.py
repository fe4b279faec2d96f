"""The web page at `/`: a handful of files that ship with the package, read once, served with strict headers.

Knows files and headers; nothing of the API that the page's scripts talk to. Only names listed here are served, so no
path of a request ever reaches the file system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["routes"]

_FOLDER = Path(__file__).parent / "static"
_PAGE = "index.html"
_FILES = (
    "announce.js",
    "api.js",
    "app.js",
    "conversations.js",
    "documents.js",
    "figures.js",
    "icon.svg",
    "markdown.js",
    "messages.js",
    "panel.js",
    "style.css",
    "words.js",
)
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What a model or a user wrote can run nothing and reach nobody: no inline script, no markup made from strings, no other
# origin.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, answered with 304 while it is the same
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[Route]:
    """`/` and `/static/NAME` for every listed file. They ask for no API key: the page holds nothing of anybody."""
    page = Route("/", _serve(_PAGE), methods=["GET"])
    return [page, *(Route(f"/static/{name}", _serve(name), methods=["GET"]) for name in _FILES)]


def _serve(name: str) -> Callable[[Request], Awaitable[Response]]:
    path = _FOLDER / name
    content, media_type = path.read_bytes(), _MEDIA_TYPES[path.suffix]
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def endpoint(request: Request) -> Response:
        if _knows(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return endpoint


def _knows(request: Request, etag: str) -> bool:
    """Whether the browser already holds this very file; proxies may have marked the tag as weak."""
    tags = request.headers.get("if-none-match", "").split(",")
    return etag in {tag.strip().removeprefix("W/") for tag in tags}
