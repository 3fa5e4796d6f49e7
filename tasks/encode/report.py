"""Writes the page of a data set: rows by outcome with examples, what its videos are, scores, and decoded latents."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infra import storage
from infra.redaction import redact
from tasks.encode.census import Census, failure_examples, take_census
from tasks.records import Failure
from tasks.shards import ShardDataset, report_addresses
from trip_model.folders import resolve_base

SHEET_CLIPS, SHEET_FRAMES = 6, 4
INK, PAPER, ACCENT = "#1c1c1e", "#ffffff", "#c2410c"
_STYLE = f"""
body{{font:16px/1.5 system-ui,sans-serif;color:{INK};background:{PAPER};max-width:1000px;
margin:1rem auto;padding:0 1rem}}
h1{{font-size:1.6rem;overflow-wrap:anywhere}}h2{{font-size:1.2rem;margin-top:2rem}}h3{{font-size:1rem;margin:0 0 .3rem}}
table{{border-collapse:collapse;width:100%}}td,th{{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:left;
vertical-align:top;overflow-wrap:anywhere}}td.n{{text-align:right;white-space:nowrap;overflow-wrap:normal}}
td.bar{{width:30%}}td.bar div{{height:.9rem;margin-top:.3rem;min-width:2px}}
small{{color:#555;overflow-wrap:anywhere}}img,svg{{max-width:100%;height:auto}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.2rem}}
@media(max-width:480px){{td,th{{padding:.25rem}}td.bar{{width:22%}}}}
@media print{{body{{margin:0;max-width:none;font-size:11pt}}section,figure,tr{{break-inside:avoid}}
*{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}}}
figure{{margin:0}}figcaption{{font-size:.85rem;color:#555}}
"""


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
    dataset = ShardDataset(numbers["dataset"])
    sheet, census = _contact_sheet_png(dataset, base), take_census(dataset, base)
    page = _page(shown, rates, sheet, census, failure_examples(dataset))
    storage.write_bytes(addresses["html"], page.encode())
    rates |= {"samples_read": census.samples, "captions_cut": census.captions_cut}
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


def _page(
    numbers: dict[str, Any],
    rates: dict[str, Any],
    sheet: bytes,
    census: Census,
    failures: dict[str, list[Failure]],
) -> str:
    """Returns a self-contained page: it embeds its figures and loads nothing."""
    name = html.escape(str(numbers.get("source", "")) or "a source")
    facts = {name: value for name, value in (numbers | rates).items() if name not in ("failed", "page", "source")}
    rows = "".join(f"<tr><th>{html.escape(key)}<td>{html.escape(str(value))}" for key, value in facts.items())
    cut = f"{census.captions_cut:,} of {census.samples:,} captions have more than {census.token_limit} tokens"
    groups = "".join(
        f"<section><h3>{html.escape(title)}</h3>{_bars(counts, census.samples)}</section>"
        for title, counts in census.videos.items()
    )
    figures = "".join(_histogram(title, values) for title, values in census.values.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}: data set</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style>'
        f"<h1>{name}: data set</h1>"
        f"<p>{numbers['encoded']:,} of {numbers['rows']:,} rows are encoded, {numbers['samples']:,} samples in "
        f"{numbers['shards']:,} shards, {rates['size_bytes'] / 1e6:,.1f} MB.</p>"
        f"<h2>Rows by outcome</h2>{_outcomes(numbers, failures)}"
        f"<h2>Captions</h2><p>{cut}; the text encoder reads the beginning of those.</p>"
        f"<h2>Distributions</h2><div class=grid>{figures}</div>"
        f"<h2>Videos</h2><p>Of {census.samples:,} samples at equal distances.</p><div class=grid>{groups}</div>"
        f"<h2>Stored latents, decoded</h2><figure>{_image(sheet, 'contact sheet')}"
        f"<figcaption>Left: the stored frame 1; then frames decoded from the latents.</figcaption></figure>"
        f"<h2>The run</h2><table>{rows}</table></html>\n"
    )


def _outcomes(numbers: dict[str, Any], failures: dict[str, list[Failure]]) -> str:
    """Returns a table of all outcomes with their counts, shares and examples, most frequent first."""
    lines = []
    for name, count in sorted({"encoded": numbers["encoded"], **numbers["failed"]}.items(), key=lambda item: -item[1]):
        share, colour = count / max(numbers["rows"], 1), "#1d4ed8" if name == "encoded" else ACCENT
        examples = "".join(
            f"<br><small>row {failure.row}, {html.escape(failure.key)}: {html.escape(failure.detail[:200])}</small>"
            for failure in failures.get(name, ())
        )
        lines.append(_bar_row(f"{html.escape(name)}{examples}", count, share, colour))
    return f"<table>{''.join(lines)}</table>"


def _bars(counts: Counter[str], total: int, most: int = 8) -> str:
    """Returns a table of the most frequent values and their shares of `total`."""
    frequent = counts.most_common(most)
    others = sum(counts.values()) - sum(count for _, count in frequent)
    shown = [*frequent, *([(f"{len(counts) - most} others", others)] if others else [])]
    rows = (_bar_row(html.escape(name), count, count / max(total, 1), "#1d4ed8") for name, count in shown)
    return f"<table>{''.join(rows)}</table>"


def _bar_row(label: str, count: int, share: float, colour: str) -> str:
    return (
        f"<tr><td>{label}<td class=n>{count:,}<td class=n>{share:.1%}"
        f'<td class=bar><div style="width:{100 * share:.1f}%;background:{colour}"></div>'
    )


def _histogram(title: str, values: list[float], bins: int = 24) -> str:
    """Returns a histogram as SVG with its range, median and number of values."""
    low, high = min(values), max(values)
    counts = np.histogram(values, bins, (low, high if high > low else low + 1))[0]
    width, height = 300 / bins, 90
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{height * (1 - n / counts.max()):.1f}" width="{width - 1:.1f}" '
        f'height="{height * n / counts.max():.1f}" fill="#1d4ed8"/>'
        for i, n in enumerate(counts.tolist())
    )
    name = html.escape(title)
    return (
        f'<figure><h3>{name}</h3><svg viewBox="0 0 300 108" width="300" role="img" aria-label="histogram of {name}">'
        f'{bars}<line x1="0" x2="300" y1="{height}" y2="{height}" stroke="{INK}"/>'
        f'<g font-size="12" fill="{INK}"><text x="0" y="104">{low:.4g}</text>'
        f'<text x="300" y="104" text-anchor="end">{high:.4g}</text></g></svg>'
        f"<figcaption>median {float(np.median(values)):.4g}, {len(values):,} values</figcaption></figure>"
    )


def _image(png: bytes, about: str) -> str:
    return f'<img alt="{about}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


if __name__ == "__main__":
    write_report(*json.load(sys.stdin))
