"""Compares the decoder with FFmpeg's command line and zimg on real clips: which frames, and which colours.

    python -m benchmarks.decode_check --clips FOLDER ..

It reads the clips of the folders, which have `manifest.csv` and `videos/`, and skips without them, or without an
`ffmpeg` that has the filter `zscale`. Frames are compared at 4 fps over the first 8 s, at 128 pixels: the stamps come
from ffprobe, the colours from zscale with the file's tags. Colours are compared in the mean of each frame and in flat
tiles of 8 x 8 pixels (deviation below 3 levels), since swscale and zimg filter edges in different ways. A frame is
another one if its stamp is, or if a neighbour of the expected frame is closer in content after the median difference of
the clip is subtracted.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tasks.video.decode import ClipError, read_track, read_windows

FOLDERS = [Path(__file__).parents[2] / "shared" / "data" / name for name in ("clips", "clips2")]
FPS, SECONDS, SIZE, TILE = 4.0, 8, 128, 8
ZIMG = {"smpte170m": "170m", "bt470bg": "470bg", "bt709": "709", "bt2020nc": "2020_ncl"}


def probe(path: Path) -> list[float]:
    """Returns the stamps of the first frames in seconds since the first."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-of", "json"]
    command += ["-read_intervals", f"%+{SECONDS + 2}", "-show_entries", "frame=best_effort_timestamp_time", str(path)]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    stamps = [float(frame["best_effort_timestamp_time"]) for frame in answer["frames"]]
    return [stamp - stamps[0] for stamp in stamps]


def decode(path: Path, box: list[int], matrix: str, is_full: bool) -> np.ndarray:
    """Returns the first frames by FFmpeg and zimg, resized and cropped: uint8 [F, SIZE, SIZE, 3]."""
    width, height, left, top = box
    colour = f"zscale=matrixin={ZIMG[matrix]}:rangein={'full' if is_full else 'limited'}:matrix=gbr:range=full"
    scale = f"zscale=w={width}:h={height}:f=bicubic"
    filters = f"{colour},format=gbrp,{scale},crop={SIZE}:{SIZE}:{left}:{top},format=rgb24"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", "0:v:0", "-t", str(SECONDS + 1), "-vf", filters]
    command += ["-vsync", "passthrough", "-f", "rawvideo", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, SIZE, SIZE, 3)


def tiles(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of each tile [T, T, 3], and which tiles are flat [T, T]."""
    side = len(frame) // TILE * TILE
    parts = frame[:side, :side].reshape(side // TILE, TILE, side // TILE, TILE, 3).astype(np.float32)
    return parts.mean(axis=(1, 3)), parts.std(axis=(1, 3)).max(axis=-1) < 3


def compare(path: Path) -> dict[str, Any]:
    """Returns the number of frames that are others than expected, and the largest differences of colour in levels."""
    stamps = probe(path)
    [track] = read_track(path, 1, FPS, SIZE, longest=int(FPS * SECONDS))
    info = track.info
    reference = [tiles(frame) for frame in decode(path, info["resize_crop"], info["matrix"], info["range"] == "full")]
    expected = [max(i for i, stamp in enumerate(stamps) if stamp <= k / FPS + 1e-6) for k in range(len(track.pixels))]
    expected = [i for i in expected if i + 2 < len(reference)]
    ours = [tiles(frame)[0] for frame in track.pixels[: len(expected)]]
    bias = np.median([mine - reference[i][0] for mine, i in zip(ours, expected, strict=True)], axis=0)
    result: dict[str, Any] = {"frames": len(expected), "other stamps": 0, "other content": 0, "mean": 0.0, "flat": 0.0}
    for i, mine, time in zip(expected, ours, track.times, strict=False):
        result["other stamps"] += int(abs(float(time) - stamps[i]) > 1e-3)
        distances = {j: np.abs(reference[j][0] + bias - mine).mean() for j in range(max(0, i - 2), i + 3)}
        result["other content"] += int(distances[i] > min(distances.values()) + 0.05)
        difference = np.abs(mine - reference[i][0])
        result["mean"] = max(result["mean"], float(np.abs((mine - reference[i][0]).mean(axis=(0, 1))).max()))
        if reference[i][1].any():
            result["flat"] = max(result["flat"], float(difference[reference[i][1]].max()))
    kind = "tagged" if "matrix" not in info.get("assumed", ()) else "untagged"
    return {"kind": f"{kind} {info['matrix']}"} | {
        name: round(value, 2) if isinstance(value, float) else value for name, value in result.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="*", default=FOLDERS)
    parser.add_argument("--limit", type=int, help="the first clips of each folder only")
    options = parser.parse_args()
    folders = [folder for folder in options.clips if (folder / "manifest.csv").is_file()]
    if not folders:
        print(f"skipped: no clips in {', '.join(map(str, options.clips))}")
        return 0
    filters = shutil.which("ffmpeg") and subprocess.run(["ffmpeg", "-filters"], capture_output=True, text=True).stdout
    if not filters or " zscale " not in filters:
        print("skipped: no ffmpeg with the filter zscale (Debian: apt install ffmpeg)")
        return 0
    results: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    for folder in folders:
        with (folder / "manifest.csv").open(newline="") as table:
            rows = list(csv.DictReader(table))[: options.limit]
        for row in rows:
            path = folder / row["contentUrl"]
            try:
                read_windows(path, 16, FPS, 64)
                outcomes["gives a clip"] += 1
            except ClipError as error:
                outcomes[error.reason] += 1
            results.append(compare(path) | {"key": row["videoid"]})
    print(
        "| matrix | clips | frames | other stamps | other content | frame mean: largest | flat tiles: median, largest |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in sorted({result["kind"] for result in results}):
        group = [result for result in results if result["kind"] == kind]
        sums = " | ".join(str(sum(r[name] for r in group)) for name in ("frames", "other stamps", "other content"))
        flat = [result["flat"] for result in group]
        means = max(result["mean"] for result in group)
        print(f"| {kind} | {len(group)} | {sums} | {means:.2f} | {np.median(flat):.2f}, {max(flat):.2f} |")
    print("clips of 16 frames:", ", ".join(f"{name} {count}" for name, count in outcomes.most_common()))
    for result in results:
        if result["other stamps"] or result["other content"] or max(result["mean"], result["flat"]) > 2:
            print(result)
    return int(any(result["other stamps"] or result["other content"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
