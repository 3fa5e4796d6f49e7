"""Quality and time of fewer steps: each solver at several numbers of steps, and deep features shared by steps.

    python -m benchmarks.fewer_steps --root runs/demo [--clips 40] [--plot docs/images/fewer_steps.png]

The trained model of a finished `reproduce --recipe demo` animates its held-out clips, each from the same noise in every
row; the difference is paired by clip with the first row. Photo and caption decide a drawn clip, so the distance to the
true clip orders systems of equal sharpness, but it prefers the mean of what is possible: few steps score well on it.
Seconds are processor time of one thread for one clip, VAE included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.evaluate.generate import real_pixels
from tasks.evaluate.protocol.protocol import held_out_protocol
from tasks.evaluate.report.tables import number
from tasks.metrics.pixels import clip_distance, motion_magnitude
from tasks.metrics.statistics import mean_over_clips, paired_difference, ratio_of_sums
from tasks.shards import ShardDataset
from trip_model.pipeline import TripPipeline, seed_generator
from trip_model.sampler import SAMPLERS

STEPS = (2, 4, 8, 12, 20)
REUSED = ((20, 2), (20, 3), (20, 5), (12, 2))  # DDIM steps, steps that share the deep features
REFERENCE = {"scheduler": "ddim", "num_inference_steps": 50}
BATCH = 8


def rows() -> list[tuple[str, dict[str, Any]]]:
    """The name and the arguments of each row; the first one is the reference."""
    table: list[tuple[str, dict[str, Any]]] = [("ddim, 50 steps", REFERENCE)]
    for sampler in SAMPLERS:
        for steps in STEPS:
            table.append((f"{sampler}, {steps} steps", {"scheduler": sampler, "num_inference_steps": steps}))
    for steps, reuse in REUSED:
        options = {"scheduler": "ddim", "num_inference_steps": steps, "feature_reuse": reuse}
        table.append((f"ddim, {steps} steps, features shared by {reuse}", options))
    return table


def main(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    (data,) = (path for path in (given.root / "data").iterdir() if path.is_dir())
    dataset = ShardDataset(str(data))
    pipe = TripPipeline.from_pretrained(given.root / "model")
    pipe.set_progress_bar_config(disable=True)
    items = held_out_protocol(dataset, 0.1, given.clips, 0).items
    reals = [real_pixels(dataset, item, pipe.trip_config.num_frames) for item in items]
    clips = [item.clip for item in items]
    moved = np.array([motion_magnitude(real) for real in reals])
    reference: NDArray[np.float64] | None = None
    measured: dict[str, tuple[float, float]] = {}
    print(f"{len(items)} held-out clips, one thread, torch {torch.__version__}\n")
    print("| what | seconds a clip | distance to the true clip | minus the first row | motion ratio |")
    print("|---|---|---|---|---|")
    for name, options in rows():
        made: list[NDArray[np.uint8]] = []
        start = time.process_time()
        for i in range(0, len(items), BATCH):
            part = items[i : i + BATCH]
            frames = pipe(
                [real[0] for real in reals[i : i + BATCH]],
                [item.caption for item in part],
                generator=[seed_generator(item.seed) for item in part],
                output_type="np",
                **options,
            ).frames
            made.extend(np.rint(frames * 255).astype(np.uint8))
        seconds = (time.process_time() - start) / len(items)
        distances = np.array([clip_distance(pixels, real) for pixels, real in zip(made, reals, strict=True)])
        mean = mean_over_clips(distances, clips)
        minus = "" if reference is None else number(paired_difference(distances, reference, clips), "+.4f")
        ratio = ratio_of_sums([motion_magnitude(pixels) for pixels in made], moved, clips)
        print(f"| {name} | {seconds:.2f} | {number(mean, '.4f')} | {minus} | {ratio.value:.2f} |", flush=True)
        reference = distances if reference is None else reference
        measured[name] = (seconds, mean.value)
    if given.plot is not None:
        plot(measured, given.plot)


def plot(measured: dict[str, tuple[float, float]], file: Path) -> None:
    """Draws distance against seconds, one line for each solver and one for shared features."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds a clip, one thread", ylabel="distance to the true clip")
    for kind in (*SAMPLERS, "shared"):
        shared = kind == "shared"
        points = sorted(
            value
            for name, value in measured.items()
            if ("shared" in name) is shared and (shared or name.startswith(f"{kind},"))
        )
        label = "ddim, shared features" if shared else kind
        axes.plot(*zip(*points, strict=True), "s" if shared else "o-", label=label)
    axes.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where `reproduce --recipe demo` has run")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--plot", type=Path)
    main(parser.parse_args())
