"""The parts of the OpenAPI document that FastAPI cannot derive: bodies, results and errors of the routes."""

from __future__ import annotations

from typing import Any

from tasks.serve.body import JSON, MULTIPART
from tasks.serve.callbacks import MAX_URL_CHARACTERS
from tasks.serve.limits import animation_schema
from tasks.serve.messages import MEDIA_TYPES
from tasks.serve.videos import STATES

LINES = "application/x-ndjson"
RESULT_HEADERS = ("X-Seed", "X-Model", "X-Model-Version", "X-Batch", "X-Prompt-Truncated")
EXAMPLE = {
    "image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAJUlEQVR4nGO0cctjwAaYsIoSJ7Hsw6Fl"
    "Hw4R1sECZ0UJ2FFmOQD6ZgZaiicHigAAAABJRU5ErkJggg==",
    "prompt": "a red circle moving right slowly",
    "seed": 7,
}
REFUSALS = {
    400: "the photo, the body or the host cannot be used",
    401: "the API key is missing or wrong",
    403: "the request comes from a page of another site",
    404: "there is no such video",
    405: "the route has another method; see Allow",
    408: "the body was sent too slowly",
    409: "the video is not in the state that this needs",
    411: "the body has no Content-Length",
    413: "too many bytes or pixels",
    415: "unsupported content type",
    422: "a value is out of bounds or unknown",
    429: "the queue is full, or the caller has sent too many requests; see Retry-After",
    500: "the service failed on this request",
    503: "no model yet, the store does not answer, or the service is stopping",
    504: "the time limit is reached",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["status", "message", "param", "request_id"],
            "properties": {
                "status": {"type": "integer"},
                "message": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field that the message is about"},
                "request_id": {"type": "string"},
            },
        }
    },
}
NUMBER, TEXT = {"type": "number"}, {"type": "string"}
VIDEO = {
    "type": "object",
    "required": ["id", "object", "status", "progress", "created_at", "expires_at", "prompt", "seed", "format"],
    "properties": {
        "id": TEXT,
        "object": {"const": "video"},
        "status": {"enum": list(STATES)},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "step": {"type": "integer", "description": "denoising steps that are done, of steps_total"},
        "steps_total": {"type": "integer"},
        "place": {"type": ["integer", "null"], "description": "in the line, from 1"},
        "created_at": {"type": "integer", "description": "seconds since 1970"},
        "completed_at": {"type": ["integer", "null"]},
        "expires_at": {"type": "integer"},
        "prompt": TEXT,
        "seed": {"type": "integer"},
        "format": TEXT,
        "model": TEXT,
        "version": TEXT,
        "callback_url": {"type": ["string", "null"]},
        "callback_secret": {"type": "string", "description": "verifies calls; in the response to the request only"},
        "error": {"type": ["object", "null"]},
    },
}
VIDEO_LIST = {
    "type": "object",
    "required": ["object", "data", "has_more"],
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": VIDEO},
        "has_more": {"type": "boolean"},
    },
}
BINARY = {"schema": {"type": "string", "format": "binary"}}


def refusals(*statuses: int) -> dict[str, Any]:
    """The responses of the statuses, and of those that every route may have."""
    content = {JSON: {"schema": ERROR}}
    every = (400, 401, 403, 405, 411, 413, 415, 429, 500)
    return {str(s): {"description": REFUSALS[s], "content": content} for s in sorted({*every, *statuses})}


def describe(status: int, about: str, schema: dict[str, Any], *statuses: int) -> dict[str, Any]:
    """A route that returns JSON."""
    success = {str(status): {"description": about, "content": {JSON: {"schema": schema}}}}
    return {"responses": success | refusals(*statuses)}


def describe_request(max_steps: int) -> dict[str, Any]:
    """The body of a request to animate a photo."""
    fields = animation_schema(max_steps)
    upload = {**fields, "properties": {**fields["properties"], "image": {"type": "string", "format": "binary"}}}
    content = {JSON: {"schema": fields, "example": EXAMPLE}, MULTIPART: {"schema": upload}}
    return {"requestBody": {"required": True, "content": content}}


def describe_animate(max_steps: int) -> dict[str, Any]:
    clip = {
        "description": "The clip",
        "headers": {name: {"schema": TEXT} for name in (*RESULT_HEADERS, "X-Request-Id")},
        "content": dict.fromkeys(MEDIA_TYPES.values(), BINARY) | {JSON: {}, LINES: {}},
    }
    return describe_request(max_steps) | {"responses": {"200": clip} | refusals(408, 422, 503, 504)}


def describe_submit(max_steps: int, callbacks: bool) -> dict[str, Any]:
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[!-~]{1,128}$"},
        "description": "a name for this request; the same name and values return the video of the first request",
    }
    callback = {
        "name": "Callback-Url",
        "in": "header",
        "schema": {"type": "string", "maxLength": MAX_URL_CHARACTERS, "format": "uri"},
        "description": "a public address that is called when the video has ended, signed as Standard Webhooks says",
    }
    return {
        **describe_request(max_steps),
        "parameters": [key, callback] if callbacks else [key],
        **describe(202, "The video, in the line", VIDEO, 408, 409, 422, 503),
    }


def describe_content() -> dict[str, Any]:
    file = {"description": "The file", "content": dict.fromkeys(MEDIA_TYPES.values(), BINARY)}
    return {"responses": {"200": file} | refusals(404, 409, 503)}


def describe_model() -> dict[str, Any]:
    names = ("model", "version", "size", "about", "defaults", "bounds", "formats", "max_photo_bytes", "key_required")
    return describe(200, "The model, its own values, and the bounds of a request", _object(*names))


def describe_ready() -> dict[str, Any]:
    state = _object("ready", "model", "version", "trouble", "waiting", "in_flight")
    responses = describe(200, "Ready", state)["responses"]
    return {"responses": {**responses, "503": {"description": "Not ready", "content": {JSON: {"schema": state}}}}}


def _object(*names: str) -> dict[str, Any]:
    return {"type": "object", "required": list(names)}
