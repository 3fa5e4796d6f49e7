"""Frame sizes: width and height of the frames of a sample, chosen by the aspect ratio of its video.

With one frame size a video loses whatever its aspect ratio leaves over; with several each video takes the nearest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tasks.records import UserError

MAX_SIDE = 4096  # pixels
MAX_ASPECT = 4  # longer over shorter side
ASPECTS = ((16, 9), (4, 3), (1, 1), (3, 4), (9, 16))  # of `common_frame_sizes`


class FrameSize(NamedTuple):
    """Width and height in pixels; as text `320x192`."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


def parse_frame_sizes(texts: Sequence[str]) -> tuple[FrameSize, ...]:
    """Returns the frame sizes of a recipe, the narrowest first, whatever their order.

    Raises:
        UserError: a text that is no frame size, sides out of bounds, or two of one aspect ratio.
    """
    sizes: dict[float, FrameSize] = {}
    for text in texts:
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
        if match is None:
            raise UserError(f"frame_sizes {text!r}, expected width x height in pixels, such as '320x192'")
        size = FrameSize(int(match[1]), int(match[2]))
        if max(size) > MAX_SIDE or max(size) > MAX_ASPECT * min(size):
            raise UserError(
                f"frame_sizes {text!r}, expected sides of at most {MAX_SIDE} pixels, the longer one at most"
                f" {MAX_ASPECT} times the shorter one"
            )
        if size.aspect in sizes:
            raise UserError(
                f"frame_sizes {str(sizes[size.aspect])!r} and {text!r} have one aspect ratio; give one of them"
            )
        sizes[size.aspect] = size
    return tuple(sizes[aspect] for aspect in sorted(sizes))


def check_multiples(sizes: Sequence[FrameSize], factor: int, base: object) -> None:
    """Raises UserError for a side that is no multiple of `factor`, the factor of the VAE in `base`."""
    for size in sizes:
        if size.width % factor or size.height % factor:
            near = FrameSize(*(max(factor, round(side / factor) * factor) for side in size))
            raise UserError(
                f"frame_sizes {str(size)!r}, expected multiples of {factor}, the factor of the VAE in {base}, such as"
                f" '{near}'"
            )


def nearest_frame_size(sizes: Sequence[FrameSize], aspect: float) -> FrameSize:
    """Returns the frame size whose aspect ratio is nearest in ratio; of two as near, the first."""
    # Divisions are rounded alike on every machine, logarithms are not.
    return min(sizes, key=lambda size: max(size.aspect / aspect, aspect / size.aspect))


def common_frame_sizes(size: int) -> tuple[str, ...]:
    """Returns frame sizes of about size x size pixels near the aspect ratios `ASPECTS`, as a recipe has them.

    Sides are multiples of an eighth of `size`, so that the aspect ratios are the same at every size.
    """
    step = size // 8
    sides = [[round(size * (one / other) ** 0.5 / step) * step for one, other in (a, a[::-1])] for a in ASPECTS]
    return tuple(str(FrameSize(width, height)) for width, height in sides)
