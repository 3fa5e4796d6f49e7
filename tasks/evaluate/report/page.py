"""What a person reads: one page with clips, tables, curves and the gate's verdict, and the same as files to take on."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.evaluate.gate import Gate
from tasks.evaluate.protocol.protocol import Protocol
from tasks.evaluate.report.aggregate import Summary
from tasks.evaluate.report.figures import (
    ACCENT,
    CURVE_FILES,
    INK,
    Example,
    curve_png,
    curve_title,
    side_by_side,
    strip_png,
)
from tasks.evaluate.report.tables import Table, all_tables, gate_table
from tasks.evaluate.systems import BASE, CLOSED_FORM
from tasks.metrics.extractors.extractor import ExtractorInfo
from trip_model.images import video_bytes

REPORT_STYLE = (
    f"body{{font:16px/1.5 system-ui,sans-serif;color:{INK};max-width:1200px;margin:2rem auto;padding:0 1rem}}"
    "table{border-collapse:collapse;font-size:14px}th,td{padding:.4rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:left;vertical-align:top}td:first-child,th:first-child{position:sticky;left:0;background:#fff;"
    "min-width:8rem;max-width:11rem;overflow-wrap:anywhere}small{color:#6b6b70}.wide{overflow-x:auto}img,video{max-width:100%}"
    ".clips{display:grid;gap:1.5rem 1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}"
    ".strips{grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}figure{margin:0}"
    "summary{font-size:1.3em;font-weight:600;margin:1rem 0;cursor:pointer}"
    f".gate{{font-weight:600;color:{ACCENT}}}.passed{{color:#15803d}}"
)
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
    files["per_clip.npz"] = per_clip_npz(summary)
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
    files["report.html"] = _page(tables, origin, gate, summary, examples, files).encode()
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
    """One file that opens anywhere: every picture and video lies inside it, nothing is fetched.

    The methods' clips stand in one video, so no browser can let them drift apart.
    """

    def data(name: str, kind: str) -> str:
        return f"data:{kind};base64,{base64.b64encode(files[name]).decode()}"

    def items(lines: Sequence[str]) -> str:
        return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""

    def picture(name: str, title: str) -> str:
        return f'<figure><img loading="lazy" alt="{html.escape(title)}" src="{data(name, "image/png")}"></figure>'

    def section(table: Table, opened: bool) -> str:
        state = " open" if opened else ""
        title = f"<summary>{html.escape(table.title)}</summary>"
        return f"<details{state}>{title}<div class=wide>{table.html()}</div></details>"

    videos = "".join(
        f'<figure><video src="{data(f"videos/{e.key}.mp4", "video/mp4")}" autoplay loop muted playsinline '
        f"controls></video><figcaption>{html.escape(e.caption)}</figcaption></figure>"
        for e in examples
    )
    curves = "".join(
        picture(file, f"{curve_title(name)} of all rows") for name, file in CURVE_FILES.items() if file in files
    )
    strips = "".join(picture(f"strips/{e.key}.png", f"four frames each: {e.caption}") for e in examples)
    rules = f"<div class=wide>{gate_table(gate).html()}</div>" if gate.rules else ""
    sections = "".join(section(table, name not in FOLDED) for name, table in tables.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>TRIP evaluation</title>'
        f'<style>{REPORT_STYLE}</style><h1>Evaluation</h1><p class="gate{" passed" if gate.passed else ""}">'
        f"{_verdict(gate)}</p>{items(gate.reasons)}"
        f"{rules}<h2>How to read it</h2>{items(_guide(summary))}"
        f"<h2>Clips, all methods in step</h2><div class=clips>{videos}</div>{sections}"
        f'<h2>Curves</h2><div class="clips strips">{curves}</div>'
        f'<h2>Frames</h2><div class="clips strips">{strips}</div>'
        f"<h2>What was measured</h2>{items(summary.notes)}{section(origin, False)}</html>\n"
    )
