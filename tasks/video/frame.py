"""Converts a decoded frame to upright RGB of a frame size: applies colour, transparency, pixel aspect and rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from tasks.video.colour import Colour, colour_of, to_bt709
from tasks.video.frame_sizes import FrameSize, nearest_frame_size
from trip_model.config import Fit
from trip_model.images import crop_box

# Expands luma 16..235 to 0..255; swscale does so for colour but treats every gray frame as full range.
_SPREAD = ((np.arange(256) - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8)


class Framing:
    """How the frames of one video become pixels: the first frame decides the frame size of all of them.

    Args:
        sizes: the frame sizes to choose from, by the aspect ratio at which the frame is displayed.
        aspect: a pixel's width over its height.
        fit: how a frame fills its frame size.
    """

    def __init__(self, sizes: Sequence[FrameSize], aspect: float, fit: Fit = "crop") -> None:
        self.aspect = aspect
        self._sizes = sizes
        self._fit: Fit = fit
        self._size: FrameSize | None = None
        self._reformatter = VideoReformatter()

    def pixels(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns a frame as `to_pixels` does."""
        return to_pixels(frame, self._chosen(frame), self.aspect, self._reformatter, self._fit)

    def box(self, frame: av.VideoFrame) -> tuple[int, int, int, int]:
        """Returns how a frame is resized and cropped, as `frame_box` does."""
        return frame_box(frame, self._chosen(frame), self.aspect, self._fit)

    def _chosen(self, frame: av.VideoFrame) -> FrameSize:
        if self._size is None:
            width, height = max(1, round(frame.width * self.aspect)), frame.height
            displayed = (height, width) if _is_on_its_side(frame) else (width, height)
            self._size = nearest_frame_size(self._sizes, displayed[0] / displayed[1])
        return self._size


def frame_box(frame: av.VideoFrame, size: FrameSize, aspect: float, fit: Fit = "crop") -> tuple[int, int, int, int]:
    """Returns `crop_box` of a frame with pixel aspect ratio `aspect`, before its rotation; all of it under "squash"."""
    width, height = size[::-1] if _is_on_its_side(frame) else size
    if fit == "squash":
        return width, height, 0, 0
    return crop_box(max(1, round(frame.width * aspect)), frame.height, (height, width))


# Without both options swscale converts even widths with a table that is 1 to 3 levels too dark. It writes planes in
# less time than packed pixels, with the same values.
_ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def to_square(
    frame: av.VideoFrame, size: int, aspect: float, reformatter: VideoReformatter, fit: Fit = "crop"
) -> np.ndarray:
    """Converts a decoded frame to uint8 [size, size, 3] as `to_pixels` does."""
    return to_pixels(frame, FrameSize(size, size), aspect, reformatter, fit)


def to_pixels(
    frame: av.VideoFrame, size: FrameSize, aspect: float, reformatter: VideoReformatter, fit: Fit = "crop"
) -> np.ndarray:
    """Converts a decoded frame to uint8 [H, W, 3] of a frame size; `aspect` is a pixel's width over its height.

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
    sides = size[::-1] if _is_on_its_side(frame) else size
    part = slice(top, top + sides[1]), slice(left, left + sides[0])
    if colour.conversion:
        pixels = to_bt709(scaled.to_ndarray()[part] / 65535, colour)
    else:
        pixels = _interleaved(scaled, part)
        if gray and not full:
            pixels = _SPREAD[pixels]
    # The crop is centred or the entire frame, so rotation and crop commute.
    return np.ascontiguousarray(_upright(pixels, frame))


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


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Returns (a, b, c, d) of the container's display matrix: x' = a x + c y, y' = b x + d y."""
    side_data: Any = frame.side_data  # its type stub allows only string keys
    try:
        matrix = side_data[Type.DISPLAYMATRIX]
    except KeyError:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return a, b, c, d


def _is_on_its_side(frame: av.VideoFrame) -> bool:
    """Returns whether the display matrix turns the frame by about a quarter."""
    a, b, _, _ = _display_matrix(frame)
    return abs(b) > abs(a)


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Rotates and mirrors pixels [H, W, 3] by the container's display matrix, to the nearest quarter turn."""
    a, b, c, d = _display_matrix(frame)
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
