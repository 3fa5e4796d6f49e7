"""The HTTP API of the service: POST /v1/animate, its documentation at /docs, health, readiness and metrics."""

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
from collections.abc import AsyncGenerator, Mapping
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
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from tasks.serve.gateway import Gateway
from tasks.serve.limits import (
    MAX_BODY_BYTES,
    Animation,
    Refusal,
    animation_schema,
    body_too_large,
    read_animation,
    read_json,
)
from tasks.serve.messages import Clip, Progress

MEDIA_TYPES = {"mp4": "video/mp4", "gif": "image/gif", "frames": "application/zip"}
JSON, LINES, MULTIPART = "application/json", "application/x-ndjson", "multipart/form-data"
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
READERS = 2  # threads that parse bodies
_log = logging.getLogger(__name__)

ABOUT = """\
Makes a short clip from a photo and a text prompt. The clip begins with the photo.

The response is the file; with `Accept: application/json` it is JSON with the file in base64, and with
`Accept: application/x-ndjson` one line of JSON for each denoising step, then one with the result or the error.
The same values, `X-Seed` and `X-Model-Version` give the same clip. Every error is JSON with a message.
"""
EXAMPLE = {
    "image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAJUlEQVR4nGO0cctjwAaYsIoSJ7Hsw6Fl"
    "Hw4R1sECZ0UJ2FFmOQD6ZgZaiicHigAAAABJRU5ErkJggg==",
    "prompt": "a red circle moving right slowly",
    "seed": 7,
}


def create_app(gateway: Gateway, key: str | None = None) -> FastAPI:
    """Returns the application; with a `key`, /v1/animate requires it as bearer token or `X-API-Key`."""
    app = FastAPIOffline(title="TRIP", version="1", description=ABOUT, redoc_url=None)
    app.state.readers = CapacityLimiter(READERS)
    # Without origins, pages of other sites cannot read responses. Gradio would allow all of them.
    app.add_middleware(CORSMiddleware)
    app.add_middleware(_SameOrigin)
    app.add_middleware(_RequestId)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        return _error_response(refusal, request.state.request_id, headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}; see /docs")
        return _error_response(refusal, request.state.request_id, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        _log.error("request %s failed", request.state.request_id, exc_info=error)
        refusal = Refusal(500, "the service failed on this request; quote the request id when reporting this")
        return _error_response(refusal, request.state.request_id)

    # A field for the key in /docs. `_authorize` checks it and also accepts a bearer token.
    security = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))] if key else None

    @app.post(
        "/v1/animate",
        summary="Animate a photo",
        response_class=Response,
        openapi_extra=_openapi(gateway.max_steps),
        dependencies=security,
    )
    async def animate(request: Request) -> Response:
        try:
            _authorize(request, key)
            animation = await _read(request, gateway.max_steps)
        except Refusal as refusal:
            raise gateway.count_refusal(refusal) from refusal.__cause__
        accept = request.headers.get("accept", "")
        if LINES in accept:
            messages = gateway.stream(animation)
            first = await anext(messages)  # raises the refusal of a request that is not accepted
            return StreamingResponse(_lines(first, messages, request.state.request_id), media_type=LINES)
        clip = await _clip(gateway, animation, request)
        if JSON in accept:
            return JSONResponse(_as_json(clip, request.state.request_id), headers=_headers(clip))
        return Response(_file(clip), media_type=MEDIA_TYPES[clip.format], headers=_headers(clip))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether the process responds", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Whether requests are accepted, and the model version")
    async def readyz() -> Response:
        status = await gateway.backend.status()
        ready = bool(status.version) and not gateway.closing
        state = {"ready": ready, **dataclasses.asdict(status), "in_flight": gateway.in_flight}
        if gateway.closing:
            state["trouble"] = "the service is stopping"
        return JSONResponse(state, 200 if ready else 503)

    @app.get("/metrics", summary="Metrics in the Prometheus format", response_class=PlainTextResponse)
    async def metrics() -> str:
        return generate_latest(gateway.metrics).decode()

    return app


class _SameOrigin:
    """Refuses requests that a page of another site makes a browser send; ignores headers about the service's address.

    A browser sends the origin of a request in `Sec-Fetch-Site`, and over plain HTTP only in `Origin`. Programs send
    neither. GET and HEAD change nothing, and without CORS headers no other page can read their responses.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Gradio would write links to any host that these name.
            ignored = (b"x-forwarded-host", b"x-gradio-server")
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in ignored]
            if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_foreign(Headers(scope=scope)):
                refusal = Refusal(403, "the request comes from a page of another site; use this site or a program")
                await _error_response(refusal, scope["state"]["request_id"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != headers.get("host", "")


class _RequestId:
    """Gives every request an id, or keeps a valid `X-Request-Id`, and returns it in the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if _ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def respond(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, respond)


def _authorize(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    sent = token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if not hmac.compare_digest(sent.encode("latin-1"), key.encode()):  # headers are decoded as latin-1
        raise Refusal(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'X-API-Key'")


async def _read(request: Request, max_steps: int) -> Animation:
    """Parses the request, JSON or a form, in a thread. Raises `Refusal`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, MULTIPART):
        raise Refusal(415, f"the content type is {kind!r:.60}; send {JSON} or {MULTIPART}")
    body = await _body(request)

    def read() -> Animation:
        try:
            # In its own event loop: the form parser is a coroutine that computes and never waits.
            fields = read_json(body) if kind == JSON else asyncio.run(_form(request.headers, body))
        except (ValueError, MultiPartException) as error:
            raise Refusal(400, f"the body is not {kind} ({str(error)[:80]}); see /docs for an example") from error
        if not isinstance(fields, dict):
            raise Refusal(400, "the body is JSON but not an object; send {'image': ..., 'prompt': ...}")
        return read_animation(fields, max_steps)

    return await to_thread.run_sync(read, limiter=request.app.state.readers)


async def _body(request: Request) -> bytes:
    """Reads the body up to `MAX_BODY_BYTES`. Raises `Refusal`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise body_too_large(int(announced))
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise body_too_large(len(body))
    except ClientDisconnect as error:
        raise Refusal(499, "the client has disconnected") from error
    return bytes(body)


async def _form(headers: Headers, body: bytes) -> dict[str, Any]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    form = await MultiPartParser(headers, once(), max_files=1, max_fields=16).parse()
    fields = {name: await value.read() if isinstance(value, UploadFile) else value for name, value in form.items()}
    await form.close()
    return fields


async def _clip(gateway: Gateway, animation: Animation, request: Request) -> Clip:
    """Returns the clip. Raises `Refusal`, also as soon as the client disconnects."""

    async def last_message() -> Clip:
        async with aclosing(gateway.stream(animation)) as messages:
            async for message in messages:
                if isinstance(message, Clip):
                    return message
        raise AssertionError("no clip and no refusal")

    clip = asyncio.ensure_future(last_message())
    disconnect = asyncio.ensure_future(request.receive())  # the body is read, so only a disconnect can come
    try:
        await asyncio.wait([clip, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if clip.done():
            return clip.result()
        raise Refusal(499, "the client has disconnected")
    finally:
        for task in (clip, disconnect):
            task.cancel()
        await asyncio.wait([clip, disconnect])


async def _lines(
    first: Progress | Clip, messages: AsyncGenerator[Progress | Clip, None], request_id: str
) -> AsyncGenerator[str, None]:
    async with aclosing(messages):
        try:
            yield _line(first, request_id)
            async for message in messages:
                yield _line(message, request_id)
        except Refusal as refusal:
            yield _line(refusal, request_id)


def _line(message: Progress | Clip | Refusal, request_id: str) -> str:
    if isinstance(message, Progress):
        value = dataclasses.asdict(message)
    else:
        value = _as_json(message, request_id) if isinstance(message, Clip) else _error(message, request_id)
    return json.dumps(value) + "\n"


def _error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    return {"error": {"status": refusal.status, "message": refusal.message, "request_id": request_id}}


def _error_response(refusal: Refusal, request_id: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_error(refusal, request_id), refusal.status, headers)


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
    """The fields of a clip, with its files in base64: `video`, or `frames` as a list of PNGs."""
    files = [base64.b64encode(file).decode() for file in clip.files]
    values = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip) if field.name != "files"}
    content = {"frames": files} if clip.format == "frames" else {"video": files[0]}
    return {"request_id": request_id, **values, **content}


def _file(clip: Clip) -> bytes:
    """Returns the video, or a zip of its frames."""
    if clip.format != "frames":
        return clip.files[0]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed already
        for number, frame in enumerate(clip.files):
            archive.writestr(zipfile.ZipInfo(f"{number:03d}.png"), frame)  # without the time of day
    return buffer.getvalue()


def _openapi(max_steps: int) -> dict[str, Any]:
    """The OpenAPI description of POST /v1/animate."""
    fields = animation_schema(max_steps)
    upload = {**fields, "properties": {**fields["properties"], "image": {"type": "string", "format": "binary"}}}
    refusals = {
        "400": "the photo or the body cannot be read",
        "401": "the API key is missing or wrong",
        "413": "too many bytes or pixels",
        "415": "unsupported content type",
        "422": "a value is out of bounds or unknown",
        "429": "the queue is full; see Retry-After",
        "503": "no model yet, or the service is stopping",
        "504": "the time limit is reached",
    }
    message = "steps is -1; use an integer from 1 to 1000 (DDIM steps)"
    error = {"error": {"status": 422, "message": message, "request_id": "0123abcd"}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    headers = ("X-Seed", "X-Model", "X-Model-Version", "X-Batch", "X-Request-Id")
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": fields, "example": EXAMPLE}, MULTIPART: {"schema": upload}},
        },
        "responses": {
            "200": {
                "description": "The clip",
                "headers": {name: {"schema": {"type": "string"}} for name in headers},
                "content": dict.fromkeys(MEDIA_TYPES.values(), binary) | {JSON: {}, LINES: {}},
            },
            **{
                status: {"description": about, "content": {JSON: {"example": error}}}
                for status, about in refusals.items()
            },
        },
    }
