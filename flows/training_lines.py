"""What a training prints: a short line per tick, and a small table per validation. Files and MLflow get all numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VALIDATION = "validation_"


def tick_counts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a tick for `flows.console.tick_line`."""
    rates = "/".join(f"{values[name]:.2g}" for name in ("lr_unet", "lr_fusion") if name in values)
    counts = {
        "stage": "train",
        "done": values["step"],
        "total": values["steps"],
        "eta_seconds": values["seconds_left"],
        "loss": values["loss"],
        "grad": values["grad_norm"],
        "lr": rates,
        "clips/s": values["samples_per_second"],
    }
    if values["samples_per_second_device"] != values["samples_per_second"]:
        counts["of a device"] = values["samples_per_second_device"]
    counts["mfu"] = f"{values['mfu']:.0%}"
    counts["wait"] = f"{values['data_wait']:.1%}"
    counts["GB"] = values["peak_memory_gb"]
    return counts | ({"damaged": values["damaged"]} if "damaged" in values else {})


def tick_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a tick for `infra.metrics`, each under its own name, which dashboard and alerts use."""
    return {name: value for name, value in values.items() if name not in ("step", "steps", "seconds_left")}


def validation_table(values: Mapping[str, Any]) -> list[str]:
    """The lines of a validation: losses by band of time steps and by frame; empty if the tick has none."""
    if f"{VALIDATION}loss" not in values:
        return []
    title = f"validate    step {values['step']}  loss {values[f'{VALIDATION}loss']:.4g}"
    motion = values.get(f"{VALIDATION}motion_ratio")
    lines = [title + (f"  motion ratio {motion:.3g}" if motion is not None else "")]
    for first, names in (
        ("time steps", {"loss": f"{VALIDATION}loss/t_", "error of z_0": f"{VALIDATION}z0_error/t_"}),
        ("frame", {"loss": f"{VALIDATION}loss/frame_"}),
    ):
        rows: list[list[str]] = []
        for name, prefix in names.items():
            columns = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            if not rows:
                rows.append([first, *("-".join(str(int(part)) for part in column.split("_")) for column in columns)])
            rows.append([name, *(f"{value:.3g}" for value in columns.values())])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [f"{row[0]:<12}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
            lines.append(" " * 12 + "  ".join(cells))
    return lines
