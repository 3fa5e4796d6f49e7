"""The API key: the table of docs/decisions/serving.md states for every route whether it requires the key."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from tasks.serve.api import create_app
from tasks.serve.gateway import Gateway
from tasks.serve.messages import Status
from tasks.serve.web_ui import PATHS, ROUTES, mount_web_ui

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "decisions" / "serving.md"
ROW = re.compile(r"^\| (GET|POST) \| `(\S+)` \| (open|required) \|$", re.MULTILINE)
TABLE = ROW.findall(DOCUMENT.read_text())
VALUES = {"{path}": "x", "{session}": "abc", "{file}": "/tmp/a.png"}


class NoModel:
    """A backend without a model."""

    retries = 0

    async def stream(self, animation, seconds):
        raise AssertionError("a request without the key was accepted")
        yield

    async def status(self) -> Status:
        return Status("trip", "", "no model", 0, 1, "cpu", {}, 0)


@pytest.fixture(scope="module")
def app():
    gateway = Gateway(NoModel(), 60)
    return mount_web_ui(create_app(gateway, "a key"), gateway, "a key")


def request(app, method: str, route: str) -> int:
    """The status of a request without the key. Streams are cut after their first bytes."""
    path = re.sub(r"{\w+}", lambda variable: VALUES[variable[0]], route)
    statuses: list[int] = []

    async def go() -> None:
        scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
                 "root_path": "", "scheme": "http", "query_string": b"session_hash=abc&upload_id=a",
                 "headers": [(b"host", b"trip"), (b"content-length", b"2"), (b"content-type", b"application/json")],
                 "client": ("127.0.0.1", 1), "server": ("trip", 80)}  # fmt: skip
        started = asyncio.Event()

        body = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive():
            if body:
                return body.pop()
            await started.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                started.set()

        running = asyncio.ensure_future(app(scope, receive, send))
        waiting = asyncio.ensure_future(started.wait())
        await asyncio.wait([running, waiting], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, waiting):
            task.cancel()
        await asyncio.wait([running, waiting], timeout=5)

    asyncio.run(go())
    return statuses[0]


@pytest.mark.parametrize(("method", "route", "key"), TABLE, ids=lambda value: value)
def test_a_route_requires_the_key_as_the_table_states(app, method, route, key):
    assert (request(app, method, route) == 401) == (key == "required")


def test_the_table_contains_every_route(app):
    own = {
        route.path + ("/{path}" if isinstance(route, Mount) else "")
        for route in app.routes[:-1]
        if isinstance(route, APIRoute | Route | Mount)
    }
    assert {route for _, route, _ in TABLE} == own | set(ROUTES)
    assert len(own) + len(ROUTES) <= len(TABLE) and "/v1/animate" in own


def test_routes_that_are_not_in_the_table_are_not_found(app):
    for path in ("/monitoring", "/gradio_api/openapi.json", "/gradio_api/run/submit", "/gradio_api/file=http://a/b"):
        assert not PATHS.fullmatch(path) and request(app, "GET", path) == 404, path


def test_the_key_opens_the_api(app):
    async def go(headers: dict[str, str]) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://trip") as client:
            return (await client.post("/v1/animate", json={}, headers=headers)).status_code

    assert asyncio.run(go({"X-API-Key": "a key"})) == 422  # the key is right, the request is empty
    assert asyncio.run(go({"X-API-Key": "another"})) == 401
