"""Frechet and kernel distances between feature sets (FVD, FID, KVD, KID); float64 numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def checked_features(features: Any, least: int) -> Floats:
    """Features as float64 [N, d]; ValueError on a wrong shape, too few rows, NaN or infinity."""
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < least:
        raise ValueError(f"features need shape [N >= {least}, d], got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("features hold NaN or infinity; the extractor or the frames are broken")
    return array


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
        mean = array.mean(axis=0)
        centred = array - mean
        return cls(array.shape[0], mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"feature widths differ: {self.mean.size} and {other.mean.size}")
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


def merge_all(parts: list[Moments]) -> Moments:
    return reduce(Moments.merge, parts)


def _factor(covariance: Floats) -> Floats:
    """R [d, r] with R R^T = covariance; directions below rounding are dropped so that N < d brings no noise in."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    keep = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def frechet_distance(a: Moments, b: Moments, biased: bool = False) -> float:
    """Frechet distance |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians given by their moments.

    The trace of the root is the nuclear norm of R1^T R2 with S = R R^T from `eigh`: no matrix square root (scipy's has
    returned -1.9e28 here), right for fewer samples than features, zero for equal arguments, symmetric.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature widths differ: {a.mean.size} and {b.mean.size}")
    first, second = a.covariance(biased), b.covariance(biased)
    shift = a.mean - b.mean
    if not shift.any() and np.array_equal(first, second):
        return 0.0
    overlap = _factor(first).T @ _factor(second)
    root = np.linalg.svd(overlap, compute_uv=False).sum() if overlap.size else 0.0
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2.0 * root))


def _kernel_sum(p: Floats, q: Floats) -> float:
    """Sum of (p_i.q_j/d + 1)^3 over all i and j."""
    width = p.shape[1]
    if width**2 < min(len(p), len(q)):
        # The kernel is a polynomial, so the double sum is one of tensor powers: N d^3 steps in place of N^2 d.
        powers = []
        for x in (p, q):
            cubes = np.zeros((width * width, width))
            for block in np.array_split(x, -(-len(x) // 4096)):
                cubes += np.einsum("ni,nj->nij", block, block).reshape(len(block), -1).T @ block
            powers.append((x.sum(axis=0), x.T @ x, cubes))
        dots = [float((a * b).sum()) / width ** (k + 1) for k, (a, b) in enumerate(zip(*powers, strict=True))]
        return len(p) * len(q) + 3 * dots[0] + 3 * dots[1] + dots[2]
    total = 0.0
    for block in np.array_split(p, -(-len(p) // 1024)):
        kernel = block @ q.T / width + 1.0
        total += float((kernel * kernel * kernel).sum())
    return total


def kernel_distance(x: Any, y: Any) -> float:
    """Unbiased MMD^2 with the kernel (x.y/d + 1)^3, as in KID; may be just below 0 for equal distributions."""
    first, second = checked_features(x, least=2), checked_features(y, least=2)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"feature widths differ: {first.shape[1]} and {second.shape[1]}")

    def own(p: Floats) -> float:
        diagonal = ((np.einsum("nd,nd->n", p, p) / p.shape[1] + 1.0) ** 3).sum()
        return (_kernel_sum(p, p) - float(diagonal)) / (len(p) * (len(p) - 1))

    return own(first) + own(second) - 2.0 * _kernel_sum(first, second) / (len(first) * len(second))
