"""From records and features to the table: which metrics there are, what was counted, and how to read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE
from tasks.evaluate.protocol.protocol import Item, Protocol
from tasks.evaluate.report.distances import Sums, Values
from tasks.evaluate.systems import ALL_MAGNITUDE, HASHES, SPREAD, TO_TRUTH, Features
from tasks.evaluation_record import BASE, FROZEN, REAL, TRIP
from tasks.metrics.alignment import Alignment
from tasks.metrics.consistency import (
    PAIR_RULES,
    consistency_at,
    consistency_by_lag,
    consistency_curve,
    consistency_name,
)
from tasks.metrics.energy import energy_score
from tasks.metrics.extractors.extractor import NOT_COMPARABLE, ExtractorInfo, MetricKind
from tasks.metrics.statistics import Estimate, mean_over_clips, ratio_of_sums

ALIGNMENT = tuple(field.name for field in fields(Alignment))  # names in a record, and of the metrics


@dataclass(frozen=True)
class Summary:
    """The numbers of one evaluation; `rows` names them in the table's order.

    metrics[row][metric]; differences[row][metric]: the row minus TRIP, paired by clip; floors[metric]: real clips
    against real ones, disjoint halves at half the number, not paired; infinity[row][metric]: the distance at endless N,
    where there are clips enough for it;
    curves[name][row]: frame consistency by pair rule at k = 2..F ("consecutive" is Figure 4), cosine by lag 1..F-1
    ("lag"), "psnr" and "ssim" to the true frames 1..F; `per_clip`: a dict per item; `counts`: how many there are
    and why others are not; by_item[metric][row]: the values that a mean or ratio is of, in the order of the items,
    and `systems.ALL_MAGNITUDE`, the motion magnitude as the mean over an item's samples.
    """

    rows: tuple[str, ...]
    metrics: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    floors: dict[str, Estimate]
    infinity: dict[str, dict[str, Estimate]]
    curves: dict[str, dict[str, list[Estimate]]]
    per_clip: list[dict[str, Any]]
    counts: dict[str, Any]
    notes: list[str]
    by_item: dict[str, dict[str, Values]] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        """Unique clips."""
        return self.counts["clips"]


def distances_of_sets(extractors: Sequence[ExtractorInfo]) -> tuple[str, ...]:
    """The metrics that compare sets of clips or frames."""
    return tuple(extractor.metric for extractor in extractors if extractor.of_sets)


def summarise(
    protocol: Protocol,
    items: Sequence[Item],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    features: Callable[[ExtractorInfo, str], Sequence[Features]],
    extractors: Sequence[ExtractorInfo],
    bootstrap: int = 2000,
    excluded: Mapping[str, Mapping[str, int]] | None = None,
) -> Summary:
    """Aggregates all systems in the order of the items; deterministic.

    Intervals are 95 % bootstrap intervals that draw whole clips. Frechet distances carry none: a percentile interval of
    a Frechet distance is biased to the point of missing its own estimate. Their differences do; the real row holds the
    distance of two real halves.

    Args:
        protocol: says which frames and rows count.
        items: the items that every system has, in order.
        records: of each row and item, the record of `systems.measure_batch`.
        features: an extractor's features of a row's items.
        extractors: the feature extractors to report.
        bootstrap: number of resamples.
        excluded: by row, how many of the protocol's items it lacks, by reason.
    Raises:
        ValueError: a video of fewer than 4 frames, features that are not finite.
    """
    rows = tuple(records)
    sums = Sums(items, rows, bootstrap)
    column = {
        row: {n: np.array([r[n] for r in records[row]]) for n in records[row][0] if n not in HASHES} for row in rows
    }
    for extractor in extractors:
        if extractor.kind is MetricKind.CONSISTENCY:
            _add_consistency(sums, extractor, {row: features(extractor, row) for row in rows})
    sums.add("motion_ratio", {row: column[row]["magnitude"] for row in rows}, ratio=True)
    sums.add("coarse_motion_ratio", {row: column[row]["coarse_magnitude"] for row in rows}, ratio=True)
    sums.add("clip_distance", {row: column[row]["distance"] for row in rows})
    sums.add("flicker_ratio", {row: column[row]["flicker"] for row in rows}, ratio=True)
    sums.add("smoothness_ratio", {row: column[row]["smoothness"] for row in rows}, ratio=True)
    for name in ALIGNMENT:
        sums.add(name, {row: column[row][name] for row in rows})
    _add_energy_score(sums, column)
    for metric in (CLIP_DISTANCE, ENERGY_SCORE):
        values = sums.by_item.get(metric, {})
        for row in (FROZEN, BASE):
            if row in values:
                minus = values[TRIP] - values[row]
                sums.metrics[TRIP][f"{metric}_minus_{row}"] = mean_over_clips(minus, sums.clips, bootstrap)
    for kind, metric in (("psnr", "first_frame_psnr_db"), ("ssim", "first_frame_ssim")):
        curves = {row: column[row][kind] for row in rows if kind in column[row]}
        sums.add(metric, {row: values[:, 0] for row, values in curves.items()})
        sums.add_curve(kind, curves)
    for extractor in extractors:
        if extractor.kind is MetricKind.FLOW_RATIO:
            flow = {row: np.array([f["flow"].mean() for f in features(extractor, row)], np.float64) for row in rows}
            sums.add(extractor.metric, flow, ratio=True)
        elif extractor.of_sets:
            by_row = {row: [f[extractor.features[0]] for f in features(extractor, row)] for row in rows}
            if extractor.kind is MetricKind.FRAME_SETS and not protocol.rules.shifted:
                # Its first row is the given frame, which all rows share.
                sums.add_with_given_frame(extractor, by_row)
                by_row = {row: [values[1:] for values in clips] for row, clips in by_row.items()}
            sums.add_distances(extractor, by_row)
    return Summary(
        rows=rows,
        metrics=dict(sums.metrics),
        differences=dict(sums.differences),
        floors=sums.floors,
        infinity=dict(sums.infinity),
        curves=dict(sums.curves),
        per_clip=_per_clip(sums, column, extractors),
        counts=_counts(protocol, items, excluded or {}),
        notes=_notes(protocol, items, extractors, excluded or {}),
        by_item=dict(sums.by_item)
        | {ALL_MAGNITUDE: {row: column[row].get(ALL_MAGNITUDE, column[row]["magnitude"]) for row in rows}},
    )


def _add_energy_score(sums: Sums, column: Mapping[str, Mapping[str, Values]]) -> None:
    """The energy score of systems with several samples of each item, and of the still, which has one answer.

    The spread ratio is the distance between two samples relative to the distance of one to the true clip: 1 where the
    true clip is one more draw of the system's distribution.
    """
    if SPREAD not in column[TRIP]:
        return
    scores = {FROZEN: column[FROZEN]["distance"]}
    for row, values in column.items():
        if SPREAD in values:
            scores[row] = energy_score(values[TO_TRUTH], values[SPREAD])
            sums.metrics[row]["spread_ratio"] = ratio_of_sums(
                values[SPREAD], values[TO_TRUTH].mean(axis=1), sums.clips, sums.resamples
            )
    sums.add(ENERGY_SCORE, {row: scores[row] for row in sums.rows if row in scores})


def _add_consistency(sums: Sums, extractor: ExtractorInfo, features: Mapping[str, Sequence[Features]]) -> None:
    """Frame consistency by every pair rule; frame 1 of every row is the given image, whatever a method made of it."""
    given = [f["clip_frames"][:1] for f in features[REAL]]
    frames = {
        row: [np.concatenate([first, f["clip_frames"][1:]]) for first, f in zip(given, clips, strict=True)]
        for row, clips in features.items()
    }
    for rule in PAIR_RULES:
        curves = {row: np.stack([consistency_curve(e, rule) for e in clips]) for row, clips in frames.items()}
        for values in curves.values():
            consistency_at(values[0], 4)  # a video of fewer than 4 frames is an error, not a shorter average
        sums.add(consistency_name(extractor.metric, 4, rule), {row: values[:, 2] for row, values in curves.items()})
        sums.add(
            consistency_name(extractor.metric, "all", rule), {row: values[:, -1] for row, values in curves.items()}
        )
        sums.add_curve(rule, curves)
    sums.add_curve("lag", {row: np.stack([consistency_by_lag(e) for e in clips]) for row, clips in frames.items()})
    if "clip_text" in extractor.features:
        texts = [f["clip_text"] for f in features[REAL]]
        agreement = {
            row: np.array([_cosine(e, text) for e, text in zip(clips, texts, strict=True)])
            for row, clips in frames.items()
        }
        sums.add(f"text_alignment{extractor.mark}", agreement)


def _cosine(frames: NDArray[Any], text: NDArray[Any]) -> float:
    """100 x mean cosine of the frames' embeddings [F, D] and the caption's [D]."""
    a, b = frames.astype(np.float64), text.astype(np.float64)
    return float(100.0 * (a @ b / (np.linalg.norm(a, axis=1) * np.linalg.norm(b))).mean())


def _per_clip(
    sums: Sums, column: Mapping[str, Mapping[str, Values]], extractors: Sequence[ExtractorInfo]
) -> list[dict[str, Any]]:
    consistency = next(extractor.metric for extractor in extractors if extractor.kind is MetricKind.CONSISTENCY)
    lines = []
    for i, item in enumerate(sums.items):
        line: dict[str, Any] = {"key": item.key, "clip": item.clip, "caption": item.caption, "seed": item.seed}
        line |= {"category": item.category, "start": item.start}
        moved = column[REAL]["magnitude"][i]
        line["motion_ratio"] = float(column[TRIP]["magnitude"][i] / moved) if moved > 0 else None
        for row in sums.rows:
            for name in ("magnitude", "distance", "flicker", "smoothness", *ALIGNMENT):
                line[f"{name}_{row}"] = float(column[row][name][i])
            for name in ("psnr", "ssim"):
                if name in column[row]:
                    line[f"{name}_{row}"] = float(column[row][name][i, 0])
            for k in ("4", "all"):
                line[f"consistency_{k}_{row}"] = float(sums.by_item[f"{consistency}/{k}"][row][i])
        lines.append(line)
    return lines


def _counts(protocol: Protocol, items: Sequence[Item], excluded: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    clips = {(item.category, item.clip) for item in items}
    reasons = {"data set": dict(protocol.excluded)} | {name: dict(counts) for name, counts in excluded.items()}
    return {
        "asked": len(protocol.items) + sum(count for _, count in protocol.excluded),
        "items": len(items),
        "clips": len({clip for _, clip in clips}),
        "clips_by_category": dict(sorted(Counter(category for category, _ in clips if category).items())),
        "excluded": {name: counts for name, counts in reasons.items() if counts},
    }


def exclusions(counts: Mapping[str, Any]) -> list[str]:
    """A sentence for each reason for which items are in no row, of `Summary.counts`."""
    return [
        f"left out of {counts['asked']} items, in all rows: {count} that {name} lacks ({reason})"
        for name, reasons in counts["excluded"].items()
        for reason, count in reasons.items()
    ]


def _notes(
    protocol: Protocol,
    items: Sequence[Item],
    extractors: Sequence[ExtractorInfo],
    excluded: Mapping[str, Mapping[str, int]],
) -> list[str]:
    """What a reader must know; first of all what was left out."""
    rules, counts = protocol.rules, _counts(protocol, items, excluded)
    notes = exclusions(counts)
    of_each = ", ".join(f"{name} {count}" for name, count in counts["clips_by_category"].items())
    notes += [
        f"Protocol {protocol.name}: {rules.title}; {len(items)} {'windows' if rules.repeats == 1 else 'items'} of "
        f"{counts['clips']} unique clips{f' ({of_each})' if of_each else ''}, {protocol.sampling}, {protocol.size} "
        f"pixels{', squashed' if rules.fit == 'squash' else ''}; intervals are 95 %, by bootstrap over clips.",
        *rules.caveats,
    ]
    if rules.repeats > 1:
        notes.append(f"Each window is animated {rules.repeats} times, and its real clip counts as often.")
    if rules.shifted:
        notes.append(
            f"Distances between sets of clips compare real frames 1 to {protocol.frames - 1}, the given one among "
            f"them, with made frames 2 to {protocol.frames}; all else is measured over all {protocol.frames}."
        )
    for extractor in extractors:
        notes.append(f"{extractor.metric}: {extractor.geometry}{'' if extractor.official else f'; {NOT_COMPARABLE}'}.")
    return [
        *notes,
        "Frame consistency: consecutive pairs unless a name says otherwise, frame 1 of every row is the given image. "
        "The paper does not state its pair rule. The best is the real row's, not the highest: a still clip scores 100.",
        "Frechet and kernel (cubic) distances are to the real clips, paired by first frame. The kernel distance leaves "
        "out all pairs of one source clip, which makes it unbiased for paired sets. The real row holds the distance of "
        "two halves of the real clips, not paired, at half the number. A percentile interval of a Frechet distance is "
        "biased, so none is given; that of its difference from TRIP is.",
        "Every row is the clip as its user gets it: of TRIP frame 1 is the given image, of a folder the method's own. "
        "First-frame PSNR and SSIM are of the own frame 1. A folder's frames are taken one by one, whatever rate "
        "it states.",
        "Clip distance: root mean square error to the true clip over frames 2 to the last, pixels in 0-1. Where chance "
        "decides the motion it prefers a still or a blurred mean to a perfect model.",
        "Energy score: mean distance of the samples of an item to the true clip, minus half of that between samples. "
        "It is least for the model whose clips are distributed as the true ones. The still has one answer, so its "
        "score is its distance. Spread ratio: distance between samples over distance to the true clip, 1 is best.",
        "Motion, flicker and smoothness ratios are to the real clips: 1 is best.",
        "Warped errors and the distance of the moving part: root mean square errors after optical flow (OpenCV's DIS) "
        "has followed the picture, pixels in 0-1. A still has 0, so the real row's value is the target, and a larger "
        "one means that what was shown changed. Published warping errors use other flow: not comparable.",
    ]
