"""Frechet and kernel distances against closed forms, brute force, torch-fidelity and torchmetrics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tasks.metrics.frechet import (
    FeatureSet,
    Moments,
    frechet_distance,
    frechet_floor,
    frechet_to_real,
    kernel_distance,
    kernel_distance_of_frames,
    merge_all,
    paired_frechet_difference,
)


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


@pytest.mark.parametrize(("count", "width"), [(400, 16), (40, 64)])
def test_frechet_agrees_with_torchmetrics_given_the_features(count: int, width: int):
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Identity(torch.nn.Module):
        num_features = width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    rng = np.random.default_rng(4)
    x, y = features(rng, count, width), features(rng, count, width, shift=0.2)
    theirs = fid.FrechetInceptionDistance(feature=Identity())
    theirs.update(torch.from_numpy(x), real=True)
    theirs.update(torch.from_numpy(y), real=False)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(float(theirs.compute()), rel=1e-5)


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
    for measure in (Moments.of, lambda z: kernel_distance(z, np.ones((5, 3)))):
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


@pytest.mark.parametrize("correlation", [0.5, 0.8, 0.95])
def test_kernel_distance_of_paired_sets_is_unbiased(correlation: float):
    rng, clips = np.random.default_rng(30), [str(i) for i in range(40)]
    values = []
    for _ in range(1000):
        x = rng.normal(size=(40, 32))
        y = correlation * x + np.sqrt(1 - correlation**2) * rng.normal(size=(40, 32))
        values.append(kernel_distance(x, y, clips, clips))
    assert (
        abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(1000) < 0.003
    )  # with the pairs of one clip -0.12 and less


def test_kernel_distance_leaves_out_every_pair_of_rows_of_one_clip():
    rng = np.random.default_rng(31)
    x, y, clips = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + 0.4, ["a", "a", "b", "c", "c", "c"]

    def mean(p: np.ndarray, q: np.ndarray, names: list[str], others: list[str]) -> float:
        pairs = [(a, b) for a, i in zip(p, names, strict=True) for b, j in zip(q, others, strict=True) if i != j]
        return float(np.mean([(a @ b / 3 + 1) ** 3 for a, b in pairs]))

    for others in (clips, ["d", "e", "e", "f", "f", "a"]):  # paired sets; sets with one clip in common
        expected = mean(x, x, clips, clips) + mean(y, y, others, others) - 2 * mean(x, y, clips, others)
        assert kernel_distance(x, y, clips, others) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match="at least 2 source clips"):
        kernel_distance(x, y, ["a"] * 6, clips)
    with pytest.raises(ValueError, match="6 and 6 rows of features, but 5 and 6 names"):
        kernel_distance(x, y, clips[1:], clips)


def systems(rng: np.random.Generator, clips: int, frames: int, width: int) -> tuple[list[FeatureSet], list[str]]:
    """Real features, two systems that share a part of each clip with them, and the clip of each row."""
    scale = 1 / np.sqrt(np.arange(1, width + 1))

    def draw() -> np.ndarray:
        return (
            np.repeat(rng.normal(size=(clips, width)), frames, 0) + 0.1 * rng.normal(size=(clips * frames, width))
        ) * scale

    real, clusters = draw(), [f"clip-{i}" for i in range(clips) for _ in range(frames)]
    rows = real, 0.8 * real + 0.5 * draw() + 0.1, 0.8 * real + 0.3 * draw()
    return [FeatureSet.of(x, clusters) for x in rows], clusters


@pytest.mark.parametrize(("clips", "frames", "width"), [(60, 4, 5), (30, 1, 40)])  # full rank; fewer rows than features
def test_influence_is_the_change_of_the_distance_when_a_clip_weighs_more(clips: int, frames: int, width: int):
    (real, system, _), clusters = systems(np.random.default_rng(15), clips, frames, width)
    result = frechet_to_real(system, real)
    assert abs(result.influence.sum()) < 1e-6
    for chosen in ("clip-3", "clip-7"):
        within = np.array([name == chosen for name in clusters])

        def weighted(rows: np.ndarray, extra: float, within: np.ndarray = within) -> Moments:
            weights = np.where(within, 1 + extra, 1.0)
            weights *= len(rows) / weights.sum()
            mean = weights @ rows / len(rows)
            return Moments(len(rows), mean, ((rows - mean) * weights[:, None]).T @ (rows - mean))

        step = 1e-3
        ends = [frechet_distance(weighted(system.rows, e), weighted(real.rows, e)) for e in (step, -step)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert result.influence[within].mean() * within.mean() == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_sd_of_a_frechet_distance_is_its_spread_over_draws_of_clips():
    results = []
    for draw in range(100):
        (real, system, _), _ = systems(np.random.default_rng(draw), 150, 3, 6)
        results.append(frechet_to_real(system, real))
    assert np.mean([r.sd for r in results]) == pytest.approx(np.std([r.value for r in results]), rel=0.25)


def test_distance_at_infinity_takes_the_bias_away():
    rng = np.random.default_rng(16)
    clusters = [str(i) for i in range(200)]
    values, limits = [], []
    for _ in range(30):  # independent sets of one distribution, whose distance is 0
        result = frechet_to_real(*(FeatureSet.of(rng.normal(size=(200, 20)), clusters) for _ in range(2)))
        values.append(result.value)
        limits.append(result.infinity)
    assert np.mean(values) > 0.5
    assert abs(np.mean(limits)) < 0.15 * np.mean(values)
    rows, distances = zip(*result.points, strict=True)
    assert rows == (200, 100, 50) and distances[0] < distances[1] < distances[2]


def test_paired_difference_of_frechet_distances_covers_the_expected_one():
    runs = []
    for draw in range(120):
        (real, a, b), clusters = systems(np.random.default_rng(1000 + draw), 120, 2, 6)
        runs.append(
            paired_frechet_difference(frechet_to_real(a, real), frechet_to_real(b, real), clusters, resamples=400)
        )
    expected = np.mean([run.value for run in runs])
    hits = sum(run.ci_low <= expected <= run.ci_high for run in runs)  # type: ignore[operator]
    assert 106 <= hits <= 120
    assert expected > 0


def test_difference_of_a_system_from_itself_is_exactly_zero():
    (real, a, _), clusters = systems(np.random.default_rng(17), 40, 2, 5)
    result = frechet_to_real(a, real)
    difference = paired_frechet_difference(result, result, clusters)
    assert (difference.value, difference.ci_low, difference.ci_high) == (0.0, 0.0, 0.0)


def test_floor_is_of_disjoint_halves_of_the_videos():
    rng = np.random.default_rng(18)
    clusters = [name for name in "abcdefgh" for _ in range(5)]
    rows = np.repeat(rng.normal(size=(8, 3)), 5, axis=0)
    real = FeatureSet.of(rows, clusters)
    assert sorted(part.count for part in real.parts) == [10, 10, 10, 10]
    halves = merge_all(real.parts[:2]), merge_all(real.parts[2:])
    assert frechet_floor(real) == pytest.approx(frechet_distance(*halves))
    with pytest.raises(ValueError, match="3 source videos cannot make 4 parts"):
        FeatureSet.of(rows[:15], clusters[:15])
    with pytest.raises(ValueError, match="7 feature rows of 7 source videos leave a quarter with one"):
        FeatureSet.of(rows[:35:5], clusters[:35:5])


def test_unpaired_features_are_refused():
    (real, a, _), clusters = systems(np.random.default_rng(19), 20, 2, 4)
    with pytest.raises(ValueError, match="not paired"):
        frechet_to_real(FeatureSet.of(a.rows[2:], clusters[2:]), real)
    with pytest.raises(ValueError, match="40 rows of features, but 39"):
        FeatureSet.of(a.rows, clusters[1:])


def test_features_without_any_spread_have_a_distance_and_an_interval():
    (real, a, _), clusters = systems(np.random.default_rng(20), 30, 2, 4)
    still = frechet_to_real(FeatureSet.of(np.zeros_like(real.rows), clusters), real)
    assert still.value == pytest.approx((real.rows.mean(0) ** 2).sum() + np.cov(real.rows.T).trace())
    difference = paired_frechet_difference(still, frechet_to_real(a, real), clusters)
    assert difference.ci_low is not None and difference.ci_low > 0


def test_kernel_distance_of_frames_pairs_no_two_frames_of_one_clip():
    rng = np.random.default_rng(21)
    x, y = rng.normal(size=(7, 3, 2)), rng.normal(size=(7, 3, 2)) + 0.3
    turns = [[(clip + shift) % 3 for clip in range(7)] for shift in range(3)]
    expected = np.mean([kernel_distance(x[range(7), turn], y[range(7), turn]) for turn in turns])
    assert kernel_distance_of_frames(x, y) == pytest.approx(expected)
    same = [kernel_distance_of_frames(*np.repeat(rng.normal(size=(2, 20, 1, 3)), 4, axis=2)) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)  # near-duplicate frames leave it unbiased


def test_kernel_sum_by_blocks_is_the_whole_sum():
    x = np.random.default_rng(22).normal(size=(1100, 40))  # more than two blocks, too wide for tensor powers
    gram = (x @ x.T / 40 + 1) ** 3
    own = (gram.sum() - np.trace(gram)) / (1100 * 1099)
    assert kernel_distance(x, x) == pytest.approx(2 * own - 2 * gram.mean(), rel=1e-9)
    narrow, other = x.astype(np.float32), x[::-1] + 0.01
    # Products of float32 features are rounded, not their sum: a millionth of the kernel's size of about 1.
    assert kernel_distance(narrow, other.astype(np.float32)) == pytest.approx(kernel_distance(x, other), abs=1e-6)
