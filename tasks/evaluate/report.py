"""What a person reads: tables beside the paper's figures, the consistency curve (Figure 4), a contact sheet, videos."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tasks.evaluate.gate import Gate
from tasks.evaluate.judges import NOT_COMPARABLE, JudgeName
from tasks.evaluate.presets import AS_PUBLISHED, PublishedRow
from tasks.evaluate.protocols import Protocol
from tasks.evaluate.score import NO_DISTANCE, Summary
from tasks.evaluate.statistics import Estimate
from trip_model.video import video_bytes

SHEET_CLIPS, SHEET_FRAMES = 6, 8
INK, PAPER, ACCENT = "#1c1c1e", "#ffffff", "#c2410c"
REPORT_STYLE = (
    f"body{{font:16px/1.5 system-ui,sans-serif;color:{INK};max-width:1200px;margin:2rem auto;padding:0 1rem}}"
    "table{border-collapse:collapse;font-size:14px}th,td{padding:.4rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:left;vertical-align:top}.wide{overflow-x:auto}img{max-width:100%}"
    ".videos{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;max-width:400px}video{max-width:100%}"
    f".gate{{font-weight:600;color:{ACCENT}}}"
)
COLOURS = {"frozen": "#8e8e93", "trip": ACCENT, "real": "#1d4ed8"}
OTHER_COLOURS = ("#0f766e", "#7c3aed", "#a16207", "#be185d")
LABELS = {"frozen": "Frozen first frame", "trip": "TRIP (this run)", "real": "Real video", "champion": "Champion"}


@dataclass(frozen=True)
class Example:
    """One clip to look at: real and generated uint8 [F, H, W, 3], the latter as the user gets it; others' by row."""

    key: str
    caption: str
    real: NDArray[np.uint8]
    generated: NDArray[np.uint8]
    others: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def number(estimate: Estimate | None, digits: str) -> str:
    """`0.931 (0.874 to 0.990)`, or a dash for what a row does not have."""
    if estimate is None:
        return "-"
    text = format(estimate.value, digits)
    if estimate.ci_low is None or estimate.ci_high is None:
        return text
    return f"{text} ({format(estimate.ci_low, digits)} to {format(estimate.ci_high, digits)})"


def label(row: str) -> str:
    """How a row is called in a table: another method by its own name."""
    return LABELS.get(row, row)


def consistency_judge(judges: Sequence[JudgeName]) -> JudgeName:
    """The one whose embeddings frame consistency is of."""
    return next(judge for judge in judges if judge.features[0] == "clip_frames")


def own_table(summary: Summary, judges: Sequence[JudgeName]) -> Table:
    """This run and the other methods between the two reference rows."""
    judge = consistency_judge(judges)
    remark = "" if judge.official else f", {NOT_COMPARABLE}"
    columns = [
        ("motion_ratio", "Motion ratio to real (1 is best)", ".3f"),
        ("clip_distance", "Distance to the true clip (lower)", ".4f"),
        ("clip_distance_minus_frozen", "Distance minus that of frozen (below 0)", "+.4f"),
        (f"{judge.metric}/4", f"{judge.metric}, 4 frames{remark}", ".2f"),
        (f"{judge.metric}/all", f"{judge.metric}, all frames{remark}", ".2f"),
        ("first_frame_psnr_db", "First-frame PSNR, dB (higher)", ".2f"),
        ("first_frame_ssim", "First-frame SSIM (higher)", ".4f"),
        ("flicker_ratio", "Flicker ratio to real (1 is best)", ".3f"),
        ("smoothness_ratio", "Smoothness ratio to real (1 is best)", ".3f"),
    ]
    columns += [
        (name, name, ".3f") for name in summary.metrics["trip"] if name.startswith(("text_alignment", "flow_ratio"))
    ]
    rows = [
        [label(row), *(number(summary.metrics[row].get(name), digits) for name, _, digits in columns)]
        for row in summary.rows
    ]
    return Table("This run", ["Row", *(title for _, title, _ in columns)], rows)


def distance_table(summary: Summary, judges: Sequence[JudgeName]) -> Table:
    """Distances of each row's clips to the real ones, under every judge of sets of clips."""
    of_sets = [judge for judge in judges if judge.features[0] not in NO_DISTANCE]
    official = {name: judge.official for judge in of_sets for name in (judge.metric, judge.kernel_metric)}
    official |= {f"{judge.metric}/with_given_frame": judge.official for judge in of_sets}
    names = [name for name in summary.metrics["trip"] if name in official]
    rows = []
    for row in summary.rows:
        cells = [number(summary.metrics[row].get(name), ".3g") for name in names]
        floor = " (floor: half to half)" if row == "real" else ""
        rows.append([label(row), *(cell + floor if cell != "-" else cell for cell in cells)])
    titles = [f"{name} (lower){'' if official[name] else f', {NOT_COMPARABLE}'}" for name in names]
    return Table("Distances to the real clips", ["Row", *titles], rows)


def paper_table(summary: Summary, judges: Sequence[JudgeName], protocol: Protocol) -> Table:
    """The same rows in the columns of the published table, above its rows; what stands in for a metric says so."""
    published = [row for row in protocol.published if row.table != 4]  # that one is the human study
    metrics = list(dict.fromkeys(name for row in published for name in row.values))
    judge = consistency_judge(judges)
    by_name = {judge.metric: judge for judge in judges}

    def cell(row: str, metric: str) -> str:
        found = summary.metrics[row]
        if metric.startswith("F-Consistency"):
            remark = "" if judge.official else f" [{judge.metric}, {NOT_COMPARABLE}]"
            return number(found[metric.replace("F-Consistency", judge.metric)], ".2f") + remark
        if metric in by_name:
            return number(found.get(metric), ".3g")
        kind = "rfd-motion" if metric == "FVD" else "rfd-app"
        name = next((name for name in found if name.startswith(kind)), None)
        return f"{number(found[name], '.3g')} [{name}, {NOT_COMPARABLE}]" if name else "-"

    rows = [
        [label(row), *(cell(row, metric) for metric in metrics), f"this run, {summary.clips} clips"]
        for row in summary.rows
    ]
    for row in published:
        method = f"{row.method} ({row.kind})" if row.kind else row.method
        values = [_published(row, metric) for metric in metrics]
        rows.append([method, *values, f"Table {row.table}, {AS_PUBLISHED}"])
    header = [f"{name.replace('/', '_')} ({'higher' if 'Consistency' in name else 'lower'})" for name in metrics]
    return Table("Beside the paper", ["Approach", *header, "Source"], rows)


def _published(row: PublishedRow, metric: str) -> str:
    value = row.values.get(metric)
    return "-" if value is None else f"{value:.2f}" if "Consistency" in metric else f"{value:g}"


def per_clip_csv(summary: Summary) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(summary.per_clip[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary.per_clip)
    return buffer.getvalue().encode()


def curve_png(summary: Summary, judges: Sequence[JudgeName]) -> bytes:
    """Frame consistency by number of frames, as in Figure 4, with the interval as a band."""
    from matplotlib.figure import Figure

    judge, curves = consistency_judge(judges), summary.curves["consecutive"]
    others = dict(zip([row for row in summary.rows if row not in COLOURS], OTHER_COLOURS * 9, strict=False))
    figure = Figure(figsize=(7.2, 4.4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for row in summary.rows:
        points, colour = curves[row], (COLOURS | others)[row]
        frames = np.arange(2, len(points) + 2)
        style = "--" if row == "frozen" else "-"
        axes.plot(frames, [p.value for p in points], style, color=colour, lw=2, label=label(row))
        low = [p.value if p.ci_low is None else p.ci_low for p in points]
        high = [p.value if p.ci_high is None else p.ci_high for p in points]
        axes.fill_between(frames, low, high, color=colour, alpha=0.15, lw=0)
    remark = "" if judge.official else f"\n{NOT_COMPARABLE}"
    axes.set(xlabel="number of frames", ylabel=f"{judge.metric} (%)")
    axes.set_title(f"Frame consistency, {summary.clips} clips{remark}", fontsize=11)
    axes.set_xticks(range(2, len(curves["real"]) + 2, 2))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _scale(size: int) -> int:
    """Whole steps of enlargement, so that small demo frames are seen pixel by pixel and large ones stay as they are."""
    return max(1, round(192 / size))


def _enlarge(frame: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def contact_sheet_png(examples: Sequence[Example]) -> bytes:
    """Held-out clips under their captions: a row each of real, TRIP and frozen frames, evenly spread over the clip."""
    count, height, width = examples[0].real.shape[:3]
    scale, gap, name_width, head = _scale(min(height, width)), 4, 92, 40
    picked = np.unique(np.linspace(0, count - 1, min(SHEET_FRAMES, count)).round().astype(int))
    cell_w, cell_h = width * scale + gap, height * scale + gap
    block = head + 22 + 3 * cell_h + 14
    sheet = Image.new("RGB", (name_width + len(picked) * cell_w + gap, len(examples) * block + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(24), ImageFont.load_default(16)
    for number_, example in enumerate(examples):
        top = number_ * block
        draw.text((gap + 2, top + 8), _fitted(draw, example.caption, large, sheet.width - 12), INK, font=large)
        frozen = np.repeat(example.real[:1], count, axis=0)
        for column, frame in enumerate(picked):
            draw.text((name_width + column * cell_w, top + head), f"frame {frame + 1}", INK, font=small)
        rows = (("real", example.real), ("trip", example.generated), ("frozen", frozen))
        for line, (row, pixels) in enumerate(rows):
            y = top + head + 22 + line * cell_h
            name = {"real": "real", "trip": "TRIP", "frozen": "frozen"}[row]
            draw.text((gap + 2, y + cell_h // 2 - 14), name, COLOURS[row], font=large)
            for column, frame in enumerate(picked):
                picture = Image.fromarray(_enlarge(pixels[frame], scale))
                sheet.paste(picture, (name_width + column * cell_w, y))
    return _png(sheet)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def side_by_side(example: Example) -> NDArray[np.uint8]:
    """Real left, TRIP right, with a strip of names above: uint8 [F, H, W, 3], H and W multiples of 32.

    A codec works in blocks; other sizes it pads, and the padding bleeds into the picture's edge.
    """
    scale = _scale(min(example.real.shape[1:3]))
    height, width = (side * scale for side in example.real.shape[1:3])
    strip = 28 + (-(height + 28)) % 32
    gap = 8 + (-(2 * width + 8)) % 32
    title = Image.new("RGB", (2 * width + gap, strip), PAPER)
    draw = ImageDraw.Draw(title)
    for left, row, name in ((0, "real", "real"), (width + gap, "trip", "TRIP")):
        draw.text((left + 6, 3), name, COLOURS[row], font=ImageFont.load_default(18))
    frames = []
    for real, generated in zip(example.real, example.generated, strict=True):
        left, right = _enlarge(real, scale), _enlarge(generated, scale)
        middle = np.full((left.shape[0], gap, 3), 255, np.uint8)
        frames.append(np.concatenate([np.asarray(title), np.concatenate([left, middle, right], axis=1)]))
    return np.stack(frames)


def build(
    summary: Summary,
    gate: Gate,
    judges: Sequence[JudgeName],
    protocol: Protocol,
    examples: Sequence[Example],
    provenance: dict[str, Any],
) -> dict[str, bytes]:
    """All files for people, by their name in the report's folder; equal inputs give equal bytes, H.264 excepted."""
    files = {"per_clip.csv": per_clip_csv(summary), "consistency.png": curve_png(summary, judges)}
    files["contact_sheet.png"] = contact_sheet_png(examples[:SHEET_CLIPS])
    for index, example in enumerate(examples):
        pixels = side_by_side(example)
        files[f"videos/{example.key}.mp4"] = video_bytes(pixels, protocol.fps, "mp4")
        if index == 0:
            files[f"videos/{example.key}.gif"] = video_bytes(pixels, protocol.fps, "gif")
    tables = [
        own_table(summary, judges),
        distance_table(summary, judges),
        paper_table(summary, judges, protocol),
    ]
    verdict = "passed" if gate.passed else "not passed"
    files["report.md"] = _markdown(tables, verdict, gate, summary, examples, provenance).encode()
    files["report.html"] = _page(tables, verdict, gate, summary, examples, provenance, files).encode()
    return files


def _markdown(
    tables: list[Table],
    verdict: str,
    gate: Gate,
    summary: Summary,
    examples: Sequence[Example],
    provenance: dict[str, Any],
) -> str:
    parts = ["# Evaluation", f"Gate: **{verdict}**", "\n".join(f"- {reason}" for reason in gate.reasons)]
    for table in tables:
        parts += [f"## {table.title}", table.markdown()]
    parts += ["## How to read it", "\n".join(f"- {note}" for note in summary.notes)]
    parts += ["## Pictures", "![frame consistency](consistency.png)", "![contact sheet](contact_sheet.png)"]
    parts.append("\n".join(f"- [{e.caption}](videos/{e.key}.mp4) (`{e.key}`)" for e in examples))
    parts += ["## Provenance", Table("", ["what", "value"], _flat(provenance)).markdown()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _flat(value: dict[str, Any], prefix: str = "") -> list[list[str]]:
    lines: list[list[str]] = []
    for name, item in sorted(value.items()):
        if isinstance(item, dict):
            lines += _flat(item, f"{prefix}{name}.")
        else:
            lines.append([prefix + name, "-" if item is None else str(item)])
    return lines


def _data(files: dict[str, bytes], name: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(files[name]).decode()}"


def _page(
    tables: list[Table],
    verdict: str,
    gate: Gate,
    summary: Summary,
    examples: Sequence[Example],
    provenance: dict[str, Any],
    files: dict[str, bytes],
) -> str:
    """One file that opens anywhere: every picture and video lies inside it, nothing is fetched."""
    videos = "".join(
        f'<figure><video src="{_data(files, f"videos/{e.key}.mp4", "video/mp4")}" autoplay loop muted '
        f"playsinline></video><figcaption>{html.escape(e.caption)}</figcaption></figure>"
        for e in examples
    )
    own = "".join(f"<h2>{html.escape(t.title)}</h2><div class=wide>{t.html()}</div>" for t in tables)
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in gate.reasons)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in summary.notes)
    origin = Table("", ["what", "value"], _flat(provenance)).html()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>TRIP evaluation</title>'
        f"<style>{REPORT_STYLE}</style><h1>Evaluation</h1><p class=gate>Gate: {verdict}</p><ul>{reasons}</ul>"
        f"<h2>Held-out clips: real left, TRIP right</h2><div class=videos>{videos}</div>{own}"
        f'<h2>Frame consistency</h2><img alt="frame consistency by number of frames" '
        f'src="{_data(files, "consistency.png", "image/png")}">'
        f'<h2>Frames</h2><img alt="contact sheet" src="{_data(files, "contact_sheet.png", "image/png")}">'
        f"<h2>How to read it</h2><ul>{notes}</ul><h2>Provenance</h2>{origin}</html>\n"
    )
