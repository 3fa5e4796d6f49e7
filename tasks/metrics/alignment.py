"""Whether what the given frame shows is still there in frame k: optical flow follows it through a clip.

The flow is OpenCV's DIS (Kroeger et al., ECCV 2016), which needs no weights. Every function reads uint8
[F, H, W, 3] and works on frames whose shorter side is `SIDE`; all errors are root mean squares, pixels in [0, 1].
A still clip has an error of 0 in each of them, so the target is the real clips' value, next to their motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.pixels import checked_video, same_shape

Flow = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SIDE = 128  # the shorter side of the frames that flow is computed on; smaller ones are scaled up
# Patches are matched at half of that size: sides, their distance, and how far from the flow's place they are searched.
SHRINK = 2
PATCH, STRIDE, REACH = SIDE // 4 // SHRINK, SIDE // 8 // SHRINK, SIDE // 16 // SHRINK


@dataclass(frozen=True)
class Alignment:
    """How a clip keeps what its first frame shows.

    Attributes:
        warp_error: each frame against the next one warped back by the flow between the two, visible pixels only; the
            root of E_warp (Lai et al., ECCV 2018), whose flow is FlowNet2's.
        photo_error: frame 1 against each later frame warped back by the flow between the two, visible pixels only.
        part_distance: patches of frame 1 against the best match in each later frame, near where the flow leads;
            weighted by how far each patch moves in the real clip, so that it is the moving part that counts; without
            patches that have left the frame.
    """

    warp_error: float
    photo_error: float
    part_distance: float


def alignment(pixels: Pixels, real: Pixels) -> Alignment:
    """The three errors of a clip made from the first frame of `real`, both uint8 [F >= 2, H, W, 3].

    Frame 1 counts as the given one, whatever the clip has there.

    Raises:
        ValueError: clips of another type, or of two shapes.
    """
    checked_video(pixels)
    checked_video(real)
    same_shape(pixels, real)
    frames = _scaled(np.concatenate([real[:1], pixels[1:]]))
    flows = _Flows(frames)
    own = flows.from_first()
    return Alignment(
        _warp_error(frames, flows),
        _photo_error(frames, flows, own),
        _part_distance(frames, own, _motion(_Flows(_scaled(real)))),
    )


def _opencv() -> Any:
    """OpenCV, whose stubs give every array the widest type, on one thread: a Ray worker has a share of the cores."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


class _Flows:
    """Flow between the frames of a clip, float32 [H, W, 2] as (x, y): where a pixel of one lies in another."""

    def __init__(self, frames: Sequence[Pixels]) -> None:
        cv2 = _opencv()
        self._dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._dis.setFinestScale(1)  # half of `SIDE`, which is what a frame of 64 pixels holds
        self._grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        self._last = len(frames) - 1

    @cached_property
    def forward(self) -> list[Flow]:
        """From each frame to the next one."""
        return [self.between(k, k + 1) for k in range(self._last)]

    @cached_property
    def backward(self) -> list[Flow]:
        """From each frame but the first to the one before it."""
        return [self.between(k + 1, k) for k in range(self._last)]

    def between(self, first: int, second: int, start: Flow | None = None) -> Flow:
        """The flow from one frame to another, refined from `start`."""
        return self._dis.calc(self._grey[first], self._grey[second], None if start is None else start.copy())

    def from_first(self) -> list[Flow]:
        """The flow from frame 1 to each later one, each refined from the sum of the steps up to it."""
        found = [self.forward[0]]
        for k in range(1, len(self.forward)):
            found.append(self.between(0, k + 1, _chained(found[-1], self.forward[k])))
        return found

    def to_first(self) -> list[Flow]:
        """The flow from each later frame to frame 1, likewise."""
        found = [self.backward[0]]
        for k in range(1, len(self.backward)):
            found.append(self.between(k + 1, 0, _chained(self.backward[k], found[-1])))
        return found


def _scaled(pixels: Pixels) -> list[Pixels]:
    cv2 = _opencv()
    height, width = pixels.shape[1:3]
    scale = SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return [cv2.resize(frame, size, interpolation=kernel) for frame in pixels]


def _warped(image: NDArray[Any], flow: Flow) -> NDArray[Any]:
    """The image read at x + flow(x), bilinear; its edge repeated outside."""
    cv2 = _opencv()
    place = _grid(*flow.shape[:2]) + flow
    return cv2.remap(image, place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


@lru_cache(maxsize=4)
def _grid(height: int, width: int) -> Flow:
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.stack([x, y], axis=-1)


def _square(flow: Flow) -> NDArray[np.float32]:
    return flow[..., 0] ** 2 + flow[..., 1] ** 2


def _chained(first: Flow, second: Flow) -> Flow:
    return first + _warped(second, first)


def _visible(there: Flow, back: Flow) -> NDArray[np.bool_]:
    """Pixels that are seen in both frames: the way back leads to where it came from (Sundaram et al., ECCV 2010)."""
    height, width = there.shape[:2]
    returned = _warped(back, there)
    place = _grid(height, width) + there
    inside = ((place >= 0) & (place <= np.array([width - 1, height - 1], np.float32))).all(-1)
    return inside & (_square(there + returned) < 0.01 * (_square(there) + _square(returned)) + 0.5)


def _masked_square(a: Pixels, b: Pixels, visible: NDArray[np.bool_]) -> float:
    """Mean square difference over visible pixels; 0 where none is."""
    difference = a[visible].astype(np.float32) - b[visible]
    return float(np.mean(difference**2, dtype=np.float64)) / 255**2 if difference.size else 0.0


def _warp_error(frames: Sequence[Pixels], flows: _Flows) -> float:
    pairs = zip(frames, frames[1:], flows.forward, flows.backward, strict=False)
    return float(np.sqrt(np.mean([_masked_square(a, _warped(b, f), _visible(f, g)) for a, b, f, g in pairs])))


def _photo_error(frames: Sequence[Pixels], flows: _Flows, own: Sequence[Flow]) -> float:
    rest = zip(frames[1:], own, flows.to_first(), strict=True)
    return float(np.sqrt(np.mean([_masked_square(frames[0], _warped(b, f), _visible(f, g)) for b, f, g in rest])))


def _motion(flows: _Flows) -> NDArray[np.float32]:
    """How far each pixel of frame 1 moves, the mean over the later frames: [H, W]."""
    chained = list(accumulate(flows.forward, _chained))
    return np.mean([np.hypot(flow[..., 0], flow[..., 1]) for flow in chained], axis=0)


def _part_distance(frames: Sequence[Pixels], own: Sequence[Flow], motion: NDArray[np.float32]) -> float:
    cv2 = _opencv()
    small = [cv2.resize(f, None, fx=1 / SHRINK, fy=1 / SHRINK, interpolation=cv2.INTER_AREA) for f in frames]
    rows, columns = (range(0, side - PATCH + 1, STRIDE) for side in small[0].shape[:2])
    places = np.ix_([SHRINK * y for y in rows], [SHRINK * x for x in columns])

    def means(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        """Over each patch: [rows, columns]."""
        box = (SHRINK * PATCH, SHRINK * PATCH)
        return cv2.blur(plane, box, anchor=(0, 0), borderType=cv2.BORDER_REPLICATE)[places]

    weights = means(motion)
    if not weights.any():
        weights = np.ones_like(weights)  # nothing moves in the real clip: all of the frame counts
    total = error = 0.0
    for frame, flow in zip(small[1:], own, strict=True):
        # A patch goes where its moving pixels go.
        length = np.hypot(flow[..., 0], flow[..., 1]) + np.float32(1e-6)
        right, down = (np.rint(means(length * flow[..., axis]) / means(length) / SHRINK).astype(int) for axis in (0, 1))
        for (i, y), (j, x) in product(enumerate(rows), enumerate(columns)):
            top, left = y + down[i, j], x + right[i, j]
            if 0 <= top <= rows.stop - 1 and 0 <= left <= columns.stop - 1:  # else it has left the frame
                template = small[0][y : y + PATCH, x : x + PATCH]
                error += weights[i, j] * _best_match(frame, template, top, left)
                total += weights[i, j]
    return float(np.sqrt(error / total)) if total else 0.0


def _best_match(frame: Pixels, template: Pixels, top: int, left: int) -> float:
    """The least mean square difference of a patch [P, P, 3] to those of a frame at most `REACH` from a place."""
    cv2 = _opencv()
    window = frame[max(0, top - REACH) : top + PATCH + REACH, max(0, left - REACH) : left + PATCH + REACH]
    _, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(window, template, cv2.TM_SQDIFF))
    difference = window[y : y + PATCH, x : x + PATCH].astype(np.int32) - template
    return float(np.vdot(difference, difference)) / template.size / 255**2  # the match's own sums are rounded
