"""The tally on votes that a rule excludes, votes of another plan, exports, and the correlation with metrics."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from pyarrow import parquet

from tasks.pages import with_section
from tasks.records import UserError
from tasks.study.plan import ExclusionRule, Plan
from tasks.study.results import correlations, votes_csv, votes_parquet, write_results
from tasks.study.sources import report_rows
from tasks.study.store import Vote
from tasks.study.tally import tally
from tests.support.studies import make_study

ITEMS = 8


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"), ITEMS, raters=4, gold=4, repeats=4)


def votes_of(plan: Plan, key, answer, raters=4) -> list[Vote]:
    """The votes of raters whose answer follows from rater, position, sealed pair and the systems left and right."""
    sealed = {pair.name: pair for pair in key.pairs}
    votes = []
    for rater in range(raters):
        for position, place in enumerate(plan.assignments[rater]):
            pair = sealed[plan.pairs[place.pair].name]
            left, right = (pair.second, pair.first) if place.swapped else (pair.first, pair.second)
            side = answer(rater, position, pair, left, right)
            if side is not None:
                answers = {question.name: side for question in plan.questions}
                votes.append(Vote(rater, position, pair.name, place.swapped, answers, 5000, 1, "phone", 0))
    return votes


def honest(left, right):
    return "left" if {left, right} & {"ours", "real"} == {left} else "right"


MEMBERS = {
    "incomplete": lambda position, pair, left, right: honest(left, right) if position < 7 else None,
    "gold": lambda position, pair, left, right: "unsure" if "real" in (left, right) else honest(left, right),
    "repeats": lambda position, pair, left, right: (
        honest(left, right) if pair.kind != "repeat" else {"left": "right", "right": "left"}[honest(left, right)]
    ),
    "one_side": lambda position, pair, left, right: honest(left, right) if "real" in (left, right) else "left",
}


@pytest.mark.parametrize("reason", MEMBERS)
def test_the_rule_excludes_a_rater_for_each_reason(reason, study):
    plan, key = study
    # One side also turns the repeated pairs round; here that alone is no reason.
    rule = replace(ExclusionRule(), least_repeats=0.0) if reason == "one_side" else plan.rule
    plan = replace(plan, rule=rule)

    def answer(rater, position, pair, left, right):
        return MEMBERS[reason](position, pair, left, right) if rater == 2 else honest(left, right)

    result = tally(plan, key, votes_of(plan, key, answer))
    assert result.excluded == {reason: 1} and result.raters[2].excluded == reason
    assert result.kept_raters is not None
    line = result.kept_raters.comparisons[0]
    assert (line.raters_for, line.win_rate.value, line.items_for) == (3, 1.0, ITEMS)
    assert line.tally_by_rater.value == 1 and line.sign_p == pytest.approx(2 / 2**ITEMS)


def test_votes_of_another_plan_or_changed_ones_are_refused(study):
    plan, key = study
    votes = votes_of(plan, key, lambda *_: "left")
    for changed in (
        replace(votes[0], swapped=not votes[0].swapped),
        replace(votes[0], pair="0" * 32),
        replace(votes[0], rater=99),
        replace(votes[0], position=99),
    ):
        with pytest.raises(UserError, match="not of this plan"):
            tally(plan, key, [changed, *votes[1:]])
    with pytest.raises(UserError, match="two votes"):
        tally(plan, key, [votes[0], *votes])
    with pytest.raises(UserError, match="no votes"):
        tally(plan, key, [])


def test_exports_have_a_line_for_each_vote_and_systems_only_with_the_key(study):
    plan, key = study
    votes = votes_of(plan, key, lambda rater, position, pair, left, right: honest(left, right))
    lines = list(csv.DictReader(io.StringIO(votes_csv(plan, votes, key).decode())))
    assert len(lines) == len(votes)
    for line in lines:
        assert line["visual_quality_system"] == line[line["visual_quality"]] in ("ours", "real")
    table = parquet.read_table(io.BytesIO(votes_parquet(plan, votes)))
    assert table.num_rows == len(votes) and "item" not in table.column_names and "left" not in table.column_names


def test_votes_are_correlated_with_the_metrics_of_the_same_items(study, tmp_path):
    plan, key = study
    ours = {f"item{n:03d}" for n in range(0, ITEMS, 2)}  # where raters prefer ours

    def answer(rater, position, pair, left, right):
        if pair.kind in ("shuffled", "frozen") or pair.item in ours:
            return honest(left, right)
        return {"left": "right", "right": "left"}[honest(left, right)]

    result = tally(plan, key, votes_of(plan, key, answer))
    keys = [f"item{n:03d}" for n in range(ITEMS)][::-1]
    better = np.array([1.0 if name in ours else 2.0 for name in keys])
    np.savez(
        tmp_path / "per_clip.npz",
        **{"key": keys, "clip": keys, "trip/clip_distance": better, "Other/clip_distance": np.full(ITEMS, 1.5)},
    )
    rows = report_rows({"ours": "x#trip", "other": "x#Other", "folder": str(tmp_path)})
    assert rows == {"ours": "trip", "other": "Other"}
    found = correlations(result, str(tmp_path), rows)
    assert found["ours/other"]["visual_quality"]["clip_distance"].value == pytest.approx(-1)
    (tmp_path / "report.html").write_text("<!-- preference study -->\n<h2>Curves</h2>")
    votes = votes_of(plan, key, answer)
    write_results(str(tmp_path / "out"), plan, key, votes, result, found, {}, str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "-1.00" in page and page.endswith("<h2>Curves</h2>")
    with pytest.raises(UserError, match="finished evaluation"):
        correlations(result, str(tmp_path / "out"), rows)


def test_a_section_is_replaced_and_a_page_without_its_place_stays():
    page = with_section("a<!-- x -->b", "x", "one")
    assert page is not None and "one" in page
    again = with_section(page, "x", "two")
    assert again is not None and "one" not in again and again.endswith("b") and again.count("two") == 1
    assert with_section("a", "x", "one") is None
