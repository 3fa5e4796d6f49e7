"""Which metric sees which fault: windows of drawn or real clips against themselves, spoiled in many ways.

    python -m benchmarks.sensitivity --drawn 32 [--output FOLDER]
    python -m benchmarks.sensitivity --clips manifest.csv [--windows 4] [--output FOLDER]

Windows are 8 frames at 4 fps, so that clips of two seconds give one. `none` is the fault-free control: the same windows
an eighth of a second later, other frames of the same motion. Drawn clips have a second one, `other motion`: the same
first frame, and the shape moves another way, as a good model may do. Only drawn clips know their shape, so only theirs
is swapped or gets a texture. A fault is *seen* by a metric where the 95 % interval of
its difference from `none`, paired by source video, excludes 0, or a Frechet distance lies above its floor, one half of
the real videos against the other. Prints a Markdown table; with `--output` writes
sensitivity.md and sensitivity.json. Without official files the extractors are the fixed random nets.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from tasks.ingest.drawing import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Scene, draw_clip, draw_frame, draw_scene
from tasks.metrics.alignment import alignment
from tasks.metrics.consistency import consistency_curve
from tasks.metrics.extractors.extractor import NOT_COMPARABLE
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.loading import load_extractors
from tasks.metrics.frechet import FeatureSet, frechet_floor, frechet_to_real, paired_frechet_difference
from tasks.metrics.pixels import clip_distance, flicker, motion_magnitude, smoothness_residual, ssim_curve
from tasks.metrics.statistics import (
    Estimate,
    disjoint_parts,
    mean_over_clips,
    paired_difference,
    ratio_of_sums,
    unique_clips,
)
from tasks.video.decode import ClipError, read_windows

FRAMES, FPS = 8, 4
DENSE_FRAMES = 2 * FRAMES  # a window is read at twice the rate: its even frames are the real clip
SIZE, DRAWN_SIZE = 128, 64
FIRST_SEED = 3_000_000  # of the drawn scenes

Pixels = NDArray[np.uint8]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Window:
    """Frames [16, H, W, 3] at 8 fps of one video, and of a drawn one its scene."""

    clip: str
    dense: Pixels
    scene: Scene | None = None

    @property
    def real(self) -> Pixels:
        return self.dense[::2]


def _blurred(frame: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(2)))


def _shuffled(window: Window, random: np.random.Generator) -> Pixels:
    return window.real[[0, *(1 + random.permutation(FRAMES - 1))]]


def _flickering(window: Window, random: np.random.Generator) -> Pixels:
    return _scaled(window.real, np.concatenate([[1.0], random.uniform(0.9, 1.1, FRAMES - 1)])[:, None])


def _drifting(window: Window, _: np.random.Generator) -> Pixels:
    """Red by 3 % more in every frame, blue by 3 % less."""
    return _scaled(window.real, 1 + 0.03 * np.arange(FRAMES)[:, None] * np.array([1, 0, -1]))


def _scaled(pixels: Pixels, gains: NDArray[np.float64]) -> Pixels:
    """Each frame and channel times its gain, [F, 1 or 3]."""
    return np.clip(np.rint(pixels * gains[:, None, None]), 0, 255).astype(np.uint8)


def _shimmering(window: Window, random: np.random.Generator) -> Pixels:
    """Soft blobs, other ones in each frame: a standard deviation of six grey levels."""
    frames = [window.real[0]]
    for frame in window.real[1:]:
        height, width = frame.shape[:2]
        coarse = random.normal(0, 6, (height // 4, width // 4, 3)).astype(np.float32)
        noise = np.stack(
            [np.asarray(Image.fromarray(c).resize((width, height))) for c in coarse.transpose(2, 0, 1)], -1
        )
        frames.append(np.clip(np.rint(frame + noise), 0, 255).astype(np.uint8))
    return np.stack(frames)


def _drawn(scene: Scene) -> Pixels:
    return np.stack([draw_frame(scene, k / FPS, DRAWN_SIZE) for k in range(FRAMES)])


def _other_motion(window: Window, _: np.random.Generator) -> Pixels:
    """At right angles to the true one, towards the middle, where there is room."""
    assert window.scene is not None
    x, y = window.scene.start_xy
    turned = ("down" if y < 0.5 else "up") if DIRECTIONS[window.scene.direction][0] else "right" if x < 0.5 else "left"
    return _drawn(replace(window.scene, direction=turned))


def _swapped(window: Window, _: np.random.Generator) -> Pixels:
    """The shape becomes the next one over the first half of the clip."""
    assert window.scene is not None
    to = _drawn(replace(window.scene, shape=SHAPES[(SHAPES.index(window.scene.shape) + 1) % len(SHAPES)]))
    part = np.minimum(np.arange(FRAMES) / (FRAMES // 2), 1)[:, None, None, None]
    return np.rint(window.real * (1 - part) + to * part).astype(np.uint8)


def _textured(window: Window, _: np.random.Generator) -> Pixels:
    """From frame 2 on the shape has stripes that move with it."""
    assert window.scene is not None
    plain = replace(window.scene, colour="white", background=((0.0,) * 3,) * 2)
    cover = _drawn(plain) / float(max(COLOURS["white"]))
    dx, dy = DIRECTIONS[window.scene.direction]
    steps = SPEEDS[window.scene.speed] / 100 * DRAWN_SIZE / FPS * np.arange(FRAMES)[:, None, None]
    y, x = np.mgrid[:DRAWN_SIZE, :DRAWN_SIZE]
    dark = ((x - dx * steps + y - dy * steps) // 4 % 2)[..., None] * 0.5 * cover
    dark[0] = 0
    return np.rint(window.real * (1 - dark)).astype(np.uint8)


# Window -> clip [8, H, W, 3]. The given frame, the first, is left as it is but by the blur.
FAULTS: dict[str, Callable[[Window, np.random.Generator], Pixels]] = {
    "none": lambda window, _: window.dense[1::2],
    "frozen": lambda window, _: np.repeat(window.dense[:1], FRAMES, axis=0),
    "half speed": lambda window, _: window.dense[:FRAMES],
    "shuffled": _shuffled,
    "flicker": _flickering,
    "blurred": lambda window, _: np.stack([_blurred(frame) for frame in window.real]),
    "shimmer": _shimmering,
    "colour drift": _drifting,
}
OF_DRAWN: dict[str, Callable[[Window, np.random.Generator], Pixels]] = {
    "other motion": _other_motion,
    "shape swapped": _swapped,
    "texture replaced": _textured,
}
# The metrics whose business a fault is: each of them must see it.
EXPECTED = {
    "frozen": ("motion_ratio", "consistency", "rfd-motion"),
    "half speed": ("motion_ratio", "consistency"),
    "shuffled": ("flicker_ratio", "smoothness_ratio", "warp_error"),
    "flicker": ("flicker_ratio", "smoothness_ratio", "rfd-motion"),
    "blurred": ("ssim", "rfd-app"),
    "shimmer": ("warp_error",),
    "colour drift": ("part_distance",),
    "shape swapped": ("part_distance", "photo_error"),
    "texture replaced": ("part_distance",),
}


@dataclass(frozen=True)
class Cell:
    """A metric of one row, its paired difference from `none`, and whether the fault is seen (None: not asked)."""

    value: Estimate
    difference: Estimate | None = None
    seen: bool | None = None


@dataclass(frozen=True)
class Sensitivity:
    """cells[row][metric] of `none` and the faults, floors[metric] of one half of the real videos against the other."""

    windows: int
    clips: int
    size: int
    judges: dict[str, str]
    floors: dict[str, float | None]
    cells: dict[str, dict[str, Cell]]

    def unseen(self) -> list[str]:
        """The faults that a metric in charge of them misses, as "fault: metric"."""
        return [
            f"{fault}: {metric}"
            for fault, metrics in EXPECTED.items()
            for metric in metrics
            if fault in self.cells and not self.cells[fault][metric].seen
        ]


def read(table: Path, windows: int) -> Iterator[Window]:
    """The windows of each video of a WebVid-style table that is long enough."""
    for row in csv.DictReader(table.read_text().splitlines(keepends=True)):
        try:
            clips = read_windows(table.parent / row["contentUrl"], DENSE_FRAMES, 2 * FPS, SIZE, windows)
        except ClipError:
            continue
        yield from (Window(row["videoid"], clip.pixels) for clip in clips)


def draw(number: int) -> Iterator[Window]:
    """A window of each of as many drawn scenes."""
    for seed in range(FIRST_SEED, FIRST_SEED + number):
        dense, _ = draw_clip(seed, DRAWN_SIZE, 2 * FPS, DENSE_FRAMES / (2 * FPS))
        yield Window(str(seed), dense, draw_scene(seed))


def measure(windows: Sequence[Window], seed: int = 0) -> Sensitivity:
    """Spoils each window in every way and compares it with itself."""
    clips = [window.clip for window in windows]
    faults = FAULTS | (OF_DRAWN if all(window.scene for window in windows) else {})
    tower, appearance, motion = load_extractors(ExtractorFiles())

    def judged(pixels: Pixels, truth: Pixels) -> Arrays:
        numbers = {
            "motion_ratio": motion_magnitude(pixels),
            "flicker_ratio": flicker(pixels),
            "smoothness_ratio": smoothness_residual(pixels),
            "consistency": consistency_curve(tower.features(pixels, "")["clip_frames"])[-1],
            "ssim": ssim_curve(pixels, truth)[1:].mean(),
            "clip_distance": clip_distance(pixels, truth),
            **asdict(alignment(pixels, truth)),
        }
        return {name: np.array(value) for name, value in numbers.items()} | {
            "rfd-app": appearance.features(pixels, "")["rfd_app"],
            "rfd-motion": motion.features(pixels, "")["rfd_motion"],
        }

    columns: dict[str, Arrays] = {}
    real = [window.real for window in windows]
    for row in ("real", *faults):
        random = np.random.default_rng(seed)
        made = real if row == "real" else [faults[row](window, random) for window in windows]
        each = [judged(pixels, truth) for pixels, truth in zip(made, real, strict=True)]
        columns[row] = {name: np.stack([arrays[name] for arrays in each]) for name in each[0]}

    floors = {name: _floor(name, values, clips) for name, values in columns["real"].items()}
    cells = {row: {name: _cell(name, row, columns, clips, floors[name]) for name in columns[row]} for row in faults}
    named = zip(("consistency", "rfd-app", "rfd-motion"), (tower, appearance, motion), strict=True)
    extractors = {name: extractor.info.metric for name, extractor in named}
    return Sensitivity(len(clips), unique_clips(clips), real[0].shape[1], extractors, floors, cells)


def _floor(name: str, real: NDArray[Any], clips: list[str]) -> float | None:
    if name in ("ssim", "clip_distance"):
        return None  # are measured against the same clip, so real against real says nothing
    if name.startswith("rfd-"):
        return frechet_floor(_features(real, clips))
    first, second = (real[part].mean() for part in disjoint_parts(clips, 2))
    return float(abs(first / second - 1) if name.endswith("_ratio") else abs(first - second))


def _cell(name: str, row: str, columns: dict[str, Arrays], clips: list[str], floor: float | None) -> Cell:
    values, none, real = (columns[key][name] for key in (row, "none", "real"))
    if name.startswith("rfd-"):
        sets = [_features(x, clips) for x in (values, none, real)]
        distance, control = (frechet_to_real(x, sets[2]) for x in sets[:2])
        value = Estimate(distance.value)
        difference = paired_frechet_difference(distance, control, sets[2].clusters)
    elif name.endswith("_ratio"):
        value = ratio_of_sums(values, real, clips)
        difference = paired_difference(values, none, clips, real)
    else:
        value = mean_over_clips(values, clips)
        difference = paired_difference(values, none, clips)
    if row == "none":
        return Cell(value)
    assert difference.ci_low is not None and difference.ci_high is not None, "one source video has no interval"
    apart = not difference.ci_low <= 0 <= difference.ci_high
    return Cell(value, difference, apart or (name.startswith("rfd-") and floor is not None and value.value > floor))


def _features(values: NDArray[Any], clips: list[str]) -> FeatureSet:
    """Features [N, F, d] of clips as rows of frames."""
    return FeatureSet.of(values.reshape(-1, values.shape[-1]), [clip for clip in clips for _ in range(values.shape[1])])


def markdown(result: Sensitivity) -> str:
    """The table: **bold** where the fault is seen, the paired difference from `none` with its interval beneath."""
    metrics = list(result.floors)

    def shown(cell: Cell) -> str:
        value = f"{cell.value.value:.4g}"
        if cell.difference is None:
            return value
        d = cell.difference
        return f"{f'**{value}**' if cell.seen else value}<br>{d.value:+.3g} ({d.ci_low:+.3g}, {d.ci_high:+.3g})"

    lines = [
        "| fault | " + " | ".join(metrics) + " | in charge |",
        "|---" * (len(metrics) + 2) + "|",
        *(
            f"| {row} | "
            + " | ".join(shown(cells[name]) for name in metrics)
            + f" | {', '.join(EXPECTED.get(row, ()))} |"
            for row, cells in result.cells.items()
        ),
        "| floor: real, half against half | "
        + " | ".join("-" if floor is None else f"{floor:.4g}" for floor in result.floors.values())
        + " | |",
    ]
    extractors = "; ".join(f"{column} is {metric}" for column, metric in result.judges.items())
    notes = [
        f"{result.windows} windows of {result.clips} videos, {FRAMES} frames at {FPS} fps, {result.size} pixels.",
        "Bold: the fault is seen, that is the 95 % interval of the difference from `none` (beneath, paired by source "
        "video) excludes 0, or an rfd-* value is above its floor. `none`: the same windows 1/8 s later.",
        "*_ratio: to real (motion: mean absolute frame difference; flicker: energy of the second difference; "
        "smoothness: frames against the mean of their neighbours, a proxy). ssim, clip_distance: frames 2 to the "
        "last against real, so they also see `other motion`. warp_error, photo_error, part_distance: root mean "
        "squares after optical flow, against the next frame and the given one.",
        "Floor: two halves of the real videos; of a ratio its distance from 1, of consistency the difference. So few "
        "videos differ more in what they show than by a fault: unpaired, a fault below the floor would go unseen.",
        f"{extractors}: fixed random nets, {NOT_COMPARABLE}.",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clips", type=Path, help="a WebVid-style table next to its videos")
    source.add_argument("--drawn", type=int, help="draw as many scenes")
    parser.add_argument("--windows", type=int, default=4, help="at most so many of one video")
    parser.add_argument("--output", type=Path, help="a folder for sensitivity.md and sensitivity.json")
    given = parser.parse_args()
    if given.clips and not given.clips.is_file():
        raise SystemExit(f"no table of clips at {given.clips}; nothing was measured")
    result = measure(list(read(given.clips, given.windows) if given.clips else draw(given.drawn)))
    print(markdown(result))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "sensitivity.md").write_text(markdown(result))
        (given.output / "sensitivity.json").write_text(json.dumps(asdict(result), indent=2))
    if result.unseen():
        raise SystemExit(f"not seen: {'; '.join(result.unseen())}")


if __name__ == "__main__":
    main()
