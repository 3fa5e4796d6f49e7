"""Filters: scores of a window's frames, and which windows they exclude from the data set.

A track is one long window: a fault anywhere excludes all of it (docs/decisions/tracks.md).
The decoder processes compute the scores (`read_measured`), the encoder process applies the bounds (`Screen`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from tasks.encode.hooks import check_name, load_scorer
from tasks.encode.scorers import SHIPPED
from tasks.encode.spec import FilterSpec
from tasks.records import UserError
from tasks.video.decode import Clip, ClipError, read_shots, read_spans, read_track, read_windows

VERSION = 2  # part of the fingerprint; increases when the definition of a score changes
GRID = 32  # cells per side of a frame; averaging over them removes noise and compression
# By reason, in the order of the checks: the bound in FilterSpec, whose second half is the name of the score.
REASONS = {
    "low_resolution": "least_side",
    "dark_start": "least_brightness",
    "faded_start": "least_contrast",
    "letterbox": "most_bars",
    "hard_cut": "most_cut",
    "near_static": "least_motion",
    "watermark": "most_watermark",
    "unsafe": "most_unsafe",
    "overlaid_text": "most_text",
}
# Scores of functions that a recipe names, in the order of their calls: by score, the field with the function.
SCORERS = {"watermark": "watermark_scorer", "unsafe": "unsafe_scorer", "text": "text_scorer"}
SCORES = ("side", "brightness", "contrast", "bars", "cut", "motion")
_BLACK = 32  # of 255: the brightest pixel of a bar after compression
_PLAIN = 0.01  # standard deviation of the luma of a plain colour, at most
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Window:
    """A window that passes the filters: its position among the windows of the clip, and what they add to its meta."""

    position: int
    clip: Clip
    meta: dict[str, Any] = field(default_factory=dict)


def check_filters(spec: FilterSpec) -> None:
    """Raises UserError for a bound outside the range of its score, a bound without its scorer, and missing weights."""
    for bound in REASONS.values():
        value, most = getattr(spec, bound), 100_000 if bound == "least_side" else 1
        if value is not None and not 0 <= value <= most:
            raise UserError(f"filters.{bound} {value}, expected a number from 0 to {most}")
    for score, scorer in SCORERS.items():
        name, bound = getattr(spec, scorer), f"most_{score}"
        if getattr(spec, bound) is not None and name is None:
            raise UserError(f"filters.{bound} needs a scorer; name it in filters.{scorer} (module:function)")
        check_name(f"filters.{scorer}", name)
        if name in SHIPPED:
            try:
                SHIPPED[name].path()
            except UserError as error:
                raise UserError(f"filters.{scorer} {name}: {error}") from error


def scores(pixels: np.ndarray, info: dict[str, Any]) -> dict[str, float]:
    """Returns the scores of one window, rounded to 4 digits; all but `side` lie between 0 and 1.

    side: shorter side of the displayed video in pixels, before resizing.
    brightness: 95th percentile of the luma of the first frame. 0 is black.
    contrast: standard deviation of the first frame's luma, relative to the median over the window, at most 1. Near 0
        the window fades in from a plain colour. 1 for a window that stays plain.
    bars: share of the frame's height, or width, under black bars on both sides that last for the entire window.
    cut: how much more the frame changes between two neighbouring frames than just before and after them.
    motion: mean over frames of the 99th percentile of the change from frame to frame.

    Args:
        pixels: uint8 [F, H, W, 3].
        info: `width`, `height` and `pixel_aspect` from the decoder.
    """
    cells = _cells(pixels)
    luma = cells @ _LUMA
    spread = luma.std(axis=(1, 2))
    quarters = luma.reshape(len(luma), GRID // 2, 2, GRID // 2, 2).mean(axis=(2, 4))
    change = np.abs(np.diff(quarters, axis=0))
    measured = {
        "side": min(info["width"] * info["pixel_aspect"], info["height"]),
        "brightness": np.percentile(luma[0], 95),
        "contrast": min(1.0, spread[0] / median) if (median := np.median(spread)) > _PLAIN else 1.0,
        "bars": _bars(pixels),
        "cut": _cut(cells),
        "motion": np.percentile(change, 99, axis=(1, 2)).mean(),
    }
    return {name: round(float(value), 4) for name, value in measured.items()}


def picture_hash(pixels: np.ndarray) -> str | None:
    """Returns a 64-bit perceptual hash of a window as 16 hex digits; None if the mean frame is a plain colour.

    The bits are the signs of 32 low DCT frequencies of the mean frame, and of 32 of the difference between the means of
    the second and the first half of the frames, which distinguishes takes of one camera. Brightness, size and encoding
    change few bits.
    """
    luma = _cells(pixels) @ _LUMA
    mean, half = luma.mean(axis=0), len(luma) // 2
    if mean.std() < _PLAIN:
        return None
    waves = np.cos(np.pi / GRID * np.outer(np.arange(9), np.arange(GRID) + 0.5))
    bits = [waves[:4] @ part @ waves[1:].T > 0 for part in (mean, luma[half:].mean(axis=0) - luma[:half].mean(axis=0))]
    return np.packbits(bits).tobytes().hex()


def read_measured(source: bytes, **grid: Any) -> list[Clip]:
    """Returns the clips of a reader of whole videos with their scores and hash in the info; runs in a decoder."""
    reader = read_track if "longest" in grid else read_shots if "shots" in grid else read_windows
    return list(map(_measured, reader(source, **grid)))


def read_measured_spans(source: bytes, **grid: Any) -> list[list[Clip] | ClipError]:
    """Returns the clips of `read_spans` as `read_measured` does."""
    return [part if isinstance(part, ClipError) else list(map(_measured, part)) for part in read_spans(source, **grid)]


class Screen:
    """Selects the windows of a clip that pass the filters.

    Raises:
        UserError: a scorer cannot be imported.
    """

    def __init__(self, spec: FilterSpec) -> None:
        self._spec, self._enabled = spec, bool(spec.chosen())
        named = {score: getattr(spec, field) for score, field in SCORERS.items()}
        self._scorers = {score: load_scorer(name, score) for score, name in named.items() if name is not None}

    def __call__(self, clips: list[Clip]) -> list[Window]:
        """Returns the windows that pass, with their positions; `meta["dropped"]` gives the reasons of the others.

        Raises:
            ClipError: no window passes; the reason is that of the first. UserError: a scorer failed.
        """
        if not self._enabled:
            return [Window(position, clip) for position, clip in enumerate(clips)]
        kept: list[Window] = []
        dropped: dict[str, str] = {}
        for position, measured in enumerate(clips):
            clip, values, picture = _split_info(measured)
            reason = self._failure_reason(values)
            for score, scorer in self._scorers.items():
                if reason is None:
                    values[score] = scorer(clip.pixels)
                    reason = self._failure_reason(values)
            if reason is None:
                kept.append(Window(position, clip, {"scores": values, "picture_hash": picture, "dropped": dropped}))
            else:
                bound, score = REASONS[reason].split("_")
                limit = getattr(self._spec, REASONS[reason])
                dropped[str(position)] = f"{reason}: {score} {values[score]:g}, expected at {bound} {limit:g}"
        if not kept:
            first, detail = dropped["0"].split(": ", 1)
            raise ClipError(first, detail if len(clips) == 1 else f"{detail}; none of {len(clips)} windows passes")
        return kept

    def _failure_reason(self, values: dict[str, float]) -> str | None:
        """Returns the first bound that a window violates, as a reason. Missing scores pass."""
        for reason, name in REASONS.items():
            limit, (bound, score) = getattr(self._spec, name), name.split("_")
            if limit is None or score not in values:
                continue
            if values[score] < limit if bound == "least" else values[score] > limit:
                return reason
        return None


def _measured(clip: Clip) -> Clip:
    return replace(clip, info=clip.info | {"measured": [scores(clip.pixels, clip.info), picture_hash(clip.pixels)]})


def _cells(pixels: np.ndarray) -> np.ndarray:
    """Returns frames as float64 [F, GRID, GRID, 3] from 0 to 1; each cell is the mean of its pixels."""
    size = (GRID, GRID)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in pixels]) / 255


def _bars(pixels: np.ndarray) -> float:
    black = pixels.max(axis=0).max(axis=-1) <= _BLACK
    shares = []
    for lines in (black, black.T):
        reach = len(lines) // 32 + 2  # lines behind a bar's edge within which the picture must begin: edges are blurred
        sizes = []
        for side in (lines, lines[::-1]):
            size = int(np.argmin(np.append(side.mean(axis=1) > 0.99, False)))
            # Along most of a bar's edge the picture begins; an object before a black wall has no such edge.
            behind = side[size : size + reach].all(axis=0)
            sizes.append(size if len(behind) and not behind.all() and behind.mean() < 0.5 else 0)
        shares.append(2 * min(sizes) / len(lines))
    return max(shares)


def _cut(cells: np.ndarray) -> float:
    change = np.abs(np.diff(cells, axis=0)).mean(axis=(1, 2, 3))
    around = np.pad(change, 1)
    busy = np.maximum(around[:-2], around[2:])
    return float(((change - busy) / (change + busy + 0.04)).max())


def _split_info(clip: Clip) -> tuple[Clip, dict[str, float], str | None]:
    """Returns the clip without the measured info, its scores and its hash. The reply of a decoder is not trusted."""
    info = dict(clip.info)
    try:
        values, picture = info.pop("measured")
        picture = None if picture is None else f"{int(picture, 16):016x}"
        return replace(clip, info=info), {name: float(values[name]) for name in SCORES}, picture
    except (KeyError, TypeError, ValueError) as error:
        raise ClipError("decoder_crash", f"malformed reply from the decoder process ({type(error).__name__})") from None
