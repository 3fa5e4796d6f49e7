"""Writes the report of a prepare run: counts by reason as a chart, rates, and decoded latents."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infra import storage
from infra.redaction import redact
from tasks.shards import ShardDataset, report_addresses
from trip_model.folders import resolve_base

SHEET_CLIPS, SHEET_FRAMES = 6, 4
INK, PAPER, ACCENT = "#1c1c1e", "#ffffff", "#c2410c"
_STYLE = (
    f"body{{font:16px/1.5 system-ui,sans-serif;color:{INK};max-width:1000px;margin:2rem auto;padding:0 1rem}}"
    "td{padding:.3rem .7rem;border-bottom:1px solid #ddd}img{max-width:100%}"
)


def write_report(numbers: dict[str, Any], base: str, size_bytes: int, rows_made: int) -> None:
    """Writes `<data set>.report.json` and `.report.html`, unless they exist and match this data set.

    Args:
        numbers: the stage's report.
        base: the folder or hub name of the base with the VAE.
        size_bytes: of all shards.
        rows_made: the rows that this run processed.
    """
    if _is_written(numbers):
        return
    addresses = report_addresses(numbers["dataset"])
    rates = {
        "encoded_share": round(numbers["encoded"] / numbers["rows"], 4),
        "rows_made": rows_made,
        "rows_per_second": round(rows_made / max(numbers["seconds"], 1e-9), 3),
        "size_bytes": size_bytes,
    }
    shown = numbers | {name: redact(numbers[name]) for name in ("dataset", "page")}
    sheet = _contact_sheet_png(ShardDataset(numbers["dataset"]), base)
    storage.write_bytes(addresses["html"], _page(shown, rates, sheet).encode())
    storage.write_json(addresses["json"], shown | rates)  # last: it marks the report as complete


def write_report_apart(numbers: dict[str, Any], base: str, size_bytes: int, rows_made: int) -> None:
    """Calls `write_report` in its own process: the VAE and its libraries would take 0.3 GB of the driver's memory.

    Raises:
        OSError: the process failed; the text is its last line on stderr.
    """
    if _is_written(numbers):
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = json.dumps([numbers, base, size_bytes, rows_made])
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=arguments, env=environment, text=True, stderr=subprocess.PIPE
    )
    if done.returncode != 0:
        raise OSError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])


def _is_written(numbers: dict[str, Any]) -> bool:
    try:
        existing = storage.read_json(report_addresses(numbers["dataset"])["json"])
        return existing["manifest_sha"] == numbers["manifest_sha"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _contact_sheet_png(dataset: ShardDataset, base: str) -> bytes:
    """Shows the first clip of every Nth shard: the stored frame 1, then frames decoded from the stored latents."""
    counts = [shard.samples for shard in dataset.published.shards]
    firsts = [sum(counts[:shard]) for shard, count in enumerate(counts) if count]
    picked = firsts[:: -(-len(firsts) // SHEET_CLIPS)]
    import torch  # only where the page is not written yet

    from trip_model.encoders import decode_latents, load_vae

    vae: Any = load_vae(resolve_base(base))
    label, gap = 24, 4
    lines = []
    for index in picked:
        sample = dataset.read(index, ("first", "latents", "caption"))
        frames = np.unique(np.linspace(0, len(sample["latents"]) - 1, SHEET_FRAMES).round().astype(int))
        final = sample["latents"][frames].astype(np.float32) * vae.config.scaling_factor
        lines.append((sample["caption"], [sample["first"], *decode_latents(vae, torch.from_numpy(final))]))
    scale = max(1, round(160 / lines[0][1][0].shape[0]))
    side = lines[0][1][0].shape[0] * scale + gap
    sheet = Image.new("RGB", ((SHEET_FRAMES + 1) * side + gap, len(lines) * (side + label) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (caption, pictures) in enumerate(lines):
        top = row * (side + label) + gap
        draw.text((gap, top), caption[:90], INK, font=ImageFont.load_default(14))
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))
            sheet.paste(picture, (column * side + gap, top + label))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _chart_png(counts: dict[str, int]) -> bytes:
    """Charts rows by outcome, most frequent first; the axis is logarithmic so that rare reasons are visible."""
    from matplotlib.figure import Figure

    names = sorted(counts, key=lambda name: counts[name])
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(names)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colours = [ACCENT if name != "encoded" else "#1d4ed8" for name in names]
    bars = axes.barh(names, [counts[name] for name in names], color=colours)
    axes.bar_label(bars, [f"{counts[name]:,}" for name in names], padding=3)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("rows (logarithmic)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _page(numbers: dict[str, Any], rates: dict[str, Any], sheet: bytes) -> str:
    """Returns a self-contained page: it embeds both figures and loads nothing."""
    failed = {f"failed: {reason}": count for reason, count in numbers["failed"].items()}
    cells = {name: value for name, value in (numbers | failed | rates).items() if name not in ("failed", "page")}
    rows = "".join(f"<tr><td>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in cells.items())
    chart = _chart_png({"encoded": numbers["encoded"], **numbers["failed"]})
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data set</title><style>{_STYLE}</style>'
        f"<h1>Data set</h1><table>{rows}</table><h2>Rows by outcome</h2>{_image(chart, 'rows by reason')}"
        f"<h2>Stored latents, decoded</h2><p>Left: the stored frame 1; then frames decoded from the latents.</p>"
        f"{_image(sheet, 'contact sheet')}</html>\n"
    )


def _image(png: bytes, about: str) -> str:
    return f'<img alt="{about}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


if __name__ == "__main__":
    write_report(*json.load(sys.stdin))
