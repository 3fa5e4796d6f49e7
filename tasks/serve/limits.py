"""What a request may hold, checked before anything is unpacked; every refusal is a status and a sentence."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import uuid
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError, from_json

from trip_model.images import MAX_ASPECT, MAX_IMAGE_PIXELS

MAX_IMAGE_BYTES = 16 * 2**20
MAX_REST_BYTES = 2**16  # of a JSON body, besides its longest string
MAX_BODY_BYTES = (
    MAX_IMAGE_BYTES * 4 // 3 + MAX_REST_BYTES
)  # base64 takes four bytes for three; the rest is prompt and numbers
BASE64_PART = 2**20  # a multiple of 4 characters
MIN_IMAGE_SIDE = 8
# By name, because Pillow opens far more, PostScript through a program of its own among it.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1
MAX_MARKS = 4 * MAX_PROMPT_CHARACTERS  # a prompt may consist of quotes


class Refusal(Exception):
    """A request that is not answered with a clip: an HTTP status, a sentence, and the seconds to wait if any."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def __reduce__(self) -> tuple[type[Refusal], tuple[int, str, int | None]]:
        return type(self), (self.status, self.message, self.retry_after)


def _decoded(value: Any) -> Any:
    """Bytes as they are; base64 text, bare or as a data URL, decoded."""
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        head, comma, value = value.partition(",")
        if not (comma and head.endswith(";base64")):
            raise PydanticCustomError("image", "image is a data URL without ';base64,'; send base64 data")
    try:
        if 0 <= value.find("=") < len(value) - 2:
            raise ValueError("padding before the end")
        # In parts, because no other thread runs during one call.
        parts = range(0, len(value), BASE64_PART)
        return b"".join(base64.b64decode(value[start : start + BASE64_PART], validate=True) for start in parts)
    except (binascii.Error, ValueError) as error:
        raise PydanticCustomError("image", "image is text but not base64; send base64 data or a data URL") from error


class Animation(BaseModel):
    """One photo to animate. What is left out is the model's own; a seed that is left out is drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Annotated[
        bytes,
        BeforeValidator(_decoded, json_schema_input_type=str),
        Field(description="a JPEG, PNG, WebP, GIF or BMP photo as base64 text or data URL"),
    ]
    prompt: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT_CHARACTERS),
        Field(description=f"a sentence of 1 to {MAX_PROMPT_CHARACTERS} characters that says what should move"),
    ]
    seed: int = Field(
        default_factory=lambda: secrets.randbelow(2**31),
        ge=0,
        le=MAX_SEED,
        description=f"a whole number from 0 to {MAX_SEED}",
    )
    num_frames: int | None = Field(None, ge=2, le=64, description="a whole number from 2 to 64")
    steps: int | None = Field(None, ge=1, le=250, description="a whole number of DDIM steps from 1 to 250")
    guidance: float | None = Field(
        None, ge=0, le=50, allow_inf_nan=False, description="a number from 0 to 50, 1 is off"
    )
    fps: float | None = Field(None, ge=1, le=60, allow_inf_nan=False, description="a number from 1 to 60")
    format: Literal["mp4", "gif", "frames"] = Field("mp4", description="one of mp4, gif, frames (PNG files)")


def read_json(body: bytes) -> Any:
    """The value of a JSON body, in time that a body of 20 MB of anything cannot make long.

    A parser holds the interpreter's lock from the first byte to the last, so only what can be a request gets there:
    the longest string, the photo, is cut out before, and the rest is short. Raises ValueError.
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
    stand_in = parts[longest].decode()
    rest = b'"'.join(parts)
    if len(rest) > MAX_REST_BYTES:
        raise ValueError(f"{len(rest)} bytes besides the photo, at most {MAX_REST_BYTES}")
    fields = from_json(rest)
    if not isinstance(fields, dict):
        return fields
    # Base64 has one character that some writers of JSON escape.
    return {name: text.replace(b"\\/", b"/").decode() if value == stand_in else value for name, value in fields.items()}


def read_animation(fields: Mapping[str, Any]) -> Animation:
    """The request that named values make, a photo as bytes or base64 text and numbers also as text.

    Raises:
        Refusal: the first thing wrong: the value, what was expected, and what to do.
    """
    # Before the validation, which makes an error for each of a million.
    unknown = next((name for name in fields if name not in Animation.model_fields), None)
    if unknown is not None:
        raise Refusal(422, f"parameter {unknown[:40]!r} is unknown; there are {', '.join(Animation.model_fields)}")
    try:
        animation = Animation.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from error
    check_image(animation.image)
    return animation


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False)[0]
    if first["type"] == "image":
        return Refusal(400, first["msg"])
    name = str(first["loc"][0])
    expected = Animation.model_fields[name].description
    if first["type"] == "missing":
        return Refusal(422, f"{name} is missing; send {expected}")
    if name == "prompt" and isinstance(first["input"], str) and first["input"].strip():
        return Refusal(422, f"prompt has {len(first['input'].strip())} characters; send {expected}")
    value = first["input"][:40] if isinstance(first["input"], str) else first["input"]
    return Refusal(422, f"{name} is {value!r:.40}; send {expected}")


def check_image(data: bytes) -> None:
    """Looks at the header of a photo; its pixels stay packed.

    Raises:
        Refusal: too many bytes or pixels, too small, too long a strip, or not an image of a known format.
    """
    if not data:
        raise Refusal(400, "image is empty; send the bytes of a JPEG, PNG or WebP photo")
    if len(data) > MAX_IMAGE_BYTES:
        raise too_many_bytes(len(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # a format can be named once its reader is loaded
            width, height = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"image unpacks to too much; send one of at most {MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:  # decoders of images raise what they like
        raise Refusal(400, "image is not one that can be read; send a JPEG, PNG or WebP photo") from error
    if width * height > MAX_IMAGE_PIXELS:
        raise Refusal(413, f"image has {width}x{height} pixels; send one of at most {MAX_IMAGE_PIXELS} pixels")
    if min(width, height) < MIN_IMAGE_SIDE:
        raise Refusal(422, f"image has {width}x{height} pixels; send one of at least {MIN_IMAGE_SIDE} pixels a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refusal(422, f"image has {width}x{height} pixels; send one at most {MAX_ASPECT} times as long as wide")


def too_many_bytes(count: int) -> Refusal:
    return Refusal(413, f"image has {count} bytes; send a photo of at most {MAX_IMAGE_BYTES} bytes")
