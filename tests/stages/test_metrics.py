"""The metric core against closed forms, brute force and torch-fidelity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tasks.evaluate.consistency import consistency_at, consistency_curve
from tasks.evaluate.frechet import Moments, frechet_distance, kernel_distance, merge_all
from tasks.evaluate.pixel_metrics import clip_distance, motion_magnitude, psnr, ssim
from tasks.evaluate.statistics import mean_over_clips, ratio_of_sums


def features(rng: np.random.Generator, count: int, width: int, shift: float = 0.0) -> np.ndarray:
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + shift


def gaussian(mean: list[float], sd: list[float]) -> Moments:
    """Moments of an exact diagonal Gaussian, stated rather than sampled."""
    return Moments(1001, np.array(mean), np.diag(np.square(sd)) * 1000.0)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    one_d = frechet_distance(gaussian([1.0], [2.0]), gaussian([4.0], [0.5]))
    assert one_d == pytest.approx(9.0 + 1.5**2, rel=1e-12)
    three_d = frechet_distance(gaussian([0, 1, 2], [1, 2, 3]), gaussian([1, 1, 0], [3, 2, 0]))
    assert three_d == pytest.approx((1 + 0 + 4) + (4 + 0 + 9), rel=1e-12)


def test_frechet_of_a_set_with_itself_is_exactly_zero_and_order_of_arguments_does_not_matter():
    rng = np.random.default_rng(0)
    a, b = Moments.of(features(rng, 60, 8)), Moments.of(features(rng, 50, 8, shift=0.3))
    assert frechet_distance(a, a) == 0.0
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_under_translation_scale_and_rotation():
    rng = np.random.default_rng(1)
    x, y = features(rng, 200, 6), features(rng, 200, 6)
    value = frechet_distance(Moments.of(x), Moments.of(y))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert frechet_distance(Moments.of(x @ turn), Moments.of(y @ turn)) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(Moments.of(3 * x), Moments.of(3 * y)) == pytest.approx(9 * value, rel=1e-10)
    assert frechet_distance(Moments.of(x + 7), Moments.of(y + 7)) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(Moments.of(x), Moments.of(x + 2.0)) == pytest.approx(6 * 4.0, rel=1e-9)


def test_frechet_with_fewer_samples_than_features_equals_the_nuclear_norm_route():
    rng = np.random.default_rng(2)
    x, y = features(rng, 20, 100), features(rng, 30, 100, shift=0.1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    nuclear = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / np.sqrt(19 * 29)
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + (xc**2).sum() / 19 + (yc**2).sum() / 29 - 2 * nuclear
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-9)


def test_frechet_to_a_set_without_any_spread_is_the_mean_term_and_one_trace():
    x = np.random.default_rng(3).normal(size=(40, 5))
    still = np.zeros((40, 5))
    expected = x.mean(0) @ x.mean(0) + np.cov(x.T).trace()
    assert frechet_distance(Moments.of(x), Moments.of(still)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "width"), [(400, 16), (40, 64)])
def test_frechet_agrees_with_torch_fidelity(count: int, width: int):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    rng = np.random.default_rng(4)
    x, y = features(rng, count, width), features(rng, count, width, shift=0.2)
    statistics = [{"mu": z.mean(0), "sigma": np.cov(z, rowvar=False)} for z in (x, y)]
    theirs = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(theirs, rel=1e-5)


def test_moments_merge_in_any_split_and_order_to_the_batch_result():
    rng = np.random.default_rng(5)
    x = features(rng, 90, 7, shift=50.0) * 0.1 + 500.0  # a large mean is what breaks raw moments
    whole = Moments.of(x)
    for order in itertools.permutations([x[:1], x[1:33], x[33:60], x[60:]]):
        merged = merge_all([Moments.of(part) for part in order])
        assert merged.count == 90
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.covariance(), np.cov(x, rowvar=False), rtol=1e-8, atol=1e-12)


def test_half_precision_features_are_computed_in_double():
    x = np.random.default_rng(6).normal(size=(50, 4)).astype(np.float16)
    assert Moments.of(x).mean.dtype == np.float64
    assert frechet_distance(Moments.of(x), Moments.of(x.astype(np.float64))) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_features_are_refused(bad: float):
    x = np.ones((5, 3))
    x[2, 1] = bad
    for measure in (Moments.of, lambda z: kernel_distance(z, np.ones((5, 3))), consistency_curve):
        with pytest.raises(ValueError, match="NaN"):
            measure(x)


def test_covariance_divisor_is_stated():
    x = np.random.default_rng(7).normal(size=(11, 3))
    np.testing.assert_allclose(Moments.of(x).covariance(biased=True), np.cov(x.T, bias=True), rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        Moments.of(x[:1]).covariance()


@pytest.mark.parametrize("width", [2, 5])  # few samples for the width, and many: two routes to one sum
def test_kernel_distance_equals_the_double_loop_and_torch_fidelity(width: int):
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(12, width)), rng.normal(size=(9, width)) + 0.4

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / width + 1) ** 3)

    own_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    own_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    cross = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(own_x + own_y - 2 * cross, rel=1e-10)
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    z = rng.normal(size=(12, width)) + 0.2
    grams = [(p @ q.T / width + 1) ** 3 for p, q in ((x, x), (x, z), (z, z))]
    theirs = kid.mmd2(grams[0], grams[1], grams[2], mmd_est="unbiased")
    assert kernel_distance(x, z) == pytest.approx(theirs, rel=1e-9)


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(9)
    values = [kernel_distance(rng.normal(size=(20, 3)), rng.normal(size=(20, 3))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_consistency_of_unit_vectors_at_known_angles():
    turns = np.deg2rad([0.0, 60.0, 90.0, 90.0])  # steps of 60, 30 and 0 degrees
    curve = consistency_curve(5.0 * np.stack([np.cos(turns), np.sin(turns)], axis=1))
    steps = [0.5, np.cos(np.pi / 6), 1.0]
    np.testing.assert_allclose(curve, [100 * np.mean(steps[:n]) for n in (1, 2, 3)], rtol=1e-12)
    assert consistency_at(curve, 2) == pytest.approx(50.0)
    assert consistency_at(curve, 4) == pytest.approx(100 * np.mean(steps))
    with pytest.raises(ValueError, match="first 5 frames asked of a video of 4"):
        consistency_at(curve, 5)


def test_a_frozen_clip_has_consistency_100_and_order_matters():
    rng = np.random.default_rng(10)
    np.testing.assert_allclose(consistency_curve(np.repeat(rng.normal(size=(1, 32)), 16, axis=0)), 100.0, atol=1e-10)
    line = np.stack([np.cos(np.linspace(0, 1, 8)), np.sin(np.linspace(0, 1, 8))], axis=1)
    assert consistency_curve(line)[-1] > consistency_curve(line[[0, 5, 1, 6, 2, 7, 3, 4]])[-1]


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


def test_interval_draws_whole_clips():
    rng = np.random.default_rng(13)
    per_clip = rng.normal(size=12)
    once = mean_over_clips(per_clip, [f"c{i}" for i in range(12)])
    doubled = mean_over_clips(np.repeat(per_clip, 8), [f"c{i}" for i in range(12) for _ in range(8)])
    assert once.ci_low is not None and once.ci_high is not None
    # Eight near-duplicate windows per clip must not narrow the interval.
    assert (doubled.ci_low, doubled.ci_high) == pytest.approx((once.ci_low, once.ci_high))
    assert once.ci_low < once.value < once.ci_high
    naive = mean_over_clips(np.repeat(per_clip, 8), [str(i) for i in range(96)])
    assert naive.ci_high is not None and naive.ci_high - naive.value < 0.6 * (once.ci_high - once.value)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(14)
    hits = 0
    for trial in range(200):
        e = mean_over_clips(rng.normal(size=40), [str(i) for i in range(40)], resamples=400, seed=trial)
        hits += e.ci_low is not None and e.ci_high is not None and e.ci_low <= 0 <= e.ci_high
    assert 175 <= hits <= 200


def test_motion_ratio_is_a_ratio_of_sums_with_a_reproducible_interval():
    names = ["a", "b", "c"]
    e = ratio_of_sums([1.0, 0.0, 2.0], [2.0, 1.0, 3.0], names)
    assert e.value == pytest.approx(0.5)
    assert e == ratio_of_sums([1.0, 0.0, 2.0], [2.0, 1.0, 3.0], names)
    assert ratio_of_sums([1.0], [2.0], ["a"]).ci_low is None
    with pytest.raises(ValueError, match="sum to zero"):
        ratio_of_sums([1.0], [0.0], ["a"])
