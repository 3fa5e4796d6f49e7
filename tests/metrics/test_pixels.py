"""What pixels alone say, of constructed clips and by formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.metrics.pixels import (
    clip_distance,
    flicker,
    motion_magnitude,
    psnr,
    psnr_curve,
    smoothness_residual,
    ssim,
    ssim_curve,
)


def test_motion_distance_and_psnr_of_constructed_pixels():
    ramp = np.stack([np.full((12, 12, 3), v, dtype=np.uint8) for v in (0, 51, 102, 153)])
    still = np.repeat(ramp[:1], 4, axis=0)
    assert motion_magnitude(ramp) == pytest.approx(0.2)
    assert motion_magnitude(still) == 0.0
    assert clip_distance(still, ramp) == pytest.approx(np.sqrt((0.2**2 + 0.4**2 + 0.6**2) / 3))
    assert clip_distance(ramp, ramp) == 0.0
    assert psnr(ramp[0], ramp[0]) == 100.0
    assert psnr(ramp[0], ramp[1]) == pytest.approx(20 * np.log10(5))
    with pytest.raises(ValueError, match="uint8"):
        motion_magnitude(ramp.astype(np.float32))  # type: ignore[arg-type]


def test_ssim_of_identical_constant_and_noisy_images():
    rng = np.random.default_rng(11)
    image = rng.integers(0, 256, size=(32, 24, 3), dtype=np.uint8)
    assert ssim(image, image) == pytest.approx(1.0)
    dark, light = np.full((16, 16, 3), 51, np.uint8), np.full((16, 16, 3), 204, np.uint8)
    assert ssim(dark, light) == pytest.approx((2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4), rel=1e-6)
    soft = np.clip(image.astype(int) + rng.integers(-20, 21, size=image.shape), 0, 255).astype(np.uint8)
    hard = np.clip(image.astype(int) + rng.integers(-90, 91, size=image.shape), 0, 255).astype(np.uint8)
    assert 1 > ssim(soft, image) > ssim(hard, image) > 0


def test_ssim_of_one_window_is_the_formula_written_out():
    rng = np.random.default_rng(12)
    a, b = (rng.integers(0, 256, size=(11, 11, 3), dtype=np.uint8) for _ in range(2))
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weights = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for channel in range(3):
        x, y = a[..., channel] / 255, b[..., channel] / 255
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * x * x).sum() - mx**2, (weights * y * y).sum() - my**2
        cov = (weights * x * y).sum() - mx * my
        top = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
        values.append(top / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)


def test_flicker_and_smoothness_of_constructed_pixels():
    def clip(levels: list[int]) -> np.ndarray:
        return np.stack([np.full((4, 4, 3), level, dtype=np.uint8) for level in levels])

    steady, jumping = clip([0, 51, 102, 153, 204, 255]), clip([0, 51, 0, 51, 0, 51])
    assert flicker(steady) == smoothness_residual(steady) == 0.0
    assert flicker(jumping) == pytest.approx(0.4**2)
    assert smoothness_residual(jumping) == pytest.approx(0.2)
    assert flicker(clip([255, 0, 255])) == pytest.approx(4.0)  # the largest there is: no overflow of the exact type
    with pytest.raises(ValueError, match="F >= 3"):
        flicker(steady[:2])


def test_curves_by_frame_show_drift():
    truth = np.repeat(np.random.default_rng(25).integers(0, 256, size=(1, 16, 16, 3), dtype=np.uint8), 4, axis=0)
    drifting = np.stack([np.clip(f.astype(int) + 8 * i, 0, 255).astype(np.uint8) for i, f in enumerate(truth)])
    for curve, best in ((psnr_curve, 100.0), (ssim_curve, 1.0)):
        values = curve(drifting, truth)
        assert values.shape == (4,) and values[0] == pytest.approx(best) and (np.diff(values) < 0).all()
        with pytest.raises(ValueError, match="differ in shape"):
            curve(drifting[:3], truth)


def test_ssim_of_a_large_image_is_the_mean_over_its_windows():
    rng = np.random.default_rng(26)
    a, b = (rng.integers(0, 256, size=(45, 50, 3), dtype=np.uint8) for _ in range(2))
    windows = [ssim(a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]) for i in range(35) for j in range(40)]
    assert ssim(a, b) == pytest.approx(np.mean(windows), rel=1e-9)
