"""Motion in long videos: each window of 16 of 64 frames against the first one, by both ways to make them.

    python -m benchmarks.long_motion --model runs/demo/model [--clips 16] [--frames 64] [--steps 20]

Photos and captions are drawn with seeds that no corpus of `make demo` has. The motion of a window is the mean absolute
difference of its consecutive frames; frame 1 is the decoded one, so that no step is that from photo to decoder. A seam
is the step between two windows over the mean step of its video: much over 1 is a jump, which is no motion. Intervals
are over clips. With `--least 0.5` the exit code is 1 if a window moves less than half as much as the first one.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.evaluate.report.tables import number
from tasks.ingest.drawing import draw_clip
from tasks.metrics.pixels import motion_magnitude
from tasks.metrics.statistics import Estimate, ratio_of_sums
from trip_model.images import write_video
from trip_model.pipeline import LongMode, TripPipeline, seed_generator

FIRST_SEED = 5_000_000
MODES: tuple[LongMode, ...] = get_args(LongMode)
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class LongMotion:
    """What one way to make long videos gives.

    Args:
        ratios: motion of each window over that of the first one.
        first: mean motion of the first windows, pixel values in 0 to 1.
        seam: the largest step between two windows over the mean step, mean over clips.
        seconds: processor time of a clip.
    """

    mode: str
    ratios: tuple[Estimate, ...]
    first: float
    seam: float
    seconds: float


def windows_of(clip: Pixels, window: int) -> list[Pixels]:
    """Cuts a clip into windows; the last one may be shorter, but has two frames."""
    return [part for start in range(0, len(clip), window) if len(part := clip[start : start + window]) > 1]


def seam_of(clip: Pixels, window: int) -> float:
    """The largest step between two windows of a clip over its mean step; 0 for a still clip or a single window."""
    steps = np.abs(np.diff(clip.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    between = steps[window - 1 :: window]
    return float(between.max() / steps.mean()) if len(between) and steps.mean() > 0 else 0.0


def summarise(mode: str, clips: list[Pixels], window: int, seconds: float) -> LongMotion:
    motion = np.array([[motion_magnitude(part) for part in windows_of(clip, window)] for clip in clips])
    names = [str(i) for i in range(len(clips))]
    ratios = tuple(ratio_of_sums(later, motion[:, 0], names) for later in motion.T)
    return LongMotion(
        mode, ratios, float(motion[:, 0].mean()), float(np.mean([seam_of(clip, window) for clip in clips])), seconds
    )


def measure(model: Path, clips: int, frames: int, steps: int | None, examples: Path | None = None) -> list[LongMotion]:
    """Animates drawn photos by each way to make long videos; `examples` gets a GIF of the first clip of each."""
    pipe = TripPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    window, rows = pipe.trip_config.num_frames, []
    for mode in MODES:
        start, made = time.process_time(), []
        for seed in range(FIRST_SEED, FIRST_SEED + clips):
            pixels, caption = draw_clip(seed, pipe.size)
            video = pipe(
                pixels[0],
                caption,
                generator=seed_generator(seed),
                num_frames=frames,
                num_inference_steps=steps,
                long=mode,
                keep_first_frame=False,
                output_type="np",
            ).frames[0]
            made.append(np.rint(video * 255).astype(np.uint8))
        rows.append(summarise(mode, made, window, (time.process_time() - start) / clips))
        if examples is not None:
            write_video(examples / f"long_{mode}.gif", made[0], pipe.fps)
    return rows


def main(given: argparse.Namespace) -> int:
    torch.set_num_threads(given.threads)
    rows = measure(given.model, given.clips, given.frames, given.steps, given.examples)
    count = len(rows[0].ratios)
    print(f"{given.clips} drawn photos, {given.frames} frames, torch {torch.__version__}\n")
    print(
        "| way | motion of window 1 |", *(f"window {n} / 1 |" for n in range(2, count + 1)), "seam | seconds a clip |"
    )
    print("|---" * (count + 3) + "|")
    for row in rows:
        ratios = [f"{number(ratio, '.2f')} |" for ratio in row.ratios[1:]]
        print(f"| {row.mode} | {row.first:.4f} |", *ratios, f"{row.seam:.2f} | {row.seconds:.1f} |")
    weak = [(row.mode, n) for row in rows for n, ratio in enumerate(row.ratios, 1) if ratio.value < given.least]
    for mode, n in weak:
        print(f"{mode}: the motion of window {n} is less than {given.least:g} of the first one's")
    return int(bool(weak))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--steps", type=int, help="by default the model's own number")
    parser.add_argument("--least", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=Path, help="folder for a GIF of each way")
    sys.exit(main(parser.parse_args()))
