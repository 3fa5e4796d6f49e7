"""Writes the page of a data set: rows by outcome with examples, what its videos are, scores, and decoded latents."""

from __future__ import annotations

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
from tasks.pages import ACCENT, BLUE, INK, PAPER, data_url, render
from tasks.records import Failure
from tasks.shards import ShardDataset, report_addresses
from trip_model.folders import resolve_base

SHEET_CLIPS, SHEET_FRAMES = 6, 4


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
    frame_sizes = Counter(numbers.get("frame_sizes", {}))
    return render(
        "data_set.html",
        source=str(numbers.get("source", "")) or "a source",
        numbers=numbers,
        megabytes=rates["size_bytes"] / 1e6,
        outcomes=_outcomes(numbers, failures),
        census=census,
        histograms=[_histogram(title, values) for title, values in census.values.items()],
        videos=[
            *([("frame size of the samples", _shares(frame_sizes, numbers["samples"]))] if frame_sizes else []),
            *((title, _shares(counts, census.samples)) for title, counts in census.videos.items()),
        ],
        sheet=data_url(sheet, "image/png"),
        facts=[
            (name, ", ".join(value) if isinstance(value, list | tuple) else value)
            for name, value in (numbers | rates).items()
            if name not in ("failed", "page", "source", "frame_sizes")
        ],
    )


def _outcomes(numbers: dict[str, Any], failures: dict[str, list[Failure]]) -> list[dict[str, Any]]:
    """Returns all outcomes with their counts, shares and examples, most frequent first."""
    counts = {"encoded": numbers["encoded"], **numbers["failed"]}
    return [
        _bar(name, count, numbers["rows"], BLUE if name == "encoded" else ACCENT)
        | {"examples": [f"row {f.row}, {f.key}: {f.detail[:200]}" for f in failures.get(name, ())]}
        for name, count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _shares(counts: Counter[str], total: int, most: int = 8) -> list[dict[str, Any]]:
    """Returns the most frequent values and their shares of `total`."""
    frequent = counts.most_common(most)
    others = sum(counts.values()) - sum(count for _, count in frequent)
    shown = [*frequent, *([(f"{len(counts) - most} others", others)] if others else [])]
    return [_bar(name, count, total, BLUE) for name, count in shown]


def _bar(label: str, count: int, total: int, colour: str) -> dict[str, Any]:
    return {"label": label, "count": count, "share": count / max(total, 1), "colour": colour, "examples": []}


def _histogram(title: str, values: list[float], bins: int = 24) -> dict[str, Any]:
    """Returns the bars of a histogram in a box of 300 by 90, its range, median and number of values."""
    low, high = min(values), max(values)
    counts = np.histogram(values, bins, (low, high if high > low else low + 1))[0]
    shares = (90 * counts / counts.max()).tolist()
    width = 300 / bins
    return {
        "title": title,
        "bars": [
            {"x": f"{i * width:.1f}", "y": f"{90 - h:.1f}", "width": f"{width - 1:.1f}", "height": f"{h:.1f}"}
            for i, h in enumerate(shares)
        ],
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "median": f"{float(np.median(values)):.4g}",
        "count": len(values),
    }


if __name__ == "__main__":
    write_report(*json.load(sys.stdin))
