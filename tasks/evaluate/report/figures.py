"""The pictures of an evaluation: curves (Figure 4), strips of four frames (Figure 5), videos of all methods at once."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tasks.evaluate.report.aggregate import Summary
from tasks.evaluate.report.tables import consistency_extractor, label
from tasks.evaluation_record import BASE, FROZEN, REAL, TRIP
from tasks.metrics.extractors.extractor import NOT_COMPARABLE, ExtractorInfo
from tasks.pages import ACCENT, BLUE, INK, PAPER

STRIP_FRAMES = 4
COLOURS = {FROZEN: "#8e8e93", TRIP: ACCENT, REAL: BLUE}
OTHER_COLOURS = ("#0f766e", "#7c3aed", "#a16207", "#be185d")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Example:
    """One clip to look at: real and generated uint8 [F, H, W, 3], the latter as the user gets it; others' by row."""

    key: str
    caption: str
    real: Pixels
    generated: Pixels
    others: dict[str, Pixels] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Pixels]:
        """What moves, by row: the real clip and every method's."""
        before = {name: pixels for name, pixels in self.others.items() if name == BASE}
        return {REAL: self.real, **before, TRIP: self.generated, **self.others}


@dataclass(frozen=True)
class _Curve:
    """How one of the summary's curves is drawn; `first` is the place of its first point."""

    title: str
    along: str
    unit: str
    first: int
    by_extractor: bool = False


_CURVES = {
    "consecutive": _Curve("Frame consistency", "number of frames", "%", 2, by_extractor=True),
    "lag": _Curve("Likeness of two frames", "frames apart", "100 x cosine", 1, by_extractor=True),
    "psnr": _Curve("PSNR to the true frame", "frame", "dB", 1),
    "ssim": _Curve("SSIM to the true frame", "frame", "SSIM", 1),
}
CURVE_FILES = {"consecutive": "consistency.png", "lag": "lag.png", "psnr": "psnr.png", "ssim": "ssim.png"}


def curve_title(name: str) -> str:
    return _CURVES[name].title


def colours_of(rows: Sequence[str]) -> dict[str, str]:
    """A colour of its own for every row; those of other methods come again after four."""
    others = [row for row in rows if row not in COLOURS]
    return COLOURS | {row: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, row in enumerate(others)}


def curve_png(summary: Summary, extractors: Sequence[ExtractorInfo], name: str) -> bytes:
    """One of the summary's curves for all rows that have it, with the interval as a band; "consecutive" is Figure 4."""
    from matplotlib.figure import Figure

    how, curves, colours = _CURVES[name], summary.curves[name], colours_of(summary.rows)
    extractor = consistency_extractor(extractors)
    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for row in (row for row in summary.rows if row in curves):
        points = curves[row]
        along = np.arange(how.first, how.first + len(points))
        values = [point.value for point in points]
        # Dashed where another curve may lie on the very same values.
        axes.plot(along, values, "--" if row == FROZEN else "-", color=colours[row], lw=2, label=label(row))
        low = [point.value if point.ci_low is None else point.ci_low for point in points]
        high = [point.value if point.ci_high is None else point.ci_high for point in points]
        axes.fill_between(along, low, high, color=colours[row], alpha=0.15, lw=0)
        axes.set_xticks(along[:: max(1, len(along) // 8)])
    remark = f"\n{NOT_COMPARABLE}" if how.by_extractor and not extractor.official else ""
    axes.set(xlabel=how.along, ylabel=f"{extractor.metric}, {how.unit}" if how.by_extractor else how.unit)
    axes.set_title(f"{how.title}, {summary.clips} clips{remark}", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def strip_png(example: Example) -> bytes:
    """Four frames of a clip, evenly spread, under its caption; a row each for real, every method and a still."""
    count, height, width = example.real.shape[:3]
    scale, gap, head = _scale(min(height, width)), 4, 66
    picked = np.linspace(0, count - 1, min(STRIP_FRAMES, count)).round().astype(int)
    rows = {**example.methods, FROZEN: np.repeat(example.real[:1], count, axis=0)}
    colours = colours_of(list(rows))
    large, small = ImageFont.load_default(26), ImageFont.load_default(20)
    name_width = 14 + min(240, math.ceil(max(large.getlength(_short(row)) for row in rows)))
    cell_w, cell_h = width * scale + gap, height * scale + gap
    strip = Image.new("RGB", (name_width + len(picked) * cell_w, head + len(rows) * cell_h), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((4, 4), _fitted(draw, example.caption, large, strip.width - 8), INK, font=large)
    for column, frame in enumerate(picked):
        draw.text((name_width + column * cell_w, head - 26), f"frame {frame + 1}", INK, font=small)
    for line, (row, pixels) in enumerate(rows.items()):
        y = head + line * cell_h
        name = _fitted(draw, _short(row), large, name_width - 8)
        draw.text((4, y + cell_h // 2 - 16), name, colours[row], font=large)
        for column, frame in enumerate(picked):
            strip.paste(Image.fromarray(_enlarge(pixels[frame], scale)), (name_width + column * cell_w, y))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def side_by_side(example: Example) -> Pixels:
    """The real clip and every method in one picture, so that all play in step: uint8 [F, H, W, 3], sides times 32.

    Each stands below its name, two or four in lines of two, others in lines of three. A codec works in blocks; other
    sizes it pads, and the padding bleeds into the picture's edge.
    """
    clips = example.methods
    colours, columns = colours_of(list(clips)), 2 if len(clips) in (2, 4) else 3
    count = len(example.real)
    scale = _scale(min(example.real.shape[1:3]))
    height, width = (side * scale for side in example.real.shape[1:3])
    strip, gap, font = 28, 8, ImageFont.load_default(20)
    lines = math.ceil(len(clips) / columns)
    sides = lines * (height + strip), columns * width + (columns - 1) * gap
    canvas = Image.new("RGB", (_block(sides[1]), _block(sides[0])), PAPER)
    draw = ImageDraw.Draw(canvas)
    corners = [(i // columns * (height + strip), i % columns * (width + gap)) for i in range(len(clips))]
    for (top, left), row in zip(corners, clips, strict=True):
        draw.text((left + 4, top + 2), _fitted(draw, _short(row), font, width - 8), colours[row], font=font)
    frames = np.repeat(np.asarray(canvas)[None], count, axis=0)
    for (top, left), pixels in zip(corners, clips.values(), strict=True):
        large = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
        frames[:, top + strip : top + strip + height, left : left + width] = large
    return frames


def _block(side: int) -> int:
    return -(-side // 32) * 32


def _short(row: str) -> str:
    return {BASE: "not trained", TRIP: "TRIP", REAL: "real", "champion": "champion"}.get(row, row)


def _scale(size: int) -> int:
    """Whole steps of enlargement, so that small demo frames are seen pixel by pixel and large ones stay as they are."""
    return max(1, round(192 / size))


def _enlarge(frame: Pixels, scale: int) -> Pixels:
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
