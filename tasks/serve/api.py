"""The HTTP API of the service: animate and wait, videos in the background, documentation, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Match

from tasks.serve.body import JSON, READERS, read_request
from tasks.serve.gateway import Gateway
from tasks.serve.guard import Guard
from tasks.serve.keys import Keys
from tasks.serve.limits import FORMATS, Animation, Refusal
from tasks.serve.messages import MEDIA_TYPES, Clip, Progress, file_name
from tasks.serve.openapi import LINES, RESULT_HEADERS, describe_animate, describe_model, describe_ready
from tasks.serve.request_log import DISCONNECTED, RequestLog, error_body, error_response
from tasks.serve.server_limits import ServerLimits
from tasks.serve.videos import Videos
from tasks.serve.videos_api import add_video_routes
from tasks.serve.web_ui import add_page
from trip_model.request_limits import BOUNDS, MAX_PHOTO_BYTES, MAX_PROMPT_CHARACTERS

ABOUT_MODEL = "The model adds small movements to scenes like those it was trained on; others dissolve into blur."
ABOUT = """\
Makes a short clip from a photo and a text prompt. The clip begins with the photo.

`POST /v1/animate` waits and returns the file; with `Accept: application/json` JSON with the file in base64, and with
`Accept: application/x-ndjson` one line of JSON for each denoising step, then one with the result or the error.
`POST /v1/videos` returns an id at once; `GET /v1/videos/{id}` says how far it is, and `/content` is the file.

The same values, seed and model version give the same clip. Every error is JSON with a message.
"""


@dataclass(frozen=True)
class AppOptions:
    """How the application is reached.

    Args:
        limits: of requests and callers.
        keys: the accepted keys; None: no key is required.
        hosts: the values of `Host` that are served; empty: all.
        origins: other sites whose pages may use the API.
        page: whether the web UI is at /.
        about: what the model can do, for the page.
    """

    limits: ServerLimits = field(default_factory=ServerLimits)
    keys: Keys | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    page: bool = True
    about: str = ABOUT_MODEL


def create_app(gateway: Gateway, videos: Videos, options: AppOptions | None = None) -> FastAPI:
    """Returns the application: the API, its documentation, health, metrics and the web UI."""
    options = options or AppOptions()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with videos.running():
            yield

    app = FastAPIOffline(
        title="TRIP", version="1", description=ABOUT, redoc_url=None, lifespan=lifespan, redirect_slashes=False
    )
    app.state.readers = CapacityLimiter(READERS)
    # The last one is the outermost.
    app.add_middleware(Guard, limits=options.limits, keys=options.keys, hosts=options.hosts, origins=options.origins)
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "X-API-Key",
                "Content-Type",
                "X-Request-Id",
                "Idempotency-Key",
                "Callback-Url",
            ],
            expose_headers=[*RESULT_HEADERS, "X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, count=gateway.count_http, tracer=gateway.tracer)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return error_response(refusal, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}; see /docs")
        headers = _allowed(request) if error.status_code == 405 else error.headers
        return error_response(refusal, request.state.request_id, headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        refusal = Refusal(422, f"{first['loc'][-1]} is {str(first['input'])[:40]!r}; {first['msg']}")
        return error_response(refusal, request.state.request_id)

    # A field for the key in /docs. `Guard` checks it and also accepts a bearer token.
    security = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))] if options.keys else None

    @app.post(
        "/v1/animate",
        summary="Animate a photo, and wait for the clip",
        response_class=Response,
        openapi_extra=describe_animate(gateway.max_steps),
        dependencies=security,
    )
    async def animate(request: Request) -> Response:
        try:
            animation = await read_request(request, gateway.max_steps)
        except Refusal as refusal:
            raise gateway.count_refusal(refusal) from refusal.__cause__
        accept = request.headers.get("accept", "")
        if accepts(accept, LINES):
            messages = gateway.stream(animation)
            first = await anext(messages)  # raises the refusal of a request that is not accepted
            return StreamingResponse(_lines(first, messages, request.state.request_id), media_type=LINES)
        clip = await _clip(gateway, animation, request)
        if accepts(accept, JSON):
            return JSONResponse(_as_json(clip, request.state.request_id), headers=_headers(clip))
        return Response(clip.as_file(), media_type=MEDIA_TYPES[clip.format], headers=_headers(clip))

    add_video_routes(app, gateway, videos, security)

    @app.get("/v1/model", summary="The model and the bounds of a request", openapi_extra=describe_model())
    async def model() -> Response:
        status = await gateway.backend.status()
        bounds = {name: {"minimum": bound.minimum, "maximum": bound.maximum} for name, bound in BOUNDS.items()}
        bounds["steps"]["maximum"] = min(gateway.max_steps, status.max_steps or gateway.max_steps)
        return JSONResponse(
            {
                "model": status.model,
                "version": status.version,
                "size": status.size,
                "about": options.about,
                "defaults": status.defaults,
                "bounds": bounds,
                "formats": FORMATS,
                "max_photo_bytes": MAX_PHOTO_BYTES,
                "max_prompt_characters": MAX_PROMPT_CHARACTERS,
                "step_frames": options.limits.step_frames,
                "keep_seconds": videos.limits.keep_seconds,
                "key_required": options.keys is not None,
            }
        )

    async def healthz() -> str:
        return "ok\n"

    for path in ("/livez", "/healthz"):
        app.get(path, summary="Whether the process responds", response_class=PlainTextResponse, operation_id=path[1:])(
            healthz
        )

    @app.get("/readyz", summary="Whether requests are accepted, and the model version", openapi_extra=describe_ready())
    async def readyz() -> Response:
        status = await gateway.backend.status()
        ready = bool(status.version) and not gateway.leaving and not gateway.closing
        state = {"ready": ready, **dataclasses.asdict(status), "in_flight": gateway.in_flight}
        if gateway.leaving or gateway.closing:
            state["trouble"] = "the service is stopping"
        return JSONResponse(state, 200 if ready else 503)

    @app.get("/metrics", summary="Metrics in the Prometheus format", response_class=PlainTextResponse)
    async def metrics() -> str:
        return generate_latest(gateway.metrics).decode()

    if options.page:
        add_page(app)
    return app


def accepts(header: str, media_type: str) -> bool:
    """Whether an `Accept` header names a media type; `;q=0` excludes it, and wildcards name none."""
    for part in header.lower().split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        if kind == media_type:
            return not any(re.fullmatch(r"q\s*=\s*0(\.0*)?", parameter) for parameter in parameters)
    return False


def _allowed(request: Request) -> dict[str, str]:
    """`Allow` with the methods of all routes of the path; Starlette's own has those of the first."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] == Match.PARTIAL]
    return {"Allow": ", ".join(sorted({method for route in routes for method in getattr(route, "methods", ())}))}


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
        raise Refusal(DISCONNECTED, "the client has disconnected")
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
        value = _as_json(message, request_id) if isinstance(message, Clip) else error_body(message, request_id)
    return json.dumps(value) + "\n"


def _headers(clip: Clip) -> dict[str, str]:
    return {
        "X-Seed": str(clip.seed),
        "X-Model": clip.model,
        "X-Model-Version": clip.version,
        "X-Batch": str(clip.batch),
        "X-Prompt-Truncated": str(clip.prompt_truncated).lower(),
        "Content-Disposition": f'inline; filename="{file_name(clip.seed, clip.format)}"',
    }


def _as_json(clip: Clip, request_id: str) -> dict[str, Any]:
    """The fields of a clip, with its files in base64: `video`, or `frames` as a list of PNGs."""
    files = [base64.b64encode(file).decode() for file in clip.files]
    values = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip) if field.name != "files"}
    content = {"frames": files} if clip.format == "frames" else {"video": files[0]}
    return {"request_id": request_id, **values, **content}
