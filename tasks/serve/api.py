"""The service over HTTP: POST /v1/animate, its description at /docs, and what those who run it ask for."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import io
import json
import logging
import re
import uuid
import zipfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from prometheus_client import generate_latest
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve.gateway import Desk
from tasks.serve.limits import MAX_BODY_BYTES, Animation, Refusal, read_animation, read_json, too_many_bytes
from tasks.serve.messages import Clip, Event, Progress

MEDIA_TYPES = {"mp4": "video/mp4", "gif": "image/gif", "frames": "application/zip"}
JSON, LINES, MULTIPART = "application/json", "application/x-ndjson", "multipart/form-data"
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
READERS = 2  # bodies that are read at the same time, each in a thread
_log = logging.getLogger(__name__)

ABOUT = """\
A photo and a sentence become a short clip that begins with the photo.

The answer is the file itself; with `Accept: application/json` it is JSON with the file in base64, and with
`Accept: application/x-ndjson` a line of JSON for each denoising step, then one with the result or the error.
`X-Seed` and `X-Model-Version` say what it takes to make a clip again. Every refusal is JSON with a sentence.
"""
EXAMPLE = {
    "image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAJUlEQVR4nGO0cctjwAaYsIoSJ7Hsw6Fl"
    "Hw4R1sECZ0UJ2FFmOQD6ZgZaiicHigAAAABJRU5ErkJggg==",
    "prompt": "a red circle moving right slowly",
    "seed": 7,
}


def create_app(desk: Desk, key: str | None = None) -> FastAPI:
    """The application; with a `key`, /v1/animate is for those who send it as bearer token or `X-API-Key`."""
    app = FastAPIOffline(title="TRIP", version="1", description=ABOUT, redoc_url=None)
    app.state.readers = CapacityLimiter(READERS)
    # Without origins: no page of another site may read an answer. Gradio, which would let every one, then adds nothing.
    app.add_middleware(CORSMiddleware)
    app.add_middleware(_SameOrigin)
    app.add_middleware(_RequestId)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        wait = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        return JSONResponse(_said(refusal, request.state.request_id), refusal.status, wait)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        said = Refusal(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}; see /docs")
        return JSONResponse(_said(said, request.state.request_id), said.status, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        _log.error("request %s failed", request.state.request_id, exc_info=error)
        said = Refusal(500, "the service failed on this request; give its id to those who run it")
        return JSONResponse(_said(said, request.state.request_id), 500)

    # Gives /docs a field for the key; `_authorize` checks it, and takes it as bearer token too.
    asks = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))] if key else None

    @app.post(
        "/v1/animate",
        summary="Animate a photo",
        response_class=Response,
        openapi_extra=_described(),
        dependencies=asks,
    )
    async def animate(request: Request) -> Response:
        try:
            _authorize(request, key)
            animation = await _read(request)
        except Refusal as refusal:
            raise desk.refused(refusal) from refusal.__cause__
        accept = request.headers.get("accept", "")
        if LINES in accept:
            events = desk.animate(animation)
            first = await anext(events)
            if isinstance(first, Refusal):
                raise first
            return StreamingResponse(_lines(first, events, request.state.request_id), media_type=LINES)
        clip = await _waited_for(desk, animation, request)
        if JSON in accept:
            return JSONResponse(_as_json(clip, request.state.request_id), headers=_headers(clip))
        return Response(_file(clip), media_type=MEDIA_TYPES[clip.format], headers=_headers(clip))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether this process answers", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Whether requests are answered, and with which version")
    async def readyz() -> Response:
        status = await desk.animators.status()
        ready = bool(status.version) and not desk.closing
        said = {"ready": ready, **dataclasses.asdict(status), "under_way": desk.under_way}
        if desk.closing:
            said["trouble"] = "the service is stopping"
        return JSONResponse(said, 200 if ready else 503)

    @app.get("/metrics", summary="Prometheus text", response_class=PlainTextResponse)
    async def metrics() -> str:
        return generate_latest(desk.metrics).decode()

    return app


class _SameOrigin:
    """Refuses what a page of another site makes a visitor's browser send, and does not believe what headers say of
    the service's own address.

    A browser says where a request comes from in `Sec-Fetch-Site`, and over plain http in `Origin` alone. Programs send
    neither. GET and HEAD change nothing, and without CORS headers no other page can read their answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Gradio would make links to any host that is named here.
            not_believed = (b"x-forwarded-host", b"x-gradio-server")
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in not_believed]
            if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_foreign(Headers(scope=scope)):
                said = Refusal(403, "the request comes from a page of another site; send it from a program or our page")
                await JSONResponse(_said(said, scope["state"]["request_id"]), said.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != headers.get("host", "")


class _RequestId:
    """Gives every request an id, its own if that is a plain word, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if _ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, answer)


def _authorize(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    sent = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if not hmac.compare_digest(sent.encode("latin-1"), key.encode()):  # headers come as latin-1, whatever was sent
        raise Refusal(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'X-API-Key'")


async def _read(request: Request) -> Animation:
    """The request as JSON or as a form, read in a thread. Raises `Refusal`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, MULTIPART):
        raise Refusal(415, f"the content type is {kind!r:.60}; send {JSON} or {MULTIPART}")
    body = await _body(request)

    def read() -> Animation:
        try:
            # A loop of its own: the form's parser is a coroutine that computes and never waits.
            fields = read_json(body) if kind == JSON else asyncio.run(_form(request.headers, body))
        except (ValueError, MultiPartException) as error:
            raise Refusal(
                400, f"the body is not {kind} ({str(error)[:80]}); send photo and prompt as /docs shows"
            ) from error
        if not isinstance(fields, dict):
            raise Refusal(400, "the body is JSON but no object; send {'image': ..., 'prompt': ...}")
        return read_animation(fields)

    return await to_thread.run_sync(read, limiter=request.app.state.readers)


async def _body(request: Request) -> bytes:
    """The body, read no further than a photo may be long."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise too_many_bytes(int(announced))
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise too_many_bytes(len(body))
    except ClientDisconnect as error:
        raise Refusal(499, "the caller has gone") from error
    return bytes(body)


async def _form(headers: Headers, body: bytes) -> dict[str, Any]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    form = await MultiPartParser(headers, once(), max_files=1, max_fields=16).parse()
    fields = {name: await value.read() if isinstance(value, UploadFile) else value for name, value in form.items()}
    await form.close()
    return fields


async def _waited_for(desk: Desk, animation: Animation, request: Request) -> Clip:
    """The clip. Raises `Refusal`, also as soon as the caller has gone, whether the request waits or is computed."""

    async def clip() -> Clip:
        async with aclosing(desk.clip(animation)) as events:
            async for event in events:
                if isinstance(event, Clip):
                    return event
        raise AssertionError("no clip and no refusal")

    answer = asyncio.ensure_future(clip())
    gone = asyncio.ensure_future(request.receive())  # the body is read, so only a disconnect can come
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise Refusal(499, "the caller has gone")
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.wait([answer, gone])


async def _lines(first: Event, events: AsyncGenerator[Event, None], request_id: str) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        yield _line(first, request_id)
        async for event in events:
            yield _line(event, request_id)


def _line(event: Event, request_id: str) -> str:
    if isinstance(event, Progress):
        value = dataclasses.asdict(event)
    else:
        value = _as_json(event, request_id) if isinstance(event, Clip) else _said(event, request_id)
    return json.dumps(value) + "\n"


def _said(refusal: Refusal, request_id: str) -> dict[str, Any]:
    return {"error": {"status": refusal.status, "message": refusal.message, "request_id": request_id}}


def _headers(clip: Clip) -> dict[str, str]:
    suffix = "zip" if clip.format == "frames" else clip.format
    return {
        "X-Seed": str(clip.seed),
        "X-Model": clip.model,
        "X-Model-Version": clip.version,
        "X-Batch": str(clip.batch),
        "Content-Disposition": f'inline; filename="trip-{clip.seed}.{suffix}"',
    }


def _as_json(clip: Clip, request_id: str) -> dict[str, Any]:
    """What is known of a clip, and its files: `video`, or `frames` as a list of PNGs, in base64."""
    files = [base64.b64encode(file).decode() for file in clip.files]
    known = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip) if field.name != "files"}
    return {"request_id": request_id, **known} | ({"frames": files} if clip.format == "frames" else {"video": files[0]})


def _file(clip: Clip) -> bytes:
    """The video, or a zip of its frames."""
    if clip.format != "frames":
        return clip.files[0]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # a PNG is packed already
        for number, frame in enumerate(clip.files):
            archive.writestr(zipfile.ZipInfo(f"{number:03d}.png"), frame)  # with no time of day in it
    return buffer.getvalue()


def _described() -> dict[str, Any]:
    """The request and its answers for the OpenAPI page."""
    fields = Animation.model_json_schema()
    upload = {**fields, "properties": {**fields["properties"], "image": {"type": "string", "format": "binary"}}}
    refusals = {
        "400": "image or body that cannot be read",
        "401": "API key",
        "413": "too many bytes or pixels",
        "415": "another content type",
        "422": "a value out of bounds or unknown",
        "429": "too many wait; see Retry-After",
        "503": "no model yet, or stopping",
        "504": "out of time",
    }
    error = {"error": {"status": 422, "message": "steps is -1; send a whole number ...", "request_id": "0123abcd"}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    headers = ("X-Seed", "X-Model", "X-Model-Version", "X-Batch", "X-Request-Id")
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": fields, "example": EXAMPLE}, MULTIPART: {"schema": upload}},
        },
        "responses": {
            "200": {
                "description": "the clip",
                "headers": {name: {"schema": {"type": "string"}} for name in headers},
                "content": {kind: binary for kind in MEDIA_TYPES.values()} | {JSON: {}, LINES: {}},
            },
            **{
                status: {"description": about, "content": {JSON: {"example": error}}}
                for status, about in refusals.items()
            },
        },
    }
