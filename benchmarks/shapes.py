"""Measures what a person sees in the demo's clips: the shape stays, the ground stands still, the motion is right.

    python -m benchmarks.shapes --root runs/demo [--noise 0.2 0.3 0.4] [--pictures docs/images]

Reads the held-out clips that `make demo` generated and prints a row for each system: in how many clips the last frame
still shows the caption's shape, the difference of the still ground to the photo in levels of 255, the motion ratio and
the distance to the true clip, with 95 % intervals over clips. Nothing is generated; the VAE's round trip is decoded
from the stored latents. A row of the trained TRIP that the demo continues needs its evaluation in the same root:

    python -m flows evaluate-trip --recipe demo --root runs/demo --model examples/demo_trip/weights

`--noise` adds rows of the round trip with white noise of these deviations on the final
latents: where the decoder stops telling shapes apart, to compare with the error of the model's own latents.
`--pictures` writes the README's: the first four held-out clips by key, so none is picked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tasks.evaluate.generate import load_generated, real_pixels
from tasks.evaluate.protocol.protocol import Item, held_out_protocol
from tasks.evaluate.report.tables import number
from tasks.ingest.drawing import SHAPES, shape_cover
from tasks.metrics.pixels import clip_distance, motion_magnitude
from tasks.metrics.statistics import mean_over_clips, paired_difference, ratio_of_sums
from tasks.shards import ShardDataset
from trip_model.encoders import decode_latents, encode_pixels, load_vae

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

LEAST_OVERLAP = 0.7  # with the nearest prototype; below, the object has no shape. Drawn clips have 0.9 and more
AREA_BOUNDS = (0.6, 1.67)  # of the object relative to the photo's
START = "start"  # the trained model that the demo continues
PATH_MARGIN = 2  # pixels around the object's true path that do not count as still ground


@dataclass(frozen=True)
class ShapeReading:
    """The nearest prototype of one frame's object, `none` where nothing is near, and the overlap with it."""

    shape: str
    overlap: float


def fit_ground(photo: Pixels) -> Floats:
    """Returns the plain ground of a drawn frame, float [H, W, 3]: a plane through the outermost pixels."""
    height, width = photo.shape[:2]
    y, x = np.mgrid[:height, :width].astype(float)
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    ring = np.ones((height, width), bool)
    ring[1:-1, 1:-1] = False
    plane, *_ = np.linalg.lstsq(terms[ring], photo[ring].astype(float), rcond=None)
    return terms @ plane


def object_cover(frame: Pixels, photo: Pixels) -> Floats:
    """Returns the share of each pixel that shows the photo's object instead of the photo's ground, float [H, W]."""
    ground = fit_ground(photo)
    contrast = np.linalg.norm(photo - ground, axis=-1)
    colour = np.median(photo[contrast > 0.8 * contrast.max()], axis=0)
    toward = colour - ground
    cover = np.einsum("hwc,hwc->hw", frame - ground, toward) / np.einsum("hwc,hwc->hw", toward, toward)
    cover = cover.clip(0, 1)
    return np.where(cover < 0.1, 0.0, cover)


def nearest_shape(cover: Floats) -> ShapeReading:
    """Compares a cover with each shape of the same area at the same centre and returns the best overlap."""
    size, area = len(cover), cover.sum()
    if area < 4:
        return ShapeReading("none", 0.0)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    centre_x, centre_y = (x * cover).sum() / area, (y * cover).sum() / area
    readings = []
    for shape in SHAPES:
        middle_u, middle_v, unit_area = _prototype(shape)
        radius = np.sqrt(area / size**2 / unit_area)
        u, v = x - centre_x + radius * middle_u, y - centre_y + radius * middle_v
        prototype = shape_cover(shape, u, v, radius, size)
        overlap = np.minimum(prototype, cover).sum() / np.maximum(prototype, cover).sum()
        readings.append(ShapeReading(shape, float(overlap)))
    return max(readings, key=lambda reading: reading.overlap)


def read_shape(frame: Pixels, photo: Pixels) -> ShapeReading:
    """Reads the shape of the photo's object in a frame; `none` if it is gone, grown, shrunk or like no prototype."""
    cover, before = object_cover(frame, photo), object_cover(photo, photo)
    reading = nearest_shape(cover)
    low, high = AREA_BOUNDS
    if reading.overlap < LEAST_OVERLAP or not low <= cover.sum() / before.sum() <= high:
        return ShapeReading("none", reading.overlap)
    return reading


def ground_error(clip: Pixels, truth: Pixels) -> float:
    """Root mean square difference to the photo, in levels of 255, where the true clip's object never comes."""
    photo = truth[0]
    path = np.max([object_cover(frame, photo) for frame in truth], axis=0) > 0
    padded = np.pad(path, PATH_MARGIN)
    around = [
        np.roll(padded, (dy, dx), (0, 1))
        for dy in range(-PATH_MARGIN, PATH_MARGIN + 1)
        for dx in range(-PATH_MARGIN, PATH_MARGIN + 1)
    ]
    still = ~np.any(around, axis=0)[PATH_MARGIN:-PATH_MARGIN, PATH_MARGIN:-PATH_MARGIN]
    return float(np.sqrt(np.mean((clip[1:, still].astype(float) - photo[still]) ** 2)))


@lru_cache
def _prototype(shape: str, size: int = 512) -> tuple[float, float, float]:
    """Returns centre (u, v) and area of a shape of radius 1."""
    v, u = ((np.mgrid[:size, :size] + 0.5) / size - 0.5) * 4
    cover = shape_cover(shape, u, v, 1.0, size // 4)
    area = cover.sum()
    return float((u * cover).sum() / area), float((v * cover).sum() / area), float(area * (4 / size) ** 2)


def shown(clips: Sequence[Pixels], reals: Sequence[Pixels]) -> list[Pixels]:
    """Returns the clips as their user sees them: frame 1 is the given photo."""
    return [np.concatenate([real[:1], clip[1:]]) for clip, real in zip(clips, reals, strict=True)]


def table(systems: dict[str, list[Pixels]], items: Sequence[Item]) -> list[str]:
    """Returns the rows of the table in markdown; `systems` needs `real`, whose clips every row is compared with."""
    reals, clips = systems["real"], [item.clip for item in items]
    true_motion = [motion_magnitude(real) for real in reals]
    lines = [
        "| row | shape kept in frame 16 | overlap | ground, levels | worst clip | motion ratio | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, made in systems.items():
        readings = [read_shape(clip[-1], real[0]) for clip, real in zip(made, reals, strict=True)]
        kept = sum(reading.shape in item.caption.split() for reading, item in zip(readings, items, strict=True))
        ground = [ground_error(clip, real) for clip, real in zip(made, reals, strict=True)]
        distance = [clip_distance(clip, real) for clip, real in zip(made, reals, strict=True)]
        cells = [
            f"{kept} of {len(items)}",
            f"{np.mean([reading.overlap for reading in readings]):.3f}",
            number(mean_over_clips(ground, clips), ".2f"),
            f"{max(ground):.2f}",
            number(ratio_of_sums([motion_magnitude(clip) for clip in made], true_motion, clips), ".2f"),
            number(mean_over_clips(distance, clips), ".4f"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def gains(systems: dict[str, list[Pixels]], items: Sequence[Item]) -> list[str]:
    """Returns what training adds to the base, and its share of the way from the base to the VAE's round trip."""
    distances = {
        name: np.array([clip_distance(clip, real) for clip, real in zip(made, systems["real"], strict=True)])
        for name, made in systems.items()
    }
    way = distances["base"].mean() - distances["vae"].mean()
    lines = []
    for before, after in (("base", "trip"), ("base", START), (START, "trip")):
        if before in distances and after in distances:
            gained = paired_difference(distances[before], distances[after], [item.clip for item in items])
            line = f"{before} minus {after} {number(gained, '+.4f')}: {gained.value / way:.0%}"
            lines.append(f"{line} of the way from the base to the VAE's round trip")
    return lines


def read_run(root: Path, noise: Sequence[float] = ()) -> tuple[dict[str, list[Pixels]], list[Item], float]:
    """Reads the clips of all systems from a run's newest evaluation; also the items and the model's `object_error`."""
    own, start = _newest_reports(root)
    report = json.loads(own.read_text())
    origin = report["provenance"]
    dataset = ShardDataset(origin["dataset"])
    items = list(
        held_out_protocol(dataset, origin["held_out_fraction"], report["counts"]["asked"], origin["seed"]).items
    )
    frames = origin["frames"]
    reals = [real_pixels(dataset, item, frames) for item in items]
    vae: Any = load_vae(origin["model"])
    latents = [torch.from_numpy(dataset.read(i.index, ("latents",), (0, frames))["latents"]).float() for i in items]
    final = [raw * vae.config.scaling_factor for raw in latents]
    (base,) = (folder for folder in (root / "base_clips").iterdir() if folder.is_dir())
    systems = {
        "vae": [decode_latents(vae, z) for z in final],
        **noisy_round_trips(vae, final, noise),
        "base": [load_generated(str(base), item) for item in items],
    }
    if start is not None:
        systems[START] = _generated(start, items)
    systems["trip"] = _generated(own, items)
    error = object_error(vae, systems["trip"], final)
    return {"real": reals, **{name: shown(clips, reals) for name, clips in systems.items()}}, items, error


def _newest_reports(root: Path) -> tuple[Path, Path | None]:
    """The newest evaluation of a model that was trained below the root, and of one that was not."""
    own, other = [], []
    for file in sorted(root.glob("evaluate/*/report.json"), key=lambda file: file.stat().st_mtime):
        model = Path(json.loads(file.read_text())["provenance"]["model"])
        (own if model.is_relative_to(root.resolve()) else other).append(file)
    return own[-1], other[-1] if other else None


def _generated(report: Path, items: Sequence[Item]) -> list[Pixels]:
    folder = report.parent / json.loads(report.read_text())["generations"]
    return [load_generated(str(folder), item) for item in items]


def noisy_round_trips(vae: Any, final: Sequence[torch.Tensor], deviations: Sequence[float]) -> dict[str, list[Pixels]]:
    """Decodes final latents [F, C, h, w] with white noise of each deviation."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"vae, noise {deviation:g}": [
            decode_latents(vae, z + deviation * torch.randn(z.shape, generator=generator)) for z in final
        ]
        for deviation in deviations
    }


def object_error(vae: Any, made: Sequence[Pixels], final: Sequence[torch.Tensor], cells: int = 9) -> float:
    """Returns the root mean square error of the last frame's final latents in its worst cells, about an object's."""
    errors = []
    for clip, z_FCHW in zip(made, final, strict=True):
        z_1CHW = encode_pixels(vae, clip[-1:]) * vae.config.scaling_factor
        errors.append((z_1CHW[0] - z_FCHW[-1]).square().mean(0).flatten().topk(cells).values.mean())
    return float(torch.stack(errors).mean().sqrt())


def write_pictures(systems: dict[str, list[Pixels]], items: Sequence[Item], folder: Path, scale: int = 2) -> None:
    """Writes `demo.gif` and `demo.png`: of each clip the model's frames above the true ones."""
    folder.mkdir(parents=True, exist_ok=True)
    first = sorted(range(len(items)), key=lambda i: items[i].key)[:4]
    made, real = (np.stack([systems[name][i] for i in first]) for name in ("trip", "real"))

    def enlarged(image: Pixels) -> Image.Image:
        return Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))

    frames = [
        enlarged(np.concatenate([np.concatenate(list(clips[:, k]), axis=1) for clips in (made, real)])).quantize(64)
        for k in range(made.shape[1])
    ]
    frames[0].save(folder / "demo.gif", save_all=True, append_images=frames[1:], duration=250, loop=0)
    shown_frames = (0, 3, 6, 9, 12, 15)
    rows = [np.concatenate(list(clips[n, shown_frames, :]), axis=1) for n in range(4) for clips in (made, real)]
    enlarged(np.concatenate(rows)).save(folder / "demo.png", optimize=True)
    print("\n" + "\n".join(f"{items[i].key}: {items[i].caption}" for i in first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where `reproduce --recipe demo` has run")
    parser.add_argument("--noise", type=float, nargs="*", default=(), help="deviations, in units of final latents")
    parser.add_argument("--pictures", type=Path, help="a folder for demo.gif and demo.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    systems, items, error = read_run(given.root, given.noise)
    print("\n".join(table(systems, items)))
    print("\n" + "\n".join(gains(systems, items)))
    print(f"trip: root mean square error of the latents in the object's cells of frame 16: {error:.2f}")
    if given.pictures is not None:
        write_pictures(systems, items, given.pictures)


if __name__ == "__main__":
    main()
