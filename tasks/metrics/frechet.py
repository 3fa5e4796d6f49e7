"""Frechet and kernel distances between feature sets (FVD, FID, KVD, KID), and how sure they are; float64 numpy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.statistics import Estimate, disjoint_parts, mean_over_clips, unique_clips

Floats = NDArray[np.float64]
BLOCK = 4096  # feature rows that are held in float64 at a time
PARTS = 4  # of the source videos, each half of them a half


def checked_features(features: Any, least: int) -> NDArray[Any]:
    """Features [N, d] as they are; ValueError on a wrong shape, too few rows, NaN or infinity."""
    array = np.asarray(features)
    if array.ndim != 2 or array.shape[0] < least:
        raise ValueError(f"features need shape [N >= {least}, d], got {array.shape}")
    if not all(np.isfinite(block).all() for block in _blocks(array)):
        raise ValueError("features hold NaN or infinity; the extractor or the frames are broken")
    return array


def _blocks(array: NDArray[Any]) -> Iterator[Floats]:
    return (np.asarray(array[i : i + BLOCK], dtype=np.float64) for i in range(0, len(array), BLOCK))


@dataclass(frozen=True)
class Moments:
    """Count, mean [d] and centred scatter [d, d] of a feature set: what a Frechet distance needs, mergeable exactly.

    The scatter is kept about its own mean (Chan's merge): raw second moments lose the small variances beside a large
    mean. Any split and order of merging gives the batch result to rounding.
    """

    count: int
    mean: Floats
    scatter: Floats

    @classmethod
    def of(cls, features: Any) -> Moments:
        """Moments of features [N >= 1, d] of any float type; ValueError on NaN, infinity or a wrong shape."""
        array = checked_features(features, least=1)
        mean = array.mean(axis=0, dtype=np.float64)
        scatter = np.zeros((len(mean), len(mean)))
        for block in _blocks(array):
            centred = block - mean
            scatter += centred.T @ centred
        return cls(len(array), mean, scatter)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together; ValueError where their widths differ."""
        _same_width(self.mean, other.mean)
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    def covariance(self, biased: bool = False) -> Floats:
        """Covariance [d, d] with divisor N-1, or N with `biased` (what StyleGAN-V and cd-fvd divide by)."""
        divisor = self.count if biased else self.count - 1
        if divisor < 1:
            raise ValueError(f"a covariance needs at least 2 feature rows, got {self.count}")
        return self.scatter / divisor


def merge_all(parts: Sequence[Moments]) -> Moments:
    """Moments of all parts together, in any order."""
    return reduce(Moments.merge, parts)


def _same_width(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"feature widths differ: {a.shape[-1]} and {b.shape[-1]}")


def _beyond_rounding(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which eigenvalues are not zero to rounding; the root of such a zero would be 1e-8, not 0."""
    return values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps


def _factor(covariance: Floats) -> NDArray[Any]:
    """R [d, r] with R R^T = covariance: Cholesky's, or for a singular one that of `eigh` without its null space."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        keep = _beyond_rounding(values)
        return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance(a: Moments, b: Moments, biased: bool = False) -> float:
    """Frechet distance |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians given by their moments.

    With S2 = R R^T the trace of the root is the sum of the roots of the eigenvalues of R^T S1 R: no matrix square root
    (scipy's has returned -1.9e28 here), right for fewer samples than features, zero for equal arguments, symmetric.
    """
    _same_width(a.mean, b.mean)
    first, second = a.covariance(biased), b.covariance(biased)
    shift = a.mean - b.mean
    if not shift.any() and np.array_equal(first, second):
        return 0.0
    root = _factor(second)
    values = np.linalg.eigvalsh(root.T @ first @ root)
    overlap = np.sqrt(values[_beyond_rounding(values)]).sum()
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2.0 * overlap))


@dataclass(frozen=True)
class FeatureSet:
    """Features of one row of the table, with the moments that all its Frechet numbers are made of: one pass over them.

    rows [N, d]; clusters, the source video of each row; parts, the moments of four disjoint parts of the videos.
    """

    rows: NDArray[Any]
    clusters: list[str]
    parts: tuple[Moments, ...]

    @classmethod
    def of(cls, rows: Any, clusters: Sequence[str], seed: int = 0) -> FeatureSet:
        """ValueError on NaN, infinity, a wrong shape, or parts of fewer than 2 rows."""
        array = checked_features(rows, least=1)
        if len(array) != len(clusters):
            raise ValueError(f"{len(array)} rows of features, but {len(clusters)} names of source videos")
        parts = disjoint_parts(clusters, PARTS, seed)
        if min(len(part) for part in parts) < 2:
            raise ValueError(
                f"{len(array)} feature rows of {unique_clips(clusters)} source videos leave a quarter with one"
            )
        return cls(array, list(clusters), tuple(Moments.of(array[part]) for part in parts))

    @cached_property
    def moments(self) -> Moments:
        return merge_all(self.parts)


def frechet_floor(real: FeatureSet) -> float:
    """Frechet distance between two disjoint halves of the real videos, not paired, at half the number.

    No bound for a system: its clips are paired with the real ones, and paired sets may lie far below this value.
    """
    first, second = _groups(real.parts, 2)
    return frechet_distance(first, second)


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance and how sure it is.

    value: the distance at the number of rows at hand; sd: its standard deviation over source videos.
    infinity: extrapolated linearly in 1/N from `points`, (rows, distance) pairs; below 0 at times for equal ones.
    influence [N]: what each pair of rows adds to `value` to first order, mean 0.
    """

    value: float
    sd: float
    infinity: float
    points: tuple[tuple[float, float], ...]
    influence: Floats


def frechet_to_real(generated: FeatureSet, real: FeatureSet) -> Frechet:
    """The distance of a system's features to the real ones, its sd, and its value for N -> infinity.

    Row i of both sets belongs to the same clip (and frame).

    Infinity (Chong and Forsyth, 2020): the bias of the distance falls as 1/N. A point of the line is the mean distance
    of 1, 2 or 4 disjoint parts, so all videos count at every point and the points differ by the bias alone.

    Influence: with row i weighted by w_i / N the distance is value + mean(w_i influence_i) to first order, for the
    derivative of the trace of the root is half the optimal transport map. So resampling needs no decomposition.
    """
    if generated.rows.shape != real.rows.shape or generated.clusters != real.clusters:
        raise ValueError(
            f"features are not paired: {generated.rows.shape} and {real.rows.shape}, or their videos differ"
        )
    value = frechet_distance(generated.moments, real.moments)
    points = [(float(len(real.rows)), value)]
    for level in (PARTS // 2, PARTS):
        pairs = zip(_groups(generated.parts, level), _groups(real.parts, level), strict=True)
        points.append((len(real.rows) / level, float(np.mean([frechet_distance(a, b) for a, b in pairs]))))
    _, infinity = np.polyfit([1 / rows for rows, _ in points], [distance for _, distance in points], 1)

    shift = generated.moments.mean - real.moments.mean
    influence = _quadratic(generated, _cost(generated.moments, real.moments), 2 * shift)
    influence += _quadratic(real, _cost(real.moments, generated.moments), -2 * shift)
    influence -= influence.mean()
    sums = np.bincount(np.unique(real.clusters, return_inverse=True)[1], influence)
    sd = np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(influence)
    return Frechet(value, float(sd), float(infinity), tuple(points), influence)


def _groups(parts: Sequence[Moments], number: int) -> list[Moments]:
    size = len(parts) // number
    return [merge_all(parts[i : i + size]) for i in range(0, len(parts), size)]


def _cost(source: Moments, target: Moments) -> Floats:
    """(I - T) N / (N - 1) [d, d], T the optimal transport map between the two Gaussians: T S_source T = S_target."""
    root = _factor(target.covariance())
    values, vectors = np.linalg.eigh(root.T @ source.covariance() @ root)
    keep = _beyond_rounding(values)
    half = (root @ vectors[:, keep]) * values[keep] ** -0.25
    return (np.eye(len(root)) - half @ half.T) * (source.count / (source.count - 1))


def _quadratic(features: FeatureSet, form: Floats, line: Floats) -> Floats:
    """x^T form x + line.x for each row's x = row - mean: [N]; in float32, which is ample for an interval."""
    single, parts = form.astype(np.float32), []
    for block in _blocks(features.rows):
        centred = block - features.moments.mean
        narrow = centred.astype(np.float32)
        parts.append(np.einsum("nd,nd->n", narrow @ single, narrow) + centred @ line)
    return np.concatenate(parts).astype(np.float64)


def paired_frechet_difference(
    a: Frechet, b: Frechet, clusters: Sequence[str], resamples: int = 2000, seed: int = 0
) -> Estimate:
    """FD(a, real) - FD(b, real) with a 95 % interval by paired bootstrap over source videos, in the first order.

    Resampling the distances themselves costs a decomposition each and covers worse: a resample holds fewer distinct
    clips, which raises the two distances by unequal amounts (docs/decisions/metrics.md). The interval is of the
    difference at this number of clips; the part that falls as 1/N shows in the two values at infinity.

    Args:
        a: distance of one system to the real features.
        b: distance of the other to the same real features.
        clusters: the source video of each row.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
    """
    if a.influence.shape != b.influence.shape:
        raise ValueError(f"distances of {len(a.influence)} and {len(b.influence)} rows are not paired")
    return mean_over_clips(a.value - b.value + a.influence - b.influence, list(clusters), resamples, seed)


def _kernel_sum(p: NDArray[Any], q: NDArray[Any]) -> float:
    """Sum of (p_i.q_j/d + 1)^3 over all i and j; the products in the features' own type, their sum in double."""
    width = p.shape[1]
    if width**2 < min(len(p), len(q)):
        # The kernel is a polynomial, so the double sum is one of tensor powers: N d^3 steps in place of N^2 d.
        powers = []
        for x in (p, q):
            cubes = np.zeros((width * width, width))
            for block in _blocks(x):
                cubes += np.einsum("ni,nj->nij", block, block).reshape(len(block), -1).T @ block
            double = x.astype(np.float64)
            powers.append((double.sum(axis=0), double.T @ double, cubes))
        dots = [float((a * b).sum()) / width ** (k + 1) for k, (a, b) in enumerate(zip(*powers, strict=True))]
        return len(p) * len(q) + 3 * dots[0] + 3 * dots[1] + dots[2]
    total = 0.0
    for top in range(0, len(p), 512):
        block = p[top : top + 512]
        # Of a set with itself only the upper half is computed: what lies right of the diagonal block counts twice.
        for others, times in ((block, 1), (p[top + 512 :], 2)) if p is q else ((q, 1),):
            kernel = block @ others.T / width + 1.0
            total += times * float((kernel * kernel * kernel).sum(dtype=np.float64))
    return total


def _kernel_within(p: NDArray[Any], q: NDArray[Any], names: Sequence[str], others: Sequence[str]) -> tuple[float, int]:
    """Sum of the kernel over the pairs of rows of p and q with the same name, and their number."""
    places: tuple[dict[str, list[int]], dict[str, list[int]]] = (defaultdict(list), defaultdict(list))
    for of, found in zip((names, others), places, strict=True):
        for i, name in enumerate(of):
            found[name].append(i)
    pairs = [(i, j) for name, rows in places[0].items() for i in rows for j in places[1].get(name, ())]
    total = 0.0
    for start in range(0, len(pairs), BLOCK):
        left, right = np.array(pairs[start : start + BLOCK]).T
        dots = np.einsum("nd,nd->n", p[left], q[right], dtype=np.float64)
        total += float(((dots / p.shape[1] + 1.0) ** 3).sum())
    return total, len(pairs)


def kernel_distance(
    x: Any, y: Any, x_clips: Sequence[str] | None = None, y_clips: Sequence[str] | None = None
) -> float:
    """Unbiased MMD^2 with the kernel (x.y/d + 1)^3, as in KID; may be just below 0 for equal distributions.

    Args:
        x: features [N, d].
        y: features [M, d].
        x_clips: the source clip of each row of x. Two rows of one clip are dependent, within a set and across paired
            ones, so such pairs are left out; with them the estimate is biased. None: all rows are independent.
        y_clips: the source clip of each row of y.
    Raises:
        ValueError: rows that are not finite, of other widths or other numbers than names, or all of one clip.
    """
    first, second = (checked_features(z, least=2) for z in (x, y))
    _same_width(first, second)
    # float16 would overflow; float32, in which judges give their features, is twice as fast as double.
    first, second = (z.astype(np.promote_types(z.dtype, np.float32)) for z in (first, second))
    if x_clips is None or y_clips is None:
        x_clips, y_clips = [f"x{i}" for i in range(len(first))], [f"y{i}" for i in range(len(second))]
    if len(first) != len(x_clips) or len(second) != len(y_clips):
        raise ValueError(
            f"{len(first)} and {len(second)} rows of features, but {len(x_clips)} and {len(y_clips)} names of clips"
        )

    def mean(p: NDArray[Any], q: NDArray[Any], names: Sequence[str], others: Sequence[str]) -> float:
        left_out, pairs = _kernel_within(p, q, names, others)
        if pairs == len(p) * len(q):
            raise ValueError(f"a kernel distance needs at least 2 source clips, all rows are of {names[0]}")
        return (_kernel_sum(p, q) - left_out) / (len(p) * len(q) - pairs)

    own = mean(first, first, x_clips, x_clips) + mean(second, second, y_clips, y_clips)
    return own - 2.0 * mean(first, second, x_clips, y_clips)


def kernel_distance_of_frames(
    x: Any, y: Any, x_clips: Sequence[str] | None = None, y_clips: Sequence[str] | None = None
) -> float:
    """KID of clips: the mean `kernel_distance` of F subsets, each with one frame of every clip, every frame used once.

    Frames of one clip are near-duplicates; as pairs within a set they would bias the "unbiased" estimate upwards. It is
    also F times as cheap as all frames at once.

    Args:
        x: features [N >= 2, F, d] of N clips of F frames.
        y: as x.
        x_clips: the source clip of each of the N; see `kernel_distance`.
        y_clips: as x_clips.
    """
    first, second = np.asarray(x), np.asarray(y)
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(f"frame features need one shape [N >= 2, F, d], got {first.shape} and {second.shape}")
    clips, frames, _ = first.shape
    every = np.arange(clips)
    # Clip i gives frame i + shift, so that each subset mixes early and late frames.
    turns = [(every + shift) % frames for shift in range(frames)]
    return float(np.mean([kernel_distance(first[every, t], second[every, t], x_clips, y_clips) for t in turns]))
