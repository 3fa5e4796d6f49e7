"""Intervals of votes that share items and raters, strengths, agreement and power, on votes of known preference."""

from __future__ import annotations

from math import exp, sqrt

import numpy as np
import pytest

from benchmarks.preference_intervals import DESIGNS, INDEPENDENT, coverage, drawn_votes
from tasks.study.power import design_effect, share_found, votes_needed
from tasks.study.statistics import (
    Clusters,
    bootstrap_share,
    bradley_terry,
    krippendorff_alpha,
    rank_correlation,
    share,
    sign_test,
    two_way_spread,
)

# Of the designs of the benchmark those whose votes share items and raters.
BARS = [name for name in DESIGNS if name != INDEPENDENT]


@pytest.mark.parametrize("name", BARS)
def test_intervals_cover_the_true_share_in_93_to_97_of_100_studies(name):
    assert 0.93 <= coverage(DESIGNS[name], share) <= 0.97


def test_the_bootstrap_of_items_and_raters_at_once_is_longer():
    votes = drawn_votes(np.random.default_rng(2), DESIGNS["few raters and items"])
    ours, theirs = share(*votes), bootstrap_share(*votes)
    assert theirs.value == ours.value and theirs.ci_low < ours.value < theirs.ci_high
    independent = np.arange(40)
    scores = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    spread = two_way_spread((scores - scores.mean()) / 40, Clusters(independent, independent))
    assert spread.variance == pytest.approx(scores.var(ddof=1) / 40)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_votes_give_no_interval_of_length_zero_but_for_not_sure(value):
    estimate = share(np.full(24, value), Clusters(np.repeat(np.arange(8), 3), np.tile(np.arange(3), 8)))
    if value == 0.5:
        assert (estimate.ci_low, estimate.ci_high) == (0.5, 0.5)
    else:  # exact for 3 votes: 0.025 to the power of 1/3
        assert max(abs(value - estimate.ci_low), abs(value - estimate.ci_high)) == pytest.approx(1 - 0.025 ** (1 / 3))


def test_one_rater_or_one_item_has_no_interval():
    assert share(np.array([1.0, 0.0]), Clusters.of(["a", "b"], [7, 7])).ci_low is None


STRENGTHS = np.array([0.9, 0.2, -0.3, -0.8])


def drawn_comparisons(seed, raters=24, items=40):
    rng = np.random.default_rng(seed)
    pairs = np.array([(a, b) for a in range(4) for b in range(a + 1, 4)])
    index = np.tile(np.arange(len(pairs)), items * raters)
    first, second = pairs[index].T
    chance = 1 / (1 + np.exp(STRENGTHS[second] - STRENGTHS[first]))
    scores = (rng.random(len(index)) < chance).astype(float)
    clusters = Clusters(np.repeat(np.arange(items), len(pairs) * raters), np.arange(len(index)) // len(pairs) % raters)
    return first, second, scores, clusters


def test_bradley_terry_finds_known_strengths():
    found = bradley_terry("abcd", *drawn_comparisons(0))
    for name, strength in zip("abcd", STRENGTHS, strict=True):
        estimate = found.values[name]
        assert estimate.value == pytest.approx(strength, abs=0.08)
        assert estimate.ci_low < strength < estimate.ci_high
    assert sum(estimate.value for estimate in found.values.values()) == pytest.approx(0, abs=1e-9)


def test_bradley_terry_equals_that_of_choix():
    first, second, scores, clusters = drawn_comparisons(1, raters=3, items=10)
    found = bradley_terry("abcd", first, second, scores, clusters)
    # choix 0.4.1, ilsr_pairwise(4, wins, alpha=0) minus its mean, on the same votes.
    expected = [0.9694563, 0.4320497, -0.3012939, -1.1002121]
    np.testing.assert_allclose([found.values[name].value for name in "abcd"], expected, atol=1e-6)


def test_bradley_terry_of_two_systems_is_the_log_odds_with_half_votes_for_ties():
    scores = np.array([1.0] * 6 + [0.0] * 3 + [0.5] * 2)
    found = bradley_terry("ab", np.zeros(11, int), np.ones(11, int), scores, Clusters(np.arange(11), np.arange(11) % 4))
    assert found.values["a"].value == pytest.approx(np.log(7 / 4) / 2)
    assert 1 / (1 + exp(-2 * found.values["a"].value)) == pytest.approx(7 / 11)


def test_a_system_that_wins_every_vote_has_no_strength():
    found = bradley_terry("ab", np.zeros(5, int), np.ones(5, int), np.ones(5), Clusters(np.arange(5), np.arange(5)))
    assert not found.values and "every vote" in found.reason


def test_krippendorff_alpha_is_that_of_his_example():
    # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section D: four observers, twelve units.
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[row[unit] for row in observers if row[unit] != "."] for unit in range(12)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=0.001)
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert krippendorff_alpha([[1, 1], [0, 0], [1, 1]]) == 1


def test_the_sign_test_is_exact():
    scipy_stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((9, 1), (5, 5), (0, 7), (20, 9), (0, 0)):
        expected = scipy_stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(expected)


def test_rank_correlation_shares_ranks_of_ties():
    scipy_stats = pytest.importorskip("scipy.stats")
    a, b = np.array([1.0, 2, 2, 3, 5, 4]), np.array([2.0, 1, 3, 3, 6, 6])
    found = rank_correlation(a, b)
    assert found is not None and found.value == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, np.ones(6)) is None


def test_power_says_how_many_votes_tell_55_from_50():
    assert votes_needed(0.55) == 783
    assert votes_needed(0.55, effect=2) == 1566
    assert share_found(783) == pytest.approx(0.55, abs=0.001) and share_found(3) == 1
    assert design_effect(raters=100, items=100, votes=100) == 1
    rng = np.random.default_rng(0)
    reach = 1.96 * 0.5 * sqrt(783)
    found = np.abs(rng.binomial(783, 0.55, 4000) - 783 / 2) > reach
    assert found.mean() == pytest.approx(0.8, abs=0.02)
