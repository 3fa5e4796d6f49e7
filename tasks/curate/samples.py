"""Checks a stored sample: its fields exist, decode, have the right shapes and types, and agree with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tasks.shards import OPTIONAL, SUFFIXES, PackedSample, clip_key_of, decode_field
from tasks.video.frame_sizes import FrameSize

_REQUIRED = sorted(set(SUFFIXES) - {*OPTIONAL})
_ARRAYS = {
    "first": ("uint8", 3),
    "latents": ("float16", 4),
    "logvar": ("float16", 4),
    "pixels": ("uint8", 4),
    "text": ("float16", 2),
    "tokens": ("int32", 1),
}


# The part of a field's shape that all samples of a frame size share, by field and frame size.
Shapes = dict[tuple[str, FrameSize | None], tuple[int, ...]]


class SampleChecker:
    """Checks samples one by one; keeps the shapes of the first of each frame size, which all others of it share."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = dict(shapes)

    def problems(self, packed: PackedSample) -> Iterator[str]:
        """Yields the problems of a sample."""
        fields: dict[str, Any] = {}
        yield from (f"{packed.key} has no {name}" for name in _REQUIRED if name not in packed.members)
        for name, data in packed.members.items():
            if name not in SUFFIXES:
                yield f"{packed.key} has {name!r}, which is not a field"
                continue
            try:
                fields[name] = decode_field(name, data)
            except ValueError as error:
                yield f"{packed.key}.{SUFFIXES[name]}: {error}"
        arrays = {name: value for name, value in fields.items() if name in _ARRAYS}
        for name, array in arrays.items():
            found = self._array_problems(name, array, packed.frame_size)
            yield from (f"{packed.key}.{SUFFIXES[name]}: {problem}" for problem in found)
        first = fields.get("first")
        if packed.frame_size is not None and first is not None and first.shape[1::-1] != packed.frame_size:
            yield f"{packed.key}: frames of {FrameSize(*first.shape[1::-1])}, its index says {packed.frame_size}"
        yield from (f"{packed.key}: {problem}" for problem in _disagreements(packed.key, fields))

    def _array_problems(self, name: str, array: np.ndarray, size: FrameSize | None) -> Iterator[str]:
        dtype, dimensions = _ARRAYS[name]
        if array.dtype != dtype or array.ndim != dimensions:
            yield f"{array.dtype} of {array.ndim} dimensions, expected {dtype} of {dimensions}"
            return
        if not np.isfinite(array).all():
            yield "contains values that are not finite"
        # The number of frames may differ from clip to clip; height, width and channels of a frame size do not.
        shape = array.shape[1:] if dimensions == 4 else array.shape
        if shape != (other := self.shapes.setdefault((name, size), shape)):
            yield f"shape {array.shape}, other samples have (..., {', '.join(map(str, other))})"


def _disagreements(key: str, fields: dict[str, Any]) -> Iterator[str]:
    meta, latents, pixels, first = (fields.get(name) for name in ("meta", "latents", "pixels", "first"))
    logvar, text, tokens = (fields.get(name) for name in ("logvar", "text", "tokens"))
    if meta is not None and not isinstance(meta, dict):
        yield "meta is not an object"
        meta = None
    values = meta or {}
    if values.get("clip", clip_key_of(key)) != clip_key_of(key):
        yield f"meta names the clip {values['clip']!r}"
    times = values.get("times")
    if latents is not None and isinstance(times, list) and len(times) != len(latents):
        yield f"{len(latents)} frames of latents, {len(times)} times"
    if pixels is not None and latents is not None and len(pixels) != len(latents):
        yield f"{len(latents)} frames of latents, {len(pixels)} of pixels"
    if logvar is not None and latents is not None and logvar.shape != latents.shape:
        yield f"latents of shape {latents.shape}, their log variance of {logvar.shape}"
    if text is not None and tokens is not None and len(text) != len(tokens):
        yield f"{len(tokens)} tokens, text features of {len(text)}"
    if pixels is None:
        return
    if first is not None and not (len(pixels) and np.array_equal(pixels[0], first)):
        yield "the first frame is not that of the pixels"
    sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
    if values.get("pixels_sha256", sha256) != sha256:
        yield "the pixels are not those that were encoded (pixels_sha256)"
