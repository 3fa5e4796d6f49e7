"""Bounds of a request to animate a photo, and its checks, for all interfaces.

The command line, the logged model, the HTTP service and its web UI read this table. `TripPipeline` checks its numbers
with it too; it also reads TIFF, JPEG 2000 and PPM, and does not limit the size in bytes or the length of a prompt.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

MAX_PHOTO_BYTES = 16 * 2**20
MAX_PHOTO_PIXELS = 64_000_000  # read from the header, before the photo is unpacked (decompression bombs)
MIN_PHOTO_SIDE = 8  # pixels
MAX_ASPECT = 20  # longer over shorter side: the shorter one is resized to the frame, and the longer one with it
# By name: Pillow opens many more formats, among them PostScript, which it passes to an external program.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
MAX_PROMPT_CHARACTERS = 2000
VIDEO_FORMATS = ("mp4", "gif")

PHOTO = "a JPEG, PNG, WebP, GIF, BMP or AVIF photo"
PROMPT = f"a sentence of 1 to {MAX_PROMPT_CHARACTERS} characters that describes what should move"

_MAX_NUMBER_CHARACTERS = 40
_BASE64_PART = 2**20  # characters, a multiple of 4
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_LINE_BREAKS = b"\r\n"


class RequestError(ValueError):
    """A value that a request may not have. The message gives the value and what to use instead.

    `reason` is `too_large` for a photo of too many bytes or pixels, `unreadable` for one that is empty or cannot be
    read, and `value` otherwise.
    """

    def __init__(self, message: str, reason: Literal["value", "unreadable", "too_large"] = "value") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Bound:
    """Smallest and largest value of a number, whether it is an integer, and what it means."""

    minimum: float
    maximum: float
    integer: bool
    meaning: str

    def description(self, maximum: float | None = None) -> str:
        kind = "an integer" if self.integer else "a number"
        return f"{kind} from {self.minimum} to {self.maximum if maximum is None else maximum} ({self.meaning})"


BOUNDS = {
    "num_frames": Bound(2, 64, True, "frames of the clip, the photo included"),
    "seed": Bound(0, 2**63 - 1, True, "the same seed gives the same clip"),
    "steps": Bound(1, 1000, True, "DDIM steps"),
    "guidance": Bound(0, 50, False, "text guidance, 1 is off"),
    "fps": Bound(1, 60, False, "frames per second of the video"),
}
"""The numbers of a request by name. A model may have fewer time steps than `steps` allows; the pipeline checks that."""


def check_number(name: str, value: Any, maximum: float | None = None) -> int | float:
    """Returns a number of `BOUNDS` as int or float.

    Args:
        name: a key of `BOUNDS`.
        value: the number as given.
        maximum: a lower maximum than the table's.
    Raises:
        RequestError: a bool or another type, NaN, a fraction where an integer is expected, or a value out of bounds.
    """
    bound = BOUNDS[name]
    largest = bound.maximum if maximum is None else min(bound.maximum, maximum)
    if _is_number(value) and bound.minimum <= value <= largest:
        number = float(value)
        if not bound.integer:
            return number
        if number.is_integer():
            return int(value)
    raise RequestError(f"{name} is {_shown(value)}; use {bound.description(largest)}")


def read_number(name: str, value: Any, maximum: float | None = None) -> int | float:
    """`check_number` for a number or its text in decimal notation, as forms and command lines send it."""
    if isinstance(value, str):
        text = value.strip()
        if len(text) <= _MAX_NUMBER_CHARACTERS and _NUMBER.fullmatch(text):
            value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    return check_number(name, value, maximum)


def read_numbers(values: Mapping[str, Any], max_steps: float | None = None) -> dict[str, Any]:
    """The numbers of `BOUNDS` that `values` contains, checked; None stands for a number that is not given.

    Raises:
        RequestError: the first value that `read_number` rejects.
    """
    given = {name: values[name] for name in BOUNDS if values.get(name) is not None}
    return {name: read_number(name, value, max_steps if name == "steps" else None) for name, value in given.items()}


def read_prompt(value: Any) -> str:
    """Returns a prompt without the spaces around it. Raises RequestError: not text, empty, or too long."""
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"prompt is {_shown(value)}; use {PROMPT}")
    prompt = value.strip()
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise RequestError(f"prompt has {len(prompt)} characters; use {PROMPT}")
    return prompt


def read_photo(value: Any) -> bytes:
    """Returns the bytes of a photo, given as bytes, as base64 text or as a data URL, after `check_photo`.

    Base64 may contain line breaks, use the URL-safe alphabet, and omit its padding.

    Raises:
        RequestError: another type, text that is not base64, or a photo that `check_photo` rejects.
    """
    if isinstance(value, str):
        value = _decode_base64(value)
    if not isinstance(value, bytes | bytearray | memoryview):
        raise RequestError(f"image is {_shown(value)}; use {PHOTO}, as bytes, base64 text or data URL")
    photo = bytes(value)
    check_photo(photo)
    return photo


def check_photo(photo: bytes) -> None:
    """Checks size and header of a photo; its pixels are not unpacked.

    Raises:
        RequestError: too many bytes or pixels, a side too short, an aspect ratio too large, or another format.
    """
    from PIL import Image  # only here, so that the bounds can be read without it

    if not photo:
        raise RequestError(f"image is empty; use {PHOTO}", "unreadable")
    if len(photo) > MAX_PHOTO_BYTES:
        raise too_many_bytes(len(photo))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            formats = readable_formats(PHOTO_FORMATS)
            width, height = Image.open(io.BytesIO(without_png_text(photo)), formats=formats).size
    except Image.DecompressionBombError as error:
        raise RequestError(f"image has too many pixels; use at most {MAX_PHOTO_PIXELS} pixels", "too_large") from error
    except Exception as error:  # image decoders raise many types
        raise RequestError(f"image cannot be read; use {PHOTO}", "unreadable") from error
    size = f"image has {width}x{height} pixels"
    if width * height > MAX_PHOTO_PIXELS:
        raise RequestError(f"{size}; use at most {MAX_PHOTO_PIXELS} pixels", "too_large")
    if min(width, height) < MIN_PHOTO_SIDE:
        raise RequestError(f"{size}; use at least {MIN_PHOTO_SIDE} pixels for each side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"{size}; the longer side may be at most {MAX_ASPECT} times the shorter side")


def readable_formats(names: Sequence[str]) -> list[str]:
    """Returns the formats that this installation reads; HEIF (HEIC) needs the package `pillow-heif`."""
    from PIL import Image

    if "HEIF" in names and "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif  # type: ignore[import-not-found]

            pillow_heif.register_heif_opener()
    Image.init()  # registers every format of this Pillow build
    return [name for name in names if name in Image.OPEN]


def without_png_text(data: bytes) -> bytes:
    """Returns a PNG without its text chunks, which Pillow rejects from 1 MiB on; other data unchanged."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, position, removed = [data[:8]], 8, False
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        if data[position + 4 : position + 8] in (b"tEXt", b"zTXt", b"iTXt"):
            removed = True
        else:
            kept.append(data[position:end])
        position = end
    return b"".join(kept) if removed else data


def too_many_bytes(count: int) -> RequestError:
    return RequestError(f"image has {count} bytes; use a photo of at most {MAX_PHOTO_BYTES} bytes", "too_large")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _decode_base64(text: str) -> bytes:
    try:
        text = text.strip()
        if text[:5].lower() == "data:":
            head, comma, text = text.partition(",")
            if not (comma and head.lower().endswith(";base64")):
                raise RequestError("image is a data URL without ';base64,'; use base64 data", "unreadable")
        encoded = text.encode("ascii").translate(_URL_SAFE, _LINE_BREAKS)
        data = encoded.rstrip(b"=")
        if len(encoded) - len(data) > 2 or b"=" in data:
            raise ValueError("padding that is not at the end")
        if len(data) // 4 * 3 > MAX_PHOTO_BYTES:
            raise too_many_bytes(len(data) // 4 * 3)
        data += b"=" * (-len(data) % 4)
        # In parts: one call holds the interpreter's lock until it ends.
        parts = range(0, len(data), _BASE64_PART)
        return b"".join(base64.b64decode(data[start : start + _BASE64_PART], validate=True) for start in parts)
    except RequestError:
        raise
    except (binascii.Error, ValueError) as error:
        raise RequestError("image is text but not base64; use base64 data or a data URL", "unreadable") from error


def _shown(value: Any) -> str:
    try:
        return repr(value[:_MAX_NUMBER_CHARACTERS] if isinstance(value, str) else value)[:_MAX_NUMBER_CHARACTERS]
    except ValueError:  # an integer of more than 4300 digits
        return f"a large {type(value).__name__}"
