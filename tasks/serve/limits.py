"""The fields of a request to the service, parsed in bounded time, and `Refusal`, a status with a message."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic_core import from_json

from trip_model.request_limits import (
    BOUNDS,
    MAX_PHOTO_BYTES,
    MAX_PROMPT_CHARACTERS,
    PHOTO,
    PROMPT,
    VIDEO_FORMATS,
    RequestError,
    read_numbers,
    read_photo,
    read_prompt,
)

MAX_REST_BYTES = 2**16  # of a JSON body, without its longest string
# Base64 has four characters for three bytes; its line breaks may add one in 20.
MAX_BODY_BYTES = MAX_PHOTO_BYTES * 4 // 3 * 21 // 20 + MAX_REST_BYTES
MAX_MARKS = 4 * MAX_PROMPT_CHARACTERS  # a prompt may consist of quotes
FORMATS = (*VIDEO_FORMATS, "frames")
# What JSON writers escape in base64: line breaks, and for HTML `+`, `/` and `=`.
ESCAPES = (
    *((rb"\n", b"\n"), (rb"\r", b"\r"), (rb"\t", b"\t"), (rb"\/", b"/")),
    *((b"\\u00" + code, bytes.fromhex(code.decode())) for code in (b"2b", b"2B", b"2f", b"2F", b"3d", b"3D")),
)
STATUS = {"value": 422, "unreadable": 400, "too_large": 413}


class Refusal(Exception):
    """A request that gets no clip: an HTTP status, a message, and the seconds after which to send it again, if any."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def __reduce__(self) -> tuple[type[Refusal], tuple[int, str, int | None]]:
        return type(self), (self.status, self.message, self.retry_after)


@dataclass(frozen=True)
class Animation:
    """One photo to animate. None stands for the model's own value.

    Args:
        image: the bytes of a photo that `check_photo` accepts.
        format: one of `FORMATS`; `frames` is one PNG for each frame.
    """

    image: bytes
    prompt: str
    seed: int
    num_frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fps: float | None = None
    format: str = FORMATS[0]


FIELDS = tuple(field.name for field in fields(Animation))


def animation_schema(max_steps: int) -> dict[str, Any]:
    """The JSON schema of a request, for the OpenAPI page."""
    numbers = {
        name: {
            "type": ["integer" if bound.integer else "number", "null"],
            "minimum": bound.minimum,
            "maximum": max_steps if name == "steps" else bound.maximum,
            "description": bound.meaning,
        }
        for name, bound in BOUNDS.items()
    }
    properties = {
        "image": {"type": "string", "minLength": 1, "description": f"{PHOTO}, as base64 text or data URL"},
        "prompt": {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT_CHARACTERS, "description": PROMPT},
        **numbers,
        "format": {"type": ["string", "null"], "enum": [*FORMATS, None], "default": FORMATS[0]},
    }
    required = ["image", "prompt"]
    return {"title": "Animation", "type": "object", "properties": properties, "required": required,
            "additionalProperties": False}  # fmt: skip


def read_json(body: bytes) -> Any:
    """Returns the value of a JSON body in bounded time, whatever a body of 20 MB contains.

    A JSON parser holds the interpreter's lock until it ends. So the longest string, the photo, is cut out first, and
    the parser gets at most `MAX_REST_BYTES`. Raises ValueError.
    """
    if len(body) <= MAX_REST_BYTES:
        return from_json(body)
    marks = 0
    for mark in b',[{"':
        marks += body.count(mark)
        if marks > MAX_MARKS:
            raise ValueError(f"more than {MAX_MARKS} commas, brackets and quotes")
    parts = body.split(b'"')
    longest = max(range(len(parts)), key=lambda part: len(parts[part]))
    text, parts[longest] = parts[longest], uuid.uuid4().hex.encode()
    placeholder = parts[longest].decode()
    rest = b'"'.join(parts)
    if len(rest) > MAX_REST_BYTES:
        raise ValueError(f"{len(rest)} bytes besides the photo; use at most {MAX_REST_BYTES}")
    values = from_json(rest)
    if not isinstance(values, dict):
        return values
    photo = _unescaped(text).decode()
    return {name: photo if value == placeholder else value for name, value in values.items()}


def _unescaped(text: bytes) -> bytes:
    """A JSON string without the escapes that JSON writers use in base64."""
    if b"\\" in text:
        for escape, character in ESCAPES:
            text = text.replace(escape, character)
    return text


def read_animation(values: Mapping[str, Any], max_steps: int | None = None, seed: int | None = None) -> Animation:
    """Returns the request that named values describe; without a seed it gets `seed`, or one that is drawn.

    Raises:
        Refusal: the first value that is rejected; the message gives the value and what to use instead.
    """
    unknown = next((name for name in values if name not in FIELDS), None)
    if unknown is not None:
        raise Refusal(422, f"parameter {unknown[:40]!r} is unknown; use {', '.join(FIELDS)}")
    missing = next((name for name in ("image", "prompt") if name not in values), None)
    if missing is not None:
        raise Refusal(422, f"{missing} is missing; send {PHOTO if missing == 'image' else PROMPT}")
    file_format = values.get("format")
    if file_format not in (None, *FORMATS):
        raise Refusal(422, f"format is {str(file_format)[:40]!r}; use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    try:
        prompt, numbers = read_prompt(values["prompt"]), read_numbers(values, max_steps)
        photo = read_photo(values["image"])
    except RequestError as error:
        raise refusal_of(error) from error
    drawn = secrets.randbelow(2**31) if seed is None else seed
    return Animation(photo, prompt, **{"seed": drawn, **numbers}, format=file_format or FORMATS[0])


def refusal_of(error: RequestError) -> Refusal:
    return Refusal(STATUS[error.reason], str(error))


def out_of_time(seconds: float) -> Refusal:
    return Refusal(504, f"no clip within {seconds:g} s; use fewer steps or frames, or try again later")


def body_too_large(size_bytes: int) -> Refusal:
    return Refusal(413, f"the body has {size_bytes} bytes; send a photo of at most {MAX_PHOTO_BYTES} bytes")
