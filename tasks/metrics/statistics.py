"""A number with its interval: means and ratios over clips, by the BCa bootstrap over source videos (clusters)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


LEVEL = 0.95  # of every interval that is printed
FEW = 8  # clusters: a bootstrap of fewer draws too few values near the ends of their range
LEAST_P = 1e-3  # of a p value: an interval by 2,000 draws has no quantiles farther out


@lru_cache(maxsize=1024)
def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """t with P(|T| < t) = level for Student's T with whole degrees of freedom, by bisection of its finite sum.

    Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom, expected at least 1")
    if not 0 <= level < 1:
        raise ValueError(f"level {level}, expected at least 0 and below 1")

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
    while within(high) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return low


@lru_cache(maxsize=2)
def _draws(clusters: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each cluster is drawn, [resamples, clusters]; kept, for all columns of a table draw the same."""
    even = np.full(clusters, 1 / clusters)
    return np.random.default_rng(seed).multinomial(clusters, even, size=resamples).astype(np.float64)


def ratio_of_sums(
    numerators: Any,
    denominators: Any,
    clusters: list[str],
    resamples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """sum(numerators)/sum(denominators) with a BCa bootstrap interval (95 %) that resamples whole clusters.

    Windows of one source clip are near-duplicates, so the clip, not the window, is what is drawn again. The quantiles
    are those of BCa (Efron, 1987), widened for few clusters by Student's t (Hesterberg, 2015), with fewer degrees of
    freedom where the values have long tails, and by HC3: percentile intervals of 20 to 40 clips are too short
    (docs/decisions/metrics.md). With fewer than `FEW` clusters whose denominators are not 0, the interval is
    that of the linearisation by Student's t, which has no bound where the values have one.
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
    if np.count_nonzero(bottoms) < 2:
        return Estimate(value)
    influence, leverage = tops - value * bottoms, bottoms / bottoms.sum()
    if np.count_nonzero(bottoms) < FEW:
        error = _corrected_error(influence, leverage) / float(bottoms.sum())
        moving = influence[bottoms != 0]
        reach = student_quantile(degrees_of_freedom(moving - moving.mean()), level) * error
        return Estimate(value, value - reach, value + reach)
    draws = _draws(len(names), resamples, seed)
    sums = draws @ bottoms
    ratios = (draws @ tops)[sums != 0] / sums[sums != 0]
    low, high = np.quantile(ratios, _bca_levels(ratios, value, influence, leverage, level))
    return Estimate(value, float(low), float(high))


def function_of_sums(
    columns: Sequence[Any], function: Callable[[NDArray[np.float64]], NDArray[np.float64]], clusters: list[str]
) -> Estimate:
    """A function of several columns' sums over items, with the 95 % interval of its linearisation by Student's t.

    For functions that are not smooth everywhere, such as |ln ratio|: there a bootstrap interval is too short, this one
    is too long (docs/decisions/metrics.md).

    Args:
        columns: values by item, one sequence for each sum.
        function: sums [..., columns] -> values [...].
        clusters: the source clip of each item.
    Raises:
        ValueError: columns of other lengths than `clusters`, or values that are not finite.
    """
    values_KN = np.stack([np.asarray(column, dtype=np.float64) for column in columns])
    if values_KN.shape[1] != len(clusters) or not np.isfinite(values_KN).all():
        raise ValueError(f"{values_KN.shape[1]} values for {len(clusters)} items, or values that are not finite")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums_CK = np.stack([np.bincount(index, row) for row in values_KN], axis=1)
    total_K, count = sums_CK.sum(axis=0), len(names)
    value = float(function(total_K))
    if count < 2:
        return Estimate(value)
    step = 1e-5 * np.diag(np.abs(total_K))
    slope_K = (function(total_K + step) - function(total_K - step)) / (2e-5 * np.abs(total_K))
    influence_C = sums_CK @ slope_K
    error = np.sqrt(((influence_C - influence_C.mean()) ** 2).sum() * count / (count - 1))
    reach = student_quantile(degrees_of_freedom(influence_C - influence_C.mean())) * float(error)
    return Estimate(value, value - reach, value + reach)


def degrees_of_freedom(influence: NDArray[np.float64]) -> int:
    """Degrees of freedom of the sample variance: one less than the clusters, and fewer where tails are long.

    The variance of n values with excess kurtosis k has the relative variance 2 / (n - 1) + k / n; a scaled chi-square
    of 2 over that many degrees has the same (O'Neill, 2014). k is Fisher's unbiased estimate, at least 0.

    Args:
        influence: of each cluster, mean 0, at least two of them.
    """
    count, spread = len(influence), float((influence**2).sum())
    if count < 4 or spread == 0:
        return count - 1
    excess = count * float((influence**4).sum()) / spread**2 - 3
    unbiased = ((count + 1) * excess + 6) * (count - 1) / ((count - 2) * (count - 3))
    degrees = 2 / (2 / (count - 1) + max(unbiased, 0.0) / count)
    return max(1, int(degrees + 1e-9))  # of n - 1 the last bit may be missing


def share_of(hits: float, count: int, level: float = LEVEL) -> Estimate:
    """A share with Wilson's score interval (1927), which has an end above 0 where nothing was hit.

    Args:
        hits: the sum of the shares, 0 to `count`; whole where every source clip has one item.
        count: independent trials, the source clips; at least 1.
        level: of the interval.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits of {count}, expected a count of at least 1 and hits in 0 to the count")
    share, z2 = hits / count, NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = sqrt(z2 * share * (1 - share) / count + z2**2 / (4 * count**2)) / (1 + z2 / count)
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach))


def p_value(interval: Callable[[float], Estimate]) -> float:
    """The two-sided p of "the true value is 0": 1 minus the highest level at which the interval leaves out 0.

    By bisection, to 1e-4, at least `LEAST_P`; `interval` returns the estimate with its interval of a level. 1 where
    there is no interval, or its ends are not numbers.
    """

    def leaves_out_zero(level: float) -> bool:
        estimate = interval(level)
        low, high = estimate.ci_low, estimate.ci_high
        return low is not None and high is not None and (low > 0 or high < 0)

    low, high = 0.0, 1 - LEAST_P
    if leaves_out_zero(high):
        return 1 - high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if leaves_out_zero(middle) else (low, middle)
    return 1 - low


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several comparisons, adjusted by Holm (1979): the chance of any false one stays below alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _corrected_error(influence: NDArray[np.float64], leverage: NDArray[np.float64]) -> float:
    """The standard error HC3 of a sum of influences (MacKinnon and White, 1985), [clusters] each.

    A cluster pulls the estimate toward itself by its leverage, its share of the denominators; HC3 corrects that.
    """
    return sqrt(float(((influence / np.maximum(1 - leverage, 1e-6)) ** 2).sum()))


def _bca_levels(
    resampled: NDArray[np.float64],
    value: float,
    influence: NDArray[np.float64],
    leverage: NDArray[np.float64],
    level: float = LEVEL,
) -> tuple[float, float]:
    """Which quantiles of the resampled values are the ends of an interval; influence [clusters], mean 0.

    The resampled values vary less than the estimate, since each cluster pulls the estimate toward itself. The ends are
    farther out by the ratio of the corrected standard error to the uncorrected one.
    """
    normal = NormalDist()
    rounding = 1e-9 * np.ptp(resampled)  # a draw of every cluster once is a tie, whatever its last bit
    below = float((resampled < value - rounding).mean() + (resampled <= value + rounding).mean()) / 2
    edge = 0.5 / len(resampled)
    bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
    spread = float((influence**2).sum())
    skew = float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    widened = _corrected_error(influence, leverage) / sqrt(spread) if spread > 0 else 1.0
    reach = student_quantile(degrees_of_freedom(influence), level) * widened
    ends = (bias - reach, bias + reach)
    low, high = (normal.cdf(bias + end / max(1 - skew * end, 1e-6)) for end in ends)
    return low, high


def mean_over_clips(
    values: Any, clusters: list[str], resamples: int = 2000, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Mean over items with the interval of `ratio_of_sums`."""
    return ratio_of_sums(values, np.ones(len(clusters)), clusters, resamples, seed, level)


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
