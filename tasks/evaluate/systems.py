"""The systems of the table: where the frames of each come from, the record of a clip, and stored features."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.generate import Batch, load_arrays, save_arrays, shown
from tasks.evaluate.protocol.baselines import READERS, Method
from tasks.evaluate.protocol.protocol import Item
from tasks.evaluation_record import REAL
from tasks.metrics.alignment import alignment
from tasks.metrics.energy import distances_to_truth, spread
from tasks.metrics.extractors.extractor import ExtractorInfo, FeatureExtractor, extract_features
from tasks.metrics.pixels import (
    clip_distance,
    coarse_motion_magnitude,
    flicker,
    motion_magnitude,
    psnr_curve,
    smoothness_residual,
    ssim_curve,
)
from tasks.records import digest
from tasks.video.clip_files import read_frames
from tasks.video.decode import ClipError

# References, in every table: a still clip scores 100 on consistency, so a score alone says nothing.
# BASE is what the model's base does before training: without it the effect of training is unknown.
CLOSED_FORM, ROUND_TRIP, BEST_OF = "closed_form", "round_trip", "best_of_k"
ORACLES = (ROUND_TRIP, BEST_OF)  # systems that know the true clip
HASHES = ("content", "shifted")  # of a record: which pixels were measured, all of a clip and those for sets
# Of a record with several samples: see `tasks.metrics.energy`, and the mean motion magnitude of all of them.
TO_TRUTH, SPREAD, ALL_MAGNITUDE = "to_truth", "spread", "magnitude_of_all"
RECORDS_VERSION = 3  # of what `measure` returns; another one is never read

Pixels = NDArray[np.uint8]
Features = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Row:
    """One system: a reference that follows from the real clip, or the videos of a method (TRIP's own are such, too).

    Args:
        further: the second, third .. sample of each item, drawn with other seeds; the first is `method`'s.
        nearest: of an item's samples, the clip is the one nearest to the true clip: an oracle.
    """

    name: str
    method: Method | None = None
    further: tuple[Method, ...] = ()
    nearest: bool = False

    @property
    def methods(self) -> tuple[Method, ...]:
        """One for each sample of an item."""
        return () if self.method is None else (self.method, *self.further)

    def record_id(self, clips: Mapping[str, Any]) -> str:
        """The folder of its records; `clips` decides the real clips, and whether sets of them are `shifted`."""
        own: Any = [self.method.identity, self.method.given_frame] if self.method else self.name
        if self.further:
            own = [*own, [method.identity for method in self.further], self.nearest]
        return digest({**clips, "row": own, "version": RECORDS_VERSION})

    def has(self, item: Item) -> bool:
        return all(item.key in method.files for method in self.methods)

    def frames(self, item: Item, real: Pixels) -> tuple[Pixels, Pixels | None]:
        """The clip as its user gets it, uint8 of the real clip's shape, and a method's own frame 1 [H, W, 3].

        Raises:
            ClipError: a method's video that is damaged or too short.
        """
        if self.method is None:
            return (real if self.name == REAL else np.repeat(real[:1], len(real), axis=0)), None
        return self.choose(self.samples(item, real), real)

    def samples(self, item: Item, real: Pixels) -> list[tuple[Pixels, Pixels]]:
        """Each sample of an item as `frames` returns it; none of a reference."""
        samples = []
        for method in self.methods:
            frames = read_frames(method.files[item.key], len(real), real.shape[1])
            samples.append((shown(frames, real) if method.given_frame else frames, frames[0]))
        return samples

    def choose(self, samples: Sequence[tuple[Pixels, Pixels]], real: Pixels) -> tuple[Pixels, Pixels]:
        """The sample that the table shows: the first, or of an oracle the nearest."""
        return min(samples, key=lambda sample: clip_distance(sample[0], real)) if self.nearest else samples[0]

    def shifted(self, pixels: Pixels) -> Pixels:
        """The frames by which a shifted protocol compares sets: real ones from the given one on, others after it."""
        return pixels[:-1] if self.name == REAL else pixels[1:]


def content_sha256(pixels: Pixels, caption: str) -> str:
    """Hex sha256 of an extractor's input: equal clips are extracted once, whatever their system."""
    return hashlib.sha256(f"{pixels.shape}{caption}\0".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def measure(pixels: Pixels, real: Pixels, first: Pixels | None) -> dict[str, Any]:
    """The metrics of one clip that need no network; `first` is a method's own frame 1.

    PSNR and SSIM are to the true frames: at frame 1 how a method keeps the given image, then how it drifts away.
    """
    numbers: dict[str, Any] = {
        "magnitude": motion_magnitude(pixels),
        "coarse_magnitude": coarse_motion_magnitude(pixels),
        "distance": clip_distance(pixels, real),
        "flicker": flicker(pixels),
        "smoothness": smoothness_residual(pixels),
        **asdict(alignment(pixels, real)),
    }
    if first is not None:
        own = np.concatenate([first[None], pixels[1:]])
        numbers |= {"psnr": psnr_curve(own, real).tolist(), "ssim": ssim_curve(own, real).tolist()}
    return numbers


def part_for(extractor: ExtractorInfo, parts: Mapping[str, Any]) -> str:
    """Which part of a clip an extractor is shown, of those of HASHES that there are."""
    return "shifted" if extractor.of_sets and "shifted" in parts else "content"


def features_address(output: str, extractor: ExtractorInfo, content: str) -> str:
    return storage.join(output, "features", extractor.id, f"{content}.npz")


def measure_batch(
    output: str,
    row: Row,
    clips: Mapping[str, Any],
    batch: Batch,
    reals: Sequence[Pixels],
    extractors: Sequence[FeatureExtractor],
) -> None:
    """Measures the clips of a batch in one system and stores their features; equal clips are extracted once.

    A video that cannot be used is recorded with its reason: the aggregation decides what that means.
    """
    records: dict[str, dict[str, Any]] = {}
    for item, real in zip(batch, reals, strict=True):
        if not row.has(item):
            continue
        try:
            samples = row.samples(item, real)
        except ClipError as error:
            records[item.key] = {"failed": error.reason, "detail": error.detail}
            continue
        pixels, first = row.choose(samples, real) if samples else row.frames(item, real)
        parts = {"content": pixels} | ({"shifted": row.shifted(pixels)} if "shifted" in clips else {})
        record: dict[str, Any] = {name: content_sha256(part, item.caption) for name, part in parts.items()}
        for extractor in extractors:
            part = part_for(extractor.info, parts)
            address = features_address(output, extractor.info, record[part])
            if not storage.exists(address):
                save_arrays(address, extract_features(extractor, item.key, parts[part], item.caption))
        if len(samples) > 1 and not row.nearest:
            shown_samples = [sample for sample, _ in samples]
            record |= {TO_TRUTH: distances_to_truth(shown_samples, real), SPREAD: spread(shown_samples)}
            record[ALL_MAGNITUDE] = float(np.mean([motion_magnitude(sample) for sample in shown_samples]))
        records[item.key] = record | measure(pixels, real, first)
    storage.write_json(_record_address(output, row, clips, batch), records)  # last: the features are there


def _record_address(output: str, row: Row, clips: Mapping[str, Any], batch: Batch) -> str:
    return storage.join(output, "records", row.record_id(clips), f"{digest([item.key for item in batch])}.json")


def read_records(output: str, row: Row, clips: Mapping[str, Any], plan: Sequence[Batch]) -> dict[str, dict[str, Any]]:
    """The existing records of a system, by item key."""
    addresses = [_record_address(output, row, clips, batch) for batch in plan]
    present = set(storage.list_dir(storage.join(output, "records", row.record_id(clips))))
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(storage.read_json, [a for a in addresses if a.rpartition("/")[2] in present])
        return {key: record for part in parts for key, record in part.items()}


def unmeasured(
    output: str,
    table: Sequence[Row],
    clips: Mapping[str, Any],
    plan: Sequence[Batch],
    extractors: Sequence[ExtractorInfo],
) -> list[tuple[tuple[str, ...], Batch]]:
    """The batches that are not measured in all systems, each with those where a record or features are missing."""
    folders = [storage.join(output, "features", extractor.id) for extractor in extractors]
    existing = [{file.removesuffix(".npz") for file in storage.list_dir(folder)} for folder in folders]

    def is_missing(row: Row, item: Item) -> bool:
        record = records[row.name].get(item.key)
        if record is None:
            return row.has(item)
        return "content" in record and any(
            record[part_for(extractor, record)] not in contents
            for extractor, contents in zip(extractors, existing, strict=True)
        )

    records = {row.name: read_records(output, row, clips, plan) for row in table}
    tasks = [(tuple(row.name for row in table if any(is_missing(row, i) for i in batch)), batch) for batch in plan]
    return [(names, batch) for names, batch in tasks if names]


def load_features(output: str, extractor: ExtractorInfo, records: Sequence[Mapping[str, Any]]) -> list[Features]:
    """The features of the clips of these records by one extractor, in their order."""
    addresses = [features_address(output, extractor, record[part_for(extractor, record)]) for record in records]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(load_arrays, addresses))
