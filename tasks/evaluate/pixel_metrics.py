"""What the pixels alone say of a clip: motion, distance to the true clip, PSNR and SSIM; float64 numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# PSNR of identical images is infinite; a table and JSON need a number, and 100 dB lies above any 8-bit difference
# a frame of ours can have (one grey level in one value of a 256x256 frame is 101 dB, in one of a 64x64 frame 89 dB).
PSNR_OF_IDENTICAL_DB = 100.0


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
