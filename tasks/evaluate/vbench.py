"""VBench-I2V: exports the clips of an evaluation under the names that its tool expects, and reads its result back.

Its tool (`evaluate_i2v.py` of Vchitect/VBench) finds the videos PROMPT-0.mp4, PROMPT-1.mp4 .. in one folder. With
`--mode custom_input` the photo of a video is the file of the image folder that is named like its prompt; in the
standard mode prompts and photos are those of its image suite. Its result is NAME_eval_results.json.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from infra import storage
from tasks.evaluate.generate import load_arrays, real_pixels, shown
from tasks.evaluate.protocol.protocol import Item
from tasks.evaluate.report.tables import Table, number
from tasks.evaluation_record import EvaluatedItem, read_evaluation, read_items
from tasks.metrics.statistics import Estimate, mean_over_clips
from tasks.records import UserError
from tasks.shards import ShardDataset
from trip_model.images import video_bytes

EXPORT_FILE = "vbench_export.json"
VIDEOS, IMAGES = "videos", "images"
SAMPLES = 5  # that its standard mode looks for
MAX_NAME = 200  # bytes of a file name without its number and suffix
# Dimension of its result, its name in its final score, and the least and largest value that the score scales by
# (scripts/constant.py); None where a dimension does not count. Weights are 1 but for two.
DIMENSIONS: dict[str, tuple[str, tuple[float, float] | None]] = {
    "camera_motion": ("Video-Text Camera Motion", (0.0, 1.0)),
    "i2v_subject": ("Video-Image Subject Consistency", (0.1462, 1.0)),
    "i2v_background": ("Video-Image Background Consistency", (0.2615, 1.0)),
    "subject_consistency": ("Subject Consistency", (0.1462, 1.0)),
    "background_consistency": ("Background Consistency", (0.2615, 1.0)),
    "motion_smoothness": ("Motion Smoothness", (0.706, 0.9975)),
    "dynamic_degree": ("Dynamic Degree", (0.0, 1.0)),
    "aesthetic_quality": ("Aesthetic Quality", (0.0, 1.0)),
    "imaging_quality": ("Imaging Quality", (0.0, 1.0)),
    "temporal_flickering": ("Temporal Flickering", None),
}
WEIGHTS = {"camera_motion": 0.1, "dynamic_degree": 0.5}
OF_IMAGE = ("camera_motion", "i2v_subject", "i2v_background")
PERCENT = ("imaging_quality",)  # its single videos have values from 0 to 100, their mean one from 0 to 1
_NUMBER = re.compile(r"-\d+$")


@dataclass(frozen=True)
class VBenchRow:
    """A result of VBench-I2V as a row of our table: its dimensions with intervals over clips, and its three scores."""

    name: str
    metrics: dict[str, Estimate]
    clips: int
    scores: dict[str, float]


def prompt_of(file: str) -> str:
    """The prompt that VBench reads from the name of a video: without suffix and number."""
    return _NUMBER.sub("", PurePosixPath(file).stem)


def names_of(items: tuple[EvaluatedItem, ...] | list[EvaluatedItem]) -> dict[str, str]:
    """The name for each item's key: its caption; where several items share one, the later ones add their key.

    Characters that no file name may have become spaces, as does a number at the end that VBench would cut off.
    """
    names: dict[str, str] = {}
    for item in items:
        text = " ".join(re.sub(r'[/\\\0-\x1f:*?"<>|]', " ", item.caption).split()).strip(". ") or item.key
        while len(text.encode()) > MAX_NAME:
            text = text[:-1]
        text = _NUMBER.sub(lambda found: " " + found[0][1:], text)
        name = text if text not in names.values() else f"{text} ({item.key})"
        names[item.key] = name
    return names


def export(report: str, output: str, log: Callable[[str], None]) -> dict[str, str]:
    """Writes the clips and photos of an evaluation's model for VBench-I2V; returns item keys by name of the video.

    Args:
        report: folder of a finished evaluation.
        output: new folder for `videos`, `images` and the list of names.
        log: gets sentences.
    Raises:
        UserError: no report, or an output that is not empty.
    """
    record, protocol = read_evaluation(report), read_items(report)
    if storage.list_dir(output):
        raise UserError(f"{output} is not empty; name a new folder")
    dataset = ShardDataset(record.provenance["dataset"])
    index_of = {key: index for index, key in enumerate(dataset.keys)}
    items = [item for item in protocol.items if item.key in index_of]
    names, keys = names_of(items), {}
    repeated = Counter(item.caption for item in items)
    for item in items:
        window = Item(item.key, item.clip, index_of[item.key], item.caption, 0)
        real = real_pixels(dataset, window, protocol.frames)
        buffer = io.BytesIO()
        Image.fromarray(real[0]).save(buffer, "PNG")
        storage.write_bytes(storage.join(output, IMAGES, f"{names[item.key]}.png"), buffer.getvalue())
        for sample, folder in enumerate((record.generations, *record.samples)[:SAMPLES]):
            frames = load_arrays(storage.join(report, folder, f"{item.key}.npz"))["frames"]
            file = f"{names[item.key]}-{sample}.mp4"
            video = video_bytes(shown(frames, real), protocol.fps, "mp4")
            storage.write_bytes(storage.join(output, VIDEOS, file), video)
            keys[file] = item.key
    clips = {item.key: item.clip for item in items}
    content = {"report": report, "items": keys, "clips": clips}
    storage.write_json(storage.join(output, EXPORT_FILE), content)
    more = sum(count - 1 for count in repeated.values() if count > 1)
    log(f"vbench      {len(keys)} videos of {len(items)} items in {storage.join(output, VIDEOS)}")
    if more:
        log(f"vbench      {more} items share a caption with another one; their names end in their key")
    return keys


def missing(full_info: bytes, files: set[str]) -> dict[str, int]:
    """How many videos of its standard suite are missing in an export, by dimension.

    Args:
        full_info: content of its vbench2_i2v_full_info.json.
        files: names of the videos.
    Raises:
        UserError: another file.
    """
    try:
        lines = json.loads(full_info)
        wanted = [(dimension, line["prompt_en"]) for line in lines for dimension in line["dimension"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"this is not VBench's vbench2_i2v_full_info.json ({error})") from error
    counts: Counter[str] = Counter()
    for dimension, prompt in wanted:
        counts[dimension] += sum(f"{prompt}-{sample}.mp4" not in files for sample in range(SAMPLES))
    return dict(sorted(counts.items()))


def read_result(content: bytes, name: str, clips: Mapping[str, str]) -> VBenchRow:
    """Reads NAME_eval_results.json as a row of our table.

    Intervals are over clips. Its mean and that of the single videos must agree.

    Args:
        content: of the file, a dictionary of dimension -> [mean, .., list of videos].
        name: of the row.
        clips: source clip by name of a video; a video that is not in it is its own clip.
    Raises:
        UserError: another file, an unknown dimension or one without videos, or a mean that is not that of its videos.
    """
    try:
        results: dict[str, list[Any]] = json.loads(content)
        metrics, seen = {}, set[str]()
        for dimension, result in results.items():
            if dimension not in DIMENSIONS:
                raise ValueError(f"unknown dimension {dimension!r}")
            mean, videos = float(result[0]), result[-1]
            if not videos:
                raise ValueError(f"{dimension} has no videos")
            scale = 100.0 if dimension in PERCENT else 1.0
            values = np.array([float(video["video_results"]) / scale for video in videos])
            files = [PurePosixPath(video["video_path"]).name for video in videos]
            own = [clips.get(file, file) for file in files]
            seen |= set(own)
            # With several processes its tool divides the mean of imaging quality twice.
            if not any(np.isclose(float(values.mean()), mean * factor, atol=1e-3) for factor in (1.0, scale)):
                raise ValueError(f"{dimension}: the mean {mean:g} is not that of its videos, {values.mean():g}")
            metrics[f"vbench-{dimension}"] = mean_over_clips(values, own)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"this is not a result of VBench-I2V ({error}); give its NAME_eval_results.json") from error
    if not metrics:
        raise UserError("the result of VBench-I2V has no dimension")
    return VBenchRow(name, metrics, len(seen), final_scores({k: m.value for k, m in metrics.items()}))


def final_scores(values: Mapping[str, float]) -> dict[str, float]:
    """Its scores "I2V", "Quality" and "Total" as its cal_i2v_final_score.py computes them; {} where one is missing."""
    scaled: dict[str, float] = {}
    for dimension, (_, bounds) in DIMENSIONS.items():
        if bounds is not None:
            value = values.get(f"vbench-{dimension}")
            if value is None:
                return {}
            scaled[dimension] = (value - bounds[0]) / (bounds[1] - bounds[0]) * WEIGHTS.get(dimension, 1.0)
    of_image = {name: value for name, value in scaled.items() if name in OF_IMAGE}
    quality = {name: value for name, value in scaled.items() if name not in OF_IMAGE}
    scores = [sum(part.values()) / sum(WEIGHTS.get(name, 1.0) for name in part) for part in (of_image, quality)]
    return {"I2V": scores[0], "Quality": scores[1], "Total": sum(scores) / 2}


def result_table(rows: list[VBenchRow]) -> Table:
    """Results as columns of one table, as the report prints its systems."""
    names = [f"vbench-{name}" for name in DIMENSIONS if any(f"vbench-{name}" in row.metrics for row in rows)]
    lines = [
        [DIMENSIONS[name.removeprefix("vbench-")][0], *(number(row.metrics.get(name), ".4f") for row in rows)]
        for name in names
    ]
    for score in ("I2V", "Quality", "Total"):
        if any(row.scores for row in rows):
            lines.append([f"{score} score", *(f"{row.scores[score]:.4f}" if row.scores else "-" for row in rows)])
    notes = ("Dimensions and scores are those of VBench-I2V; the 95 % intervals are ours, over source clips.",)
    return Table("VBench-I2V", ["Dimension", *(f"{row.name}\n{row.clips} clips" for row in rows)], lines, notes)
