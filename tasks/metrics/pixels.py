"""What pixels alone say of a clip: motion, flicker, smoothness, distance to the true clip, PSNR and SSIM; numpy."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# PSNR of identical images is infinite; a table and JSON need a number, and 100 dB lies above any 8-bit difference
# a frame of ours can have (one grey level in one value of a 256x256 frame is 101 dB, in one of a 64x64 frame 89 dB).
PSNR_OF_IDENTICAL_DB = 100.0
# Wang et al. 2004: a Gaussian of 11 values, sigma 1.5. Rows of a band matrix give _BAND outputs by one product.
_WINDOW = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
_BAND = 32
_BLUR = np.zeros((_BAND, _BAND + 10))
for _row in range(_BAND):
    _BLUR[_row, _row : _row + 11] = _WINDOW / _WINDOW.sum()


def checked_video(pixels: Pixels, least: int = 2) -> NDArray[np.int16]:
    """The clip in a type in which differences of pixels are exact."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) < least:
        raise ValueError(f"pixels need uint8 [F >= {least}, H, W, 3], got {pixels.dtype} {pixels.shape}")
    return pixels.astype(np.int16)


def same_shape(pixels: Pixels, truth: Pixels) -> None:
    if pixels.shape != truth.shape:
        raise ValueError(f"clips differ in shape: {pixels.shape} and {truth.shape}")


def _mean_square(differences: NDArray[np.int16]) -> float:
    """Mean square of differences of pixels, pixel values in [0, 1]."""
    values = differences.reshape(-1).astype(np.float64)
    return float(values @ values) / values.size / 255.0**2


def motion_magnitude(pixels: Pixels) -> float:
    """Mean absolute difference of consecutive frames, pixel values in [0, 1]."""
    frames = checked_video(pixels)
    return float(np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(frames)])) / 255.0


def coarse_motion_magnitude(pixels: Pixels) -> float:
    """`motion_magnitude` of frames averaged over squares of a quarter of their shorter side, pixel values in [0, 1].

    Noise has much motion and almost none of this; moving content has both. What is left at the right and the lower edge
    does not count.
    """
    frames = checked_video(pixels)
    side = max(1, min(frames.shape[1:3]) // 4)
    rows, columns = (length // side for length in frames.shape[1:3])
    whole = frames[:, : rows * side, : columns * side].reshape(len(frames), rows, side, columns, side, 3)
    coarse = whole.mean(axis=(2, 4))
    return float(np.abs(np.diff(coarse, axis=0)).mean()) / 255.0


def flicker(pixels: Pixels) -> float:
    """Mean square of the second difference in time, x[t-1] - 2 x[t] + x[t+1], pixel values in [0, 1].

    Steady change has little of it, change back and forth much; a still clip none, so read it as a ratio to real.
    """
    frames = checked_video(pixels, least=3)
    triples = zip(frames, frames[1:], frames[2:], strict=False)
    return float(np.mean([_mean_square(a - 2 * b + c) for a, b, c in triples]))


def smoothness_residual(pixels: Pixels) -> float:
    """Mean absolute difference of every second frame from the mean of its two neighbours, pixel values in [0, 1].

    A proxy for VBench's motion smoothness, which interpolates those frames with a net (AMT) in place of the mean; the
    two are not comparable. Lower is smoother, and a still clip has 0.
    """
    frames = checked_video(pixels, least=3)
    triples = zip(frames[:-2:2], frames[1:-1:2], frames[2::2], strict=True)
    return float(np.mean([np.abs(a - 2 * b + c).mean() for a, b, c in triples])) / (2 * 255.0)


def clip_distance(pixels: Pixels, truth: Pixels) -> float:
    """Root mean square pixel error in [0, 1] over frames 2..F; frame 1 is given, so it says nothing."""
    same_shape(pixels, truth)
    pairs = zip(checked_video(pixels)[1:], checked_video(truth)[1:], strict=True)
    return float(np.sqrt(np.mean([_mean_square(a - b) for a, b in pairs])))


def psnr(image: Pixels, truth: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images of one shape; identical images count as 100 dB."""
    if image.shape != truth.shape:
        raise ValueError(f"images differ in shape: {image.shape} and {truth.shape}")
    error = _mean_square(image.astype(np.int16) - truth)
    if error == 0:
        return PSNR_OF_IDENTICAL_DB
    return min(PSNR_OF_IDENTICAL_DB, float(-10 * np.log10(error)))


def _blur_rows(values_HX: Floats) -> Floats:
    """The window along the first axis, valid positions only: [H, X] -> [H-10, X]."""
    height = len(values_HX) - 10
    blurred = np.empty((height, values_HX.shape[1]))
    for top in range(0, height, _BAND):
        rows = min(_BAND, height - top)
        np.matmul(_BLUR[:rows, : rows + 10], values_HX[top : top + rows + 10], out=blurred[top : top + rows])
    return blurred


def _blur(image_HWC: Floats) -> Floats:
    """The window along height, then width; axes come out turned, which a mean does not see."""
    height, width, channels = image_HWC.shape
    rows = _blur_rows(image_HWC.reshape(height, -1)).reshape(height - 10, width, channels)
    return _blur_rows(rows.transpose(1, 0, 2).reshape(width, -1))


def ssim(image: Pixels, truth: Pixels) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window 11, sigma 1.5, valid positions, mean over RGB.

    Images are uint8 [H >= 11, W >= 11, 3].
    """
    if image.shape != truth.shape or image.ndim != 3 or min(image.shape[:2]) < 11:
        raise ValueError(f"ssim needs two images of one shape [H >= 11, W >= 11, 3], got {image.shape}, {truth.shape}")
    x, y = image / 255.0, truth / 255.0
    mean_x, mean_y = _blur(x), _blur(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = _blur(x * y) - product, _blur(x * x + y * y) - squares
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))).mean())


def psnr_curve(pixels: Pixels, truth: Pixels) -> Floats:
    """PSNR in dB of each frame of a clip uint8 [F, H, W, 3] against the true one: [F], drift from the first on."""
    same_shape(pixels, truth)
    return np.array([psnr(a, b) for a, b in zip(pixels, truth, strict=True)])


def ssim_curve(pixels: Pixels, truth: Pixels) -> Floats:
    """SSIM of each frame of a clip uint8 [F, H, W, 3] against the true one: [F]."""
    same_shape(pixels, truth)
    return np.array([ssim(a, b) for a, b in zip(pixels, truth, strict=True)])
