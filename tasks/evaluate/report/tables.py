"""The tables of an evaluation: those of the paper (Tables 1, 2, 3, 5, 6) with its own rows, and one of everything."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tasks.evaluate.gate import Gate
from tasks.evaluate.protocol.presets import AS_PUBLISHED, PublishedRow
from tasks.evaluate.protocol.protocol import Protocol
from tasks.evaluate.report.aggregate import Summary
from tasks.evaluate.systems import BEST_OF, CLOSED_FORM, ROUND_TRIP
from tasks.evaluation_record import BASE, FROZEN, REAL, TRIP
from tasks.metrics.extractors.extractor import NOT_COMPARABLE, ExtractorInfo, MetricKind
from tasks.metrics.statistics import Estimate

LABELS = {
    FROZEN: "Prior only: a still",
    BASE: "Base, not trained",
    CLOSED_FORM: "Closed form only, no network",
    TRIP: "TRIP (this run)",
    BEST_OF: "TRIP, best of k (oracle)",
    ROUND_TRIP: "Real video through the VAE (oracle)",
    REAL: "Real video",
    "champion": "Champion",
}
FLOOR = "two halves of the real clips, not paired"
NOTHING = "-"

# What the published tables show; Table 4, a study with people, is not ours to fill.
PAPER_TABLES = {
    1: "WebVid-10M",
    2: "DTDB",
    3: "MSR-VTT",
    5: "how the first frame is given",
    6: "how the residual noise is learnt",
}
_ABLATIONS = (5, 6)
# A published metric and what is printed in its column: the first extractor that is there, by its features.
_IN_COLUMN = {
    "F-Consistency": ("clip_frames",),
    "FVD": ("i3d", "i3d_port", "rfd_motion"),
    "FID": ("inception", "rfd_app"),
}
# Metrics of pixels: title and format. All others are named by their extractor.
_TITLES = {
    "motion_ratio": ("Motion ratio to real (1 is best)", ".3f"),
    "coarse_motion_ratio": ("Coarse motion ratio to real (1 is best)", ".3f"),
    "clip_distance": ("Distance to the true clip (lower)", ".4f"),
    "clip_distance_minus_frozen": ("Distance minus that of frozen (below 0)", "+.4f"),
    "clip_distance_minus_base": ("Distance minus that of the base, not trained (below 0)", "+.4f"),
    "energy_score": ("Energy score (lower)", ".4f"),
    "energy_score_minus_frozen": ("Energy score minus that of frozen (below 0)", "+.4f"),
    "energy_score_minus_base": ("Energy score minus that of the base, not trained (below 0)", "+.4f"),
    "spread_ratio": ("Spread of samples to error (1 is best)", ".3f"),
    "first_frame_psnr_db": ("First-frame PSNR, dB (higher)", ".2f"),
    "first_frame_ssim": ("First-frame SSIM (higher)", ".4f"),
    "flicker_ratio": ("Flicker ratio to real (1 is best)", ".3f"),
    "warp_error": ("Warped error to the next frame (real is the target)", ".4f"),
    "photo_error": ("Warped error to the given frame (real is the target)", ".4f"),
    "part_distance": ("Distance of the moving part to the given frame (real is the target)", ".4f"),
    "smoothness_ratio": ("Smoothness ratio to real (1 is best)", ".3f"),
}
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"[": "{[}", "*": "{*}"}  # behind the end of a line they would be read as its options
    | {"\u2191": r"$\uparrow$", "\u2193": r"$\downarrow$"}
)
# Names that the paper prints with an index: F-Consistency_4, TRIP^W, TRIP_TE.
_INDEXED = re.compile(r"(F-Consistency|TRIP)(\\_|\\textasciicircum\{\})(all|4|TE|C|W|-)(?!\w)")


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as the header has, with notes below; a line break in a cell parts a value from a remark."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        escaped = ((cell.replace("|", "\\|").replace("\n", "<br>") for cell in line) for line in lines)
        table = "\n".join("| " + " | ".join(line) + " |" for line in escaped)
        return "\n\n".join([table, *self.notes])

    def latex(self) -> str:
        r"""A fragment to `\input` where `booktabs` is loaded."""
        lines = [" & ".join(map(_latex_cell, line)) + r" \\" for line in [self.header, *self.rows]]
        parts = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{latex_text(self.title)}}}",
            rf"\begin{{tabular}}{{{'l' * len(self.header)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip{{\footnotesize {latex_text(note)}\par}}" for note in self.notes),
            r"\end{table}",
        ]
        return "\n".join(parts) + "\n"


def latex_text(text: str) -> str:
    """Plain text as LaTeX prints it, indices of the paper's names as indices."""

    def indexed(match: re.Match[str]) -> str:
        name, mark, index = match.groups()
        return f"{name}${'_' if mark.endswith('_') else '^'}\\mathrm{{{index}}}$"

    return _INDEXED.sub(indexed, " ".join(text.split()).translate(_LATEX))


def _latex_cell(text: str) -> str:
    value, _, remark = text.partition("\n")
    if not remark:
        return latex_text(value)
    small = "".join(rf"\\{{\tiny {latex_text(line)}}}" for line in textwrap.wrap(remark, 28, break_on_hyphens=False))
    # Set from the top, so that a value is level with its row's label.
    return rf"\begin{{tabular}}[t]{{@{{}}l@{{}}}}{latex_text(value)}{small}\end{{tabular}}"


def number(estimate: Estimate | None, digits: str) -> str:
    """`0.931 (0.874 to 0.990)`, or a dash for what a row does not have."""
    if estimate is None:
        return NOTHING
    text = format(estimate.value, digits)
    if estimate.ci_low is None or estimate.ci_high is None:
        return text
    return f"{text} ({format(estimate.ci_low, digits)} to {format(estimate.ci_high, digits)})"


def label(row: str) -> str:
    """How a row is called in a table: another method by its own name."""
    return LABELS.get(row, row)


def consistency_extractor(extractors: Sequence[ExtractorInfo]) -> ExtractorInfo:
    """The one whose embeddings frame consistency is of."""
    return next(extractor for extractor in extractors if extractor.kind is MetricKind.CONSISTENCY)


def gate_table(gate: Gate) -> Table:
    """Every rule of the gate as it was applied."""
    rows = [
        [v.rule, "met" if v.passed else "not met", NOTHING if v.value is None else _gate_value(v.value), v.threshold]
        for v in gate.rules
    ]
    return Table("Gate", ["Rule", "Verdict", "Value (95 % interval)", "Required"], rows)


def _gate_value(value: Estimate) -> str:
    return number(value, ".4g" if value.ci_low is not None else "g")


def all_tables(summary: Summary, extractors: Sequence[ExtractorInfo], protocol: Protocol) -> dict[str, Table]:
    """Every table by the name of its file, those of the paper first."""
    return paper_tables(summary, extractors, protocol) | {
        "this_run": own_table(summary, extractors),
        "differences": difference_table(summary, extractors),
        "limits": limit_table(summary, extractors),
        "counts": count_table(summary),
    }


def paper_tables(summary: Summary, extractors: Sequence[ExtractorInfo], protocol: Protocol) -> dict[str, Table]:
    """The published tables that belong to a protocol, this run's rows above theirs.

    A metric whose extractor is not the published one says so in its cell, and by which name it goes.
    """
    by_table = {n: [row for row in protocol.published if row.table == n] for n in PAPER_TABLES}
    whole = [row for row in by_table[1] if row.method == "TRIP"]  # the paper repeats it in its ablations
    tables = {}
    for n, published in by_table.items():
        if published:
            rows = [*published, *(whole if n in _ABLATIONS else ())]
            tables[f"table_{n}"] = _paper_table(n, rows, summary, extractors, protocol)
    return tables


def _paper_table(
    n: int, published: Sequence[PublishedRow], summary: Summary, extractors: Sequence[ExtractorInfo], protocol: Protocol
) -> Table:
    metrics = list(dict.fromkeys(name for row in published for name in row.values))
    rows = [
        [
            label(row),
            *(_in_column(summary, extractors, row, metric) for metric in metrics),
            f"this run, {summary.clips} clips",
        ]
        for row in summary.rows
    ]
    for row in published:
        method = f"{row.method} ({row.kind})" if row.kind else row.method
        values = [_published(row.values.get(metric), metric) for metric in metrics]
        rows.append([method, *values, f"Table {row.table}, {AS_PUBLISHED}"])
    header = [f"{name.replace('/', '_')} {_arrow(name)}" for name in metrics]
    title = f"Table {n} of the paper: {PAPER_TABLES[n]}"
    return Table(title, ["Approach", *header, "Source"], rows, _paper_notes(published, summary, protocol))


def _paper_notes(published: Sequence[PublishedRow], summary: Summary, protocol: Protocol) -> tuple[str, ...]:
    notes = []
    if not protocol.rules.published:
        notes.append(
            "The published rows are of other clips than this run's: next to each other only their order counts."
        )
    categories = summary.counts["clips_by_category"]
    if categories:
        notes.append(f"FID and FVD of this run are the mean over {len(categories)} categories.")
    if {"T2V", "I2V"} <= {row.kind for row in published}:
        notes.append(
            "T2V and I2V rows are not comparable: only an image-to-video method is given a real frame. "
            "TRIP, and the frozen and real rows, start from it."
        )
    return tuple(notes)


def _in_column(summary: Summary, extractors: Sequence[ExtractorInfo], row: str, metric: str) -> str:
    """This run's value under a published metric's head, or that of what stands in for it, said so."""
    kind, slash, which = metric.partition("/")
    by_feature = {extractor.features[0]: extractor for extractor in extractors}
    extractor = next((by_feature[name] for name in _IN_COLUMN.get(kind, ()) if name in by_feature), None)
    estimate = summary.metrics[row].get(extractor.metric + slash + which) if extractor else None
    if extractor is None or estimate is None:
        return NOTHING
    remarks = [] if extractor.official else [f"{extractor.metric}, {NOT_COMPARABLE}"]
    remarks += [FLOOR] if row == REAL and not slash else []
    return _with(number(estimate, _digits(extractor.metric, extractors)), remarks)


def _published(value: float | None, metric: str) -> str:
    return NOTHING if value is None else f"{value:.2f}" if "Consistency" in metric else f"{value:g}"


def _arrow(metric: str) -> str:
    return "\u2191" if "Consistency" in metric else "\u2193"


def own_table(summary: Summary, extractors: Sequence[ExtractorInfo]) -> Table:
    """Every metric of every row."""
    rows = []
    for metric in _all_metrics(summary.metrics):
        cells = []
        for row in summary.rows:
            remarks = _remarks(metric, extractors)
            remarks += [FLOOR] if row == REAL and metric in summary.floors else []
            cells.append(_with(number(summary.metrics[row].get(metric), _digits(metric, extractors)), remarks))
        rows.append([_title(metric, extractors), *cells])
    return Table("All metrics of this run", ["Metric", *map(label, summary.rows)], rows)


def difference_table(summary: Summary, extractors: Sequence[ExtractorInfo]) -> Table:
    """Each row minus TRIP, paired by clip, by its interval shown to be one or not."""
    others = [row for row in summary.rows if row in summary.differences]
    rows = []
    for metric in _all_metrics(summary.differences):
        digits = "+" + _digits(metric, extractors).lstrip("+")
        cells = [
            _with(number(summary.differences[row].get(metric), digits), _remarks(metric, extractors)) for row in others
        ]
        rows.append([_title(metric, extractors), *cells])
    header = ["Metric", *(f"{label(row)} minus TRIP" for row in others)]
    notes = ("Paired by clip. An interval that leaves out 0 tells a row and TRIP apart; one across 0 does not.",)
    return Table("Paired differences from TRIP", header, rows, notes)


def limit_table(summary: Summary, extractors: Sequence[ExtractorInfo]) -> Table:
    """Of every distance that of two real halves, and where it would end with endless clips."""
    others = [row for row in summary.rows if row != REAL]
    rows = []
    for metric in dict.fromkeys([*summary.floors, *_all_metrics(summary.infinity)]):
        estimates = [summary.floors.get(metric), *(summary.infinity.get(row, {}).get(metric) for row in others)]
        cells = [_with(number(value, _digits(metric, extractors)), _remarks(metric, extractors)) for value in estimates]
        rows.append([_title(metric, extractors), *cells])
    header = [
        "Distance",
        "Two halves of the real clips, not paired",
        *(f"{label(row)}, endless clips" for row in others),
    ]
    notes = (
        "Two halves of the real clips differ by the draw of clips, at half the number. The other rows are paired with "
        "the real clips by first frame: a value below that of the halves is not good by itself, one near it not bad; "
        "the paired differences compare. Endless clips: the line through the distances at several N, at 1/N = 0; it "
        "may lie below 0. A dash: a quarter of the clips is fewer than twice the features; the line is not straight.",
    )
    return Table("Scale and limits of the distances", header, rows, notes)


def count_table(summary: Summary) -> Table:
    """How many clips were requested and evaluated, and why others were not."""
    counts = summary.counts
    rows = [["items asked", str(counts["asked"])], ["items evaluated", str(counts["items"])]]
    rows.append(["unique clips, the N of all intervals", str(counts["clips"])])
    rows += [[f"unique clips of {name}", str(count)] for name, count in counts["clips_by_category"].items()]
    left_out = [
        (name, reason, count) for name, reasons in counts["excluded"].items() for reason, count in reasons.items()
    ]
    rows += [[f"left out of all rows: {name} lacks ({reason})", str(count)] for name, reason, count in left_out]
    return Table("Counts", ["What", "Number"], rows if left_out else [*rows, ["left out", "0"]])


def _all_metrics(by_row: Mapping[str, Mapping[str, Estimate]]) -> Iterable[str]:
    """The metrics of any row, TRIP's order first."""
    return dict.fromkeys(name for row in sorted(by_row, key=lambda row: row != TRIP) for name in by_row[row])


def _extractor_of(metric: str, extractors: Sequence[ExtractorInfo]) -> ExtractorInfo | None:
    """Whose number it is; None for what comes of pixels alone."""
    for extractor in extractors:
        if metric.split("/")[0] in (extractor.metric, extractor.kernel_metric):
            return extractor
    return consistency_extractor(extractors) if metric.startswith("text_alignment") else None


def _remarks(metric: str, extractors: Sequence[ExtractorInfo]) -> list[str]:
    extractor = _extractor_of(metric, extractors)
    return [] if extractor is None or extractor.official else [NOT_COMPARABLE]


def _with(value: str, remarks: Sequence[str]) -> str:
    return f"{value}\n{'; '.join(remarks)}" if remarks and value != NOTHING else value


def _title(metric: str, extractors: Sequence[ExtractorInfo]) -> str:
    if metric in _TITLES:
        return _TITLES[metric][0]
    extractor = _extractor_of(metric, extractors)
    if extractor is None or metric.startswith("text_alignment"):
        return f"{metric} (higher)"
    if extractor.kind is MetricKind.FLOW_RATIO:
        return f"{metric} (1 is best)"
    return f"{metric} ({'lower' if extractor.of_sets else 'nearest to real is best'})"


def _digits(metric: str, extractors: Sequence[ExtractorInfo]) -> str:
    if metric in _TITLES:
        return _TITLES[metric][1]
    extractor = _extractor_of(metric, extractors)
    if extractor is not None and extractor.kind is MetricKind.FLOW_RATIO:
        return ".3f"
    return ".3g" if extractor is not None and extractor.of_sets else ".2f"
