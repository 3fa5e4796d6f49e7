"""Classifies HTTP responses: video or something else, opt-out, Retry-After."""

from __future__ import annotations

import re
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from time import time

from trip_model.request_limits import RequestError, check_photo

AGENT = "trip-i2v"
# Directives of X-Robots-Tag that exclude a file from collections or from training.
_OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
_VALUED_DIRECTIVES = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")
_MAGIC = (b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"0&\xb2u", b"GIF8")
_LOOKS = {
    "an empty file": rb"\Z",
    "a web page": rb"(?i)\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body|script)",
    "XML": rb"\s*<",
    "JSON": rb"\s*[\[{]",
    "a playlist": rb"#EXTM3U",
    "a picture": rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP",
    "a compressed file": rb"PK\x03\x04|\x1f\x8b|BZh|7z\xbc\xaf|\xfd7zXZ",
}


def is_video(data: bytes) -> bool:
    """Returns whether data begins like a video container: mp4/mov, Matroska/WebM, AVI, Ogg, FLV, MPEG, ASF or GIF."""
    if data[4:8] in _MP4_BOXES or data.startswith(_MAGIC):
        return True
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return True
    return data[:1] == b"G" and data[188:189] == b"G"  # transport stream: a sync byte every 188


def is_photo(data: bytes) -> bool:
    """Returns whether data begins like a photo that can be animated, by its header."""
    try:
        check_photo(data)
    except RequestError:
        return False
    return True


def looks_like(data: bytes) -> str:
    """Describes data that is not a video, for a message."""
    head = data[:1000]
    guess = next((f"{name}, " for name, pattern in _LOOKS.items() if re.match(pattern, head, re.DOTALL)), "")
    return f"{guess}{len(data)} bytes that begin {data[:12]!r}"


def opts_out(tags: Iterable[str], agent: str = AGENT) -> bool:
    """Returns whether values of X-Robots-Tag exclude a file, for all agents or for this one by name."""
    for tag in tags:
        addressee = "*"  # `name: directive, directive` applies to one agent, up to the next name
        for part in tag.lower().split(","):
            name, colon, directive = part.rpartition(":")
            name = name.strip()
            if colon and re.fullmatch(r"[\w*-]+", name) and name not in _VALUED_DIRECTIVES:
                addressee = name
            if addressee in ("*", agent) and directive.strip() in _OPT_OUTS:
                return True
    return False


def seconds_to_wait(retry_after: str) -> float | None:
    """Returns the seconds of a Retry-After header, given in seconds or as a date; None if it is neither."""
    try:
        if retry_after.isdecimal():
            return float(retry_after)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
    except (ValueError, OverflowError):  # an invalid date
        return None
