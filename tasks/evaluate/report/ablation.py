"""Our Tables 5 and 6: variants trained under common seeds, compared clip by clip with TRIP."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE, SCORES
from tasks.evaluate.generate import load_arrays, save_arrays
from tasks.evaluate.protocol.presets import AS_PUBLISHED, published_rows
from tasks.evaluate.report.tables import Table, number
from tasks.evaluation_record import EvaluationRecord, read_evaluation
from tasks.metrics.extractors.extractor import NOT_COMPARABLE
from tasks.metrics.statistics import (
    LEVEL,
    Estimate,
    degrees_of_freedom,
    holm,
    mean_over_clips,
    p_value,
    student_quantile,
)
from tasks.pages import render
from tasks.records import UserError

SCHEMA_VERSION = 1
REFERENCE = "TRIP"
# Metric: (title, format, whether a lower value is the better one; None where neither end is).
METRICS: dict[str, tuple[str, str, bool | None]] = {
    CLIP_DISTANCE: ("Distance to the true clip (lower)", ".4f", True),
    ENERGY_SCORE: ("Energy score (lower)", ".4f", True),
    "motion_ratio": ("Motion ratio to real (1 is best)", ".3f", None),
    "consistency_4": ("Frame consistency, 4 frames", ".2f", None),
    "consistency_all": ("Frame consistency, all frames", ".2f", None),
}
_COLUMNS = {
    CLIP_DISTANCE: "distance_trip",
    "motion_ratio": "magnitude_trip",
    "consistency_4": "consistency_4_trip",
    "consistency_all": "consistency_all_trip",
}

Values = NDArray[np.float64]


SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Arm:
    """One training of one variant, evaluated; `variant` is a row of Tables 5 and 6, `steps` its budget."""

    variant: str
    seed: int
    report: str  # address of the evaluation's folder
    loss_last: float
    steps: int = 0


@dataclass(frozen=True)
class Comparison:
    """The numbers of an ablation; `by_seed` and `distances` are in the order of `seeds`.

    values[variant][metric] and differences[variant][metric] (variant minus TRIP, clip by clip) with 95 % intervals.
    p_values[variant][metric] are of the differences, adjusted by Holm over the variants. `decides` is the metric of the
    verdicts: the distance to the true clip where it is declared to be decided by the first frame and the caption, else
    the energy score.
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
    p_values: dict[str, dict[str, float]] = field(default_factory=dict)
    decides: str = CLIP_DISTANCE
    steps: int = 0


def two_way_mean(values_SC: Values, clusters: Sequence[str], level: float = LEVEL) -> Estimate:
    """Mean of values by seed and clip [S, C] with an interval (95 %) for other seeds and other clips.

    The variance of the mean is that of seeds plus that of clips, which are common to all seeds. Each has its own
    Student's t, of S - 1 and of one less than the source clips; the t of the sum is the mean of both, weighted by the
    variances (Cochran and Cox, 1950). Of normal values it covers 94 to 97 % from 3 seeds on
    (docs/decisions/metrics.md). With a single seed the interval is over clips only.

    Raises:
        ValueError: values that are not finite.
    """
    if not np.isfinite(values_SC).all():
        raise ValueError("values by seed and clip hold NaN or infinity")
    seeds = len(values_SC)
    if seeds == 1:
        return mean_over_clips(values_SC[0], list(clusters), level=level)
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
    clip_degrees = degrees_of_freedom(of_clip_1K[0] - of_clip_1K.mean())
    variances = np.array([by_seed, max(by_clip - rest, 0.0)])
    quantiles = np.array([student_quantile(seeds - 1, level), student_quantile(clip_degrees, level)])
    half = variances @ quantiles / np.sqrt(variances.sum()) if variances.sum() > 0 else 0.0
    return Estimate(value, float(value - half), float(value + half))


@dataclass(frozen=True)
class _Evaluation:
    """What is read of one arm's evaluation.

    Attributes:
        keys, clusters: of each item, its key and its source clip.
        real, base: means by metric of the reference rows; `base` is empty where the evaluation has no such row.
        values: of TRIP's row, by metric [C].
        report: its record.
    """

    keys: list[str]
    clusters: list[str]
    real: dict[str, float]
    base: dict[str, float]
    values: dict[str, Values]
    report: EvaluationRecord

    @property
    def deterministic(self) -> bool:
        """Whether the distance to the true clip decides; so it was in all evaluations before the field existed."""
        return bool(self.report.provenance.get("deterministic_motion", True))


def compare(arms: Sequence[Arm]) -> Comparison:
    """Reads the arms' evaluations and compares each variant with TRIP under the same seeds on the same clips.

    Raises:
        UserError: a variant lacks a seed that TRIP has, two evaluations are of different clips, or chance decides the
            motion and an evaluation has no energy score.
    """
    variants = tuple(dict.fromkeys(arm.variant for arm in arms))
    seeds = tuple(dict.fromkeys(arm.seed for arm in arms))
    evaluations = {(arm.variant, arm.seed): _read(arm) for arm in arms}
    missing = [f"{v} with seed {seed}" for v in variants for seed in seeds if (v, seed) not in evaluations]
    if REFERENCE not in variants or missing:
        raise UserError(f"an ablation needs {REFERENCE} and every variant under every seed; missing: {missing}")
    reference = evaluations[REFERENCE, seeds[0]]
    for (variant, seed), evaluation in evaluations.items():
        if evaluation.keys != reference.keys:
            raise UserError(
                f"{variant} with seed {seed} was evaluated on other clips than {REFERENCE}; evaluate it again"
            )
    names = [name for name in METRICS if all(name in evaluation.values for evaluation in evaluations.values())]
    table = values_by_variant(evaluations, variants, seeds, names)
    values, differences, by_seed = {}, {}, {}
    p_values: dict[str, dict[str, float]] = {variant: {} for variant in variants if variant != REFERENCE}
    for variant in variants:
        values[variant] = {name: two_way_mean(table[variant][name], reference.clusters) for name in names}
        if variant != REFERENCE:
            minus = {name: table[variant][name] - table[REFERENCE][name] for name in names}
            differences[variant] = {name: two_way_mean(minus[name], reference.clusters) for name in names}
            by_seed[variant] = {name: minus[name].mean(axis=1).tolist() for name in names}
    for name in names:
        own = [
            p_value(
                lambda level, minus=table[v][name] - table[REFERENCE][name]: two_way_mean(
                    minus, reference.clusters, level
                )
            )
            for v in p_values
        ]
        for variant, adjusted in zip(p_values, holm(own), strict=True):
            p_values[variant][name] = adjusted
    # What has a floor is a distance between sets of clips.
    distances = sorted({name for evaluation in evaluations.values() for name in evaluation.report.floors})
    chance = not all(evaluation.deterministic for evaluation in evaluations.values())
    if chance and ENERGY_SCORE not in names:
        raise UserError(
            "chance decides the motion of these clips, but an evaluation has no energy score;"
            " evaluate with samples of at least 2"
        )
    return Comparison(
        variants=variants,
        seeds=seeds,
        clips=len(set(reference.clusters)),
        values=values,
        differences=differences,
        by_seed=by_seed,
        distances={
            variant: {
                name: [evaluations[variant, seed].report.rows["trip"][name].value for seed in seeds]
                for name in distances
            }
            for variant in variants
        },
        losses={v: [next(a.loss_last for a in arms if (a.variant, a.seed) == (v, s)) for s in seeds] for v in variants},
        real={CLIP_DISTANCE: 0.0, "motion_ratio": 1.0} | reference.real,
        base=reference.base,
        p_values=p_values,
        decides=ENERGY_SCORE if chance else CLIP_DISTANCE,
        steps=arms[0].steps,
    )


def values_by_variant(
    evaluations: Mapping[tuple[str, int], _Evaluation],
    variants: Sequence[str],
    seeds: Sequence[int],
    names: Sequence[str],
) -> dict[str, dict[str, Values]]:
    """Values [S, C] by variant and metric."""
    return {
        variant: {name: np.stack([evaluations[variant, seed].values[name] for seed in seeds]) for name in names}
        for variant in variants
    }


def per_clip_arrays(arms: Sequence[Arm]) -> dict[str, NDArray[Any]]:
    """Every value that the comparison is of: `BUDGET/VARIANT/METRIC` [S, C], with the keys, clips and seeds."""
    arrays: dict[str, NDArray[Any]] = {}
    for steps in dict.fromkeys(arm.steps for arm in arms):
        group = [arm for arm in arms if arm.steps == steps]
        evaluations = {(arm.variant, arm.seed): _read(arm) for arm in group}
        first = next(iter(evaluations.values()))
        seeds = list(dict.fromkeys(arm.seed for arm in group))
        arrays |= {"key": np.array(first.keys), "clip": np.array(first.clusters), "seed": np.array(seeds)}
        variants = list(dict.fromkeys(arm.variant for arm in group))
        names = [name for name in METRICS if all(name in e.values for e in evaluations.values())]
        for variant, metrics in values_by_variant(evaluations, variants, seeds, names).items():
            arrays |= {f"{steps}/{variant}/{name}": values for name, values in metrics.items()}
    return arrays


def _read(arm: Arm) -> _Evaluation:
    text = storage.read_bytes(storage.join(arm.report, "per_clip.csv")).decode()
    lines = list(csv.DictReader(io.StringIO(text)))
    values = {name: np.array([float(line[column]) for line in lines]) for name, column in _COLUMNS.items()}
    moved = np.array([float(line["magnitude_real"]) for line in lines])
    moving = float(moved.mean())
    if moving > 0:  # the ratio of the sums, with what each clip adds to it: its own motion is no error of the ratio
        ratio = float(values["motion_ratio"].mean()) / moving
        values["motion_ratio"] = ratio + (values["motion_ratio"] - ratio * moved) / moving
    else:
        del values["motion_ratio"]
    with contextlib.suppress(FileNotFoundError):
        arrays = load_arrays(storage.join(arm.report, "per_clip.npz"))
        if f"trip/{ENERGY_SCORE}" in arrays:
            values[ENERGY_SCORE] = arrays[f"trip/{ENERGY_SCORE}"]

    def means(row: str, names: Sequence[str]) -> dict[str, float]:
        columns = {name: _COLUMNS[name].replace("trip", row) for name in names}
        return {
            name: float(np.mean([float(line[column]) for line in lines]))
            for name, column in columns.items()
            if column in lines[0]
        }

    base = means("base", list(_COLUMNS))
    if base and moving > 0:
        base["motion_ratio"] /= moving
    return _Evaluation(
        keys=[line["key"] for line in lines],
        clusters=[line["clip"] for line in lines],
        real=means("real", ["consistency_4", "consistency_all"]),
        base=base,
        values=values,
        report=read_evaluation(arm.report),
    )


def verdicts(comparison: Comparison) -> list[str]:
    """What the deciding metric says of each variant on this base, with the paper's values next to it."""
    published = {row.method: row.values for row in published_rows("webvid-2048")}
    _, digits, _ = METRICS[comparison.decides]
    lines = []
    for variant, metrics in comparison.differences.items():
        difference, p = metrics[comparison.decides], comparison.p_values[variant][comparison.decides]
        if p >= SIGNIFICANT:
            relation = "does not differ measurably from"
        else:
            relation = "is worse than" if difference.value > 0 else "is better than"
        paper = f"in the paper FVD {published[variant]['FVD']:g} against {published[REFERENCE]['FVD']:g}"
        here = f"{SCORES[comparison.decides]} {number(difference, '+' + digits)}, p = {p:.3f} (Holm)"
        lines.append(f"{variant} {relation} {REFERENCE} here: {here}; {paper}.")
    return lines


def tables(comparison: Comparison) -> list[Table]:
    """Values, paired differences, and the paper's rows."""
    metrics = {name: METRICS[name] for name in METRICS if name in comparison.values[REFERENCE]}
    titles = [title for title, _, _ in metrics.values()]
    rows = [
        [v, *(number(comparison.values[v][name], digits) for name, (_, digits, _) in metrics.items())]
        + [_spread(values, ".3g") for values in comparison.distances[v].values()]
        + [_spread(comparison.losses[v], ".4f")]
        for v in comparison.variants
    ]

    def reference(values: Mapping[str, float]) -> list[str]:
        return [f"{values[name]:{digits}}" if name in values else "-" for name, (_, digits, _) in metrics.items()]

    names = list(comparison.distances[REFERENCE])
    rows.append(["Real video", *reference(comparison.real), *("-" for _ in names), "-"])
    if comparison.base:
        rows.insert(0, ["Base, not trained", *reference(comparison.base), *("-" for _ in names), "-"])
    values = Table("Values", ["Variant", *titles, *(f"{name} (lower)" for name in names), "last training loss"], rows)
    minus = [
        [f"{v} minus {REFERENCE}"]
        + [
            f"{number(differences[name], '+' + digits)} [{_each(comparison.by_seed[v][name], '+' + digits)}]"
            f"\np = {comparison.p_values[v][name]:.3f} (Holm)"
            for name, (_, digits, _) in metrics.items()
        ]
        for v, differences in comparison.differences.items()
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


def curve_table(comparisons: Sequence[Comparison]) -> Table:
    """The learning curve: the deciding metric of every variant, and its difference from TRIP, at each budget."""
    last = comparisons[-1]
    title, digits, _ = METRICS[last.decides]
    rows = []
    for variant in last.variants:
        cells = []
        for comparison in comparisons:
            cell = number(comparison.values[variant][last.decides], digits)
            if variant != REFERENCE:
                minus = number(comparison.differences[variant][last.decides], "+" + digits)
                cell += f"\nminus {REFERENCE}: {minus}, p = {comparison.p_values[variant][last.decides]:.3f} (Holm)"
            cells.append(cell)
        rows.append([variant, *cells])
    header = ["Variant", *(f"{comparison.steps} steps" for comparison in comparisons)]
    return Table(f"Learning curve: {title}", header, rows)


def _each(values: Sequence[float], digits: str) -> str:
    return ", ".join(format(value, digits) for value in values)


def _spread(values: Sequence[float], digits: str) -> str:
    """The mean over seeds, and from where to where they reach."""
    mean = format(float(np.mean(values)), digits)
    return mean if len(values) == 1 else f"{mean} ({min(values):{digits}} .. {max(values):{digits}})"


def write(
    output: str,
    comparisons: Sequence[Comparison],
    about: Mapping[str, Any],
    tuned: str = "",
    arrays: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, str]:
    """Writes `ablation.npz`, `ablation.md`, `ablation.html` and, last, `ablation.json`. Returns addresses by ending.

    Args:
        output: address of the folder.
        about: rows of the table of provenance.
        comparisons: one for each budget of steps; the last one's tables are printed in full.
        tuned: a sentence on how the weights of TRIP^W were chosen; empty: they are the recipe's.
        arrays: `per_clip_arrays`.
    """
    comparison = comparisons[-1]
    seeds = len(comparison.seeds)
    notes = [
        f"Seeds: {', '.join(map(str, comparison.seeds))}, common to all variants: data order, noise and first weights;"
        f" {comparison.clips} held-out clips, animated from the same noise.",
        "Intervals are 95 % for other seeds and other clips; x .. y is from the least to the greatest seed."
        if seeds > 1
        else "One seed: the intervals are over clips alone and say nothing of another seed.",
        "p: of no difference, adjusted by Holm for the number of variants; the intervals are not adjusted. A verdict "
        f"names a difference where p is below {SIGNIFICANT:g}.",
        "A still clip scores 100 on frame consistency: nearest to the real row is best, not highest.",
        "All variants start from one base, and each is as good at step 0 as that base is at it: a base that was "
        "trained like one variant puts that variant ahead, however they compare. The row of the base, not trained, is "
        "the base sampled as TRIP^-.",
        "The paper's rows are of another data set, base, number of steps and harness: an order that agrees with "
        "theirs, or does not, is no finding about them.",
    ]
    if "TRIP^W" in comparison.variants:
        notes.append(tuned or "TRIP^W: the weights of Equation 9 are the recipe's, not tuned.")
    if any(name.startswith(("rfd-", "rkd-")) for name in comparison.distances[REFERENCE]):
        notes.append(f"rfd- and rkd- are distances of fixed random networks, {NOT_COMPARABLE}.")
    shown = [*([curve_table(comparisons)] if len(comparisons) > 1 else []), *tables(comparison)]
    origin = Table("Provenance", ["what", "value"], [[name, str(value)] for name, value in about.items()])
    parts = ["# Ablation", *(f"- {line}" for line in verdicts(comparison)), ""]
    for table in [*shown, origin]:
        parts += [f"## {table.title}", "", table.markdown(), ""]
    parts += ["## How to read it", "", *(f"- {note}" for note in notes)]
    page = render("ablation.html", verdicts=verdicts(comparison), tables=[*shown, origin], notes=notes)
    addresses = {ending: storage.join(output, f"ablation.{ending}") for ending in ("md", "html", "json", "npz")}
    save_arrays(addresses["npz"], dict(arrays or {}))
    storage.write_bytes(addresses["md"], ("\n".join(parts) + "\n").encode())
    storage.write_bytes(addresses["html"], page.encode())
    content = {"schema_version": SCHEMA_VERSION, "about": dict(about), "comparison": asdict(comparison)}
    content |= {"curve": [asdict(one) for one in comparisons[:-1]]}
    storage.write_json(addresses["json"], content)
    return addresses
