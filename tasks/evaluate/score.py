"""From frames to the table: what the judges see of one clip, the sums over all clips, and the gate's pure rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate.consistency import consistency_at, consistency_curve
from tasks.evaluate.frechet import Moments, frechet_distance, kernel_distance
from tasks.evaluate.generate import shown
from tasks.evaluate.judges import NOT_COMPARABLE, Judge, JudgeName, judge_item
from tasks.evaluate.pixel_metrics import clip_distance, motion_magnitude, psnr, ssim
from tasks.evaluate.protocols import Item
from tasks.evaluate.statistics import Estimate, mean_over_clips, ratio_of_sums

# The two reference rows stand in every table: a still clip scores 100 on consistency, so a score alone says nothing.
ROWS = ("frozen", "trip", "real")
ROW_LABELS = {"frozen": "Frozen first frame", "trip": "TRIP (this run)", "real": "Real video"}

Arrays = dict[str, NDArray[Any]]


def judge_clip(judges: Sequence[Judge], item: Item, real: NDArray[np.uint8], generated: NDArray[np.uint8]) -> Arrays:
    """All that later sums need of one clip: the judges' features and numbers, as arrays that go into one npz.

    `real` and `generated` are uint8 [F, H, W, 3]; `generated` holds the model's own frame 1.
    """
    rows = {"frozen": np.repeat(real[:1], len(real), axis=0), "trip": shown(generated, real), "real": real}
    arrays: Arrays = {
        "psnr_trip": np.float64(psnr(generated[0], real[0])),  # type: ignore[dict-item]
        "ssim_trip": np.float64(ssim(generated[0], real[0])),  # type: ignore[dict-item]
    }
    for row, pixels in rows.items():
        for judge in judges:
            found = judge_item(judge, f"{item.key} ({row})", pixels, item.caption)
            arrays |= {f"{feature}_{row}": values for feature, values in found.items()}
        arrays[f"magnitude_{row}"] = np.float64(motion_magnitude(pixels))  # type: ignore[assignment]
        arrays[f"distance_{row}"] = np.float64(clip_distance(pixels, real))  # type: ignore[assignment]
    return arrays


@dataclass(frozen=True)
class Summary:
    """The numbers of one evaluation: metrics[row][metric], curves[row] at k = 2..F, one dict per item, and remarks."""

    metrics: dict[str, dict[str, Estimate]]
    curves: dict[str, list[Estimate]]
    per_clip: list[dict[str, Any]]
    notes: list[str]
    clips: int


def _frechet(summed: dict[str, Moments], row: str) -> Estimate:
    return Estimate(frechet_distance(summed[row], summed["real"]))


def _merged(parts: list[NDArray[Any]]) -> Moments:
    return Moments.of(np.concatenate(parts))


def summarise(
    items: Sequence[Item], scores: Sequence[Arrays], judges: Sequence[JudgeName], bootstrap: int = 2000
) -> Summary:
    """Sums the scores of all items, in the items' order; deterministic, whoever made the scores and when.

    Intervals are 95 % bootstrap intervals that draw whole clips. Frechet distances carry none: a percentile interval of
    a Frechet distance is biased to the point of missing its own estimate. Their floor stands in the real row instead.
    """
    judge, *distances = judges[:3]
    clips = [item.clip for item in items]
    names = list(dict.fromkeys(clips))
    halves = ({name for name in names[::2]}, {name for name in names[1::2]})
    metrics: dict[str, dict[str, Estimate]] = {}
    curves: dict[str, list[Estimate]] = {}
    column = {name: np.array([float(s[name]) for s in scores]) for name in scores[0] if scores[0][name].ndim == 0}
    by_row = {row: np.stack([consistency_curve(s[f"clip_frames_{row}"]) for s in scores]) for row in ROWS}
    moving = bool(column["magnitude_real"].sum() > 0)

    for row in ROWS:
        curves[row] = [mean_over_clips(values, clips, bootstrap) for values in by_row[row].T]
        consistency_at(by_row[row][0], 4)  # a video of fewer than 4 frames is an error, not a shorter average
        values = {f"{judge.metric}/4": curves[row][2], f"{judge.metric}/all": curves[row][-1]}
        if moving:
            values["motion_ratio"] = ratio_of_sums(
                column[f"magnitude_{row}"], column["magnitude_real"], clips, bootstrap
            )
        values["clip_distance"] = mean_over_clips(column[f"distance_{row}"], clips, bootstrap)
        metrics[row] = values
    difference = column["distance_trip"] - column["distance_frozen"]
    metrics["trip"]["clip_distance_minus_frozen"] = mean_over_clips(difference, clips, bootstrap)
    metrics["trip"]["first_frame_psnr_db"] = mean_over_clips(column["psnr_trip"], clips, bootstrap)
    metrics["trip"]["first_frame_ssim"] = mean_over_clips(column["ssim_trip"], clips, bootstrap)

    for distance in distances:
        name, kernel, (feature,) = distance.metric, distance.kernel_metric, distance.features
        whole = {row: [s[f"{feature}_{row}"] for s in scores] for row in ROWS}
        moments = {row: _merged(parts) for row, parts in whole.items()}
        for row in ("frozen", "trip"):
            metrics[row][name] = _frechet(moments, row)
            metrics[row][kernel] = Estimate(kernel_distance(np.concatenate(whole[row]), np.concatenate(whole["real"])))
        if all(halves):
            sides = [[p for p, clip in zip(whole["real"], clips, strict=True) if clip in half] for half in halves]
            metrics["real"][name] = Estimate(frechet_distance(_merged(sides[0]), _merged(sides[1])))
            metrics["real"][kernel] = Estimate(kernel_distance(np.concatenate(sides[0]), np.concatenate(sides[1])))

    per_clip = []
    for i, item in enumerate(items):
        line: dict[str, Any] = {"key": item.key, "clip": item.clip, "caption": item.caption, "seed": item.seed}
        real_motion = column["magnitude_real"][i]
        line["motion_ratio"] = float(column["magnitude_trip"][i] / real_motion) if real_motion > 0 else None
        for name in ("magnitude_real", "magnitude_trip", "distance_trip", "distance_frozen", "psnr_trip", "ssim_trip"):
            line[name] = float(column[name][i])
        for row in ROWS:
            line[f"consistency_4_{row}"] = consistency_at(by_row[row][i], 4)
            line[f"consistency_all_{row}"] = float(by_row[row][i][-1])
        per_clip.append(line)
    return Summary(metrics, curves, per_clip, _notes(items, len(names), judges), len(names))


def _notes(items: Sequence[Item], clips: int, judges: Sequence[JudgeName]) -> list[str]:
    judge, appearance, motion = judges[:3]
    consistency = (
        "CLIP ViT-L/14 (OpenAI), consecutive pairs, frame 1 is the given image; the paper does not state its pair "
        "rule, and its rows come from other clips"
        if judge.official
        else f"{judge.metric}: consecutive pairs under an image encoder that is not OpenAI's ViT-L/14, {NOT_COMPARABLE}"
    )
    return [
        f"{len(items)} windows of {clips} unique held-out clips; intervals are 95 %, by bootstrap over clips.",
        f"Frame consistency: {consistency}.",
        f"{appearance.metric} and {motion.metric}: Frechet distances to the real clips under fixed random "
        f"nets of single frames (the given one excluded) and of frame differences, real and generated paired by first "
        f"frame, {NOT_COMPARABLE}. The real row holds their floor: one half of the real clips against the other, at "
        "half the number. No interval: a percentile interval of a Frechet distance is biased.",
        "rkd-*: unbiased kernel distances (cubic polynomial) on the same features.",
        "Frame 1 of a generated clip is the given image; first-frame PSNR and SSIM are of the model's own frame 1.",
        "Clip distance: root mean square error to the true clip over frames 2 to the last, pixels in 0-1.",
        "The best consistency is the real row's, not the highest: a still clip scores 100.",
    ]


@dataclass(frozen=True)
class GateRule:
    """Thresholds for a model to count as one that animates."""

    least_motion_ratio: float = 0.5
    most_motion_ratio: float = 1.5
    least_clips: int = 32


@dataclass(frozen=True)
class Gate:
    """Whether the rule is met; every reason against is listed."""

    passed: bool
    reasons: tuple[str, ...]


def gate(motion_ratio: float | None, distance_minus_frozen: Estimate, clips: int, rule: GateRule | None = None) -> Gate:
    """Moves about as much as the real clips, and lies nearer to them than a still does, on clips enough to say so.

    A pure rule: motion ratio within bounds, the upper end of the paired interval of (distance generated - distance
    frozen) below 0, and a least number of unique clips.
    """
    rule = rule or GateRule()
    reasons = []
    if clips < rule.least_clips:
        reasons.append(f"{clips} held-out clips, at least {rule.least_clips} are needed to say anything")
    low, high = rule.least_motion_ratio, rule.most_motion_ratio
    if motion_ratio is None:
        reasons.append("the real clips do not move, so there is no motion ratio")
    elif not low <= motion_ratio <= high:
        reasons.append(f"motion ratio {motion_ratio:.3g} lies outside {low:g} to {high:g}")
    upper = distance_minus_frozen.ci_high
    if upper is None:
        reasons.append("the distance to the true clip has no interval (a single clip)")
    elif not upper < 0:
        reasons.append(
            "not shown to be closer to the true clip than a still: the interval of the paired difference reaches "
            f"{upper:+.4f}"
        )
    return Gate(not reasons, tuple(reasons))
