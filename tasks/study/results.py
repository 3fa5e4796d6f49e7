"""Writes the result of a study: JSON, the votes as CSV and Parquet, a page, and its section of an evaluation's page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra import storage
from tasks.evaluation_record import PAGE_FILE, PER_CLIP_FILE
from tasks.metrics.statistics import Estimate
from tasks.pages import render, with_section
from tasks.records import UserError, to_json
from tasks.study.plan import Key, Plan
from tasks.study.statistics import rank_correlation
from tasks.study.store import Vote
from tasks.study.tally import Comparison, Count, Tally, system_chosen

TALLY_FILE = "tally.json"
SECTION = "preference study"  # the place in the evaluation's page
PAPER_TALLY = "Tally by rater, as in Table 4 of the paper"
STORED = ("rater", "position", "pair", "swapped", "milliseconds", "plays", "device", "stored_at")
NOTES = (
    "Win rate: share of votes, a tie (not sure) as one half. Its 95 % interval is over items and raters: other items "
    "and other raters would give other votes.",
    "The tally by rater counts raters by the majority of their votes. It says how many raters agree, not how often a "
    "system is better, and its interval takes raters as independent.",
    "Excluded raters are those that the rule of the plan excludes, which was fixed before the first vote. The numbers "
    "of all raters come first.",
    "p: exact sign test on the majorities by item, adjusted by Holm for all comparisons and questions.",
)


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as the header has; a line break in a cell parts a value from a remark."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def votes_csv(plan: Plan, votes: Sequence[Vote], key: Key | None = None) -> bytes:
    """The votes as they are stored, one line each; with the key also what each pair is and which system was chosen."""
    lines = vote_lines(plan, votes, key)
    buffer = io.StringIO()
    names = list(lines[0]) if lines else list(STORED)
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue().encode()


def votes_parquet(plan: Plan, votes: Sequence[Vote], key: Key | None = None) -> bytes:
    """The columns of the CSV with their types."""
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(vote_lines(plan, votes, key)), sink)
    return sink.getvalue().to_pybytes()


def vote_lines(plan: Plan, votes: Sequence[Vote], key: Key | None = None) -> list[dict[str, Any]]:
    sealed = {pair.name: pair for pair in key.pairs} if key is not None else {}
    lines = []
    for vote in votes:
        line: dict[str, Any] = {name: getattr(vote, name) for name in STORED}
        line |= {question.name: vote.answers[question.name] for question in plan.questions}
        pair = sealed.get(vote.pair)
        if pair is not None:
            line |= {"kind": pair.kind, "item": pair.item, "clip": pair.clip}
            line |= {"left": pair.second if vote.swapped else pair.first}
            line |= {"right": pair.first if vote.swapped else pair.second}
            for question, answer in vote.answers.items():
                line[f"{question}_system"] = system_chosen(pair, vote.swapped, answer) or ""
        lines.append(line)
    return lines


def correlations(tally: Tally, report: str, rows: Mapping[str, str]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Spearman's correlation over items of votes with automatic metrics, by "FIRST/SECOND", question and metric.

    It is of an item's mean score (1: all votes for the first) and the metric of the first minus that of the second.

    Args:
        tally: the result of the study.
        report: address of the evaluation with the same items.
        rows: the row of the report for each system that has one.
    Raises:
        UserError: the report has no values by clip.
    """
    address = storage.join(report, PER_CLIP_FILE)
    try:
        with np.load(io.BytesIO(storage.read_bytes(address)), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{address} cannot be read ({error}); give the folder of a finished evaluation") from error
    keys = arrays["key"].tolist()
    metrics = sorted({name.partition("/")[2] for name in arrays if "/" in name})
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for question, by_pair in tally.all_raters.item_scores.items():
        for pair, scores in by_pair.items():
            first, second = (rows.get(system, "") for system in pair.split("/"))
            places = [keys.index(item) for item in scores if item in keys]
            values = np.array([score for item, score in scores.items() if item in keys])
            for metric in metrics:
                columns = [arrays.get(f"{row}/{metric}") for row in (first, second)]
                if columns[0] is None or columns[1] is None:
                    continue
                difference = (columns[0] - columns[1])[places].astype(np.float64)
                usable = np.isfinite(difference)
                estimate = rank_correlation(values[usable], difference[usable])
                if estimate is not None:
                    found.setdefault(pair, {}).setdefault(question, {})[metric] = estimate
    return found


def tables(
    plan: Plan, tally: Tally, correlated: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
) -> list[Table]:
    """Every table of the page. `metrics`: the report's numbers by system and metric."""
    titles = {question.name: question.title for question in plan.questions}
    result = [_win_rates(f"All {tally.all_raters.raters} raters", tally.all_raters, titles)]
    if tally.kept_raters is not None and tally.excluded:
        result.append(_win_rates(f"The {tally.kept_raters.raters} raters kept by the rule", tally.kept_raters, titles))
    result.append(_by_rater(tally, titles))
    strengths = tally.all_raters.strengths
    if strengths:
        rows = [[system, *(_signed(strengths[name].values.get(system)) for name in titles)] for system in tally.systems]
        reasons = tuple(f"{titles[name]}: {found.reason}." for name, found in strengths.items() if found.reason)
        notes = ("Log-odds against an average system, of all raters.", *reasons)
        result.append(Table("Bradley-Terry strengths", ["System", *titles.values()], rows, notes))
    if metrics:
        names = [n for n in next(iter(metrics.values())) if all(n in values for values in metrics.values())]
        rows = [[name, *(_number(values[name]) for values in metrics.values())] for name in names]
        result.append(Table("Automatic metrics of the evaluation", ["Metric", *metrics], rows))
    for pair, by_question in (correlated or {}).items():
        names = sorted({metric for values in by_question.values() for metric in values})
        rows = [
            [metric, *(_signed(by_question.get(name, {}).get(metric), ".2f") for name in titles)] for metric in names
        ]
        first, second = pair.split("/")
        note = (
            f"Spearman over items: votes for {first} and the metric of {first} minus {second}. Negative where less is "
            "better and the metric agrees with the raters.",
        )
        result.append(Table(f"Correlation with metrics: {pair}", ["Metric", *titles.values()], rows, note))
    result.append(_checks(tally, titles))
    return result


def _win_rates(title: str, count: Count, titles: Mapping[str, str]) -> Table:
    header = [
        "Question",
        "Systems",
        "Win rate of the first",
        "Votes for / not sure / against",
        "Items for / tied / against",
        "p",
        "alpha",
    ]
    rows = [
        [
            titles[line.question],
            f"{line.first} v.s. {line.second}",
            _percent(line.win_rate),
            f"{line.wins} / {line.ties} / {line.losses}\nas {line.effective_votes:.0f} independent votes",
            f"{line.items_for} / {line.items_tied} / {line.items_against}",
            f"{line.sign_p_holm:.3g}",
            "-" if line.alpha is None else f"{line.alpha:.2f}",
        ]
        for line in count.comparisons
    ]
    return Table(title, header, rows)


def _by_rater(tally: Tally, titles: Mapping[str, str]) -> Table:
    kept = {_names(line): line for line in tally.kept_raters.comparisons} if tally.kept_raters is not None else {}
    rows = []
    for line in tally.all_raters.comparisons:
        other = kept.get(_names(line))
        rows.append(
            [
                titles[line.question],
                f"{line.first} v.s. {line.second}",
                _versus(line),
                "-" if other is None else _versus(other),
            ]
        )
    return Table(PAPER_TALLY, ["Question", "Systems", "All raters", "Kept raters"], rows)


def _checks(tally: Tally, titles: Mapping[str, str]) -> Table:
    rows = [
        [f"Share of the left side: {titles[name]}", _percent(value)] for name, value in tally.all_raters.left.items()
    ]
    for title, name in (("Gold pairs answered rightly", "gold"), ("Repeated pairs answered equally", "repeats")):
        values = [value for rater in tally.raters if (value := getattr(rater, name)) is not None]
        if values:
            rows.append([title, f"{np.mean(values):.0%}\nmean over raters, lowest {min(values):.0%}"])
    rows.append(["Raters excluded by the rule", ", ".join(f"{k}: {v}" for k, v in tally.excluded.items()) or "none"])
    rows.append(["Median time of a vote", f"{np.median([rater.seconds for rater in tally.raters]):.1f} s"])
    return Table("Checks", ["What", "Value"], rows)


def _names(line: Comparison) -> tuple[str, str, str]:
    return line.first, line.second, line.question


def _versus(line: Comparison) -> str:
    value = 100 * line.tally_by_rater.value
    counts = f"{line.raters_for} : {line.raters_against}"
    tied = f", {line.raters_tied} tied" if line.raters_tied else ""
    return f"{value:.1f} v.s. {100 - value:.1f}\n{counts}{tied} raters; {_percent(line.tally_by_rater)}"


def _percent(value: Estimate) -> str:
    text = f"{value.value:.1%}"
    return (
        text if value.ci_low is None or value.ci_high is None else f"{text} ({value.ci_low:.1%} to {value.ci_high:.1%})"
    )


def _signed(value: Estimate | None, digits: str = ".2f") -> str:
    if value is None:
        return "-"
    text = f"{value.value:+{digits}}"
    if value.ci_low is None or value.ci_high is None:
        return text
    return f"{text} ({value.ci_low:+{digits}} to {value.ci_high:+{digits}})"


def _number(value: Estimate) -> str:
    text = f"{value.value:.4g}"
    return (
        text if value.ci_low is None or value.ci_high is None else f"{text} ({value.ci_low:.4g} to {value.ci_high:.4g})"
    )


def write_results(
    output: str,
    plan: Plan,
    key: Key,
    votes: Sequence[Vote],
    tally: Tally,
    correlated: Mapping[str, Any],
    metrics: Mapping[str, Any],
    report: str | None,
) -> list[str]:
    """Writes the result into a folder, and its section into the page of a report; returns the addresses written."""
    content = to_json(tally) | {
        "correlations": {k: {q: _plain(m) for q, m in v.items()} for k, v in correlated.items()}
    }
    values = {"notes": NOTES, "tables": tables(plan, tally, correlated, metrics)}
    files = {
        "votes.csv": votes_csv(plan, votes, key),
        "votes.parquet": votes_parquet(plan, votes, key),
        "tally.html": render("preference.html", **values).encode(),
        TALLY_FILE: storage.json_bytes(content),
    }
    written = []
    for name, data in files.items():
        storage.write_bytes(storage.join(output, name), data)
        written.append(storage.join(output, name))
    if report is not None:
        address = storage.join(report, PAGE_FILE)
        page = with_section(storage.read_bytes(address).decode(), SECTION, render("preference_section.html", **values))
        if page is None:
            raise UserError(f"{address} has no place for a preference study; run its evaluation again")
        storage.write_bytes(address, page.encode())
        written.append(address)
    return written


def _plain(values: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: to_json(value) for name, value in values.items()}


def mlflow_metrics(tally: Tally) -> dict[str, float]:
    """The numbers for MLflow by name, of all raters and of those kept."""
    values: dict[str, float] = {}
    for name, count in (("all", tally.all_raters), ("kept", tally.kept_raters)):
        for line in count.comparisons if count is not None else ():
            prefix = f"preference/{name}/{line.first}_vs_{line.second}/{line.question}"
            values[f"{prefix}/win_rate"] = line.win_rate.value
            values[f"{prefix}/tally_by_rater"] = line.tally_by_rater.value
            if line.win_rate.ci_low is not None and line.win_rate.ci_high is not None:
                values[f"{prefix}/win_rate_low"] = line.win_rate.ci_low
                values[f"{prefix}/win_rate_high"] = line.win_rate.ci_high
    return values
