"""What a data set is made of: codecs, colours, sizes, scores and captions of its samples, and examples of failures."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infra.redaction import redact
from tasks.records import Failure
from tasks.shards import ShardDataset, read_shard_manifest
from trip_model.folders import resolve_base

SAMPLES = 1000  # read for the census, at equal distances
LATENTS = 200  # of them whose latents are read, for the motion
EXAMPLES = 3  # of failures of each reason
INDEXES = 200  # shards whose index is read for them, at most


@dataclass
class Census:
    """Counts and distributions over the samples that were read."""

    samples: int = 0  # that were read
    videos: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by property, by value
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by name of a distribution
    captions_cut: int = 0
    token_limit: int = 0


def take_census(dataset: ShardDataset, base: str) -> Census:
    """Reads up to `SAMPLES` samples of a data set. `base` has the tokenizer that encoded it."""
    from transformers import CLIPTokenizer  # only where a page is not written yet

    tokenizer: Any = CLIPTokenizer.from_pretrained(Path(resolve_base(base)) / "tokenizer")
    census = Census()
    picked = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).round().astype(int)).tolist()
    with_latents = set(picked[:: -(-len(picked) // LATENTS)])
    for index in picked:
        fields = ("meta", "caption", "tokens", *(("latents",) if index in with_latents else ()))
        sample = dataset.read(index, fields)
        meta, video = sample["meta"], sample["meta"].get("decoder", {})
        census.samples += 1
        census.token_limit = len(sample["tokens"])
        census.captions_cut += len(tokenizer(sample["caption"], verbose=False)["input_ids"]) > census.token_limit
        for name, value in _properties(video).items():
            census.videos[name][value] += 1
        for name, value in _numbers(meta, video).items():
            census.values[name].append(value)
        if "latents" in sample and len(sample["latents"]) > 1:
            change = np.abs(np.diff(sample["latents"].astype(np.float32), axis=0)).mean()
            census.values["change of the latents from frame to frame"].append(float(change))
    return census


def failure_examples(dataset: ShardDataset) -> dict[str, list[Failure]]:
    """Returns up to `EXAMPLES` failures of each reason."""
    examples: dict[str, list[Failure]] = {reason: [] for reason in dataset.published.failed}
    for shard in dataset.published.shards[:INDEXES]:
        if all(len(found) >= min(EXAMPLES, dataset.published.failed[reason]) for reason, found in examples.items()):
            break
        index = read_shard_manifest(dataset.uri, shard.shard)
        for failure in index.failures if index else ():
            found = examples.setdefault(failure.reason, [])
            if len(found) < EXAMPLES:
                found.append(Failure(failure.key, failure.row, failure.reason, redact(failure.detail)))
    return examples


def _properties(video: dict[str, Any]) -> dict[str, str]:
    """Returns what is counted of a decoded video; samples of earlier versions have fewer entries."""
    names = {"codec": "codec", "container": "container", "pixel_format": "pixel format", "transfer": "transfer"}
    properties = {shown: str(video[name]) for name, shown in names.items() if name in video}
    if "range" in video:
        properties["range"] = video["range"]
    if "matrix" in video:
        properties["matrix"] = video["matrix"] + (" (assumed)" if "matrix" in video.get("assumed", ()) else "")
    if "colour_conversion" in video:
        properties["converted to BT.709"] = video["colour_conversion"]
    if "deinterlaced_frames" in video:
        properties["fields"] = "deinterlaced"
    if "average_fps" in video:
        properties["frames per second"] = f"{video['average_fps']:.4g}"
    if "width" in video:
        properties["size"] = f"{video['width']}x{video['height']}"
    return properties


def _numbers(meta: dict[str, Any], video: dict[str, Any]) -> dict[str, float]:
    numbers = {f"score: {name}": float(value) for name, value in meta.get("scores", {}).items()}
    if "duration_seconds" in video:
        numbers["duration of the video, seconds"] = video["duration_seconds"]
    if meta.get("times"):
        numbers["start of the sample, seconds"] = meta["times"][0]
        numbers["frames of the sample"] = float(len(meta["times"]))
    if "size_bytes" in meta:
        numbers["size of the file, MB"] = meta["size_bytes"] / 1e6
    return numbers
