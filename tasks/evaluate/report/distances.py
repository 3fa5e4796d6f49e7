"""Fills the table: every metric of every row by one rule each, its paired difference from TRIP, floors and limits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate.protocol.protocol import Item
from tasks.evaluation_record import REAL, TRIP
from tasks.metrics.extractors.extractor import ExtractorInfo, MetricKind
from tasks.metrics.frechet import (
    PARTS,
    FeatureSet,
    Moments,
    frechet_distance,
    frechet_floor,
    frechet_to_real,
    kernel_distance,
    kernel_distance_of_frames,
    paired_frechet_difference,
)
from tasks.metrics.statistics import (
    Estimate,
    mean_over_clips,
    paired_difference,
    ratio_of_sums,
    student_quantile,
    unique_clips,
)
from tasks.records import UserError

Values = NDArray[np.float64]


@dataclass
class Sums:
    """What a summary is filled from, metric by metric; values are by item, arrays of features too."""

    items: Sequence[Item]
    rows: tuple[str, ...]
    resamples: int
    metrics: dict[str, dict[str, Estimate]] = field(default_factory=lambda: defaultdict(dict))
    differences: dict[str, dict[str, Estimate]] = field(default_factory=lambda: defaultdict(dict))
    infinity: dict[str, dict[str, Estimate]] = field(default_factory=lambda: defaultdict(dict))
    floors: dict[str, Estimate] = field(default_factory=dict)
    curves: dict[str, dict[str, list[Estimate]]] = field(default_factory=lambda: defaultdict(dict))
    by_item: dict[str, dict[str, Values]] = field(default_factory=dict)  # [metric][row], what `add` was given

    @property
    def clips(self) -> list[str]:
        return [item.clip for item in self.items]

    def add(self, metric: str, by_row: Mapping[str, Values], ratio: bool = False) -> None:
        """Means over clips, or ratios to the real row's sum, with the paired difference of each row from TRIP."""
        self.by_item[metric] = dict(by_row)
        over = by_row[REAL] if ratio else np.ones(len(self.items))
        if not over.sum() > 0:
            return  # real clips without any motion have no motion ratio
        for row, values in by_row.items():
            self.metrics[row][metric] = ratio_of_sums(values, over, self.clips, self.resamples)
            if row != TRIP:
                minus = paired_difference(values, by_row[TRIP], self.clips, over, self.resamples)
                self.differences[row][metric] = minus

    def add_curve(self, name: str, by_row: Mapping[str, Values]) -> None:
        """Means over clips of values [N, points]."""
        for row, values in by_row.items():
            self.curves[name][row] = [mean_over_clips(point, self.clips, self.resamples) for point in values.T]

    def add_with_given_frame(self, extractor: ExtractorInfo, by_row: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """The Frechet distance of all frames, the given one among them, under a name of its own."""
        for row in self.rows:
            if row != REAL:
                category_distances = []
                for indices in _categories(self.items):
                    one, other = (Moments.of(np.concatenate([by_row[r][i] for i in indices])) for r in (row, REAL))
                    category_distances.append(frechet_distance(one, other))
                self.metrics[row][f"{extractor.metric}/with_given_frame"] = Estimate(float(np.mean(category_distances)))

    def add_distances(self, extractor: ExtractorInfo, by_row: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Frechet and kernel distances to the real clips, of several categories the mean of their own.

        The real row holds the floor: one half of the clips against the other, which are not paired as the rows are.
        """
        sets = [_Category(extractor, by_row, indices, self.clips) for indices in _categories(self.items)]
        clips = [unique_clips(s.clips) for s in sets]
        for row in self.rows:
            if row == REAL:
                continue
            self.metrics[row][extractor.metric] = together([s.frechet(row) for s in sets], clips)
            self.metrics[row][extractor.kernel_metric] = together([s.kernel(row) for s in sets], clips)
            if all(s.straight for s in sets):
                self.infinity[row][extractor.metric] = together([s.infinity(row) for s in sets], clips)
            if row != TRIP:
                self.differences[row][extractor.metric] = together(
                    [s.difference(row, self.resamples) for s in sets], clips
                )
        floors = [s.floor() for s in sets if s.halves]
        if len(floors) == len(sets):
            for name, values in zip(
                (extractor.metric, extractor.kernel_metric), zip(*floors, strict=True), strict=True
            ):
                self.floors[name] = self.metrics[REAL][name] = together(values, clips)


class _Category:
    """The features of one category's clips in all rows.

    Raises:
        UserError: too few of them for a covariance.
    """

    def __init__(
        self,
        extractor: ExtractorInfo,
        by_row: Mapping[str, Sequence[NDArray[Any]]],
        indices: Sequence[int],
        clips: Sequence[str],
    ) -> None:
        self.framewise = extractor.kind is MetricKind.FRAME_SETS
        self.by_clip = {row: [values[i] for i in indices] for row, values in by_row.items()}
        self.clips = [clips[i] for i in indices]
        self.clusters = [clip for clip, values in zip(self.clips, self.by_clip[REAL], strict=True) for _ in values]
        names = list(dict.fromkeys(self.clips))
        if len(names) < 2:
            raise UserError(
                f"{extractor.metric} needs at least 2 clips, 1 is left; ask for more, or leave this extractor out"
            )
        odd = set(names[1::2])
        self.halves = [[i for i, clip in enumerate(self.clips) if (clip in odd) == side] for side in (False, True)]
        if len(names) < 4:  # half of them has no two clips
            self.halves = []
        self.many = len(names) >= 2 * PARTS  # of fewer videos a feature set says nothing beyond the distance
        # A quarter of the videos must be twice the features: with fewer the distance is not linear in 1/N.
        self.straight = len(names) >= 2 * PARTS * self.by_clip[REAL][0].shape[1]
        rows = {row: np.concatenate(values) for row, values in self.by_clip.items()}
        if self.many:
            sets = {row: FeatureSet.of(values, self.clusters) for row, values in rows.items()}
            self.real = sets[REAL]
            self.distances = {
                row: frechet_to_real(features, sets[REAL]) for row, features in sets.items() if row != REAL
            }
            self.values = {row: distance.value for row, distance in self.distances.items()}
        else:
            moments = {row: Moments.of(values) for row, values in rows.items()}
            self.values = {row: frechet_distance(own, moments[REAL]) for row, own in moments.items() if row != REAL}

    def frechet(self, row: str) -> Estimate:
        return Estimate(self.values[row])

    def kernel(self, row: str) -> Estimate:
        indices = range(len(self.clips))
        return self._kernel(self.by_clip[row], self.by_clip[REAL], indices, indices)

    def infinity(self, row: str) -> Estimate:
        distance = self.distances[row]
        reach = 1.96 * distance.sd
        return Estimate(distance.infinity, distance.infinity - reach, distance.infinity + reach)

    def difference(self, row: str, resamples: int) -> Estimate:
        if not self.many:
            return Estimate(self.values[row] - self.values[TRIP])
        return paired_frechet_difference(self.distances[row], self.distances[TRIP], self.clusters, resamples)

    def floor(self) -> tuple[Estimate, Estimate]:
        """Frechet and kernel distance of one half of the real clips to the other."""
        real = self.by_clip[REAL]
        if self.many:
            distance = frechet_floor(self.real)
        else:
            one, other = ([real[i] for i in half] for half in self.halves)
            distance = frechet_distance(Moments.of(np.concatenate(one)), Moments.of(np.concatenate(other)))
        return Estimate(distance), self._kernel(real, real, *self.halves)

    def _kernel(
        self, one: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]], indices: Sequence[int], others: Sequence[int]
    ) -> Estimate:
        """The kernel distance of the clips at some indices to those at others."""
        if self.framewise:
            count = min(len(indices), len(others))
            x, y = np.stack([one[i] for i in indices[:count]]), np.stack([other[i] for i in others[:count]])
            x_clips, y_clips = ([self.clips[i] for i in group[:count]] for group in (indices, others))
            return Estimate(kernel_distance_of_frames(x, y, x_clips, y_clips))
        # In float64: the kernel distance of small features is near the rounding of float32.
        x = np.concatenate([one[i] for i in indices]).astype(np.float64)
        y = np.concatenate([other[i] for i in others]).astype(np.float64)
        x_clips, y_clips = ([self.clips[i] for i in group for _ in one[i]] for group in (indices, others))
        return Estimate(kernel_distance(x, y, x_clips, y_clips))


def _categories(items: Sequence[Item]) -> list[list[int]]:
    """The indices of the items of each category; of all where there are none."""
    names = dict.fromkeys(item.category for item in items)
    return [[i for i, item in enumerate(items) if item.category == name] for name in names]


def together(estimates: Sequence[Estimate], clips: Sequence[int]) -> Estimate:
    """The mean of categories' estimates, whose source clips are drawn apart: their variances add.

    Each half width is taken as Student's t of one less than its clips times a standard error, which is too wide where
    long tails left fewer degrees of freedom. The degrees of freedom of the sum are Welch's (1947).

    Args:
        estimates: of each category.
        clips: the number of source clips of each category.
    """
    if len(estimates) == 1:
        return estimates[0]
    value = float(np.mean([e.value for e in estimates]))
    low, high = (
        [e for e in ends if e is not None] for ends in zip(*[(e.ci_low, e.ci_high) for e in estimates], strict=True)
    )
    if len(low) < len(estimates) or len(high) < len(estimates):
        return Estimate(value)

    def reach(widths: Sequence[float]) -> float:
        degrees = [count - 1 for count in clips]
        variances = [(w / student_quantile(d)) ** 2 for w, d in zip(widths, degrees, strict=True)]
        if not sum(variances):
            return 0.0
        welch = sum(variances) ** 2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True))
        return student_quantile(round(welch)) * sum(variances) ** 0.5 / len(widths)

    below = reach([e.value - end for e, end in zip(estimates, low, strict=True)])
    above = reach([end - e.value for e, end in zip(estimates, high, strict=True)])
    return Estimate(value, value - below, value + above)
