"""A number with its interval: means and ratios over clips, by bootstrap over source videos (clusters)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; the ends are None where no honest interval exists (a Frechet distance)."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None


def ratio_of_sums(
    numerators: Any, denominators: Any, clusters: list[str], resamples: int = 2000, seed: int = 0
) -> Estimate:
    """sum(numerators)/sum(denominators) with a 95 % bootstrap interval that resamples whole clusters.

    Windows of one source clip are near-duplicates, so the clip, not the window, is what is drawn again.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not len(top) == len(bottom) == len(clusters) or len(top) == 0:
        raise ValueError(f"lengths differ or are zero: {len(top)}, {len(bottom)}, {len(clusters)}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("per-clip values hold NaN or infinity")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    tops, bottoms = np.bincount(index, top), np.bincount(index, bottom)
    if bottoms.sum() == 0:
        raise ValueError("the denominators sum to zero: real clips without any motion have no motion ratio")
    value = float(tops.sum() / bottoms.sum())
    if len(names) < 2:
        return Estimate(value)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    sums = draws @ bottoms
    ratios = (draws @ tops)[sums != 0] / sums[sums != 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def mean_over_clips(values: Any, clusters: list[str], resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over items with the interval of `ratio_of_sums`. A paired difference is the mean of per-item differences."""
    return ratio_of_sums(values, np.ones(len(clusters)), clusters, resamples, seed)
