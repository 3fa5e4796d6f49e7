"""The ablation's comparison: paired by seed and clip, honest about seeds, and refusing arms that do not match."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from infra import storage
from tasks.evaluate.generate import load_arrays, save_arrays
from tasks.evaluate.report import ablation
from tasks.evaluate.report.ablation import Arm, compare, per_clip_arrays, tables, two_way_mean, verdicts, write
from tasks.metrics.statistics import Estimate
from tasks.records import UserError
from tests.support.reports import write_record

CLIPS, FRECHET = 24, "rfd-motion"


def arm(root: str, variant: str, seed: int, worse: float = 0.0, clips: int = CLIPS, base: bool = True) -> Arm:
    """An evaluation on disk whose clips differ greatly and whose variants differ by `worse` and little noise."""
    of_clips = np.random.default_rng(0)
    noise = np.random.default_rng([sum(variant.encode()), seed])
    lines = []
    for clip in range(clips):
        hard = of_clips.uniform(0.01, 0.2)
        lines.append(
            {
                "key": f"{clip}_000",
                "clip": str(clip),
                "distance_trip": hard + worse + noise.normal(0, 0.003),
                "magnitude_trip": 0.1 * (1 + worse),
                "magnitude_real": 0.1,
                **{f"consistency_{k}_{row}": 90.0 for k in ("4", "all") for row in ("trip", "real")},
                **({"distance_base": hard + 0.1, "magnitude_base": 0.15} if base else {}),
                **({f"consistency_{k}_base": 80.0 for k in ("4", "all")} if base else {}),
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    uri = storage.join(root, f"{variant}-{seed}")
    storage.write_bytes(storage.join(uri, "per_clip.csv"), text.getvalue().encode())
    write_record(uri, rows={"trip": {FRECHET: Estimate(1.0 + worse)}}, floors={FRECHET: Estimate(0.1)})
    return Arm(variant, seed, uri, 0.5)


def arms(root: str, seeds: int = 3) -> list[Arm]:
    worse = {"TRIP": 0.0, "TRIP_TE": 0.0, "TRIP^-": 0.02, "TRIP^W": -0.02}
    return [arm(root, name, seed, by) for seed in range(seeds) for name, by in worse.items()]


def test_pairing_tells_apart_what_the_spread_of_clips_would_hide() -> None:
    comparison = compare(arms("memory://ablation-paired"))
    minus = comparison.differences["TRIP^-"]["clip_distance"]
    assert minus.value == pytest.approx(0.02, abs=0.002)
    assert minus.ci_low is not None and minus.ci_high is not None
    assert 0.015 < minus.ci_low < minus.value < minus.ci_high < 0.025  # the clips alone spread over 0.2
    assert comparison.differences["TRIP^-"]["motion_ratio"].value == pytest.approx(0.02)
    assert comparison.distances["TRIP^-"] == {FRECHET: [1.02] * 3}
    lines = verdicts(comparison)
    assert [line.split(" here")[0] for line in lines] == [
        "TRIP_TE does not differ measurably from TRIP",
        "TRIP^- is worse than TRIP",
        "TRIP^W is better than TRIP",
    ]
    assert "in the paper FVD 39.9 against 38.9" in lines[1] and "p = 0.003 (Holm)" in lines[1]


def test_a_difference_counts_only_after_the_correction_for_the_number_of_variants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A p of 0.03 tells one variant apart, but not one of three."""
    monkeypatch.setattr(ablation, "p_value", lambda interval: 0.03 if abs(interval(0.95).value) < 0.01 else 0.5)
    made = arms("memory://ablation-holm")
    three, one = compare(made), compare([arm for arm in made if arm.variant in ("TRIP", "TRIP_TE")])
    assert three.p_values["TRIP_TE"]["clip_distance"] == pytest.approx(0.09)
    assert one.p_values["TRIP_TE"]["clip_distance"] == pytest.approx(0.03)
    assert (
        "does not differ measurably from" in verdicts(three)[0]
        and "does not differ measurably from" not in verdicts(one)[0]
    )


def test_a_learning_curve_has_a_column_for_each_budget_and_arrays_of_every_clip() -> None:
    curve = [replace(one, steps=steps) for steps in (50, 100) for one in arms(f"memory://ablation-{steps}")]
    comparisons = [compare([one for one in curve if one.steps == steps]) for steps in (50, 100)]
    places = write("memory://ablation-curve/out", comparisons, {}, "chosen of 5 pairs", per_clip_arrays(curve))
    text = storage.read_bytes(places["md"]).decode()
    assert "| Variant | 50 steps | 100 steps |" in text and "chosen of 5 pairs" in text and "not tuned" not in text
    arrays = load_arrays(places["npz"])
    assert arrays["50/TRIP^-/clip_distance"].shape == (3, CLIPS) and len(arrays["key"]) == CLIPS
    minus = arrays["100/TRIP^-/clip_distance"] - arrays["100/TRIP/clip_distance"]
    assert minus.mean() == pytest.approx(comparisons[1].differences["TRIP^-"]["clip_distance"].value)
    assert storage.read_json(places["json"])["curve"][0]["steps"] == 50


def test_where_chance_decides_the_energy_score_does() -> None:
    chance = arms("memory://ablation-chance", seeds=2)
    for one in chance:
        report = storage.read_json(f"{one.report}/report.json") | {"provenance": {"deterministic_motion": False}}
        storage.write_json(f"{one.report}/report.json", report)
        worse = 0.05 if one.variant == "TRIP_TE" else 0.0
        noise = np.random.default_rng([one.seed, len(one.variant)]).normal(0, 0.003, CLIPS)
        save_arrays(f"{one.report}/per_clip.npz", {"trip/energy_score": 0.1 + worse + noise})
    lines = verdicts(compare(chance))
    assert lines[0].startswith("TRIP_TE is worse than TRIP here: energy score")
    assert "Energy score" in tables(compare(chance))[0].header[2]


def test_an_interval_knows_that_seeds_differ() -> None:
    """Seeds that disagree widen the interval, however many clips agree within each."""
    agreed = np.tile(np.linspace(-1, 1, 100), (3, 1))
    split = agreed + np.array([[-1.0], [0.0], [1.0]])
    clips = [str(i) for i in range(100)]
    narrow, wide = two_way_mean(agreed, clips), two_way_mean(split, clips)
    assert narrow.value == pytest.approx(wide.value, abs=1e-12)
    assert narrow.ci_high is not None and wide.ci_high is not None
    assert narrow.ci_high < 0.15 and wide.ci_high > 0.6
    alone = two_way_mean(split[:1], clips)
    assert alone.ci_high is not None and alone.ci_high < -0.8


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("deviations", [(1, 0, 0.1), (1, 1, 1), (1, 3, 1), (0.2, 1, 1), (0, 1, 0.1)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(
    seeds: int, deviations: tuple[float, float, float]
) -> None:
    """Whatever differs most, seeds, clips or neither, at the numbers that an ablation has."""
    of_seeds, of_clips, of_both = deviations
    random, covered, trials = np.random.default_rng(1), 0, 1000
    for _ in range(trials):
        values = of_seeds * random.normal(size=(seeds, 1)) + of_clips * random.normal(size=(1, 40))
        values = values + of_both * random.normal(size=(seeds, 40))
        found = two_way_mean(values, [str(i) for i in range(40)])
        assert found.ci_low is not None and found.ci_high is not None
        covered += found.ci_low <= 0 <= found.ci_high
    assert 0.93 < covered / trials < 0.985


def test_windows_of_one_clip_do_not_narrow_the_interval() -> None:
    random = np.random.default_rng(2)
    values = random.normal(size=(3, 1)) + random.normal(size=(3, 20))
    once = two_way_mean(values, [str(i) for i in range(20)])
    doubled = two_way_mean(np.repeat(values, 4, axis=1), [str(i) for i in range(20) for _ in range(4)])
    assert (doubled.ci_low, doubled.ci_high) == pytest.approx((once.ci_low, once.ci_high))


def test_what_does_not_match_is_refused() -> None:
    whole = arms("memory://ablation-refused", seeds=2)
    with pytest.raises(UserError, match=r"missing: \['TRIP\^W with seed 1'\]"):
        compare(whole[:-1])
    with pytest.raises(UserError, match="needs TRIP"):
        compare([one for one in whole if one.variant != "TRIP"])
    other = arm("memory://ablation-refused-other", "TRIP^W", 1, clips=CLIPS - 1)
    with pytest.raises(UserError, match=r"TRIP\^W with seed 1 was evaluated on other clips"):
        compare([*whole[:-1], other])


def test_the_report_holds_every_variant_beside_the_papers_rows() -> None:
    comparison = compare(arms("memory://ablation-report"))
    places = write("memory://ablation-report/out", [comparison], {"recipe": "demo", "steps": 5})
    page, text = (storage.read_bytes(places[ending]).decode() for ending in ("html", "md"))
    for word in ("TRIP_TE", "TRIP^-", "as published, other harness", "43", "Seeds: 0, 1, 2,"):
        assert word in page and word in text
    values, differences, paper = tables(comparison)
    assert values.rows[0][:5] == ["Base, not trained", values.rows[0][1], "1.500", "80.00", "80.00"]
    distance = np.random.default_rng(0).uniform(0.01, 0.2, CLIPS).mean() + 0.1
    assert values.rows[0][1] == f"{distance:.4f}" and "not tuned." in text
    assert "base that was trained like one variant" in page
    bare = compare([arm("memory://ablation-no-base", "TRIP", 0, base=False)])
    assert not bare.base and [row[0] for row in tables(bare)[0].rows] == ["TRIP", "Real video"]
    assert len(values.rows) == 6 and len(differences.rows) == 3 and len(paper.rows) == 4
    assert storage.read_json(places["json"])["comparison"]["clips"] == CLIPS
    alone = write("memory://ablation-one/out", [compare(arms("memory://ablation-one", seeds=1))], {})
    assert "say nothing of another seed" in storage.read_bytes(alone["md"]).decode()
