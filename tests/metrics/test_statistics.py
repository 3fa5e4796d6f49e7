"""Intervals: drawn by source video, right as often as they say, paired."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.metrics.statistics import disjoint_parts, mean_over_clips, paired_difference, ratio_of_sums, unique_clips


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
