"""The web UI: one page with its script and style sheet, over the API that everybody has."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
    "/favicon.ico": ("favicon.svg", "image/svg+xml"),
}


def add_page(app: FastAPI) -> None:
    """Adds the routes of the page. Its files are read once, so no request names a file."""
    for route, (name, media_type) in FILES.items():
        app.get(route, include_in_schema=False)(_file((PAGE / name).read_bytes(), media_type))


def _file(content: bytes, media_type: str):  # noqa: ANN202 - FastAPI reads the annotation of the inner function
    async def respond() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return respond
