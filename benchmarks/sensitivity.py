"""Which metric sees which fault: windows of real clips against themselves, spoiled in five ways.

    python -m benchmarks.sensitivity --clips manifest.csv [--windows 4] [--output FOLDER]

Windows are 8 frames at 4 fps, so that clips of two seconds give one. `none` is the fault-free control: the same windows
an eighth of a second later, other frames of the same motion. A fault is *seen* by a metric where the 95 % interval of
its difference from `none`, paired by source video, excludes 0, or a Frechet distance lies above its floor, one half of
the real videos against the other. Prints a Markdown table; with `--output` writes
sensitivity.md and sensitivity.json. Without official files the extractors are the fixed random nets.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from tasks.metrics.consistency import consistency_curve
from tasks.metrics.extractors.extractor import NOT_COMPARABLE
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.loading import load_extractors
from tasks.metrics.frechet import FeatureSet, frechet_floor, frechet_to_real, paired_frechet_difference
from tasks.metrics.pixels import flicker, motion_magnitude, smoothness_residual, ssim_curve
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
SIZE = 128

Pixels = NDArray[np.uint8]
Arrays = dict[str, NDArray[Any]]


def _blurred(frame: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(2)))


def _shuffled(dense: Pixels, random: np.random.Generator) -> Pixels:
    return dense[::2][[0, *(1 + random.permutation(FRAMES - 1))]]


def _flickering(dense: Pixels, random: np.random.Generator) -> Pixels:
    gains = np.concatenate([[1.0], random.uniform(0.9, 1.1, FRAMES - 1)])
    return np.clip(np.rint(dense[::2] * gains[:, None, None, None]), 0, 255).astype(np.uint8)


# Dense window [16, H, W, 3] -> clip [8, H, W, 3]. The given frame, the first, is left whole but by the blur.
FAULTS: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "none": lambda dense, _: dense[1::2],
    "frozen": lambda dense, _: np.repeat(dense[:1], FRAMES, axis=0),
    "half speed": lambda dense, _: dense[:FRAMES],
    "shuffled": _shuffled,
    "flicker": _flickering,
    "blurred": lambda dense, _: np.stack([_blurred(frame) for frame in dense[::2]]),
}
# The metrics whose business a fault is: each of them must see it.
EXPECTED = {
    "frozen": ("motion_ratio", "consistency", "rfd-motion"),
    "half speed": ("motion_ratio", "consistency"),
    "shuffled": ("flicker_ratio", "smoothness_ratio", "consistency"),
    "flicker": ("flicker_ratio", "smoothness_ratio", "rfd-motion"),
    "blurred": ("ssim", "rfd-app"),
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
    judges: dict[str, str]
    floors: dict[str, float | None]
    cells: dict[str, dict[str, Cell]]

    def unseen(self) -> list[str]:
        """The faults that a metric in charge of them misses, as "fault: metric"."""
        return [
            f"{fault}: {metric}"
            for fault, metrics in EXPECTED.items()
            for metric in metrics
            if not self.cells[fault][metric].seen
        ]


def read(table: Path, windows: int) -> Iterator[tuple[str, Pixels]]:
    """(video id, dense window [16, H, W, 3]) of each video of a WebVid-style table that is long enough."""
    for row in csv.DictReader(table.read_text().splitlines(keepends=True)):
        try:
            clips = read_windows(table.parent / row["contentUrl"], DENSE_FRAMES, 2 * FPS, SIZE, windows)
        except ClipError:
            continue
        yield from ((row["videoid"], clip.pixels) for clip in clips)


def measure(windows: Sequence[tuple[str, Pixels]], seed: int = 0) -> Sensitivity:
    """Spoils each window in every way and compares it with itself."""
    clips = [clip for clip, _ in windows]
    tower, appearance, motion = load_extractors(ExtractorFiles())

    def judged(pixels: Pixels, truth: Pixels) -> Arrays:
        numbers = {
            "motion_ratio": motion_magnitude(pixels),
            "flicker_ratio": flicker(pixels),
            "smoothness_ratio": smoothness_residual(pixels),
            "consistency": consistency_curve(tower.features(pixels, "")["clip_frames"])[-1],
            "ssim": ssim_curve(pixels, truth)[1:].mean(),
        }
        return {name: np.array(value) for name, value in numbers.items()} | {
            "rfd-app": appearance.features(pixels, "")["rfd_app"],
            "rfd-motion": motion.features(pixels, "")["rfd_motion"],
        }

    columns: dict[str, Arrays] = {}
    real = [dense[::2] for _, dense in windows]
    for row in ("real", *FAULTS):
        random = np.random.default_rng(seed)
        made = real if row == "real" else [FAULTS[row](dense, random) for _, dense in windows]
        each = [judged(pixels, truth) for pixels, truth in zip(made, real, strict=True)]
        columns[row] = {name: np.stack([arrays[name] for arrays in each]) for name in each[0]}

    floors = {name: _floor(name, values, clips) for name, values in columns["real"].items()}
    cells = {row: {name: _cell(name, row, columns, clips, floors[name]) for name in columns[row]} for row in FAULTS}
    named = zip(("consistency", "rfd-app", "rfd-motion"), (tower, appearance, motion), strict=True)
    extractors = {name: extractor.info.metric for name, extractor in named}
    return Sensitivity(len(clips), unique_clips(clips), extractors, floors, cells)


def _floor(name: str, real: NDArray[Any], clips: list[str]) -> float | None:
    if name == "ssim":
        return None  # is measured against the same clip, so real against real says nothing
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
        f"{result.windows} windows of {result.clips} source videos, {FRAMES} frames at {FPS} fps, {SIZE} pixels.",
        "Bold: the fault is seen, that is the 95 % interval of the difference from `none` (beneath, paired by source "
        "video) excludes 0, or an rfd-* value is above its floor. `none`: the same windows 1/8 s later.",
        "*_ratio: to real (motion: mean absolute frame difference; flicker: energy of the second difference; "
        "smoothness: frames against the mean of their neighbours, a proxy). ssim: frames 2 to the last against real.",
        "Floor: two halves of the real videos; of a ratio its distance from 1, of consistency the difference. So few "
        "videos differ more in what they show than by a fault: unpaired, a fault below the floor would go unseen.",
        f"{extractors}: fixed random nets, {NOT_COMPARABLE}.",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="a WebVid-style table beside its videos")
    parser.add_argument("--windows", type=int, default=4, help="at most so many of one video")
    parser.add_argument("--output", type=Path, help="a folder for sensitivity.md and sensitivity.json")
    given = parser.parse_args()
    if not given.clips.is_file():
        raise SystemExit(f"no table of clips at {given.clips}; nothing was measured")
    result = measure(list(read(given.clips, given.windows)))
    print(markdown(result))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "sensitivity.md").write_text(markdown(result))
        (given.output / "sensitivity.json").write_text(json.dumps(asdict(result), indent=2))
    if result.unseen():
        raise SystemExit(f"not seen: {'; '.join(result.unseen())}")


if __name__ == "__main__":
    main()
