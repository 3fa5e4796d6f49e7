"""The routes of videos that are made in the background: /v1/videos, in the form of the API that clients know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.params import Depends
from fastapi.responses import JSONResponse, Response

from tasks.serve.body import read_request
from tasks.serve.gateway import Gateway
from tasks.serve.limits import Refusal
from tasks.serve.messages import MEDIA_TYPES, file_name
from tasks.serve.openapi import VIDEO, VIDEO_LIST, describe, describe_content, describe_submit
from tasks.serve.videos import Video, Videos, id_of

ROOT = "/v1/videos"
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,128}")
Id = Annotated[str, Path(description="the id of a video", min_length=1)]


def add_video_routes(app: FastAPI, gateway: Gateway, videos: Videos, dependencies: Sequence[Depends] | None) -> None:
    """Adds the routes. Each caller, which is a key, sees its own videos; without keys all see all."""

    @app.post(
        ROOT,
        dependencies=dependencies,
        summary="Animate a photo in the background",
        status_code=202,
        openapi_extra=describe_submit(gateway.max_steps, videos.callbacks is not None),
    )
    async def submit(request: Request) -> Response:
        key, owner, seed = request.headers.get("idempotency-key"), request.state.caller, None
        if key is not None:
            if not _IDEMPOTENCY_KEY.fullmatch(key):
                raise Refusal(400, "the Idempotency-Key is not 1 to 128 ASCII characters without spaces; use a UUID")
            # A request that is sent again has no other seed.
            seed = int(id_of(owner, key)[-7:], 16)
        animation = await read_request(request, gateway.max_steps, seed)
        video = await videos.submit(animation, owner, key, request.headers.get("callback-url"))
        body = as_json(videos, video)
        if video.callback is not None and videos.callbacks is not None:
            body["callback_secret"] = videos.callbacks.secret_of(owner)
        return JSONResponse(body, 202, {"Location": str(request.url_for("show", id=video.id).path)})

    @app.get(
        ROOT,
        dependencies=dependencies,
        summary="The caller's videos, newest first",
        openapi_extra=describe(200, "Videos", VIDEO_LIST, 422),
    )
    async def index(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(description="the id of the last video of the page before")] = None,
    ) -> Response:
        own = videos.of(request.state.caller)
        start = 0 if after is None else next((n for n, v in enumerate(own, 1) if v.id == after), len(own))
        page = [as_json(videos, video) for video in own[start : start + limit]]
        return JSONResponse({"object": "list", "data": page, "has_more": start + limit < len(own)})

    @app.get(
        ROOT + "/{id}",
        dependencies=dependencies,
        summary="How far a video is",
        openapi_extra=describe(200, "The video", VIDEO, 404),
    )
    async def show(request: Request, id: Id) -> Response:
        return JSONResponse(as_json(videos, videos.get(id, request.state.caller)))

    @app.get(
        ROOT + "/{id}/content",
        dependencies=dependencies,
        summary="The file of a completed video",
        openapi_extra=describe_content(),
    )
    async def content(request: Request, id: Id) -> Response:
        video = videos.get(id, request.state.caller)
        data = await videos.content(video)
        format, seed = str(video.request["format"]), int(video.request["seed"] or 0)
        disposition = f'inline; filename="{file_name(seed, format)}"'
        return Response(data, media_type=MEDIA_TYPES[format], headers={"Content-Disposition": disposition})

    @app.post(
        ROOT + "/{id}/cancel",
        dependencies=dependencies,
        summary="Stop a video",
        openapi_extra=describe(200, "The video", VIDEO, 404),
    )
    async def cancel(request: Request, id: Id) -> Response:
        return JSONResponse(as_json(videos, await videos.cancel(videos.get(id, request.state.caller))))

    @app.delete(
        ROOT + "/{id}",
        dependencies=dependencies,
        summary="Stop a video and remove its record and its file",
        openapi_extra=describe(200, "The id", {"type": "object"}, 404, 503),
    )
    async def delete(request: Request, id: Id) -> Response:
        await videos.remove(videos.get(id, request.state.caller))
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})


def as_json(videos: Videos, video: Video) -> dict[str, Any]:
    """The JSON of a video: its state, its request without the photo, and the facts of its clip."""
    step, steps = videos.progress(video)
    done = 100 if video.state == "completed" else int(100 * step / steps) if steps else 0
    given = {name: value for name, value in video.request.items() if value is not None}
    return {
        **given,
        **(video.clip or {}),
        "id": video.id,
        "object": "video",
        "status": video.state,
        "progress": done,
        "step": step,
        "steps_total": steps,
        "place": videos.place(video),
        "created_at": int(video.created),
        "completed_at": None if video.ended is None else int(video.ended),
        "expires_at": int(videos.expires(video)),
        "callback_url": video.callback,
        "error": None if video.error is None else {"status": video.error[0], "message": video.error[1]},
    }
