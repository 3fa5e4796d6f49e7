"""One decoded frame as an upright RGB square: its range, transparency, pixel shape and turn, all applied."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from trip_model.config import Fit
from trip_model.images import square_box

# Luma 16 to 235 spread over 0 to 255; the scaler does so for colour, but takes every gray frame for full.
_SPREAD = ((np.arange(256) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)


def frame_box(frame: av.VideoFrame, size: int, aspect: float, fit: Fit = "crop") -> tuple[int, int, int, int]:
    """`square_box` of a frame whose pixels are `aspect` times as wide as high; squashed, the square is all of it."""
    if fit == "squash":
        return size, size, 0, 0
    return square_box(max(1, round(frame.width * aspect)), frame.height, size)


def to_square(
    frame: av.VideoFrame, size: int, aspect: float, reformatter: VideoReformatter, fit: Fit = "crop"
) -> np.ndarray:
    """One decoded frame as uint8 [size, size, 3]; `aspect` is a pixel's width over its height.

    What is transparent lies on white, as in a photo. A frame that does not name its range has its format's usual one.
    """
    full, gray = has_full_range(frame), frame.format.name.startswith("gray")
    opaque = _on_white(frame) if any(part.is_alpha for part in frame.format.components) else frame
    width, height, left, top = frame_box(frame, size, aspect, fit)
    # The scaler's planes take a third of the time of its packed pixels, and are equal to them where it interpolates
    # chroma in full: in packed pixels it does so for odd widths alone. At the frame's own height it has other ways.
    planes = width % 2 == 1 and height != frame.height
    rgb: Any = reformatter.reformat(
        opaque,
        width=width,
        height=height,
        format="gbrp" if planes else "rgb24",
        interpolation=Interpolation.BICUBIC,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    ).to_ndarray()
    square = rgb[top : top + size, left : left + size]
    if gray and not full:
        square = _SPREAD[square]
    # The crop is centred, or all there is, so the turn of the square is the square of the turned frame.
    return np.ascontiguousarray(_upright(square, frame))


def has_full_range(frame: av.VideoFrame) -> bool:
    """Whether all of 0 to 255 carries the picture, rather than the 16 to 235 of broadcast."""
    name = frame.format.name
    if name.startswith("yuvj") or frame.format.is_rgb:
        return True
    if frame.color_range in (ColorRange.MPEG, ColorRange.JPEG):
        return frame.color_range == ColorRange.JPEG
    return name.startswith(("gray", "ya", "mono", "pal"))


def _on_white(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame without its transparency; an opaque one comes back untouched."""
    source = ColorRange.JPEG if has_full_range(frame) else ColorRange.MPEG
    # Packed pixels of an odd width would lack their last column: the scaler leaves there what the memory held.
    rgba = frame.reformat(
        format="gbrap" if frame.width % 2 else "rgba",
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
    """Turns and mirrors pixels [S, S, 3] as the container's display matrix says, to the nearest quarter turn."""
    side_data: Any = frame.side_data  # typed as if its keys were strings alone
    try:
        matrix = side_data[Type.DISPLAYMATRIX]
    except KeyError:
        return square
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        square, a, d = square.swapaxes(0, 1), c, b
    return square[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
