"""What a person reads: one page with clips, tables, curves and the gate's verdict, and the same as files to take on."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.evaluate.gate import Gate
from tasks.evaluate.protocol.protocol import Protocol
from tasks.evaluate.report.aggregate import Summary
from tasks.evaluate.report.figures import (
    CURVE_FILES,
    Example,
    curve_png,
    curve_title,
    side_by_side,
    strip_png,
)
from tasks.evaluate.report.tables import Table, all_tables, gate_table
from tasks.evaluate.systems import CLOSED_FORM
from tasks.evaluation_record import BASE, PAGE_FILE, PER_CLIP_FILE
from tasks.metrics.extractors.extractor import ExtractorInfo
from tasks.pages import data_url, render
from trip_model.images import video_bytes

GUIDE = (
    "Every row starts from the same photo and sentence. The real video is the aim; the still is what a method must "
    "beat by moving.",
    "Distances to the real clips: lower is nearer. The real row holds the distance of two halves of the real clips, "
    "not paired, at half the number. The other rows are paired with the real clips and may lie below it.",
    "Frame consistency is best where it is nearest to the real row, not where it is highest: a still clip scores 100.",
    "x (a to b) is a value with its 95 % interval; whether a method differs from TRIP say the paired differences.",
    "A cell marked not comparable uses another extractor than the publications: compare it within this page alone.",
)
BASE_GUIDE = (
    "The base, not trained, is what training started from. It is sampled as TRIP^-: the clean first frame before the "
    "noised ones, neither prior nor fusion. What training adds is the difference from this row, not from the still."
)

REFERENCES_GUIDE = (
    "Closed form only: the shrunk prior is the predicted noise; neither the 3D-UNet nor the fusion is used. "
    "The rows marked oracle know the true clip: it is encoded and decoded again, or it chooses one of a model's "
    "samples (k is `samples` in the provenance). No model can be expected to reach them, and neither takes part in "
    "the gate."
)

FOLDED = ("table_5", "table_6")  # the ablations repeat this run's rows of Table 1


def per_clip_csv(summary: Summary) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(summary.per_clip[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary.per_clip)
    return buffer.getvalue().encode()


def per_clip_parquet(summary: Summary) -> bytes:
    """The columns of the csv with their types; a number that a clip does not have is null."""
    import pyarrow
    from pyarrow import parquet

    types = {"key": "string", "clip": "string", "caption": "string", "category": "string", "seed": "int64"}
    fields = [(name, pyarrow.type_for_alias(types.get(name, "float64"))) for name in summary.per_clip[0]]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(summary.per_clip, pyarrow.schema(fields)), sink)
    return sink.getvalue().to_pybytes()


def per_clip_npz(summary: Summary) -> bytes:
    """Keys, source clips and `ROW/METRIC` [N] of every metric that is a mean or ratio over items, in one order."""
    arrays: dict[str, Any] = {name: np.array([line[name] for line in summary.per_clip]) for name in ("key", "clip")}
    for metric, by_row in summary.by_item.items():
        arrays |= {f"{row}/{metric}": values for row, values in by_row.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def build(
    summary: Summary,
    gate: Gate,
    extractors: Sequence[ExtractorInfo],
    protocol: Protocol,
    examples: Sequence[Example],
    provenance: Mapping[str, Any],
) -> dict[str, bytes]:
    """All files for people, by their name in the report's folder; equal inputs give equal bytes, H.264 excepted."""
    files = {"per_clip.csv": per_clip_csv(summary), "per_clip.parquet": per_clip_parquet(summary)}
    files[PER_CLIP_FILE] = per_clip_npz(summary)
    for name, file in CURVE_FILES.items():
        if name in summary.curves:
            files[file] = curve_png(summary, extractors, name)
    for index, example in enumerate(examples):
        pixels = side_by_side(example)
        files[f"strips/{example.key}.png"] = strip_png(example)
        files[f"videos/{example.key}.mp4"] = video_bytes(pixels, protocol.fps, "mp4")
        if index == 0:
            files[f"videos/{example.key}.gif"] = video_bytes(pixels, protocol.fps, "gif")
    tables = all_tables(summary, extractors, protocol)
    files |= {f"tables/{name}.tex": table.latex().encode() for name, table in tables.items()}
    origin = Table("Provenance", ["what", "value"], _flat(provenance))
    files["report.md"] = _markdown(list(tables.values()), origin, gate, summary, examples).encode()
    files[PAGE_FILE] = _page(tables, origin, gate, summary, examples, files).encode()
    return files


def _guide(summary: Summary) -> tuple[str, ...]:
    base = [BASE_GUIDE] if BASE in summary.rows else []
    references = [REFERENCES_GUIDE] if CLOSED_FORM in summary.rows else []
    return (GUIDE[0], *base, *references, *GUIDE[1:])


def _verdict(gate: Gate) -> str:
    return "Gate: passed" if gate.passed else "Gate: not passed"


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    lines: list[list[str]] = []
    for name, item in sorted(value.items()):
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{name}.")
        else:
            lines.append([prefix + name, "-" if item is None else str(item)])
    return lines


def _markdown(tables: Sequence[Table], origin: Table, gate: Gate, summary: Summary, examples: Sequence[Example]) -> str:
    curves = [f"![{curve_title(name)}]({file})" for name, file in CURVE_FILES.items() if name in summary.curves]
    clips = [f"[{e.caption}](videos/{e.key}.mp4) (`{e.key}`)\n\n![frames](strips/{e.key}.png)" for e in examples]
    parts = [
        "# Evaluation",
        f"**{_verdict(gate)}**",
        _bullets(gate.reasons),
        gate_table(gate).markdown() if gate.rules else "",
        "## How to read it",
        _bullets(_guide(summary)),
    ]
    for table in tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += ["## Curves", *curves, "## Clips", *clips, "## What was measured", _bullets(summary.notes)]
    parts += ["## Provenance", origin.markdown()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _page(
    tables: Mapping[str, Table],
    origin: Table,
    gate: Gate,
    summary: Summary,
    examples: Sequence[Example],
    files: Mapping[str, bytes],
) -> str:
    """Returns one file that opens anywhere: it contains every picture and video and loads nothing.

    The methods' clips are one video, so that they stay in step.
    """
    return render(
        "evaluation.html",
        gate=gate,
        verdict=_verdict(gate),
        rules=gate_table(gate) if gate.rules else None,
        guide=_guide(summary),
        clips=[
            {
                "caption": example.caption,
                "video": data_url(files[f"videos/{example.key}.mp4"], "video/mp4"),
                "strip": data_url(files[f"strips/{example.key}.png"], "image/png"),
            }
            for example in examples
        ],
        tables=[(table, name not in FOLDED) for name, table in tables.items()],
        curves=[
            {"title": curve_title(name), "address": data_url(files[file], "image/png")}
            for name, file in CURVE_FILES.items()
            if file in files
        ],
        notes=summary.notes,
        provenance=origin,
    )
