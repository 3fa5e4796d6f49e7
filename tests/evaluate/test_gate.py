"""The gate: every rule by its interval, the champion's margin, and the memory of the best champion so far."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gate as simulation
from tasks.evaluate import champion
from tasks.evaluate.champion import MAGNITUDE, PerClip, compare, still_clips
from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE, Against, Evidence, GateRule, gate
from tasks.evaluate.protocol.protocol import Item
from tasks.evaluate.report.tables import gate_table
from tasks.metrics.energy import distances_to_truth, energy_score, spread
from tasks.metrics.pixels import clip_distance, coarse_motion_magnitude, motion_magnitude
from tasks.metrics.statistics import Estimate

GOOD = Evidence(
    35,
    Estimate(0.9, 0.8, 1.0),
    Estimate(0.9, 0.7, 1.1),
    Estimate(0.0, 0.0, 0.099),
    ENERGY_SCORE,
    Estimate(-0.05, -0.07, -0.02),
)
ITEMS = [Item(f"clip{i}_000", f"clip{i}", i, "a", i) for i in range(40)]


def reasons(**changes: object) -> tuple[str, ...]:
    verdict = gate(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert verdict.passed == (not verdict.reasons)
    assert [rule.reason for rule in verdict.rules if not rule.passed] == list(verdict.reasons)
    return verdict.reasons


def test_a_model_passes_and_every_rule_names_its_value_and_threshold() -> None:
    assert reasons() == ()
    rows = gate_table(gate(GOOD)).rows
    assert rows[1] == ["motion relative to the real clips", "met", "0.9 (0.8 to 1)", "0.5 to 2, by the whole interval"]
    assert [row[1] for row in rows] == ["met"] * 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clips": 34}, "34 held-out clips"),
        ({"motion_ratio": None}, "real clips do not move"),
        # The value is in bounds, the interval is not.
        ({"motion_ratio": Estimate(0.6, 0.49, 0.7)}, "motion ratio 0.6 (0.49 to 0.7)"),
        ({"motion_ratio": Estimate(1.9, 1.8, 2.01)}, "motion ratio 1.9"),
        ({"motion_ratio": Estimate(0.9)}, "without an interval"),
        ({"still_clips": Estimate(0.025, 0.004, 0.13)}, "few clips stand still: the share is 0.025 (0.004 to 0.130)"),
        ({"score_minus_still": Estimate(-0.02, -0.04, 0.001)}, "energy score minus that of the still is -0.0200"),
        ({"score_minus_still": Estimate(-0.02)}, "without an interval"),
        ({"score_minus_still": None}, "samples of at least 2"),
        ({"champions": (Against("the champion", Estimate(0.05, 0.0, 0.11)),)}, "keep 90% of the champion's gain"),
        ({"champions": (Against("the champion", Estimate(-0.1)),)}, "keep 90% of the champion's gain"),
        (
            {"champions": (Against("the champion", unmeasured=True),)},
            "the champion or of the model has no energy score",
        ),
        ({"coarse_motion_ratio": Estimate(0.3, 0.2, 0.4)}, "coarse motion ratio 0.3"),
        ({"champions": (Against("the best", None, Estimate(0.05, 0.0, 0.11)),)}, "move as truly as the best"),
        ({"champions": (Against("it", sets={"FVD": Estimate(-2, -3, -1)}),)}, "worse than it in FVD"),
    ],
)
def test_a_rule_that_is_not_met_is_a_reason(changes: dict[str, object], reason: str) -> None:
    (only,) = reasons(**changes)
    assert reason in only


def test_a_small_loss_within_the_margin_passes() -> None:
    unclear = {"FVD": Estimate(-1, -2, 0.1), "FID": Estimate(-1)}
    assert reasons(champions=(Against("it", Estimate(0.05, 0.0, 0.09), Estimate(0.0, -0.05, 0.05), unclear),)) == ()
    strict = GateRule(champion_margin=0.05)
    assert not gate(replace(GOOD, champions=(Against("it", Estimate(0.05, 0.0, 0.09)),)), strict).passed


def model(name: str, score: float, motion: float = 1.0, seed: int = 0) -> PerClip:
    noise = np.random.default_rng(seed).normal(0, 0.001, 40)
    values = {CLIP_DISTANCE: score + noise, champion.MAGNITUDE: motion * np.linspace(0.5, 1.5, 40)}
    return PerClip(name, tuple(item.key for item in ITEMS), values)


def test_small_losses_do_not_add_up_because_the_best_is_remembered() -> None:
    """Each model loses 6 % of the still's distance to its champion: the second is refused against the best."""
    real, still = model("real", 0.0).values[champion.MAGNITUDE], model("still", 1.0)
    models = [model(f"m{i}", 0.4 + 0.036 * i, seed=i) for i in range(3)]
    best: dict[champion.Measure, PerClip] = champion.best_so_far(models[0], {}, real, CLIP_DISTANCE)
    passed = []
    for before, now in itertools.pairwise(models):
        others = {"the champion": before, "the best": best["score"]}
        comparisons = tuple(
            champion.compare(name, now, other, still, real, CLIP_DISTANCE, ITEMS, 200) for name, other in others.items()
        )
        passed.append(gate(replace(GOOD, champions=comparisons)).passed)
        assert gate(replace(GOOD, champions=comparisons[:1])).passed  # by the champion alone both pass
        best = champion.best_so_far(now, best, real, CLIP_DISTANCE)
    assert passed == [True, False] and best["score"].model_sha256 == "m0"


def test_the_best_in_score_and_in_motion_may_be_two_models_and_read_back(tmp_path: object) -> None:
    real = model("real", 0.0).values[champion.MAGNITUDE]
    first, second = model("first", 0.4, motion=1.1), model("second", 0.3, motion=1.3)
    best = champion.best_so_far(second, champion.best_so_far(first, {}, real, CLIP_DISTANCE), real, CLIP_DISTANCE)
    assert {measure: kept.model_sha256 for measure, kept in best.items()} == {"score": "second", "motion": "first"}
    from infra import storage

    assert champion.read_best(str(tmp_path)) == {}
    storage.write_bytes(f"{tmp_path}/{champion.BEST_FILE}", champion.best_bytes(best))
    again = champion.read_best(str(tmp_path))
    assert {measure: kept.model_sha256 for measure, kept in again.items()} == {"score": "second", "motion": "first"}
    fewer = again["score"].for_items(ITEMS[3:5])
    assert fewer is not None and (fewer.values[CLIP_DISTANCE] == second.values[CLIP_DISTANCE][3:5]).all()
    assert again["score"].for_items([Item("other_000", "other", 0, "a", 0)]) is None


def test_motion_is_compared_by_its_logarithm_on_either_side_of_1() -> None:
    real, still = model("real", 0.0).values[champion.MAGNITUDE], model("still", 1.0)
    for motion, other, expected in ((1.2, 1.1, np.log(1.2 / 1.1)), (0.8, 1.1, -np.log(0.8) - np.log(1.1))):
        against = champion.compare(
            "it", model("a", 0.4, motion), model("b", 0.4, other), still, real, CLIP_DISTANCE, ITEMS, 200
        )
        assert against.motion_error is not None and against.motion_error.value == pytest.approx(expected)
    frozen = champion.compare("it", model("a", 0.4, 0.0), still, still, real, CLIP_DISTANCE, ITEMS, 200)
    assert frozen.motion_error is None and frozen.lost_gain is None


def test_a_clip_stands_still_below_a_tenth_of_its_real_motion_and_windows_of_a_clip_count_once() -> None:
    real = np.array([1.0, 1.0, 0.0, 2.0, 2.0])
    made = np.array([0.09, 0.2, 0.0, 0.1, 0.1])
    found = champion.still_clips(made, real, ["a", "a", "b", "c", "c"])  # b does not move in truth
    assert found is not None and found.value == pytest.approx((0.5 + 1) / 2)
    assert champion.still_clips(made, np.zeros(5), ["a"] * 5) is None
    none_of = [champion.still_clips(np.ones(n), np.ones(n), [str(i) for i in range(n)]) for n in (34, 35)]
    assert none_of[0] is not None and none_of[0].ci_high is not None and none_of[0].ci_high > 0.1
    assert none_of[1] is not None and none_of[1].ci_high is not None and none_of[1].ci_high < 0.1


def test_the_energy_score_is_unbiased_and_least_for_the_true_distribution() -> None:
    """Of Gaussian clips: E|X-y| - E|X-X'|/2 with X wider, narrower or displaced is above that of the truth."""
    rng = np.random.default_rng(0)

    def clip(scale: float, shift: float = 0.0) -> np.ndarray:
        return np.clip(128 + shift + 25 * scale * rng.normal(size=(3, 4, 4, 3)), 0, 255).round().astype(np.uint8)

    def score(samples: int, scale: float, shift: float = 0.0) -> np.ndarray:
        to_truth, spreads = [], []
        for _ in range(300):
            drawn = [clip(scale, shift) for _ in range(samples)]
            to_truth.append(distances_to_truth(drawn, clip(1.0)))
            spreads.append(spread(drawn))
        return energy_score(np.array(to_truth), np.array(spreads))

    right = score(2, 1.0)
    error = right.std() / 300**0.5
    assert abs(right.mean() - score(4, 1.0).mean()) < 4 * error  # the same expectation from any number of samples
    for wrong in (score(2, 0.3), score(2, 2.0), score(2, 1.0, shift=25.0)):
        assert wrong.mean() > right.mean() + 5 * error
    still = clip(0.0)
    assert (
        energy_score(np.array([distances_to_truth([still, still], clip(1.0))]), np.array([spread([still, still])]))[0]
        > right.mean() + 5 * error
    )
    with pytest.raises(ValueError, match="1 sample, expected at least 2"):
        spread([still])


def test_on_textures_a_perfect_sampler_passes_and_a_still_a_mean_and_a_worse_sampler_fail() -> None:
    """Three runs of `benchmarks.gate`; by the distance to the true clip the perfect sampler loses to the still."""
    systems = ("perfect", "still", "mean", "amplitude")
    passed, failed = simulation.passes(0.9, 3, systems=systems)
    assert passed["perfect"] == 3 and not any(passed[system] for system in systems[1:])
    assert any("motion relative" in rule for rule in failed["mean"]) and failed["perfect"] == Counter()
    random = np.random.default_rng(0)
    first = simulation.fields(random, 4)
    assert 0.9 < first.std() < 1.1
    real, still, other = (
        simulation.pixels(simulation.sample(system, random, first, 0.9)) for system in ("perfect", "still", "perfect")
    )
    by_clip = [clip_distance(a, b) for a, b in zip(other, real, strict=True)]
    assert simulation.distances(other, real) == pytest.approx(by_clip)
    assert simulation.magnitudes(real) == pytest.approx([motion_magnitude(clip) for clip in real])
    assert simulation.coarse_magnitudes(real) == pytest.approx([coarse_motion_magnitude(clip) for clip in real])
    assert np.mean(by_clip) > simulation.distances(still, real).mean()


def test_snow_moves_as_much_as_a_texture_but_not_coarsely() -> None:
    """The energy score hardly tells them apart: in many dimensions it depends on the total variance."""
    rng = np.random.default_rng(0)
    shift = rng.integers(0, 255, (80, 80, 3))
    texture = np.stack([np.repeat(np.repeat(shift[k : k + 8, :8], 8, 0), 8, 1) for k in range(8)]).astype(np.uint8)
    snow = rng.integers(0, 255, texture.shape).astype(np.uint8)
    assert motion_magnitude(snow) == pytest.approx(motion_magnitude(texture), rel=0.1)
    assert coarse_motion_magnitude(snow) < 0.3 * coarse_motion_magnitude(texture)
    assert coarse_motion_magnitude(texture[:1].repeat(8, 0)) == 0
    assert coarse_motion_magnitude(texture[:, :3, :2]) > 0  # frames that are smaller than four squares


def test_a_real_clip_with_the_noise_of_a_sensor_stands_still() -> None:
    real = np.full(40, 0.02)
    model = real.copy()
    real[0], model[0] = 0.02 / 255, 0.0  # coarse motion
    share = still_clips(model, real, [str(i) for i in range(40)])
    assert share is not None and share.value == 0


def test_a_champion_without_the_score_that_decides_is_a_rule_that_is_not_met() -> None:
    names = [str(i) for i in range(40)]
    items = [Item(name, name, i, "", i) for i, name in enumerate(names)]
    moved = np.full(40, 0.02)
    full, without = ({ENERGY_SCORE: np.ones(40), MAGNITUDE: moved}, {MAGNITUDE: moved})
    model, other = (PerClip("", tuple(names), values) for values in (full, without))
    against = compare("the champion", model, other, model, moved, ENERGY_SCORE, items, 100)
    assert against.unmeasured and any("has no energy score" in reason for reason in reasons(champions=(against,)))
