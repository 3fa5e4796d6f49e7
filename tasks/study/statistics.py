"""Statistics of votes that share items and raters: shares, Bradley-Terry strengths, agreement, each with its interval.

A vote on an item by a rater resembles the other votes on that item and of that rater, so neither votes nor raters alone
are independent. The variance of a sum over votes is that of the sums by item plus that of the sums by rater minus that
of single votes (Cameron, Gelbach and Miller, 2011): the limit of a bootstrap over items, plus one over raters, minus
one over votes. Intervals take Student's t with the degrees of freedom of Satterthwaite (1946), at least one fewer than
the smaller number of items and raters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.statistics import LEVEL, Estimate, student_quantile

Floats = NDArray[np.float64]
RESAMPLES = 2000
MOST_DEGREES = 1000  # where Student's t is the normal distribution to three digits


@dataclass(frozen=True)
class Clusters:
    """The item and the rater of every vote, as numbers from 0, int64 [N] each."""

    items: NDArray[np.int64]
    raters: NDArray[np.int64]

    @staticmethod
    def of(items: Sequence[Any], raters: Sequence[Any]) -> Clusters:
        """The clusters by any names."""
        numbered = [np.unique(np.asarray(names), return_inverse=True)[1] for names in (items, raters)]
        return Clusters(numbered[0], numbered[1])

    @property
    def smaller(self) -> int:
        """The smaller number of items and raters."""
        return int(min(len(np.unique(self.items)), len(np.unique(self.raters))))


@dataclass(frozen=True)
class Spread:
    """The variance of a statistic over items and raters, and its degrees of freedom, at least 1."""

    variance: float
    degrees: int


def two_way_spread(influence: Floats, clusters: Clusters) -> Spread:
    """The spread of a statistic that is a sum of `influence` [N] over votes, with mean 0.

    Where the difference of variances is not positive, the variance is that of independent votes.
    """
    of_votes, _ = _variance(influence, np.arange(len(influence)))
    (of_items, items), (of_raters, raters) = (_variance(influence, i) for i in (clusters.items, clusters.raters))
    total = of_items + of_raters - of_votes
    variance = total if total > 0 else of_votes
    parts = of_items**2 / (items - 1) + of_raters**2 / (raters - 1) if min(items, raters) > 1 else 0.0
    degrees = int(variance**2 / parts) if parts > 0 else 1
    return Spread(variance, max(min(degrees, MOST_DEGREES), min(items, raters) - 1, 1))


def _variance(influence: Floats, index: NDArray[np.int64]) -> tuple[float, int]:
    """The variance of a sum of independent clusters, and their number.

    The mean that was taken off shrinks a cluster with a share w of the votes, so its square is divided by 1 - w
    (Bell and McCaffrey, 2002); for clusters of one size that is the usual n / (n - 1).
    """
    sums, counts = np.bincount(index, influence), np.bincount(index)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if len(sums) < 2:
        return 0.0, len(sums)
    return float((sums**2 / (1 - counts / len(index))).sum()), len(sums)


def share(scores: Floats, clusters: Clusters, level: float = LEVEL) -> Estimate:
    """The mean of votes between 0 and 1 with its interval over items and raters.

    The interval is Wilson's (1927) with the number of independent votes that would have the two-way variance; so it
    stays within 0 and 1. Where all votes are equal they have no variance, and the interval is the exact one of as many
    votes as the smaller number of items and raters. With one item or one rater there is no interval.

    Args:
        scores: 1 for a vote for the system, 0 against it, 0.5 for "not sure"; float64 [N].
        clusters: the item and the rater of each vote.
        level: of the interval.
    """
    value, count = float(scores.mean()), clusters.smaller
    if count < 2:
        return Estimate(value)
    if value in (0.0, 1.0):
        reach = ((1 - level) / 2) ** (1 / count)
        return Estimate(value, reach, 1.0) if value else Estimate(value, 0.0, 1 - reach)
    spread = two_way_spread((scores - value) / len(scores), clusters)
    if spread.variance == 0:  # every vote is "not sure"
        return Estimate(value, value, value)
    return wilson(value, value * (1 - value) / spread.variance, student_quantile(spread.degrees, level))


def wilson(value: float, votes: float, quantile: float) -> Estimate:
    """Wilson's interval of a share of independent votes; `quantile` is that of the two-sided level."""
    square = quantile**2 / votes
    centre = (value + square / 2) / (1 + square)
    reach = quantile / (1 + square) * sqrt(value * (1 - value) / votes + square / votes / 4)
    return Estimate(value, max(0.0, centre - reach), min(1.0, centre + reach))


def bootstrap_share(scores: Floats, clusters: Clusters, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The mean of votes with the percentile interval of a bootstrap that draws items and raters at once (Owen, 2007).

    It counts the variance of single votes up to three times, so it is too long where they decide; `share` is not.
    """
    rng, count = np.random.default_rng(seed), [int(index.max()) + 1 for index in (clusters.items, clusters.raters)]
    by_both = np.zeros((2, *count))
    np.add.at(by_both[0], (clusters.items, clusters.raters), scores)
    np.add.at(by_both[1], (clusters.items, clusters.raters), 1.0)
    items, raters = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64) for n in count)
    sums, votes = (((items @ matrix) * raters).sum(axis=1) for matrix in by_both)
    drawn = sums[votes > 0] / votes[votes > 0]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(scores.mean()), float(low), float(high))


def effective_votes(scores: Floats, clusters: Clusters) -> float:
    """How many independent votes would have the same variance; the number of votes where it cannot be determined."""
    value = float(scores.mean())
    variance = two_way_spread((scores - value) / len(scores), clusters).variance
    independent, _ = _variance((scores - value) / len(scores), np.arange(len(scores)))
    return len(scores) * independent / variance if variance > 0 else float(len(scores))


def sign_test(for_first: int, for_second: int) -> float:
    """The exact two-sided p of "both are equally likely"; ties are left out before."""
    total, fewer = for_first + for_second, min(for_first, for_second)
    tail = sum(comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def majorities(scores: Floats, index: NDArray[np.int64]) -> tuple[int, int, int]:
    """How many items (or raters) prefer the first system, the second, and neither."""
    balance = np.bincount(index, scores - 0.5)[np.unique(index)]
    balance[np.abs(balance) < 1e-9] = 0
    return int((balance > 0).sum()), int((balance < 0).sum()), int((balance == 0).sum())


def krippendorff_alpha(ratings: Sequence[Mapping[Any, Any] | Sequence[Any]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 full agreement, 0 that of chance; None where nothing varies.

    Args:
        ratings: for each unit the values that it got, by rater or in any order; units with one value do not count.
    """
    units = [list(unit.values()) if isinstance(unit, Mapping) else list(unit) for unit in ratings]
    units = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in units for value in unit})
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.array([unit.count(value) for value in values], dtype=np.float64)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidences.sum(axis=1)
    total = totals.sum()
    if total < 2:
        return None
    observed = total - np.trace(coincidences)
    expected = (total**2 - (totals**2).sum()) / (total - 1)
    return float(1 - observed / expected) if expected > 0 else None


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths: the log-odds against an average system, by system, with a sum of 0.

    A difference d of two strengths stands for a preference of 1 / (1 + exp(-d)). `reason` says why there are none.
    """

    values: dict[str, Estimate]
    reason: str = ""


def bradley_terry(
    systems: Sequence[str],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    scores: Floats,
    clusters: Clusters,
    level: float = LEVEL,
) -> Strengths:
    """Maximum likelihood strengths by Newton's method, "not sure" as half a win for each; intervals as in `share`.

    Args:
        systems: names.
        first: the first system of each vote, indices [N].
        second: the second system of each vote, indices [N].
        scores: 1 for the first, 0 for the second, 0.5 for neither [N].
        clusters: the item and the rater of each vote.
        level: of the intervals.
    """
    count = len(systems)
    wins = np.zeros((count, count))
    np.add.at(wins, (first, second), scores)
    np.add.at(wins, (second, first), 1 - scores)
    reach = np.linalg.matrix_power((wins > 0).astype(int) + np.eye(count, dtype=int), count) > 0
    if not reach.all():
        weak = next(systems[j] for i, j in np.argwhere(~reach))
        return Strengths({}, f"no finite strengths: some systems won every vote, or none, against others ({weak})")
    design = np.zeros((len(scores), count))
    design[np.arange(len(scores)), first] = 1
    design[np.arange(len(scores)), second] = -1
    centred = np.eye(count) - 1 / count
    theta = np.zeros(count)
    for _ in range(100):
        expected, inverse = _fitted(design, theta)
        step = inverse @ (design.T @ (scores - expected))
        theta = theta + centred @ step * min(1.0, 2 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    expected, inverse = _fitted(design, theta)
    influence = ((scores - expected)[:, None] * design) @ inverse
    values: dict[str, Estimate] = {}
    for index, name in enumerate(systems):
        value = float(theta[index])
        if clusters.smaller < 2:
            values[name] = Estimate(value)
            continue
        spread = two_way_spread(influence[:, index], clusters)
        reach_of = student_quantile(spread.degrees, level) * sqrt(spread.variance)
        values[name] = Estimate(value, value - reach_of, value + reach_of)
    return Strengths(values)


def _fitted(design: Floats, theta: Floats) -> tuple[Floats, Floats]:
    """The expected scores [N] and the pseudo-inverse of the information [systems, systems]."""
    expected = 1 / (1 + np.exp(-design @ theta))
    information = (design * (expected * (1 - expected))[:, None]).T @ design
    return expected, np.linalg.pinv(information).astype(np.float64)


def rank_correlation(a: Floats, b: Floats, seed: int = 0, level: float = LEVEL) -> Estimate | None:
    """Spearman's correlation over items with a percentile bootstrap interval; None below 4 items or for constants."""
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES // 2):
        index = rng.integers(len(a), size=len(a))
        if np.ptp(a[index]) > 0 and np.ptp(b[index]) > 0:
            drawn.append(_correlation(_ranks(a[index]), _ranks(b[index])))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(_correlation(_ranks(a), _ranks(b)), float(low), float(high))


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[index]


def _correlation(a: Floats, b: Floats) -> float:
    return float(np.corrcoef(a, b)[0, 1])
