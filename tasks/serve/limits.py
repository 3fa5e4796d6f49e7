"""What a request may hold, checked before anything is unpacked; every refusal is a status and a sentence."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from trip_model.video import MAX_ASPECT, MAX_IMAGE_PIXELS

MAX_IMAGE_BYTES = 16 * 2**20
MAX_BODY_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 2**16  # base64 takes four bytes for three; the rest is prompt and numbers
MIN_IMAGE_SIDE = 8
# By name, because Pillow opens far more, PostScript through a program of its own among it.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PROMPT_CHARACTERS = 2000
MAX_SEED = 2**63 - 1


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
    head, comma, body = value.partition(",")
    if value.startswith("data:") and not (comma and head.endswith(";base64")):
        raise PydanticCustomError("image", "image is a data URL without ';base64,'; send base64 data")
    try:
        return base64.b64decode(body if value.startswith("data:") else value, validate=True)
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


def read_animation(fields: Mapping[str, Any]) -> Animation:
    """The request that named values make, a photo as bytes or base64 text and numbers also as text.

    Raises:
        Refusal: the first thing wrong: the value, what was expected, and what to do.
    """
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
    if first["type"] == "extra_forbidden":
        return Refusal(422, f"parameter {name[:40]!r} is unknown; there are {', '.join(Animation.model_fields)}")
    expected = Animation.model_fields[name].description
    if first["type"] == "missing":
        return Refusal(422, f"{name} is missing; send {expected}")
    if name == "prompt" and isinstance(first["input"], str) and first["input"].strip():
        return Refusal(422, f"prompt has {len(first['input'].strip())} characters; send {expected}")
    return Refusal(422, f"{name} is {first['input']!r:.40}; send {expected}")


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
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise Refusal(400, "image is not one that can be read; send a JPEG, PNG or WebP photo") from error
    if width * height > MAX_IMAGE_PIXELS:
        raise Refusal(413, f"image has {width}x{height} pixels; send one of at most {MAX_IMAGE_PIXELS} pixels")
    if min(width, height) < MIN_IMAGE_SIDE:
        raise Refusal(422, f"image has {width}x{height} pixels; send one of at least {MIN_IMAGE_SIDE} pixels a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refusal(422, f"image has {width}x{height} pixels; send one at most {MAX_ASPECT} times as long as wide")


def too_many_bytes(count: int) -> Refusal:
    return Refusal(413, f"image has {count} bytes; send a photo of at most {MAX_IMAGE_BYTES} bytes")
