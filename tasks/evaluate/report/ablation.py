"""Tables 5 and 6 at home: variants trained under common seeds, compared clip by clip with TRIP."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.protocol.presets import AS_PUBLISHED, published_rows
from tasks.evaluate.report.page import REPORT_STYLE
from tasks.evaluate.report.tables import Table, number
from tasks.evaluation_record import EvaluationRecord, read_evaluation
from tasks.metrics.extractors.extractor import NOT_COMPARABLE
from tasks.metrics.statistics import Estimate, mean_over_clips, student_quantile
from tasks.records import UserError

SCHEMA_VERSION = 1
REFERENCE = "TRIP"
# Metric: (title, format, whether a lower value is the better one; None where neither end is).
METRICS: dict[str, tuple[str, str, bool | None]] = {
    "clip_distance": ("Distance to the true clip (lower)", ".4f", True),
    "motion_ratio": ("Motion ratio to real (1 is best)", ".3f", None),
    "consistency_4": ("Frame consistency, 4 frames", ".2f", None),
    "consistency_all": ("Frame consistency, all frames", ".2f", None),
}
_COLUMNS = {
    "clip_distance": "distance_trip",
    "motion_ratio": "magnitude_trip",
    "consistency_4": "consistency_4_trip",
    "consistency_all": "consistency_all_trip",
}

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One training of one variant, judged; `variant` is a row of Tables 5 and 6."""

    variant: str
    seed: int
    report: str  # address of the evaluation's folder
    loss_last: float


@dataclass(frozen=True)
class Comparison:
    """The numbers of an ablation; `by_seed` and `distances` are in the order of `seeds`.

    values[variant][metric] and differences[variant][metric] (variant minus TRIP, clip by clip) with 95 % intervals.
    """

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    clips: int
    values: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    by_seed: dict[str, dict[str, list[float]]]  # differences[variant][metric] of each seed alone
    distances: dict[str, dict[str, list[float]]]
    losses: dict[str, list[float]]
    real: dict[str, float]
    base: dict[str, float] = field(default_factory=dict)  # of the untrained base, where the evaluations have its row


def two_way_mean(values_SC: Values, clusters: Sequence[str]) -> Estimate:
    """Mean of values by seed and clip [S, C] with a 95 % interval for other seeds and other clips.

    The variance of the mean is that of seeds plus that of clips, which are common to all seeds. Each has its own
    Student's t, of S - 1 and of one less than the source clips, and the half widths add in quadrature: it covers 94 to
    98 % from 3 seeds on (docs/decisions/metrics.md). With a single seed the interval is over clips alone.
    """
    seeds = len(values_SC)
    if seeds == 1:
        return mean_over_clips(values_SC[0], list(clusters))
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    value, count = float(values_SC.mean()), len(names)
    if count < 2:
        return Estimate(value)
    # What each source clip adds to the mean, to first order where they have unequal numbers of windows.
    deviation_SK = np.stack([np.bincount(index, row - value, count) for row in values_SC]) * count / len(index)
    of_seed_S1, of_clip_1K = deviation_SK.mean(axis=1, keepdims=True), deviation_SK.mean(axis=0, keepdims=True)
    rest_SK = deviation_SK - of_seed_S1 - of_clip_1K + deviation_SK.mean()
    rest = (rest_SK**2).sum() / ((seeds - 1) * (count - 1)) / (seeds * count)
    by_seed, by_clip = of_seed_S1.var(ddof=1) / seeds, of_clip_1K.var(ddof=1) / count
    # Both hold the variance of what is common to neither, which counts once.
    half = np.hypot(
        student_quantile(seeds - 1) * np.sqrt(by_seed), student_quantile(count - 1) * np.sqrt(max(by_clip - rest, 0.0))
    )
    return Estimate(value, float(value - half), float(value + half))


def compare(arms: Sequence[Arm]) -> Comparison:
    """Reads the arms' evaluations and compares each variant with TRIP under the same seeds on the same clips.

    Raises:
        UserError: a variant lacks a seed that TRIP has, or two evaluations are of different clips.
    """
    variants = tuple(dict.fromkeys(arm.variant for arm in arms))
    seeds = tuple(dict.fromkeys(arm.seed for arm in arms))
    found = {(arm.variant, arm.seed): _read(arm) for arm in arms}
    missing = [f"{variant} with seed {seed}" for variant in variants for seed in seeds if (variant, seed) not in found]
    if REFERENCE not in variants or missing:
        raise UserError(f"an ablation needs {REFERENCE} and every variant under every seed; missing: {missing}")
    keys, clusters, reference, _, _ = found[REFERENCE, seeds[0]]
    for (variant, seed), (others, *_) in found.items():
        if others != keys:
            raise UserError(
                f"{variant} with seed {seed} was evaluated on other clips than {REFERENCE}; evaluate it again"
            )
    table = {
        variant: {name: np.stack([found[variant, seed][3][name] for seed in seeds]) for name in METRICS}
        for variant in variants
    }
    values, differences, by_seed = {}, {}, {}
    for variant in variants:
        values[variant] = {name: two_way_mean(table[variant][name], clusters) for name in METRICS}
        if variant != REFERENCE:
            minus = {name: table[variant][name] - table[REFERENCE][name] for name in METRICS}
            differences[variant] = {name: two_way_mean(minus[name], clusters) for name in METRICS}
            by_seed[variant] = {name: minus[name].mean(axis=1).tolist() for name in METRICS}
    # What has a floor is a distance between sets of clips.
    distances = {name for *_, report in found.values() for name in report.floors}
    return Comparison(
        variants=variants,
        seeds=seeds,
        clips=len(set(clusters)),
        values=values,
        differences=differences,
        by_seed=by_seed,
        distances={
            variant: {
                name: [found[variant, seed][4].rows["trip"][name].value for seed in seeds] for name in sorted(distances)
            }
            for variant in variants
        },
        losses={v: [next(a.loss_last for a in arms if (a.variant, a.seed) == (v, s)) for s in seeds] for v in variants},
        real={"clip_distance": 0.0, "motion_ratio": 1.0} | reference["real"],
        base=reference["base"],
    )


def _read(arm: Arm) -> tuple[list[str], list[str], dict[str, dict[str, float]], dict[str, Values], EvaluationRecord]:
    """Of one evaluation: keys, source clips, means of the reference rows, values by metric [C], and the report itself.

    The row of the untrained base is empty where the evaluation has none.
    """
    text = storage.read_bytes(storage.join(arm.report, "per_clip.csv")).decode()
    lines = list(csv.DictReader(io.StringIO(text)))
    column = {name: np.array([float(line[of]) for line in lines]) for name, of in _COLUMNS.items()}
    moving = float(np.mean([float(line["magnitude_real"]) for line in lines]))
    column["motion_ratio"] /= moving  # so that the mean over clips is the ratio of the sums

    def means(row: str, names: Sequence[str]) -> dict[str, float]:
        columns = {name: _COLUMNS[name].replace("trip", row) for name in names}
        return {
            name: float(np.mean([float(line[of]) for line in lines])) for name, of in columns.items() if of in lines[0]
        }

    base = means("base", list(METRICS))
    if base:
        base["motion_ratio"] /= moving
    return (
        [line["key"] for line in lines],
        [line["clip"] for line in lines],
        {"real": means("real", list(METRICS)[2:]), "base": base},
        column,
        read_evaluation(arm.report),
    )


def verdicts(comparison: Comparison) -> list[str]:
    """What the distance to the true clip says of each variant on this base, with the paper's values beside it."""
    published = {row.method: row.values for row in published_rows("webvid-2048")}
    lines = []
    for variant, found in comparison.differences.items():
        _, digits, _ = METRICS["clip_distance"]
        difference = found["clip_distance"]
        low, high = difference.ci_low, difference.ci_high
        if low is None or high is None or low <= 0 <= high:
            said = "is not told apart from"
        else:
            said = "is worse than" if low > 0 else "is better than"
        paper = f"in the paper FVD {published[variant]['FVD']:g} against {published[REFERENCE]['FVD']:g}"
        here = f"distance to the true clip {number(difference, '+' + digits)}"
        lines.append(f"{variant} {said} {REFERENCE} here: {here}; {paper}.")
    return lines


def tables(comparison: Comparison) -> list[Table]:
    """Values, paired differences, and the paper's rows."""
    titles = [title for title, _, _ in METRICS.values()]
    rows = [
        [v, *(number(comparison.values[v][name], digits) for name, (_, digits, _) in METRICS.items())]
        + [_spread(values, ".3g") for values in comparison.distances[v].values()]
        + [_spread(comparison.losses[v], ".4f")]
        for v in comparison.variants
    ]
    real = [f"{comparison.real[name]:{digits}}" for name, (_, digits, _) in METRICS.items()]
    names = list(comparison.distances[REFERENCE])
    rows.append(["Real video", *real, *("-" for _ in names), "-"])
    if comparison.base:
        base = [f"{comparison.base[name]:{digits}}" for name, (_, digits, _) in METRICS.items()]
        rows.insert(0, ["Base, not trained", *base, *("-" for _ in names), "-"])
    values = Table("Values", ["Variant", *titles, *(f"{name} (lower)" for name in names), "last training loss"], rows)
    minus = [
        [f"{v} minus {REFERENCE}"]
        + [
            f"{number(found[name], '+' + digits)} [{_each(comparison.by_seed[v][name], '+' + digits)}]"
            for name, (_, digits, _) in METRICS.items()
        ]
        for v, found in comparison.differences.items()
    ]
    differences = Table("Paired differences [each seed alone]", ["Difference", *titles], minus)
    paper = [
        [
            row.method,
            *(f"{row.values[f'F-Consistency/{k}']:.2f}" for k in ("4", "all")),
            f"{row.values['FVD']:g}",
            f"Table {row.table}",
        ]
        for row in published_rows("webvid-2048")
        if row.method in comparison.variants
    ]
    header = ["Variant", "F-Consistency_4", "F-Consistency_all", "FVD (lower)", "Source"]
    return [values, differences, Table(f"The paper's rows, {AS_PUBLISHED}", header, paper)]


def _each(values: Sequence[float], digits: str) -> str:
    return ", ".join(format(value, digits) for value in values)


def _spread(values: Sequence[float], digits: str) -> str:
    """The mean over seeds, and from where to where they reach."""
    mean = format(float(np.mean(values)), digits)
    return mean if len(values) == 1 else f"{mean} ({min(values):{digits}} .. {max(values):{digits}})"


def write(output: str, comparison: Comparison, about: Mapping[str, Any]) -> dict[str, str]:
    """Writes `ablation.md`, `ablation.html` and, last, `ablation.json`. Returns their addresses by ending."""
    seeds = len(comparison.seeds)
    notes = [
        f"Seeds: {', '.join(map(str, comparison.seeds))}, common to all variants: data order, noise and first weights;"
        f" {comparison.clips} held-out clips, animated from the same noise.",
        "Intervals are 95 % for other seeds and other clips; x .. y is from the least to the greatest seed."
        if seeds > 1
        else "One seed: the intervals are over clips alone and say nothing of another seed.",
        "A still clip scores 100 on frame consistency: nearest to the real row is best, not highest.",
        "All variants start from one base, and each is as good at step 0 as that base is at it: a base that was "
        "trained like one variant puts that variant ahead, however they compare. The row of the base, not trained, is "
        "the base sampled as TRIP^-.",
        "The paper's rows are of another data set, base, number of steps and harness: an order that agrees with "
        "theirs, or does not, is no finding about them.",
    ]
    if "TRIP^W" in comparison.variants:
        notes.append("TRIP^W: the weights of Equation 9 are the recipe's, not tuned.")
    if any(name.startswith(("rfd-", "rkd-")) for name in comparison.distances[REFERENCE]):
        notes.append(f"rfd- and rkd- are distances of fixed random networks, {NOT_COMPARABLE}.")
    shown = tables(comparison)
    origin = Table("Provenance", ["what", "value"], [[name, str(value)] for name, value in about.items()])
    parts = ["# Ablation", *(f"- {line}" for line in verdicts(comparison)), ""]
    for table in [*shown, origin]:
        parts += [f"## {table.title}", "", table.markdown(), ""]
    parts += ["## How to read it", "", *(f"- {note}" for note in notes)]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts(comparison))
    body = "".join(f"<h2>{html.escape(t.title)}</h2><div class=wide>{t.html()}</div>" for t in [*shown, origin])
    hints = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>TRIP ablation</title>'
        f"<style>{REPORT_STYLE}</style><h1>Ablation</h1><ul>{items}</ul>{body}"
        f"<h2>How to read it</h2><ul>{hints}</ul></html>\n"
    )
    places = {ending: storage.join(output, f"ablation.{ending}") for ending in ("md", "html", "json")}
    storage.write_bytes(places["md"], ("\n".join(parts) + "\n").encode())
    storage.write_bytes(places["html"], page.encode())
    content = {"schema_version": SCHEMA_VERSION, "about": dict(about), "comparison": asdict(comparison)}
    storage.write_json(places["json"], content)
    return places
