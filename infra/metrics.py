"""Prometheus metrics of the stages: a file for each stage, which an HTTP endpoint of the machine shows.

A stage runs in a process that ends, so nobody could read metrics from it: it writes `STAGE.prom` into the folder that
TRIP_METRICS_FOLDER names, in Prometheus' text format. node_exporter's textfile collector and `infra.metrics_server`
read such files. Two runs of the same stage on one machine write the same file; the later one is shown.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "TRIP_METRICS_FOLDER"
_NOT_IN_NAMES = re.compile(r"[^a-z0-9_]+")


def record(stage: str, values: Mapping[str, Any], by_reason: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Writes the metrics of a stage; does nothing where TRIP_METRICS_FOLDER is not set.

    Metrics of earlier calls stay. An unwritable folder is no error of the stage.

    Args:
        stage: the first part of every name: `trip_<stage>_<name>`.
        values: numbers by name; others than numbers are left out.
        by_reason: numbers by name and reason.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    path = Path(folder) / f"{stage}.json"
    kept = _read(path)
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    kept["values"] |= numbers | {"updated_timestamp_seconds": time.time()}
    kept["reasons"] |= {name: dict(reasons) for name, reasons in (by_reason or {}).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, text in ((path, json.dumps(kept)), (path.with_suffix(".prom"), _text(stage, kept))):
            fresh = target.with_name(f".{target.name}.{os.getpid()}")
            fresh.write_text(text)
            os.replace(fresh, target)
    except OSError:
        return


def record_progress(counts: Mapping[str, Any]) -> None:
    """Writes the counts that a running stage reports; the last ones also write when the stage was complete."""
    values = {name: value for name, value in counts.items() if name != "stage"}
    if counts.get("done") is not None and counts.get("done") == counts.get("total"):
        values["complete_timestamp_seconds"] = time.time()
    record(counts["stage"], values)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {"values": {}, "reasons": {}}


def _text(stage: str, kept: Mapping[str, Mapping[str, Any]]) -> str:
    from prometheus_client import CollectorRegistry, Gauge, generate_latest  # every command imports this module

    registry = CollectorRegistry()
    for name, value in kept["values"].items():
        about = f"{name.replace('_', ' ')} of the stage {stage}, as it last reported"
        Gauge(_metric(stage, name), about, registry=registry).set(value)
    for name, reasons in kept["reasons"].items():
        about = f"{name.replace('_', ' ')} of the stage {stage} by reason"
        gauge = Gauge(_metric(stage, name), about, ["reason"], registry=registry)
        for reason, value in reasons.items():
            gauge.labels(reason).set(value)
    return generate_latest(registry).decode()


def _metric(stage: str, name: str) -> str:
    return "trip_" + _NOT_IN_NAMES.sub("_", f"{stage}_{name}".lower())
