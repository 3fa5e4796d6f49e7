"""A number with its interval: means and ratios over clips, by the BCa bootstrap over source videos (clusters)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan, cos, pi, sin, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; the ends are None where no honest interval exists (a Frechet distance)."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None


@lru_cache
def student_quantile(degrees: int) -> float:
    """t with P(|T| < t) = 0.95 for Student's T with whole degrees of freedom, by bisection of its finite sum.

    Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom, expected at least 1")

    def within(t: float) -> float:
        angle = atan(t / sqrt(degrees))
        odd = degrees % 2
        term = cos(angle) if odd else 1.0
        total = 0.0
        for k in range(1 + odd, degrees, 2):
            total += term
            term *= cos(angle) ** 2 * k / (k + 1)
        return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total

    low, high = 0.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return low


@lru_cache(maxsize=2)
def _draws(clusters: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each cluster is drawn, [resamples, clusters]; kept, for all columns of a table draw the same."""
    even = np.full(clusters, 1 / clusters)
    return np.random.default_rng(seed).multinomial(clusters, even, size=resamples).astype(np.float64)


def ratio_of_sums(
    numerators: Any, denominators: Any, clusters: list[str], resamples: int = 2000, seed: int = 0
) -> Estimate:
    """sum(numerators)/sum(denominators) with a 95 % BCa bootstrap interval that resamples whole clusters.

    Windows of one source clip are near-duplicates, so the clip, not the window, is what is drawn again. The quantiles
    are those of BCa (Efron, 1987), widened for few clusters by Student's t (Hesterberg, 2015): percentile intervals of
    20 to 40 clips are too short (docs/decisions/metrics.md).
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
    draws = _draws(len(names), resamples, seed)
    sums = draws @ bottoms
    ratios = (draws @ tops)[sums != 0] / sums[sums != 0]
    low, high = np.quantile(ratios, _bca_levels(ratios, value, tops - value * bottoms))
    return Estimate(value, float(low), float(high))


def _bca_levels(resampled: NDArray[np.float64], value: float, influence: NDArray[np.float64]) -> tuple[float, float]:
    """Which quantiles of the resampled values are the ends of a 95 % interval; influence [clusters], mean 0."""
    normal, clusters = NormalDist(), len(influence)
    rounding = 1e-9 * np.ptp(resampled)  # a draw of every cluster once is a tie, whatever its last bit
    below = float((resampled < value - rounding).mean() + (resampled <= value + rounding).mean()) / 2
    edge = 0.5 / len(resampled)
    bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
    spread = float((influence**2).sum())
    skew = float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    reach = sqrt(clusters / (clusters - 1)) * student_quantile(clusters - 1)
    ends = (bias - reach, bias + reach)
    low, high = (normal.cdf(bias + end / max(1 - skew * end, 1e-6)) for end in ends)
    return low, high


def mean_over_clips(values: Any, clusters: list[str], resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over items with the interval of `ratio_of_sums`."""
    return ratio_of_sums(values, np.ones(len(clusters)), clusters, resamples, seed)


def paired_difference(
    a: Any, b: Any, clusters: list[str], denominators: Any = None, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of a - b over items, drawn clip by clip; with `denominators`, the difference of two ratios of sums.

    Both systems are judged on the same items, so what makes an item hard cancels and the interval is of the difference
    alone. ValueError where the numbers of items differ: a shorter list would pair the wrong clips.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values differ in number: {first.shape} and {second.shape}")
    over = np.ones(len(first)) if denominators is None else denominators
    return ratio_of_sums(first - second, over, clusters, resamples, seed)


def unique_clips(clusters: Sequence[str]) -> int:
    """The number of source videos: the N that an interval and a Frechet distance rest on, however many the items."""
    return len(set(clusters))


def disjoint_parts(clusters: Sequence[str], parts: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """The items' positions dealt into parts that share no source video, in a seeded order; ValueError on too few."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < parts:
        raise ValueError(f"{len(names)} source videos cannot make {parts} parts; at least {parts} are needed")
    part = np.random.default_rng(seed).permutation(len(names)) % parts
    return [np.flatnonzero(part[index] == i) for i in range(parts)]
