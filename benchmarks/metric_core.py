"""What the metric core costs alone, features given: 2,048 clips of 16 frames.

    python -m benchmarks.metric_core [--clips 2048]

Two systems and the real clips, with random features in the shapes of the extractors, their variances falling as 1/i as
those of real features do. Each part is what a table needs of one extractor: for consistency the curves by three pair
rules with intervals and paired differences, and the lag table; for a Frechet extractor both systems' distance, kernel
distance and value at infinity, the floor, and the paired difference. Prints one JSON; a part's peak is the process's,
features of the other extractors excluded.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.consistency import PAIR_RULES, consistency_by_lag, consistency_curve
from tasks.metrics.frechet import (
    FeatureSet,
    frechet_floor,
    frechet_to_real,
    kernel_distance,
    kernel_distance_of_frames,
    paired_frechet_difference,
)
from tasks.metrics.statistics import mean_over_clips, paired_difference

# Extractor: rows of a clip, width of a row.
SHAPES = {
    "clip_frames": (16, 768),
    "i3d": (1, 400),
    "inception": (16, 2048),
    "rfd_app": (15, 32),
    "rfd_motion": (15, 32),
}

Features = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2048)
    clips = parser.parse_args().clips
    names = [f"clip-{i}" for i in range(clips)]
    np.linalg.eigh(np.eye(64))  # the threads of the linear algebra start here, not in the first part
    parts = {}
    for number, (extractor, shape) in enumerate(SHAPES.items()):
        real, first, second = features(number, clips, *shape)
        work = consistency if extractor == "clip_frames" else distances
        parts[extractor] = measured(lambda work=work, x=(real, first, second): work(*x, names))
    print(
        json.dumps(
            {
                "clips": clips,
                "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
                "peak_gb": max(part["peak_gb"] for part in parts.values()),
                "parts": parts,
            },
            indent=2,
        )
    )


def features(seed: int, clips: int, rows: int, width: int) -> tuple[Features, Features, Features]:
    """Real features and those of two systems that share a half of their variance with them, each [N, rows, width]."""
    random = np.random.default_rng(seed)
    scale = (1 / np.sqrt(np.arange(1, width + 1))).astype(np.float32)

    def draw() -> Features:
        return random.standard_normal((clips, rows, width), dtype=np.float32) * scale

    real = draw()
    return real, np.float32(0.7) * (real + draw()), np.float32(0.65) * (real + draw())


def consistency(real: Features, first: Features, second: Features, names: list[str]) -> None:
    """Curves by every rule with intervals, paired differences, and the lag tables."""
    for rule in PAIR_RULES:
        curves = [np.stack([consistency_curve(clip, rule) for clip in row]) for row in (real, first, second)]
        for curve in curves:
            for values in curve.T:
                mean_over_clips(values, names)
                paired_difference(values, curves[1][:, -1], names)
    for row in (real, first, second):
        np.mean([consistency_by_lag(clip) for clip in row], axis=0)


def distances(real: Features, first: Features, second: Features, names: list[str]) -> dict[str, float]:
    """Everything that a table says of one Frechet extractor; the seconds of each step."""
    clusters = [name for name in names for _ in range(real.shape[1])]
    kernel = kernel_distance_of_frames if real.shape[1] > 1 else lambda x, y: kernel_distance(x[:, 0], y[:, 0])
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[step] = round(time.perf_counter() - start, 2)
        return result

    rows = [x.reshape(-1, x.shape[-1]) for x in (real, first, second)]
    truth, *systems = timed("moments", lambda: [FeatureSet.of(row, clusters) for row in rows])
    timed("floor", lambda: frechet_floor(truth))
    a, b = timed("distance, sd, infinity", lambda: [frechet_to_real(system, truth) for system in systems])
    timed("paired difference", lambda: paired_frechet_difference(a, b, clusters))
    timed("kernel distance", lambda: [kernel(x, real) for x in (first, second)])
    return seconds


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a part and the largest resident memory meanwhile, which Linux resets on request."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    steps = work()
    seconds = round(time.perf_counter() - start, 2)
    peak_kb = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    result = {"seconds": seconds, "peak_gb": round(int(peak_kb.split()[1]) * 1024 / 1e9, 2)}
    return result | ({"steps": steps} if steps else {})


if __name__ == "__main__":
    main()
