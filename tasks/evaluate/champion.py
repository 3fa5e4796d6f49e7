"""The champion and the best champion so far: per-clip values that a report keeps, and the comparisons of the gate."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE, SCORES, STILL_MOTION, Against
from tasks.evaluate.protocol.protocol import Item
from tasks.evaluate.systems import ALL_MAGNITUDE
from tasks.evaluation_record import read_evaluation
from tasks.metrics.statistics import Estimate, function_of_sums, ratio_of_sums, share_of

BEST_FILE = "best.npz"
LEAST_MOTION = 0.06 / 255  # coarse motion of a real clip that moves; the noise of a sensor or a codec has less
MAGNITUDE = ALL_MAGNITUDE  # in `PerClip.values`
Measure = Literal["score", "motion"]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class PerClip:
    """One model's values by item: `values` has its scores, where they were measured, and its motion magnitude."""

    model_sha256: str
    keys: tuple[str, ...]
    values: Mapping[str, Values]

    def for_items(self, items: Sequence[Item]) -> PerClip | None:
        """The values in the order of these items; None if one is missing."""
        indices = {key: index for index, key in enumerate(self.keys)}
        if any(item.key not in indices for item in items):
            return None
        order = [indices[item.key] for item in items]
        values = {name: column[order] for name, column in self.values.items()}
        return PerClip(self.model_sha256, tuple(item.key for item in items), values)


def model_values(
    model_sha256: str, row: str, items: Sequence[Item], by_item: Mapping[str, Mapping[str, Values]]
) -> PerClip:
    """The values of one row of a summary; `by_item` is `Summary.by_item`."""
    values = {name: by_item[name][row] for name in SCORES if row in by_item.get(name, {})}
    magnitude = {MAGNITUDE: by_item[MAGNITUDE][row]}
    return PerClip(model_sha256, tuple(item.key for item in items), values | magnitude)


def compare(
    name: str,
    model: PerClip,
    other: PerClip,
    still: PerClip,
    real_magnitude: Values,
    score: str,
    items: Sequence[Item],
    resamples: int,
    measures: Sequence[Measure] = ("score", "motion"),
    sets: Mapping[str, Estimate] | None = None,
) -> Against:
    """A model against another on the same items, paired by clip: the share of gain lost, and the error in motion."""
    clips = [item.clip for item in items]
    lost_gain = motion_error = None
    unmeasured = "score" in measures and not (score in other.values and score in model.values)
    if "score" in measures and not unmeasured:
        gain = still.values[score] - other.values[score]
        if gain.sum() > 0:
            lost_gain = ratio_of_sums(model.values[score] - other.values[score], gain, clips, resamples)
    moving = [real_magnitude, *(own.values[MAGNITUDE] for own in (model, other) if "motion" in measures)]
    if "motion" in measures and all(column.sum() > 0 for column in moving):

        def error(sums: Values) -> Values:
            with np.errstate(divide="ignore"):
                log_K = np.log(sums)
            return np.abs(log_K[..., 1] - log_K[..., 0]) - np.abs(log_K[..., 2] - log_K[..., 0])

        motion_error = function_of_sums(moving, error, clips)
    return Against(name, lost_gain, motion_error, sets or {}, unmeasured)


def still_clips(magnitude: Values, real_magnitude: Values, clips: Sequence[str]) -> Estimate | None:
    """The share of moving clips that stand still in the model's version; None where no real clip moves.

    Of a real clip below `LEAST_MOTION`, only noise moves, which a model does not have to repeat.

    Args:
        magnitude: the model's coarse motion magnitude by item.
        real_magnitude: the same of the real clips.
        clips: the source clip of each item; several items of one clip count as one.
    """
    moves = real_magnitude > LEAST_MOTION
    if not moves.any():
        return None
    still = magnitude[moves] < STILL_MOTION * real_magnitude[moves]
    names, index = np.unique(np.asarray(clips)[moves], return_inverse=True)
    return share_of(float((np.bincount(index, still) / np.bincount(index)).sum()), len(names))


def value_of(measure: Measure, model: PerClip, real_magnitude: Values, score: str) -> float | None:
    """What the best champion has least of: the mean score, or |ln motion ratio|; None where it is not measured."""
    if measure == "score":
        return float(model.values[score].mean()) if score in model.values else None
    ratio = model.values[MAGNITUDE].sum() / real_magnitude.sum() if real_magnitude.sum() > 0 else 0.0
    return abs(float(np.log(ratio))) if ratio > 0 else None


def best_so_far(
    model: PerClip, earlier: Mapping[Measure, PerClip], real_magnitude: Values, score: str
) -> dict[Measure, PerClip]:
    """Of a model and the best before it, the better one by each measure."""
    best: dict[Measure, PerClip] = {}
    for measure in ("score", "motion"):
        own = value_of(measure, model, real_magnitude, score)
        other = earlier.get(measure)
        least = None if other is None else value_of(measure, other, real_magnitude, score)
        if other is not None and least is not None and (own is None or least <= own):
            best[measure] = other
        elif own is not None:
            best[measure] = model
    return best


def best_bytes(best: Mapping[Measure, PerClip]) -> bytes:
    """The content of `BEST_FILE`."""
    arrays: dict[str, Any] = {}
    for measure, model in best.items():
        arrays[f"{measure}/model_sha256"] = np.array(model.model_sha256)
        arrays[f"{measure}/keys"] = np.array(model.keys)
        arrays |= {f"{measure}/{name}": column for name, column in model.values.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_best(report: str) -> dict[Measure, PerClip]:
    """The best champions that a report keeps; none where it keeps none."""
    try:
        content = storage.read_bytes(storage.join(report, BEST_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    best: dict[Measure, PerClip] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        for measure in ("score", "motion"):
            names = [n for n in (ENERGY_SCORE, CLIP_DISTANCE, MAGNITUDE) if f"{measure}/{n}" in file.files]
            if (measure == "score" and names) or MAGNITUDE in names:  # a motion of one sample is another measure
                keys = tuple(str(key) for key in file[f"{measure}/keys"])
                values = {name: file[f"{measure}/{name}"] for name in names}
                best[measure] = PerClip(str(file[f"{measure}/model_sha256"]), keys, values)
    return best


def champion_model(report: str) -> str:
    """The sha256 of the model of an earlier report."""
    return read_evaluation(report).model_sha256
