"""The numbers of section 4: Frechet and kernel distances, frame consistency, motion, fidelity; float64 numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# PSNR of identical images is infinite; a table and JSON need a number, and 100 dB lies above any 8-bit difference
# a frame of ours can have (one grey level in one value of a 256x256 frame is 101 dB, in one of a 64x64 frame 89 dB).
PSNR_OF_IDENTICAL_DB = 100.0


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; the ends are None where no honest interval exists (a Frechet distance)."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None


def _features(features: Any, least: int) -> Floats:
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
        array = _features(features, least=1)
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
    first, second = _features(x, least=2), _features(y, least=2)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"feature widths differ: {first.shape[1]} and {second.shape[1]}")

    def own(p: Floats) -> float:
        diagonal = ((np.einsum("nd,nd->n", p, p) / p.shape[1] + 1.0) ** 3).sum()
        return (_kernel_sum(p, p) - float(diagonal)) / (len(p) * (len(p) - 1))

    return own(first) + own(second) - 2.0 * _kernel_sum(first, second) / (len(first) * len(second))


def consistency_curve(embeddings: Any) -> Floats:
    """Frame consistency of one video at k = 2..F, entry k-2: 100 x mean cosine of consecutive pairs of frames 1..k.

    `embeddings` is [F >= 2, D], frame 1 being the given image. k counts frames, not pairs.
    """
    array = _features(embeddings, least=2)
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError("an embedding of length zero has no angle")
    unit = array / norms
    cosines = np.clip((unit[1:] * unit[:-1]).sum(axis=1), -1.0, 1.0)
    return 100.0 * np.cumsum(cosines) / np.arange(1, len(cosines) + 1)


def consistency_at(curve: Floats, k: int) -> float:
    """The curve's value for the first k frames; a video shorter than k is an error, never skipped."""
    if not 2 <= k <= len(curve) + 1:
        raise ValueError(f"consistency of the first {k} frames asked of a video of {len(curve) + 1} frames")
    return float(curve[k - 2])


def _video(pixels: Pixels) -> Floats:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) < 2:
        raise ValueError(f"pixels need uint8 [F >= 2, H, W, 3], got {pixels.dtype} {pixels.shape}")
    return pixels.astype(np.float64) / 255.0


def motion_magnitude(pixels: Pixels) -> float:
    """Mean absolute difference of consecutive frames, pixel values in [0, 1]."""
    return float(np.abs(np.diff(_video(pixels), axis=0)).mean())


def clip_distance(pixels: Pixels, truth: Pixels) -> float:
    """Root mean square pixel error in [0, 1] over frames 2..F; frame 1 is given, so it says nothing."""
    if pixels.shape != truth.shape:
        raise ValueError(f"clips differ in shape: {pixels.shape} and {truth.shape}")
    return float(np.sqrt(((_video(pixels)[1:] - _video(truth)[1:]) ** 2).mean()))


def psnr(image: Pixels, truth: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images of one shape; identical images count as 100 dB."""
    if image.shape != truth.shape:
        raise ValueError(f"images differ in shape: {image.shape} and {truth.shape}")
    error = ((image.astype(np.float64) - truth.astype(np.float64)) ** 2).mean()
    if error == 0:
        return PSNR_OF_IDENTICAL_DB
    return min(PSNR_OF_IDENTICAL_DB, float(10 * np.log10(255.0**2 / error)))


def ssim(image: Pixels, truth: Pixels) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, valid positions, mean over RGB.

    Images are uint8 [H >= 11, W >= 11, 3].
    """
    if image.shape != truth.shape or image.ndim != 3 or min(image.shape[:2]) < 11:
        raise ValueError(f"ssim needs two images of one shape [H >= 11, W >= 11, 3], got {image.shape}, {truth.shape}")
    weights = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blur(values: Floats) -> Floats:
        rows = np.lib.stride_tricks.sliding_window_view(values, 11, axis=0) @ weights
        return np.lib.stride_tricks.sliding_window_view(rows, 11, axis=1) @ weights

    x, y = image.astype(np.float64) / 255.0, truth.astype(np.float64) / 255.0
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(value.mean())


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
