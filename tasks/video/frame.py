"""Converts a decoded frame to an upright RGB square: applies colour, transparency, pixel aspect and rotation."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from tasks.video.colour import Colour, colour_of, to_bt709
from trip_model.config import Fit
from trip_model.images import square_box

# Expands luma 16..235 to 0..255; swscale does so for colour but treats every gray frame as full range.
_SPREAD = ((np.arange(256) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)


def frame_box(frame: av.VideoFrame, size: int, aspect: float, fit: Fit = "crop") -> tuple[int, int, int, int]:
    """Returns `square_box` of a frame with pixel aspect ratio `aspect`; under "squash" the box is the square."""
    if fit == "squash":
        return size, size, 0, 0
    return square_box(max(1, round(frame.width * aspect)), frame.height, size)


# Without both options swscale converts even widths with a table that is 1 to 3 levels too dark. It writes planes in
# less time than packed pixels, with the same values.
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def to_square(
    frame: av.VideoFrame, size: int, aspect: float, reformatter: VideoReformatter, fit: Fit = "crop"
) -> np.ndarray:
    """Converts a decoded frame to uint8 [size, size, 3]; `aspect` is a pixel's width over its height.

    Transparency is composited on white, as in a photo. Wide gamuts and HDR become BT.709 (`tasks.video.colour`).

    Raises:
        UnsupportedColourError: as `colour_of`.
    """
    colour = colour_of(frame)
    full, gray = colour.range == "full", frame.format.name.startswith("gray")
    opaque = _on_white(frame, colour) if any(part.is_alpha for part in frame.format.components) else frame
    width, height, left, top = frame_box(frame, size, aspect, fit)
    scaled: Any = reformatter.reformat(
        opaque,
        width=width,
        height=height,
        format="rgb48le" if colour.conversion else "gbrp",
        src_colorspace=None if opaque.format.is_rgb else colour.source_matrix,
        interpolation=_ACCURATE,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    part = slice(top, top + size), slice(left, left + size)
    if colour.conversion:
        square = to_bt709(scaled.to_ndarray()[part] / 65535, colour)
    else:
        square = _interleaved(scaled, part)
        if gray and not full:
            square = _SPREAD[square]
    # The crop is centred or the entire frame, so rotation and crop commute.
    return np.ascontiguousarray(_upright(square, frame))


def _interleaved(frame: av.VideoFrame, part: tuple[slice, slice]) -> np.ndarray:
    """Returns a part of a `gbrp` frame as RGB [H, W, 3]; `to_ndarray` would also interleave what is cut off."""
    planes: Any = frame.planes  # buffers, which their type does not say
    green, blue, red = (np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[part] for p in planes)
    return np.stack([red, green, blue], axis=-1)


def _on_white(frame: av.VideoFrame, colour: Colour) -> av.VideoFrame:
    """Composites the frame on white; returns an opaque frame unchanged."""
    source = ColorRange.JPEG if colour.range == "full" else ColorRange.MPEG
    # Planes: of packed pixels with an odd width swscale does not write the last column.
    rgba = frame.reformat(
        format="gbrap",
        interpolation=_ACCURATE,
        src_colorspace=None if frame.format.is_rgb else colour.source_matrix,
        src_color_range=source,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    ).to_ndarray()
    if rgba[..., 3].min() == 255:
        return frame
    alpha = rgba[..., 3:].astype(np.uint16)
    rgb = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(rgb.astype(np.uint8), format="rgb24")


def _upright(square: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Rotates and mirrors pixels [S, S, 3] by the container's display matrix, to the nearest quarter turn."""
    side_data: Any = frame.side_data  # its type stub allows only string keys
    try:
        matrix = side_data[Type.DISPLAYMATRIX]
    except KeyError:
        return square
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        square, a, d = square.swapaxes(0, 1), c, b
    return square[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
