"""Filters: what the frames of a window measure, and which windows are left out of the data set for it.

A track is judged as one long window: what is wrong anywhere in it leaves all of it out (docs/decisions/tracks.md).
The processes that decode measure (`read_measured`), the process that encodes judges (`Screen`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from tasks.encode.spec import FilterSpec
from tasks.records import UserError
from tasks.video.decode import Clip, ClipError, read_track, read_windows

MEASURING_READER = "tasks.encode.filters:read_measured"
VERSION = 1  # part of the recipe; goes up when a score is measured in another way
GRID = 32  # a frame is measured as this many cells a side, so that noise and compression are averaged away
# By reason, in the order in which they are asked: the bound in FilterSpec, whose second half is the score's name.
REASONS = {
    "low_resolution": "least_side",
    "dark_start": "least_brightness",
    "faded_start": "least_contrast",
    "letterbox": "most_bars",
    "hard_cut": "most_cut",
    "near_static": "least_motion",
    "watermark": "most_watermark",
}
SCORES = ("side", "brightness", "contrast", "bars", "cut", "motion")
_BLACK = 32  # of 255: the brightest that a pixel of a bar gets by compression
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Window:
    """A window that is kept: its place in the video, and what the filters say in its sample's meta."""

    place: int
    clip: Clip
    said: dict[str, Any] = field(default_factory=dict)


def check_filters(spec: FilterSpec) -> None:
    """Raises UserError for a bound that no score can have, and for a watermark filter that lacks its scorer."""
    for bound in REASONS.values():
        value, most = getattr(spec, bound), 100_000 if bound == "least_side" else 1
        if value is not None and not 0 <= value <= most:
            raise UserError(f"filters.{bound} {value}, expected a number from 0 to {most}")
    if spec.most_watermark is not None and spec.watermark_scorer is None:
        raise UserError("filters.most_watermark needs a scorer; name it in filters.watermark_scorer (module:function)")
    if spec.watermark_scorer is not None and not re.fullmatch(r"[\w.]+:\w+", spec.watermark_scorer):
        raise UserError(f"filters.watermark_scorer {spec.watermark_scorer!r}, expected module:function")


def scores(pixels: np.ndarray, info: dict[str, Any]) -> dict[str, float]:
    """The scores of one window, to 4 digits; all but `side` lie between 0 and 1.

    side: shorter side of the video as it is shown, in pixels, before anything was resized.
    brightness: of the first frame, that of its brightest twentieth. 0 is black.
    contrast: of the first frame, beside that of the window's middle one by rank. Near 0 the window fades in from a
        plain colour; 1 also where later frames have less.
    bars: share of the frame's height, or width, under black bars on both sides that stay all through the window.
    cut: how much more the picture changes between two neighbouring frames than just before and after them.
    motion: mean change from frame to frame of the liveliest hundredth of the picture.

    Args:
        pixels: uint8 [F, H, W, 3]. info: what the decoder says: `width`, `height`, `pixel_aspect`.
    """
    cells = _cells(pixels)
    luma = cells @ _LUMA
    spread = luma.std(axis=(1, 2))
    quarters = luma.reshape(len(luma), GRID // 2, 2, GRID // 2, 2).mean(axis=(2, 4))
    change = np.abs(np.diff(quarters, axis=0))
    measured = {
        "side": min(info["width"] * info["pixel_aspect"], info["height"]),
        "brightness": np.percentile(luma[0], 95),
        "contrast": min(1.0, spread[0] / max(np.median(spread), 1e-6)),
        "bars": _bars(pixels),
        "cut": _cut(cells),
        "motion": np.percentile(change, 99, axis=(1, 2)).mean(),
    }
    return {name: round(float(value), 4) for name, value in measured.items()}


def picture_hash(pixels: np.ndarray) -> str | None:
    """A 64-bit perceptual hash of a window, 16 hex digits; None for a picture that is plain, which all others are like.

    The signs of 32 low frequencies (DCT) of the frames' mean, and of as many of what the second half of the frames has
    over the first: two takes before the same camera differ in what moves. Brightness, size and encoding change little.
    """
    luma = _cells(pixels) @ _LUMA
    mean, half = luma.mean(axis=0), len(luma) // 2
    if mean.std() < 0.01:
        return None
    waves = np.cos(np.pi / GRID * np.outer(np.arange(9), np.arange(GRID) + 0.5))
    bits = [waves[:4] @ part @ waves[1:].T > 0 for part in (mean, luma[half:].mean(axis=0) - luma[:half].mean(axis=0))]
    return np.packbits(bits).tobytes().hex()


def read_measured(source: bytes, **grid: Any) -> list[Clip]:
    """`read_windows`, or `read_track`, with what is measured in the info; the reader of the processes that decode."""
    return [
        replace(clip, info=clip.info | {"measured": [scores(clip.pixels, clip.info), picture_hash(clip.pixels)]})
        for clip in (read_track if "longest" in grid else read_windows)(source, **grid)
    ]


class Screen:
    """Tells the windows of a clip that are kept from those that a filter leaves out.

    Raises:
        UserError: the watermark scorer cannot be imported.
    """

    def __init__(self, spec: FilterSpec) -> None:
        self._spec, self._on = spec, bool(spec.chosen())
        self._watermark = _load(spec.watermark_scorer) if spec.watermark_scorer else None

    def __call__(self, clips: list[Clip]) -> list[Window]:
        """The windows that are kept, each with its place among all; `dropped` in their meta says what befell the rest.

        Raises:
            ClipError: none is left; the reason is that of the first window. UserError: the watermark scorer failed.
        """
        if not self._on:
            return [Window(place, clip) for place, clip in enumerate(clips)]
        kept: list[Window] = []
        dropped: dict[str, str] = {}
        for place, measured in enumerate(clips):
            clip, found, picture = _parted(measured)
            reason = self._failing(found)
            if reason is None and self._watermark is not None:
                found["watermark"] = self._watermark(clip.pixels)
                reason = self._failing(found)
            if reason is None:
                kept.append(Window(place, clip, {"scores": found, "picture_hash": picture, "dropped": dropped}))
            else:
                bound, score = REASONS[reason].split("_")
                limit = getattr(self._spec, REASONS[reason])
                dropped[str(place)] = f"{reason}: {score} {found[score]:g}, expected at {bound} {limit:g}"
        if not kept:
            first, detail = dropped["0"].split(": ", 1)
            raise ClipError(first, detail if len(clips) == 1 else f"{detail}; none of {len(clips)} windows passes")
        return kept

    def _failing(self, found: dict[str, float]) -> str | None:
        """The first reason to leave a window out. A score that is not there yet fails nobody."""
        for reason, name in REASONS.items():
            limit, (bound, score) = getattr(self._spec, name), name.split("_")
            if limit is not None and score in found:
                if found[score] < limit if bound == "least" else found[score] > limit:
                    return reason
        return None


def _cells(pixels: np.ndarray) -> np.ndarray:
    """Frames as float64 [F, GRID, GRID, 3] between 0 and 1, each cell the mean of the pixels in it."""
    size = (GRID, GRID)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in pixels]) / 255


def _bars(pixels: np.ndarray) -> float:
    black = pixels.max(axis=0).max(axis=-1) <= _BLACK
    shares = []
    for lines in (black, black.T):
        reach = len(lines) // 32 + 2  # how soon behind its edge a picture must show: edges are blurred
        sizes = []
        for side in (lines, lines[::-1]):
            size = int(np.argmin(np.append(side.mean(axis=1) > 0.99, False)))
            # Behind a bar's edge is picture nearly all along it; an object before a black wall has no such edge.
            behind = side[size : size + reach].all(axis=0)
            sizes.append(size if len(behind) and not behind.all() and behind.mean() < 0.5 else 0)
        shares.append(2 * min(sizes) / len(lines))
    return max(shares)


def _cut(cells: np.ndarray) -> float:
    change = np.abs(np.diff(cells, axis=0)).mean(axis=(1, 2, 3))
    around = np.pad(change, 1)
    busy = np.maximum(around[:-2], around[2:])
    return float(((change - busy) / (change + busy + 0.04)).max())


def _parted(clip: Clip) -> tuple[Clip, dict[str, float], str | None]:
    """A clip as its decoder would have left it, its scores and its hash; a decoder process may say anything."""
    info = dict(clip.info)
    try:
        found, picture = info.pop("measured")
        picture = None if picture is None else f"{int(picture, 16):016x}"
        return replace(clip, info=info), {name: float(found[name]) for name in SCORES}, picture
    except (KeyError, TypeError, ValueError) as error:
        raise ClipError("decoder_crash", f"the decoder sent nonsense ({type(error).__name__})") from None


def _load(name: str) -> Callable[[np.ndarray], float]:
    """The scorer of that name, every fault of it turned into a sentence that says whose it is."""
    module, function = name.split(":")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of somebody else's raises as it is imported
        raise UserError(
            f"watermark scorer {name} cannot be imported ({_said(error)}); see that every worker has it"
        ) from error

    def score(pixels: np.ndarray) -> float:
        try:
            value = float(scorer(pixels.copy()))  # its own: what it writes there must not be encoded
        except Exception as error:  # as above
            raise UserError(f"watermark scorer {name} failed ({_said(error)}); mend it, or leave it out") from error
        if not 0 <= value <= 1:
            raise UserError(f"watermark scorer {name} returned {value}, expected a number from 0 to 1; mend it")
        return round(value, 4)

    return score


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
