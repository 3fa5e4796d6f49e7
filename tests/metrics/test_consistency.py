"""Frame consistency of constructed unit vectors, by every pair rule."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.metrics.consistency import (
    PAIR_RULES,
    consistency_at,
    consistency_by_lag,
    consistency_curve,
    consistency_name,
)


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
    frozen = np.repeat(rng.normal(size=(1, 32)), 16, axis=0)
    for rule in PAIR_RULES:
        np.testing.assert_allclose(consistency_curve(frozen, rule), np.full(15, 100.0), atol=1e-10)
    line = np.stack([np.cos(np.linspace(0, 1, 8)), np.sin(np.linspace(0, 1, 8))], axis=1)
    assert consistency_curve(line)[-1] > consistency_curve(line[[0, 5, 1, 6, 2, 7, 3, 4]])[-1]


def test_pair_rules_on_a_turning_vector():
    turns = np.deg2rad([0.0, 60.0, 90.0])
    line = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    near, far, whole = 0.5, np.cos(np.pi / 6), 0.0  # 60, 30 and 90 degrees
    for rule, last in (
        ("consecutive", (near + far) / 2),
        ("all_pairs", (near + far + whole) / 3),
        ("first_vs_rest", (near + whole) / 2),
    ):
        np.testing.assert_allclose(consistency_curve(line, rule), [50.0, 100 * last], rtol=1e-12)
    np.testing.assert_allclose(consistency_by_lag(line), [100 * (near + far) / 2, 0.0], atol=1e-12)


def test_order_of_frames_is_seen_by_consecutive_pairs_and_not_by_all_pairs():
    clip = np.random.default_rng(23).normal(size=(16, 8)).cumsum(axis=0)
    turned = clip[[0, *(1 + np.random.default_rng(24).permutation(15))]]
    assert consistency_curve(clip)[-1] > consistency_curve(turned)[-1] + 1
    for rule in ("all_pairs", "first_vs_rest"):
        assert consistency_curve(clip, rule)[-1] == pytest.approx(consistency_curve(turned, rule)[-1])


def test_names_of_the_rules():
    assert consistency_name("F-Consistency", 4) == "F-Consistency/4"
    assert consistency_name("F-Consistency", "all", "first_vs_rest") == "F-Consistency/first_vs_rest/all"


def test_an_embedding_without_a_direction_is_refused():
    for bad, said in ((np.zeros((3, 4)), "length zero"), (np.full((3, 4), np.nan), "NaN")):
        with pytest.raises(ValueError, match=said):
            consistency_curve(bad)
