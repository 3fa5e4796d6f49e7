"""Intervals: drawn by source video, right as often as they say, paired."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.metrics.statistics import (
    LEAST_P,
    Estimate,
    degrees_of_freedom,
    disjoint_parts,
    function_of_sums,
    holm,
    mean_over_clips,
    p_value,
    paired_difference,
    ratio_of_sums,
    student_quantile,
    unique_clips,
)


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


@pytest.mark.parametrize(
    ("clips", "skewed", "least"),
    [(3, False, 0.94), (20, False, 0.935), (40, False, 0.935), (20, True, 0.895), (40, True, 0.92)],
)
def test_interval_covers_the_true_mean_about_as_often_as_it_says(clips: int, skewed: bool, least: float):
    rng, hits, trials = np.random.default_rng(14), 0, 1500
    names, truth = [str(i) for i in range(clips)], np.exp(0.5) if skewed else 0.0
    for _ in range(trials):
        values = rng.normal(size=clips)
        e = mean_over_clips(np.exp(values) if skewed else values, names, resamples=1000)
        hits += e.ci_low is not None and e.ci_high is not None and e.ci_low <= truth <= e.ci_high
    assert (
        least < hits / trials < (0.985 if clips < 8 else 0.97)
    )  # percentile intervals of 20 clips: 0.925, of skewed values 0.86


def test_students_quantile_is_that_of_the_tables():
    found = [student_quantile(degrees) for degrees in (1, 2, 3, 4, 30, 39, 2000)]
    assert found == pytest.approx([12.7062, 4.3027, 3.1824, 2.7764, 2.0423, 2.0227, 1.9612], abs=1e-4)
    with pytest.raises(ValueError, match="0 degrees"):
        student_quantile(0)


def test_long_tails_leave_fewer_degrees_of_freedom():
    even = np.tile([-1.0, 1.0], 20)  # shorter tails than normal values: as many as normal values have
    assert degrees_of_freedom(even) == 39
    lonely = np.full(40, -1.0)
    lonely[0] = 39.0  # one clip alone decides the variance
    assert degrees_of_freedom(lonely) == 1
    rng = np.random.default_rng(5)
    tails = rng.standard_t(5, size=4000)  # excess kurtosis 6: 2 / (2 + 6) of them
    assert 600 < degrees_of_freedom(tails - tails.mean()) < 1600
    assert degrees_of_freedom(np.zeros(7)) == 6 and degrees_of_freedom(np.array([1.0, -1.0])) == 1


def test_an_interval_of_equal_values_is_their_value():
    assert mean_over_clips([0.3] * 7, list("abcdefg")) == mean_over_clips([0.3] * 7, list("abcdefg"), seed=5)
    assert mean_over_clips([0.5, 0.5], ["a", "b"]).ci_low == 0.5


def test_motion_ratio_is_a_ratio_of_sums_with_a_reproducible_interval():
    names = ["a", "b", "c"]
    e = ratio_of_sums([1.0, 0.0, 2.0], [2.0, 1.0, 3.0], names)
    assert e.value == pytest.approx(0.5)
    assert e == ratio_of_sums([1.0, 0.0, 2.0], [2.0, 1.0, 3.0], names)
    assert ratio_of_sums([1.0], [2.0], ["a"]).ci_low is None
    with pytest.raises(ValueError, match="sum to zero"):
        ratio_of_sums([1.0], [0.0], ["a"])


def test_paired_difference_is_narrower_than_its_systems_apart():
    rng = np.random.default_rng(27)
    hard = 5 * rng.normal(size=60)  # what an item adds to either system
    a, b, names = hard + rng.normal(size=60) + 1, hard + rng.normal(size=60), [str(i) for i in range(60)]
    difference = paired_difference(a, b, names)
    assert difference == mean_over_clips(a - b, names)
    assert difference.ci_low is not None and difference.ci_low > 0
    weights = np.exp(rng.normal(size=60))
    ratios = paired_difference(a, b, names, weights)
    assert ratios.value == pytest.approx((a.sum() - b.sum()) / weights.sum())
    with pytest.raises(ValueError, match="differ in number"):
        paired_difference(a, b[1:], names)


def test_items_of_one_video_are_counted_once_and_never_parted():
    names = [name for name in "abcdefg" for _ in range(3)]
    assert unique_clips(names) == 7
    parts = disjoint_parts(names, 2)
    assert sorted(np.concatenate(parts)) == list(range(21))
    first, second = ({names[i] for i in part} for part in parts)
    assert not first & second and {len(first), len(second)} == {3, 4}


def test_a_p_value_agrees_with_its_interval_and_holm_with_its_definition():
    rng = np.random.default_rng(3)
    names = [str(i) for i in range(40)]
    for shift in (0.0, 0.3, 0.6):
        values = rng.normal(shift, 1, 40)
        interval, p = (
            mean_over_clips(values, names),
            p_value(lambda level, v=values: mean_over_clips(v, names, level=level)),
        )
        assert interval.ci_low is not None and interval.ci_high is not None
        assert (p < 0.05) == (not interval.ci_low <= 0 <= interval.ci_high)
    assert p_value(lambda level: Estimate(1.0, 0.5, 1.5)) == pytest.approx(LEAST_P)
    assert p_value(lambda level: Estimate(np.nan, np.nan, np.nan)) == 1
    assert p_value(lambda level: Estimate(1.0)) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([0.7, 0.6]) == [1, 1]
    assert [student_quantile(5, level) for level in (0.5, 0.99)] == pytest.approx([0.7267, 4.0321], abs=1e-4)


def test_a_function_of_sums_has_the_interval_of_its_linearisation():
    rng = np.random.default_rng(4)
    names = [str(i) for i in range(60)]
    real, moved = rng.uniform(1, 2, 60), rng.uniform(1, 2, 60)
    ratio = function_of_sums([moved, real], lambda sums: sums[..., 0] / sums[..., 1], names)
    expected = ratio_of_sums(moved, real, names)
    assert ratio.value == pytest.approx(expected.value)
    assert (ratio.ci_low, ratio.ci_high) == pytest.approx((expected.ci_low, expected.ci_high), abs=0.004)
    twice = function_of_sums([np.tile(moved, 2), np.tile(real, 2)], lambda s: s[..., 0] / s[..., 1], names * 2)
    assert twice.ci_low == pytest.approx(ratio.ci_low)  # windows of one clip do not narrow it
    with pytest.raises(ValueError, match="3 values for 2 items"):
        function_of_sums([[1, 2, 3]], lambda sums: sums[..., 0], ["a", "b"])


def test_a_ratio_with_one_moving_clip_has_no_interval():
    """Every draw that has it gives the same ratio, which an interval of no width would hide."""
    names = [str(i) for i in range(40)]
    one = np.eye(40)[0]
    assert ratio_of_sums(1.3 * one, one, names) == Estimate(1.3)
